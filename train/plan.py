"""`python -m train plan`: what a run would need of its devices, without any of them and without weights.

The programs of the loop (copy, sample, score, gradient, optimizer step) are compiled ahead of time for as many devices
as are asked for, from shapes alone, for the longest case: every prompt and completion as long as they may be.
Arithmetic and communication are read from the compiled programs (`train.hlo`). Memory is what the compiler says: for a
TPU the TPU's own, through libtpu where it is installed, else the one for CPUs. That one widens bfloat16 to float32, so
it compiles the run in float32, and what is temporary is counted by the compute dtype's size: an estimate, too low by
what stays float32 (scores, logits), and called so.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from models import checkpoint
from models.attention import CHUNK
from models.config import Qwen3Config, read_config
from models.generate import SamplingCopy, sampling_program
from models.hf_weights import abstract_model, abstract_params, split
from models.lora import separate
from models.published import PUBLISHED
from models.sampler import SamplingParams
from models.sharding import Layout, placed
from models.weight_files import find_directory
from train import state as training
from train.config import MeshConfig, PlanConfig
from train.hlo import Trips, work
from train.loop import make_update
from train.metrics import console, setup_errors, write_whole
from train.packing import abstract_microbatch
from train.rewards import SCORED_AXES, scoring_program
from train.state import TrainState

GIB = 2**30
HBM = {  # bytes of one device, as its maker states them
    **{"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB},
    **{"A100": 80 * GIB, "H100": 80 * GIB, "H200": 141 * 10**9, "B200": 180 * 10**9},
}
TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of their networks
FULL = 0.95  # of the memory; the rest is the runtime's and fragmentation's
ALWAYS = ("parameters", "base of adapters", "reference", "optimizer", "reward models")


class Program(NamedTuple):
    """One compiled part of a step."""

    name: str
    calls: int  # in a step
    jitted: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    beside: tuple[str, ...] = ()  # which arrays that are not always there are, while it runs
    trips: Trips = lambda depth, index: math.nan


class Cost(NamedTuple):
    """Of one call, on each device."""

    temporaries: float  # bytes, with those outputs that do not take an input's place
    estimate: float  # the same by the compiler for CPUs
    flops: float
    sent: dict[tuple[str, str], float]  # bytes by kind and mesh axes
    seconds: float  # that compiling took


def held(arrays: Mapping[str, float], beside: Sequence[str]) -> float:
    """Bytes of what is always there, and of what stands beside it."""
    return sum(arrays.get(name, 0.0) for name in {*ALWAYS, *beside})


class Plan(NamedTuple):
    mesh: dict[str, int]
    arrays: dict[str, float]  # bytes on each device
    programs: list[Program]
    costs: list[Cost]
    compiler: str

    def memory(self, program: Program, cost: Cost) -> float:
        """Bytes on each device while it runs."""
        return held(self.arrays, program.beside) + cost.temporaries

    @property
    def peak(self) -> float:
        return max(map(self.memory, self.programs, self.costs))

    def fits(self, chip: str) -> bool:
        return self.peak <= FULL * HBM[chip]


def plan(config: PlanConfig) -> None:
    """Print the plan of a run of `train policy`.

    Raises:
      SetupError: a mesh that does not divide devices, batch or weights; a model whose shape cannot be found.
    """
    with setup_errors():
        devices = simulate(config)
        network = network_config(config.model.path) if config.model.path else config.model.architecture
        assert network is not None  # ModelConfig has checked it
        rewards = [network_config(spec.model) for spec in config.rewards if spec.model]
        meshes = suggestions(config, devices, network, rewards) if config.suggest else iter([config.mesh])
    for mesh in meshes:
        with setup_errors():
            found = make_plan(dataclasses.replace(config, mesh=mesh), devices, network, rewards)
        show(config, found, network, rewards)
        if config.out is not None:
            write_whole(Path(config.out), json.dumps(as_json(config, found), indent=2) + "\n")
        if not config.suggest or found.fits(str(config.chip)):
            return
    console.print(
        f"no mesh of {devices} devices fits {config.chip}: take more of them, a smaller microbatch_prompts or "
        f"prompts_per_step, model.param_dtype bfloat16, or lora.rank"
    )


def simulate(config: PlanConfig) -> list[jax.Device]:
    """As many CPU devices as the plan is for, to stand for them."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    count = config.devices or (math.prod(sizes) if min(sizes) > 0 else 0)
    if count < 1:
        raise ValueError("plan: for how many devices? Give --devices, or a --mesh without -1")
    if config.suggest and config.chip is None:
        raise ValueError(f"--suggest: for which chip? Give --chip, one of {', '.join(HBM)}")
    return simulated(count)


