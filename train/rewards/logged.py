"""What reward functions have logged: means over all completions of a step, and columns of their table."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.processes import gather_lists, is_distributed
from train.rewards.functions import Scored

Columns = dict[str, list[list[Any]]]  # by name: [P][G] values


def logged_columns(scored: Mapping[str, Scored]) -> Columns:
    """Returns the columns of all functions, under logged/NAME/COLUMN."""
    return {
        f"logged/{name}/{column}": values_PG
        for name, each in scored.items()
        for column, values_PG in each.columns_PG.items()
    }


def place_rows(columns_PG: Columns, part: Columns, rows: Sequence[int], prompts: int) -> None:
    """Writes the columns of some prompts into those of all; what no part has logged is None."""
    for name, values_PG in part.items():
        G = len(values_PG[0])
        whole_PG = columns_PG.setdefault(name, [[None] * G for _ in range(prompts)])
        for row, values_G in zip(rows, values_PG, strict=True):
            whole_PG[row] = values_G


def gather_columns(columns_PG: Columns, own_prompts: int, completions: int) -> Columns:
    """All-gathers the columns of each process' share of the prompts; to be called by all, whatever they have logged.

    Args:
      completions: per prompt (G).
    """
    if not is_distributed():
        return columns_PG
    rows = [{name: values_PG[p] for name, values_PG in columns_PG.items()} for p in range(own_prompts)]
    gathered = _gather_json(rows)
    names = dict.fromkeys(sorted({name for row in gathered for name in row}))
    return {name: [row.get(name, [None] * completions) for row in gathered] for name in names}


def summed_metrics(sums: Mapping[str, Sequence[float]], counts: Mapping[str, float]) -> dict[str, float]:
    """Returns means and counts over all processes; to be called by all, whatever they have logged.

    Args:
      sums: of each metric its sum and the number of values.
      counts: of each metric its sum.
    """
    own: list[Any] = [{"sums": sums, "counts": counts}]
    shares = _gather_json(own) if is_distributed() else own
    totals: dict[str, list[float]] = {}
    for share in shares:
        for name, (total, count) in share["sums"].items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = [before[0] + total, before[1] + count]
    metrics = {name: total / count for name, (total, count) in sorted(totals.items())}
    return metrics | {name: sum(share["counts"][name] for share in shares) for name in counts}


def _gather_json(rows: Sequence[Any]) -> list[Any]:
    return [json.loads(bytes(row)) for row in gather_lists([list(json.dumps(row).encode()) for row in rows])]
