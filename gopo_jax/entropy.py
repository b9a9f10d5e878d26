"""Entropy in the loss: a bonus, and which tokens of a batch keep their gradient or get a penalty to save it.

Each function that chooses tokens takes those of the whole batch: a quantile, a mean or a number of tokens of a part of
it would be another one.
"""

import jax
import jax.numpy as jnp

from gopo_jax import checks


def entropy_bonus(entropies: jax.Array, mask: jax.Array, denominator: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Mean entropy of a policy's predictions, to be added to what is maximized; its gradient goes into `entropies`.

        H_t = -sum over v of p_t(v) log p_t(v)
        bonus = sum over the mask of H_t / denominator

    Args:
      entropies: [..., T] entropies in nats (see `token_logprobs`, `with_entropy`).
      mask: [..., T] booleans (or 0/1), the tokens that count.
      denominator: the number of tokens of the *global* batch that count; None = those of this call.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: shapes that differ.

    References:
      Williams and Peng, Function optimization using connectionist reinforcement learning algorithms, 1991; for
      language models Skywork-OR1, https://arxiv.org/abs/2505.22312; a mean over tokens as TRL's `entropy_coef`.
    """
    checks.same_shape("mask", mask, "entropies", entropies)
    mask_PGT = mask.astype(bool)
    count = mask_PGT.sum(dtype=jnp.float32) if denominator is None else jnp.asarray(denominator, jnp.float32)
    return jnp.where(mask_PGT, entropies, 0).sum(dtype=jnp.float32) / jnp.maximum(count, 1)


def top_entropy_mask(entropies: jax.Array, mask: jax.Array, quantile: jax.typing.ArrayLike) -> jax.Array:
    """Chooses the tokens of a batch with the highest entropies, the forks of its texts.

        m_t = [ H_t >= the (1 - quantile)-quantile of H over the mask ]

    Quantiles between two entropies are interpolated. 1 chooses all tokens, 0 the one of the highest entropy, and what
    equals it.

    Args:
      entropies: [..., T] entropies of the predictions.
      mask: [..., T] booleans (or 0/1), the tokens that count.
      quantile: the share of the tokens that is chosen, rho, in [0, 1].

    Returns:
      [..., T] booleans, a part of the mask.

    Raises:
      ValueError: shapes that differ.

    References:
      Wang et al., Beyond the 80/20 rule, https://arxiv.org/abs/2506.01939, equation 5, with rho = 0.2; TRL's
      `top_entropy_quantile`.
    """
    checks.same_shape("mask", mask, "entropies", entropies)
    mask_PGT = mask.astype(bool)
    ascending_I = jnp.sort(jnp.where(mask_PGT, entropies, jnp.inf), axis=None)
    last = jnp.maximum(mask_PGT.sum() - 1, 0)
    place = (1 - jnp.asarray(quantile, jnp.float32)) * last
    low = jnp.floor(place).astype(jnp.int32)
    below, above = ascending_I[low], ascending_I[jnp.minimum(low + 1, last)]
    threshold = jnp.where(above > below, below + (place - low) * (above - below), below)  # inf - inf is NaN
    return mask_PGT & (entropies >= threshold)


def token_covariances(logprobs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """The part of each token in the covariance of log-probability and advantage over a batch.

        C_t = (logprob_t - mean of logprob) (A_t - mean of A)

    with means over the mask. A policy gradient lowers the entropy by about the mean of C: likely tokens with a high
    advantage, and unlikely ones with a low one, make a policy surer.

    Args:
      logprobs: [..., T] log-probabilities of the sampled tokens.
      advantages: [...] one per completion, or [..., T] one per token.
      mask: [..., T] booleans (or 0/1), the tokens that count.

    Returns:
      [..., T] float32; 0 where the mask is False.

    Raises:
      ValueError: shapes that do not fit together.

    References:
      Cui et al., The entropy mechanism of reinforcement learning for reasoning language models,
      https://arxiv.org/abs/2505.22617, equation 10.
    """
    checks.same_shape("mask", mask, "logprobs", logprobs)
    advantages = checks.per_token(advantages, logprobs)
    mask_PGT = mask.astype(bool)

    def centred(array: jax.Array) -> jax.Array:
        array = jnp.where(mask_PGT, array, 0).astype(jnp.float32)
        return array - array.sum() / jnp.maximum(mask_PGT.sum(), 1)

    return jax.lax.stop_gradient(jnp.where(mask_PGT, centred(logprobs) * centred(advantages), 0))


def clip_cov(
    covariances: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    *,
    ratio: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> jax.Array:
    """Clip-Cov: chooses tokens of a high covariance at random, which then lose their gradient.

        n = max(floor(ratio * tokens), 1) of the tokens with low < C_t < high, or all of them if they are fewer

    Args:
      covariances: [..., T] of the whole batch (see `token_covariances`).
      mask: [..., T] booleans (or 0/1), the tokens that count.
      key: fixes the choice.
      ratio: share of the batch's tokens that is chosen at most.
      low, high: bounds of the covariance.

    Returns:
      [..., T] booleans, True for the tokens whose surrogate is to be left out.

    Raises:
      ValueError: shapes that differ.

    References:
      Cui et al., https://arxiv.org/abs/2505.22617, equations 11 and 12; verl's loss mode `clip_cov`, which takes a
      micro-batch for the batch, and leaves out tokens that PPO's clip holds back already.
    """
    checks.same_shape("mask", mask, "covariances", covariances)
    mask_PGT = mask.astype(bool)
    candidate_PGT = mask_PGT & (covariances > low) & (covariances < high)
    place_PGT = jnp.where(candidate_PGT, jax.random.uniform(key, mask_PGT.shape), jnp.inf)
    return candidate_PGT & _smallest(place_PGT, _share(mask_PGT, ratio))


def kl_cov(covariances: jax.Array, mask: jax.Array, *, ratio: float = 2e-4) -> jax.Array:
    """KL-Cov: chooses the tokens of the highest covariance, which then get a penalty for leaving the old policy.

        n = max(floor(ratio * tokens), 1) tokens of the largest C_t
        their loss is l_t = -J_t + coefficient |logprob_t - old_logprob_t|

    Args:
      covariances: [..., T] of the whole batch (see `token_covariances`).
      mask: [..., T] booleans (or 0/1), the tokens that count.
      ratio: share of the batch's tokens that is chosen.

    Returns:
      [..., T] booleans, True for the tokens that get the penalty (see `policy_loss`, `penalties`).

    Raises:
      ValueError: shapes that differ.

    References:
      Cui et al., https://arxiv.org/abs/2505.22617, equations 13 and 14; verl's loss mode `kl_cov`, which takes a
      micro-batch for the batch.
    """
    checks.same_shape("mask", mask, "covariances", covariances)
    mask_PGT = mask.astype(bool)
    return mask_PGT & _smallest(jnp.where(mask_PGT, -covariances, jnp.inf), _share(mask_PGT, ratio))


def _share(mask_PGT: jax.Array, ratio: float) -> jax.Array:
    return jnp.maximum(jnp.floor(ratio * mask_PGT.sum(dtype=jnp.float32)), 1)


def _smallest(values: jax.Array, count: jax.Array) -> jax.Array:
    """True for the `count` smallest values; of equal ones the first."""
    order_I = jnp.argsort(values, axis=None, stable=True)
    rank_I = jnp.zeros(values.size, jnp.int32).at[order_I].set(jnp.arange(values.size, dtype=jnp.int32))
    return (rank_I < count).reshape(values.shape)
