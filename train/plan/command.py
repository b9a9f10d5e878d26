"""`python -m train plan`: memory, seconds and price of a run, without its devices and its weights.

The programs of the loop (copy, sample, score, gradient, optimizer step; `train.plan.programs`) are compiled ahead of
time, from shapes alone, for the requested number of chips and the longest case: every prompt and completion has its
greatest length. The chip's own compiler does that where it is installed (`train.plan.compilers`); then memory is that
compiler's, and seconds come from a roofline of what it made (`train.plan.roofline`). Otherwise the compiler for CPUs
estimates memory, arithmetic and communication, without seconds. It widens bfloat16 to float32, so it compiles the run
in float32, and temporaries are scaled by the size of the compute dtype: too low by what stays float32 (scores, logits).
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from models.config import Qwen3Config
from train.config import PlanConfig
from train.console import print_plain
from train.plan.compilers import Compiler, NoCompiler, find_compiler, plugin_errors_kept
from train.plan.devices import device_count, simulated_devices
from train.plan.plans import Plan, make_plan, named_programs, plan_json
from train.plan.programs import network_config
from train.plan.suggest import candidate_meshes, with_smaller_microbatch
from train.plan.tables import print_comparison, print_plan, rank
from train.reference import check_networks
from train.run.files import check_out, check_out_directory, write_whole
from train.running import setup_errors


def plan(config: PlanConfig) -> None:
    """Prints the plan of a run of `train policy`; of several meshes or chips also a table of all.

    Raises:
      SetupError: a mesh that does not divide devices, batch or weights; a model whose shape cannot be found; an output
        that cannot be written.
    """
    try:
        make_and_print(config)
    except KeyboardInterrupt:  # at once: a compiler cannot be stopped, and Python waits for its threads
        print("\ninterrupted; programs that were compiled are kept", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)


def make_and_print(config: PlanConfig) -> None:
    """Makes the plans, prints them and writes the best one's files; see `plan`."""
    with setup_errors(), plugin_errors_kept():
        check_outputs(config)
        if config.suggest and not config.chips:
            raise ValueError("--suggest: for which chip? Give --chip, such as H200 or H200,v5p")
        if ignored := options_without_seconds(config):
            print_plain(f"{ignored}: without effect, since seconds are those of a chip; give --chip, such as H200")
        counts = {chip: device_count(config, chip) for chip in config.chips or (None,)}
        devices = simulated_devices(max(counts.values()))
        network = network_config(config.model.path) if config.model.path else config.model.architecture
        assert network is not None  # ModelConfig has checked it
        if config.loss.reference is not None:
            other = network_config(config.loss.reference, "loss.reference")
            check_networks(config.loss.reference, other, network)
        rewards = [network_config(spec.model, f"{name}.model") for name, spec in config.named_rewards if spec.model]
        plans = []
        for chip, count in counts.items():
            plans += chip_plans(config, chip, devices[:count], network, rewards)
        if not plans:
            raise ValueError(no_mesh_text(config))
    best = min(plans, key=lambda made: rank(config, made)) if config.chips else plans[0]
    if config.compare or len(plans) > 1:
        print_comparison(config, plans, best)
    print_plan(config, best, network, rewards)
    if config.suggest and not best.fits(str(best.chip)):
        print_plain(no_mesh_text(config))
    with setup_errors():
        write_files(config, best)


def options_without_seconds(config: PlanConfig) -> str:
    """Returns the options that need a chip's seconds, if no chip is named."""
    given = {"--top": config.top, "--price_per_chip_hour": config.price_per_chip_hour is not None}
    return ", ".join(name for name, value in given.items() if value and not config.chips)


def chip_plans(
    config: PlanConfig,
    chip: str | None,
    devices: Sequence[jax.Device],
    network: Qwen3Config,
    rewards: Sequence[Qwen3Config],
) -> list[Plan]:
    """Returns the plans of one kind of chip: of the config's mesh, or of those that are worth trying."""
    compiler = compiler_or_none(chip, len(devices))
    if not config.suggest or chip is None:
        return [make_plan(config, chip, compiler, devices, network, rewards)]
    plans: list[Plan] = []
    for mesh in candidate_meshes(config, chip, compiler.devices if compiler else devices, network, rewards):
        candidate: PlanConfig | None = dataclasses.replace(config, mesh=mesh)
        while candidate is not None:
            plans.append(make_plan(candidate, chip, compiler, devices, network, rewards))
            candidate = with_smaller_microbatch(candidate, plans[-1])
        fitting = [made for made in plans if made.fits(chip)]
        # An estimate has no seconds to choose by: the first that fits is the likeliest to be fast.
        if len(fitting) >= (config.tries if compiler is not None else 1) or len(plans) >= 2 * config.tries:
            break
    return plans


def compiler_or_none(chip: str | None, count: int) -> Compiler | None:
    """Returns a chip's own compiler; without one, says why and what the plan does instead."""
    if chip is None:
        return None
    try:
        return find_compiler(chip, count)
    except NoCompiler as error:
        print_plain(f"{error}; memory is estimated by the compiler for CPUs, and there are no seconds")
        return None


def no_mesh_text(config: PlanConfig) -> str:
    counts = ", ".join(f"{device_count(config, chip)} {chip}" for chip in config.chips)
    advice = "take more of them, a smaller prompts_per_step, model.param_dtype bfloat16, or lora.rank"
    return f"no mesh fits {counts}: {advice}"


def check_outputs(config: PlanConfig) -> None:
    """Refuses files that could not be written, before anything is compiled."""
    if config.out is not None:
        check_out(config.out)
    if config.hlo is not None:
        check_out_directory(config.hlo, "sample.hlo")
    if config.out is not None and config.hlo is not None:
        folder = Path(config.hlo).resolve()
        if Path(config.out).resolve() in (folder, *folder.parents):
            raise ValueError(f"--out, --hlo: {config.out} cannot be a file and a directory; choose two names")


def write_files(config: PlanConfig, made: Plan) -> None:
    """Writes the figures to `out` and the compiled texts to `hlo`."""
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(config.out), json.dumps(plan_json(config, made), indent=2) + "\n")
    if config.hlo is not None:
        Path(config.hlo).mkdir(parents=True, exist_ok=True)
        for program, cost in named_programs(made):
            name = program.name.replace("/", "_").replace(" ", "_")
            if cost.text:
                write_whole(Path(config.hlo) / f"{name}.hlo", cost.text)
