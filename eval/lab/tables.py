"""Writes the lab's numbers, results.csv and curves.csv, and from them table.md and the table in the terminal.

results.csv has a line for each cell and seed (the columns of `SeedRow`), curves.csv one for each cell and evaluation
(`CurvePoint`). Both begin with lines `# name: value` that say how they were made. The table and the pictures need
nothing else: `write(read(folder), folder)` makes them again without a single cell.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from eval.lab.cells import Cell, situation_text
from eval.lab.results import BASELINE, CurvePoint, Estimate, SeedRow, Tables, by_cell, estimate, reached
from eval.sheets import NONE, Sheet
from train.console import console
from train.run.files import write_whole

RESULTS, CURVES, TABLE, PICTURES = "results.csv", "curves.csv", "table.md", "pictures"
UNITS = "rewards in standard deviations of the start, kl in nats per completion; nan = no value, inf = not reached"
IN_TERMINAL = ("situation", "method", "gold reward", "gold − grpo", "win rate", "over-optimisation")

RowType = TypeVar("RowType", SeedRow, CurvePoint)


def write(tables: Tables, folder: Path) -> None:
    """Writes FOLDER/results.csv, curves.csv, table.md and pictures/*.png, *.svg, and prints the table."""
    from eval.lab.plots import lab_pictures  # matplotlib: when it is needed

    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": " ".join(tables.command.split()),
        "seeds": " ".join(map(str, tables.seeds)),
        "versions": tables.versions,
        "units": UNITS,
    }
    write_whole(folder / RESULTS, csv_text(about, tables.rows, SeedRow))
    write_whole(folder / CURVES, csv_text(about, tables.curves, CurvePoint))
    pictures, left_out = lab_pictures(folder / PICTURES, tables)
    whole = sheet(tables)
    drawn = "".join(f"\n## {p.title}\n\n![{p.title}]({PICTURES}/{p.name}.png)\n\n{p.caption}\n" for p in pictures)
    drawn += "".join(f"\nNot drawn: {sentence}\n" for sentence in left_out)
    write_whole(folder / TABLE, f"# {whole.title}\n\n`{about['command']}`\n\n{whole.markdown()}{drawn}")
    wide = console.width >= whole.letters() + len(whole.columns)
    console.print((whole if wide else whole.select(IN_TERMINAL)).rich(), str(folder / TABLE), sep="\n")


def read(folder: Path) -> Tables:
    """Reads the files of `write`.

    Raises:
      FileNotFoundError, ValueError: no such files, or ones of another form.
    """
    about, rows = read_csv(folder / RESULTS, SeedRow)
    _, curves = read_csv(folder / CURVES, CurvePoint)
    seeds = tuple(int(seed) for seed in about.get("seeds", "").split())
    return Tables(about.get("command", ""), seeds, about.get("versions", ""), rows, curves)


def csv_text(about: Mapping[str, str], rows: Sequence[RowType], kind: type[RowType]) -> str:
    """Returns the lines `# name: value` and a CSV of the rows."""
    import pandas as pd  # slow to import

    header = "".join(f"# {name}: {value}\n" for name, value in about.items())
    table = pd.DataFrame(rows, columns=list(kind._fields))
    return header + str(table.to_csv(index=False, lineterminator="\n", na_rep="nan"))


def read_csv(file: Path, kind: type[RowType]) -> tuple[dict[str, str], list[RowType]]:
    """Returns the header's values by name, and the rows."""
    import pandas as pd  # slow to import

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a folder that `python -m eval lab` has written")
    header = [line[1:].partition(":") for line in file.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    table = pd.read_csv(file, skiprows=len(header), dtype=str, keep_default_na=False)  # numbers below, to the last bit
    if tuple(table.columns) != kind._fields:
        differing = sorted(set(table.columns) ^ set(kind._fields)) or ["their order"]
        raise ValueError(
            f"{file}: expected the columns of {kind.__name__}, got others: {', '.join(differing)}; it was written by "
            f"another version of the lab, which has to be run again"
        )
    rows = [kind(*row) for row in table.astype(kind.__annotations__).itertuples(index=False)]
    return {name.strip(): value.strip() for name, _, value in header}, rows


# the table


def sheet(tables: Tables) -> Sheet:
    """Returns the table: a row for each cell, means over seeds with intervals, beside the baseline's."""
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
    return Sheet("The lab", names, [sheet_row(cell, rows) for cell, rows in cells.items()], note, "lab")


def sheet_row(cell: Cell, rows: Sequence[SeedRow]) -> tuple[str, ...]:
    compared = cell.method != BASELINE
    difference, rate = estimate(rows, "gold_difference"), estimate(rows, "win_rate")
    return (
        situation_text(cell),
        cell.method,
        f"{rows[0].learning_rate:.3g}" if math.isfinite(rows[0].learning_rate) else NONE,
        half_width_text(estimate(rows, "proxy")),
        half_width_text(estimate(rows, "gold")),
        seed_interval_text(difference, "+.3f") if compared else "baseline",
        seed_interval_text(rate, ".3f") if compared else "baseline",
        steps_text(rows, "steps_to_gold"),
        steps_text(rows, "steps_to_proxy"),
        half_width_text(estimate(rows, "over_optimisation")),
        half_width_text(estimate(rows, "kl"), ".2f"),
        half_width_text(estimate(rows, "length"), ".1f"),
        seed_interval_text(estimate(rows, "gold_at_kl_difference"), "+.3f") if compared else "baseline",
        half_width_text(estimate(rows, "rank_length"), "+.3f"),
    )


def half_width_text(value: Estimate, form: str = ".3f") -> str:
    """ "mean ± half the interval"."""
    if math.isnan(value.mean):
        return NONE
    return f"{value.mean:{form}}" + ("" if math.isnan(value.half) else f" ± {value.half:{form.lstrip('+')}}")


def seed_interval_text(value: Estimate, form: str) -> str:
    """ "mean [low, high]"; the mean alone for a single seed."""
    if math.isnan(value.mean) or math.isnan(value.half):
        return half_width_text(value, form)
    return f"{value.mean:{form}} [{value.mean - value.half:{form}}, {value.mean + value.half:{form}}]"


def steps_text(rows: Sequence[SeedRow], name: str) -> str:
    """ "median (seeds that reach it of seeds)"."""
    median, arrived, seeds = reached(rows, name)
    if not seeds:
        return NONE
    return ("not reached" if math.isinf(median) else f"{median:.1f}") + f" ({arrived} of {seeds})"
