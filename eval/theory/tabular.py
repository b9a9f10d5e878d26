"""Softmax policies over finitely many answers, trained with the real losses, to check `gopo_jax.theory`.

`trained` samples groups and follows the gradient of `policy_loss`, as train/loop.py does for a network;
`trained_exactly` follows the expected gradient over groups. One prompt, one token per answer.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gopo_jax import ADVANTAGES, policy_loss
from gopo_jax.theory.games import Game, make_game


class TabularProblem(NamedTuple):
    """Reference policy, rewards and penalty of a training."""

    reference_O: jax.Array
    rewards_O: jax.Array
    beta: float
    noise: float = 0.0  # standard deviation of the noise added to each reward


def trained(problem: TabularProblem, key: jax.Array, **options: Any) -> jax.Array:
    """Mean policy [O] over the second half of the steps of `training`."""
    policies_YO = training(problem, key, **options)
    return policies_YO[len(policies_YO) // 2 :].mean(0)


@partial(jax.jit, static_argnames=("advantage", "group_size", "kl", "groups", "steps"))
def training(
    problem: TabularProblem,
    key: jax.Array,
    *,
    advantage: str,
    group_size: int,
    kl: str | None = "k3",
    groups: int = 1024,
    steps: int = 4000,
    learning_rate: float = 1.0,
) -> jax.Array:
    """Trains on `groups` sampled groups per step; returns the policy [Y, O] before each of Y steps.

    The step's size falls as 1 / (1 + 10 t / steps): near the fixed point the policy wanders less.
    """

    def step(logits_O: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        draw, shake = jax.random.split(jax.random.fold_in(key, t))
        answers_PG = jax.random.categorical(draw, logits_O, shape=(groups, group_size))
        rewards_PG = problem.rewards_O[answers_PG]
        rewards_PG += problem.noise * jax.random.normal(shake, rewards_PG.shape, rewards_PG.dtype)
        advantages_PG = ADVANTAGES[advantage](rewards_PG)
        slope_O = jax.grad(_loss)(logits_O, answers_PG, advantages_PG, problem, kl)
        return logits_O - learning_rate / (1 + 10 * t / steps) * slope_O, jax.nn.softmax(logits_O)

    return jax.lax.scan(step, jnp.log(problem.reference_O), jnp.arange(steps))[1]


def _loss(
    logits_O: jax.Array, answers: jax.Array, advantages: jax.Array, problem: TabularProblem, kl: str | None
) -> jax.Array:
    """`policy_loss` of one-token answers."""
    logprobs = jax.nn.log_softmax(logits_O)[answers][..., None]
    reference = jnp.log(problem.reference_O)[answers][..., None]
    old, mask = jax.lax.stop_gradient(logprobs), jnp.ones(logprobs.shape, bool)
    penalty: dict[str, Any] = {"kl": kl, "ref_logprobs": reference, "beta": problem.beta} if kl else {}
    return policy_loss(logprobs, old, advantages, mask, **penalty)[0]


def trained_exactly(
    problem: TabularProblem,
    *,
    advantage: Any,
    group_size: float,
    kl: str | None = "k3",
    ddof: int = 1,
    epsilon: float = 1e-4,
    steps: int = 20_000,
    learning_rate: float = 1.0,
) -> jax.Array:
    """The policy [O] after `steps` steps along the expected gradient of the same loss; ddof and epsilon as in GRPO.

    With noise, epsilon is 0, as in `gopo_jax.theory`.
    """
    reference_O, epsilon = problem.reference_O, 0.0 if problem.noise else epsilon
    options = (advantage, group_size, ddof, epsilon, reference_O.dtype, problem.noise)
    game = make_game(reference_O.size, problem.rewards_O, None, *options)
    return _exactly(problem, game, kl, steps, learning_rate)


@partial(jax.jit, static_argnames=("kl", "steps"))
def _exactly(problem: TabularProblem, game: Game, kl: str | None, steps: int, learning_rate: float) -> jax.Array:
    answers_O = jnp.arange(problem.reference_O.size)

    def expected_loss(logits_O: jax.Array) -> jax.Array:
        policy_O = jax.lax.stop_gradient(jax.nn.softmax(logits_O))
        losses_O = jax.vmap(lambda o, a: _loss(logits_O, o, a, problem, kl))(answers_O, game.expected(policy_O))
        return policy_O @ losses_O

    def step(_: int, logits_O: jax.Array) -> jax.Array:
        return logits_O - learning_rate * jax.grad(expected_loss)(logits_O)

    return jax.nn.softmax(jax.lax.fori_loop(0, steps, step, jnp.log(problem.reference_O)))
