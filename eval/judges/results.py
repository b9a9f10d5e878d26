"""From verdicts to outcomes of pairs, and from those to judge.json."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.judges.cache import is_cut_off
from eval.judges.pairs import CompletionPair, Judgement, is_number
from eval.stats import cohen_kappa, length_controlled, position_bias, prompt_means, summary
from train.data.rows import Row, load_rows

JUDGEMENTS = "judgements.jsonl"
NO_OUTCOME = ("unparsable", "failed", "too_long")  # why a pair has no outcome


# From verdicts to outcomes


def row_of(pair: CompletionPair, judged: Judgement | None) -> Row:
    """The row of a pair in judgements.jsonl; `judged` is None for equal texts."""
    kind = "identical" if judged is None else None
    outcome: float | None = 0.5
    aspects: dict[str, float | None] = {}
    if judged is not None:
        kind, outcome = outcome_of(judged)
        if judged.scores is None:
            names = dict.fromkeys(name for order in judged.orders for name in order["aspects"])
            aspects = {name: mean_of_orders(order["aspects"].get(name) for order in judged.orders) for name in names}
    lengths = lengths_of(pair)
    return {
        **pair.key._asdict(),
        "prompt": pair.prompt,
        "a": pair.a,
        "b": pair.b,
        "length_a": lengths[0],
        "length_b": lengths[1],
        "outcome": outcome,
        "kind": kind,
        "aspects": aspects,
        "p": judged.p if judged else None,
        "scores": judged.scores if judged else None,
        "orders": [written(order) for order in judged.orders] if judged else [],
    }


def outcome_of(judged: Judgement) -> tuple[str, float | None]:
    """ "judged" and the outcome for A; or why there is none."""
    if judged.scores is not None:
        a, b = judged.scores
        if a is None or b is None:
            return judged.kind or "unparsable", None
        return "judged", float(a > b) + 0.5 * (a == b)
    if judged.p is not None:
        return "judged", float(judged.p > 0.5) + 0.5 * (judged.p == 0.5)
    outcome = mean_of_orders(order["winner"] for order in judged.orders)
    if outcome is not None:
        return "judged", outcome
    kinds = {order["kind"] for order in judged.orders}
    return next((kind for kind in ("failed", "too_long") if kind in kinds), "unparsable"), None


def mean_of_orders(winners: Iterable[str | None]) -> float | None:
    """The mean outcome for A; None if one order is missing: the other alone would carry the bias of its place."""
    values = [{"a": 1.0, "tie": 0.5, "b": 0.0}.get(winner or "") for winner in winners]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def lengths_of(pair: CompletionPair) -> tuple[float, float]:
    """Tokens where both rows say so, else characters."""
    lengths = (pair.row_a.get("length"), pair.row_b.get("length"))
    if all(type(length) is int for length in lengths):
        return float(lengths[0] or 0), float(lengths[1] or 0)
    return float(len(pair.a)), float(len(pair.b))


def written(order: Mapping[str, Any]) -> dict[str, Any]:
    """An order as it is written: the reply cut, where it is very long."""
    kept = {key: value for key, value in order.items() if key != "text"}
    return kept | {"before": written(order["before"])} if "before" in order else kept


# Results


def results(
    rows: Sequence[Row],
    seed: int,
    gold: Sequence[str] | None = None,
    earlier: Mapping[str, dict[tuple[Any, ...], float]] | None = None,
) -> dict[str, Any]:
    """What follows from the rows of judgements.jsonl.

    Args:
      seed: of the bootstrap.
      gold: "a" or "b" for each row.
      earlier: outcomes of other judges by their directories, see `read_judgements`.
    """
    outcomes = outcomes_of(rows)
    kinds = Counter(row["kind"] for row in rows)
    names = dict.fromkeys(name for row in rows for name in row["aspects"])
    temperatures = dict.fromkeys(row["temperature"] for row in rows if row["temperature"] is not None)
    both = [row for row in rows if row["kind"] == "judged" and row["scores"] is None]
    first = [
        {"first": 1.0, "tie": 0.5, "second": 0.0}[winner_position(order)] for row in both for order in row["orders"]
    ]
    agree = [order_winners(row) for row in both]
    lengths = [np.array([row[f"length_{side}"] for row in rows]) for side in "ab"]
    _, prompt_N = np.unique([str(row["prompt_id"]) for row in rows], return_inverse=True)
    by_length = (
        length_controlled(outcomes, lengths[0], lengths[1], prompt_N, seed) if np.isfinite(outcomes).any() else None
    )
    return {
        "prompts": len({row["prompt_id"] for row in rows}),
        "pairs": len(rows),
        "judged": kinds["judged"],
        "identical": kinds["identical"],
        **{kind: kinds[kind] for kind in NO_OUTCOME},
        "fallback": sum(order["kind"] == "fallback" for row in rows for order in row["orders"]),
        "cut_off": sum(is_cut_off(order.get("finish_reason") or "") for row in rows for order in row["orders"]),
        "wins": int((outcomes > 0.5).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes < 0.5).sum()),
        "win_rate": prompt_summary(rows, lambda row: row["outcome"], seed),
        "length_controlled": by_length,
        "position_bias": position_bias(np.array(first)) if first else None,
        "consistent": sum(one == other for one, other in agree) / len(agree) if agree else None,
        "aspects": {name: prompt_summary(rows, partial(aspect_outcome, name=name), seed) for name in names},
        "temperatures": {
            f"{temperature:g}": prompt_summary([r for r in rows if r["temperature"] == temperature], _outcome, seed)
            for temperature in temperatures
        },
        "agreement": [{"with": name} | kappa_with(rows, other) for name, other in (earlier or {}).items()],
        "accuracy": accuracy(rows, gold) if gold is not None else None,
    }


def _outcome(row: Row) -> float | None:
    return row["outcome"]


def aspect_outcome(row: Row, name: str) -> float | None:
    """The outcome in one aspect; equal texts tie in all."""
    return 0.5 if row["kind"] == "identical" else row["aspects"].get(name)


def outcomes_of(rows: Sequence[Row]) -> np.ndarray:
    return np.array([math.nan if row["outcome"] is None else row["outcome"] for row in rows])


def prompt_summary(rows: Sequence[Row], value: Callable[[Row], float | None], seed: int) -> dict[str, Any]:
    """The summary over prompts of their pairs' mean."""
    of_prompt: dict[Any, list[float | None]] = {}
    for row in rows:
        of_prompt.setdefault(row["prompt_id"], []).append(value(row))
    return summary(prompt_means(list(of_prompt.values())), seed)


