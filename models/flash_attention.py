"""Attention of whole rows to their group's prompt and to themselves by kernels: scoring, the update, the prompt's pass.

The same as `models.attention.group_attention` without a cache, and with queries and keys in the order in which the
projections write them. Kernels are for accelerators (`models.flash_gpu`, `models.flash_tpu`); on CPUs, and as the
reference, there is XLA's path. `choose_attention` decides by the devices; `mesh.attention` overrides it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from models import flash_gpu, flash_tpu
from models.attention import KeyValues
from models.config import Qwen3Config
from models.sharding import GPUS, Layout, platform_of, total_shards

KERNELS: dict[str, Any] = {"gpu": flash_gpu, "tpu": flash_tpu}
INTERPRETED = "interpreted "  # and the kernels' kind: on CPUs, slowly, for tests


def choose_attention(layout: Layout | None, config: Qwen3Config) -> str:
    """Returns xla or a key of `KERNELS`: what the layout asks for, or for "auto" what its devices want.

    Raises:
      ValueError: the devices, the rules of the mesh, or the width of the heads do not allow it.
    """
    wanted = "xla" if layout is None else layout.attention
    if layout is None or wanted == "xla" or wanted.startswith(INTERPRETED):
        return wanted
    rules, platform = dict(layout.rules), platform_of(layout)
    kind = "gpu" if platform in GPUS else platform
    alike = rules["heads"] == rules["kv_heads"] and total_shards(layout, "sequence", "head_dim") == 1
    if kind in KERNELS and alike and config.head_dim in KERNELS[kind].HEADS:
        return kind
    if wanted == "kernels":
        raise ValueError(
            f"mesh.attention: kernels are for GPUs and TPUs, heads of 16, 32, 64 or 128 (256 on TPUs), one rule for "
            f"heads and kv_heads and no split sequence, got {platform} and heads of {config.head_dim}; expected auto "
            f"or xla"
        )
    return "xla"


class Inputs(NamedTuple):
    """What a kernel reads; T and S are multiples of its blocks."""

    query_PGTHE: jax.Array
    row: KeyValues  # [P, G, T, K, E]
    prompt: KeyValues | None  # [P, S, K, E]
    intervals: tuple[jax.Array, jax.Array, jax.Array]  # lengths_P, first_PGT, prompt_first_PGT; int32


@jax.named_scope("attention")
def flash_attention(
    query_PGTHE: jax.Array,
    row: KeyValues,
    *,
    prompt: KeyValues | None = None,
    prompt_lengths_P: jax.Array | None = None,
    offset_PGT: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
    layout: Layout | None = None,
    kernels: str = "gpu",
) -> jax.Array:
    """Softmax attention of rows of T positions to their prompt and to themselves, differentiable.

        out = softmax([q k_prompt, q k_row] / sqrt(E)) [v_prompt, v_row]

    A query sees keys of two intervals: of the prompt [length + offset - window + 1, length), of its row
    [t - min(offset, window - 1), t]; without a window to the prompt's and the completion's beginnings.

    Args:
      query_PGTHE: queries, rotated and normalised, not yet scaled.
      row: keys and values of the rows, [P, G, T, K, E]; K divides H.
      prompt: keys and values of the group's prompt, [P, S, K, E].
      prompt_lengths_P: tokens of each prompt; needed with prompt.
      offset_PGT: for rows that pack several completions: each position's index in its completion; None = t.
      window: a position attends to itself and the window - 1 positions before it; None = to all before it.
      layout: shards the kernels over prompts, rows and heads.
      kernels: which, as `choose_attention` returns it.

    Returns:
      [P, G, T, H, E] in the queries' dtype. Scores and the softmax are float32.

    Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2.
    """
    P, G, T, _, _ = query_PGTHE.shape
    t = jnp.arange(T, dtype=jnp.int32)
    offset_PGT = jnp.broadcast_to(t, (P, G, T)) if offset_PGT is None else offset_PGT.astype(jnp.int32)
    lengths_P = jnp.zeros(P, jnp.int32) if prompt_lengths_P is None else prompt_lengths_P.astype(jnp.int32)
    if window is None:
        first_PGT, prompt_first_PGT = t - offset_PGT, jnp.zeros_like(offset_PGT)
    else:
        before = jnp.asarray(window, jnp.int32) - 1
        first_PGT = t - jnp.minimum(offset_PGT, before)
        prompt_first_PGT = jnp.maximum(lengths_P[:, None, None] + offset_PGT - before, 0)
    to_blocks = partial(_pad, multiple=_module(kernels).MULTIPLE)
    row, prompt = jax.tree.map(partial(to_blocks, axis=2), row), jax.tree.map(partial(to_blocks, axis=1), prompt)
    last = row.keys.shape[2] - T  # positions that only fill up a block see themselves, and nobody sees them
    if last:
        ends = jnp.broadcast_to(jnp.arange(T, T + last, dtype=jnp.int32), (P, G, last))
        first_PGT = jnp.concatenate([first_PGT, ends], axis=2)
    inputs = Inputs(
        to_blocks(query_PGTHE, axis=2), row, prompt, (lengths_P, first_PGT, to_blocks(prompt_first_PGT, axis=2))
    )
    return _attend(inputs, layout, kernels)[:, :, :T]


def _pad(array: jax.Array, *, axis: int, multiple: int) -> jax.Array:
    size = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, size if i == axis else 0) for i in range(array.ndim)]) if size else array


def _module(kernels: str) -> Any:
    return KERNELS[kernels.removeprefix(INTERPRETED)]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(inputs: Inputs, layout: Layout | None, kernels: str) -> jax.Array:
    return _forward(inputs, layout, kernels)[0]


def _forward(inputs: Inputs, layout: Layout | None, kernels: str) -> tuple[jax.Array, Any]:
    forward = partial(_module(kernels).forward, interpret=kernels.startswith(INTERPRETED))
    if layout is not None:
        specs = _specs(inputs, layout)
        out = (specs.query_PGTHE, _numbers(inputs, layout))
        forward = jax.shard_map(forward, mesh=layout.mesh, in_specs=(specs,), out_specs=out, check_vma=False)
    out_PGTHE, normalizer_PGHT = forward(inputs)
    return out_PGTHE, (inputs, out_PGTHE, normalizer_PGHT)


def _backward(layout: Layout | None, kernels: str, residuals: Any, gradient_PGTHE: jax.Array) -> tuple[Inputs]:
    inputs, out_PGTHE, normalizer_PGHT = residuals
    axes = () if layout is None else _axes_of_group(inputs, layout)
    interpret = kernels.startswith(INTERPRETED)

    def backward(
        inputs: Inputs, out_PGTHE: jax.Array, normalizer_PGHT: jax.Array, gradient_PGTHE: jax.Array
    ) -> tuple[jax.Array, KeyValues, KeyValues | None]:
        d_query, d_row, d_prompt = _module(kernels).backward(
            inputs, out_PGTHE, normalizer_PGHT, gradient_PGTHE, interpret
        )
        if d_prompt is not None:
            d_prompt = jax.lax.psum(d_prompt, axes) if axes else d_prompt
            d_prompt = jax.tree.map(lambda total: total.astype(d_query.dtype), d_prompt)
        return d_query, d_row, d_prompt

    run: Any = backward
    if layout is not None:
        specs = _specs(inputs, layout)
        given = (specs, specs.query_PGTHE, _numbers(inputs, layout), specs.query_PGTHE)
        run = jax.shard_map(backward, mesh=layout.mesh, in_specs=given, out_specs=specs[:3], check_vma=False)
    d_query, d_row, d_prompt = run(inputs, out_PGTHE, normalizer_PGHT, gradient_PGTHE)
    none: Any = tuple(np.zeros(array.shape, jax.dtypes.float0) for array in inputs.intervals)
    return (Inputs(d_query, d_row, d_prompt, none),)


_attend.defvjp(_forward, _backward)


def _group(inputs: Inputs) -> str | None:
    return "group" if inputs.query_PGTHE.shape[1] > 1 else None  # the only row of a prompt is on all of its devices


def _axes_of_group(inputs: Inputs, layout: Layout) -> tuple[str, ...]:
    return () if _group(inputs) is None else dict(layout.rules)["group"]


def _numbers(inputs: Inputs, layout: Layout) -> PartitionSpec:
    return layout.spec(("prompt", _group(inputs), "heads", None))


def _specs(inputs: Inputs, layout: Layout) -> Inputs:
    group = _group(inputs)
    row = layout.spec(("prompt", group, None, "kv_heads", None))
    prompt = layout.spec(("prompt", None, "kv_heads", None))
    positions = layout.spec(("prompt", group, None))
    return Inputs(
        layout.spec(("prompt", group, None, "heads", None)),  # type: ignore[arg-type]
        KeyValues(row, row),  # type: ignore[arg-type]
        None if inputs.prompt is None else KeyValues(prompt, prompt),  # type: ignore[arg-type]
        (layout.spec(("prompt",)), positions, positions),  # type: ignore[arg-type]
    )
