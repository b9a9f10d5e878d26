"""The one attention door: completions attend to their group's prompt, to what came before, and to themselves.

The keys of the prompt have no group axis: one batched matrix product serves all G completions of a prompt, so
they are read once per group. The parts are joined in one softmax without being concatenated.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Keys and values: [P, K, S, E] of a prompt, [P, K, G, T, E] of completions; [L, ...] of all layers."""

    keys: jax.Array
    values: jax.Array


def group_attention(
    query_PGTKQE: jax.Array,
    own_PKGTE: KeyValues,
    *,
    prefix_PKSE: KeyValues | None = None,
    prefix_lengths_P: jax.Array | None = None,
    past_PKGTE: KeyValues | None = None,
    past_length: jax.typing.ArrayLike = 0,
    window: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Softmax attention of T new positions over prefix, past and themselves.

        out = softmax([q k_prefix, q k_past, q k_own] / sqrt(E)) [v_prefix, v_past, v_own]

    Args:
      query_PGTKQE: queries, rotated and normalised, Q query heads per key/value head.
      own_PKGTE: keys and values of the T positions; position t sees those up to t.
      prefix_PKSE: of the prompt, shared by the group; positions at or behind `prefix_lengths_P` are unseen.
      past_PKGTE: of earlier positions of the same completion; those at or behind `past_length` are unseen.
      window: a position sees itself and the window - 1 before it; None = all before it.

    Returns:
      [P, G, T, K, Q, E] in the queries' dtype. Scores and the softmax are float32.
    """
    P, G, T, K, Q, E = query_PGTKQE.shape
    # Every product is of matrices: TQ (for the prompt GTQ) is one axis, or its gradient would be a transposed copy.
    query_PKGTQE = jnp.einsum("pgtkqe->pkgtqe", query_PGTKQE * jnp.asarray(E**-0.5, query_PGTKQE.dtype))
    query_PKGME, query_PKNE = query_PKGTQE.reshape(P, K, G, T * Q, E), query_PKGTQE.reshape(P, K, G * T * Q, E)

    def scores(subscripts: str, query: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
        """[P, K, G, T, Q, positions]; -inf where unseen."""
        score = jnp.einsum(subscripts, query, keys, preferred_element_type=jnp.float32)
        return jnp.where(seen, score.reshape(P, K, G, T, Q, -1), -jnp.inf)

    def within(distance: Any, seen: jax.Array) -> jax.Array:
        return seen if window is None else seen & (distance < window)

    here_T1 = jnp.arange(T)[:, None]  # in the T new positions; past and prompt lie before them
    apart_TU = here_T1 - jnp.arange(T)
    seen_T1U = within(apart_TU, apart_TU >= 0)[:, None, :]
    parts = [("pkgmu,pkgue->pkgme", scores("pkgme,pkgue->pkgmu", query_PKGME, own_PKGTE.keys, seen_T1U), own_PKGTE)]
    if past_PKGTE is not None:
        there_U = jnp.arange(past_PKGTE.keys.shape[-2])
        seen = within(past_length + here_T1 - there_U, there_U < past_length)[..., None, :]
        parts.append(
            ("pkgmu,pkgue->pkgme", scores("pkgme,pkgue->pkgmu", query_PKGME, past_PKGTE.keys, seen), past_PKGTE)
        )
    if prefix_PKSE is not None:
        assert prefix_lengths_P is not None
        there_S, length_P11 = jnp.arange(prefix_PKSE.keys.shape[-2]), prefix_lengths_P[:, None, None]
        seen_PTS = within(length_P11 + past_length + here_T1 - there_S, there_S < length_P11)
        seen = seen_PTS[:, None, None, :, None, :]
        parts.append(("pkns,pkse->pkne", scores("pkne,pkse->pkns", query_PKNE, prefix_PKSE.keys, seen), prefix_PKSE))

    # Every position sees itself, so the maximum is finite. It cancels in the quotient: no gradient needed.
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([score.max(-1) for _, score, _ in parts]), axis=0))[..., None]
    numerator = jnp.zeros((), jnp.float32)
    normalizer = jnp.zeros((), jnp.float32)
    for subscripts, score, (_, values) in parts:
        weights = jnp.exp(score - top)
        normalizer += weights.sum(-1, keepdims=True)
        rows = (P, K, G, T * Q) if "g" in subscripts else (P, K, G * T * Q)
        weights = weights.astype(values.dtype).reshape(*rows, -1)
        weighed = jnp.einsum(subscripts, weights, values, preferred_element_type=jnp.float32)
        numerator += weighed.reshape(P, K, G, T, Q, E)
    return jnp.einsum("pkgtqe->pgtkqe", (numerator / normalizer).astype(query_PGTKQE.dtype))
