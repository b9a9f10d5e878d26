"""Advantages of a group of completions of the same prompt, from their rewards.

Every function takes `rewards_PG` ([..., G], the last axis is the group) and an optional boolean
`mask_PG`, and returns advantages of the same shape. An entry that is masked out or NaN (unscorable)
is treated as if it had been deleted: it gets 0, and the others get what they would get without it.
A group with fewer than two valid entries gets zeros. No gradient flows into the rewards.

To add one: write a function with this signature and put it into `ADVANTAGES`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks


def gopo_advantages(
    rewards_PG: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    ties: Literal["average", "ordinal"] = "average",
) -> jax.Array:
    """Rank-based advantages of Group Ordinal Policy Optimization.

        A_i = 2 - 4 (rank_i - 1) / (G - 1),   rank 1 for the highest reward

    so the best completion of a group gets 2, the worst -2, whatever the rewards' scale. Only the order of
    the rewards matters. G is the number of valid entries of the group.

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      ties: "average" gives equal rewards their mean rank, so the group sums to zero and an all-equal group
        gets zeros; "ordinal" breaks ties by position, earlier is better (the rule of the paper's code,
        which turns an all-equal group of 4 into 2, 2/3, -2/3, -2).

    Returns:
      [..., G] advantages in [-2, 2], at least float32. Without ties the mean square over a group is
      4 (G + 1) / (3 (G - 1)).

    Raises:
      ValueError: G < 2, a mask of another shape, or an unknown rule for ties.
      TypeError: rewards that are boolean or complex.

    References:
      GOPO, https://arxiv.org/abs/2602.03876, section 3.
    """
    checks.one_of("ties", ties, ("average", "ordinal"))
    rewards_PG, valid_PG = _valid_rewards(rewards_PG, mask_PG)
    n_P1 = valid_PG.sum(-1, keepdims=True)

    # Valid entries first, best first, equals in the order they came (lexsort is stable, last key first).
    order_PG = jnp.lexsort((-rewards_PG, ~valid_PG))
    position_PG = jnp.argsort(order_PG)  # the second argsort: 0-based ordinal rank of each entry
    rank_PG = position_PG.astype(rewards_PG.dtype)
    if ties == "average":
        # A run of equal rewards, from its first to its last position, shares the middle of the two.
        sorted_PG = jnp.take_along_axis(jnp.where(valid_PG, rewards_PG, jnp.nan), order_PG, -1)
        index_G = jnp.arange(rewards_PG.shape[-1])
        changes_PG = sorted_PG[..., 1:] != sorted_PG[..., :-1]  # NaN differs from NaN: no run of invalid ones
        edge_P1 = jnp.ones_like(changes_PG[..., :1])
        starts_PG = jnp.concatenate([edge_P1, changes_PG], -1)
        ends_PG = jnp.concatenate([changes_PG, edge_P1], -1)
        group_axis = rewards_PG.ndim - 1
        first_PG = jax.lax.cummax(jnp.where(starts_PG, index_G, 0), axis=group_axis)
        last_PG = jax.lax.cummin(jnp.where(ends_PG, index_G, index_G.size), axis=group_axis, reverse=True)
        middle_PG = (first_PG + last_PG).astype(rewards_PG.dtype) / 2
        rank_PG = jnp.take_along_axis(middle_PG, position_PG, -1)

    # 2 - 4 rank / (n - 1) over one denominator: compiled divisions may be off by a bit, and the middle is exactly 0.
    advantages_PG = 2 * (n_P1 - 1 - 2 * rank_PG) / jnp.maximum(n_P1 - 1, 1)
    return jnp.where(valid_PG & (n_P1 >= 2), advantages_PG, 0)


def grpo_advantages(
    rewards_PG: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    epsilon: float = 1e-4,
) -> jax.Array:
    """Z-score advantages of Group Relative Policy Optimization.

        A_i = (r_i - mean(r)) / (std(r) + epsilon)

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      scale: "group" divides by the group's sample standard deviation (ddof 1), "batch" by that of all
        valid rewards, "none" does not divide (Dr. GRPO).
      epsilon: added to the standard deviation.

    Returns:
      [..., G] advantages, at least float32. With scale "group" and epsilon 0 the mean square over a group
      that is not constant is (G - 1) / G. A constant group gives exact zeros.

    Raises:
      ValueError: G < 2, a mask of another shape, or an unknown scale.
      TypeError: rewards that are boolean or complex.

    References:
      GRPO, https://arxiv.org/abs/2402.03300, section 4.1.2; Dr. GRPO, https://arxiv.org/abs/2503.20783.
    """
    checks.one_of("scale", scale, ("group", "batch", "none"))
    rewards_PG, valid_PG = _valid_rewards(rewards_PG, mask_PG)
    centered_PG = _centered(rewards_PG, valid_PG)
    if scale != "none":
        axis = -1 if scale == "group" else None
        n = valid_PG.sum(axis, keepdims=True)
        mean = (rewards_PG * valid_PG).sum(axis, keepdims=True) / jnp.maximum(n, 1)
        squares = (jnp.square(rewards_PG - mean) * valid_PG).sum(axis, keepdims=True)
        std = jnp.sqrt(squares / jnp.maximum(n - 1, 1))
        # epsilon 0 and a constant group: 0 / 0 is meant as 0
        centered_PG = centered_PG / jnp.where(std + epsilon > 0, std + epsilon, 1)
    return jnp.where(valid_PG, centered_PG, 0)


def rloo_advantages(rewards_PG: jax.typing.ArrayLike, mask_PG: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Leave-one-out advantages: each reward minus the mean of the group's others.

        A_i = r_i - 1/(G-1) sum_{j != i} r_j  =  G/(G-1) (r_i - mean(r))

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.

    Returns:
      [..., G] advantages, at least float32, in the rewards' units.

    Raises:
      ValueError: G < 2, or a mask of another shape.
      TypeError: rewards that are boolean or complex.

    References:
      Ahmadian et al., Back to Basics, https://arxiv.org/abs/2402.14740, equation 4 of section 3.
    """
    rewards_PG, valid_PG = _valid_rewards(rewards_PG, mask_PG)
    n_P1 = valid_PG.sum(-1, keepdims=True)
    return jnp.where(valid_PG, _centered(rewards_PG, valid_PG) * n_P1 / jnp.maximum(n_P1 - 1, 1), 0)


