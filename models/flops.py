"""The least arithmetic and memory traffic of a step, with every prompt computed once per group: bounds for speed."""

from collections.abc import Sequence
from typing import NamedTuple

from models.config import Qwen3Config

# Substring of JAX's `device_kind` -> the vendor's bfloat16 floating point operations per second, without sparsity.
PEAK_FLOPS = {
    **{"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12},
    **{"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12},
}


class KernelWork(NamedTuple):
    """What a kernel of our own does in one call, on one device: the compiled text does not show it."""

    flops: float
    bytes: float


def peak_flops(device_kind: str) -> float | None:
    """Returns a device's peak (see `PEAK_FLOPS`), or None for an unknown device, such as a CPU.

    Args:
      device_kind: e.g. jax.devices()[0].device_kind.
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def layer_weights(config: Qwen3Config) -> int:
    """Returns the number of entries of the matrices of all layers."""
    D, F = config.hidden_size, config.intermediate_size
    HE, KE = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (2 * D * HE + 2 * D * KE + 3 * D * F)


def forward_flops(config: Qwen3Config, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> float:
    """Returns the floating point operations (a multiply-add is two) of one forward pass over prompts and completions.

        2 * positions * weights of the layers + 4 * pairs of positions * H * E * L + 2 * completion tokens * D * V

    A prompt of n tokens and completions of m tokens each have n + sum(m - 1) positions: the last token of a completion
    predicts nothing. A position attends to all positions before it and to itself. Logits are needed for completion
    tokens only. Sampling the same tokens one by one takes the same arithmetic. A reward model has no logits and
    computes the last token too, for its score.

    Args:
      config: the network.
      prompts: [P] tokens of each prompt.
      completions: [P][G] tokens of each completion.
    """
    D, L, HE = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    weights = layer_weights(config)
    positions = pairs = predicted = 0
    for n, lengths in zip(prompts, completions, strict=True):
        computed = lengths if config.is_reward_model else [m - 1 for m in lengths]
        positions += n + sum(computed)
        pairs += n * (n + 1) // 2 + sum(m * n + m * (m + 1) // 2 for m in computed)
        predicted += 0 if config.is_reward_model else sum(lengths)
    return 2.0 * positions * weights + 4.0 * pairs * HE * L + 2.0 * predicted * D * config.vocab_size


def step_flops(forward: float, *, reference: bool, iterations: int = 1) -> dict[str, float]:
    """Returns the floating point operations of a step's parts, from those of one forward pass.

    Sampling is one forward pass, each iteration of the update over the batch three, a reference policy one more.
    Adapters are counted like full training, which is a third too much.
    """
    update = (3 * iterations + reference) * forward
    return {"generate": forward, "update": update, "step": forward + update}


def decode_bytes(
    config: Qwen3Config, prompts: Sequence[int], completions: Sequence[Sequence[int]], itemsize: int
) -> float:
    """Returns the least bytes that sampling with a key-value cache reads: the bound for small batches.

        tokens of the longest completion * weights, with those of the head
        + keys and values of each prompt, once for every token of its longest completion
        + keys and values of each completion's earlier tokens, once for every token

    Args:
      config, prompts, completions: as for `forward_flops`.
      itemsize: bytes of a number.
    """
    KE = config.num_key_value_heads * config.head_dim
    weights = layer_weights(config) + config.hidden_size * config.vocab_size
    cached = sum(
        n * max(lengths) + sum(m * (m - 1) // 2 for m in lengths)
        for n, lengths in zip(prompts, completions, strict=True)
    )
    longest = max(max(lengths) for lengths in completions)
    return float(itemsize * (longest * weights + 2 * KE * config.num_hidden_layers * cached))
