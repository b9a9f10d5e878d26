"""The groups that can be drawn from a policy over finitely many answers, and the advantages in them."""

import math
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, xlogy

from gopo_jax import checks
from gopo_jax.advantages import ADVANTAGES

NAMES = ("gopo", "grpo", "dr_grpo", "rloo")
MOST_GROUPS = 2_000_000  # answers times multisets that are enumerated
Name = Literal["gopo", "grpo", "dr_grpo", "rloo"]


class Game(NamedTuple):
    """P(o) = sum_w table[o, w] Pr[w], where w are the multisets of other answers and Pr[w] is multinomial.

    Without a table: GRPO with an infinite group, P(o) = (r(o) - mean) / (std + epsilon) over the policy.
    """

    table_OW: jax.Array | None
    counts_WO: jax.Array  # how often each answer is in w
    log_ways_W: jax.Array  # in how many orders w can be drawn
    rewards_O: jax.Array
    epsilon: float

    def expected(self, policy_O: jax.Array) -> jax.Array:
        if self.table_OW is None:
            return standardized(self.rewards_O, policy_O, self.epsilon)
        return self.table_OW @ self.chances(policy_O)

    def chances(self, policy_O: jax.Array) -> jax.Array:
        return jnp.exp(self.log_ways_W + xlogy(self.counts_WO, policy_O).sum(-1))


def make_game(
    count: int,
    rewards_O: jax.typing.ArrayLike | None,
    preference_OO: jax.typing.ArrayLike | None,
    advantage: str,
    group_size: float,
    ddof: int,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> Game:
    check_size(advantage, group_size)
    checks.one_of("ddof", ddof, (0, 1))
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected at least 0, got {epsilon}")
    if (rewards_O is None) == (preference_OO is None):
        raise ValueError(
            "expected one of rewards_O and preference_OO, got " + ("none" if rewards_O is None else "both")
        )
    ones, zeros = jnp.eye(count, dtype=dtype), jnp.zeros(count, dtype)
    if preference_OO is not None:
        wins_OO = preference(preference_OO, count, dtype)
        if advantage != "gopo" and group_size != 2:
            raise ValueError(f"preference_OO: expected group_size 2 for {advantage}, got {group_size}; gopo takes any")
        std = math.sqrt(1 / (4 - 2 * ddof))  # of the rewards 1 and 0
        unit = {"gopo": 2.0, "grpo": 0.5 / (std + epsilon), "dr_grpo": 0.5, "rloo": 1.0}[advantage]
        return Game(unit * (wins_OO - wins_OO.T), ones, zeros, zeros, epsilon)
    rewards_O = finite_rewards(rewards_O, zeros)
    difference_OO = rewards_O[:, None] - rewards_O
    if advantage == "gopo":
        return Game(2 * jnp.sign(difference_OO), ones, zeros, rewards_O, epsilon)
    if advantage in ("dr_grpo", "rloo"):
        share = 1 - 1 / group_size if advantage == "dr_grpo" else 1.0
        return Game(share * difference_OO, ones, zeros, rewards_O, epsilon)
    if math.isinf(group_size):
        return Game(None, ones, zeros, rewards_O, epsilon)
    counts_WO, log_ways_W, others_WK = multisets(count, int(group_size), dtype)
    return Game(advantages(rewards_O, others_WK, "grpo", ddof, epsilon), counts_WO, log_ways_W, rewards_O, epsilon)


def multisets(count: int, group_size: int, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every multiset of G - 1 answers: how often each is in it, log of its orders, and which they are [W, G - 1]."""
    ways = math.comb(count + group_size - 2, group_size - 1)
    if ways * count > MOST_GROUPS:
        raise ValueError(
            f"group_size {group_size} with {count} answers: {ways * count} groups to enumerate, expected at most "
            f"{MOST_GROUPS}; take a smaller group or fewer answers"
        )
    others_WK = jnp.array(list(combinations_with_replacement(range(count), group_size - 1)), int)
    counts_WO = (others_WK[:, :, None] == jnp.arange(count)).sum(1).astype(dtype)
    return counts_WO, gammaln(jnp.asarray(group_size, dtype)) - gammaln(counts_WO + 1).sum(-1), others_WK


@jax.jit(static_argnames=("advantage", "ddof"))
def advantages(rewards_O: jax.Array, others_WK: jax.Array, advantage: str, ddof: int, epsilon: float) -> jax.Array:
    """[O, W] the advantage of answer o in a group with the others w, by the functions that train."""
    others_WK = rewards_O[others_WK]
    shape = (rewards_O.size, *others_WK.shape)
    first_OW1 = jnp.broadcast_to(rewards_O[:, None, None], (*shape[:2], 1))
    groups_OWG = jnp.concatenate([first_OW1, jnp.broadcast_to(others_WK, shape)], -1)
    if advantage != "grpo":
        return ADVANTAGES[advantage](groups_OWG)[..., 0]
    size = groups_OWG.shape[-1]
    shifted_OWG = groups_OWG - groups_OWG.max(-1, keepdims=True)  # so that equal rewards differ from their mean by 0
    apart_OWG = shifted_OWG - shifted_OWG.mean(-1, keepdims=True)
    spread_OW = jnp.sqrt(jnp.square(apart_OWG).sum(-1) / (size - ddof)) + epsilon
    return jnp.where(spread_OW > 0, apart_OWG[..., 0] / jnp.where(spread_OW > 0, spread_OW, 1), 0)


def standardized(rewards_O: jax.Array, policy_O: jax.Array, epsilon: float) -> jax.Array:
    apart_O = rewards_O - policy_O @ rewards_O
    variance = policy_O @ jnp.square(apart_O)
    spread = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    return jnp.where(variance > 0, apart_O / (spread + epsilon), 0)


def distribution(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    array = checks.as_float(name, value)
    tolerance = 1e-9 if array.dtype == jnp.float64 else 1e-5
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected [O] probabilities, got shape {array.shape}")
    if not (bool((array >= 0).all()) and abs(float(array.sum()) - 1) < tolerance):
        raise ValueError(f"{name}: expected probabilities that add up to 1, got {array}, whose sum is {array.sum()}")
    return array


def finite_rewards(rewards_O: jax.typing.ArrayLike | None, like_O: jax.Array) -> jax.Array:
    array = jnp.asarray(rewards_O, like_O.dtype)
    checks.same_shape("rewards_O", array, "policy_O", like_O)
    if not bool(jnp.isfinite(array).all()):
        raise ValueError(f"rewards_O: expected finite numbers, got {array}")
    return array


def preference(preference_OO: jax.typing.ArrayLike, count: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    array = jnp.asarray(preference_OO, dtype)
    if array.shape != (count, count):
        raise ValueError(f"preference_OO: expected shape {(count, count)}, got {array.shape}")
    pairs = ~jnp.eye(count, dtype=bool)
    if not bool(((array >= 0) & (array + array.T <= 1 + 1e-6) | ~pairs).all()):
        raise ValueError("preference_OO: expected probabilities, of which a pair and its mirror add up to at most 1")
    return jnp.where(pairs, array, 0)


def check_size(advantage: str, group_size: float, finite: bool = False) -> None:
    checks.one_of("advantage", advantage, NAMES)
    if not group_size >= 2 or (math.isfinite(group_size) and group_size != int(group_size)):
        raise ValueError(f"group_size: expected a whole number of at least 2, or infinity, got {group_size}")
    if finite and math.isinf(group_size):
        raise ValueError("group_size: expected a finite group here")
