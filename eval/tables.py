"""The tables of a comparison: made once, shown in the terminal, in Markdown and in HTML."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

NONE = "–"


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{text}\n" + (f"\n{self.note}\n" if self.note else "")

    def html(self) -> str:
        escape = html.escape
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = "".join(
            f'<tr><th scope="row" data-label="{escape(self.columns[0])}">{escape(row[0])}</th>'
            + "".join(
                f'<td data-label="{escape(column)}">{escape(cell)}</td>'
                for column, cell in zip(self.columns[1:], row[1:], strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f"<h3>{escape(self.title)}</h3><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def reward_models(models: Sequence[Mapping[str, Any]]) -> Sheet:
    """Accuracy of each reward model beside what preferring the longer answer would get."""
    return Sheet(
        "Reward models",
        ("reward model", "role", "step", "accuracy", "length alone", "ECE"),
        [
            (m["path"], m["role"], count(m["step"]), *map(percent, (m["accuracy"], m["length_baseline"], m["ece"])))
            for m in models
        ],
        "Accuracy: the share of held-out comparisons in which the chosen answer scores higher; length alone: if the "
        "longer answer were always preferred; ECE: how far accuracy and stated probability are apart, on average.",
    )


def policies(runs: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Reward and judge score of each policy before and after, with the paired gains."""
    rows = []
    for name, run in runs.items():
        first, last, gain = run["steps"][0], run["steps"][-1], run["gain"]
        steps = f"{gain['from_step']} to {gain['to_step']}"
        for score in ("reward", "judge"):
            change = gain[score]
            cells = (number(first[score]["mean"]), number(last[score]["mean"]), gain_text(change))
            rows.append((f"{name}, {score}", steps, *cells, tenths(change["in_standard_errors"])))
    return Sheet(
        "Policies, before and after",
        ("score of", "steps", "before", "after", "gain", "in s.e."),
        rows,
        "Reward: by the reward model trained against; judge: by the other one. Means over validation prompts; "
        "gain: paired over prompts, ± its standard error (s.e.).",
    )


def final_win_rate(result: Mapping[str, Any]) -> Sheet:
    last = result["win_rate"][-1]
    name = f"{result['a']} over {result['b']}"
    return Sheet(
        "Win rate at the last common step, by the judge",
        ("policies", "step", "win rate", "95 % interval", "prompts"),
        [(name, count(last["step"]), number(last["mean"]), interval(last), count(last["prompts"]))],
        f"Over all pairs of completions of a prompt, equal scores count one half. Interval: {result['interval']}.",
    )


def by_step(result: Mapping[str, Any]) -> Sheet:
    """Win rate and judge score at every common step."""
    a, b = result["a"], result["b"]
    rows = []
    for i, rate in enumerate(result["win_rate"]):
        judged = (plus_minus(result["runs"][name]["steps"][i]["judge"]) for name in (a, b))
        rows.append((count(rate["step"]), number(rate["mean"]), interval(rate), *judged))
    return Sheet(
        f"{a} over {b}, step by step, by the judge",
        ("step", "win rate", "95 % interval", f"score {a}", f"score {b}"),
        rows,
        "Scores: mean ± standard error over prompts.",
    )


def rewards_by_step(runs: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Validation reward of every run at every step."""
    found = {name: {step["step"]: step["reward"] for step in run["steps"]} for name, run in runs.items()}
    steps = sorted({step for rewards in found.values() for step in rewards})
    cells = [[plus_minus(rewards[step]) if step in rewards else NONE for rewards in found.values()] for step in steps]
    return Sheet(
        "Validation reward, step by step",
        ("step", *found),
        [(count(step), *row) for step, row in zip(steps, cells, strict=True)],
        "By the reward model trained against; mean ± standard error over prompts.",
    )


def missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.3f}"


def signed(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:+.3f}"


def percent(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.0f}"


def plus_minus(estimate: Mapping[str, Any]) -> str:
    if missing(estimate["mean"]):
        return NONE
    return f"{number(estimate['mean'])} ± {number(estimate['standard_error'])}"


def interval(estimate: Mapping[str, Any]) -> str:
    return f"[{number(estimate['low'])}, {number(estimate['high'])}]"


def tenths(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.1f}"


def gain_text(gain: Mapping[str, Any]) -> str:
    return NONE if missing(gain["mean"]) else f"{signed(gain['mean'])} ± {number(gain['standard_error'])}"
