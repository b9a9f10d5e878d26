"""`python -m train plan`: the memory, arithmetic and communication of a run, without its devices and its weights.

The programs of the loop (copy, sample, score, gradient, optimizer step; `train.plan.programs`) are compiled ahead of
time, from shapes alone, for the requested number of devices (`train.plan.devices`) and the longest case: every prompt
and completion has its greatest length. Arithmetic and communication are read from the compiled programs
(`train.plan.hlo`). Memory is the compiler's figure: for a TPU its own compiler's, through libtpu where it is installed,
otherwise the CPU compiler's. The latter widens bfloat16 to float32, so it compiles the run in float32, and temporaries
are scaled by the size of the compute dtype. That is an estimate, too low by what stays float32 (scores, logits), and
the output calls it one.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.table import Table

from models.config import Qwen3Config
from train.build import policy_layout
from train.config import MeshConfig, PlanConfig
from train.console import console
from train.plan.devices import GIB, HBM, USABLE_SHARE, plan_devices, tpu_devices
from train.plan.programs import (
    Cost,
    StepProgram,
    compiled_cost,
    network_config,
    parameter_count,
    resident_bytes,
    step_parts,
    temporary_bytes,
)
from train.run.files import check_out, write_whole
from train.running import setup_errors


class Plan(NamedTuple):
    """What a run needs on one mesh."""

    mesh: dict[str, int]  # axis -> devices
    arrays: dict[str, float]  # name -> bytes on each device
    programs: list[StepProgram]
    costs: list[Cost]  # one per program
    compiler: str  # whose temporaries `costs` has

    def memory(self, program: StepProgram, cost: Cost) -> float:
        """Returns the bytes on each device while a program runs."""
        return resident_bytes(self.arrays, program.beside) + cost.temporaries

    @property
    def peak(self) -> float:
        """The most bytes on each device, over all programs."""
        return max(map(self.memory, self.programs, self.costs))

    def fits(self, chip: str) -> bool:
        return self.peak <= USABLE_SHARE * HBM[chip]


def plan(config: PlanConfig) -> None:
    """Prints the plan of a run of `train policy`.

    Raises:
      SetupError: a mesh that does not divide devices, batch or weights; a model whose shape cannot be found.
    """
    with setup_errors():
        if config.out is not None:
            check_out(config.out)
        devices = plan_devices(config)
        network = network_config(config.model.path) if config.model.path else config.model.architecture
        assert network is not None  # ModelConfig has checked it
        rewards = [network_config(spec.model) for spec in config.rewards if spec.model]
        meshes = candidate_meshes(config, devices, network, rewards) if config.suggest else iter([config.mesh])
    for mesh in meshes:
        with setup_errors():
            run_plan = make_plan(dataclasses.replace(config, mesh=mesh), devices, network, rewards)
        print_plan(config, run_plan, network, rewards)
        if config.out is not None:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(config.out), json.dumps(plan_json(config, run_plan), indent=2) + "\n")
        if not config.suggest or run_plan.fits(str(config.chip)):
            return
    console.print(
        f"no mesh of {devices} devices fits {config.chip}: take more of them, a smaller microbatch_prompts or "
        f"prompts_per_step, model.param_dtype bfloat16, or lora.rank"
    )


def candidate_meshes(
    config: PlanConfig, devices: Sequence[jax.Device], network: Qwen3Config, rewards: Sequence[Qwen3Config]
) -> Iterator[MeshConfig]:
    """Yields meshes whose arrays fit the chip, those with less communication first.

    Parameters that are not sharded come before parameters sharded over fsdp, and these before heads over tensor.
    """
    powers = [2**n for n in range(len(devices).bit_length())]
    for tensor in (n for n in powers if network.num_key_value_heads % n == 0):
        for fsdp in (n for n in powers if len(devices) % (n * tensor) == 0):
            mesh = dataclasses.replace(config.mesh, data=len(devices) // (fsdp * tensor), fsdp=fsdp, tensor=tensor)
            candidate = dataclasses.replace(config, mesh=mesh)
            try:
                arrays, _ = step_parts(candidate, policy_layout(candidate, devices), network, rewards)
            except ValueError:
                continue  # the mesh does not divide a batch, a group or the weights
            if resident_bytes(arrays, ["gradient"]) < USABLE_SHARE * HBM[str(config.chip)]:
                yield mesh


def make_plan(
    config: PlanConfig, devices: Sequence[jax.Device], network: Qwen3Config, rewards: Sequence[Qwen3Config]
) -> Plan:
    """Compiles all programs of a step: for CPUs in float32, and for a TPU too where libtpu is installed."""
    layout = policy_layout(config, devices)
    arrays, programs = step_parts(config, layout, network, rewards)
    float32 = dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    no_master = dataclasses.replace(config.optimizer, master_weights=False)
    twin = dataclasses.replace(config, model=float32, optimizer=no_master)
    size = jnp.dtype(config.model.dtype).itemsize / 4
    # The float32 twin has no copy that changes the dtype alone, so its cost stands here.
    costs = {"copy": Cost(arrays.get("sampling copy", 0.0), arrays.get("sampling copy", 0.0), 0.0, {}, 0.0)}
    for program in step_parts(twin, layout, network, rewards)[1]:
        costs[program.name] = compiled_cost(program, layout, size)
    compiler = "the compiler for CPUs (an estimate)"
    if (topology := tpu_devices(config.chip, len(devices))) is not None:
        compiler = f"the compiler for TPU {config.chip}"
        for program in step_parts(config, policy_layout(config, topology), network, rewards)[1]:
            began, cost = time.perf_counter(), costs[program.name]
            temporaries = temporary_bytes(program.jitted.lower(*program.arguments, **program.options).compile())
            seconds = cost.seconds + time.perf_counter() - began
            costs[program.name] = cost._replace(temporaries=temporaries, seconds=seconds)
    return Plan(dict(layout.mesh.shape), arrays, programs, [costs[program.name] for program in programs], compiler)


def print_plan(config: PlanConfig, run_plan: Plan, network: Qwen3Config, rewards: Sequence[Qwen3Config]) -> None:
    """Prints the arrays and programs on each device, what each device sends, and which chips the run fits."""
    mesh = " x ".join(f"{name} {size}" for name, size in run_plan.mesh.items())
    sizes = ", ".join(f"{n / 1e9:.2f} G" for n in map(parameter_count, (network, *rewards)))
    console.print(
        f"\n{math.prod(run_plan.mesh.values())} devices, {mesh}: {config.prompts_per_step} prompts x "
        f"{config.num_generations}, prompts to {config.max_prompt_length} and completions to "
        f"{config.max_completion_length} tokens, micro-batches of {config.microbatch_prompts} prompts; parameters of "
        f"policy and reward models: {sizes}; {config.model.dtype}, parameters {config.model.param_dtype}"
    )
    table = Table("arrays on each device", "GiB", box=None)
    for name, size in run_plan.arrays.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    table = Table("program", "calls", "temporary GiB", "memory GiB", "TFLOP", "compiled in s", box=None)
    sent = Table("sent by each device", "over", "GB", box=None)
    for program, cost in zip(run_plan.programs, run_plan.costs, strict=True):
        numbers = (cost.temporaries / GIB, run_plan.memory(program, cost) / GIB, program.calls * cost.flops / 1e12)
        table.add_row(program.name, str(program.calls), *(f"{n:,.2f}" for n in numbers), f"{cost.seconds:.0f}")
        for (kind, axes), count in sorted(cost.sent.items(), key=lambda item: -item[1]):
            sent.add_row(f"{program.name}: {kind}", axes, f"{program.calls * count / 1e9:,.3f}")
    console.print("\nof a step, on each device", table, "", sent, "", sep="\n")
    console.print(f"largest: {run_plan.peak / GIB:.1f} GiB on each device, temporaries by {run_plan.compiler}")
    for chip in [config.chip] if config.chip else HBM:
        verdict = "fits" if run_plan.fits(chip) else "does NOT fit"
        console.print(f"  {chip}: {verdict}, {100 * run_plan.peak / HBM[chip]:.0f} % of {HBM[chip] / GIB:.0f} GiB")


def plan_json(config: PlanConfig, run_plan: Plan) -> dict[str, Any]:
    """Returns all figures, per device; a program's are summed over its calls in a step."""
    return {
        "mesh": run_plan.mesh,
        "chip": config.chip,
        "compiler": run_plan.compiler,
        "peak_bytes": run_plan.peak,
        "arrays": run_plan.arrays,
        "programs": {
            program.name: {
                "calls": program.calls,
                "temporary_bytes": cost.temporaries,
                "estimated_temporary_bytes": cost.estimate,
                "memory_bytes": run_plan.memory(program, cost),
                "flops": program.calls * cost.flops,
                "sent_bytes": {f"{kind}, {axes}": program.calls * n for (kind, axes), n in cost.sent.items()},
            }
            for program, cost in zip(run_plan.programs, run_plan.costs, strict=True)
        },
    }
