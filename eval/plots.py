"""The pictures of a report. Each is one small set of axes, written as PNG and SVG, and as SVG for the page.

A run keeps its colour and its line style in every picture. The colours are Okabe and Ito's (safe for colour-blind
eyes); in the page's SVG they are CSS variables, so that they follow light and dark.
"""

import html
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.runs import PolicyRun
from gopo_jax import gopo_advantages, grpo_advantages

# what is drawn in -> the page's CSS variable
INK, MUTED, GRID = "#1b1b1f", "#5c5c67", "#dedee4"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8457f", "#6b5bc2", "#8a6d00")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {hex: f"--s{i}" for i, hex in enumerate(SERIES)}
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", (0, (5, 2)), (0, (1, 1.2)), "-.", (0, (7, 2, 1, 2, 1, 2)), "--")
SIZE = (5.2, 3.4)  # inches: at a phone's width the text is still legible
LETTERS = 57  # that have room beside each other in a legend, of which a line takes 8
SETTINGS: Any = {
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same picture is the same file
}


@dataclass(frozen=True)
class Picture:
    """A picture that has been written, and what the page needs of it."""

    name: str  # of its files, without suffix
    title: str
    caption: str
    svg: str  # to stand in a page


class Studio:
    """Draws the pictures of some runs into a folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.style = {name: i % len(SERIES) for i, name in enumerate(names)}
        folder.mkdir(parents=True, exist_ok=True)

    def look(self, name: str) -> dict[str, Any]:
        i = self.style[name]
        return {"color": SERIES[i], "linestyle": DASHES[i], "label": name}

    def marker(self, name: str) -> str:
        return MARKERS[self.style[name]]

    def draw(self, name: str, title: str, caption: str, paint: Callable[[Axes], None]) -> Picture:
        """Paint on empty axes, write FOLDER/NAME.png and .svg."""
        with drawing() as figure:
            axes = figure.subplots()
            axes.set_axisbelow(True)
            paint(axes)
            if labels := axes.get_legend_handles_labels()[1]:
                columns = max(1, min(3, LETTERS // (8 + max(map(len, labels)))))
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=2.6)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out once, not for each file
            figure.savefig(self.folder / f"{name}.png", dpi=150)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue()
        on_paper = re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="#ffffff"/>', svg, count=1)
        (self.folder / f"{name}.svg").write_text(on_paper, encoding="utf-8")
        return Picture(name, title, caption, inline(svg, name, title, caption))


@contextmanager
def drawing() -> Iterator[Figure]:
    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=SIZE, layout="constrained")  # no pyplot: no window, no global state


def inline(svg: str, name: str, title: str, caption: str) -> str:
    """An SVG file as part of an HTML page: ids of its own, the page's colours, nothing that points elsewhere."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    label = html.escape(f"{title}. {caption}")
    svg = svg.replace("xlink:href", "href").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def training_pictures(folder: Path, runs: Sequence[PolicyRun]) -> list[Picture]:
    """The pictures of what the runs logged at every step."""
    studio = Studio(folder, [run.name for run in runs])
    smooth = f"Thick: mean over {window(runs)} neighbouring steps; faint: every step."
    training = [
        ("reward", "training_reward", "Training reward", "mean reward of a step", smooth),
        ("kl", "kl", "KL to the start", "nats per token", smooth),
        ("completions/mean_length", "length", "Completion length", "mean tokens per completion", smooth),
        ("entropy", "entropy", "Entropy of the policy", "nats per token", smooth),
        ("grad_norm", "grad_norm", "Gradient norm", "before clipping", smooth),
    ]
    found = [
        training_curve(studio, runs, key, file, title, label, caption) for key, file, title, label, caption in training
    ]
    return [picture for picture in found if picture is not None]


def window(runs: Sequence[PolicyRun]) -> int:
    """The odd number of steps that smoothing averages over: about a tenth of the longest run."""
    return 2 * (max(len(run.metrics) for run in runs) // 20) + 1


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The centred moving mean, over fewer values at both ends."""
    kernel = np.ones(min(width, 2 * len(values) - 1))
    full = np.convolve(values, kernel) / np.convolve(np.ones(len(values)), kernel)
    return full[len(kernel) // 2 :][: len(values)]


def over_steps(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def training_curve(
    studio: Studio, runs: Sequence[PolicyRun], key: str, file: str, title: str, label: str, caption: str
) -> Picture | None:
    series = {run.name: run.series(key) for run in runs}
    if not any(len(steps) for steps, _ in series.values()):
        return None
    width = window(runs)

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
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None

    def paint(axes: Axes) -> None:
        for name, found in points.items():
            steps, means, errors = np.array(found).T
            look = studio.look(name)
            axes.fill_between(steps, means - errors, means + errors, color=look["color"], alpha=0.18, linewidth=0)
            axes.plot(steps, means, marker=studio.marker(name), markersize=5, **look)
        over_steps(axes, "mean score")

    return studio.draw(file, title, caption, paint)


def reliability(folder: Path, bins: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture:
    """How often each of some reward models is right, against how sure it is; `bins` as
    `train.supervised.calibration` makes them.

    The area of a point is its share of the comparisons.
    """
    studio = Studio(folder, list(bins))

    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        lowest = 0.5
        for name, rows in bins.items():
            found = [(row["confidence"], row["accuracy"], row["count"]) for row in rows if row["count"]]
            confidence, accuracy, count = np.array(found).T
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
    """The same rewards as z-scores and as ranks, one picture a group; the colours are those of the two methods."""
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
    """Real groups of `size` completions of one prompt, by rule: of all prompts, those with the lowest, the smallest
    absolute and the highest skewness of the rewards.

    Validation may draw fewer than `size` completions of a prompt; a group is then filled from the runs with the
    first one's rewards, and from earlier steps: newest step first, the runs in turn.
    """
    alike = [run for run in runs if run.config.get("rewards") == runs[0].config.get("rewards")]
    rewards: dict[int, list[float]] = {}
    prompts: dict[int, Any] = {}
    for step in sorted({step for run in alike for step in run.steps}, reverse=True):
        for run in (run for run in alike if step in run.steps):
            table = run.completions(step)
            prompts |= table.prompts
            for prompt_id, values in zip(table.prompts, table.column("reward"), strict=True):
                rewards.setdefault(prompt_id, []).extend(value for value in values if value is not None)
        if all(len(values) >= size for values in rewards.values()):
            break
    groups = {i: np.array(values[:size]) for i, values in rewards.items() if len(values) >= size}
    skew = {i: skewness(values) for i, values in groups.items() if np.ptp(values) > 0}
    if not skew:
        return []
    chosen = {
        "Most skewed down": min(skew, key=lambda i: skew[i]),
        "Least skewed": min(skew, key=lambda i: abs(skew[i])),
        "Most skewed up": max(skew, key=lambda i: skew[i]),
    }
    return [Group(title, text_of(prompts[i]), groups[i], skew[i]) for title, i in chosen.items()]


def skewness(values: np.ndarray) -> float:
    centred = values - values.mean()
    return float((centred**3).mean() / (centred**2).mean() ** 1.5)


def text_of(prompt: Any) -> str:
    """A prompt to read: text as it is, chat messages one under the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
