"""Optimizers by name: what an update is made of, what looks at each layer by itself, and the dtype of the state.

A function of `DIRECTIONS` returns a transformation of gradients into directions d; `train.build.make_optimizer` makes
of them the update -learning_rate (d + weight_decay p). The layers are stacked, so that a parameter has L matrices: what
looks at a matrix or a tensor as a whole, Muon and Adafactor, looks at each layer's.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from models.hf_weights import flatten, nest
from models.lora import PROJECTIONS, Lora, adapter_names
from train import dotted
from train.user_code import contained

Transformation: TypeAlias = optax.GradientTransformation
# Settings of the config that a function below, or a factory of a user's, is given where it takes them.
SETTINGS = ("adam_beta1", "adam_beta2", "adam_epsilon", "moments_dtype")


def adamw(
    *,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    moments_dtype: str | None,
    eps_root: float = 0.0,
    nesterov: bool = False,
) -> Transformation:
    """AdamW's direction, m / (sqrt(v + eps_root) + epsilon): Loshchilov and Hutter, https://arxiv.org/abs/1711.05101."""
    return optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon, eps_root, moments_dtype, nesterov=nesterov)


def adafactor(
    *,
    moments_dtype: str | None,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    multiply_by_parameter_scale: bool = False,
    min_dim_size_to_factor: int = 128,
) -> Transformation:
    """Adafactor's direction: Shazeer and Stern, https://arxiv.org/abs/1804.04235, algorithm 4, for each layer.

    The squares' mean is kept as means over rows and columns of a tensor's two largest axes. Against the paper, the
    learning rate is not multiplied by the parameter's scale, so that one rate fits all optimizers.
    """
    ascent = optax.adafactor(
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        dtype_momentum=moments_dtype or "float32",
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )
    return each_layer(optax.chain(ascent, optax.scale(-1.0)))


def lion(*, moments_dtype: str | None, b1: float = 0.9, b2: float = 0.99) -> Transformation:
    """Lion's direction, the sign of a mean of gradients: Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2."""
    return optax.scale_by_lion(b1, b2, moments_dtype)


def sgd(*, moments_dtype: str | None, momentum: float = 0.0, nesterov: bool = False) -> Transformation:
    """The gradient, or with momentum the sum over gradients g of momentum^age g."""
    return optax.trace(momentum, nesterov, moments_dtype) if momentum else optax.identity()


def muon(
    *,
    adam_beta1: float,
    adam_beta2: float,
    adam_epsilon: float,
    moments_dtype: str | None,
    beta: float = 0.95,
    ns_steps: int = 5,
    nesterov: bool = True,
    consistent_rms: float | None = 0.2,
) -> Transformation:
    """Muon's direction for each layer's matrices, AdamW's for embeddings, heads, norms and biases.

    The momentum's singular values are set to about 1 by Newton-Schulz iterations (Jordan et al.,
    https://kellerjordan.github.io/posts/muon), and the matrix is scaled by consistent_rms sqrt(max(inputs, outputs)):
    its root mean square is then that of AdamW's direction, so that one learning rate fits both (Liu et al.,
    https://arxiv.org/abs/2502.16982, equation 4). Where consistent_rms is None, the factor is
    sqrt(max(1, outputs / inputs)).
    """
    orthogonalized = contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=beta,
        eps=adam_epsilon,
        mu_dtype=moments_dtype,
        nesterov=nesterov,
        weight_dimension_numbers=matrix_axes,
    )

    def scale(path: Any, update: jax.Array) -> jax.Array:
        inputs, outputs = (math.prod(update.shape[i] for i in axes) for axes in _axes(path, update))
        wide = math.sqrt(max(1, outputs / inputs))
        return update * (wide if consistent_rms is None else consistent_rms * math.sqrt(max(inputs, outputs)))

    scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
    adam = optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon, mu_dtype=moments_dtype)
    return apart(lambda name: name.rpartition(".")[2] in matrix_inputs(), optax.chain(orthogonalized, scaled), adam)


DIRECTIONS: dict[str, Callable[..., Transformation]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "sgd": sgd,
    "muon": muon,
}
# Numbers that the options of DIRECTIONS may be, and the same in words.
_SHARE = (lambda x: 0 <= x < 1, "a number in [0, 1)")
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "b1": _SHARE,
    "b2": _SHARE,
    "beta": _SHARE,
    "momentum": _SHARE,
    "decay_rate": (lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "eps_root": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    "ns_steps": (lambda x: x >= 1, "at least 1"),
    "clipping_threshold": (lambda x: x > 0, "a number above 0, or null"),
}


