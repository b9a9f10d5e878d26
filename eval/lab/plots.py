"""The lab's pictures. A method keeps its colour, line style and marker in all pictures; bars and bands are intervals
over seeds. Missing cells are left out, and a caption or sentence says so."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from eval.lab.cells import DISTORTIONS, METHODS, NOISES, PARTS, REGIMES, Cell, situation_text
from eval.lab.results import BASELINE, CurvePoint, Estimate, SeedRow, Tables, by_cell, cell_order, estimate, situation
from eval.pictures import DASHES, MARKERS, MUTED, SERIES, Picture, Studio, over_steps

SHOWN_NOISES = (NOISES[0], NOISES[-1])
USUAL = Cell("")
PANEL = (4.4, 2.9)  # inches
BANDS, BARS = "Bands: 95 % intervals over seeds", "Bars: 95 % intervals over seeds"
END_BARS = "Bars at the ends: 95 % intervals over seeds"
Cells = Mapping[Cell, Sequence[SeedRow]]


class Series(NamedTuple):
    """A method's estimates at positions x."""

    method: str
    x: np.ndarray
    estimates: Sequence[Estimate]


def lab_pictures(folder: Path, tables: Tables) -> tuple[list[Picture], list[str]]:
    """Draws every picture that has data; returns pictures, and a sentence for each picture left out."""
    cells = by_cell(tables.rows)
    names = list(METHODS) + sorted({cell.method for cell in cells} - set(METHODS))
    studio = Studio(folder, names)
    drawn = [
        reward_picture(studio, tables.curves, "steps"),
        reward_picture(studio, tables.curves, "kl"),
        difference_picture(studio, cells),
        distortion_picture(studio, cells),
        effect_picture(studio, cells),
    ]
    pictures = [result for result in drawn if isinstance(result, Picture)]
    return pictures, [result for result in drawn if isinstance(result, str)]


def panels(axes: Axes, columns: int, rows: int = 1, **shared: Any) -> np.ndarray:
    """Replaces the axes by [rows, columns] panels, and enlarges the picture accordingly."""
    figure = axes.figure
    figure.set_size_inches(PANEL[0] * columns + 0.6, PANEL[1] * rows + 0.5)  # type: ignore[union-attr]
    axes.remove()
    axes_grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for one in axes_grid.flat:
        one.set_axisbelow(True)
    return axes_grid


def legend(of: Axes, grid: np.ndarray) -> None:
    """Draws one legend above all panels, with each name once."""
    named: dict[str, Any] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        named |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in named}
    of.figure.legend(named.values(), named, loc="outside upper left", ncols=4, handlelength=2.6)


# against steps, and against KL


def reward_picture(studio: Studio, points: Sequence[CurvePoint], against: Literal["steps", "kl"]) -> Picture | str:
    """Proxy and gold reward of the methods, a column for each noise.

    Against KL, cells with one learning rate for all methods are preferred: a larger rate alone gives more KL.
    """
    usual = [point for point in points if situation(point.cell) == usual_with(point.noise)]
    at_one_rate = [p for p in points if situation(p.cell) == replace(usual_with(p.noise), regime="equal_rms")]
    if against == "kl" and at_one_rate:
        usual = at_one_rate
    noises = [noise for noise in SHOWN_NOISES if any(point.noise == noise for point in usual)]
    what = "against steps" if against == "steps" else "against KL"
    if not noises:
        return f"reward {what}; no cell of {situation_text(USUAL)} or noise {SHOWN_NOISES[1]:g}."

    def paint(axes: Axes) -> None:
        grid = panels(axes, len(noises), 2, sharex=True, sharey="row")
        for column, noise in enumerate(noises):
            grid[0, column].set_title(f"noise {noise:g}", fontsize=11)
            for row, reward in enumerate(("proxy", "gold")):
                for method in studio.style:
                    curve_points = [point for point in usual if point.noise == noise and point.method == method]
                    if curve_points:
                        draw_curve(grid[row, column], studio, curve_points, reward, against)
        for column in range(len(noises)):
            if against == "steps":
                over_steps(grid[1, column], "")
            else:
                grid[1, column].set_xlabel("√KL to the start, KL in nats per completion")
        for row, label in enumerate(("proxy reward", "gold reward")):
            grid[row, 0].set_ylabel(label)
        legend(grid[0, 0], grid)

    caption = (
        "Above the reward that is trained on, below the gold reward that is kept from training, in standard deviations "
        f"of the start. {interval_note(BANDS if against == 'steps' else END_BARS, usual)}"
    )
    if against == "kl" and at_one_rate:
        caption += " Regime equal_rms: one learning rate, one size of advantages."
    if against == "kl":
        caption += " Where gold falls while proxy rises, the proxy is over-optimised (after Gao et al.)."
    grid_methods = [cell.method for cell in PARTS["full"] if situation(cell) == situation(usual[0].cell)]
    caption += missing_note(noise=(SHOWN_NOISES, noises), methods=(grid_methods, methods_of(usual)))
    title = "Proxy and gold reward " + what
    return studio.draw(f"reward_{against}", title, caption, paint)