def _valid_rewards(
    rewards_PG: jax.typing.ArrayLike, mask_PG: jax.typing.ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Checked rewards with 0 in the invalid places, and where they are valid."""
    rewards_PG = jax.lax.stop_gradient(checks.as_float("rewards_PG", rewards_PG))
    checks.group_axis("rewards_PG", rewards_PG)
    valid_PG = ~jnp.isnan(rewards_PG)
    if mask_PG is not None:
        mask_PG = jnp.asarray(mask_PG)
        checks.same_shape("mask_PG", mask_PG, "rewards_PG", rewards_PG)
        valid_PG &= mask_PG.astype(bool)
    return jnp.where(valid_PG, rewards_PG, 0), valid_PG


def _centered(rewards_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
    """Rewards minus their group's mean over the valid entries; exact zeros for a constant group.

    The group's maximum is taken off first: float32 means of eight equal numbers can be off by a bit, and
    that bit divided by epsilon would be a gradient from nothing.
    """
    top_P1 = jnp.max(jnp.where(valid_PG, rewards_PG, -jnp.inf), -1, keepdims=True)
    shifted_PG = jnp.where(valid_PG, rewards_PG - top_P1, 0)
    return shifted_PG - shifted_PG.sum(-1, keepdims=True) / jnp.maximum(valid_PG.sum(-1, keepdims=True), 1)


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
    "gopo": gopo_advantages,
    "grpo": grpo_advantages,
    "rloo": rloo_advantages,
}
