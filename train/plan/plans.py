"""One plan: a run's programs compiled for one mesh of one kind of chip, and what they take together."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.config import Qwen3Config
from models.flops import forward_flops, step_flops
from models.sharding import Layout
from train.build import policy_layout
from train.config import PlanConfig
from train.console import console, print_plain
from train.plan.chips import CHIPS, USABLE_SHARE
from train.plan.compilers import Compiler, NoCompiler
from train.plan.programs import (
    Cost,
    StepProgram,
    axis_sizes,
    estimated_cost,
    predicted_cost,
    resident_bytes,
    step_parts,
)
from train.plan.roofline import Work

COMPILED_AT_ONCE = 2  # programs; a large one takes several GiB of memory to compile
PARTS = {  # of a step -> the first words of its programs' names
    "sample": ("copy", "sample"),
    "score": ("score",),
    "update": ("logprobs", "gradient", "optimizer"),
}


class Plan(NamedTuple):
    """What a run needs on one mesh."""

    chip: str | None
    mesh: dict[str, int]  # axis -> devices
    microbatch_prompts: int
    arrays: dict[str, float]  # name -> bytes on each device
    programs: list[StepProgram]
    costs: list[Cost]  # one per program
    compiler: str  # whose figures `costs` has
    least_flops: dict[str, float]  # part -> the least arithmetic of a step on each device, see models.flops
    tokens: int  # of completions, in a step

    def memory(self, program: StepProgram, cost: Cost) -> float:
        """Returns the bytes on each device while a program runs."""
        resident = resident_bytes(self.arrays, program.beside)
        return resident + cost.temporaries if cost.fits else max(resident, cost.temporaries)

    @property
    def peak(self) -> float:
        """The most bytes on each device, over all programs."""
        return max(map(self.memory, self.programs, self.costs))

    def fits(self, chip: str) -> bool:
        return self.peak <= USABLE_SHARE * CHIPS[chip].memory and all(cost.fits for cost in self.costs)

    @property
    def is_predicted(self) -> bool:
        """Whether the chip's own compiler made all programs, so that their seconds are known."""
        return all(cost.predicted for cost in self.costs)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    def hours(self, steps: int) -> float | None:
        """Returns how long so many steps take; None where seconds are not known."""
        return self.step.seconds * steps / 3600 if self.is_predicted else None

    def price(self, steps: int, prices: Mapping[str, float]) -> float | None:
        """Returns what so many steps cost; None where seconds, or the price of this chip's hour, are not known."""
        hours, price = self.hours(steps), prices.get(str(self.chip))
        return price * self.devices * hours if price is not None and hours is not None else None

    def part(self, name: str) -> Work:
        """Returns the work of a part of a step (a key of PARTS) on each device."""
        total = Work()
        for program, cost in zip(self.programs, self.costs, strict=True):
            if program.name.split()[0] in PARTS[name]:
                total.add(cost.work, program.calls)
        return total

    @property
    def step(self) -> Work:
        """The work of a step on each device."""
        total = Work()
        for name in PARTS:
            total.add(self.part(name))
        return total

    def mfu(self, name: str, work: Work) -> float:
        """Returns a part's least arithmetic over what the chip could do in its seconds; recomputation is not in it."""
        return self.least_flops[name] / (work.seconds * CHIPS[str(self.chip)].flops) if work.seconds else 0.0

    @property
    def step_mfu(self) -> float:
        """The same of a whole step."""
        peak = self.step.seconds * CHIPS[str(self.chip)].flops
        return sum(self.least_flops.values()) / peak if peak else 0.0

    def bandwidth_share(self, work: Work) -> float:
        """Returns the bytes that the programs move over what the chip could move in their seconds."""
        return work.bytes / (work.seconds * CHIPS[str(self.chip)].bandwidth) if work.seconds else 0.0


def make_plan(
    config: PlanConfig,
    chip: str | None,
    compiler: Compiler | None,
    devices: Sequence[jax.Device],
    network: Qwen3Config,
    rewards: Sequence[Qwen3Config],
) -> Plan:
    """Compiles all programs of a step.

    Args:
      config: its `mesh` is the one to plan.
      chip: the kind of the devices.
      compiler: that chip's own; None: the compiler for CPUs estimates.
      devices: simulated ones, for the estimate.
    """
    if compiler is not None:
        try:
            layout = policy_layout(config, compiler.devices)
            arrays, programs = step_parts(config, layout, network, rewards)
            costs, name = predicted_costs(programs, layout, compiler), compiler.name
        except NoCompiler as error:
            print_plain(f"{error}: estimated instead, without seconds")
            compiler = None
    if compiler is None:
        layout = policy_layout(config, devices)
        arrays, programs = step_parts(config, layout, network, rewards)
        costs, name = estimated_costs(config, layout, arrays, network, rewards), "the compiler for CPUs (an estimate)"
    ordered = [costs[program.name] for program in programs]
    P, G, _, T = axis_sizes(config)
    flops = least_flops(config, network, rewards, layout.mesh.size)
    mesh, microbatch = dict(layout.mesh.shape), config.microbatch_prompts
    return Plan(chip, mesh, microbatch, arrays, programs, ordered, name, flops, P * G * T)


