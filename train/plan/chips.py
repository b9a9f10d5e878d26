"""Facts of the accelerators that a plan can be for, as their makers state them."""

from typing import NamedTuple

from models.flops import PEAK_FLOPS

GIB = 2**30
USABLE_SHARE = 0.95  # of a device's memory; runtime and fragmentation take the rest


class GpuTarget(NamedTuple):
    """What XLA's compiler for GPUs asks of one: facts that it writes down of each in its own target specifications."""

    name: str
    compute_capability: int
    cores: int  # streaming multiprocessors
    fpus: int  # of a core
    clock: float  # GHz
    shared_memory: int  # bytes of a core
    shared_memory_per_block: int  # bytes that one block may opt in to
    l2_cache: int  # bytes


class Chip(NamedTuple):
    """One device; speeds are upper bounds."""

    memory: int  # bytes
    flops: float  # of dense bfloat16 products, per second
    bandwidth: float  # bytes of memory per second
    # bytes per second that one device sends: over NVLink to the GPUs of its host; both ways along one axis of a TPU
    # slice's torus together, e.g. v5p: 1,200 GB/s sent and received, over 3 axes
    link: float
    network: float  # bytes per second that one device sends to other hosts (GPU) or slices (TPU)
    gpu: GpuTarget | None = None
    clock: float = 0.0  # of a TPU, Hz: its compiler states cycles
    torus: int = 0  # dimensions of the network between the TPUs of a slice
    largest_slice: int = 0  # TPUs


HOST_GPUS = 8  # of one host, which NVLink joins
_HOPPER = GpuTarget("", 9, 132, 128, 1.98, 233472, 232448, 52428800)
_AMPERE = GpuTarget("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 167936, 166912, 41943040)
_BLACKWELL = GpuTarget("NVIDIA B200", 10, 148, 128, 1.965, 233472, 232448, 132644864)

# GPUs: openxla's target specifications; NVLink and network cards of the DGX of that generation (NVIDIA's data sheets).
# TPUs: Google Cloud's system architecture pages; the clock is peak / (2 * multipliers), e.g. 459e12 / (2 * 8 * 128**2).
CHIPS = {
    "v4": Chip(32 * GIB, PEAK_FLOPS["TPU v4"], 1.228e12, 100e9, 6.25e9, None, 1.05e9, 3, 4096),
    "v5e": Chip(16 * GIB, PEAK_FLOPS["TPU v5e"], 0.819e12, 100e9, 3.125e9, None, 1.5e9, 2, 256),
    "v5p": Chip(95 * GIB, PEAK_FLOPS["TPU v5"], 2.765e12, 200e9, 6.25e9, None, 1.75e9, 3, 8960),
    "v6e": Chip(32 * GIB, PEAK_FLOPS["TPU v6"], 1.638e12, 200e9, 12.5e9, None, 1.75e9, 2, 256),
    "A100": Chip(85_100_068_864, PEAK_FLOPS["A100"], 2.03904e12, 300e9, 25e9, _AMPERE),
    "H100": Chip(
        84_942_979_072, PEAK_FLOPS["H100"], 3.35232e12, 450e9, 50e9, _HOPPER._replace(name="NVIDIA H100 80GB HBM3")
    ),
    "H200": Chip(
        151_397_597_184, PEAK_FLOPS["H200"], 4.8e12, 450e9, 50e9, _HOPPER._replace(name="NVIDIA H200 141GB HBM3e")
    ),
    "B200": Chip(191_514_411_008, PEAK_FLOPS["B200"], 7.67232e12, 900e9, 50e9, _BLACKWELL),
}

_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.memory}
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  cuda_compute_capability {{ major: {gpu.compute_capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def gpu_target(chip: Chip) -> str:
    """Returns the target specification of a GPU, as XLA's compiler reads it (a GpuTargetConfigProto in text)."""
    return _TARGET.format(chip=chip, gpu=chip.gpu)


_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"}
_TPU_KINDS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e"}


def chip_of(device_kind: str) -> str | None:
    """Returns the name in CHIPS of JAX's `device_kind`, such as "NVIDIA H200" or "TPU v5 lite"; None for others."""
    named = (name for name, chip in CHIPS.items() if chip.gpu is not None and name in device_kind)
    return _TPU_KINDS.get(device_kind) or next(named, None)
