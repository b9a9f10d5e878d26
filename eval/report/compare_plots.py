"""Pictures of a comparison: validation curves, win rates, steps to reach; and of results of other evaluations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval.pictures import DASHES, INK, MARKERS, MUTED, SERIES, Picture, Studio, over_steps
from eval.report.judged import name_of
from eval.report.judged_tables import IFEVAL, labels
from eval.report.plots import validation_curve
from eval.sheets import missing, tenths

OVER_PROMPTS = "Band: ± one standard error over prompts."


def comparison_pictures(folder: Path, result: Mapping[str, Any], runs: Mapping[str, Any]) -> list[Picture]:
    """Draws the pictures of a comparison; `runs`: result["runs"], or these and further runs."""
    studio = Studio(folder, list(runs))
    pictures = [
        validation_curve(studio, runs, "reward", "validation_reward", "Validation reward", OVER_PROMPTS),
        validation_curve(studio, runs, "judge", "judge", "Score of the independent judge", OVER_PROMPTS),
        win_rate_picture(studio, result),
        *reach_pictures(studio, result),
    ]
    return [picture for picture in pictures if picture is not None]


def judged_pictures(folder: Path, result: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Draws the results of `eval judge`, if any."""
    studio = Studio(folder, [])
    pictures = [judges_picture(studio, result, others)] if others else []
    return pictures + ([temperature_picture(studio, others)] if any(o.get("temperatures") for o in others) else [])


def win_rate_picture(studio: Studio, result: Mapping[str, Any]) -> Picture:
    rates = [rate for rate in result["win_rate"] if not missing(rate["mean"]) and not missing(rate["low"])]
    a, b = result["a"], result["b"]

    def paint(axes: Axes) -> None:
        steps, means, lows, highs = np.array([[r["step"], r["mean"], r["low"], r["high"]] for r in rates]).T
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        # in ink: the points belong to the comparison, not to one of the runs
        axes.errorbar(steps, means, (means - lows, highs - means), color=INK, marker="o", capsize=4, linewidth=1.4)
        reach = max(0.06, 1.25 * max(abs(lows - 0.5).max(), abs(highs - 0.5).max()))
        over_steps(axes, f"win rate of {a}")
        axes.set_ylim(max(0, 0.5 - reach), min(1, 0.5 + reach))
        for y, name, vertical in ((0.97, a, "top"), (0.03, b, "bottom")):
            axes.text(
                0.99,
                y,
                f"{name} ahead",
                transform=axes.transAxes,
                ha="right",
                va=vertical,
                color=studio.look(name)["color"],
            )

    caption = "Same prompts, same step, by the judge. Bars: 95 % intervals over prompts; dashed: no difference."
    return studio.draw("win_rate", f"Win rate of {a} over {b}", caption, paint)


def reach_pictures(studio: Studio, result: Mapping[str, Any]) -> list[Picture]:
    """Draws for each score the curves, with a mark where the sooner run reaches the other's final score."""
    pictures = []
    for score, label in (("reward", "reward"), ("judge", "judge's score")):
        marks = [mark for mark in result.get("steps_to_reach") or [] if mark["score"] == score]
        marks = [mark for mark in marks if mark["step"] is not None and mark["step"] < mark["final_step"]]
        if marks:
            pictures.append(
                reach_picture(studio, result["runs"], score, label, min(marks, key=lambda mark: mark["step"]))
            )
    return pictures


