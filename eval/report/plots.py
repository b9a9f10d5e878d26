"""Pictures of a report: training and validation curves, advantages, reliability."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes

from eval.pictures import MUTED, SERIES, Picture, Studio, over_steps, text_of
from eval.runs import PolicyRun
from gopo_jax import gopo_advantages, grpo_advantages


def training_pictures(folder: Path, runs: Sequence[PolicyRun]) -> list[Picture]:
    """Draws the metrics that the runs logged at every step."""
    studio = Studio(folder, [run.name for run in runs])
    smooth = f"Thick: mean over {smoothing_width(runs)} neighbouring steps; faint: every step."
    training = [
        ("reward", "training_reward", "Training reward", "mean reward of a step", smooth),
        ("kl", "kl", "KL to the start", "nats per token", smooth),
        ("completions/mean_length", "length", "Completion length", "mean tokens per completion", smooth),
        ("entropy", "entropy", "Entropy of the policy", "nats per token", smooth),
        ("grad_norm", "grad_norm", "Gradient norm", "before clipping", smooth),
    ]
    pictures = [
        training_curve(studio, runs, key, file, title, label, caption) for key, file, title, label, caption in training
    ]
    return [picture for picture in pictures if picture is not None]


def smoothing_width(runs: Sequence[PolicyRun]) -> int:
    """The odd number of steps to smooth over: about a tenth of the longest run."""
    return 2 * (max(len(run.metrics) for run in runs) // 20) + 1


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving mean; near both ends it covers fewer values."""
    kernel = np.ones(min(width, 2 * len(values) - 1))
    full = np.convolve(values, kernel) / np.convolve(np.ones(len(values)), kernel)
    return full[len(kernel) // 2 :][: len(values)]


def training_curve(
    studio: Studio, runs: Sequence[PolicyRun], key: str, file: str, title: str, label: str, caption: str
) -> Picture | None:
    series = {run.name: run.series(key) for run in runs}
    if not any(len(steps) for steps, _ in series.values()):
        return None
    width = smoothing_width(runs)

    def paint(axes: Axes) -> None:
        for name, (steps, values) in series.items():
            if len(steps):
                look = studio.look(name)
                axes.plot(steps, values, color=look["color"], alpha=0.22, linewidth=1)
                axes.plot(steps, smoothed(values, width), **look)
        over_steps(axes, label)

    return studio.draw(file, title, caption, paint)


def validation_curve(
    studio: Studio, described: Mapping[str, Any], score: str, file: str, title: str, caption: str
) -> Picture | None:
    points = {
        name: [
            (s["step"], s[score]["mean"], s[score]["standard_error"] or 0)
            for s in run["steps"]
            if s[score]["mean"] is not None
        ]
        for name, run in described.items()
    }
    points = {name: scores for name, scores in points.items() if scores}
    if not points:
        return None

    def paint(axes: Axes) -> None:
        for name, scores in points.items():
            steps, means, errors = np.array(scores).T
            look = studio.look(name)
            axes.fill_between(steps, means - errors, means + errors, color=look["color"], alpha=0.18, linewidth=0)
            axes.plot(steps, means, marker=studio.marker(name), markersize=5, **look)
        over_steps(axes, "mean score")

    return studio.draw(file, title, caption, paint)


def reliability_picture(folder: Path, bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """Draws the accuracy of reward models against their confidence; `bins` come from `train.supervised.calibration`.

    The area of a point is its share of the comparisons.
    """
    studio = Studio(folder, list(bins))

    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        lowest = 0.5
        for name, rows in bins.items():
            points = [(row["confidence"], row["accuracy"], row["count"]) for row in rows if row["count"]]
            confidence, accuracy, count = np.array(points).T
            look = studio.look(name)
            axes.plot(confidence, accuracy, **look | {"linewidth": 1.2})
            axes.scatter(
                confidence, accuracy, 12 + 500 * count / count.sum(), color=look["color"], marker=studio.marker(name),
                alpha=0.7, linewidth=0,
            )  # fmt: skip
            lowest = min(lowest, accuracy.min())
        axes.set(xlabel="probability that the model gives", ylabel="share in which it is right")
        axes.set(xlim=(0.48, 1.02), ylim=(max(lowest - 0.06, -0.03), 1.04))

    caption = (
        "Held-out comparisons by the probability that the model gives to its choice, in 10 bins; a point's area is its "
        "share of them. On the dashed line it is right as often as it says; below, it is too sure."
    )
    return studio.draw("reliability", "Reliability of the reward models", caption, paint)


def advantage_pictures(folder: Path, runs: Sequence[PolicyRun], groups: Sequence["Group"]) -> list[Picture]:
    """Draws the same rewards as z-scores and as ranks, a picture per group, in the colours of the two methods."""
    studio = Studio(folder, [run.name for run in runs])
    colours = {str(run.config.get("advantage")): studio.look(run.name)["color"] for run in reversed(runs)}
    spare = [colour for colour in SERIES if colour not in colours.values()]
    ranks, scores = colours.get("gopo", spare[0]), colours.get("grpo", spare[1])

    def picture(i: int, group: Group) -> Picture:
        rewards_G = np.sort(group.rewards)

        def paint(axes: Axes) -> None:
            axes.axhline(0, color=MUTED, linewidth=1)
            for advantages_G, label, colour, marker, dash in (
                (gopo_advantages(rewards_G), "ranks (GOPO)", ranks, "o", "-"),
                (grpo_advantages(rewards_G), "z-scores (GRPO)", scores, "s", (0, (5, 2))),
            ):
                axes.plot(
                    rewards_G,
                    np.asarray(advantages_G),
                    marker=marker,
                    linestyle=dash,
                    color=colour,
                    label=label,
                    markersize=6,
                )
            axes.set(xlabel="reward of a completion", ylabel="advantage", ylim=(-2.9, 2.9))

        caption = f"{len(rewards_G)} completions of “{group.prompt}” (skewness {round(group.skewness, 1) + 0:+.1f})."
        return studio.draw(f"advantages_{i}", group.title, caption, paint)

    return [picture(i, group) for i, group in enumerate(groups, 1)]


@dataclass(frozen=True)
class Group:
    """The rewards of one prompt's completions."""

    title: str
    prompt: str
    rewards: np.ndarray
    skewness: float


def pick_groups(runs: Sequence[PolicyRun], size: int = 8) -> list[Group]:
    """Picks three real groups of `size` completions: with the lowest, the smallest absolute and the highest skewness.

    If validation samples fewer than `size` completions of a prompt, a group is filled from the runs with the first
    run's rewards and from earlier steps: newest step first, the runs in turn.
    """
    same_reward = [run for run in runs if run.config.get("rewards") == runs[0].config.get("rewards")]
    rewards: dict[int, list[float]] = {}
    prompts: dict[int, Any] = {}
    for step in sorted({step for run in same_reward for step in run.steps}, reverse=True):
        for run in (run for run in same_reward if step in run.steps):
            table = run.completions(step)
            prompts |= table.prompts
            for prompt_id, values in zip(table.prompts, table.column("reward"), strict=True):
                rewards.setdefault(prompt_id, []).extend(value for value in values if value is not None)
        if all(len(values) >= size for values in rewards.values()):
            break
    groups = {i: np.array(values[:size]) for i, values in rewards.items() if len(values) >= size}
    groups = {i: values for i, values in groups.items() if not np.allclose(values, values[0], rtol=1e-9, atol=0)}
    if not groups:
        return []
    skew = dict(zip(groups, scipy.stats.skew(list(groups.values()), axis=1).tolist(), strict=True))
    chosen = {
        "Most skewed down": min(skew, key=lambda i: skew[i]),
        "Least skewed": min(skew, key=lambda i: abs(skew[i])),
        "Most skewed up": max(skew, key=lambda i: skew[i]),
    }
    return [Group(title, text_of(prompts[i]), groups[i], skew[i]) for title, i in chosen.items()]
