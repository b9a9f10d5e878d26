"""Building blocks of every advantage: valid rewards of a group, their ranks, mean and standard deviation.

An entry that is masked out or NaN (unscorable) is treated as if it had been deleted. An advantage of your own starts
with `valid_rewards` and multiplies its result by the returned mask.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gopo_jax import checks

WIDE = ("float64", "int64", "uint64")  # dtypes that JAX narrows to 32 bits by default


def valid_rewards(
    rewards_PG: jax.typing.ArrayLike, mask_PG: jax.typing.ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Checks rewards, and returns them with 0 in place of invalid ones, and the mask of the valid ones.

    Args:
      rewards_PG: [..., G] rewards; the last axis is the group. NaN = unscorable.
      mask_PG: [..., G] booleans, False leaves the entry out; None = all valid.

    Returns:
      [..., G] rewards, at least float32 and without a gradient, and [..., G] booleans.

    Raises:
      ValueError: G < 2, or a mask of another shape.
      TypeError: rewards that are boolean or complex.
    """
    rewards_PG = jax.lax.stop_gradient(checks.as_float("rewards_PG", rewards_PG))
    checks.group_axis("rewards_PG", rewards_PG)
    valid_PG = ~jnp.isnan(rewards_PG)
    if mask_PG is not None:
        mask_PG = jnp.asarray(mask_PG)
        checks.same_shape("mask_PG", mask_PG, "rewards_PG", rewards_PG)
        valid_PG &= mask_PG.astype(bool)
    return jnp.where(valid_PG, rewards_PG, 0), valid_PG


def order_of(rewards: Any) -> Any:
    """Replaces 64-bit numbers of the host by their dense ranks, which float32 holds: 16777216 is below 16777217.

    For functions of the order alone. JAX would round such numbers to 32 bits, unless `jax_enable_x64` is set; its own
    arrays are returned as they are.
    """
    is_array = not isinstance(rewards, jax.Array) and hasattr(rewards, "tolist")
    leaves, tree = jax.tree.flatten(rewards.tolist() if is_array else rewards)
    is_wide = (
        getattr(rewards, "dtype", None) in WIDE if is_array else all(type(leaf) in (int, float) for leaf in leaves)
    )
    if not leaves or not is_wide or jax.dtypes.canonicalize_dtype("float64") == jnp.float64:
        return rewards
    rank_of = {number: rank for rank, number in enumerate(sorted({leaf for leaf in leaves if leaf == leaf}))}
    dense = [float(rank_of[leaf]) if leaf == leaf else float("nan") for leaf in leaves]
    return jnp.asarray(jax.tree.unflatten(tree, dense), jnp.float32)


def ranks(rewards_PG: jax.Array, valid_PG: jax.Array, ties: str) -> jax.Array:
    """Returns the rank of each valid entry in its group, 1 for the highest reward; ranks of invalid ones mean nothing.

    Equal rewards share the mean of their ranks ("average"), or the earlier one is better ("ordinal").
    """
    # Valid entries first, best first, equal ones by position (lexsort is stable, its last key is the primary one).
    order_PG = jnp.lexsort((-rewards_PG, ~valid_PG))
    position_PG = jnp.argsort(order_PG)  # the second argsort: 0-based ordinal rank of each entry
    if ties == "ordinal":
        return 1 + position_PG.astype(rewards_PG.dtype)
    # Equal rewards share the middle between their first and their last position.
    sorted_PG = jnp.take_along_axis(jnp.where(valid_PG, rewards_PG, jnp.nan), order_PG, -1)
    index_G = jnp.arange(rewards_PG.shape[-1])
    changes_PG = sorted_PG[..., 1:] != sorted_PG[..., :-1]  # NaN != NaN: invalid ones never share
    edge_P1 = jnp.ones_like(changes_PG[..., :1])
    starts_PG = jnp.concatenate([edge_P1, changes_PG], -1)
    ends_PG = jnp.concatenate([changes_PG, edge_P1], -1)
    group_axis = rewards_PG.ndim - 1
    first_PG = jax.lax.cummax(jnp.where(starts_PG, index_G, 0), axis=group_axis)
    last_PG = jax.lax.cummin(jnp.where(ends_PG, index_G, index_G.size), axis=group_axis, reverse=True)
    middle_PG = (first_PG + last_PG).astype(rewards_PG.dtype) / 2
    return 1 + jnp.take_along_axis(middle_PG, position_PG, -1)


def centered(rewards_PG: jax.Array, valid_PG: jax.Array) -> jax.Array:
    """Returns valid rewards minus their group's mean, 0 elsewhere; exact zeros for a constant group.

    The group's maximum is subtracted first: a float32 mean of eight equal numbers can be off by a bit, and
    that bit divided by epsilon would be a gradient from nothing.
    """
    top_P1 = jnp.max(jnp.where(valid_PG, rewards_PG, -jnp.inf), -1, keepdims=True)
    shifted_PG = jnp.where(valid_PG, rewards_PG - top_P1, 0)
    mean_P1 = shifted_PG.sum(-1, keepdims=True) / jnp.maximum(valid_PG.sum(-1, keepdims=True), 1)
    return jnp.where(valid_PG, shifted_PG - mean_P1, 0)


def standardized(values: jax.Array, valid: jax.Array, axis: int | None, epsilon: float) -> jax.Array:
    """Returns (values - mean) / (std + epsilon) over the valid entries along an axis (None: all axes); ddof 1.

    Equal values give 0, also with epsilon 0.
    """
    top = jnp.max(jnp.where(valid, values, -jnp.inf), axis, keepdims=True)  # as in `centered`: equal values give 0
    shifted = jnp.where(valid, values - top, 0)
    mean = shifted.sum(axis, keepdims=True) / jnp.maximum(valid.sum(axis, keepdims=True), 1)
    return jnp.where(valid, shifted - mean, 0) / divisor(shifted, valid, axis, epsilon)


def divisor(values: jax.Array, valid: jax.Array, axis: int | None, epsilon: float) -> jax.Array:
    """Returns std + epsilon over the valid entries along an axis (None: all axes), or 1 where it is 0; ddof 1."""
    n = valid.sum(axis, keepdims=True)
    mean = (values * valid).sum(axis, keepdims=True) / jnp.maximum(n, 1)
    squares = (jnp.square(values - mean) * valid).sum(axis, keepdims=True)
    std = jnp.sqrt(squares / jnp.maximum(n - 1, 1))
    return jnp.where(std + epsilon > 0, std + epsilon, 1)


def comparable(valid_PG: jax.Array) -> jax.Array:
    """Returns the mask of entries that are valid and have at least one other valid entry in their group."""
    return valid_PG & (valid_PG.sum(-1, keepdims=True) >= 2)
