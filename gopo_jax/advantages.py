"""Advantages of a group of completions of the same prompt, from their rewards.

Every function takes `rewards_PG` ([..., G], the last axis is the group) and an optional boolean
`mask_PG`, and returns advantages of the same shape. An entry that is masked out or NaN (unscorable)
is treated as if it had been deleted: it gets 0, and the others get what they would get without it.
A group with fewer than two valid entries gets zeros. No gradient flows into the rewards.
A function with a parameter `weights_R` takes the rewards unmixed, `rewards_PGR` ([..., G, R]).
Rank-based ones order 64-bit numbers of the host as they are; the others, and any function under jit, get what JAX makes
of them: float32, unless `jax_enable_x64` is set.

This file has the advantages that other trainers have too; `relatives.py` has those of single papers.
To add one, write a function with this signature and put it into `ADVANTAGES`.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks
from gopo_jax.groups import centered, comparable, divisor, order_of, ranks, standardized, valid_rewards
from gopo_jax.relatives import (
    gdpo_advantages,
    gopo_multi_advantages,
    krpo_advantages,
    odrpo_advantages,
    soft_gopo_advantages,
)


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
    rewards_PG, valid_PG = valid_rewards(order_of(rewards_PG), mask_PG)
    n_P1 = valid_PG.sum(-1, keepdims=True)
    rank_PG = ranks(rewards_PG, valid_PG, ties)
    # 2 - 4 (rank - 1) / (n - 1) with one division: a compiled division may be off by a bit, but 0 / n is exactly 0.
    advantages_PG = 2 * (n_P1 + 1 - 2 * rank_PG) / jnp.maximum(n_P1 - 1, 1)
    return jnp.where(comparable(valid_PG), advantages_PG, 0)


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
        valid rewards (also those of groups with only one, as in TRL), "none" does not divide (Dr. GRPO).
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
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)
    centered_PG = centered(rewards_PG, valid_PG)
    if scale != "none":
        centered_PG = centered_PG / divisor(rewards_PG, valid_PG, -1 if scale == "group" else None, epsilon)
    return centered_PG


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
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)
    n_P1 = valid_PG.sum(-1, keepdims=True)
    return centered(rewards_PG, valid_PG) * n_P1 / jnp.maximum(n_P1 - 1, 1)


def dr_grpo_advantages(rewards_PG: jax.typing.ArrayLike, mask_PG: jax.typing.ArrayLike | None = None) -> jax.Array:
    """Advantages of "GRPO done right": GRPO's without the division by the standard deviation.

        A_i = r_i - mean(r)

    The paper combines it with the loss's aggregate "constant".

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.

    Returns:
      [..., G] advantages, at least float32, in the rewards' units.

    Raises:
      ValueError: G < 2, or a mask of another shape.
      TypeError: rewards that are boolean or complex.

    References:
      Liu et al., https://arxiv.org/abs/2503.20783, section 3.2.
    """
    return grpo_advantages(rewards_PG, mask_PG, scale="none")


def reinforce_pp_advantages(
    rewards_PG: jax.typing.ArrayLike,
    mask_PG: jax.typing.ArrayLike | None = None,
    *,
    baseline: Literal["none", "group"] = "none",
    epsilon: float = 1e-8,
) -> jax.Array:
    """Advantages of REINFORCE++: normalised over the whole batch instead of within each group.

        b_i = r_i  or, with baseline "group",  r_i - mean(r of the group)
        A_i = (b_i - mean(b of the batch)) / (std(b of the batch) + epsilon)

    Args:
      rewards_PG: [..., G] rewards of the whole batch; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.
      baseline: "none" is REINFORCE++, "group" is REINFORCE++-baseline.
      epsilon: added to the standard deviation (ddof 1).

    Returns:
      [..., G] advantages, at least float32. They sum to zero over the batch, not over a group.

    Raises:
      ValueError: G < 2, a mask of another shape, or an unknown baseline.
      TypeError: rewards that are boolean or complex.

    References:
      Hu et al., REINFORCE++, https://arxiv.org/abs/2501.03262.
    """
    checks.one_of("baseline", baseline, ("none", "group"))
    rewards_PG, valid_PG = valid_rewards(rewards_PG, mask_PG)
    valid_PG = comparable(valid_PG)
    return standardized(centered(rewards_PG, valid_PG) if baseline == "group" else rewards_PG, valid_PG, None, epsilon)


ADVANTAGES: dict[str, Callable[..., jax.Array]] = {
    "gopo": gopo_advantages,
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
    "reinforce_pp": reinforce_pp_advantages,
    "gopo_multi": gopo_multi_advantages,
    "gdpo": gdpo_advantages,
    "soft_gopo": soft_gopo_advantages,
    "krpo": krpo_advantages,
    "odrpo": odrpo_advantages,
}