def draw_curve(axes: Axes, studio: Studio, points: Sequence[CurvePoint], reward: str, against: str) -> None:
    x = np.array([p.step if against == "steps" else max(p.kl, 0) ** 0.5 for p in points])
    mean = np.array([getattr(p, reward) for p in points])
    half = np.array([getattr(p, f"{reward}_half") for p in points])
    look = studio.look(points[0].method)
    if against == "steps":
        axes.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.15, linewidth=0)
    else:  # KL may fall between evaluations, which would tear a band
        axes.errorbar(x[-1:], mean[-1:], half[-1:], color=look["color"], capsize=3, linewidth=1.2)
    axes.plot(x, mean, marker=studio.marker(points[0].method), markersize=4, markevery=[-1], **look)


# every situation


def difference_picture(studio: Studio, cells: Cells) -> Picture | str:
    """Final gold reward minus the baseline's, a line for each situation."""
    compared = {
        cell: difference
        for cell, rows in cells.items()
        if cell.method != BASELINE and np.isfinite((difference := estimate(rows, "gold_difference")).mean)
    }
    if not compared:
        return f"differences to {BASELINE}; no situation has {BASELINE} and another method."
    places = sorted({situation(cell) for cell in compared}, key=cell_order)
    methods = [method for method in studio.style if any(cell.method == method for cell in compared)]
    kinds = [(cell.regime, cell.distortion != "none", cell.group_size) for cell in places]
    breaks = np.cumsum([0] + [0.6 * (one != other) for one, other in zip(kinds[1:], kinds, strict=False)])
    y_of = {cell: i + gap for i, (cell, gap) in enumerate(zip(places, breaks, strict=True))}

    def paint(axes: Axes) -> None:
        axes.figure.set_size_inches(6.4, 1.3 + 0.32 * (max(y_of.values()) + 1.5))  # type: ignore[union-attr]
        axes.axvline(0, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        for method, shift in zip(methods, centred_shifts(len(methods), 0.24), strict=True):
            points = [(y_of[situation(cell)] + shift, one) for cell, one in compared.items() if cell.method == method]
            y, estimates = zip(*points, strict=True)
            errorbars(axes, studio, Series(method, np.array(y), estimates), across=True)
        axes.set_yticks(list(y_of.values()), [situation_text(cell) for cell in y_of])
        axes.set_ylim(max(y_of.values()) + 0.6, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"final gold reward − {BASELINE}'s")

    caption = (
        f"In standard deviations of the start, paired by seed; right of the dashed line a method is better than "
        f"{BASELINE}. "
        f"{interval_note(BARS, rows_in(cells))} Of many intervals without any difference, one in 20 would miss 0."
    )
    caption += missing_note(
        methods=([method for method in METHODS if method != BASELINE], methods),
        regimes=(REGIMES, [cell.regime for cell in places]),
        distortions=(DISTORTIONS, [cell.distortion for cell in places]),
    )
    return studio.draw("differences", f"Final gold reward against {BASELINE}", caption, paint)


# distortions


def distortion_picture(studio: Studio, cells: Cells) -> Picture | str:
    """Final gold reward under every distortion of the proxy's scale, a panel for each noise."""
    usual = {cell: rows for cell, rows in cells.items() if situation(cell) == usual_with(cell.noise, cell.distortion)}
    distorted = {cell.noise for cell in usual if cell.distortion != "none"}
    noises = [noise for noise in SHOWN_NOISES if noise in distorted]
    kinds = [kind for kind in DISTORTIONS if any(cell.distortion == kind and cell.noise in noises for cell in usual)]
    if not noises:
        return "distortions of the proxy's scale; no proxy was distorted."
    methods = methods_of(cell for cell in usual if cell.noise in noises)

    def paint(axes: Axes) -> None:
        grid = panels(axes, len(noises), sharey=True)
        for one, noise in zip(grid.flat, noises, strict=True):
            one.set_title(f"noise {noise:g}", fontsize=11)
            for method, shift in zip(methods, centred_shifts(len(methods), 0.17), strict=True):
                positions = [(i + shift, Cell(method, USUAL.group_size, noise, kind)) for i, kind in enumerate(kinds)]
                drawn = [(x, estimate(usual[cell], "gold")) for x, cell in positions if cell in usual]
                if drawn:
                    x, estimates = zip(*drawn, strict=True)
                    errorbars(one, studio, Series(method, np.array(x), estimates))
            one.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds])
            one.grid(visible=False, axis="x")
        grid[0, 0].set_ylabel("final gold reward")
        legend(grid[0, 0], grid)

    caption = (
        "Every distortion but bf16, which makes ties, keeps the order of the proxy's rewards; ranks do not see it. "
        f"{interval_note(BARS, rows_in(usual))}"
    )
    caption += missing_note(noise=(SHOWN_NOISES, noises), distortions=(DISTORTIONS, kinds), methods=(METHODS, methods))
    return studio.draw("distortions", "Gold reward when the proxy's scale is distorted", caption, paint)


# noise and group size


