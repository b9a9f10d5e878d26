"""The kernels of `models.decode_attention` for GPUs (Pallas, Triton): two for a layer.

prefix_attention   all queries of a group over its prompt, whose keys are read once for its G completions
past_attention     the queries of a live completion over its filled positions and its new token; joins the two by an
                   online softmax, and writes the new key and value into the cache in place
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.flops import KernelWork

PREFIX_BLOCK, PAST_BLOCK = 64, 32  # positions that a kernel reads at a time
MIN_ROWS = 16  # of a product on a GPU's tensor cores
_MASKED = -1e30


def attend_on_gpu(
    qkv_PGKWE: jax.Array,
    query_norm_E: jax.Array,
    key_norm_E: jax.Array,
    cos_PGC: jax.Array,
    sin_PGC: jax.Array,
    lengths_P: jax.Array,
    filled: jax.Array,
    live_PG: jax.Array,
    prefix_PKSE: tuple[jax.Array, jax.Array],
    cache_PKGTE: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
    window: int | None,
    interpret: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns [P, G, K, Q, E] and the caches with the new position; arguments as those of `decode_attention`.

    Args:
      filled: filled positions of all completions, or [P] of those of each prompt.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    P, G, K, W, E = qkv_PGKWE.shape
    Q, S, T, dtype = W - 2, prefix_PKSE[0].shape[2], cache_PKGTE[0].shape[3], qkv_PGKWE.dtype
    options: dict[str, Any] = {"interpret": interpret}
    if not interpret:
        options["compiler_params"] = gpu.CompilerParams(num_warps=4, num_stages=2)
    is_one, filled = filled.ndim == 0, filled.astype(jnp.int32).reshape(-1)
    live_PG = live_PG.astype(jnp.int32)

    def block(*shape: int | None, index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, index)

    whole = block(E, index=lambda *_: (0,))
    scalar = block(1, index=lambda p, *_: (0 if is_one else p,))
    length = block(1, index=lambda p, *_: (p,))
    group = block(None, G, None, W, E, index=lambda p, k: (p, 0, k, 0, 0))
    angles = block(None, G, E // 2, index=lambda p, k: (p, 0, 0))
    prompt = block(None, None, S, E, index=lambda p, k: (p, k, 0, 0))
    R, padded = _power_of_2(max(G * Q, MIN_ROWS)), _power_of_2(Q)  # sizes that a GPU's kernel can have
    rows = block(None, None, R, E, index=lambda p, k, *_: (p, k, 0, 0))
    numbers = block(None, None, R, index=lambda p, k, *_: (p, k, 0))
    alive = block(None, G, index=lambda p, k: (p, 0))
    shape = jax.ShapeDtypeStruct
    partial_shapes = [shape((P, K, R, E), jnp.float32), *[shape((P, K, R), jnp.float32)] * 2]
    partial_sums = pl.pallas_call(
        partial(_prefix_kernel, epsilon=epsilon, window=window),
        grid=(P, K),
        in_specs=[scalar, length, alive, group, angles, angles, whole, prompt, prompt],
        out_specs=[rows, numbers, numbers],
        out_shape=partial_shapes,
        name="prefix_attention",
        **options,
    )(filled, lengths_P, live_PG, qkv_PGKWE, cos_PGC, sin_PGC, query_norm_E, *prefix_PKSE)

    one = block(None, None, None, W, E, index=lambda p, k, g: (p, g, k, 0, 0))
    angle = block(None, None, E // 2, index=lambda p, k, g: (p, g, 0))
    growing = block(None, None, None, T, E, index=lambda p, k, g: (p, k, g, 0, 0))
    row = block(None, None, None, padded, E, index=lambda p, k, g: (p, g, k, 0, 0))
    is_alive = block(None, 1, index=lambda p, k, g: (p, g))
    keys, values, out = pl.pallas_call(
        partial(_past_kernel, epsilon=epsilon, window=window),
        grid=(P, K, G),
        in_specs=[scalar, is_alive, one, angle, angle, whole, whole, rows, numbers, numbers, growing, growing],
        out_specs=[growing, growing, row],
        out_shape=[*(shape(part.shape, part.dtype) for part in cache_PKGTE), shape((P, G, K, padded, E), dtype)],
        input_output_aliases={10: 0, 11: 1},
        name="past_attention",
        **options,
    )(
        *(filled, live_PG, qkv_PGKWE, cos_PGC, sin_PGC, query_norm_E, key_norm_E),
        *partial_sums,
        *cache_PKGTE,
    )
    return out[..., :Q, :], (keys, values)


def _prefix_kernel(
    filled_ref: Any,
    length_ref: Any,
    live_ref: Any,
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    scale_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    out_ref: Any,
    max_ref: Any,
    sum_ref: Any,
    *,
    epsilon: float,
    window: int | None,
) -> None:
    """All queries of a group's key/value head over its prompt: the weighted values, the maximum and the sum."""
    from jax.experimental.pallas import triton as gpu

    (G, W, E), S, dtype = qkv_ref.shape, keys_ref.shape[0], qkv_ref.dtype
    Q, C = W - 2, E // 2
    rows = out_ref.shape[0]
    row = jnp.arange(rows)
    is_row, g, q = (row < G * Q)[:, None], jnp.minimum(row // Q, G - 1)[:, None], (row % Q)[:, None]
    half = jnp.arange(C)[None, :]

    def load(ref: Any, *index: Any) -> jax.Array:
        return gpu.load(ref.at[index], mask=is_row, other=0.0)

    cos, sin = load(cos_ref, g, half), load(sin_ref, g, half)
    scales = (scale_ref[:C][None], scale_ref[C:][None])
    halves = _normalise_and_rotate(
        (load(qkv_ref, g, q, half), load(qkv_ref, g, q, half + C)), scales, cos, sin, epsilon
    )
    first, second = (part * jnp.asarray(E**-0.5, dtype) for part in halves)
    live = gpu.load(live_ref.at[jnp.minimum(jnp.arange(_power_of_2(G)), G - 1)]).max()
    length, filled = length_ref[0], filled_ref[0]
    product = partial(gpu.dot, allow_tf32=False)

    def add_block(i: jax.Array, running: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, top, total = running
        position = i * PREFIX_BLOCK + jnp.arange(PREFIX_BLOCK)
        inside = (position < S)[:, None]
        place = jnp.minimum(position, S - 1)[:, None]
        keys = [gpu.load(keys_ref.at[place, half + start], mask=inside, other=0.0) for start in (0, C)]
        values = gpu.load(values_ref.at[place, jnp.arange(E)[None, :]], mask=inside, other=0.0)
        scores = product(first, keys[0], trans_b=True) + product(second, keys[1], trans_b=True)
        seen = (position < length)[None, :]
        if window is not None:
            seen &= (length + filled - position < window)[None, :]
        new_top = jnp.maximum(top, jnp.where(seen, scores, _MASKED).max(1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        scale = jnp.exp(top - new_top)
        out = out * scale[:, None] + product(weights.astype(values.dtype), values)
        return out, new_top, total * scale + weights.sum(1)

    start = (
        jnp.zeros((rows, E), jnp.float32),
        jnp.full((rows,), _MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    blocks = jnp.where(live > 0, (length + PREFIX_BLOCK - 1) // PREFIX_BLOCK, 0)
    out, top, total = jax.lax.fori_loop(0, blocks, add_block, start)
    out_ref[...], max_ref[...], sum_ref[...] = out, top, total


def _past_kernel(
    filled_ref: Any,
    live_ref: Any,
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    query_scale_ref: Any,
    key_scale_ref: Any,
    prefix_out_ref: Any,
    prefix_max_ref: Any,
    prefix_sum_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    new_keys_ref: Any,
    new_values_ref: Any,
    out_ref: Any,
    *,
    epsilon: float,
    window: int | None,
) -> None:
    """The queries of one completion's key/value head over its earlier and its new token; joins the prompt's part."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as gpu

    (W, E), T, dtype = qkv_ref.shape, keys_ref.shape[0], qkv_ref.dtype
    Q, C = W - 2, E // 2
    half = jnp.arange(C)[None, :]
    q = jnp.minimum(jnp.arange(out_ref.shape[0]), Q - 1)[:, None]
    cos, sin, filled = cos_ref[...][None], sin_ref[...][None], filled_ref[0]

    def prepared(at: jax.Array, scale_ref: Any) -> list[jax.Array]:
        halves = tuple(gpu.load(qkv_ref.at[at, half + start]) for start in (0, C))
        scales = (scale_ref[:C][None], scale_ref[C:][None])
        return _normalise_and_rotate(halves, scales, cos, sin, epsilon)

    query = [(part * jnp.asarray(E**-0.5, dtype)).astype(jnp.float32) for part in prepared(q, query_scale_ref)]
    new_key = prepared(jnp.full((1, 1), Q), key_scale_ref)
    new_value = gpu.load(qkv_ref.at[Q + 1, jnp.arange(E)])
    for start, part in zip((0, C), new_key, strict=True):
        gpu.store(new_keys_ref.at[filled, jnp.arange(C) + start], part[0])
    gpu.store(new_values_ref.at[filled, jnp.arange(E)], new_value)

    def dot_halves(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
        return (a[0] * b[0].astype(jnp.float32)).sum(-1) + (a[1] * b[1].astype(jnp.float32)).sum(-1)

    def join(scores: jax.Array, seen: jax.Array, values: jax.Array, running: tuple[jax.Array, ...]) -> Any:
        """Adds positions [rows, U] with values [U, E] to the running softmax."""
        out, top, total = running
        new_top = jnp.maximum(top, jnp.where(seen, scores, _MASKED).max(1))
        weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
        scale = jnp.exp(top - new_top)
        out = out * scale[:, None] + (weights[:, :, None] * values[None]).sum(1)
        return out, new_top, total * scale + weights.sum(1)

    def add_block(i: jax.Array, running: tuple[jax.Array, ...]) -> Any:
        position = i * PAST_BLOCK + jnp.arange(PAST_BLOCK)
        inside, place = (position < T)[:, None], jnp.minimum(position, T - 1)[:, None]
        keys = [gpu.load(keys_ref.at[place, half + start], mask=inside, other=0.0) for start in (0, C)]
        values = gpu.load(values_ref.at[place, jnp.arange(E)[None, :]], mask=inside, other=0.0)
        scores = dot_halves([part[:, None] for part in query], [part[None] for part in keys])
        seen = (position < filled)[None, :]
        if window is not None:
            seen &= (filled - position < window)[None, :]
        return join(scores, seen, values.astype(jnp.float32), running)

    first_row = Q * pl.program_id(2)  # of this completion, among the rows of its group
    running = (
        gpu.load(prefix_out_ref.at[first_row + q, jnp.arange(E)[None, :]]),
        gpu.load(prefix_max_ref.at[first_row + q[:, 0]]),
        gpu.load(prefix_sum_ref.at[first_row + q[:, 0]]),
    )
    own = dot_halves(query, new_key)
    running = join(own[:, None], jnp.ones((1, 1), bool), new_value.astype(jnp.float32)[None], running)
    blocks = jnp.where(live_ref[0] > 0, (filled + PAST_BLOCK - 1) // PAST_BLOCK, 0)
    out, _, total = jax.lax.fori_loop(0, blocks, add_block, running)
    out_ref[...] = (out / total[:, None]).astype(dtype)


def _normalise_and_rotate(
    halves: tuple[jax.Array, ...], scales: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, epsilon: float
) -> list[jax.Array]:
    """`rotate(rms_norm(x))` of x in two halves, rounded where those round."""
    dtype, width = halves[0].dtype, 2 * halves[0].shape[-1]
    wide = [half.astype(jnp.float32) for half in halves]
    mean = sum(jnp.square(half).sum(-1, keepdims=True) for half in wide) / width
    inverse = jax.lax.rsqrt(mean + epsilon)
    first, second = (
        ((half * inverse).astype(dtype) * scale.astype(dtype)).astype(jnp.float32)
        for half, scale in zip(wide, scales, strict=True)
    )
    return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def has_kernel(head_dim: int) -> bool:
    """Returns whether a GPU's kernels can have heads of this width: their products have halves of it, 16 at least."""
    return head_dim >= 2 * MIN_ROWS and head_dim == _power_of_2(head_dim)


def kernel_work(P: int, G: int, K: int, Q: int, E: int, S: int, filled: float, itemsize: int) -> dict[str, KernelWork]:
    """Returns what each kernel does in a call on one device: `S` tokens of every prompt, `filled` of every completion.

    prefix_attention: 4 P G K Q S E FLOPs; keys and values of the prompt once, the group's projections, its partial sums
    past_attention:   4 P G K Q (filled + 1) E FLOPs; keys and values of what is filled, the new ones, the partial sums
    """
    rows = P * G * K * Q
    projections, sums = P * G * K * (Q + 2) * E * itemsize, 4 * rows * (E + 2)
    prefix = KernelWork(4.0 * rows * S * E, 2.0 * P * K * S * E * itemsize + projections + sums)
    cached = 2.0 * P * G * K * (filled + 1) * E * itemsize
    past = KernelWork(4.0 * rows * (filled + 1) * E, cached + projections + sums + rows * E * itemsize)
    return {"prefix_attention": prefix, "past_attention": past}
