"""Advantages of single papers around GOPO and GRPO: several rewards, soft ranks, filtered and decomposed rewards.

They obey the contract of `advantages.py`: masked or NaN = deleted, fewer than two valid entries = zeros, no gradient.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks
from gopo_jax.groups import centered, comparable, divisor, order_of, ranks, standardized, valid_rewards


def gopo_multi_advantages(
    rewards_PGR: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    weights_R: jax.typing.ArrayLike | None = None,
    ties: Literal["average", "ordinal"] = "average",
) -> jax.Array:
    """GOPO over several rewards: the weighted mean of each reward's rank-based advantages.

        A_i = sum_k w_k A_i(r_k) / sum_k |w_k|,   A_i(r) = 2 - 4 (rank_i - 1) / (G - 1)

    A reward's scale does not matter: only its order and its weight do.

    Args:
      rewards_PGR: [..., G, R] rewards. NaN = missing: the completion leaves the ranking of that reward, which then
        adds 0 to its sum; a completion without any reward is left out.
      mask_PG: [..., G] booleans, False leaves the completion out; None = all valid.
      weights_R: [R] weights; None = 1 each. A negative weight reverses a reward's order.
      ties: as in `gopo_advantages`.

    Returns:
      [..., G] advantages in [-2, 2], at least float32; with R = 1 and a positive weight those of `gopo_advantages`.

    Raises:
      ValueError: G < 2, shapes that do not fit together, or an unknown rule for ties.
      TypeError: rewards that are boolean or complex.

    References:
      GOPO, https://arxiv.org/abs/2602.03876, section 3, for one reward; the sum over rewards is this project's.
    """
    checks.one_of("ties", ties, ("average", "ordinal"))
    rewards_RPG, valid_RPG, weights_R11 = _rewards_first(order_of(rewards_PGR), mask_PG, weights_R)
    n_RP1 = valid_RPG.sum(-1, keepdims=True)
    advantages_RPG = 2 * (n_RP1 + 1 - 2 * ranks(rewards_RPG, valid_RPG, ties)) / jnp.maximum(n_RP1 - 1, 1)
    advantages_RPG = jnp.where(comparable(valid_RPG), advantages_RPG, 0)
    total_PG = (weights_R11 * advantages_RPG).sum(0) / jnp.maximum(jnp.abs(weights_R11).sum(0), 1e-30)
    return jnp.where(comparable(valid_RPG.any(0)), total_PG, 0)


def gdpo_advantages(
    rewards_PGR: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    weights_R: jax.typing.ArrayLike | None = None,
    epsilon: float = 1e-4,
) -> jax.Array:
    """GDPO: normalises each reward within its group, then their weighted sum over the batch.

        S_i = sum_k w_k (r_ik - mean(r_k)) / (std(r_k) + epsilon)        mean and std over the group
        A_i = (S_i - mean(S)) / (std(S) + epsilon)                       mean and std over the batch

    TRL's `multi_objective_aggregation="normalize_then_sum"` is the same.

    Args:
      rewards_PGR: [..., G, R] rewards of the whole batch. NaN = missing: it leaves the mean and std of that reward and
        adds 0 to the sum; a completion without any reward is left out.
      mask_PG: [..., G] booleans, False leaves the completion out; None = all valid.
      weights_R: [R] weights; None = 1 each.
      epsilon: added to the standard deviations (ddof 1).

    Returns:
      [..., G] advantages, at least float32.

    Raises:
      ValueError: G < 2, or shapes that do not fit together.
      TypeError: rewards that are boolean or complex.

    References:
      Liu et al., GDPO, https://arxiv.org/abs/2601.05242.
    """
    rewards_RPG, valid_RPG, weights_R11 = _rewards_first(rewards_PGR, mask_PG, weights_R)
    z_scores_RPG = centered(rewards_RPG, valid_RPG) / divisor(rewards_RPG, valid_RPG, -1, epsilon)
    return standardized((weights_R11 * z_scores_RPG).sum(0), comparable(valid_RPG.any(0)), None, epsilon)


def soft_gopo_advantages(
    rewards_PG: jax.typing.ArrayLike, mask_PG: jax.typing.ArrayLike | None = None, *, temperature: float = 0.5
) -> jax.Array:
    """Soft ranks: GOPO at temperature 0, GRPO at infinity, a saturating comparison in between.

        A_i = (1 + tau (G-1)/G)  2/(G-1)  sum_j tanh((r_i - r_j) / (2 tau s)),   s = std(r), ddof 1

    With tau -> 0 the tanh becomes the sign of r_i - r_j, and A_i = 2 - 4 (rank_i - 1) / (G - 1) with mid-ranks. With
    tau -> infinity the tanh becomes linear, sum_j (r_i - r_j) = G (r_i - mean(r)), and A_i = (r_i - mean(r)) / s. The
    first factor makes both limits exact. tau is in units of the group's std, so the rewards' scale does not matter.

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      temperature: tau > 0. Rewards further apart than about tau s count by rank, closer ones by value.

    Returns:
      [..., G] advantages, at least float32; they sum to zero over a group.

    Raises:
      ValueError: G < 2, a mask of another shape, or a temperature that is not above 0.
      TypeError: rewards that are boolean or complex.

    References:
      The formula is this project's. A rank as a sum of pairwise sigmoids: Qin et al., A general approximation framework
      for direct optimization of information retrieval measures, Information Retrieval 13, 2010.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0 (gopo is the limit 0), got {temperature}")
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)
    n_P1 = jnp.maximum(valid_PG.sum(-1, keepdims=True), 2)
    scaled_PG = centered(rewards_PG, valid_PG) / divisor(rewards_PG, valid_PG, -1, 0.0)
    difference_PGG = scaled_PG[..., :, None] - scaled_PG[..., None, :]
    won_PGG = jnp.where(valid_PG[..., None, :], jnp.tanh(difference_PGG / (2 * temperature)), 0)
    factor_P1 = (1 + temperature * (n_P1 - 1) / n_P1) * 2 / (n_P1 - 1)
    return jnp.where(comparable(valid_PG), factor_P1 * won_PGG.sum(-1), 0)


