"""The mesh, and THE table from what an axis means to where it lives.

Layers name meanings ("prompt", "heads", "mlp"); this file alone says which mesh axis carries which. A new
parallelism is an edit of `RULES`, or an override in the run's config.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "prompt": ("data", "fsdp"),  # a whole group stays together ...
    "group": (),  # ... unless the group axis is sharded too
    "sequence": (),
    "width": (),
    # parameters (and the heads, mlp and vocab axes of activations)
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "rank": (),  # of adapters
}

ACTIVATION_AXES = ("prompt", "group", "sequence", "width")

Axes = Sequence[str | None]


@dataclass(frozen=True)
class Layout:
    """A mesh with the rules that map logical axes onto it; hashable, so a jitted function may hold it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(self, axes: Axes) -> PartitionSpec:
        """The partition of an array whose axes have these meanings (None = not sharded).

        Raises:
          ValueError: an unknown meaning, or two axes of the array on one mesh axis.
        """
        rules = dict(self.rules)
        taken: dict[str, str] = {}
        parts: list[tuple[str, ...] | None] = []
        for meaning in axes:
            if meaning is not None and meaning not in rules:
                raise ValueError(f"logical axis {meaning!r}: expected one of {', '.join(sorted(rules))}")
            mesh_axes = rules[meaning] if meaning is not None else ()
            for mesh_axis in mesh_axes:
                if mesh_axis in taken:
                    raise ValueError(
                        f"mesh axis {mesh_axis!r} is asked for twice by an array {tuple(axes)}: "
                        f"by {taken[mesh_axis]!r} and by {meaning!r}; change one of the two rules"
                    )
                taken[mesh_axis] = str(meaning)
            parts.append(mesh_axes or None)
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes))

    def shard_count(self, meaning: str) -> int:
        """Over how many devices an axis of this meaning is split."""
        size = 1
        for mesh_axis in dict(self.rules)[meaning]:
            size *= self.mesh.shape[mesh_axis]
        return size

    def for_sampling(self) -> "Layout":
        """These rules with parameters whole over the devices that share the prompts.

        A token's layers would otherwise be gathered for it alone: for T tokens, T times over.
        """
        rules = dict(self.rules)
        prompts = {*rules["prompt"], *rules["group"]}
        return Layout(
            self.mesh,
            tuple(
                (name, axes if name in ACTIVATION_AXES else tuple(axis for axis in axes if axis not in prompts))
                for name, axes in self.rules
            ),
        )

    def put(self, array: Any, axes: Axes) -> jax.Array:
        """A host array as a global array with that sharding; every process has it and puts what its devices hold.

        Axes of size 1 stay whole.
        """
        axes = [None if size == 1 else meaning for meaning, size in zip(axes, np.shape(array), strict=True)]
        if jax.process_count() == 1:
            return jax.device_put(array, self.sharding(axes))
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, self.sharding(axes), whole.__getitem__)


def total_shards(layout: Layout | None, *meanings: str) -> int:
    """Over how many devices axes of these meanings are split together; without a layout there is one."""
    return math.prod(layout.shard_count(meaning) for meaning in meanings) if layout is not None else 1


def fetch(array: jax.Array) -> np.ndarray:
    """A global array as a host array, whole on every process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """A shape with the place where such an array would be."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def to_host(tree: Any) -> Any:
    """Arrays in the memory of the host, each shard in that of its device's; None stays None.

    Raises:
      ValueError: the backend has no such memory.
    """
    if not all("pinned_host" in {memory.kind for memory in d.addressable_memories()} for d in jax.local_devices()):
        raise ValueError(f"offload: {jax.default_backend()} has no memory of the host that devices can read")
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind("pinned_host")), tree)


def to_device(tree: Any) -> Any:
    """The same arrays in the memory of their devices; those that are there already are not copied."""
    kind = jax.local_devices()[0].default_memory().kind
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind(kind)), tree)


def make_layout(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    rules: Mapping[str, Sequence[str]] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """A mesh of data x fsdp x tensor devices with `RULES`, some of them overridden.

    Args:
      data, fsdp, tensor: mesh sizes; at most one of them may be -1, "all devices that are left".
      rules: overrides of `RULES`, e.g. {"prompt": ["data"], "group": ["fsdp"]}.
      devices: the devices to use; None = all.

    Raises:
      ValueError: sizes that do not multiply to the number of devices, or rules that name unknown axes.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = 1
    for size in sizes.values():
        fixed *= size if size != -1 else 1
    if len(free) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
        fixed = len(devices)
    if len(free) > 1 or fixed != len(devices) or min(sizes.values()) < 1:
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"mesh: {asked} does not make the {len(devices)} devices there are; one size may be -1")
    table = dict(RULES)
    for meaning, mesh_axes in (rules or {}).items():
        if meaning not in RULES or not set(mesh_axes) <= set(MESH_AXES):
            raise ValueError(
                f"mesh.rules: {meaning!r}: {list(mesh_axes)} is not a rule; expected one of {', '.join(RULES)} "
                f"onto a list of {', '.join(MESH_AXES)}"
            )
        table[meaning] = tuple(mesh_axes)
    # Auto: the compiler propagates shardings from the constraints; Explicit would put them into types.
    mesh = jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Layout(mesh, tuple(table.items()))


def constrain(layout: Layout | None, array: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the sharding of an activation inside jit; a no-op without a layout. Axes of size 1 stay whole."""
    if layout is None:
        return array
    kept = [None if size == 1 else meaning for meaning, size in zip(axes, array.shape, strict=True)]
    return jax.lax.with_sharding_constraint(array, layout.sharding(kept))


def parameter_axes(model: nnx.Module) -> dict[str, Any]:
    """The meanings of every parameter's axes, as a tree like the parameters'."""
    state = nnx.split(model, nnx.Param, ...)[1]
    return nnx.to_pure_dict(
        jax.tree.map(lambda p: p.replace(p.get_metadata()["axes"]), state, is_leaf=lambda x: isinstance(x, nnx.Param))
    )


def parameter_shardings(model: nnx.Module, layout: Layout) -> dict[str, Any]:
    """The sharding of every parameter, as a tree like the parameters'.

    Raises:
      ValueError: a parameter axis that the mesh does not divide.
    """
    shapes = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])

    def one(path: Any, axes: Axes, parameter: jax.ShapeDtypeStruct) -> NamedSharding:
        for meaning, size in zip(axes, parameter.shape, strict=True):
            if meaning is not None and size % layout.shard_count(meaning):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: the axis {meaning!r} of size {size} cannot be split over "
                    f"{layout.shard_count(meaning)} devices; choose a mesh that divides it or override its rule"
                )
        return layout.sharding(axes)

    return jax.tree_util.tree_map_with_path(
        one, parameter_axes(model), shapes, is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x, dict)
    )
