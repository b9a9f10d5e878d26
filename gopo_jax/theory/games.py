"""Expected advantages of a policy over finitely many answers, by enumerating the groups it can draw.

A group is one answer o and a multiset w of G - 1 other answers, a chunk C of the group axis.
"""

import math
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln, xlogy

from gopo_jax import checks
from gopo_jax.advantages import ADVANTAGES

ADVANTAGE_NAMES = ("gopo", "grpo", "dr_grpo", "rloo")
MAX_ENUMERATED = 20_000_000  # entries of the array of all groups
AdvantageName = Literal["gopo", "grpo", "dr_grpo", "rloo"]


class Game(NamedTuple):
    """Expected advantages P(o) = sum_w table[o, w] Pr[w] over multisets w of other answers; Pr[w] is multinomial.

    Without a table: GRPO with an infinite group, P(o) = (r(o) - mean) / (sqrt(variance + noise^2) + epsilon) over the
    policy.
    """

    table_OW: jax.Array | None  # the advantage of answer o beside the others w
    counts_WO: jax.Array  # occurrences of each answer in w
    log_orders_W: jax.Array  # log of the number of orders in which w can be drawn
    rewards_O: jax.Array
    epsilon: float
    noise: float = 0.0

    def expected(self, policy_O: jax.Array, logs_O: jax.Array | None = None) -> jax.Array:
        """Returns P [O]; with logs_O, the policy's logarithms, it is differentiable where probabilities underflow."""
        if self.table_OW is None:
            return policy_z_scores(self.rewards_O, policy_O, self.epsilon, self.noise)
        logs_W = xlogy(self.counts_WO, policy_O).sum(-1) if logs_O is None else (self.counts_WO * logs_O).sum(-1)
        return self.table_OW @ jnp.exp(self.log_orders_W + logs_W)


def make_game(
    count: int,
    rewards_O: jax.typing.ArrayLike | None,
    preference_OO: jax.typing.ArrayLike | None,
    advantage: str,
    group_size: float,
    ddof: int,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    noise: float = 0.0,
) -> Game:
    """Checks the arguments of `theory.expected_advantage` for `count` answers and makes their game."""
    group_size = check_group_size(advantage, group_size)
    checks.one_of("ddof", ddof, (0, 1))
    epsilon = check_epsilon(epsilon)
    noise = check_noise(noise, epsilon, advantage, preference_OO is not None)
    if (rewards_O is None) == (preference_OO is None):
        raise ValueError(
            "expected one of rewards_O and preference_OO, got " + ("none" if rewards_O is None else "both")
        )
    ones, zeros = jnp.eye(count, dtype=dtype), jnp.zeros(count, dtype)
    if preference_OO is not None:
        wins_OO = check_preference(preference_OO, count, dtype)
        if advantage != "gopo" and group_size != 2:
            raise ValueError(f"preference_OO: expected group_size 2 for {advantage}, got {group_size}; gopo takes any")
        std = math.sqrt(1 / (4 - 2 * ddof))  # of the rewards 1 and 0
        unit = {"gopo": 2.0, "grpo": 0.5 / (std + epsilon), "dr_grpo": 0.5, "rloo": 1.0}[advantage]
        return Game(unit * (wins_OO - wins_OO.T), ones, zeros, zeros, epsilon)
    rewards_O = check_rewards(rewards_O, zeros)
    difference_OO = rewards_O[:, None] - rewards_O
    if advantage == "gopo":
        margin_OO = jax.lax.erf(difference_OO / (2 * noise)) if noise else jnp.sign(difference_OO)
        return Game(2 * margin_OO, ones, zeros, rewards_O, epsilon)
    if advantage in ("dr_grpo", "rloo"):
        factor = 1 - 1 / group_size if advantage == "dr_grpo" else 1.0
        return Game(factor * difference_OO, ones, zeros, rewards_O, epsilon)
    if math.isinf(group_size):
        return Game(None, ones, zeros, rewards_O, epsilon, noise)
    counts_WO, log_orders_W, others_WC = multisets(count, int(group_size), dtype)
    table_OW = advantage_table(rewards_O, others_WC, "grpo", ddof, epsilon)
    if noise:
        table_OW *= expected_cosine(group_norms(rewards_O, others_WC) / noise, int(group_size) - 1)
    return Game(table_OW, counts_WO, log_orders_W, rewards_O, epsilon)