def effect_picture(studio: Studio, cells: Cells) -> Picture | str:
    """Final gold reward and rank/length correlation against label noise and against the group size."""
    plain = {cell: rows for cell, rows in cells.items() if cell.distortion == "none" and cell.regime == "tuned"}
    over_noise = {cell: rows for cell, rows in plain.items() if cell.group_size == USUAL.group_size}
    at = max((cell.noise for cell in plain if cell.group_size != USUAL.group_size), default=None)
    over_group = {cell: rows for cell, rows in plain.items() if cell.noise == at}
    sides: list[tuple[Cells, str, str, Callable[[Cell], float]]] = []
    if len({cell.noise for cell in over_noise}) > 1:
        sides.append((over_noise, f"G {USUAL.group_size}", "label noise", lambda cell: cell.noise))
    if len({cell.group_size for cell in over_group}) > 1:
        sides.append((over_group, f"noise {at:g}", "completions in a group, G", lambda cell: cell.group_size))
    if not sides:
        return "effects of noise and group size; there is one noise and one group size alone."
    methods = methods_of(cell for side in sides for cell in side[0])

    def paint(axes: Axes) -> None:
        grid = panels(axes, len(sides), 2, sharex="col", sharey="row")
        for column, (cells_of_side, title, label, x_of) in enumerate(sides):
            grid[0, column].set_title(title, fontsize=11)
            for row, name in enumerate(("gold", "rank_length")):
                x_axis(grid[row, column], sorted({x_of(cell) for cell in cells_of_side}))
                for method, shift in zip(methods, centred_shifts(len(methods), 0.02), strict=True):
                    method_cells = {cell: rows for cell, rows in cells_of_side.items() if cell.method == method}
                    if method_cells:
                        x = np.array([shifted(x_of(cell), shift) for cell in method_cells])
                        series = Series(method, x, [estimate(rows, name) for rows in method_cells.values()])
                        errorbars(grid[row, column], studio, series, joined=True)
            grid[1, column].set_xlabel(label)
        for row, label in enumerate(("final gold reward", "rank/length correlation")):
            grid[row, 0].set_ylabel(label)
            grid[row, 0].yaxis.set_major_locator(MaxNLocator(5))
        legend(grid[0, 0], grid)

    caption = (
        "Above the final gold reward, below the correlation of a completion's reward rank with its length, mean over "
        f"the steps of training. {interval_note(BARS, rows_in(plain))}"
    )
    if len(sides) == 1:
        caption += f" Left out: {'label noise' if over_group else 'the group size'}, of which there is one value."
    caption += missing_note(methods=(METHODS, methods))
    return studio.draw("effects", "The effect of label noise and of the group size", caption, paint)


def shifted(x: float, shift: float) -> float:
    """Shifts a noise level, or a group size on its log scale, by a small amount."""
    return x * 2 ** (4 * shift) if x >= 1 else x + shift / 4


def x_axis(axes: Axes, values: Sequence[float]) -> None:
    """Puts a tick at every value; group sizes get a log scale of base 2."""
    if min(values) >= 1:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


# parts


def errorbars(axes: Axes, studio: Studio, series: Series, *, across: bool = False, joined: bool = False) -> None:
    means, halves = np.array([[one.mean, one.half] for one in series.estimates]).T
    i = studio.style[series.method]
    style: dict[str, Any] = {"color": SERIES[i], "marker": MARKERS[i], "markersize": 5, "capsize": 3, "linewidth": 1.4}
    style |= {"label": series.method, "linestyle": DASHES[i] if joined else "none"}
    if across:
        axes.errorbar(means, series.x, xerr=halves, **style)
    else:
        axes.errorbar(series.x, means, yerr=halves, **style)


def centred_shifts(count: int, distance: float) -> np.ndarray:
    """Shifts that place `count` points side by side, centred."""
    return distance * (np.arange(count) - (count - 1) / 2)


def usual_with(noise: float, distortion: str = "none") -> Cell:
    return Cell("", noise=noise, distortion=distortion)


def rows_in(cells: Cells) -> list[SeedRow]:
    return [row for rows in cells.values() for row in rows]


def methods_of(items: Any) -> list[str]:
    """The methods of cells, rows or points, in the order of the grid."""
    methods = {one.method for one in items}
    return [method for method in METHODS if method in methods] + sorted(methods - set(METHODS))


def interval_note(text: str, rows: Sequence[CurvePoint | SeedRow]) -> str:
    """Explains bands or bars; a single seed has no intervals."""
    if isinstance(rows[0], CurvePoint):
        several = any(point.seeds > 1 for point in rows if isinstance(point, CurvePoint))
    else:
        several = len({row.seed for row in rows if isinstance(row, SeedRow)}) > 1
    return f"{text}." if several else "A single seed: no intervals."


def missing_note(**wanted: tuple[Sequence[Any], Sequence[Any]]) -> str:
    """A sentence about the missing values of each NAME=(possible, available); empty if none is missing."""
    parts = []
    for name, (possible, available) in wanted.items():
        missing = [value for value in possible if value not in available]
        if missing:
            parts.append(f"{name} " + ", ".join(value if isinstance(value, str) else f"{value:g}" for value in missing))
    return f" Left out, as no such cell has ended: {'; '.join(parts)}." if parts else ""
