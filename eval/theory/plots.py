"""The pictures of `python -m eval theory`: predictions as lines, sampled training as dots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from eval.pictures import INK, MARKERS, MUTED, SERIES, Picture, Studio

DOTS = "Lines: predicted; dots: trained on sampled groups, RLHF's with RLOO and k2."


def theory_pictures(folder: Path, result: Mapping[str, Any]) -> list[Picture]:
    settings, curves = result["settings"], result["curves"]
    beta, size = f"beta {settings['at_beta']:g}", f"G = {settings['at_group_size']}"
    studio, by_size = Studio(folder, list(curves["beta"]["lines"])), Studio(folder, [])
    same = studio.style[f"GRPO, {size}"]  # a method keeps its look in all pictures
    by_size.style = {name: studio.style.get(name, same) for name in curves["group_size"]["lines"]}
    return [
        curve_picture(studio, curves["beta"], "beta", "beta, weight of the penalty", f"{size}. {DOTS}"),
        curve_picture(by_size, curves["group_size"], "group_size", "G, completions of a group", f"{beta}. {DOTS}"),
        curve_picture(
            studio, curves["noise"], "noise", "standard deviation of the rewards' noise", f"{beta}, {size}. {DOTS}"
        ),
        penalty_picture(folder, result["penalties"]),
        gradient_picture(folder, result["gradients"]),
    ]


def curve_picture(studio: Studio, curve: Mapping[str, Any], axis: str, label: str, caption: str) -> Picture:
    def paint(axes: Axes) -> None:
        for name, line in curve["lines"].items():
            axes.plot(curve["x"], line, **studio.look(name))
        for name, points in curve["dots"].items():
            x, y = np.array(points).T
            style: Any = {"color": studio.look(name)["color"], "marker": studio.marker(name)}
            axes.plot(x, y, linestyle="none", markersize=6, markeredgecolor="white", **style)
        axes.set(xlabel=label, ylabel="best answer's probability", ylim=(-0.03, 1.03))
        if axis != "noise":
            ticks = curve["x"] if axis == "group_size" else sorted({x for d in curve["dots"].values() for x, _ in d})
            logarithmic(axes, ticks)

    title = "The stationary probability of the best answer"
    return studio.draw(f"over_{axis}", f"{title} against {label}", caption, paint)


def logarithmic(axes: Axes, ticks: list[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:,g}" for tick in ticks])


def penalty_picture(folder: Path, penalties: Mapping[str, Any]) -> Picture:
    """Draws GOPO's sampled training with each estimator of the penalty, and the two fixed points."""
    names = {"k3": "k3 in the loss", "k2": "k2 in the loss", "k1": "k1 in the loss", "none": "no penalty"}
    ends = {"k3": "fixed point of k3", "k2": "fixed point of direct KL"}
    studio = Studio(folder, list(names.values()))

    def paint(axes: Axes) -> None:
        for kl, name in names.items():
            wide = {"linewidth": 6, "alpha": 0.35, "linestyle": "-"} if kl == "none" else {}
            axes.plot(penalties["steps"], penalties["paths"][kl], **studio.look(name) | wide)
        for kl, text in ends.items():
            colour = studio.look(names[kl])["color"]
            axes.axhline(penalties["fixed"][kl], color=colour, linewidth=1, linestyle=(0, (1, 2)))
            axes.text(penalties["steps"][-1], penalties["fixed"][kl] + 0.02, text, color=colour, ha="right")
        axes.set(xlabel="step", ylabel="best answer's probability", ylim=(-0.03, 1.03))
        logarithmic(axes, [tick for tick in (1, 10, 100, 1000, 10_000) if tick <= penalties["steps"][-1]])

    caption = (
        f"GOPO, beta {penalties['beta']:g}, sampled groups. k1's gradient is zero in the mean: as without a penalty, "
        f"nothing holds the policy."
    )
    return studio.draw("penalties", "The penalty's estimators in the loss", caption, paint)


def gradient_picture(folder: Path, ratios: Mapping[str, Any]) -> Picture:
    studio = Studio(
        folder, ["expected gradient, these answers", "better answer rare", "one completion's advantage, no ties"]
    )
    lines = dict(zip(studio.style, (ratios["here"], ratios["rare"], ratios["samples"]), strict=True))

    def paint(axes: Axes) -> None:
        sizes = ratios["group_sizes"]
        axes.axvspan(sizes[0], ratios["rare_above_1_up_to"], color=SERIES[2], alpha=0.1, linewidth=0)
        axes.fill_between(sizes, ratios["lowest"], ratios["highest"], color=MUTED, alpha=0.2, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for i, (name, line) in enumerate(lines.items()):
            axes.plot(sizes, line, marker=MARKERS[i], markersize=4, **studio.look(name))
        axes.set(xlabel="G, completions of a group", ylabel="GOPO's norm / GRPO's", ylim=(0, None))
        logarithmic(axes, sizes)
        axes.text(sizes[0] * 1.04, 0.1, "above 1 however rare\nthe better answer", color=INK, va="bottom")

    caption = (
        "Expected gradients' norms; grey: their range over random policies and rewards. Shaded, up to G = 5: our "
        "derivation, 2 sqrt(G) / (G - 1) > 1, of where GOPO's is larger; the words of the paper's Theorem 3.1 on it "
        "are not known to us."
    )
    return studio.draw("gradients", "GOPO's gradient norm over GRPO's", caption, paint)
