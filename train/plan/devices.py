"""Memory of the devices that a plan is for, and simulated devices to compile for."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from train.config import PlanConfig
from train.console import console

GIB = 2**30
HBM = {  # bytes of one device's memory, as its maker states them
    **{"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB},
    **{"A100": 80 * GIB, "H100": 80 * GIB, "H200": 141 * 10**9, "B200": 180 * 10**9},
}
TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of the network between chips
USABLE_SHARE = 0.95  # of the memory; runtime and fragmentation take the rest


def plan_devices(config: PlanConfig) -> list[jax.Device]:
    """Returns simulated devices, as many as the plan is for.

    Raises:
      ValueError: no number of devices, or --suggest without a chip.
    """
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    count = config.devices or (math.prod(sizes) if min(sizes) > 0 else 0)
    if count < 1:
        raise ValueError("plan: for how many devices? Give --devices, or a --mesh without -1")
    if config.suggest and config.chip is None:
        raise ValueError(f"--suggest: for which chip? Give --chip, one of {', '.join(HBM)}")
    return simulated_devices(count)


def simulated_devices(count: int) -> list[jax.Device]:
    """Returns `count` CPU devices; must run before JAX has created its devices.

    Raises:
      ValueError: JAX has created fewer.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"plan: JAX made {len(devices)} of {count} devices; take the device count out of XLA_FLAGS")
    return devices[:count]


def tpu_devices(chip: str | None, count: int) -> Sequence[Any] | None:
    """Returns the devices of a topology of `count` TPUs; None for other chips, or where libtpu cannot describe it."""
    if chip not in TPUS or importlib.util.find_spec("libtpu") is None:
        return None
    from jax.experimental import topologies

    sides = [1] * TPUS[chip]
    while math.prod(sides) < count:
        sides[sides.index(min(sides))] *= 2
    shape = "x".join(map(str, sorted(sides)))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud which machine this is
    try:
        if math.prod(sides) != count:
            raise ValueError(f"{count} is not a power of two")
        return topologies.get_topology_desc(f"{chip}:{shape}", platform="tpu").devices
    except Exception as error:  # libtpu raises many kinds; the CPU compiler estimates instead
        console.print(f"libtpu has no {chip}:{shape} ({str(error).splitlines()[0]}): estimated instead")
        return None
