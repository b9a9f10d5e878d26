"""The report of `python -m eval device`: one form of tables for every machine, from what was measured and planned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval.sheets import NONE, Sheet
from models.config import Qwen3Config
from models.flops import decode_bytes, forward_flops, step_flops
from train.plan.chips import CHIPS, GIB

TORCH = "transformers, torch"
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Report:
    """What a run of `python -m eval device` found."""

    machine: dict[str, Any]  # of `machine_facts`, and size, command, date, planned_for (a chip)
    work: dict[str, Any]  # the fields of a Workload
    figures: dict[str, dict[str, float]]  # implementation -> of `time_programs`; the first is the run's own
    planned: dict[str, float | None]  # the same of the plan, where it has them
    notes: list[str]  # what was left out, and why

    @property
    def is_planned(self) -> bool:
        """Whether the plan is for this machine's device."""
        return self.machine["planned_for"] in self.machine["device"]

    @property
    def own(self) -> dict[str, float]:
        """Figures of the implementation that a run takes by default."""
        return next(iter(self.figures.values()))


def planned_figures(plan: Mapping[str, Any], chip: str) -> tuple[dict[str, float | None], list[str]]:
    """Returns what the JSON of `train plan` says of the figures of `time_programs`, and notes on what it lacks.

    Programs whose names begin with the same word count together; the plan's seconds and bytes are those of one call.
    """
    programs: Mapping[str, Any] = plan.get("programs", {})
    if not programs:
        return {}, []

    def total_seconds(*words: str) -> float | None:
        parts = [program for name, program in programs.items() if name.split()[0] in words]
        seconds = [program.get("seconds") for program in parts]
        if not parts or None in seconds:
            return None
        return math.fsum(program["calls"] * program["seconds"] for program in parts)

    gradients = programs.get("gradient", {}).get("calls")
    gradient_s = total_seconds("gradient")
    memory = {name: program["memory_bytes"] for name, program in programs.items()}
    planned = {
        "sample_s": total_seconds("sample"),
        "sample_peak_bytes": max((size for name, size in memory.items() if name.split()[0] == "sample"), default=None),
        "gradient_s": gradient_s / gradients if gradient_s is not None and gradients else None,
        "optimizer_s": total_seconds("optimizer"),
        "update_s": total_seconds("logprobs", "gradient", "optimizer"),
        "step_peak_bytes": max(memory.values()),
        "step_s": plan.get("step_seconds"),
    }
    notes = [f"plan: memory by {plan['compiler']}"] if plan.get("compiler") else []
    if planned["sample_s"] is None or planned["update_s"] is None:
        notes.append(f"plan: no seconds; it has them where a compiler for {chip} is installed")
    return planned, notes


def markdown(report: Report) -> str:
    """Returns the whole report."""
    tables = [facts_table(report), plan_table(report).markdown(), implementations_table(report).markdown()]
    return "\n".join(tables) + "".join(f"\n- {note}" for note in report.notes) + ("\n" if report.notes else "")


def facts_table(report: Report) -> str:
    """Hardware, versions, command, date and work; its cells are too long to be aligned."""
    machine, work = report.machine, report.work
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peaks = f"{machine['peak_flops'] / 1e12:,.3g} TFLOP/s, {machine['bandwidth'] / 1e9:,.0f} GB/s"
    rows = [
        ("hardware", f"{machine['device']}, 1 of {machine['devices']}; {machine['cpu_cores']} CPU cores"),
        ("its peaks", f"{peaks}; {machine['peak_source']}"),
        ("versions", versions),
        ("command", f"`{machine['command']}`"),
        ("date", machine["date"]),
        ("work", work_text(machine["size"], work)),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def work_text(size: str, work: Mapping[str, Any]) -> str:
    return (
        f"{size}, random weights, {work['dtype']}: {work['prompts_per_step']} prompts x {work['num_generations']} "
        f"completions, {work['prompt']} + {work['completion']} tokens, none ends early; micro-batches of "
        f"{work['microbatch_prompts']} prompts"
    )


class Compared(NamedTuple):
    """One row of the table beside the plan."""

    figure: str
    measured: float | None
    planned: float | None
    ratio: float | None  # None also where the plan is for another chip


def compared_figures(report: Report) -> list[Compared]:
    """Returns every figure that a plan predicts, measured and planned."""
    machine, own = report.machine, report.own
    chip = machine["planned_for"]
    step_s = None
    if "sample_s" in own and "update_s" in own:
        step_s = own["sample_s"] + own["update_s"]
    measured = shown_figures(own | {"step_s": step_s}, report.work, machine["peak_flops"], machine["bandwidth"])
    planned = shown_figures(report.planned, report.work, CHIPS[chip].flops, CHIPS[chip].bandwidth)
    return [
        Compared(name, value, planned[name], quotient(value, planned[name]) if report.is_planned else None)
        for name, value in measured.items()
    ]


def plan_table(report: Report) -> Sheet:
    """Measured beside planned."""
    rows = []
    for name, *values, ratio in compared_figures(report):
        show = percent_of if "share" in name or "MFU" in name else digits
        rows.append((name, *map(show, values), digits(ratio)))
    return Sheet("", ("figure", "measured", "planned", "measured / planned"), rows)


def shown_figures(
    figures: Figures, work: Mapping[str, Any], peak: float | None, bandwidth: float | None
) -> dict[str, float | None]:
    """Returns the rows of a report from the figures of `time_programs`.

    The share of the bandwidth is that of `decode_bytes`, MFU that of `step_flops`: the least that the work takes.
    """
    network, lengths = Qwen3Config(**work["network"]), [work["prompt"]] * work["prompts_per_step"]
    completions = [[work["completion"]] * work["num_generations"]] * work["prompts_per_step"]
    read = decode_bytes(network, lengths, completions, itemsize=4 if work["dtype"] == "float32" else 2)
    flops = step_flops(forward_flops(network, lengths, completions), reference=True)["update"]
    sample_s, update_s = figures.get("sample_s"), figures.get("update_s")
    return {
        "decode, ms per token": scaled_by(sample_s, 1e3 / work["completion"]),
        "decode, share of the bandwidth": quotient(quotient(read, sample_s), bandwidth),
        "gradient of a micro-batch, s": figures.get("gradient_s"),
        "optimizer, s": figures.get("optimizer_s"),
        "update, s": update_s,
        "update, MFU": quotient(quotient(flops, update_s), peak),
        "sampling and update, s": figures.get("step_s"),
        "peak memory of sampling, GiB": scaled_by(figures.get("sample_peak_bytes"), 1 / GIB),
        "peak memory of the step, GiB": scaled_by(figures.get("step_peak_bytes"), 1 / GIB),
    }


def implementations_table(report: Report) -> Sheet:
    """Every implementation, and torch, beside the run's own."""
    own = report.own
    first = next(iter(report.figures))
    rows = []
    for name, figures in report.figures.items():
        shown = shown_figures(figures, report.work, None, None)
        rows.append(
            (
                name,
                digits(shown["decode, ms per token"]),
                digits(quotient(figures.get("sample_s"), own.get("sample_s"))),
                digits(shown["update, s"]),
                digits(quotient(figures.get("update_s"), own.get("update_s"))),
                digits(shown["peak memory of the step, GiB"]),
            )
        )
    columns = ("decode, ms per token", f"decode / {first}", "update, s", f"update / {first}", "peak memory, GiB")
    return Sheet("", ("implementation", *columns), rows)


def quotient(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def scaled_by(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def percent_of(value: float | None) -> str:
    return NONE if value is None else f"{digits(100 * value)} %"


def digits(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return NONE
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(places, 0)}f}"
