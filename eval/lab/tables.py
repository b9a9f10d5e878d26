"""The lab's numbers in files and to read: results.csv, curves.csv, table.md, and the table in the terminal.

results.csv has a line for each cell and seed (the columns of `SeedRow`), curves.csv one for each cell and evaluation
(`CurvePoint`). Both begin with lines `# name: value` that say how they were made. They are all that the table and the
pictures need: `write(read(folder), folder)` makes them again without a single cell.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from eval.lab.cells import Cell
from eval.lab.results import BASELINE, CurvePoint, Estimate, SeedRow, Tables, by_cell, estimate, reached
from eval.sheets import NONE, Sheet
from train.console import console
from train.run.files import write_whole

RESULTS, CURVES, TABLE, PICTURES = "results.csv", "curves.csv", "table.md", "pictures"
UNITS = "rewards in standard deviations of the start, kl in nats per completion; nan = no value, inf = not reached"
IN_TERMINAL = ("situation", "method", "gold reward", "gold − grpo", "win rate", "over-optimisation")

Line = TypeVar("Line", SeedRow, CurvePoint)


def write(tables: Tables, folder: Path) -> None:
    """FOLDER/results.csv, curves.csv, table.md and pictures/*.png, *.svg; the table to the terminal."""
    from eval.lab.plots import lab_pictures  # matplotlib: when it is needed

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(tables.command.split()),
        "seeds": " ".join(map(str, tables.seeds)),
        "versions": tables.versions,
        "units": UNITS,
    }
    write_whole(folder / RESULTS, csv_text(about, SeedRow._fields, tables.rows))
    write_whole(folder / CURVES, csv_text(about, CurvePoint._fields, tables.curves))
    pictures, left_out = lab_pictures(folder / PICTURES, tables)
    shown = sheet(tables)
    drawn = "".join(f"\n## {p.title}\n\n![{p.title}]({PICTURES}/{p.name}.png)\n\n{p.caption}\n" for p in pictures)
    drawn += "".join(f"\nNot drawn: {sentence}\n" for sentence in left_out)
    write_whole(folder / TABLE, f"# {shown.title}\n\n`{about['command']}`\n\n{shown.markdown()}{drawn}")
    wide = console.width >= shown.letters() + len(shown.columns)
    console.print((shown if wide else columns(shown, IN_TERMINAL)).rich(), str(folder / TABLE), sep="\n")


def read(folder: Path) -> Tables:
    """What `write` wrote.

    Raises:
      FileNotFoundError, ValueError: no such files, or ones of another form.
    """
    about, rows = lines(folder / RESULTS, SeedRow)
    _, curves = lines(folder / CURVES, CurvePoint)
    seeds = tuple(int(seed) for seed in about.get("seeds", "").split())
    return Tables(about.get("command", ""), seeds, about.get("versions", ""), rows, curves)


def csv_text(about: Mapping[str, str], names: Sequence[str], rows: Sequence[SeedRow | CurvePoint]) -> str:
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in about.items())
    csv.writer(text, lineterminator="\n").writerows((names, *rows))
    return text.getvalue()


def lines(file: Path, kind: type[Line]) -> tuple[dict[str, str], list[Line]]:
    """The header's values by name, and the lines as `kind`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder that `python -m eval lab` has written")
    text = file.read_text(encoding="utf-8").splitlines()
    header = [line[1:].partition(":") for line in text if line.startswith("#")]
    names, *body = csv.reader(line for line in text if not line.startswith("#"))
    if tuple(names) != kind._fields:
        differing = sorted(set(names) ^ set(kind._fields)) or ["their order"]
        raise ValueError(
            f"{file}: expected the columns of {kind.__name__}, got others: {', '.join(differing)}; it was written by "
            f"another version of the lab, which has to be run again"
        )
    types = kind.__annotations__.values()
    found = [kind(*(read_as(value) for read_as, value in zip(types, line, strict=True))) for line in body]
    return {name.strip(): value.strip() for name, _, value in header}, found


# to read


def sheet(tables: Tables) -> Sheet:
    """A row for each cell: means over seeds with intervals, beside the baseline's."""
    names = (
        "situation", "method", "learning rate", "proxy reward", "gold reward", f"gold − {BASELINE}", "win rate",
        f"steps to {BASELINE}'s gold", f"steps to {BASELINE}'s proxy", "over-optimisation", "KL", "length",
        f"gold − {BASELINE} at equal KL", "rank/length",
    )  # fmt: skip
    cells = by_cell(tables.rows)
    counts = {len(rows) for rows in cells.values()}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
    note = (
        f"Means over {seeds} seeds" + (" with Student's 95 % intervals over seeds" if max(counts) > 1 else "") + ". "
        "Rewards in standard deviations of the start, on validation prompts at the last evaluation; KL in nats per "
        f"completion. Differences to {BASELINE} and win rates (by the gold reward, all pairs of a prompt's "
        "completions, ties one half) are paired by seed. Steps: the median over seeds, and how many of them get there. "
        "Over-optimisation: the best gold reward of an evaluation minus the last one; a maximum of noisy numbers, it "
        "is positive even without any. Equal KL: the smaller final KL of the two, for each seed. "
        "Rank/length: the correlation over the steps of training."
    )
    if min(counts) == 1:
        note += " A single seed has no interval."
    return Sheet("The lab", names, [line(cell, rows) for cell, rows in cells.items()], note, "lab")


def line(cell: Cell, rows: Sequence[SeedRow]) -> tuple[str, ...]:
    compared = cell.method != BASELINE
    difference, rate = estimate(rows, "gold_difference"), estimate(rows, "win_rate")
    return (
        situation_text(cell),
        cell.method,
        f"{rows[0].learning_rate:.3g}" if math.isfinite(rows[0].learning_rate) else NONE,
        plus_minus(estimate(rows, "proxy")),
        plus_minus(estimate(rows, "gold")),
        between(difference, "+.3f") if compared else "baseline",
        between(rate, ".3f") if compared else "baseline",
        steps(rows, "steps_to_gold"),
        steps(rows, "steps_to_proxy"),
        plus_minus(estimate(rows, "over_optimisation")),
        plus_minus(estimate(rows, "kl"), ".2f"),
        plus_minus(estimate(rows, "length"), ".1f"),
        between(estimate(rows, "gold_at_kl_difference"), "+.3f") if compared else "baseline",
        plus_minus(estimate(rows, "rank_length"), "+.3f"),
    )


def situation_text(cell: Cell) -> str:
    """ "G 8, noise 0.3", and what is not as usual."""
    special = [value for value, usual in ((cell.distortion, "none"), (cell.regime, "tuned")) if value != usual]
    return ", ".join([f"G {cell.group_size}", f"noise {cell.noise:g}", *special])


def plus_minus(value: Estimate, form: str = ".3f") -> str:
    if math.isnan(value.mean):
        return NONE
    return f"{value.mean:{form}}" + ("" if math.isnan(value.half) else f" ± {value.half:{form.lstrip('+')}}")


def between(value: Estimate, form: str) -> str:
    if math.isnan(value.mean) or math.isnan(value.half):
        return plus_minus(value, form)
    return f"{value.mean:{form}} [{value.mean - value.half:{form}}, {value.mean + value.half:{form}}]"


def steps(rows: Sequence[SeedRow], name: str) -> str:
    median, arrived, seeds = reached(rows, name)
    if not seeds:
        return NONE
    return ("not reached" if math.isinf(median) else f"{median:.1f}") + f" ({arrived} of {seeds})"


def columns(given: Sheet, names: Sequence[str]) -> Sheet:
    """Some columns of a table."""
    at = [given.columns.index(name) for name in names]
    rows = [tuple(row[i] for i in at) for row in given.rows]
    return Sheet(given.title, tuple(names), rows, given.note, given.name)