def winner_position(order: Mapping[str, Any]) -> str:
    """Where the winner of an order stood."""
    return "tie" if order["winner"] == "tie" else "first" if order["winner"] == order["shown"][0] else "second"


def order_winners(row: Row) -> tuple[str, str]:
    one, other = (order["winner"] for order in row["orders"])
    return one, other


def step_of(file_a: str, file_b: str, pairs: Sequence[CompletionPair]) -> int | None:
    """The training step of both files, if they say so and it is one."""
    steps: set[int | None] = set()
    for file, rows in ((file_a, [pair.row_a for pair in pairs]), (file_b, [pair.row_b for pair in pairs])):
        match = re.fullmatch(r"validation_(\d+)\.jsonl(?:\.gz)?", Path(file).name)
        named = {int(m[1]) if (m := re.search(r"@(\d+)$", str(row.get("checkpoint")))) else None for row in rows}
        steps |= {int(match[1])} if match else named
    return steps.pop() if len(steps) == 1 else None


# Against other judges, and against the truth


def pair_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is to be equal for two judgements to be about the same pair."""
    return row["prompt_id"], row["temperature"], row["sample"], row["a"], row["b"]


def read_judgements(directory: str) -> dict[tuple[Any, ...], float]:
    """The outcomes of earlier judgements; also of those of the exchanged pairs.

    Raises:
      FileNotFoundError: none there.
      ValueError: something else.
    """
    found = {}
    file = Path(directory) / JUDGEMENTS
    for number, row in enumerate(load_rows(str(file)), 1):
        if not {"prompt_id", "temperature", "sample", "a", "b", "outcome"} <= row.keys():
            raise ValueError(f"--agree_with {directory}: {JUDGEMENTS} is not of `python -m eval judge`")
        outcome, at = row["outcome"], f"--agree_with {directory}: {file.name}: row {number}"
        if outcome is not None and not (is_number(outcome) and 0 <= outcome <= 1):
            raise ValueError(f"{at}: expected an outcome from 0 to 1, or null, got {outcome!r:.60}")
        if any(isinstance(value, (list, dict)) for value in pair_key(row)):
            raise ValueError(f"{at}: expected numbers or texts in prompt_id, temperature, sample, a and b")
        if outcome is not None:
            found[pair_key(row | {"a": row["b"], "b": row["a"]})] = 1 - row["outcome"]
            found[pair_key(row)] = row["outcome"]
    return found


def kappa_with(rows: Sequence[Row], other: Mapping[tuple[Any, ...], float]) -> dict[str, Any]:
    """Cohen's kappa of win, tie, loss with another judge's, over the pairs that both have asked about and decided."""
    same = [
        (row["outcome"], other[pair_key(row)])
        for row in rows
        if row["kind"] == "judged" and row["outcome"] is not None and pair_key(row) in other
    ]
    labels = [[int(np.sign(value - 0.5)) for value in values] for values in zip(*same, strict=True)]
    return {"kappa": cohen_kappa(*labels) if same else math.nan, "pairs": len(same)}


def gold_of(pairs: Sequence[CompletionPair], column: str, file: str) -> list[str]:
    """Which answer of each pair is really better.

    Raises:
      ValueError: no such column, or something else than "a" and "b" in it.
    """
    for pair in pairs:
        if pair.row_a.get(column) not in ("a", "b"):
            raise ValueError(
                f'--gold {column}: expected "a" or "b" in every row of {file}, got {pair.row_a.get(column)!r} for '
                f"prompt_id {pair.key.prompt_id}"
            )
    return [pair.row_a[column] for pair in pairs]


class Correctness(NamedTuple):
    """How right a verdict is: 1, 1/2 for a tie, 0."""

    winner: str
    truth: str

    @property
    def share(self) -> float:
        return 0.5 if self.winner == "tie" else float(self.winner == self.truth)


def accuracy(rows: Sequence[Row], gold: Sequence[str]) -> dict[str, Any] | None:
    """How often the judge is right, ties as halves, over the pairs with an outcome; None without one.

    `ab`, `ba`: in each order; `mean` of both; `both`: right twice; `equal`: the same winner twice; `kappa`: Cohen's,
    between the orders. A judge by scores has one verdict, which stands for both.
    """
    found = []
    for row, truth in zip(rows, gold, strict=True):
        if row["kind"] != "judged":
            continue
        verdict = {1.0: "a", 0.5: "tie", 0.0: "b"}
        winners = (verdict[row["outcome"]],) * 2 if row["scores"] is not None else order_winners(row)
        found.append((Correctness(winners[0], truth), Correctness(winners[1], truth)))
    if not found:
        return None
    ab, ba = (np.array([right.share for right in order]) for order in zip(*found, strict=True))
    winners_ab, winners_ba = ([right.winner for right in order] for order in zip(*found, strict=True))
    return {
        "pairs": len(found),
        "ab": float(ab.mean()),
        "ba": float(ba.mean()),
        "mean": float((ab.mean() + ba.mean()) / 2),
        "both": float(((ab == 1) & (ba == 1)).mean()),
        "equal": float(np.mean([one == other for one, other in zip(winners_ab, winners_ba, strict=True)])),
        "kappa": cohen_kappa(winners_ab, winners_ba),
    }
