"""Log-probabilities of given tokens from hidden states, without ever holding all logits."""

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
    """Log-probability of each token under the hidden state that predicts it.

        logits_V = unembed_VD hidden_D / temperature
        logprob  = logits[token] - logsumexp(logits)
        entropy  = logsumexp(logits) - sum_v softmax(logits)_v logits_v

    The T axis is walked in chunks of C positions and each chunk is recomputed in the backward pass, so the
    largest array is [..., C, V]: no array ever has both T and V, forward or backward. Leading axes are left
    alone, so they may be sharded.

    Args:
      hidden: [..., T, D], hidden[..., t, :] predicts tokens[..., t].
      unembed: [V, D], the output embedding (Hugging Face's `lm_head.weight` layout).
      tokens: [..., T] integers in [0, V).
      chunk: C, positions per chunk; the last one may be shorter.
      temperature: > 0; may be traced.
      with_entropy: also return the entropy of each prediction (in nats).

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
        raise ValueError(f"temperature: expected a number above 0, got {temperature}; greedy is the limit, not a value")

    *lead, length, _ = hidden.shape
    if length == 0:
        empty = jnp.zeros(tokens.shape, jnp.float32)
        return (empty, empty) if with_entropy else empty
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padding = chunks * chunk - length

    def to_chunks(array: jax.Array, trailing: int) -> jax.Array:
        """[..., T, *] -> [T/C, ..., C, *], zeros behind the end."""
        axis = array.ndim - 1 - trailing
        array = jnp.pad(array, [(0, padding if i == axis else 0) for i in range(array.ndim)])
        array = array.reshape(*lead, chunks, chunk, *array.shape[axis + 1 :])
        return jnp.moveaxis(array, len(lead), 0)

    @jax.checkpoint
    def one_chunk(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("...d,vd->...v", hidden, unembed.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logits = logits / temperature
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        if not with_entropy:
            return chosen - normalizer, jnp.zeros_like(chosen)
        probabilities = jnp.exp(logits - normalizer[..., None])
        # p log p is 0 where p is 0, also where the logit is -inf
        weighted = jnp.where(probabilities > 0, probabilities * logits, 0).sum(-1)
        return chosen - normalizer, normalizer - weighted

    def from_chunks(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array, 0, len(lead)).reshape(*lead, chunks * chunk)[..., :length]

    chunked = (to_chunks(hidden, 1), to_chunks(tokens, 0))
    if chunks == 1:
        logprobs, entropies = one_chunk(chunked[0][0], chunked[1][0])
        return (logprobs, entropies) if with_entropy else logprobs
    _, (logprobs, entropies) = jax.lax.scan(lambda _, xs: (None, one_chunk(*xs)), None, chunked)
    return (from_chunks(logprobs), from_chunks(entropies)) if with_entropy else from_chunks(logprobs)
