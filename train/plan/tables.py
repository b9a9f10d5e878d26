"""What a plan prints: arrays, programs, seconds, price; the most expensive kernels; several plans in one table."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from models.config import Qwen3Config
from train.config import PlanConfig
from train.console import console, print_plain
from train.plan.chips import CHIPS, GIB
from train.plan.plans import PARTS, Plan, named_programs
from train.plan.programs import parameter_count
from train.plan.roofline import Item, Work

WIDEST = 400  # characters of a table


def print_plan(config: PlanConfig, plan: Plan, network: Qwen3Config, rewards: Sequence[Qwen3Config]) -> None:
    """Prints the arrays and programs on each device, what each sends, whether it fits, its seconds and its price."""
    sizes = ", ".join(f"{n / 1e9:.2f} G" for n in map(parameter_count, (network, *rewards)))
    console.print(
        f"\n{plan.devices} {plan.chip or 'devices'}, {mesh_text(plan)}: {config.prompts_per_step} "
        f"prompts x {config.num_generations}, prompts to {config.max_prompt_length} and completions to "
        f"{config.max_completion_length} tokens, micro-batches of {plan.microbatch_prompts} prompts; parameters of "
        f"policy and reward models: {sizes}; {config.model.dtype}, parameters {config.model.param_dtype}"
    )
    table = Table("arrays on each device", "GiB", box=None)
    for name, size in plan.arrays.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    print_table(table)
    console.print("\nof a step, on each device")
    print_table(programs_table(plan))
    if (sent := sent_table(plan)).rows:
        console.print("")
        print_table(sent)
    console.print(f"\nlargest: {plan.peak / GIB:.1f} GiB on each device, temporaries by {plan.compiler}")
    for chip in [plan.chip] if plan.chip else CHIPS:
        verdict = "fits" if plan.fits(chip) else "does NOT fit"
        memory = CHIPS[chip].memory
        console.print(f"  {chip}: {verdict}, {100 * plan.peak / memory:.0f} % of {memory / GIB:.0f} GiB")
    if plan.is_predicted:
        print_seconds(config, plan)
    for program, cost in named_programs(plan):
        if config.top and cost.predicted:
            print_kernels(program.name, cost.work.items, config.top)


def mesh_text(plan: Plan) -> str:
    return " x ".join(f"{name} {size}" for name, size in plan.mesh.items())


def programs_table(plan: Plan) -> Table:
    """Returns a row for each program, its work over all its calls in a step."""
    columns = ("program", "calls", "temporary GiB", "memory GiB", "TFLOP")
    table = Table(*columns, *(("TB moved", "kernels", "host waits", "seconds") if plan.is_predicted else ()), box=None)
    for program, cost in named_programs(plan):
        work, calls = cost.work, program.calls
        numbers = (cost.temporaries / GIB, plan.memory(program, cost) / GIB, calls * work.flops / 1e12)
        row = [program.name, str(calls), *(f"{n:,.2f}" for n in numbers)]
        if plan.is_predicted:
            counts = (work.kernels, work.host_waits)
            row += [f"{calls * work.bytes / 1e12:,.2f}", *(f"{calls * n:,.0f}" for n in counts)]
            row.append(f"{calls * work.seconds:,.2f}")
        table.add_row(*row)
    return table


def sent_table(plan: Plan) -> Table:
    """Returns what each device sends, by program, kind of collective and mesh axes."""
    table = Table("sent by each device", "over", "GB", box=None)
    for program, cost in named_programs(plan):
        for (kind, axes), count in sorted(cost.sent.items(), key=lambda item: -item[1]):
            table.add_row(f"{program.name}: {kind}", axes, f"{program.calls * count / 1e9:,.3f}")
    return table


def print_seconds(config: PlanConfig, plan: Plan) -> None:
    """Prints the predicted seconds of a step and of its parts, tokens per second, shares of peaks, and the price."""
    table = Table("part of a step", "seconds", "of them links", "MFU", "bandwidth share", box=None)
    for name in PARTS:
        work = plan.part(name)
        if work.kernels:
            shares = (plan.mfu(name, work), plan.bandwidth_share(work))
            seconds = (f"{work.seconds:,.2f}", f"{work.link_seconds:,.2f}")
            table.add_row(name, *seconds, *(f"{100 * share:.0f} %" for share in shares))
    step, hours = plan.step, plan.hours(config.max_steps)
    assert hours is not None  # as seconds are predicted
    share = 100 * plan.bandwidth_share(step)
    table.add_row(
        "step", f"{step.seconds:,.2f}", f"{step.link_seconds:,.2f}", f"{100 * plan.step_mfu:.0f} %", f"{share:.0f} %"
    )
    console.print("")
    print_table(table)
    rate = plan.tokens / step.seconds
    print_plain(
        f"{rate:,.0f} completion tokens a second, {rate / plan.devices:,.0f} on each device; {config.max_steps:,} "
        f"steps: {hours:,.1f} hours, {hours * plan.devices:,.0f} chip hours{price_text(config, plan)}"
    )
    print_plain(
        "predicted by a roofline of the compiled programs, for the longest texts: no device was timed; rewards that "
        "are functions, validation and saving are not in it (docs/plan.md)"
    )


def price_text(config: PlanConfig, plan: Plan) -> str:
    """Returns what a run costs, if the price of an hour is known."""
    run = plan.price(config.max_steps, config.prices)
    return f", at {config.prices[str(plan.chip)]:g} an hour {run:,.0f}" if run is not None else ""


def print_kernels(name: str, items: Mapping[Item, Work], count: int) -> None:
    """Prints the most expensive kernels of one call, with the loops around them and their named scope."""
    total = sum(work.seconds for work in items.values())
    table = Table(f"{name}: kernels of a call", "share", "ms", "launches", "GB", "TFLOP", "loops", "scope", box=None)
    for item, work in sorted(items.items(), key=lambda pair: -pair[1].seconds)[:count]:
        numbers = (f"{1e3 * work.seconds:,.2f}", f"{work.kernels:,.0f}", f"{work.bytes / 1e9:,.2f}")
        share = f"{100 * work.seconds / total:.1f} %" if total else "-"
        table.add_row(
            item.opcode, share, *numbers, f"{work.flops / 1e12:,.2f}", item.loops or "-", short_scope(item.scope)
        )
    console.print("")
    print_table(table)


def short_scope(scope: str) -> str:
    """Returns named scopes without the words that JAX puts around every body; of a derivative its kind stays."""
    left_out = ("while", "body", "closed_call", "cond", "jvp()", "checkpoint", "jit(main)")
    return "/".join(word for word in scope.split("/")[1:] if word not in left_out) or scope


def print_table(table: Table) -> None:
    """Prints a table as wide as it is: a narrow terminal, or a file, wraps its lines and loses nothing."""
    Console(file=console.file, quiet=console.quiet, width=WIDEST, soft_wrap=True).print(table, highlight=False)


def print_comparison(config: PlanConfig, plans: Sequence[Plan], best: Plan) -> None:
    """Prints a row for each plan, those that fit first, the cheapest or fastest first."""
    sizes, times = ("chip", "devices", "mesh", "micro-batch", "memory"), ("sample s", "score s", "update s", "step s")
    columns = (*sizes, *times, "run, hours", "run, price")
    table = Table("", *columns, box=None)
    for plan in sorted(plans, key=lambda plan: rank(config, plan)):
        seconds = [f"{plan.part(name).seconds:,.1f}" if plan.is_predicted else "-" for name in PARTS]
        hours, run = plan.hours(config.max_steps), plan.price(config.max_steps, config.prices)
        step = f"{plan.step.seconds:,.1f}" if plan.is_predicted else "-"
        totals = (step, "-" if hours is None else f"{hours:,.1f}", "-" if run is None else f"{run:,.0f}")
        memory = f"{plan.peak / GIB:.1f} of {CHIPS[str(plan.chip)].memory / GIB:.0f} GiB"
        fits = "" if plan.fits(str(plan.chip)) else ", does NOT fit"
        mark = "->" if plan is best and not fits else ""
        counts = (str(plan.devices), mesh_text(plan), str(plan.microbatch_prompts))
        table.add_row(mark, str(plan.chip), *counts, memory + fits, *seconds, *totals)
    console.print("")
    print_table(table)


def rank(config: PlanConfig, plan: Plan) -> tuple[bool, float, float]:
    """Returns the key by which plans are ordered: what fits, the price of a run where all have one, the seconds."""
    seconds = plan.step.seconds if plan.is_predicted else math.inf
    priced = all(chip in config.prices for chip in config.chips)
    price = plan.price(1, config.prices if priced else {}) or 0.0
    return not plan.fits(str(plan.chip)), price if plan.is_predicted else seconds, seconds
