"""The one attention door: completions attend to their group's prompt, to what came before, and to themselves.

The keys of the prompt have no group axis: one batched matrix product serves all G completions of a prompt, so
they are read once per group. The parts are joined in one softmax without being concatenated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

QUERY_BLOCKS, MIN_QUERY_BLOCK = 4, 128  # of queries: the positions behind a block's last one are not computed for it
CACHE_CHUNK = 64  # cached positions read at a time: no more of the cache is read than is filled


class KeyValues(NamedTuple):
    """Keys and values of completions, [P, K, G, T, E]; [L, ...] of all layers."""

    keys: jax.Array
    values: jax.Array


class PrefixKeyValues(NamedTuple):
    """Of prompts: keys [P, K, E, S], values [P, K, S, E]; [L, ...] of all layers.

    With positions last, a few queries' attention to many keys is three times faster on a CPU.
    """

    keys: jax.Array
    values: jax.Array


class Past(NamedTuple):
    """The cache of completions that grow: what came before, in all layers, of which `length` positions are real."""

    keys_LPKGET: jax.Array  # T last, see `PrefixKeyValues`
    values_LPKGTE: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, prefix: PrefixKeyValues, G: int, T: int) -> "Past":
        """Room for G completions of T tokens of each prompt."""
        (L, P, K, _, E), dtype = prefix.values.shape, prefix.values.dtype
        return cls(jnp.zeros((L, P, K, G, E, T), dtype), jnp.zeros((L, P, K, G, T, E), dtype), jnp.zeros((), jnp.int32))

    def append(self, own_LPKGTE: KeyValues) -> "Past":
        """With the keys and values of the next positions."""
        keys_LPKGET = jnp.swapaxes(own_LPKGTE.keys, -1, -2)
        return Past(
            jax.lax.dynamic_update_slice_in_dim(self.keys_LPKGET, keys_LPKGET, self.length, axis=5),
            jax.lax.dynamic_update_slice_in_dim(self.values_LPKGTE, own_LPKGTE.values, self.length, axis=4),
            self.length + own_LPKGTE.keys.shape[4],
        )


class RunningSoftmax(NamedTuple):
    """A softmax-weighted sum that is not finished: numerator / normalizer, both scaled by exp(-top)."""

    max_PKGTQ1: jax.Array
    numerator_PKGTQE: jax.Array
    denominator_PKGTQ1: jax.Array


def group_attention(
    query_PGTKQE: jax.Array,
    own_PKGTE: KeyValues,
    *,
    prefix: PrefixKeyValues | None = None,
    prefix_lengths_P: jax.Array | None = None,
    past: Past | None = None,
    layer: jax.typing.ArrayLike = 0,
    offset_PGT: jax.Array | None = None,
    window: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Softmax attention of T new positions over prefix, past and themselves.

        out = softmax([q k_prefix, q k_past, q k_own] / sqrt(E)) [v_prefix, v_past, v_own]

    Args:
      query_PGTKQE: queries, rotated and normalised, Q query heads per key/value head.
      own_PKGTE: keys and values of the T positions; position t sees those up to t.
      prefix: of the prompt, shared by the group; positions at or behind `prefix_lengths_P` are unseen.
      past: of earlier positions of the same completion, in all layers (this one is `layer`). What is not real yet
        is unseen and, beyond a chunk, unread. Not differentiable.
      offset_PGT: of rows that hold several completions one behind the other: each position's place in its own
        completion. It sees no more than so many positions before it. None = t, one completion in each row.
      window: a position sees itself and the window - 1 before it; None = all before it.

    Returns:
      [P, G, T, K, Q, E] in the queries' dtype. Scores and the softmax are float32.
    """
    P, G, T, K, _, E = query_PGTKQE.shape
    past_length = past.length if past is not None else 0
    query_PKGTQE = jnp.einsum("pgtkqe->pkgtqe", query_PGTKQE * jnp.asarray(E**-0.5, query_PGTKQE.dtype))

    def within(distance: Any, seen: jax.Array) -> jax.Array:
        return seen if window is None else seen & (distance < window)

    def block(start: int, end: int) -> jax.Array:
        """Of the queries from `start` to `end`."""
        query = query_PKGTQE[:, :, :, start:end]
        here_T11 = jnp.arange(start, end)[:, None, None]
        apart_T1U = here_T11 - jnp.arange(end)
        seen = within(apart_T1U, apart_T1U >= 0)
        offset = here_T11  # a position's place in its completion, as [..., T, 1, 1]
        if offset_PGT is not None:
            offset = offset_PGT[:, None, :, start:end, None, None]
            seen &= apart_T1U <= offset
        parts = [(_scores(query, own_PKGTE.keys[..., :end, :], seen), own_PKGTE.values[..., :end, :])]
        if prefix is not None:
            assert prefix_lengths_P is not None
            there_S = jnp.arange(prefix.values.shape[-2])
            length = prefix_lengths_P.reshape(P, 1, 1, 1, 1, 1)
            seen = within(length + past_length + offset - there_S, there_S < length)
            parts.append((_scores(query, jnp.swapaxes(prefix.keys, -1, -2), seen), prefix.values))
        softmax = _online_softmax(parts)
        if past is not None:
            size = min(CACHE_CHUNK, past.values_LPKGTE.shape[4])

            def chunk(i: jax.Array, so_far: RunningSoftmax) -> RunningSoftmax:
                """With the i-th chunk of the past; where the last one would reach over the end it starts earlier."""
                first = jnp.minimum(i * size, past.values_LPKGTE.shape[4] - size)
                keys = jax.lax.dynamic_slice(past.keys_LPKGET, (layer, 0, 0, 0, 0, first), (1, P, K, G, E, size))[0]
                values = jax.lax.dynamic_slice(past.values_LPKGTE, (layer, 0, 0, 0, first, 0), (1, P, K, G, size, E))[0]
                there_U = first + jnp.arange(size)
                new_U = (there_U >= i * size) & (there_U < past_length)
                seen = within(past_length + here_T11 - there_U, new_U)
                return _online_softmax([(_scores(query, jnp.swapaxes(keys, -1, -2), seen), values)], so_far)

            softmax = jax.lax.fori_loop(0, (past_length + size - 1) // size, chunk, softmax)
        return softmax.numerator_PKGTQE / softmax.denominator_PKGTQ1

    length = max(-(-T // QUERY_BLOCKS), MIN_QUERY_BLOCK)
    out_PKGTQE = jnp.concatenate([block(start, min(start + length, T)) for start in range(0, T, length)], axis=3)
    return jnp.einsum("pkgtqe->pgtkqe", out_PKGTQE.astype(query_PGTKQE.dtype))


# Every product is one of matrices: TQ (for the prompt GTQ) is one axis, or its gradient would be a transposed copy.


def _scores(query_PKGTQE: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
    """[P, K, G, T, Q, positions]; -inf where unseen. Keys are [P, K, positions, E] or [P, K, G, positions, E]."""
    P, K, G, T, Q, E = query_PKGTQE.shape
    query = query_PKGTQE.reshape(*keys.shape[:-2], -1, E)
    scores = jnp.einsum("...me,...ue->...mu", query, keys, preferred_element_type=jnp.float32)
    return jnp.where(seen, scores.reshape(P, K, G, T, Q, -1), -jnp.inf)


def _online_softmax(parts: list[tuple[jax.Array, jax.Array]], so_far: RunningSoftmax | None = None) -> RunningSoftmax:
    """Of parts (scores, values), joined with what there is so far, of which every query has seen something."""
    tops = [scores.max(-1, keepdims=True) for scores, _ in parts]
    if so_far is not None:
        tops.append(so_far.max_PKGTQ1)
    # The maximum is finite, for every position sees itself. It cancels in the quotient: no gradient needed.
    top = jax.lax.stop_gradient(jnp.max(jnp.stack(tops), axis=0))
    numerator, normalizer = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    if so_far is not None:
        shrink = jnp.exp(so_far.max_PKGTQ1 - top)
        numerator, normalizer = so_far.numerator_PKGTQE * shrink, so_far.denominator_PKGTQ1 * shrink
    for scores, values in parts:
        weights = jnp.exp(scores - top)
        normalizer += weights.sum(-1, keepdims=True)
        weights = weights.astype(values.dtype).reshape(*values.shape[:-2], -1, values.shape[-2])
        weighed = jnp.einsum("...mu,...ue->...me", weights, values, preferred_element_type=jnp.float32)
        numerator += weighed.reshape(*scores.shape[:-1], -1)
    return RunningSoftmax(top, numerator, normalizer)