def simulated(count: int) -> list[jax.Device]:
    """So many CPU devices; before JAX has made others."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise ValueError(f"plan: JAX made {len(devices)} of {count} devices; take the device count out of XLA_FLAGS")
    return devices[:count]


def network_config(path: str) -> Qwen3Config:
    """The shape of a model: of a run, of a directory, of a published name, or of what the Hub has."""
    if checkpoint.is_run(path):
        return Qwen3Config.from_hf(checkpoint.about(path)["model"], source=path)
    return PUBLISHED[path] if path in PUBLISHED and not Path(path).is_dir() else read_config(find_directory(path))


def suggestions(
    config: PlanConfig, devices: Sequence[jax.Device], network: Qwen3Config, rewards: Sequence[Qwen3Config]
) -> Iterator[MeshConfig]:
    """Meshes that may fit, the one with the least communication first: whole parameters before parameters cut over
    fsdp, and those before heads cut over tensor."""
    powers = [2**n for n in range(len(devices).bit_length())]
    for tensor in (n for n in powers if network.num_key_value_heads % n == 0):
        for fsdp in (n for n in powers if len(devices) % (n * tensor) == 0):
            mesh = dataclasses.replace(config.mesh, data=len(devices) // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
            chosen = dataclasses.replace(config, mesh=mesh)
            try:
                arrays, _ = describe(chosen, training.policy_layout(chosen, devices), network, rewards)
            except ValueError:
                continue  # something does not divide
            if held(arrays, ["gradient"]) < FULL * HBM[str(config.chip)]:
                yield mesh


def make_plan(
    config: PlanConfig, devices: Sequence[jax.Device], network: Qwen3Config, rewards: Sequence[Qwen3Config]
) -> Plan:
    """Compile everything: for CPUs in float32, and for the TPU itself where that is possible."""
    layout = training.policy_layout(config, devices)
    arrays, programs = describe(config, layout, network, rewards)
    float32 = dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    no_master = dataclasses.replace(config.optimizer, master_weights=False)
    twin = dataclasses.replace(config, model=float32, optimizer=no_master)
    size = jnp.dtype(config.model.dtype).itemsize / 4
    # a copy that changes the dtype alone is none in float32
    costs = {"copy": Cost(arrays.get("sampling copy", 0.0), arrays.get("sampling copy", 0.0), 0.0, {}, 0.0)}
    for program in describe(twin, layout, network, rewards)[1]:
        costs[program.name] = measure(program, layout, size)
    compiler = "the compiler for CPUs (an estimate)"
    if (topology := tpu_devices(config.chip, len(devices))) is not None:
        compiler = f"the compiler for TPU {config.chip}"
        for program in describe(config, training.policy_layout(config, topology), network, rewards)[1]:
            began, cost = time.perf_counter(), costs[program.name]
            needed = temporaries(program.jitted.lower(*program.arguments, **program.options).compile())
            seconds = cost.seconds + time.perf_counter() - began
            costs[program.name] = cost._replace(temporaries=needed, seconds=seconds)
    return Plan(dict(layout.mesh.shape), arrays, programs, [costs[program.name] for program in programs], compiler)


def tpu_devices(chip: str | None, count: int) -> Sequence[Any] | None:
    """A topology of so many TPUs, None where there is none to be had."""
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
    except Exception as error:  # whatever libtpu says: there is the other compiler
        console.print(f"libtpu has no {chip}:{shape} ({str(error).splitlines()[0]}): estimated instead")
        return None


Parts = tuple[dict[str, float], list[Program]]  # arrays, as bytes on each device, and programs


def describe(config: PlanConfig, layout: Layout, network: Qwen3Config, rewards: Sequence[Qwen3Config]) -> Parts:
    """The arrays of a run and its programs; all of them shapes alone."""
    dtypes = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    model = abstract_model(network, lora=config.lora, remat=config.model.remat, layout=layout, **dtypes)
    (graphdef, _), params = split(model), abstract_params(model, layout)
    arrays, programs = updating(config, layout, graphdef, params)
    for more_arrays, more_programs in (scoring(config, layout, rewards), sampling(config, layout, graphdef, params)):
        arrays, programs = more_arrays | arrays, more_programs + programs
    P, G, S, T = sizes(config)
    size = jnp.dtype(config.model.dtype).itemsize
    return arrays | {"cache of keys and values": cache_bytes(network, P, G, S, T, layout, size)}, programs


def sizes(config: PlanConfig) -> tuple[int, int, int, int]:
    """P, G, S, T."""
    lengths = (config.max_prompt_length, config.max_completion_length)
    return config.prompts_per_step, config.num_generations, *lengths


def sampling(config: PlanConfig, layout: Layout, graphdef: Any, params: Any) -> Parts:
    P, G, S, T = sizes(config)
    programs: list[Program] = []
    arrays: dict[str, float] = {}
    during: tuple[str, ...] = ()
    copy = SamplingCopy(graphdef, params, layout) if config.mesh.sampling_copy else None
    if copy is not None and any(copy.copied):
        programs.append(Program("copy", 1, copy.program, (copy.part(params),), {}))
        arrays, during = {"sampling copy": on_device(copy.part(copy.wanted))}, ("sampling copy",)
        params = copy.wanted
    prompts = [shape(layout, (P, S), jnp.int32, ("prompt", None)), *[shape(layout, (P,), jnp.int32, ("prompt",))] * 2]
    settings = SamplingParams(config.temperature, config.top_k, config.top_p, config.min_tokens, np.zeros(2, np.int32))
    arguments = (params, *prompts, jax.eval_shape(lambda: jax.random.key(0)), settings)
    jitted = sampling_program(graphdef, T, 0)
    programs.append(Program("sample", 1, jitted, arguments, {"num_generations": G}, during, sampling_trips(T)))
    return arrays, programs


def scoring(config: PlanConfig, layout: Layout, rewards: Sequence[Qwen3Config]) -> Parts:
    P, G, S, T = sizes(config)
    arrays: dict[str, float] = {"reward models": 0.0}
    programs = []
    for spec, network in zip((spec for spec in config.rewards if spec.model), rewards, strict=True):
        scorer = abstract_model(network, dtype=config.model.dtype, param_dtype=config.model.dtype, layout=layout)
        params, n = abstract_params(scorer, layout), spec.batch_prompts
        shapes = ((n, S), (n,), (n, G, T), (n, G))
        texts = [shape(layout, dims, jnp.int32, axes) for dims, axes in zip(shapes, SCORED_AXES, strict=True)]
        place = f"offloaded {spec.label}" if spec.offload else "reward models"
        arrays[place] = arrays.get(place, 0.0) + on_device(params)
        jitted, during = scoring_program(split(scorer)[0]), (place,) if spec.offload else ()
        programs.append(Program(f"score {spec.label}", -(-P // n), jitted, (params, *texts), {}, during))
    return arrays, programs


def updating(config: PlanConfig, layout: Layout, graphdef: Any, params: Any) -> Parts:
    P, G, S, T = sizes(config)
    optimizer, _ = training.make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
    trained, frozen = separate(params)
    opt_state = training.abstract_opt_state(trained, optimizer, layout)
    scalar: Any = shape(layout, (), jnp.int32, ())
    state = TrainState(trained, frozen, opt_state, scalar)
    reference = trained if config.loss.beta else None
    update = make_update(graphdef, optimizer, config, layout, state).programs
    gradient = jax.tree.map(
        lambda leaf, like: placed(leaf, like.sharding), jax.eval_shape(update.nothing, trained), trained
    )
    micro = abstract_microbatch(config.microbatch_prompts, S, G, T, layout)
    denominator = shape(layout, (), jnp.float32, ())
    parts = P // config.microbatch_prompts
    place = "offloaded reference" if config.loss.offload_reference else "reference"
    arrays = {
        "parameters": on_device(trained),
        "base of adapters": on_device(frozen),
        "optimizer": on_device(opt_state),
        "gradient": on_device(gradient),
        place: on_device(reference),
    }
    programs = [Program("optimizer", config.updates_per_step, update.apply, (state, gradient), {}, ("gradient",))]
    beside: tuple[str, ...] = ("gradient", place)
    if config.logprobs_before_update:  # then the update reads them, and no reference policy
        policies = 2 if reference else 1
        programs.append(Program("logprobs", policies * parts, update.logprobs, (params, micro), {}, (place,)))
        known = ("old_PGT", "ref_PGT")[:policies]
        micro, reference, beside = micro | dict.fromkeys(known, micro["sampled_PGT"]), None, ("gradient",)
    arguments = (gradient, state, reference, micro, denominator)
    programs.append(Program("gradient", config.num_iterations * parts, update.add, arguments, {}, beside))
    return arrays, programs


def shape(layout: Layout, dims: tuple[int, ...], dtype: Any, axes: Sequence[str | None]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=layout.sharding(axes))


def on_device(tree: Any) -> float:
    """Bytes of a tree of sharded arrays on each device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def cache_bytes(network: Qwen3Config, P: int, G: int, S: int, T: int, layout: Layout, size: int) -> float:
    """Keys and values of prompts and completions on each device; part of what is temporary while sampling."""
    prompts, heads = P / layout.ways("prompt"), network.num_key_value_heads / layout.ways("kv_heads")
    positions = prompts * (S + G / layout.ways("group") * T)
    return 2 * positions * network.num_hidden_layers * heads * network.head_dim * size


