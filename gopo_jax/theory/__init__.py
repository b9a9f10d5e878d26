"""Theory of a policy over finitely many answers: expected advantages, their second moments, fixed points of training.

A group is one answer o and G - 1 others, all drawn from the policy pi. Everything follows from the expected advantage
of an answer, P(o) = E[A | o]. Group advantages make its mean zero, sum_o pi(o) P(o) = 0. For GOPO with mid-ranks it is
the same for every G,

    P(o) = 2 (Pr[o beats o'] - Pr[o' beats o]),   o' ~ pi,

because the mean rank of o is 1 + (G - 1) (Pr[o' beats o] + Pr[o' ties o] / 2): GOPO optimises the pairwise win rate.
For GRPO P depends on G. Use float64 (`jax.config.update("jax_enable_x64", True)`, or `with jax.enable_x64(True)`)
where digits matter.

References:
  Vojnovic and Yun, What is the Alignment Objective of GRPO?, https://arxiv.org/abs/2502.18548.
  GOPO, https://arxiv.org/abs/2602.03876, section 3.
"""

import math
import warnings
from typing import Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks
from gopo_jax.theory import solver
from gopo_jax.theory.games import (
    AdvantageName,
    Game,
    advantage_table,
    as_number,
    check_distribution,
    check_epsilon,
    check_group_size,
    check_rewards,
    make_game,
    multisets,
)


def expected_advantage(
    policy_O: jax.typing.ArrayLike,
    rewards_O: jax.typing.ArrayLike | None = None,
    *,
    advantage: AdvantageName,
    group_size: float,
    preference_OO: jax.typing.ArrayLike | None = None,
    ddof: int = 0,
    epsilon: float = 0.0,
    noise: float = 0.0,
) -> jax.Array:
    """Expected advantage P(o) = E[A | o] of each answer in a group of `group_size` drawn from the policy.

        gopo     2 (Pr[o beats o'] - Pr[o' beats o])     for every G
        grpo     E[(r(o) - mean) / (std + epsilon)]      exact, over all multisets of G - 1 others
        dr_grpo  (1 - 1/G) (r(o) - sum_o' pi(o') r(o'))
        rloo     r(o) - sum_o' pi(o') r(o')

    Args:
      policy_O: [O] probabilities.
      rewards_O: [O] the reward of each answer.
      group_size: G, at least 2; float("inf") for the limit.
      preference_OO: [O, O] instead of rewards, the probability that the row's answer beats the column's; a pair ties
        with the probability that it and its mirror leave to 1. The diagonal does not matter. Valid for gopo at any G,
        for the others at G = 2, where the winner's reward is 1 and the loser's 0, or 1/2 each in a tie.
      ddof: of grpo's standard deviation: 0 for the population's, 1 as in `grpo_advantages`.
      epsilon: added to that standard deviation. A group with std 0 has advantages 0.
      noise: standard deviation of normal noise, drawn for every completion (equal answers too), added to its reward
        before it is ranked or standardised. Pr[o beats o'] is then Phi((r(o) - r(o')) / (noise sqrt 2)); grpo's
        z-scores shrink by `games.expected_cosine` (exact at epsilon 0); dr_grpo's and rloo's P do not change.

    Returns:
      [O] expected advantages, zero in the mean over the policy.

    Raises:
      ValueError: not a distribution, neither or both of rewards and preference, a group too large to enumerate.
    """
    policy_O = check_distribution("policy_O", policy_O)
    options = (advantage, group_size, ddof, epsilon, policy_O.dtype, noise)
    game = make_game(policy_O.size, rewards_O, preference_OO, *options)
    return game.expected(policy_O)


def second_moment(
    policy_O: jax.typing.ArrayLike,
    rewards_O: jax.typing.ArrayLike,
    *,
    advantage: AdvantageName,
    group_size: int,
    ddof: int = 0,
    epsilon: float = 0.0,
) -> jax.Array:
    """Second moment E[A^2] of a completion's advantage, exact, over all groups drawn from the policy.

    In a group without ties it is 4 (G + 1) / (3 (G - 1)) for gopo; in a group with std > 0 it is 1 for grpo with
    ddof 0 and (G - 1) / G with ddof 1, at epsilon 0.

    Args, Raises: as `expected_advantage`.
    """
    policy_O = check_distribution("policy_O", policy_O)
    group_size = int(check_group_size(advantage, group_size, finite=True))
    checks.one_of("ddof", ddof, (0, 1))
    epsilon = check_epsilon(epsilon)
    rewards_O = check_rewards(rewards_O, policy_O)
    counts_WO, log_orders_W, others_WC = multisets(policy_O.size, group_size, policy_O.dtype)
    table_OW = advantage_table(rewards_O, others_WC, advantage, ddof, epsilon)
    game = Game(jnp.square(table_OW), counts_WO, log_orders_W, rewards_O, epsilon)
    return policy_O @ game.expected(policy_O)


