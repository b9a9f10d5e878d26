"""The accelerators' own compilers, on a machine that has none of them: JAX's for GPUs, without CUDA, and libtpu.

    pip install -e ".[plan-gpu]"   XLA's compiler for NVIDIA GPUs (jax-cuda13-plugin and jax-cuda13-pjrt)
    pip install -e ".[tpu]"        libtpu

What they compile is kept in the folder `plans` of the `cache_folder`, so that a plan that is made again, or with
another price, compiles nothing.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import threading
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from models.compile_cache import cache_folder
from train.console import print_plain
from train.plan.chips import CHIPS, HOST_GPUS, Chip, gpu_target

# There is nothing to time kernels on.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}
# Without timing, the compiler picks tiles by the sizes, and refuses products whose sizes divide badly.
LIBRARY_PRODUCTS = GPU_OPTIONS | {"xla_gpu_enable_triton_gemm": False}
_NO_TILES = "output tile sizes"
# What is asked of plugins when they are loaded: nothing of CUDA, and not which machine of a cloud this is.
_ENVIRONMENT = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of this machine, which is none: libtpu warns if it is not told
    "TPU_HOST_BOUNDS": "1,1,1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for chips: plans compile beside each other, and beside a run
    "TPU_LOG_DIR": "disabled",  # else each process leaves log files behind
    "TF_CPP_MIN_LOG_LEVEL": "3",  # rematerialisation that does not suffice is said by the plan itself
}
_CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables that change what is compiled
_compiling: dict[str, threading.Lock] = defaultdict(threading.Lock)  # digest of a program -> its lock
_plugin_errors: list[str] = []


class NoCompiler(Exception):
    """A chip's own compiler cannot be had here; the text says why and what to do."""


class Compiled(NamedTuple):
    """What a compiler made of a program, on each device."""

    text: str  # HLO, in the order in which it runs
    temporaries: float  # bytes of temporaries, and of outputs that do not reuse an input's buffer
    note: str  # what was done otherwise than asked; often empty
    seconds: float  # of compiling; 0: it was in the cache
    fits: bool = True  # False: the compiler refused the program, which needs more memory than the device has


@dataclass(frozen=True)
class Compiler:
    """A compiler for some devices of one kind."""

    name: str
    chip: Chip
    devices: Sequence[Any]  # compile-only devices, for a mesh
    version: str

    def places(self, mesh_devices: Sequence[Any]) -> list[tuple[int, tuple[int, ...]]]:
        """Returns each device's host (GPU) or slice (TPU), and its coordinates on a TPU's torus."""
        if self.chip.gpu is not None:
            return [(device.process_index, ()) for device in mesh_devices]
        return [(getattr(device, "slice_index", 0), tuple(device.coords)) for device in mesh_devices]

    def compile(self, lowered: Any) -> Compiled:
        """Compiles a lowered program, or takes it from the cache."""
        file = self._cache_file(lowered)
        with _compiling[file.name]:  # equal programs, such as those of two reward models of one shape: once
            if (kept := _read(file)) is not None:
                return kept
            began = time.perf_counter()
            compiled = self._compile(lowered)._replace(seconds=time.perf_counter() - began)
            _write(file, compiled)
            return compiled

    def _compile(self, lowered: Any) -> Compiled:
        try:
            compiled, note = self._executable(lowered)
        except Exception as error:  # a kind of its own, from the plugin
            if self.chip.gpu is None and (needed := _needed_bytes(str(error))):
                return Compiled("", needed, "", 0.0, fits=False)
            raise NoCompiler(f"{self.name} failed: {_first_line(error)}") from error
        analysis = compiled.memory_analysis()
        temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return Compiled(compiled.as_text(), float(temporaries), note, 0.0)

    def _executable(self, lowered: Any) -> tuple[Any, str]:
        """Returns the compiled program, and what was done otherwise than asked."""
        if self.chip.gpu is None:
            return lowered.compile(), ""
        try:
            return lowered.compile(compiler_options=GPU_OPTIONS), ""
        except Exception as error:
            if _NO_TILES not in str(error):
                raise
        note = "products by the vendor's library: without timing, the compiler found no tiles for one of them"
        return lowered.compile(compiler_options=LIBRARY_PRODUCTS), note

    def _cache_file(self, lowered: Any) -> Path:
        """Returns the file of a program: arithmetic, named scopes, devices, and the compiler's version and options."""
        scopes = sorted(set(re.findall(r'loc\("([^"]+)"\(', lowered.as_text(debug_info=True))))
        parts = [lowered.as_text(), *scopes, self.name, self.version, jax.__version__, repr(self.chip)]
        parts += [f"{place}" for place in self.places(self.devices)]
        parts += [repr((GPU_OPTIONS, LIBRARY_PRODUCTS)), *(os.environ.get(variable, "") for variable in _FLAGS)]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return cache_folder() / "plans" / f"{digest[:40]}.json.gz"


def find_compiler(name: str, count: int) -> Compiler:
    """Returns the compiler for `count` chips of a kind.

    Raises:
      NoCompiler: it is not installed, not of JAX's version, or knows no such devices.
    """
    chip = CHIPS[name]
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # JAX's own cache cannot read back what was compiled for devices that are not there, and `_write` says what is full.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
    return _gpu_compiler(name, chip, count) if chip.gpu is not None else _tpu_compiler(name, chip, count)


