"""Attention of completions to their group's prompt (prefix), to their earlier tokens (past) and to their new tokens.

The keys of the prompt have no group axis: one batched matrix product serves all G completions of a prompt, so
they are read once per group. An online softmax joins the parts without concatenating them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUERY_BLOCKS, MIN_QUERY_BLOCK = 4, 128  # a block of queries skips the keys behind its last query
CACHE_CHUNK = 64  # cached positions read at a time, so that empty chunks are not read


class KeyValues(NamedTuple):
    """Keys and values as a layer projects them, [P, G, T, K, E], of prompts [P, S, K, E]; of all layers [L, ...]."""

    keys: jax.Array
    values: jax.Array


class PrefixKeyValues(NamedTuple):
    """Keys [P, K, E, S] and values [P, K, S, E] of prompts; of all layers [L, ...].

    With positions last in the keys, attention of few queries to many keys is three times faster on a CPU.
    """

    keys: jax.Array
    values: jax.Array


def heads_first(kv: KeyValues) -> KeyValues:
    """Converts [..., P, G, T, K, E] to [..., P, K, G, T, E]: decoding on a CPU is twice as fast in this order."""
    return KeyValues(*(jnp.einsum("...gtke->...kgte", part) for part in kv))


def prefix_key_values(kv: KeyValues) -> PrefixKeyValues:
    """Converts keys and values of prompts, [..., P, S, K, E], to the order in which their completions read them."""
    return PrefixKeyValues(jnp.einsum("...ske->...kes", kv.keys), jnp.einsum("...ske->...kse", kv.values))


class Past(NamedTuple):
    """Key-value cache of growing completions in all layers; the first `length` positions are filled.

    `length` is a number, or [P] where prompts are at different positions; it is then appended one position at a time.
    """

    keys_LPKGET: jax.Array  # T last, as in `PrefixKeyValues`
    values_LPKGTE: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, prefix: PrefixKeyValues, G: int, T: int) -> "Past":
        """Allocates a cache for G completions of T tokens of each prompt."""
        (L, P, K, _, E), dtype = prefix.values.shape, prefix.values.dtype
        return cls(jnp.zeros((L, P, K, G, E, T), dtype), jnp.zeros((L, P, K, G, T, E), dtype), jnp.zeros((), jnp.int32))

    @jax.named_scope("cache")
    def append(self, new_LPKGTE: KeyValues) -> "Past":
        """Returns the cache with the keys and values of the next positions."""
        keys_LPKGET = jnp.swapaxes(new_LPKGTE.keys, -1, -2)
        if self.length.ndim:
            keys_LPKGET = put_positions(self.keys_LPKGET, keys_LPKGET, self.length, prompt_axis=1, axis=5)
            values_LPKGTE = put_positions(self.values_LPKGTE, new_LPKGTE.values, self.length, prompt_axis=1, axis=4)
            return Past(keys_LPKGET, values_LPKGTE, self.length + 1)
        return Past(
            jax.lax.dynamic_update_slice_in_dim(self.keys_LPKGET, keys_LPKGET, self.length, axis=5),
            jax.lax.dynamic_update_slice_in_dim(self.values_LPKGTE, new_LPKGTE.values, self.length, axis=4),
            self.length + new_LPKGTE.keys.shape[4],
        )


def put_positions(cache: jax.Array, new: jax.Array, position_P: jax.Array, *, prompt_axis: int, axis: int) -> jax.Array:
    """Writes one position of each prompt: cache[..., p, ..., position_P[p], ...] = new[..., p, ..., 0, ...].

    Each device writes its own prompts: they are a batch axis of the scatter.
    """
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, cache.ndim - 1)),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=(prompt_axis,),
        scatter_indices_batching_dims=(0,),
    )
    updates = jnp.moveaxis(new.squeeze(axis), prompt_axis, 0)
    return jax.lax.scatter(
        cache, position_P[:, None], updates, numbers, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP
    )


class RunningSoftmax(NamedTuple):
    """State of an online softmax: the weighted sum so far is numerator / denominator, both scaled by exp(-max)."""

    max_PKGTQ1: jax.Array
    numerator_PKGTQE: jax.Array
    denominator_PKGTQ1: jax.Array


@jax.named_scope("attention")
def group_attention(
    query_PGTKQE: jax.Array,
    new_PKGTE: KeyValues,
    *,
    prefix: PrefixKeyValues | None = None,
    prefix_lengths_P: jax.Array | None = None,
    past: Past | None = None,
    layer: jax.typing.ArrayLike = 0,
    offset_PGT: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Softmax attention of T new positions over prefix, past and the new positions.

        out = softmax([q k_prefix, q k_past, q k_new] / sqrt(E)) [v_prefix, v_past, v_new]

    Args:
      query_PGTKQE: queries, rotated and normalised, Q query heads per key/value head.
      new_PKGTE: keys and values of the T positions (see `heads_first`); position t attends to positions 0 ... t.
      prefix: keys and values of the prompt, shared by the group.
      prefix_lengths_P: tokens of each prompt; the positions behind are masked. Needed with prefix.
      past: keys and values of the completion's earlier positions in all layers. Unfilled positions are masked;
        chunks without filled positions are not read. Not differentiable.
      layer: the layer of `past` to attend to.
      offset_PGT: for rows that pack several completions: each position's index in its completion. A position attends
        to that many positions before it at most. None = t, one completion per row.
      window: a position attends to itself and the window - 1 positions before it; None = to all before it.

    Returns:
      [P, G, T, K, Q, E] in the queries' dtype. Scores and the softmax are float32.
    """
    P, G, T, K, _, E = query_PGTKQE.shape
    past_length: Any = 0
    if past is not None:  # broadcastable to [P, K, G, C, Q, U]
        past_length = past.length if past.length.ndim == 0 else past.length.reshape(P, 1, 1, 1, 1, 1)
    query_PKGTQE = jnp.einsum("pgtkqe->pkgtqe", query_PGTKQE * jnp.asarray(E**-0.5, query_PGTKQE.dtype))

    def in_window(distance: Any, mask: jax.Array) -> jax.Array:
        return mask if window is None else mask & (distance < window)

    def attend_block(start: int, end: int) -> jax.Array:
        """Attention output of queries[start:end], float32."""
        query_PKGCQE = query_PKGTQE[:, :, :, start:end]
        t_C11 = jnp.arange(start, end)[:, None, None]
        distance_C1U = t_C11 - jnp.arange(end)
        mask = in_window(distance_C1U, distance_C1U >= 0)
        offset = t_C11  # a position's index in its completion, broadcastable to [P, K, G, C, Q, U]
        if offset_PGT is not None:
            offset = offset_PGT[:, None, :, start:end, None, None]
            mask &= distance_C1U <= offset
        parts = [(_scores(query_PKGCQE, new_PKGTE.keys[..., :end, :], mask), new_PKGTE.values[..., :end, :])]
        if prefix is not None:
            assert prefix_lengths_P is not None
            position_S = jnp.arange(prefix.values.shape[-2])
            length = prefix_lengths_P.reshape(P, 1, 1, 1, 1, 1)
            mask = in_window(length + past_length + offset - position_S, position_S < length)
            parts.append((_scores(query_PKGCQE, jnp.swapaxes(prefix.keys, -1, -2), mask), prefix.values))
        softmax = _online_softmax(parts)
        if past is not None:
            capacity = past.values_LPKGTE.shape[4]
            size = min(CACHE_CHUNK, capacity)

            def add_chunk(i: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
                """Adds the i-th chunk of the past; a last chunk that would not fit starts earlier."""
                first = jnp.minimum(i * size, capacity - size)
                keys = jax.lax.dynamic_slice(past.keys_LPKGET, (layer, 0, 0, 0, 0, first), (1, P, K, G, E, size))[0]
                values = jax.lax.dynamic_slice(past.values_LPKGTE, (layer, 0, 0, 0, first, 0), (1, P, K, G, size, E))[0]
                position_U = first + jnp.arange(size)
                filled_U = (position_U >= i * size) & (position_U < past_length)
                mask = in_window(past_length + t_C11 - position_U, filled_U)
                return _online_softmax([(_scores(query_PKGCQE, jnp.swapaxes(keys, -1, -2), mask), values)], softmax)

            softmax = jax.lax.fori_loop(0, (past.length.max() + size - 1) // size, add_chunk, softmax)
        return softmax.numerator_PKGTQE / softmax.denominator_PKGTQ1

    block = max(-(-T // QUERY_BLOCKS), MIN_QUERY_BLOCK)
    out_PKGTQE = jnp.concatenate([attend_block(start, min(start + block, T)) for start in range(0, T, block)], axis=3)
    return jnp.einsum("pkgtqe->pgtkqe", out_PKGTQE.astype(query_PGTKQE.dtype))


# The products below are matrix products with TQ (for the prompt GTQ) as one axis: with several axes, XLA would
# transpose a copy of the gradient.


def _scores(query_PKGTQE: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns scores [P, K, G, T, Q, U], -inf where masked, for keys [P, K, U, E] or [P, K, G, U, E]."""
    P, K, G, T, Q, E = query_PKGTQE.shape
    query = query_PKGTQE.reshape(*keys.shape[:-2], -1, E)
    scores = jnp.einsum("...me,...ue->...mu", query, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores.reshape(P, K, G, T, Q, -1), -jnp.inf)


def _online_softmax(parts: list[tuple[jax.Array, jax.Array]], running: RunningSoftmax | None = None) -> RunningSoftmax:
    """Online softmax: folds (scores, values) parts into the running (max, numerator, denominator)."""
    maxima = [scores.max(-1, keepdims=True) for scores, _ in parts]
    if running is not None:
        maxima.append(running.max_PKGTQ1)
    # The maximum is finite, since every position attends to itself. It cancels in the quotient: no gradient needed.
    max_PKGTQ1 = jax.lax.stop_gradient(jnp.max(jnp.stack(maxima), axis=0))
    numerator, denominator = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    if running is not None:
        rescale = jnp.exp(running.max_PKGTQ1 - max_PKGTQ1)
        numerator, denominator = running.numerator_PKGTQE * rescale, running.denominator_PKGTQ1 * rescale
    for scores, values in parts:
        weights = jnp.exp(scores - max_PKGTQ1)
        denominator += weights.sum(-1, keepdims=True)
        weights = weights.astype(values.dtype).reshape(*values.shape[:-2], -1, values.shape[-2])
        weighted = jnp.einsum("...mu,...ue->...me", weights, values, preferred_element_type=jnp.float32)
        numerator += weighted.reshape(*scores.shape[:-1], -1)
    return RunningSoftmax(max_PKGTQ1, numerator, denominator)
