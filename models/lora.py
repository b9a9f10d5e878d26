"""Low-rank adapters: a frozen projection W is used as W + (alpha / rank) A B, of which A and B alone are trained.

    y = x W + (alpha / rank) (x A) B        Hu et al., https://arxiv.org/abs/2106.09685, section 4.1

A starts uniform in +-1/sqrt(inputs) and B at 0, as PEFT starts them, so a fresh adapter changes nothing: the base with
its first adapters is the base. The axis of the rank has the letter A. Adapters are float32 whatever the base is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# Hugging Face's name of a projection -> ours, and how many of its axes (behind the layers') are inputs
PROJECTIONS: dict[str, tuple[str, int]] = {
    "q_proj": ("query_LDHE", 1),
    "k_proj": ("key_LDKE", 1),
    "v_proj": ("value_LDKE", 1),
    "o_proj": ("output_LHED", 2),
    "gate_proj": ("gate_LDF", 1),
    "up_proj": ("up_LDF", 1),
    "down_proj": ("down_LFD", 1),
}
REWARD_HEAD = "score_D"  # of a reward model: it is new, so it is trained beside the adapters

Parameters = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Which projections have adapters, and of which size."""

    rank: int = 0  # 0: no adapters, all parameters are trained
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank
    targets: tuple[str, ...] = tuple(PROJECTIONS)  # Hugging Face's names

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # of a list, as JSON and YAML have it
        if self.rank < 0:
            raise ValueError(f"lora.rank: expected at least 0 (0: no adapters), got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha: expected a number above 0, got {self.alpha}")
        unknown = set(self.targets) - PROJECTIONS.keys()
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"lora.targets: expected some of {', '.join(PROJECTIONS)}, each once, got {list(self.targets)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdapterNames(NamedTuple):
    """The names of a projection's two adapters: query_lora_a_LDA, query_lora_b_LAHE."""

    a: str
    b: str


@cache
def adapter_names(lora: Lora | None) -> dict[str, AdapterNames]:
    """The adapters of each of our projections that has some."""
    found = {}
    for name, inputs in (PROJECTIONS[target] for target in lora.targets) if lora is not None and lora.rank else ():
        base, _, letters = name.rpartition("_")
        into, out = letters[1 : 1 + inputs], letters[1 + inputs :]
        found[name] = AdapterNames(f"{base}_lora_a_L{into}A", f"{base}_lora_b_LA{out}")
    return found


def add_adapters(layers: nnx.Module, lora: Lora | None, rngs: nnx.Rngs) -> None:
    """Give the stacked layers their adapters, sharded as the projections are; the numbers come from `rngs.lora`."""
    for name, pair in adapter_names(lora).items():
        assert lora is not None
        weight = getattr(layers, name)
        (L, *shape), (_, *axes) = weight[...].shape, weight.get_metadata()["axes"]
        n = dict(PROJECTIONS.values())[name]
        bound = 1 / math.sqrt(math.prod(shape[:n]))
        a = jax.random.uniform(rngs.lora(), (L, *shape[:n], lora.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((L, lora.rank, *shape[n:]), jnp.float32)
        setattr(layers, pair.a, nnx.Param(a, axes=("layers", *axes[:n], "rank")))
        setattr(layers, pair.b, nnx.Param(b, axes=("layers", "rank", *axes[n:])))


def is_adapter(name: str) -> bool:
    return "_lora_a_" in name or "_lora_b_" in name


def split_trainable(params: Parameters) -> tuple[Parameters, Parameters]:
    """(trained, frozen) of nested parameters: adapters and a reward model's head, and the rest.

    Without adapters everything is trained.
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
    """What `split_trainable` took apart."""
    if not frozen:
        return dict(trained)
    return {**frozen, **trained, "layers": {**frozen["layers"], **trained["layers"]}}


def merge_adapters(params: Parameters, lora: Lora) -> Parameters:
    """The parameters of a network without adapters that computes the same; every product is in float32."""
    layers = {name: value for name, value in params["layers"].items() if not is_adapter(name)}
    for name, pair in adapter_names(lora).items():
        layers[name] = _merge(layers[name], params["layers"][pair.a], params["layers"][pair.b], lora.scale)
    return params | {"layers": layers}


@partial(jax.jit, static_argnames="scale")
def _merge(weight_L: jax.Array, a_L: jax.Array, b_L: jax.Array, scale: float) -> jax.Array:
    def one(slices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = slices
        product = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)
        return (weight.astype(jnp.float32) + scale * product.reshape(weight.shape)).astype(weight.dtype)

    return jax.lax.map(one, (weight_L, a_L, b_L))