def expected_gradient(policy_O: jax.typing.ArrayLike, advantage_O: jax.typing.ArrayLike) -> jax.Array:
    """On-policy gradient of sum_o pi(o) P(o) in the logits of a softmax over the answers, with P constant.

        g(o) = pi(o) (P(o) - sum_o' pi(o') P(o'))

    Its norm is the exact norm of the expected policy gradient of a tabular policy.

    Args:
      policy_O: [O] probabilities.
      advantage_O: [O] expected advantages P.

    Returns:
      [O] the gradient g.
    """
    policy_O = check_distribution("policy_O", policy_O)
    advantage_O = jnp.asarray(advantage_O, policy_O.dtype)
    checks.same_shape("advantage_O", advantage_O, "policy_O", policy_O)
    return policy_O * (advantage_O - policy_O @ advantage_O)


def stationary_policy(
    reference_O: jax.typing.ArrayLike,
    rewards_O: jax.typing.ArrayLike | None = None,
    *,
    beta: float,
    advantage: AdvantageName,
    group_size: float,
    kl: Literal["k3", "direct"] = "k3",
    ddof: int = 0,
    epsilon: float = 0.0,
    preference_OO: jax.typing.ArrayLike | None = None,
    noise: float = 0.0,
) -> jax.Array:
    """Policy at which the expected gradient of advantage minus beta times the penalty is zero.

        k3      pi(o) (1 - P(o) / beta) = pi_ref(o)        (the k3 estimator in the loss; 2502.18548, theorem 1)
        direct  pi(o) ~ pi_ref(o) exp(P(o) / beta)         (KL(pi, pi_ref) itself; k2 in the loss on policy)

    with P the expected advantage under pi. A stationary policy exists for every beta > 0 if P is continuous (Brouwer).
    For grpo with an infinite group P is not: with direct KL it grows without bound as one answer takes over, and for
    small beta no policy is stationary. The policy is unique for gopo (P is that of a skew-symmetric game, the penalty
    strictly convex) and for dr_grpo and rloo (P is the gradient of a linear function). For grpo several starts are
    tried, with a warning if they end in different policies.

    Args:
      reference_O: [O] probabilities, all positive.
      beta: weight of the penalty.
      rewards_O, advantage, group_size, ddof, epsilon, preference_OO, noise: as `expected_advantage`.

    Returns:
      [O] probabilities in the reference's dtype, solved in float64 whatever that dtype is; the one that is reached from
      the reference as beta falls from infinity, if there are several.

    Raises:
      ValueError: as `expected_advantage`; beta <= 0; a reference with zeros.
      RuntimeError: no stationary policy was found; the message has the smallest residual.
    """
    policies = stationary_policies(
        reference_O,
        rewards_O,
        beta=beta,
        advantage=advantage,
        group_size=group_size,
        kl=kl,
        ddof=ddof,
        epsilon=epsilon,
        preference_OO=preference_OO,
        noise=noise,
    )
    if len(policies) > 1:
        warnings.warn(
            f"{len(policies)} stationary policies found; the one reached from the reference is returned; "
            f"stationary_policies returns all of them",
            stacklevel=2,
        )
    return policies[0]


def stationary_policies(
    reference_O: jax.typing.ArrayLike,
    rewards_O: jax.typing.ArrayLike | None = None,
    *,
    beta: float,
    advantage: AdvantageName,
    group_size: float,
    kl: Literal["k3", "direct"] = "k3",
    ddof: int = 0,
    epsilon: float = 0.0,
    preference_OO: jax.typing.ArrayLike | None = None,
    noise: float = 0.0,
) -> list[jax.Array]:
    """Returns all stationary policies that were found, first the one reached from the reference.

    Training starts from the reference, and for grpo, where uniqueness is not known, also from the uniform policy and
    from a policy near each answer.

    Args, Raises: as `stationary_policy`.
    """
    reference_O = check_distribution("reference_O", reference_O)
    if not bool((reference_O > 0).all()):
        raise ValueError(
            f"reference_O: expected positive probabilities, got the smallest {float(reference_O.min())}; leave out "
            f"answers that the reference never gives"
        )
    checks.one_of("kl", kl, ("k3", "direct"))
    beta = check_beta(beta)
    dtype = reference_O.dtype
    with jax.enable_x64(True):
        options = (advantage, group_size, ddof, epsilon, jnp.float64, noise)
        game = make_game(reference_O.size, rewards_O, preference_OO, *options)
        exact_O = reference_O.astype(jnp.float64)
        problem = solver.make_problem(game, exact_O / exact_O.sum())
        policies, residual = _find_stationary(problem, beta, kl, several=advantage == "grpo")
    if not policies:
        raise RuntimeError(
            f"no stationary policy found for beta {beta}, advantage {advantage}, group_size {group_size}, kl {kl}: the "
            f"best start left a residual of {residual:.1e}, expected below {solver.TOLERANCE}, in float64 "
            f"(reference_O: {dtype}, smallest entry {float(reference_O.min()):.1e}). Grpo with an infinite group and "
            f"direct KL has none at a small beta; otherwise take a larger beta or leave out the rarest answers"
        )
    return [policy_O.astype(dtype) for policy_O in policies]


