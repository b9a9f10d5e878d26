"""A run's metrics.jsonl: one row per step, each step once; what a kill or a disk has damaged is left out and named."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from train.console import print_plain
from train.run.files import write_whole

METRICS = "metrics.jsonl"


def read_metrics(run: str | Path, *, clock: bool = True) -> list[dict[str, float]]:
    """Reads the rows of a run's metrics.jsonl.

    A damaged line costs that line alone and is named; a last line that a kill cut short is left out in silence.

    Args:
      clock: with False, the fields that depend on the clock are left out; the rows are then the same, bit for bit, for
        every run of a config on a machine.
    """
    metrics = parse_metrics(Path(run) / METRICS)
    if metrics.damaged:
        print_plain(f"{Path(run) / METRICS}: {lines_text(metrics.damaged)} damaged and left out")
    if not clock:
        return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in metrics.rows]
    return metrics.rows


class MetricsFile(NamedTuple):
    """The content of a metrics.jsonl."""

    rows: list[dict[str, float]]
    damaged: list[int]  # numbers, from 1, of the lines that are no rows
    cut: list[int]  # the last line's, if it is no row and does not end


def parse_metrics(file: Path) -> MetricsFile:
    """Parses a metrics.jsonl line by line; without the file there are no rows."""
    metrics = MetricsFile([], [], [])
    lines = (file.read_bytes() if file.is_file() else b"").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):  # ValueError: UnicodeDecodeError too
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            metrics.rows.append(row)
        else:
            (metrics.damaged if number < len(lines) else metrics.cut).append(number)
    return metrics


def rewind_metrics(file: Path, step: int | None) -> None:
    """Cuts a metrics.jsonl back to the rows up to a step; a file with damaged lines is kept under another name."""
    metrics = parse_metrics(file)
    rows = [row for row in metrics.rows if step is not None and row["step"] <= step]
    is_short = bool(step) and not any(row["step"] == step for row in rows)
    if damaged := metrics.damaged + (metrics.cut if is_short else []):
        names = (f"{file.name}.damaged{number or ''}" for number in range(1000))
        aside = next(file.with_name(name) for name in names if not file.with_name(name).exists())
        aside.write_bytes(file.read_bytes())
        print_plain(f"{file}: {lines_text(damaged)} damaged and left out; the file as it was is {aside}")
    write_rows(file, rows)


def write_rows(file: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Writes a metrics.jsonl."""
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def lines_text(numbers: Sequence[int]) -> str:
    """Names the first few of some lines, for a sentence that goes on with an adjective."""
    shown = ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown} are"
