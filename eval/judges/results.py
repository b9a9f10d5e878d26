"""Turns verdicts into outcomes of pairs, and outcomes into the numbers of judge.json."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.judges.pairs import CompletionPair, Judgement
from eval.stats import cohen_kappa, length_controlled, position_bias, prompt_means, summary
from models.names import split_step
from train.data.rows import Row, is_number, load_rows
from train.rewards.chat_api import is_cut_off

JUDGEMENTS = "judgements.jsonl"
NO_OUTCOME = ("unparsable", "failed", "too_long")  # why a pair has no outcome


# From verdicts to outcomes


def row_of(pair: CompletionPair, judged: Judgement | None) -> Row:
    """Builds the row of a pair in judgements.jsonl; `judged` is None for equal texts."""
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
    """Returns "judged" and the outcome for A, or the reason why there is no outcome and None."""
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
    """Mean outcome for A; None if an order has no verdict: one order alone would carry position bias."""
    values = [{"a": 1.0, "tie": 0.5, "b": 0.0}.get(winner or "") for winner in winners]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def lengths_of(pair: CompletionPair) -> tuple[float, float]:
    """Lengths of both answers: in tokens where both rows give them, else in characters."""
    lengths = (pair.row_a.get("length"), pair.row_b.get("length"))
    if all(type(length) is int for length in lengths):
        return float(lengths[0] or 0), float(lengths[1] or 0)
    return float(len(pair.a)), float(len(pair.b))


def written(order: Mapping[str, Any]) -> dict[str, Any]:
    """An order without its full text; `reply` holds the text, shortened if it is very long."""
    fields = {key: value for key, value in order.items() if key != "text"}
    return fields | {"before": written(order["before"])} if "before" in order else fields


# Results


def results(
    rows: Sequence[Row],
    seed: int,
    gold: Sequence[str] | None = None,
    earlier: Mapping[str, dict[tuple[Any, ...], float]] | None = None,
) -> dict[str, Any]:
    """Computes the numbers of judge.json from the rows of judgements.jsonl.

    Args:
      seed: seed of the bootstrap.
      gold: the truly better answer of each row, "a" or "b".
      earlier: outcomes of other judges by directory, see `read_judgements`.
    """
    outcomes = outcomes_of(rows)
    kinds = Counter(row["kind"] for row in rows)
    names = dict.fromkeys(name for row in rows for name in row["aspects"])
    temperatures = dict.fromkeys(row["temperature"] for row in rows if row["temperature"] is not None)
    ordered = [row for row in rows if row["kind"] == "judged" and row["scores"] is None]
    first = [
        {"first": 1.0, "tie": 0.5, "second": 0.0}[winner_position(order)] for row in ordered for order in row["orders"]
    ]
    winners = [order_winners(row) for row in ordered]
    lengths = [np.array([row[f"length_{side}"] for row in rows]) for side in "ab"]
    _, prompt_J = np.unique([str(row["prompt_id"]) for row in rows], return_inverse=True)
    by_length = (
        length_controlled(outcomes, lengths[0], lengths[1], prompt_J, seed) if np.isfinite(outcomes).any() else None
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
        "consistent": sum(one == other for one, other in winners) / len(winners) if winners else None,
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
    """Outcome in one aspect; equal texts tie in every aspect."""
    return 0.5 if row["kind"] == "identical" else row["aspects"].get(name)


def outcomes_of(rows: Sequence[Row]) -> np.ndarray:
    return np.array([math.nan if row["outcome"] is None else row["outcome"] for row in rows])


def prompt_summary(rows: Sequence[Row], value: Callable[[Row], float | None], seed: int) -> dict[str, Any]:
    """Averages a value over each prompt's pairs, then summarizes over prompts."""
    of_prompt: dict[Any, list[float | None]] = {}
    for row in rows:
        of_prompt.setdefault(row["prompt_id"], []).append(value(row))
    return summary(prompt_means(list(of_prompt.values())), seed)


def winner_position(order: Mapping[str, Any]) -> str:
    """Position of an order's winner: "first", "second" or "tie"."""
    return "tie" if order["winner"] == "tie" else "first" if order["winner"] == order["shown"][0] else "second"


def order_winners(row: Row) -> tuple[str, str]:
    one, other = (order["winner"] for order in row["orders"])
    return one, other


