"""How many devices a plan is for, and simulated ones to compile for."""

import math

import jax

from train.config import PlanConfig


def device_count(config: PlanConfig, chip: str | None = None) -> int:
    """Returns the number of devices that the plan is for, of one kind of chip.

    Raises:
      ValueError: neither the config nor its mesh says how many.
    """
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    counts = config.counts
    count = counts.get(chip) if chip is not None else next(iter(counts.values()), None)
    count = count or (math.prod(sizes) if min(sizes) > 0 else 0)
    if count < 1 and counts:
        raise ValueError(f"--devices: how many {chip}? It says {config.devices}; name each chip, or none, or a --mesh")
    if count < 1:
        raise ValueError("plan: for how many devices? Give --devices, or a --mesh without -1")
    return count


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
