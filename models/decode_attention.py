"""Attention of one new token of every completion to its prompt, its earlier tokens and itself, and the cache's update.

On a GPU two kernels a layer do all of it (`models.decode_gpu`), on a TPU one (`models.decode_tpu`). Elsewhere the same
is XLA's, over the whole cache.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.attention import put_positions
from models.decode_gpu import MIN_ROWS, PAST_BLOCK, PREFIX_BLOCK, attend_on_gpu, has_kernel, kernel_work
from models.decode_tpu import attend_on_tpu
from models.qwen3 import rms_norm, rotate
from models.sharding import Layout

__all__ = [
    "MIN_ROWS",
    "PAST_BLOCK",
    "PREFIX_BLOCK",
    "HeadNorms",
    "LayerKeyValues",
    "Token",
    "decode_attention",
    "has_kernel",
    "kernel_work",
]
_MASKED = -1e30


class LayerKeyValues(NamedTuple):
    """Keys and values of one layer: of prompts [P, K, S, E], or of completions [P, K, G, T, E]."""

    keys: Any
    values: Any


class HeadNorms(NamedTuple):
    """RMS normalisation of queries and keys before their rotation."""

    query_E: jax.Array
    key_E: jax.Array
    epsilon: float


class Token(NamedTuple):
    """What a layer's attention has to know of the new token of every completion."""

    cos_PGC: Any  # of the rotary angles, float32; C = E / 2
    sin_PGC: Any
    lengths_P: Any  # tokens of each prompt
    filled: Any  # positions of the cache that are filled: of every completion, or [P] of those of each prompt
    live_PG: Any  # False: the completion has ended; nothing of it is read, and its output means nothing


def decode_attention(
    qkv_PGKWE: jax.Array,
    norms: HeadNorms,
    token: Token,
    prefix: LayerKeyValues,
    cache: LayerKeyValues,
    *,
    window: int | None = None,
    layout: Layout | None = None,
    kernel: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, LayerKeyValues]:
    """Softmax attention of one token of each completion.

        out = softmax([q k_prefix, q k_past, q k_new] / sqrt(E)) [v_prefix, v_past, v_new]

    Args:
      qkv_PGKWE: W = Q + 2 projections for each key/value head: Q queries, the key, the value; not yet normalised.
      cache: keys and values of `token.filled` earlier positions.
      window: a position attends to itself and the window - 1 positions before it; None = to all before it.
      layout: shards the kernels over prompts, completions and key/value heads.
      kernel: "gpu" or "tpu": use the kernels for these; None: XLA's path.
      interpret: run the kernels without such a device, slowly.

    Returns:
      [P, G, K, Q, E] in the dtype of qkv, and the cache with the new position.
    """
    if kernel is None:
        return _attend_by_xla(qkv_PGKWE, norms, token, prefix, cache, window)
    attend = partial(_attend_by_kernels, kernel=kernel, epsilon=norms.epsilon, window=window, interpret=interpret)
    arguments = (qkv_PGKWE, norms.query_E, norms.key_E, token, prefix, cache)
    if layout is None:
        return attend(*arguments)
    heads, groups = ("prompt", "group", "kv_heads", None, None), ("prompt", "group")
    prompt, completion = ("prompt", "kv_heads", None, None), ("prompt", "kv_heads", "group", None, None)
    spec, none = layout.spec, PartitionSpec()
    filled = spec(("prompt",) if token.filled.ndim else ())
    tokens = Token(spec((*groups, None)), spec((*groups, None)), spec(("prompt",)), filled, spec(groups))
    caches = LayerKeyValues(spec(completion), spec(completion))
    inputs = (spec(heads), none, none, tokens, LayerKeyValues(spec(prompt), spec(prompt)), caches)
    sharded = jax.shard_map(attend, mesh=layout.mesh, in_specs=inputs, out_specs=(spec(heads), caches), check_vma=False)
    return sharded(*arguments)


# XLA's path


def _attend_by_xla(
    qkv_PGKWE: jax.Array,
    norms: HeadNorms,
    token: Token,
    prefix: LayerKeyValues,
    cache: LayerKeyValues,
    window: int | None,
) -> tuple[jax.Array, LayerKeyValues]:
    E, dtype = qkv_PGKWE.shape[-1], qkv_PGKWE.dtype
    rotary = token.cos_PGC[:, :, None, None], token.sin_PGC[:, :, None, None]
    query = rotate(rms_norm(qkv_PGKWE[..., :-2, :], norms.query_E, norms.epsilon), rotary)
    query = query * jnp.asarray(E**-0.5, dtype)
    new = rotate(rms_norm(qkv_PGKWE[..., -2:-1, :], norms.key_E, norms.epsilon), rotary)

    def put(cache_PKGTE: jax.Array, new_PGK1E: jax.Array) -> jax.Array:
        new_PKG1E = jnp.swapaxes(new_PGK1E, 1, 2)
        if token.filled.ndim:
            return put_positions(cache_PKGTE, new_PKG1E, token.filled, prompt_axis=0, axis=3)
        return jax.lax.dynamic_update_slice_in_dim(cache_PKGTE, new_PKG1E, token.filled, axis=3)

    cache = LayerKeyValues(put(cache.keys, new), put(cache.values, qkv_PGKWE[..., -1:, :]))
    position_S, position_T = jnp.arange(prefix.keys.shape[2]), jnp.arange(cache.keys.shape[3])
    length = token.lengths_P[:, None, None, None, None]
    filled = token.filled[:, None, None, None, None] if token.filled.ndim else token.filled
    of_prefix, of_past = position_S < length, position_T <= filled
    if window is not None:
        of_prefix &= length + filled - position_S < window
        of_past &= filled - position_T < window
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    prefix_scores = jnp.where(of_prefix, product("pgkqe,pkse->pkgqs", query, prefix.keys), _MASKED)
    past_scores = jnp.where(of_past, product("pgkqe,pkgte->pkgqt", query, cache.keys), _MASKED)
    top = jnp.maximum(prefix_scores.max(-1), past_scores.max(-1))[..., None]
    prefix_weights, past_weights = jnp.exp(prefix_scores - top), jnp.exp(past_scores - top)
    total = prefix_weights.sum(-1, keepdims=True) + past_weights.sum(-1, keepdims=True)
    out = product("pkgqs,pkse->pkgqe", prefix_weights.astype(dtype), prefix.values)
    out += product("pkgqt,pkgte->pkgqe", past_weights.astype(dtype), cache.values)
    return jnp.swapaxes((out / total).astype(dtype), 1, 2), cache


# Kernels


def _attend_by_kernels(
    qkv_PGKWE: jax.Array,
    query_norm_E: jax.Array,
    key_norm_E: jax.Array,
    token: Token,
    prefix: LayerKeyValues,
    cache: LayerKeyValues,
    *,
    kernel: str,
    **options: Any,
) -> tuple[jax.Array, LayerKeyValues]:
    filled = token.filled if kernel == "gpu" else jnp.broadcast_to(token.filled, token.lengths_P.shape)
    attend: Any = {"gpu": attend_on_gpu, "tpu": attend_on_tpu}[kernel]
    out, grown = attend(
        *(qkv_PGKWE, query_norm_E, key_norm_E, token.cos_PGC, token.sin_PGC, token.lengths_P),
        *(filled, token.live_PG, tuple(prefix), tuple(cache)),
        **options,
    )
    return out, LayerKeyValues(*grown)