def krpo_advantages(
    rewards_PG: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    process_variance: float = 1e-5,
    measurement_variance: float = 1e-2,
    epsilon: float = 1e-8,
) -> jax.Array:
    """KRPO: a Kalman filter over a group's rewards gives the mean and variance that standardise each of them.

    From x = 0 and V = 1, for each reward in the order of the group:

        V = V + process_variance;   K = V / (V + measurement_variance)
        x = x + K (r_i - x);        V = (1 - K) V
        A_i = (r_i - x) / (sqrt(V) + epsilon)

    The order of the completions matters and the advantages do not sum to zero, as in the published method.

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      process_variance, measurement_variance: Q and R of the filter; the defaults are those of the authors' code.
      epsilon: added to the standard deviation.

    Returns:
      [..., G] advantages, at least float32.

    Raises:
      ValueError: G < 2, or a mask of another shape.
      TypeError: rewards that are boolean or complex.

    References:
      Wang et al., KRPO, https://arxiv.org/abs/2505.07527; constants: github.com/billhhh/KRPO_LLMs_RL, train.py.
    """
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)

    def filter_step(state: tuple[jax.Array, jax.Array], entry: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        (mean_P, variance_P), (reward_P, valid_P) = state, entry
        predicted_P = variance_P + process_variance
        gain_P = predicted_P / (predicted_P + measurement_variance)
        mean_P = jnp.where(valid_P, mean_P + gain_P * (reward_P - mean_P), mean_P)
        variance_P = jnp.where(valid_P, (1 - gain_P) * predicted_P, variance_P)
        return (mean_P, variance_P), (reward_P - mean_P) / (jnp.sqrt(variance_P) + epsilon)

    start_P = jnp.zeros_like(rewards_PG[..., 0])
    entries_GP = (jnp.moveaxis(rewards_PG, -1, 0), jnp.moveaxis(valid_PG, -1, 0))
    _, advantages_GP = jax.lax.scan(filter_step, (start_P, start_P + 1), entries_GP)
    return jnp.where(comparable(valid_PG), jnp.moveaxis(advantages_GP, 0, -1), 0)


def odrpo_advantages(
    rewards_PG: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    levels: Sequence[float] | None = None,
    scale: Literal["group", "none"] = "group",
    epsilon: float = 1e-4,
) -> jax.Array:
    """Ordinal decomposition: sums the advantages of the binary rewards "reaches level k" over all levels.

        A_i = sum_k (b_ik - mean(b_k)) / (std(b_k) + epsilon),   b_ik = 1 if r_i >= level_k else 0

    It is meant for rewards in tiers (a judge's 1 to 10). An outlier changes its own levels only. A level that all or
    none of a group reach adds 0. With scale "none" and levels one apart, the sum is r_i - mean(r).

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      levels: the tiers' rewards, e.g. (1, ..., 10); None = the group's distinct rewards.
      scale: "group" divides each level's advantage by its standard deviation (ddof 1), "none" does not.
      epsilon: added to the standard deviation.

    Returns:
      [..., G] advantages, at least float32; they sum to zero over a group.

    Raises:
      ValueError: G < 2, a mask of another shape, an unknown scale, or no levels.
      TypeError: rewards that are boolean or complex.

    References:
      Patel et al., ODRPO, https://arxiv.org/abs/2605.12667, with GRPO as the estimator of each level.
    """
    checks.one_of("scale", scale, ("group", "none"))
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)
    if levels is None:
        level_PR, is_level_PR = rewards_PG, valid_PG
        equal_PRR = (level_PR[..., :, None] == level_PR[..., None, :]) & valid_PG[..., :, None]
        earlier_RR = jnp.tri(level_PR.shape[-1], k=-1, dtype=bool).T  # [earlier, later]
        is_level_PR &= ~(equal_PRR & earlier_RR).any(-2)  # only the first of equal rewards is a level
    else:
        if not len(levels):
            raise ValueError("levels: expected at least one, got none; leave it out for the levels of each group")
        level_PR = jnp.broadcast_to(jnp.asarray(levels, rewards_PG.dtype), (*rewards_PG.shape[:-1], len(levels)))
        is_level_PR = jnp.ones(level_PR.shape, bool)
    # every level is a binary reward function
    reached_PRG = (rewards_PG[..., None, :] >= level_PR[..., :, None]).astype(rewards_PG.dtype)
    valid_PRG = jnp.broadcast_to(valid_PG[..., None, :], reached_PRG.shape)
    advantages_PRG = centered(jnp.where(valid_PRG, reached_PRG, 0), valid_PRG)
    if scale == "group":
        advantages_PRG = advantages_PRG / divisor(reached_PRG, valid_PRG, -1, epsilon)
    return jnp.where(comparable(valid_PG), (advantages_PRG * is_level_PR[..., None]).sum(-2), 0)


