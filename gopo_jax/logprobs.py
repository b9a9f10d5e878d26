"""Log-probabilities of given tokens from hidden states, in chunks: all logits never exist at once."""

from typing import Literal, overload

import jax
import jax.numpy as jnp


@overload
def token_logprobs(
    hidden: jax.Array, unembed: jax.Array, tokens: jax.Array, *, chunk: int, temperature: jax.typing.ArrayLike = ...
) -> jax.Array: ...
@overload
def token_logprobs(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    *,
    chunk: int,
    temperature: jax.typing.ArrayLike = ...,
    with_entropy: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def token_logprobs(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    *,
    chunk: int,
    temperature: jax.typing.ArrayLike = 1.0,
    with_entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Log-probability of each token, given the hidden state that predicts it.

        logits_V = unembed_VD hidden_D / temperature
        logprob  = logits[token] - logsumexp(logits)
        entropy  = logsumexp(logits) - sum_v softmax(logits)_v logits_v

    The T axis is scanned in chunks of C positions and the backward pass recomputes each chunk, so the
    largest array is [..., C, V]: no array ever has both T and V, forward or backward. Leading axes keep
    their shape, so they may be sharded. The product is as exact as `jax.default_matmul_precision` says.

    Args:
      hidden: [..., T, D] hidden states; hidden[..., t, :] predicts tokens[..., t].
      unembed: [V, D] output embedding (the layout of Hugging Face's `lm_head.weight`).
      tokens: [..., T] integers in [0, V).
      chunk: C, positions per chunk; the last one may be shorter.
      temperature: > 0; may be traced.
      with_entropy: whether to return the entropy of each prediction too, in nats.

    Returns:
      float32 [..., T] log-probabilities, or the pair (log-probabilities, entropies).

    Raises:
      ValueError: shapes that do not fit together, chunk < 1, temperature <= 0.
    """
    if hidden.ndim < 2 or hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"hidden, tokens: expected [..., T, D] and [..., T] with the same leading axes, "
            f"got {hidden.shape} and {tokens.shape}"
        )
    if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[-1]:
        raise ValueError(f"unembed: expected [V, D] with D = {hidden.shape[-1]}, got {unembed.shape}")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 position, got {chunk}")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}; greedy is its limit 0")

    *leading, length, _ = hidden.shape
    if length == 0:
        empty = jnp.zeros(tokens.shape, jnp.float32)
        return (empty, empty) if with_entropy else empty
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padding = chunks * chunk - length

    def to_chunks(array: jax.Array, trailing: int) -> jax.Array:
        """Splits [..., T, *] into [T/C, ..., C, *], padded with zeros."""
        axis = array.ndim - 1 - trailing
        array = jnp.pad(array, [(0, padding if i == axis else 0) for i in range(array.ndim)])
        array = array.reshape(*leading, chunks, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, len(leading), 0)

    @jax.checkpoint
    def one_chunk(hidden_PGCD: jax.Array, tokens_PGC: jax.Array) -> tuple[jax.Array, jax.Array]:
        unembed_VD = unembed.astype(hidden_PGCD.dtype)
        logits_PGCV = jnp.einsum("...d,vd->...v", hidden_PGCD, unembed_VD, preferred_element_type=jnp.float32)
        logits_PGCV = logits_PGCV / temperature
        normalizer_PGC = jax.nn.logsumexp(logits_PGCV, axis=-1)
        chosen_PGC = jnp.take_along_axis(logits_PGCV, tokens_PGC[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return chosen_PGC - normalizer_PGC, jnp.zeros_like(chosen_PGC)
        probabilities_PGCV = jnp.exp(logits_PGCV - normalizer_PGC[..., None])
        # p log p is 0 where p is 0, also where the logit is -inf
        expected_PGC = jnp.where(probabilities_PGCV > 0, probabilities_PGCV * logits_PGCV, 0).sum(-1)
        return chosen_PGC - normalizer_PGC, normalizer_PGC - expected_PGC

    def from_chunks(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, len(leading)).reshape(*leading, chunks * chunk)[..., :length]

    chunked = (to_chunks(hidden, 1), to_chunks(tokens, 0))
    if chunks == 1:
        logprobs, entropies = one_chunk(chunked[0][0], chunked[1][0])
        return (logprobs, entropies) if with_entropy else logprobs
    _, (logprobs, entropies) = jax.lax.scan(lambda _, xs: (None, one_chunk(*xs)), None, chunked)
    return (from_chunks(logprobs), from_chunks(entropies)) if with_entropy else from_chunks(logprobs)
