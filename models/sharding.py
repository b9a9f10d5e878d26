"""The mesh, and the one table from logical axes to mesh axes.

Layers name logical axes ("prompt", "heads", "mlp"); this file alone maps them to mesh axes. A new parallelism is an
edit of `RULES`, or an override in the run's config.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "prompt": ("data", "fsdp"),  # a group stays on one device ...
    "group": (),  # ... unless its axis is sharded too
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

GPUS = ("gpu", "cuda")  # JAX's names of the platform; cuda: devices that are only compiled for

ACTIVATION_AXES = ("prompt", "group", "sequence", "width")

Axes = Sequence[str | None]


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules that map logical axes to its axes; hashable, so a jitted function may hold it."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    attention: str = "auto"  # of whole rows, see `models.flash_attention.choose_attention`

    def spec(self, axes: Axes) -> PartitionSpec:
        """Returns the partition of an array with these logical axes (None = not sharded).

        Raises:
          ValueError: an unknown logical axis, or two axes of the array on one mesh axis.
        """
        rules = dict(self.rules)
        taken: dict[str, str] = {}
        parts: list[tuple[str, ...] | None] = []
        for axis in axes:
            if axis is not None and axis not in rules:
                raise ValueError(f"logical axis {axis!r}: expected one of {', '.join(sorted(rules))}")
            mesh_axes = rules[axis] if axis is not None else ()
            for mesh_axis in mesh_axes:
                if mesh_axis in taken:
                    raise ValueError(
                        f"mesh axis {mesh_axis!r}: expected once in an array {tuple(axes)}, got it for "
                        f"{taken[mesh_axis]!r} and for {axis!r}; change one of the two rules"
                    )
                taken[mesh_axis] = str(axis)
            parts.append(mesh_axes or None)
        return PartitionSpec(*parts)

    def sharding(self, axes: Axes) -> NamedSharding:
        """Returns the sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def shard_count(self, axis: str) -> int:
        """Returns the number of devices that a logical axis is split over."""
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in dict(self.rules)[axis])

    def for_sampling(self) -> "Layout":
        """Returns the layout with parameters gathered over the devices that share the prompts.

        Otherwise every token would gather every layer again.
        """
        rules = dict(self.rules)
        prompts = {*rules["prompt"], *rules["group"]}
        gathered = tuple(
            (name, axes if name in ACTIVATION_AXES else tuple(axis for axis in axes if axis not in prompts))
            for name, axes in self.rules
        )
        return replace(self, rules=gathered)

    def put(self, array: Any, axes: Axes) -> jax.Array:
        """Shards a host array, which every process has, over all devices; axes of size 1 are not split."""
        axes = [None if size == 1 else axis for axis, size in zip(axes, np.shape(array), strict=True)]
        if jax.process_count() == 1:
            return jax.device_put(array, self.sharding(axes))
        host_array = np.asarray(array)
        return jax.make_array_from_callback(host_array.shape, self.sharding(axes), host_array.__getitem__)


def total_shards(layout: Layout | None, *axes: str) -> int:
    """Returns the number of devices that these logical axes are split over together, 1 without a layout."""
    return math.prod(layout.shard_count(axis) for axis in axes) if layout is not None else 1


def platform_of(layout: Layout | None) -> str:
    """Returns the kind of the devices: cpu, gpu, cuda (of devices that are only compiled for) or tpu."""
    if layout is None or isinstance(layout.mesh, AbstractMesh):
        return "cpu"
    return str(layout.mesh.devices.flat[0].platform)