def _gpu_compiler(name: str, chip: Chip, count: int) -> Compiler:
    plugin = next((plugin for plugin in _CUDA_PLUGINS if _version(plugin)), None)
    if plugin is None:
        raise NoCompiler(f"JAX's compiler for GPUs is not installed: pip install -e '.[plan-gpu]' ({name})")
    pjrt = plugin.replace("plugin", "pjrt")
    for package in (plugin, pjrt):
        if (version := _version(package)) != jax.__version__:
            found = f"{package} is {version}" if version else f"{package} is not installed"
            raise NoCompiler(f"{found}, and JAX is {jax.__version__}: pip install {package}=={jax.__version__}")
    hosts, each = (count // HOST_GPUS, HOST_GPUS) if count % HOST_GPUS == 0 else (1, count)
    if each > HOST_GPUS:
        raise NoCompiler(f"{count} {name}: expected up to {HOST_GPUS}, or a multiple of it")
    topology = {"target_config": gpu_target(chip), "topology": f"1x{hosts}x{each}"}
    devices = _describe("", "cuda", topology, f"{plugin} cannot describe {count} {name}")
    return Compiler(f"JAX's compiler for {name}", chip, devices, str(_version(plugin)))


def _tpu_compiler(name: str, chip: Chip, count: int) -> Compiler:
    version = _version("libtpu")
    if version is None or importlib.util.find_spec("libtpu") is None:
        raise NoCompiler(f"libtpu is not installed: pip install -e '.[tpu]' ({name})")
    if (wanted := _wanted("libtpu")) and not version.startswith(wanted):
        raise NoCompiler(f"libtpu is {version}, and JAX {jax.__version__} asks for {wanted}.*: pip install 'jax[tpu]'")
    if count > chip.largest_slice:
        raise NoCompiler(f"{count} {name}: a slice has up to {chip.largest_slice}, and JAX makes no mesh of several")
    if (sides := torus(count, chip.torus)) is None:
        raise NoCompiler(f"{count} {name}: expected 1, 2 or a multiple of 4 that makes a torus, such as 4, 8, 16, 64")
    options: dict[str, Any] = {}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device, as in JAX on a v4
    if count < 4:
        options["chips_per_host_bounds"] = (*sides, *[1] * (3 - len(sides)))
    shape = "x".join(map(str, sides))
    devices = _describe(f"{name}:{shape}", "tpu", options, f"libtpu cannot describe {name}:{shape}")
    if len(devices) != count:
        raise NoCompiler(f"libtpu has {len(devices)} devices in {name}:{shape}, not {count}")
    return Compiler(f"the compiler for TPU {name}", chip, devices, version)


def torus(count: int, dimensions: int) -> tuple[int, ...] | None:
    """Returns the sides of the most compact torus of `count` TPUs, hosts of 2 x 2; None if there is none."""
    if count < 4:
        return (count, *[1] * (dimensions - 1)) if count in (1, 2) else None
    best: tuple[int, ...] | None = None
    for x in (n for n in range(2, count + 1, 2) if count % n == 0):
        for y in (n for n in range(x, count // x + 1, 2) if (count // x) % n == 0):
            z = count // (x * y)
            sides = (x, y, z) if dimensions == 3 else (x, y)
            is_torus = z == 1 if dimensions == 2 else z == 1 or z >= y or (x == y == 2)
            if is_torus and (best is None or sum(sides) < sum(best)):
                best = sides
    return best


def _describe(name: str, platform: str, options: dict[str, Any], failure: str) -> Sequence[Any]:
    """Returns the devices of a topology; whatever a plugin raises becomes a NoCompiler."""
    from jax.experimental import topologies

    jax.devices("cpu")  # JAX's own devices first, so that a plugin does not become the default
    try:
        return list(topologies.get_topology_desc(name, platform=platform, **options).devices)
    except Exception as error:
        reason = _plugin_errors[-1] if platform == "cuda" and _plugin_errors else _first_line(error)
        raise NoCompiler(f"{failure} ({reason})") from error


@contextlib.contextmanager
def plugin_errors_kept() -> Iterator[None]:
    """Keeps why JAX could not load a plugin, of which it would print a traceback; `find_compiler` says it."""

    def keep(record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("Jax plugin configuration error"):
            return True
        error = record.exc_info[1] if record.exc_info else None
        _plugin_errors.append(_first_line(error) if error is not None else record.getMessage().split(": ", 1)[-1])
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wanted(package: str) -> str | None:
    """Returns the beginning of the version of a package that JAX asks for."""
    for requirement in importlib.metadata.requires("jax") or ():
        if found := re.match(rf"{package}==([\d.]+?)\.?\*", requirement):
            return found[1]
    return None


def _needed_bytes(message: str) -> float | None:
    """Returns the bytes of a program that a TPU's compiler refuses: "Used 37.20G of 31.25G hbm"."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    return float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]] if found else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _read(file: Path) -> Compiled | None:
    """Returns a kept program; None if there is none that is whole."""
    try:
        kept = file.read_bytes()
    except OSError:  # it is not there, or the folder cannot be one: `_write` says that
        return None
    try:
        return Compiled(**json.loads(gzip.decompress(kept)))._replace(seconds=0.0)
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        print_plain(f"{file}: not a kept program ({_first_line(error)}); compiled again")
        return None


def _write(file: Path, compiled: Compiled) -> None:
    """Keeps a program; a disk that does not take it costs the next plan its time alone."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gzip.compress(json.dumps(compiled._asdict()).encode(), 1))
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _say_not_kept(file.parent, str(error.strerror))


@functools.cache
def _say_not_kept(folder: Path, reason: str) -> None:
    print_plain(f"{folder}: compiled programs are not kept there ({reason})")
