"""Stationary policies of a game with a penalty: along a path from the reference, or where training leads.

Everything here is float64. The path: at 1/beta = 0 the reference itself is stationary; from there the curve of
stationary policies in (logits, 1/beta) is followed by its arc length, through whatever bends and folds it has. Small
reference entries make it turn sharply, which steps in 1/beta itself would not get through.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gopo_jax.theory.games import Game

TOLERANCE = 1e-12  # of the residual, which is relative to the size of what is subtracted in it
MAX_STEPS = 400  # along the path


NewtonState = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # of Newton: point, error, slope, iterations left


class StationaryProblem(NamedTuple):
    """What is solved. A point of the path is [O + 1]: the logits, and 1/beta in units of the advantage's size."""

    game: Game
    reference_O: jax.Array
    size: jax.Array

    def path_end(self, beta: float) -> jax.Array:
        return self.size / beta


def make_problem(game: Game, reference_O: jax.Array) -> StationaryProblem:
    size = jnp.abs(game.expected(reference_O)).max()
    return StationaryProblem(game, reference_O, jnp.where(size > 0, size, 1))


def _residual(point: jax.Array, problem: StationaryProblem, kl: str) -> jax.Array:
    """[O], zero at a stationary policy; each entry over the largest terms in it, so that rounding leaves some 1e-16."""
    logs_O = jax.nn.log_softmax(point[:-1])
    policy_O = jnp.exp(logs_O)
    pull_O = problem.game.expected(policy_O, logs_O)
    pull_O = (pull_O - policy_O @ pull_O) * point[-1] / problem.size
    most = jnp.abs(pull_O).max()
    if kl == "k3":
        return (policy_O * (1 - pull_O) - problem.reference_O) / (problem.reference_O + policy_O * (1 + most))
    return (logs_O - jax.nn.log_softmax(jnp.log(problem.reference_O) + pull_O)) / (1 + most)


@jax.jit(static_argnames="kl")
def _newton(
    start: jax.Array, normal: jax.Array, problem: StationaryProblem, kl: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Newton's iterations with halved steps in the plane through `start`, to where no step gets nearer.

    Returns the point, the largest entry of its residual, and the path's direction there on the side of `normal`.
    """

    def residual(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        off_plane = normal @ (point - start) / (1 + jnp.abs(start).max())
        now = jnp.append(_residual(point, problem, kl), off_plane)
        return now, now

    def iterate(state: NewtonState) -> NewtonState:
        point, _, _, left = state
        slope, now = jax.jacfwd(residual, has_aux=True)(point)
        # Logits are known up to a constant, and the residuals' slopes are dependent, with weights above 0: the sum of
        # the logits, which is to stay, goes to each row.
        slope = slope.at[:-1, :-1].add(1)
        tried_C = point + 0.5 ** jnp.arange(12.0)[:, None] * jnp.linalg.solve(slope, -now)
        there_C = jax.vmap(residual)(tried_C)[0]
        norms_C = jnp.where(jnp.isfinite(there_C).all(-1), jnp.square(there_C).sum(-1), jnp.inf)
        best = norms_C.argmin()
        better = norms_C[best] < jnp.square(now).sum()
        return jnp.where(better, tried_C[best], point), jnp.abs(now).max(), slope, (left - 1) * better

    state = (start, jnp.asarray(jnp.inf), jnp.zeros((start.size, start.size)), jnp.asarray(50))
    point, error, slope, _ = jax.lax.while_loop(lambda state: state[3] > 0, iterate, state)
    direction = jnp.linalg.solve(slope, jnp.zeros_like(start).at[-1].set(1))
    return point, error, direction / jnp.linalg.norm(direction)


def continue_from_reference(problem: StationaryProblem, beta: float, kl: str) -> jax.Array | None:
    """The logits at the first place with this beta on the path from the reference; None if it was not reached."""
    end, point = problem.path_end(beta), jnp.append(jnp.log(problem.reference_O), 0.0)
    last_axis = jnp.zeros_like(point).at[-1].set(1)
    tangent, stride = _newton(point, last_axis, problem, kl=kl)[2], 1.0
    for _ in range(MAX_STEPS):
        aim = point + stride * tangent
        there, error, direction = _newton(aim, tangent, problem, kl=kl)
        if error < TOLERANCE and jnp.linalg.norm(there - aim) < stride / 2:  # not thrown onto another branch
            if there[-1] < end:
                point, tangent, stride = there, direction, 2 * stride
                continue
            aim = (point + (end - point[-1]) / (there[-1] - point[-1]) * (there - point)).at[-1].set(end)
            there, error, _ = _newton(aim, last_axis, problem, kl=kl)
            if error < TOLERANCE and jnp.linalg.norm(there - aim) < stride:
                return there[:-1]
        stride /= 4
        if stride < 1e-10:
            break
    return None


@jax.jit(static_argnames="kl")
def _flow(logits_O: jax.Array, problem: StationaryProblem, beta: jax.Array, kl: str) -> jax.Array:
    """The logits after a long gradient flow of training itself, in small Euler steps."""

    def step(_: int, logits_O: jax.Array) -> jax.Array:
        logs_O = jax.nn.log_softmax(logits_O)
        policy_O = jnp.exp(logs_O)
        force_O = policy_O * problem.game.expected(policy_O)
        if kl == "k3":
            force_O += beta * (problem.reference_O - policy_O)
        else:
            force_O -= beta * policy_O * (logs_O - jnp.log(problem.reference_O))
        return logits_O + (force_O - policy_O * force_O.sum()) / (1 + beta)

    return jax.lax.fori_loop(0, 20_000, step, logits_O)


def follow_to_fixed_point(
    problem: StationaryProblem, start_O: jax.Array, beta: float, kl: str
) -> tuple[jax.Array, float]:
    """The logits where training from a start leads, made exact by Newton, and the largest entry of their residual."""
    logits_O = _flow(jnp.log(start_O), problem, jnp.asarray(beta, float), kl=kl)
    point = jnp.append(logits_O, problem.path_end(beta))
    point, error, _ = _newton(point, jnp.zeros_like(point).at[-1].set(1), problem, kl=kl)
    return point[:-1], float(error)