def multisets(count: int, group_size: int, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns counts_WO, log_orders_W and the answers others_WC of every multiset of G - 1 answers.

    Raises:
      ValueError: too many groups.
    """
    if not enumerable(count, group_size):
        raise ValueError(
            f"group_size {group_size} with {count} answers: expected at most {MAX_ENUMERATED} rewards in all "
            f"groups to enumerate; take a smaller group or fewer answers"
        )
    others_WC = jnp.array(list(combinations_with_replacement(range(count), group_size - 1)), int)
    counts_WO = (others_WC[:, :, None] == jnp.arange(count)).sum(1).astype(dtype)
    return counts_WO, gammaln(jnp.asarray(group_size, dtype)) - gammaln(counts_WO + 1).sum(-1), others_WC


def enumerable(count: int, group_size: int) -> bool:
    """Whether the array [O, W, G] of all groups has at most MAX_ENUMERATED entries."""
    return count * group_size * math.comb(count + group_size - 2, group_size - 1) <= MAX_ENUMERATED


@jax.jit(static_argnames=("advantage", "ddof"))
def advantage_table(rewards_O: jax.Array, others_WC: jax.Array, advantage: str, ddof: int, epsilon: float) -> jax.Array:
    """Returns the advantage [O, W] of answer o in a group with the others w, by the functions that train."""
    groups_OWG = group_rewards(rewards_O, others_WC)
    if advantage != "grpo":
        return ADVANTAGES[advantage](groups_OWG)[..., 0]
    unit_OWG, largest_OW = scale_group(deviations(groups_OWG))
    divisor_OW = jnp.sqrt(jnp.square(unit_OWG).sum(-1) / (groups_OWG.shape[-1] - ddof)) + epsilon / largest_OW
    return jnp.where(divisor_OW > 0, unit_OWG[..., 0] / jnp.where(divisor_OW > 0, divisor_OW, 1), 0)


def group_rewards(rewards_O: jax.Array, others_WC: jax.Array) -> jax.Array:
    """Returns the rewards [O, W, G] of answer o and of the others w."""
    rewards_WC = rewards_O[others_WC]
    shape = (rewards_O.size, *rewards_WC.shape)
    first_OW1 = jnp.broadcast_to(rewards_O[:, None, None], (*shape[:2], 1))
    return jnp.concatenate([first_OW1, jnp.broadcast_to(rewards_WC, shape)], -1)


def deviations(groups_OWG: jax.Array) -> jax.Array:
    """Returns rewards minus the mean of their group."""
    shifted_OWG = groups_OWG - groups_OWG.max(-1, keepdims=True)  # exact zeros for equal rewards
    return shifted_OWG - shifted_OWG.mean(-1, keepdims=True)


def scale_group(deviations_OWG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divides deviations by their group's largest (1 if that is 0), so that squares cannot overflow; returns both."""
    largest_OW = jnp.abs(deviations_OWG).max(-1)
    largest_OW = jnp.where(largest_OW > 0, largest_OW, 1)
    return deviations_OWG / largest_OW[..., None], largest_OW


@jax.jit
def group_norms(rewards_O: jax.Array, others_WC: jax.Array) -> jax.Array:
    """Returns the norm [O, W] of the vector of a group's rewards minus their mean."""
    unit_OWG, largest_OW = scale_group(deviations(group_rewards(rewards_O, others_WC)))
    return largest_OW * jnp.sqrt(jnp.square(unit_OWG).sum(-1))


@jax.jit(static_argnames="dimensions")
def expected_cosine(norm: jax.Array, dimensions: int) -> jax.Array:
    """Returns the expected cosine of the angle between a vector m of this norm and m + z, z standard normal.

        E[cos] = s sqrt(2 / pi) integral_0^{pi/2} exp(-(s sin phi)^2 / 2) cos(phi)^d dphi,   s = |m|, d dimensions

    which is erf(s / sqrt 2) for d = 1. Noise shrinks a group's expected z-scores by this factor: z-scores are
    sqrt(G - ddof) times the direction of rewards + noise in the G - 1 dimensions around their mean, and the expected
    direction is that of the rewards. Gauss-Legendre quadrature, up to the angle where the normal density vanishes.
    """
    order = 64
    k_I = jnp.arange(1, order, dtype=norm.dtype)
    off_diagonal_I = k_I / jnp.sqrt(4 * k_I**2 - 1)
    nodes_I, vectors_II = jnp.linalg.eigh(jnp.diag(off_diagonal_I, 1) + jnp.diag(off_diagonal_I, -1))
    weights_I = 2 * jnp.square(vectors_II[0])
    end = jnp.arcsin(jnp.minimum(1, 9 / jnp.maximum(norm, 1e-30)))

    def add(total: jax.Array, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        angle = end * (1 + node[0]) / 2
        height = jnp.exp(-jnp.square(norm * jnp.sin(angle)) / 2) * jnp.cos(angle) ** dimensions
        return total + node[1] * height, None

    total, _ = jax.lax.scan(add, jnp.zeros_like(norm), (nodes_I, weights_I))
    return norm * math.sqrt(2 / math.pi) * total * end / 2


def policy_z_scores(rewards_O: jax.Array, policy_O: jax.Array, epsilon: float, noise: float) -> jax.Array:
    """Returns z-scores of rewards under the policy: (r - mean) / (sqrt(variance + noise^2) + epsilon)."""
    shifted_O = rewards_O - rewards_O.max()  # exact zeros for equal rewards
    deviations_O = shifted_O - policy_O @ shifted_O
    # the scale against overflow cancels out, so it needs no gradient
    largest = jax.lax.stop_gradient(jnp.where(policy_O > 0, jnp.abs(deviations_O), 0).max())
    largest = jnp.where(largest > 0, largest, 1)
    variance = policy_O @ jnp.square(deviations_O / largest)
    std = jnp.hypot(jnp.sqrt(jnp.where(variance > 0, variance, 1)), noise / largest)
    return jnp.where(variance > 0, deviations_O / largest / (std + epsilon / largest), 0)


def check_distribution(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """Returns `value` as [O] probabilities, divided by their sum, or raises ValueError."""
    array = checks.as_float(name, value)
    tolerance = 1e-9 if array.dtype == jnp.float64 else 1e-5
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected [O] probabilities, got shape {array.shape}")
    if not (bool((array >= 0).all()) and abs(float(array.sum()) - 1) < tolerance):
        raise ValueError(f"{name}: expected probabilities that add up to 1, got {array}, whose sum is {array.sum()}")
    return array / array.sum()


def check_rewards(rewards_O: jax.typing.ArrayLike | None, like_O: jax.Array) -> jax.Array:
    """Returns finite rewards of the shape and dtype of `like_O`, or raises ValueError."""
    array = as_numbers("rewards_O", rewards_O, like_O.dtype)
    checks.same_shape("rewards_O", array, "policy_O", like_O)
    if not bool(jnp.isfinite(array).all()):
        raise ValueError(f"rewards_O: expected finite numbers, got {array}")
    return array


def check_preference(preference_OO: jax.typing.ArrayLike, count: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the probabilities that the row's answer wins, 0 on the diagonal, or raises ValueError."""
    array = as_numbers("preference_OO", preference_OO, dtype)
    if array.shape != (count, count):
        raise ValueError(f"preference_OO: expected shape {(count, count)}, got {array.shape}")
    pairs = ~jnp.eye(count, dtype=bool)
    if not bool(((array >= 0) & (array + array.T <= 1 + 1e-6) | ~pairs).all()):
        raise ValueError("preference_OO: expected probabilities; each one and its mirror must add up to at most 1")
    return jnp.where(pairs, array, 0)


def as_numbers(name: str, value: jax.typing.ArrayLike | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns `value` as an array, or raises ValueError."""
    try:
        return jnp.asarray(value, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected an array of numbers, got {value!r}") from error


def as_number(name: str, value: object) -> float:
    """Returns `value` as a float, or raises ValueError."""
    if isinstance(value, SupportsFloat) and getattr(value, "shape", ()) == ():
        return float(value)
    raise ValueError(f"{name}: expected a number, got {value!r}")


def check_group_size(advantage: str, group_size: float, finite: bool = False) -> float:
    """Returns `group_size`, a whole number of at least 2 or infinity, or raises ValueError."""
    checks.one_of("advantage", advantage, ADVANTAGE_NAMES)
    group_size = as_number("group_size", group_size)
    if not group_size >= 2 or (math.isfinite(group_size) and group_size != int(group_size)):
        raise ValueError(f"group_size: expected a whole number of at least 2, or infinity, got {group_size}")
    if finite and math.isinf(group_size):
        raise ValueError("group_size: expected a finite group for second moments, got infinity")
    return group_size


def check_epsilon(epsilon: float) -> float:
    """Returns `epsilon`, at least 0, or raises ValueError."""
    epsilon = as_number("epsilon", epsilon)
    if not epsilon >= 0:
        raise ValueError(f"epsilon: expected at least 0, got {epsilon}")
    return epsilon


def check_noise(noise: float, epsilon: float, advantage: str, has_preference: bool) -> float:
    """Returns `noise`, a standard deviation that these arguments allow, or raises ValueError."""
    noise = as_number("noise", noise)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a standard deviation of at least 0, got {noise}")
    if noise and has_preference:
        raise ValueError("noise: expected rewards_O with it, got preference_OO, which has its own ties and upsets")
    if noise and epsilon and advantage == "grpo":
        raise ValueError(f"epsilon: expected 0 with noise (the expectation is known for 0 only), got {epsilon}")
    return noise
