"""The least arithmetic that a step needs, with every prompt computed once per group: what speed is measured against."""

from collections.abc import Sequence

from models.config import Qwen3Config

# bfloat16 floating point operations per second of one device, without sparsity, as its maker states them. The names
# are parts of what JAX calls the device (`device_kind`).
PEAK_FLOPS = {
    **{"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v6": 918e12},
    **{"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12},
}


def peak_flops(device_kind: str) -> float | None:
    """Of a device such as jax.devices()[0].device_kind, None where it is not known (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def layer_weights(config: Qwen3Config) -> int:
    """Entries of the matrices of all layers."""
    D, F = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * (2 * D * query + 2 * D * key + 3 * D * F)


def forward_flops(config: Qwen3Config, prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> float:
    """Floating point operations of one forward pass (a multiply-add is two) over prompts and their completions.

        2 * positions * weights of the layers + 4 * pairs of positions * H * E * L + 2 * completion tokens * D * V

    A prompt of n tokens and completions of m tokens each are n + sum(m - 1) positions: the last token of a completion
    predicts nothing. A position attends to what stands before it and to itself. Logits exist where a completion token
    is predicted, nowhere else. Sampling the same tokens one by one is the same arithmetic. A reward model has no logits
    and computes the last token too: it reads its score there.

    Args:
      prompts: tokens of each of the P prompts.
      completions: tokens of each of the completions of each prompt.
    """
    D, L, query = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    weights = layer_weights(config)
    positions = pairs = predicted = 0
    for n, lengths in zip(prompts, completions, strict=True):
        computed = lengths if config.is_reward_model else [m - 1 for m in lengths]
        positions += n + sum(computed)
        pairs += n * (n + 1) // 2 + sum(m * n + m * (m + 1) // 2 for m in computed)
        predicted += 0 if config.is_reward_model else sum(lengths)
    return 2.0 * positions * weights + 4.0 * pairs * query * L + 2.0 * predicted * D * config.vocab_size


def step_flops(forward: float, *, reference: bool, iterations: int = 1) -> dict[str, float]:
    """Of a step's parts: sampling is one forward pass, an update three in each pass over the batch; a reference policy
    costs one more. Adapters are counted like whole weights, which is a third too much."""
    update = (3 * iterations + reference) * forward
    return {"generate": forward, "update": update, "step": forward + update}


def decode_bytes(
    config: Qwen3Config, prompts: Sequence[int], completions: Sequence[Sequence[int]], itemsize: int
) -> float:
    """The least bytes that sampling reads, its cache of keys and values kept in memory: the bound of small batches.

        tokens of the longest completion * weights, the head's included
        + keys and values of each prompt, once for every token of its longest completion
        + keys and values of each completion's own tokens before each of them

    Args:
      prompts, completions: as for `forward_flops`.
      itemsize: bytes of a number.
    """
    key = config.num_key_value_heads * config.head_dim
    weights = layer_weights(config) + config.hidden_size * config.vocab_size
    cached = sum(
        n * max(lengths) + sum(m * (m - 1) // 2 for m in lengths)
        for n, lengths in zip(prompts, completions, strict=True)
    )
    longest = max(max(lengths) for lengths in completions)
    return float(itemsize * (longest * weights + 2 * key * config.num_hidden_layers * cached))
