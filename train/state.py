"""What a training step carries on, and the keys of its random numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from models.lora import join, separate
from models.sharding import Layout, placed

TRAIN, VALIDATION, EVALUATION, INIT = range(4)  # streams of random numbers


class TrainState(NamedTuple):
    params: dict[str, Any]  # what is trained
    frozen: dict[str, Any]  # what is not: under adapters the base, else nothing
    opt_state: Any
    step: jax.Array  # updates done

    @property
    def all_params(self) -> dict[str, Any]:
        return join(self.params, self.frozen)


def stream_key(seed: int, stream: int, step: int, attempt: int = 0) -> jax.Array:
    """The key of a stream at a step. Rows fold their number in (see `models.sampler.sample`)."""
    key = jax.random.key(seed)
    for part in (stream, step, attempt):
        key = jax.random.fold_in(key, part)
    return key


def make_state(params: dict[str, Any], optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Parameters, those of adapters apart from their base, and a fresh optimizer state of those that are trained."""
    trained, frozen = separate(params)
    where = tree_shardings(abstract_opt_state(trained, optimizer, layout))
    opt_state = jax.jit(optimizer.init, out_shardings=where)(trained)
    return TrainState(trained, frozen, opt_state, layout.put(jnp.zeros((), jnp.int32), ()))


def abstract_opt_state(params: Any, optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    """The shapes of an optimizer's state and its shardings: those of the parameters (which may be shapes too)."""
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, parameter: placed(leaf, parameter.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: placed(leaf, layout.sharding(())),
    )


def apply_gradient(optimizer: optax.GradientTransformation, state: TrainState, gradient: Any) -> TrainState:
    """The state after one optimizer step with the gradient of `state.params`."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def tree_shardings(tree: Any) -> Any:
    """The sharding of every array: a jitted update returns its state where it was."""
    return jax.tree.map(lambda array: array.sharding, tree)


def copy_tree(tree: Any) -> Any:
    """New buffers with the same values: what is donated later stays readable here."""
    return jax.tree.map(lambda array: jnp.array(array, copy=True), tree)