def sampling_trips(T: int) -> Trips:
    """T tokens, all with every completion going on; each reads the chunks of its cache that are filled by then."""
    return lambda depth, index: (T if index == 0 else 0) if depth == 0 else (T / min(CHUNK, T) + 1) / 2


def measure(program: Program, layout: Layout, size: float) -> Cost:
    """Compiled for CPUs, quickly rather than well; bytes are counted `size` times."""
    began = time.perf_counter()
    lowered = program.jitted.lower(*program.arguments, **program.options)
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    done = work(compiled.as_text(), program.trips)
    sent = {key: size * count for key, count in done.by_axis(dict(layout.mesh.shape)).items()}
    needed = size * temporaries(compiled)
    return Cost(needed, needed, done.flops, sent, time.perf_counter() - began)


def temporaries(compiled: Any) -> float:
    analysis = compiled.memory_analysis()
    return float(analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)


def show(config: PlanConfig, found: Plan, network: Qwen3Config, rewards: Sequence[Qwen3Config]) -> None:
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    sizes = ", ".join(f"{n / 1e9:.2f} G" for n in map(parameter_count, (network, *rewards)))
    console.print(
        f"\n{math.prod(found.mesh.values())} devices, {mesh}: {config.prompts_per_step} prompts x "
        f"{config.num_generations}, prompts to {config.max_prompt_length} and completions to "
        f"{config.max_completion_length} tokens, micro-batches of {config.microbatch_prompts} prompts; parameters of "
        f"policy and reward models: {sizes}; {config.model.dtype}, parameters {config.model.param_dtype}"
    )
    table = Table("arrays on each device", "GiB", box=None)
    for name, size in found.arrays.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    table = Table("program", "calls", "temporary GiB", "memory GiB", "TFLOP", "compiled in s", box=None)
    sent = Table("sent by each device", "over", "GB", box=None)
    for program, cost in zip(found.programs, found.costs, strict=True):
        numbers = (cost.temporaries / GIB, found.memory(program, cost) / GIB, program.calls * cost.flops / 1e12)
        table.add_row(program.name, str(program.calls), *(f"{n:,.2f}" for n in numbers), f"{cost.seconds:.0f}")
        for (kind, axes), count in sorted(cost.sent.items(), key=lambda item: -item[1]):
            sent.add_row(f"{program.name}: {kind}", axes, f"{program.calls * count / 1e9:,.3f}")
    console.print("\nof a step, on each device", table, "", sent, "", sep="\n")
    console.print(f"largest: {found.peak / GIB:.1f} GiB on each device, temporaries by {found.compiler}")
    for chip in [config.chip] if config.chip else HBM:
        verdict = "fits" if found.fits(chip) else "does NOT fit"
        console.print(f"  {chip}: {verdict}, {100 * found.peak / HBM[chip]:.0f} % of {HBM[chip] / GIB:.0f} GiB")


@functools.cache
def parameter_count(network: Qwen3Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(split(abstract_model(network))[1]))


def as_json(config: PlanConfig, found: Plan) -> dict[str, Any]:
    """All figures, per device; of programs for all their calls in a step."""
    return {
        "mesh": found.mesh,
        "chip": config.chip,
        "compiler": found.compiler,
        "peak_bytes": found.peak,
        "arrays": found.arrays,
        "programs": {
            program.name: {
                "calls": program.calls,
                "temporary_bytes": cost.temporaries,
                "estimated_temporary_bytes": cost.estimate,
                "memory_bytes": found.memory(program, cost),
                "flops": program.calls * cost.flops,
                "sent_bytes": {f"{kind}, {axes}": program.calls * n for (kind, axes), n in cost.sent.items()},
            }
            for program, cost in zip(found.programs, found.costs, strict=True)
        },
    }