def _rewards_first(
    rewards_PGR: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None,
    weights_R: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Moves R to the front: returns rewards_RPG, their mask, and weights that broadcast against them."""
    rewards_PGR = jnp.asarray(rewards_PGR)
    if rewards_PGR.ndim < 2:
        raise ValueError(
            f"rewards_PGR: expected [..., G, R] with reward functions as the last axis, got shape {rewards_PGR.shape}"
        )
    rewards_RPG = jnp.moveaxis(rewards_PGR, -1, 0)
    if mask_PG is not None:
        mask_PG = jnp.asarray(mask_PG)
        checks.same_shape("mask_PG", mask_PG, "one reward", rewards_RPG[0])
        mask_PG = jnp.broadcast_to(mask_PG, rewards_RPG.shape)
    rewards_RPG, valid_RPG = valid_rewards(rewards_RPG, mask_PG)
    weights = jnp.ones(len(rewards_RPG)) if weights_R is None else checks.as_float("weights_R", weights_R)
    if weights.shape != rewards_RPG.shape[:1]:
        raise ValueError(f"weights_R: expected one for each of {len(rewards_RPG)} rewards, got shape {weights.shape}")
    return rewards_RPG, valid_RPG, weights.reshape(-1, *[1] * (rewards_RPG.ndim - 1))
