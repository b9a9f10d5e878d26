"""The state that training steps carry on, and the keys of their random numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from models.lora import merge_trainable, split_trainable
from models.sharding import Layout, to_device, to_host, with_sharding

TRAIN, VALIDATION, EVALUATION, INIT, CHOICE = range(5)  # streams of random numbers


class TrainState(NamedTuple):
    """Parameters, optimizer state and the number of updates: all that a step replaces."""

    params: dict[str, Any]  # the trained ones
    frozen: dict[str, Any]  # the base of adapters; empty without adapters
    opt_state: Any
    step: jax.Array  # optimizer updates done

    @property
    def all_params(self) -> dict[str, Any]:
        return merge_trainable(self.params, self.frozen)


def stream_key(seed: int, stream: int, step: int, attempt: int = 0) -> jax.Array:
    """Returns the key of a stream at a step; each row folds its number in (see `models.sampler.sample`)."""
    key = jax.random.key(seed)
    for part in (stream, step, attempt):
        key = jax.random.fold_in(key, part)
    return key


def make_state(params: dict[str, Any], optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Returns the state before step 0: adapters apart from their base, a fresh optimizer state for what is trained."""
    trained, frozen = split_trainable(params)
    opt_shardings = tree_shardings(abstract_opt_state(trained, optimizer, layout))
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(trained)
    return TrainState(trained, frozen, opt_state, layout.put(jnp.zeros((), jnp.int32), ()))


def abstract_opt_state(params: Any, optimizer: optax.GradientTransformation, layout: Layout) -> Any:
    """Returns the optimizer state as ShapeDtypeStructs, sharded as the parameters in whose place they stand.

    An array of the state belongs to a parameter if its path ends in the parameter's.

    Args:
      params: arrays, or ShapeDtypeStructs with shardings.
    """
    parameters = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    whole = layout.sharding(())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        ends = (path[start:] for start in range(len(path) + 1))
        parameter = next((parameters[end] for end in ends if end in parameters), None)
        return with_sharding(leaf, whole if parameter is None else _state_sharding(leaf.shape, parameter, whole))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, params))


def _state_sharding(shape: tuple[int, ...], parameter: Any, whole: Any) -> Any:
    """Returns the sharding of an array of a parameter's state: without an axis over which it is a mean; else whole."""
    if shape == parameter.shape:
        return parameter.sharding
    if isinstance(parameter.sharding, NamedSharding):
        spec = [*parameter.sharding.spec, *(None,) * (len(parameter.shape) - len(parameter.sharding.spec))]
        for axis in range(len(spec)):
            if shape == parameter.shape[:axis] + parameter.shape[axis + 1 :]:
                return NamedSharding(parameter.sharding.mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return whole


@jax.named_scope("optimizer")
def apply_gradient(optimizer: optax.GradientTransformation, state: TrainState, gradient: Any) -> TrainState:
    """Returns the state after one optimizer step with the gradient of `state.params`."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1)


def offload_optimizer(state: TrainState) -> TrainState:
    """Moves the optimizer's state to the host's memory, until `load_optimizer` brings it back."""
    return state._replace(opt_state=to_host(state.opt_state))


def load_optimizer(state: TrainState) -> TrainState:
    """Moves the optimizer's state to the memory of the devices."""
    return state._replace(opt_state=to_device(state.opt_state))


def tree_shardings(tree: Any) -> Any:
    """Returns the sharding of every array, so that a jitted update can return its state where it was."""
    return jax.tree.map(lambda array: array.sharding, tree)


def copy_tree(tree: Any) -> Any:
    """Copies every array into a new buffer, which stays readable when the original is donated."""
    return jax.tree.map(lambda array: jnp.array(array, copy=True), tree)
