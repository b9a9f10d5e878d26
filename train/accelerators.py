"""Which accelerators this machine has; JAX starts no others, although it finds the compilers of `train plan`."""

import importlib.util
from importlib.metadata import entry_points
from pathlib import Path

import jax

GPU_COMPILER, TPU_COMPILER = "jax_plugins.xla_cuda13", "libtpu"  # modules
DEV = Path("/dev")
GPU_FILES = ("nvidia[0-9]*", "nvidiactl", "dxg", "kfd")  # NVIDIA's, Windows' for Linux, AMD's
TPU_FILES = ("accel[0-9]*", "vfio/[0-9]*")


def has_gpu() -> bool:
    """Returns whether this machine shows a GPU to programs."""
    return any(any(DEV.glob(name)) for name in GPU_FILES)


def has_tpu() -> bool:
    """Returns whether this machine shows TPUs to programs."""
    return any(any(DEV.glob(name)) for name in TPU_FILES)


def has_tpu_compiler() -> bool:
    """Returns whether libtpu is installed, which compiles for TPUs and runs them."""
    return importlib.util.find_spec(TPU_COMPILER) is not None


def skip_absent_accelerators() -> None:
    """Makes JAX run on CPUs where compilers for accelerators are installed, but none of these is there.

    JAX would try to start each of them, print why it cannot (a traceback for CUDA), and run on CPUs too. JAX_PLATFORMS,
    plugins of other makers, and any GPU or TPU leave the choice to JAX. Must run before JAX has created its devices.
    """
    plugins = {entry.value for entry in entry_points(group="jax_plugins")}
    if plugins - {GPU_COMPILER} or not (plugins or has_tpu_compiler()):
        return
    platforms: str | None = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platforms is None and not (has_gpu() or has_tpu()):
        jax.config.update("jax_platforms", "cpu")