def reach_picture(studio: Studio, runs: Mapping[str, Any], score: str, label: str, mark: Mapping[str, Any]) -> Picture:
    def paint(axes: Axes) -> None:
        for name, run in runs.items():
            points = [(s["step"], s[score]["mean"]) for s in run["steps"] if not missing(s[score]["mean"])]
            axes.plot(*np.array(points).T, marker=studio.marker(name), markersize=5, **studio.look(name))
        step, target, final = mark["step"], mark["target"], mark["final_step"]
        axes.plot([step, final], [target, target], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot([step, step], [axes.get_ylim()[0], target], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot([step], [target], marker="*", markersize=13, color=INK)
        if mark["low"] is not None:
            ends = [mark["low"], final if mark["high"] is None else mark["high"]]
            axes.plot(ends, [target, target], color=INK, linewidth=4, alpha=0.25)
        over_steps(axes, f"mean validation {label}")

    title = f"{mark['run']} at {mark['reaches']}'s final {label}"
    times = "" if mark["times_as_fast"] is None else f", {mark['times_as_fast']:.2f} times as fast"
    caption = (
        f"The star: {mark['run']} has {mark['reaches']}'s mean of step {mark['final_step']} at step "
        f"{mark['step']:.1f}{times}. Grey bar: 95 % bootstrap interval over prompts, "
        f"[{tenths(mark['low'])}, {tenths(mark['high'])}]."
    )
    return studio.draw(f"steps_to_reach_{score}", title, caption, paint)


def judges_picture(studio: Studio, result: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Picture:
    """Draws a line for each judge: its win rate, and its win rate at equal length."""
    rows: list[tuple[Any, ...]] = [
        (shortened_name(f"{result['judge']}, validation texts"), result["win_rate"][-1], None)
    ]
    rows += [
        (shortened_name(label), judged["win_rate"], judged.get("length_controlled"))
        for label, judged in zip(labels(others), others, strict=True)
    ]
    kinds = ((1, 0.0, "o", INK, "win rate"), (2, 0.22, "D", MUTED, "at equal length"))

    def paint(axes: Axes) -> None:
        at = np.arange(len(rows))  # only beside the points: no line through a name
        axes.vlines(np.full(len(rows), 0.5), at - 0.14, at + 0.36, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for column, below, marker, colour, kind in kinds:
            rates = [(i + below, row[column]) for i, row in enumerate(rows)]
            points = [(y, r["mean"], r["low"], r["high"]) for y, r in rates if r and not missing(r["low"])]
            if points:
                y, means, lows, highs = np.array(points).T
                style: Any = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 4}
                axes.errorbar(means, y, xerr=(means - lows, highs - means), label=kind, **style)
        for i, (name, *_) in enumerate(rows):  # above its points: beside the axes names would leave no room for them
            axes.text(0.01, i - 0.28, name, transform=axes.get_yaxis_transform(), va="center")
        ends = [r[end] for row in rows for r in row[1:] if r and not missing(r["low"]) for end in ("low", "high")]
        reach = max(0.06, 1.1 * max((abs(end - 0.5) for end in ends), default=0))
        axes.set_xlim(max(0, 0.5 - reach), min(1, 0.5 + reach))
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.6)
        axes.set_xlabel(f"win rate of {result['a']} over {result['b']}")

    caption = "The reward model's is that of the last common step. Bars: 95 % intervals over prompts."
    return studio.draw("judges", "Win rate by every judge", caption, paint)


def temperature_picture(studio: Studio, others: Sequence[Mapping[str, Any]]) -> Picture:
    lines: dict[str, list[tuple[float, ...]]] = {}
    names = [name_of(judged) for judged in others]
    names = names if len(set(names)) == len(names) else labels(others)
    for label, judged in zip(names, others, strict=True):
        for temperature, rate in (judged.get("temperatures") or {}).items():
            if not missing(rate["mean"]) and not missing(rate["low"]):
                point = (float(temperature), rate["mean"], rate["low"], rate["high"])
                lines.setdefault(shortened_name(label), []).append(point)
    first = next(judged for judged in others if judged.get("temperatures"))

    def paint(axes: Axes) -> None:
        axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for i, (name, points) in enumerate(lines.items()):
            at, means, lows, highs = np.array(sorted(points)).T
            axes.errorbar(
                at, means, (means - lows, highs - means), color=SERIES[(i + 2) % len(SERIES)],  # two are the runs'
                marker=MARKERS[i % len(MARKERS)], capsize=4, linestyle=DASHES[i % len(DASHES)], linewidth=1.4,
                label=name,
            )  # fmt: skip
        axes.set(xlabel="sampling temperature", ylabel=f"win rate of {first['name_a']}")

    title = f"Win rate of {first['name_a']} over {first['name_b']}, by temperature"
    return studio.draw("temperatures", title, "Bars: 95 % intervals over prompts; dashed: no difference.", paint)


def ifeval_picture(folder: Path, results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Picture:
    """Draws the four accuracies as bars, one colour per result; a run keeps its colour of the other pictures."""
    order = [*names, *(result["name"] for result in results if result["name"] not in names)]
    studio = Studio(folder, order)
    width = 0.8 / len(results)

    def paint(axes: Axes) -> None:
        for i, result in enumerate(results):
            at = np.arange(len(IFEVAL)) - 0.4 + (i + 0.5) * width
            errors = result.get("standard_errors") or {}
            bars = [1.96 * (errors.get(key) or 0) for key in IFEVAL]
            axes.bar(
                at, [result[key] for key in IFEVAL], 0.92 * width, yerr=bars if any(bars) else None, capsize=3,
                color=studio.look(result["name"])["color"], label=result["name"], error_kw={"ecolor": INK},
            )  # fmt: skip
        axes.set_xticks(range(len(IFEVAL)), [key.replace("_", "\n") for key in IFEVAL])
        axes.set(ylim=(0, 1), ylabel="share followed")
        axes.grid(visible=False, axis="x")

    caption = "The share of prompts, and of instructions, that are followed. Bars: 95 %, ± 1.96 standard errors."
    return studio.draw("ifeval", "IFEval", caption, paint)


def shortened_name(name: str, letters: int = 44) -> str:
    """Shortens a judge's name to fit a picture: keeps the end of a path, from a folder on if possible."""
    rest = name
    while len(rest) > letters - 2 and "/" in rest:
        rest = rest.partition("/")[2]
    if len(name) <= letters:
        return name
    return f"…/{rest}" if len(rest) <= letters - 2 else "…" + name[-letters + 1 :]