class Apart(NamedTuple):
    """The state of two transformations of which each has some of the parameters."""

    first: Any
    second: Any


def apart(is_first: Callable[[str], bool], first: Transformation, second: Transformation) -> Transformation:
    """Transforms parameters by `first` if `is_first` holds of their name, such as layers.up_LDF; else by `second`."""

    def split(tree: Any) -> tuple[Any, Any]:
        leaves = flatten(tree)
        chosen = {name: leaf for name, leaf in leaves.items() if is_first(name)}
        return nest(chosen), nest({name: leaf for name, leaf in leaves.items() if name not in chosen})

    def init(params: Any) -> Apart:
        one, other = split(params)
        return Apart(first.init(one), second.init(other))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Apart]:
        (gradient_1, gradient_2), (params_1, params_2) = split(gradient), split(params)
        update_1, state_1 = first.update(gradient_1, state.first, params_1)
        update_2, state_2 = second.update(gradient_2, state.second, params_2)
        leaves = flatten(update_1) | flatten(update_2)
        return nest({name: leaves[name] for name in flatten(gradient)}), Apart(state_1, state_2)

    return Transformation(init, update)


def each_layer(optimizer: Transformation) -> Transformation:
    """Transforms each layer of the stacked parameters by itself: their first axis is mapped over."""
    mapped = Transformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    return apart(lambda name: name.startswith("layers."), mapped, optimizer)


@cache
def matrix_inputs() -> dict[str, int]:
    """Returns the number of input axes, which follow L, of every parameter that is a matrix in each layer."""
    inputs = dict(PROJECTIONS.values())
    adapters = adapter_names(Lora(rank=1))
    return inputs | {a: inputs[name] for name, (a, _) in adapters.items()} | {b: 1 for _, b in adapters.values()}


