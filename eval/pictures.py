"""Draws pictures in one style: each has one small set of axes and is written as PNG, SVG and SVG inside a page.

A run keeps its colour and its line style in every picture. The colours are Okabe and Ito's (safe for colour-blind
eyes); in the page's SVG they are CSS variables, so that they follow light and dark mode.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.console import visible

# colours of the drawings, and the page's CSS variables for them
INK, MUTED, GRID = "#1b1b1f", "#5c5c67", "#dedee4"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#a8457f", "#6b5bc2", "#8a6d00")
CSS_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {hex: f"--s{i}" for i, hex in enumerate(SERIES)}
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", (0, (5, 2)), (0, (1, 1.2)), "-.", (0, (7, 2, 1, 2, 1, 2)), "--")
SIZE = (5.2, 3.4)  # inches: at a phone's width the text is still legible
LEGEND_LETTERS = 57  # characters in one row of a legend; each entry's line sample takes 8 of them
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
    """A written picture, with the fields that a page shows."""

    name: str  # file name without suffix
    title: str
    caption: str
    svg: Markup  # SVG inside a page


class Studio:
    """Draws pictures into a folder; each name (of a run, of a method) keeps its style."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.style = {name: i % len(SERIES) for i, name in enumerate(names)}
        folder.mkdir(parents=True, exist_ok=True)

    def look(self, name: str) -> dict[str, Any]:
        i = self.style[name]
        label = f" {name}" if name.startswith("_") else name  # a legend leaves "_..." out
        return {"color": SERIES[i], "linestyle": DASHES[i], "label": label}

    def marker(self, name: str) -> str:
        return MARKERS[self.style[name]]

    def draw(self, name: str, title: str, caption: str, paint: Callable[[Axes], None]) -> Picture:
        """Paints on empty axes and writes FOLDER/NAME.png and .svg."""
        with drawing() as figure:
            axes = figure.subplots()
            axes.set_axisbelow(True)
            paint(axes)
            if labels := axes.get_legend_handles_labels()[1]:
                columns = max(1, min(3, LEGEND_LETTERS // (8 + max(map(len, labels)))))
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=2.6)
            show_texts_as_they_are(axes)
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


def inline(svg: str, name: str, title: str, caption: str) -> Markup:
    """Turns an SVG file into a part of an HTML page: unique ids, the page's colours, no references to other files."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    label = escape(f"{title}. {caption}")
    svg = svg.replace("xlink:href", "href").replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg.strip())


def show_texts_as_they_are(axes: Axes) -> None:
    """Has names in labels, titles and notes drawn as text: "$" begins no formula, control characters are shown."""
    legend = axes.get_legend()
    for text in [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else [])]:
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))


def over_steps(axes: Axes, label: str) -> None:
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def text_of(prompt: Any) -> str:
    """Formats a prompt for reading: text unchanged, chat messages one per line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