def predicted_costs(programs: Sequence[StepProgram], layout: Layout, compiler: Compiler) -> dict[str, Cost]:
    """Compiles programs by the chip's own compiler, the largest first, and says which one is done."""
    costs: dict[str, Cost] = {}
    pool = ThreadPoolExecutor(COMPILED_AT_ONCE)
    with contextlib.ExitStack() as stack, console.status("lowering") as status:
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # after an error what has not begun is left out
        waiting = {}
        for program in reversed(programs):  # `gradient` stands last and takes longest
            with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):  # Pallas learns the device's kind from it
                lowered = program.jitted.lower(*program.arguments, **program.options)
            waiting[pool.submit(predicted_cost, program, layout, lowered, compiler)] = program.name
        status.update(f"compiling {', '.join(waiting.values())} by {compiler.name}")
        for done in as_completed(waiting):
            name = waiting[done]
            costs[name] = cost = done.result()
            taken = f"in {cost.compile_seconds:.0f} s" if cost.compile_seconds else "before, and kept"
            print_plain(f"compiled {name} by {compiler.name} {taken}{f'; {cost.note}' if cost.note else ''}")
            left = [other for other in waiting.values() if other not in costs]
            status.update(f"compiling {', '.join(left)} by {compiler.name}")
    return costs


def estimated_costs(
    config: PlanConfig,
    layout: Layout,
    arrays: Mapping[str, float],
    network: Qwen3Config,
    rewards: Sequence[Qwen3Config],
) -> dict[str, Cost]:
    """Compiles programs for CPUs in float32, and scales bytes by the size of the compute dtype."""
    float32 = dataclasses.replace(config.model, dtype="float32", param_dtype="float32")
    no_master = dataclasses.replace(config.optimizer, master_weights=False, moments_dtype=None)
    twin = dataclasses.replace(config, model=float32, optimizer=no_master)
    size = jnp.dtype(config.model.dtype).itemsize / 4
    # The float32 twin has no copy that changes the dtype alone, so its cost stands here.
    costs = {"copy": Cost(arrays.get("sampling copy", 0.0), Work(), {}, 0.0)}
    with console.status("compiling by the compiler for CPUs"):
        for program in step_parts(twin, layout, network, rewards)[1]:
            costs[program.name] = estimated_cost(program, layout, size)
    return costs


def least_flops(
    config: PlanConfig, network: Qwen3Config, rewards: Sequence[Qwen3Config], devices: int
) -> dict[str, float]:
    """Returns the least arithmetic of each part of a step, on each device, all texts as long as they may be."""
    P, G, S, T = axis_sizes(config)
    texts = [S] * P, [[T] * G] * P
    forward = forward_flops(network, *texts)
    step = step_flops(forward, reference=bool(config.loss.beta), iterations=config.num_iterations)
    flops = {"sample": step["generate"], "update": step["update"]}
    flops["score"] = sum(forward_flops(reward, *texts) for reward in rewards)
    return {name: count / devices for name, count in flops.items()}


def named_programs(plan: Plan) -> Iterator[tuple[StepProgram, Cost]]:
    """Yields programs with their costs, in the order of a step."""
    order = [word for words in PARTS.values() for word in words]
    pairs = zip(plan.programs, plan.costs, strict=True)
    yield from sorted(pairs, key=lambda pair: order.index(pair[0].name.split()[0]))


def plan_json(config: PlanConfig, plan: Plan) -> dict[str, Any]:
    """Returns all figures, per device; a program's are of one call. What only the chip's compiler knows may be None."""
    step, known = plan.step, plan.is_predicted
    return {
        "mesh": plan.mesh,
        "devices": plan.devices,
        "microbatch_prompts": plan.microbatch_prompts,
        "chip": plan.chip,
        "compiler": plan.compiler,
        "predicted": known,
        "fits": plan.fits(plan.chip) if plan.chip is not None else None,
        "peak_bytes": plan.peak,
        "arrays": plan.arrays,
        "step_seconds": step.seconds if known else None,
        "parts": {name: _part_json(plan, name) if known else None for name in PARTS},
        "tokens_per_second": plan.tokens / step.seconds if known else None,
        "hours": plan.hours(config.max_steps),
        "price": {
            "per_chip_hour": config.prices.get(str(plan.chip)),
            "step": plan.price(1, config.prices),
            "run": plan.price(config.max_steps, config.prices),
        },
        "programs": {program.name: _program_json(plan, program, cost) for program, cost in named_programs(plan)},
    }


def _part_json(plan: Plan, name: str) -> dict[str, float]:
    work = plan.part(name)
    shares = {"mfu": plan.mfu(name, work), "bandwidth_share": plan.bandwidth_share(work)}
    return {"seconds": work.seconds, "link_seconds": work.link_seconds, **shares}


def _program_json(plan: Plan, program: StepProgram, cost: Cost) -> dict[str, Any]:
    work, known = cost.work, cost.predicted
    return {
        "calls": program.calls,
        "seconds": work.seconds if known else None,
        "flops": work.flops,
        "bytes": work.bytes if known else None,
        "kernels": work.kernels if known else None,
        "host_waits": work.host_waits if known else None,
        "memory_bytes": plan.memory(program, cost),
        "temporary_bytes": cost.temporaries,
        "sent_bytes": {f"{kind}, {axes}": count for (kind, axes), count in cost.sent.items()},
        "link_seconds": work.link_seconds if known else None,
        "compile_seconds": cost.compile_seconds,
    }