def _axes(path: Any, array: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of a layer's matrix that are its inputs, and those that are its outputs."""
    end = 1 + matrix_inputs()[path[-1].key]
    return tuple(range(1, end)), tuple(range(end, array.ndim))


def matrix_axes(params: Any) -> Any:
    """Returns for every parameter which of its axes are a matrix's; the others, L, are mapped over."""
    return jax.tree_util.tree_map_with_path(lambda path, p: contrib.MuonDimensionNumbers(*_axes(path, p)), params)


def is_decayed(name: str) -> bool:
    """Whether a parameter of this name is decayed: all but norms and biases are."""
    return "norm_" not in name and "_bias_" not in name


def decay_weights(weight_decay: float) -> Transformation:
    """Adds weight_decay p to the direction of each parameter p that is neither a norm nor a bias."""

    def decay(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + weight_decay * param if is_decayed(path[-1].key) else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(decay, updates, params))


class MasterWeights(NamedTuple):
    """The state of an optimizer with master weights."""

    master: Any  # the parameters in float32
    inner: Any  # the wrapped optimizer's state


def to_float32(tree: Any) -> Any:
    """Casts every array."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def with_master_weights(optimizer: Transformation) -> Transformation:
    """Wraps an optimizer: it updates float32 master weights; the parameters are the master weights in their own dtype.

    A bfloat16 parameter has 8 bits: an update below 1/512 of the parameter would be lost, every time.
    """

    def init(params: Any) -> MasterWeights:
        return MasterWeights(to_float32(params), optimizer.init(to_float32(params)))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, MasterWeights]:
        updates, inner = optimizer.update(to_float32(gradient), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), master, params)
        return jax.tree.map(jnp.subtract, to_float32(rounded), to_float32(params)), MasterWeights(master, inner)

    return Transformation(init, update)


def with_float32_state(optimizer: Transformation) -> Transformation:
    """Wraps an optimizer, which computes and keeps its state in float32, whatever the parameters' dtype is."""

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(to_float32(gradient), state, to_float32(params))

    return Transformation(lambda params: optimizer.init(to_float32(params)), update)


def check_choice(name: str, options: Mapping[str, Any], changed: Collection[str]) -> None:
    """Refuses an unknown optimizer, options that it does not have, and settings that are another's.

    Args:
      changed: those of SETTINGS that the user has set.

    Raises:
      ValueError: see above.
    """
    parameters = _parameters(factory(name))
    taken = [setting for setting in SETTINGS if setting in parameters]
    known = [option for option in parameters if option not in {*taken, "learning_rate"}]
    dotted.check_options(options, known, "optimizer.options", name)
    if name in DIRECTIONS:
        _check_ranges(name, options)
    for setting in changed:
        if setting.startswith("adam_") and setting not in taken:
            raise ValueError(
                f"optimizer.{setting}: {name} does not take it; "
                + (f"it has optimizer.options: {', '.join(known)}" if known else "leave it out")
            )


def _check_ranges(name: str, options: Mapping[str, Any]) -> None:
    """Refuses numbers with which an optimizer of DIRECTIONS computes nothing sensible."""
    for option, value in options.items():
        is_allowed, expected = RANGES.get(option, (lambda _: True, ""))
        if isinstance(value, int | float) and not isinstance(value, bool) and not is_allowed(value):
            raise ValueError(f"optimizer.options: {option} of {name}: expected {expected}, got {value}")


def factory(name: str) -> Callable[..., Transformation]:
    """Returns the function of DIRECTIONS, or a user's factory of a whole optimizer.

    Raises:
      ValueError: there is none.
    """
    if name in DIRECTIONS:
        return DIRECTIONS[name]
    if name == "optax.contrib.muon":
        raise ValueError(f"optimizer.name: {name} takes stacked layers for no matrices; expected muon")
    if "." not in name:
        raise ValueError(
            f"optimizer.name: expected one of {', '.join(DIRECTIONS)}, or the dotted path of a factory such as "
            f"optax.lamb, got {name!r}"
        )
    function = dotted.import_function(name, "optimizer.name")
    if "learning_rate" not in _parameters(function):
        raise ValueError(f"optimizer.name: {name}: expected a factory f(learning_rate, **options), like those of optax")
    return function


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def make_direction(name: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> Transformation:
    """Returns an optimizer of DIRECTIONS with its options and those of `settings` that it takes."""
    taken = {setting: value for setting, value in settings.items() if setting in _parameters(DIRECTIONS[name])}
    return DIRECTIONS[name](**options, **taken)


def make_custom(
    name: str,
    options: Mapping[str, Any],
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    decay_all: bool,
    moments_dtype: str | None,
) -> Transformation:
    """Returns the optimizer of a user's factory, which is given the settings that it has parameters for.

    Raises:
      ValueError: the factory has no weight decay, or none of the dtypes that were asked for.
    """
    function = factory(name)
    parameters, given = _parameters(function), dict(options)
    if "weight_decay" in parameters:
        given.setdefault("weight_decay", weight_decay)
        if "mask" in parameters and not decay_all:
            given.setdefault("mask", _decay_mask)
    elif weight_decay:
        raise ValueError(f"optimizer.weight_decay: {name} does not take it; leave it out, or set optimizer.options")
    if "mu_dtype" in parameters and moments_dtype is not None:
        given.setdefault("mu_dtype", moments_dtype)
    elif moments_dtype == "bfloat16":
        raise ValueError(f"optimizer.moments_dtype: {name} has no mu_dtype; expected null or float32")
    return function(learning_rate=schedule, **given)


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path[-1].key), params)


def check_runs(make: Callable[[], Transformation], name: str, options: Mapping[str, Any]) -> Transformation:
    """Returns an optimizer that has updated small parameters, as shapes.

    Raises:
      ValueError: it cannot be made or does not update.
    """
    layers = {"attention_norm_LD": (2, 4), "query_LDHE": (2, 4, 2, 2), "down_LFD": (2, 8, 4)}
    shapes = {"embed_VD": (8, 4), "layers": layers, "norm_D": (4,)}
    params = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, "float32"), shapes, is_leaf=_is_shape)
    with contained(f"optimizer.name: {name}"):
        try:
            optimizer = make()
            state = jax.eval_shape(optimizer.init, params)
            updates, after = jax.eval_shape(optimizer.update, params, state, params)
            jax.tree.map(lambda one, other: None, (updates, after), (params, state))  # of one structure
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            if str(error).startswith("optimizer."):
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"optimizer.name: {name}: with the options {dict(options)} it makes no updates of gradients "
                f"({type(error).__name__}: {reason})"
            ) from error
    return optimizer


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
