"""Low-rank adapters: adds (alpha / rank) A B to a frozen projection W, and trains A and B alone.

    y = x W + (alpha / rank) (x A) B        Hu et al., https://arxiv.org/abs/2106.09685, section 4.1

A starts uniform in +-1/sqrt(inputs) and B at 0, as in PEFT, so fresh adapters do not change the network. The axis of
the rank has the letter A. Adapters are float32 whatever the dtype of the base.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.precision import products_in

# Hugging Face's name of a projection -> our name, and the number of its input axes (behind L)
PROJECTIONS: dict[str, tuple[str, int]] = {
    "q_proj": ("query_LDHE", 1),
    "k_proj": ("key_LDKE", 1),
    "v_proj": ("value_LDKE", 1),
    "o_proj": ("output_LHED", 2),
    "gate_proj": ("gate_LDF", 1),
    "up_proj": ("up_LDF", 1),
    "down_proj": ("down_LFD", 1),
}
REWARD_HEAD = "score_D"  # a reward model's head starts untrained, so it is trained beside the adapters

Parameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Size, scale and targets of the adapters."""

    rank: int = 0  # of the adapters (A); 0: no adapters, all parameters are trained
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank
    targets: tuple[str, ...] = tuple(PROJECTIONS)  # projections that have adapters, by Hugging Face's names

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON and YAML give a list
        if self.rank < 0:
            raise ValueError(f"lora.rank: expected at least 0 (0: no adapters), got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha: expected a number above 0, got {self.alpha}")
        if self.alpha == math.inf:
            raise ValueError(f"lora.alpha: expected a finite number, got {self.alpha}")
        unknown = set(self.targets) - PROJECTIONS.keys()
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets: expected some of {', '.join(PROJECTIONS)}, each once, got {list(self.targets)}"
            )

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return self.alpha / self.rank


class AdapterNames(NamedTuple):
    """Names of a projection's two adapters, e.g. query_lora_a_LDA and query_lora_b_LAHE."""

    a: str
    b: str


@cache
def adapter_names(lora: Lora | None) -> dict[str, AdapterNames]:
    """Returns the adapters' names by the name of their projection; empty without adapters."""
    names = {}
    for name, inputs in (PROJECTIONS[target] for target in lora.targets) if lora is not None and lora.rank else ():
        base, _, letters = name.rpartition("_")
        in_axes, out_axes = letters[1 : 1 + inputs], letters[1 + inputs :]
        names[name] = AdapterNames(f"{base}_lora_a_L{in_axes}A", f"{base}_lora_b_LA{out_axes}")
    return names


def add_adapters(layers: nnx.Module, lora: Lora | None, rngs: nnx.Rngs) -> None:
    """Adds adapters to the stacked layers, sharded like their projections; random numbers come from `rngs.lora`."""
    for name, adapters in adapter_names(lora).items():
        assert lora is not None
        weight = getattr(layers, name)
        (L, *shape), (_, *axes) = weight[...].shape, weight.get_metadata()["axes"]
        inputs = dict(PROJECTIONS.values())[name]
        bound = 1 / math.sqrt(math.prod(shape[:inputs]))
        a = jax.random.uniform(rngs.lora(), (L, *shape[:inputs], lora.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((L, lora.rank, *shape[inputs:]), jnp.float32)
        setattr(layers, adapters.a, nnx.Param(a, axes=("layers", *axes[:inputs], "rank")))
        setattr(layers, adapters.b, nnx.Param(b, axes=("layers", "rank", *axes[inputs:])))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter."""
    return "_lora_a_" in name or "_lora_b_" in name


def split_trainable(params: Parameters) -> tuple[Parameters, Parameters]:
    """Splits nested parameters into trained ones (adapters, a reward model's head) and frozen ones (the base).

    Without adapters all parameters are trained.
    """
    if not any(map(is_adapter, params["layers"])):
        return params, {}
    layers = params["layers"]
    trained = {"layers": {name: layers[name] for name in layers if is_adapter(name)}}
    frozen: Parameters = {"layers": {name: layers[name] for name in layers if not is_adapter(name)}}
    for name in params.keys() - {"layers"}:
        (trained if name == REWARD_HEAD else frozen)[name] = params[name]
    return trained, frozen


def merge_trainable(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Parameters:
    """Merges trained and frozen parameters: the inverse of `split_trainable`."""
    if not frozen:
        return dict(trained)
    return {**frozen, **trained, "layers": {**frozen["layers"], **trained["layers"]}}


def merge_adapters(params: Parameters, lora: Lora) -> Parameters:
    """Adds the adapters' products to their projections, in float32; the network without adapters computes the same."""
    layers = {name: value for name, value in params["layers"].items() if not is_adapter(name)}
    for name, adapters in adapter_names(lora).items():
        layers[name] = _merge(layers[name], params["layers"][adapters.a], params["layers"][adapters.b], lora.scale)
    return params | {"layers": layers}


@partial(jax.jit, static_argnames="scale")
def _merge(weight_L: jax.Array, a_L: jax.Array, b_L: jax.Array, scale: float) -> jax.Array:
    def merge_layer(slices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = slices
        with products_in(jnp.float32):
            product = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
        return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)

    return jax.lax.map(merge_layer, (weight_L, a_L, b_L))