def step_of(file_a: str, file_b: str, pairs: Sequence[CompletionPair]) -> int | None:
    """Training step of both files, if both name the same one."""
    steps: set[int | None] = set()
    for file, rows in ((file_a, [pair.row_a for pair in pairs]), (file_b, [pair.row_b for pair in pairs])):
        match = re.fullmatch(r"validation_(\d+)\.jsonl(?:\.gz)?", Path(file).name)
        named_steps = {split_step(str(row.get("checkpoint")))[1] for row in rows}
        steps |= {int(match[1])} if match else {int(step) if step.isdigit() else None for step in named_steps}
    return steps.pop() if len(steps) == 1 else None


# Agreement with other judges, and accuracy


def pair_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The fields that identify a pair across judgements."""
    return row["prompt_id"], row["temperature"], row["sample"], row["a"], row["b"]


def read_judgements(directory: str) -> dict[tuple[Any, ...], float]:
    """Reads the outcomes of earlier judgements; each also stands, mirrored, under the pair with A and B exchanged.

    Raises:
      FileNotFoundError: no judgements in the directory.
      ValueError: not judgements of `eval judge`.
    """
    outcomes = {}
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
            outcomes[pair_key(row | {"a": row["b"], "b": row["a"]})] = 1 - row["outcome"]
            outcomes[pair_key(row)] = row["outcome"]
    return outcomes


def kappa_with(rows: Sequence[Row], other: Mapping[tuple[Any, ...], float]) -> dict[str, Any]:
    """Cohen's kappa of win, tie, loss between two judges, over the pairs that both judged and decided."""
    decided = [
        (row["outcome"], other[pair_key(row)])
        for row in rows
        if row["kind"] == "judged" and row["outcome"] is not None and pair_key(row) in other
    ]
    labels = [[int(np.sign(value - 0.5)) for value in values] for values in zip(*decided, strict=True)]
    return {"kappa": cohen_kappa(*labels) if decided else math.nan, "pairs": len(decided)}


def gold_of(pairs: Sequence[CompletionPair], column: str, file: str) -> list[str]:
    """Reads from a column which answer of each pair is truly better.

    Raises:
      ValueError: no such column, or a value other than "a" and "b".
    """
    for pair in pairs:
        if pair.row_a.get(column) not in ("a", "b"):
            raise ValueError(
                f'--gold {column}: expected "a" or "b" in every row of {file}, got {pair.row_a.get(column)!r} for '
                f"prompt_id {pair.key.prompt_id}"
            )
    return [pair.row_a[column] for pair in pairs]


class Correctness(NamedTuple):
    """A verdict beside the truth; `share` is 1 if they agree, 1/2 for a tie, else 0."""

    winner: str
    truth: str

    @property
    def share(self) -> float:
        return 0.5 if self.winner == "tie" else float(self.winner == self.truth)


def accuracy(rows: Sequence[Row], gold: Sequence[str]) -> dict[str, Any] | None:
    """Share of pairs with an outcome that the judge decides correctly, ties as halves; None without such pairs.

    `ab`, `ba`: accuracy in each order; `mean`: of both; `both`: correct in both orders; `equal`: the same winner in
    both; `kappa`: Cohen's, between the orders. A judge by scores has one verdict, which counts for both orders.
    """
    verdicts = []
    for row, truth in zip(rows, gold, strict=True):
        if row["kind"] != "judged":
            continue
        winner_by_outcome = {1.0: "a", 0.5: "tie", 0.0: "b"}
        winners = (winner_by_outcome[row["outcome"]],) * 2 if row["scores"] is not None else order_winners(row)
        verdicts.append((Correctness(winners[0], truth), Correctness(winners[1], truth)))
    if not verdicts:
        return None
    ab, ba = (np.array([verdict.share for verdict in order]) for order in zip(*verdicts, strict=True))
    winners_ab, winners_ba = ([verdict.winner for verdict in order] for order in zip(*verdicts, strict=True))
    return {
        "pairs": len(verdicts),
        "ab": float(ab.mean()),
        "ba": float(ba.mean()),
        "mean": float((ab.mean() + ba.mean()) / 2),
        "both": float(((ab == 1) & (ba == 1)).mean()),
        "equal": float(np.mean([one == other for one, other in zip(winners_ab, winners_ba, strict=True)])),
        "kappa": cohen_kappa(winners_ab, winners_ba),
    }