def fetch(array: jax.Array) -> np.ndarray:
    """Copies a global array to the host, gathered on every process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def with_sharding(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Returns the same shape and dtype with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def to_host(tree: Any) -> Any:
    """Moves arrays to host memory, each shard to that of its device's host; None stays None.

    Raises:
      ValueError: the backend has no pinned host memory.
    """
    if not all("pinned_host" in {memory.kind for memory in d.addressable_memories()} for d in jax.local_devices()):
        raise ValueError(f"offload: {jax.default_backend()} has no memory of the host that devices can read")
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind("pinned_host")), tree)


def to_device(tree: Any) -> Any:
    """Moves arrays to the memory of their devices; arrays that are there already are not copied."""
    kind = jax.local_devices()[0].default_memory().kind
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding.with_memory_kind(kind)), tree)


def make_layout(
    *,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    rules: Mapping[str, Sequence[str]] | None = None,
    attention: str = "auto",
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """Makes a mesh of data x fsdp x tensor devices with `RULES`, some of them overridden.

    Args:
      data, fsdp, tensor: mesh sizes; at most one of them may be -1, all remaining devices.
      rules: overrides of `RULES`, e.g. {"prompt": ["data"], "group": ["fsdp"]}.
      attention: see `models.flash_attention.choose_attention`.
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
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"mesh: {shape} does not make the {len(devices)} devices there are; one size may be -1")
    table = dict(RULES)
    for axis, mesh_axes in (rules or {}).items():
        if axis not in RULES or not set(mesh_axes) <= set(MESH_AXES):
            raise ValueError(
                f"mesh.rules: {axis!r}: {list(mesh_axes)} is not a rule; expected one of {', '.join(RULES)} "
                f"mapped to a list of {', '.join(MESH_AXES)}"
            )
        table[axis] = tuple(mesh_axes)
    # Auto: the compiler propagates shardings from the constraints; Explicit would put them into types.
    return Layout(_make_mesh(sizes, devices, axis_types=(AxisType.Auto,) * 3), tuple(table.items()), attention)


def _make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device], axis_types: tuple[AxisType, ...]) -> Mesh:
    """Returns the mesh; on TPUs its axes are laid along the sides of their torus, or else along parts of sides."""
    shape = tuple(sizes.values())
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # a size that is no product of whole sides
        pass
    try:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, TypeError, ValueError) as error:
        text = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh: {text} cannot be laid on the torus of these {len(devices)} TPUs; choose sizes that divide its sides"
        ) from error
    return Mesh(placed, MESH_AXES, axis_types=axis_types)


def constrain(layout: Layout | None, array: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation inside jit; a no-op without a layout. Axes of size 1 are not split."""
    if layout is None:
        return array
    split_axes = [None if size == 1 else axis for axis, size in zip(axes, array.shape, strict=True)]
    return jax.lax.with_sharding_constraint(array, layout.sharding(split_axes))


def gather(layout: Layout | None, parameter: jax.Array, dtype: Any, axes: Axes) -> jax.Array:
    """Gathers a parameter over the devices that share the prompts; a no-op on one device.

    The parameter is rounded to the compute dtype before it is sent, and has its own dtype afterwards. Its gradient is
    summed over the devices in that dtype, and each of them keeps its part.
    """
    if layout is None or layout.mesh.size == 1:
        return parameter

    @jax.custom_vjp
    @jax.named_scope("gather")
    def gathered(parameter: jax.Array) -> jax.Array:
        return constrain(layout.for_sampling(), parameter.astype(dtype), *axes).astype(parameter.dtype)

    @jax.named_scope("gather")
    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        return (constrain(layout, gradient, *axes),)

    gathered.defvjp(lambda parameter: (gathered(parameter), None), backward)
    return gathered(parameter)


def parameter_axes(model: nnx.Module) -> dict[str, Any]:
    """Returns the logical axes of every parameter, as a tree like the parameters'."""
    state = nnx.split(model, nnx.Param, ...)[1]
    return nnx.to_pure_dict(
        jax.tree.map(lambda p: p.replace(p.get_metadata()["axes"]), state, is_leaf=lambda x: isinstance(x, nnx.Param))
    )


def parameter_shardings(model: nnx.Module, layout: Layout) -> dict[str, Any]:
    """Returns the sharding of every parameter, as a tree like the parameters'.

    Raises:
      ValueError: a parameter axis that the mesh does not divide.
    """
    shapes = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])

    def sharding(path: Any, axes: Axes, parameter: jax.ShapeDtypeStruct) -> NamedSharding:
        for axis, size in zip(axes, parameter.shape, strict=True):
            if axis is not None and size % layout.shard_count(axis):
                raise ValueError(
                    f"{jax.tree_util.keystr(path)}: the axis {axis!r} of size {size} cannot be split over "
                    f"{layout.shard_count(axis)} devices; choose a mesh that divides it or override its rule"
                )
        return layout.sharding(axes)

    return jax.tree_util.tree_map_with_path(
        sharding, parameter_axes(model), shapes, is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x, dict)
    )