def _find_stationary(
    problem: solver.StationaryProblem, beta: float, kl: str, several: bool
) -> tuple[list[jax.Array], float]:
    """Returns the distinct stationary policies, and the smallest residual of all training starts."""
    reference_O = problem.reference_O
    policies: list[jax.Array] = []
    starts, errors = [], [math.inf]
    logits_O = solver.continue_from_reference(problem, beta, kl)
    if logits_O is None:
        starts.append(reference_O)
    else:
        policies.append(jax.nn.softmax(logits_O))
    if several and (count := reference_O.size) > 1:
        starts += [jnp.full_like(reference_O, 1 / count), *(0.9 * jnp.eye(count) + 0.1 / count)]
    for start_O in starts:
        logits_O, error = solver.follow_to_fixed_point(problem, start_O, beta, kl)
        policy_O = jax.nn.softmax(logits_O)
        is_new = all(float(jnp.abs(policy_O - other_O).max()) >= 1e-6 for other_O in policies)
        if error < solver.TOLERANCE and is_new:
            policies.append(policy_O)
        errors.append(error)
    return policies, min(errors)


def binary_gopo_policy(reference: float, margin: float, beta: float) -> float:
    """GOPO's stationary probability x of answer a of two answers a and b, k3 penalty, any G.

        (2 gamma / beta) x^2 + (1 - 2 gamma / beta) x - p = 0,   gamma = Pr[a beats b] - Pr[b beats a]

    Args:
      reference: p, the reference's probability of a, in (0, 1).
      margin: gamma, in [-1, 1].
      beta: weight of the penalty, above 0.

    Raises:
      ValueError: an argument outside its range.
    """
    reference, beta, margin = check_probability(reference), check_beta(beta), as_number("margin", margin)
    if not -1 <= margin <= 1:
        raise ValueError(f"margin: expected a number from -1 to 1, got {margin}")
    a, c = 2 * margin / beta, -reference
    b = 1 - a
    if a == 0:
        return reference
    return (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a) if b < 0 else 2 * -c / (b + math.sqrt(b * b - 4 * a * c))


def binary_grpo_policy(reference: float, beta: float) -> float:
    """GRPO's stationary probability x of the better answer of two as G goes to infinity, k3 penalty.

        x = (1 + 2 beta^2 p + sqrt(1 + 4 beta^2 p (1 - p))) / (2 (1 + beta^2))

    with p the reference's probability of the better answer. Each answer has one reward; their difference cancels out.

    Raises:
      ValueError: a reference outside (0, 1), beta <= 0.
    """
    p, beta = check_probability(reference), check_beta(beta)
    square = beta * beta
    return (1 + 2 * square * p + math.sqrt(1 + 4 * square * p * (1 - p))) / (2 * (1 + square))


def rlhf_policy(reference_O: jax.typing.ArrayLike, rewards_O: jax.typing.ArrayLike, beta: float) -> jax.Array:
    """Maximizer of RLHF's objective E[r] - beta KL(pi, pi_ref): pi(o) ~ pi_ref(o) exp(r(o) / beta).

    It is also stationary for rloo with this beta and direct KL, and for dr_grpo with beta (1 - 1/G) in its place.

    Raises:
      ValueError: not a distribution, rewards of another shape, beta <= 0.
    """
    reference_O = check_distribution("reference_O", reference_O)
    beta = check_beta(beta)
    return jax.nn.softmax(jnp.log(reference_O) + check_rewards(rewards_O, reference_O) / beta)


def check_beta(beta: float) -> float:
    """Returns `beta`, positive and finite, or raises ValueError."""
    beta = as_number("beta", beta)
    if not 0 < beta < math.inf:
        raise ValueError(
            f"beta: expected a positive number, got {beta}; without a penalty every policy that gives one answer alone "
            f"is stationary"
        )
    return beta


def check_probability(reference: float) -> float:
    """Returns `reference`, strictly between 0 and 1, or raises ValueError."""
    reference = as_number("reference", reference)
    if not 0 < reference < 1:
        raise ValueError(f"reference: expected a probability between 0 and 1, got {reference}")
    return reference
