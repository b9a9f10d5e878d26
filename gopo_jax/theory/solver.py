"""Stationary policies of a game with a penalty: by continuation from the reference, or as the limit of training.

All arrays are float64. Continuation: at 1/beta = 0 the reference is stationary; from there the solver follows the curve
of stationary policies in (logits, 1/beta) by arc length, through its folds. Small reference entries bend the curve so
sharply that steps in 1/beta would lose it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gopo_jax.theory.games import Game

TOLERANCE = 1e-12  # of the residual, relative to its largest terms
MAX_STEPS = 400  # along the path

NewtonState = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # point, error, slope, iterations left


class StationaryProblem(NamedTuple):
    """A game, a reference and the advantages' size. A point of the path is [O + 1]: the logits, and size / beta."""

    game: Game
    reference_O: jax.Array
    size: jax.Array

    def path_end(self, beta: float) -> jax.Array:
        """Returns the last coordinate of the points that have this beta."""
        return self.size / beta


def make_problem(game: Game, reference_O: jax.Array) -> StationaryProblem:
    """Makes the problem whose size is the reference's largest expected advantage (1 if that is 0)."""
    size = jnp.abs(game.expected(reference_O)).max()
    return StationaryProblem(game, reference_O, jnp.where(size > 0, size, 1))


def _residual(point: jax.Array, problem: StationaryProblem, kl: str) -> jax.Array:
    """Returns [O], zero at a stationary policy, relative to each entry's largest terms: rounding leaves about 1e-16."""
    logs_O = jax.nn.log_softmax(point[:-1])
    policy_O = jnp.exp(logs_O)
    advantage_O = problem.game.expected(policy_O, logs_O)
    advantage_O = (advantage_O - policy_O @ advantage_O) * point[-1] / problem.size  # over beta
    largest = jnp.abs(advantage_O).max()
    if kl == "k3":
        return (policy_O * (1 - advantage_O) - problem.reference_O) / (problem.reference_O + policy_O * (1 + largest))
    return (logs_O - jax.nn.log_softmax(jnp.log(problem.reference_O) + advantage_O)) / (1 + largest)


@jax.jit(static_argnames="kl")
def _newton(
    start: jax.Array, normal: jax.Array, problem: StationaryProblem, kl: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Damped Newton iterations in the plane through `start`, until no step lowers the residual.

    Returns the point, the largest entry of its residual, and the path's direction there on the side of `normal`.
    """

    def plane_residual(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        off_plane = normal @ (point - start) / (1 + jnp.abs(start).max())
        residual = jnp.append(_residual(point, problem, kl), off_plane)
        return residual, residual

    def iterate(state: NewtonState) -> NewtonState:
        point, _, _, iterations_left = state
        slope, residual = jax.jacfwd(plane_residual, has_aux=True)(point)
        # Logits matter up to a constant, and the rows of the slope are dependent, with positive weights. Adding the sum
        # of the logits' changes to each row makes the system regular and keeps that sum.
        slope = slope.at[:-1, :-1].add(1)
        candidates_I = point + 0.5 ** jnp.arange(12.0)[:, None] * jnp.linalg.solve(slope, -residual)
        residuals_I = jax.vmap(plane_residual)(candidates_I)[0]
        norms_I = jnp.where(jnp.isfinite(residuals_I).all(-1), jnp.square(residuals_I).sum(-1), jnp.inf)
        best = norms_I.argmin()
        improves = norms_I[best] < jnp.square(residual).sum()
        point = jnp.where(improves, candidates_I[best], point)
        return point, jnp.abs(residual).max(), slope, (iterations_left - 1) * improves

    state = (start, jnp.asarray(jnp.inf), jnp.zeros((start.size, start.size)), jnp.asarray(50))
    point, error, slope, _ = jax.lax.while_loop(lambda state: state[3] > 0, iterate, state)
    direction = jnp.linalg.solve(slope, jnp.zeros_like(start).at[-1].set(1))
    return point, error, direction / jnp.linalg.norm(direction)


def continue_from_reference(problem: StationaryProblem, beta: float, kl: str) -> jax.Array | None:
    """Returns the logits of the first point with this beta on the path from the reference; None if the path is lost."""
    end, point = problem.path_end(beta), jnp.append(jnp.log(problem.reference_O), 0.0)
    last_axis = jnp.zeros_like(point).at[-1].set(1)
    tangent, stride = _newton(point, last_axis, problem, kl=kl)[2], 1.0
    for _ in range(MAX_STEPS):
        predicted = point + stride * tangent
        corrected, error, direction = _newton(predicted, tangent, problem, kl=kl)
        if error < TOLERANCE and jnp.linalg.norm(corrected - predicted) < stride / 2:  # the same branch
            if corrected[-1] < end:
                point, tangent, stride = corrected, direction, 2 * stride
                continue
            fraction = (end - point[-1]) / (corrected[-1] - point[-1])
            predicted = (point + fraction * (corrected - point)).at[-1].set(end)
            corrected, error, _ = _newton(predicted, last_axis, problem, kl=kl)
            if error < TOLERANCE and jnp.linalg.norm(corrected - predicted) < stride:
                return corrected[:-1]
        stride /= 4
        if stride < 1e-10:
            break
    return None


@jax.jit(static_argnames="kl")
def _flow(logits_O: jax.Array, problem: StationaryProblem, beta: jax.Array, kl: str) -> jax.Array:
    """Returns the logits after a long gradient flow of the training objective, in small Euler steps."""

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
    """Trains from a start to its limit and refines that by Newton; returns the logits and their largest residual."""
    logits_O = _flow(jnp.log(start_O), problem, jnp.asarray(beta, float), kl=kl)
    point = jnp.append(logits_O, problem.path_end(beta))
    point, error, _ = _newton(point, jnp.zeros_like(point).at[-1].set(1), problem, kl=kl)
    return point[:-1], float(error)
