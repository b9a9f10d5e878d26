"""Numbers of the lab's cells: per seed, paired with those of a baseline, and intervals over seeds.

The seed is the unit: each quantity is averaged over validation prompts and completions first, which gives one number
per seed; intervals are over seeds only. A seed gives every method of a situation the same start, proxy and prompts;
therefore methods are compared seed by seed. Every number is rounded to 5 digits, so that tables and pictures are the
same whether they are drawn from cells or from the CSV files of `eval.lab.tables`.
"""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

import gopo_jax
from eval.lab.cells import DISTORTIONS, METHODS, REGIMES, Cell, CellOutcome
from eval.report.steps import first_crossing
from eval.stats import mean_and_interval, win_rate_of_pairs

BASELINE, DIGITS = "grpo", 5
LIBRARIES = ("jax", "flax", "optax", "numpy")


class SeedRow(NamedTuple):
    """A cell's numbers for one seed. NaN: undefined; infinite steps: not reached.

    Rewards are in standard deviations of the start, kl in nats per completion, length in tokens. The baseline is the
    cell of the same situation with the method "grpo"; its rows are compared with themselves.
    """

    method: str
    group_size: int
    noise: float
    distortion: str
    regime: str
    seed: int
    learning_rate: float
    beta: float
    proxy_accuracy: float
    last_step: int  # step of the last evaluation, the source of "final" numbers
    proxy_start: float
    gold_start: float
    proxy: float  # final
    gold: float  # final
    proxy_gain: float  # final - start
    gold_gain: float
    gain_gap: float  # proxy_gain - gold_gain
    kl: float  # final
    length: float  # final
    gold_peak: float  # over the evaluations
    peak_step: int
    over_optimisation: float  # gold_peak - gold
    rank_length: float  # correlation, mean over the steps of training
    common_kl: float  # the smaller final kl of the two compared cells
    gold_at_kl: float  # gold reward where the policy first reaches common_kl
    compared_at: int  # the last step that both evaluated; 0: no comparison, and all later fields are NaN
    proxy_difference: float
    gold_difference: float
    gold_at_kl_difference: float
    win_rate: float  # by the gold reward
    steps_to_proxy: float  # to the baseline's final proxy reward
    steps_to_gold: float

    @property
    def cell(self) -> Cell:
        return Cell(*self[:5])


COMPARED = SeedRow._fields[SeedRow._fields.index("compared_at") + 1 :]


class CurvePoint(NamedTuple):
    """A cell at one evaluation: means over seeds, and the half-widths of their intervals (NaN for a single seed)."""

    method: str
    group_size: int
    noise: float
    distortion: str
    regime: str
    step: int
    seeds: int
    proxy: float
    proxy_half: float
    gold: float
    gold_half: float
    kl: float
    kl_half: float
    length: float
    length_half: float

    @property
    def cell(self) -> Cell:
        return Cell(*self[:5])


class Tables(NamedTuple):
    """The data of the lab's table, files and pictures."""

    command: str
    seeds: tuple[int, ...]
    versions: str
    rows: Sequence[SeedRow]
    curves: Sequence[CurvePoint]


class Estimate(NamedTuple):
    mean: float
    half: float  # half-width: the interval is mean ± half; NaN without an interval
    seeds: int


def summarize(outcomes: Iterable[CellOutcome], command: str) -> Tables:
    """Computes the numbers of all given cells, in the order of situations and methods.

    Args:
      outcomes: cells of any part of the grid; a situation without the baseline has no comparison.
      command: the command that made them; it is written into the files.

    Raises:
      ValueError: no cell, a duplicate cell, or arrays of inconsistent shapes.
    """
    ordered = sorted(outcomes, key=lambda outcome: cell_order(outcome.cell))
    if not ordered:
        raise ValueError("lab: expected at least one cell that has ended, got none; run `python -m eval lab` first")
    situations: dict[Cell, dict[str, CellOutcome]] = {}
    for outcome in ordered:
        check_shapes(outcome)
        methods = situations.setdefault(situation(outcome.cell), {})
        if outcome.cell.method in methods:
            raise ValueError(f"{outcome.cell.name}: expected each cell once, got it twice")
        methods[outcome.cell.method] = outcome
    rows = [row for methods in situations.values() for row in rows_of(methods)]
    curves = [point for outcome in ordered for point in curve(outcome)]
    seeds = sorted({row.seed for row in rows})
    made_with = dict.fromkeys(versions_text(outcome.about.get("versions") or versions()) for outcome in ordered)
    return Tables(command, tuple(seeds), " | ".join(made_with), rows, curves)


def situation(cell: Cell) -> Cell:
    """A cell without its method."""
    return replace(cell, method="")


def cell_order(cell: Cell) -> tuple[int, int, int, float, int]:
    """Sort key of a cell in tables."""
    order = [names.index(name) if name in names else len(names) for names, name in (
        (REGIMES, cell.regime), (DISTORTIONS, cell.distortion), (METHODS, cell.method)
    )]  # fmt: skip
    return (order[0], order[1], cell.group_size, cell.noise, order[2])


def check_shapes(outcome: CellOutcome) -> None:
    """Refuses arrays whose numbers of seeds or evaluations differ from the cell's."""
    N, M = len(outcome.about["seeds"]), len(outcome.steps_M)
    for name in ("proxy_NMPG", "gold_NMPG", "length_NMPG", "kl_NMPG"):
        shape = getattr(outcome, name).shape
        if len(shape) != 4 or shape[:2] != (N, M) or 0 in shape:
            raise ValueError(
                f"{outcome.cell.name}: {name}: expected [{N} seeds, {M} evaluations, prompts, completions], got "
                f"{list(shape)}; delete the file and run the cell again"
            )


# one cell


def seed_curves(outcome: CellOutcome) -> dict[str, np.ndarray]:
    """proxy, gold, kl and length [N, M], averaged over prompts and completions."""
    arrays = {
        "proxy": outcome.proxy_NMPG,
        "gold": outcome.gold_NMPG,
        "kl": outcome.kl_NMPG,
        "length": outcome.length_NMPG,
    }
    return {name: array.mean((2, 3), dtype=np.float64) for name, array in arrays.items()}


def own_numbers(outcome: CellOutcome) -> dict[str, np.ndarray]:
    """The numbers [N] of a cell that need no comparison, by their names in `SeedRow`."""
    mean_NM = seed_curves(outcome)
    seeds = np.arange(len(mean_NM["gold"]))
    peak_N = mean_NM["gold"].argmax(1)
    start = {name: values_NM[:, 0] for name, values_NM in mean_NM.items()}
    final = {name: values_NM[:, -1] for name, values_NM in mean_NM.items()}
    gold_peak = mean_NM["gold"][seeds, peak_N]
    proxy_gain, gold_gain = final["proxy"] - start["proxy"], final["gold"] - start["gold"]
    no_value = np.full(len(seeds), math.nan)
    return final | {
        "proxy_accuracy": np.broadcast_to(outcome.about.get("proxy_accuracy", math.nan), no_value.shape),
        "proxy_start": start["proxy"],
        "gold_start": start["gold"],
        "proxy_gain": proxy_gain,
        "gold_gain": gold_gain,
        "gain_gap": proxy_gain - gold_gain,
        "gold_peak": gold_peak,
        "peak_step": outcome.steps_M[peak_N],
        "over_optimisation": gold_peak - final["gold"],
        "rank_length": mean_of_valid(outcome.training.get("rank_length", no_value[:, None])),
    }


def mean_of_valid(values_NY: np.ndarray) -> np.ndarray:
    """Means [N] over the steps that have a value; NaN for a seed without values."""
    valid_NY = ~np.isnan(values_NY)
    total_N, count_N = np.where(valid_NY, values_NY, 0).sum(1, dtype=np.float64), valid_NY.sum(1)
    return np.divide(total_N, count_N, out=np.full(len(count_N), math.nan), where=count_N > 0)


def curve(outcome: CellOutcome) -> list[CurvePoint]:
    points = []
    mean_NM = seed_curves(outcome)
    for e, step in enumerate(outcome.steps_M):
        values: dict[str, Any] = {"step": int(step), "seeds": len(outcome.about["seeds"])}
        for name, values_NM in mean_NM.items():
            estimate = over_seeds(values_NM[:, e])
            values |= {name: rounded(estimate.mean), f"{name}_half": rounded(estimate.half)}
        points.append(CurvePoint(**asdict(outcome.cell), **values))
    return points


# methods of one situation


def rows_of(methods: Mapping[str, CellOutcome]) -> list[SeedRow]:
    """The rows of the methods of one situation."""
    baseline = methods.get(BASELINE)
    rows = []
    for outcome in methods.values():
        common_kl = smallest_final_kl([outcome, *([baseline] if baseline else [])])
        numbers = own_numbers(outcome) | at_kl(outcome, common_kl)
        numbers |= paired_numbers(outcome, baseline, common_kl)
        for n, seed in enumerate(outcome.about["seeds"]):
            values: dict[str, Any] = {name: rounded(values_N[n]) for name, values_N in numbers.items()}
            values |= {name: rounded(outcome.about.get(name, math.nan)) for name in ("learning_rate", "beta")}
            values |= {name: int(numbers[name][n]) for name in ("peak_step", "compared_at")}
            values |= {"last_step": int(outcome.steps_M[-1])}
            rows.append(SeedRow(**asdict(outcome.cell), seed=int(seed), **values))
    return rows


def smallest_final_kl(outcomes: Iterable[CellOutcome]) -> dict[int, float]:
    """For each seed the smallest final KL of the cells that have the seed."""
    smallest: dict[int, float] = {}
    for outcome in outcomes:
        for seed, kl in zip(outcome.about["seeds"], seed_curves(outcome)["kl"][:, -1], strict=True):
            smallest[seed] = float(np.fmin(kl, smallest.get(seed, math.nan)))  # a diverged cell (NaN) is ignored
    return smallest


def at_kl(outcome: CellOutcome, common_kl: Mapping[int, float]) -> dict[str, np.ndarray]:
    """Gold reward [N] where a policy first reaches its seed's common KL, interpolated linearly between evaluations.

    NaN if it never does: the policy, or all of them, diverged.
    """
    mean_NM = seed_curves(outcome)
    target_N = np.array([common_kl[seed] for seed in outcome.about["seeds"]])
    number_M = np.arange(len(outcome.steps_M))
    at_N = first_crossing(number_M.astype(np.float64), mean_NM["kl"], target_N)
    at_N = np.where(np.isinf(at_N), math.nan, at_N)
    gold_N = np.array([np.interp(at, number_M, gold_M) for at, gold_M in zip(at_N, mean_NM["gold"], strict=True)])
    return {"common_kl": target_N, "gold_at_kl": gold_N}


def paired_numbers(
    outcome: CellOutcome, other: CellOutcome | None, common_kl: Mapping[int, float]
) -> dict[str, np.ndarray]:
    """Compares a cell with another one of the same situation, seed by seed; returns numbers [N].

    The comparison is at the last step that both evaluated; NaN for seeds that the other lacks, or if that step is the
    start.
    """
    N = len(outcome.about["seeds"])
    numbers = {"compared_at": np.zeros(N, int)} | {name: np.full(N, math.nan) for name in COMPARED}
    if other is None:
        return numbers
    _, ours, theirs = np.intersect1d(outcome.about["seeds"], other.about["seeds"], return_indices=True)
    _, at, at_other = np.intersect1d(outcome.steps_M, other.steps_M, return_indices=True)
    if not at.size or outcome.steps_M[at[-1]] == outcome.steps_M[0]:
        return numbers
    numbers["compared_at"][ours] = outcome.steps_M[at[-1]]
    ours_NM, theirs_NM, steps_M = seed_curves(outcome), seed_curves(other), outcome.steps_M.astype(np.float64)
    for name in ("proxy", "gold"):
        target_N = theirs_NM[name][theirs, at_other[-1]]
        numbers[f"{name}_difference"][ours] = ours_NM[name][ours, at[-1]] - target_N
        crossing_N = first_crossing(steps_M, ours_NM[name][ours], target_N)
        numbers[f"steps_to_{name}"][ours] = np.where(np.isnan(target_N), math.nan, crossing_N)
    both_at_kl = at_kl(outcome, common_kl)["gold_at_kl"][ours], at_kl(other, common_kl)["gold_at_kl"][theirs]
    numbers["gold_at_kl_difference"][ours] = np.subtract(*both_at_kl)
    last_gold = outcome.gold_NMPG[ours, at[-1]], other.gold_NMPG[theirs, at_other[-1]]
    numbers["win_rate"][ours] = pairwise_win_rate(*last_gold)
    return numbers


def pairwise_win_rate(a_NPG: np.ndarray, b_NPG: np.ndarray) -> np.ndarray:
    """Win rate [N] of A over B: the mean over prompts of the mean over all pairs of 1[a > b] + 1[a = b] / 2.

    NaN for a seed with an unscorable completion.

    Raises:
      ValueError: the sides have different prompts.
    """
    if a_NPG.shape[:2] != b_NPG.shape[:2]:
        raise ValueError(
            f"win rate: expected the same seeds and prompts on both sides, got {list(a_NPG.shape[:2])} and "
            f"{list(b_NPG.shape[:2])}; run both cells with one number of validation prompts"
        )
    rate_N = win_rate_of_pairs(a_NPG, b_NPG).mean(1)
    unscorable_N = np.isnan(a_NPG).any((1, 2)) | np.isnan(b_NPG).any((1, 2))
    return np.where(unscorable_N, math.nan, rate_N)


# over seeds


def over_seeds(values_N: Sequence[float] | np.ndarray) -> Estimate:
    """Student's interval of a mean over seeds.

      mean ± t_{0.975, N-1} s / sqrt(N),   s^2 = sum_n (x_n - mean)^2 / (N - 1)

    No interval (half is NaN) for a single seed; a value that is not finite leaves neither mean nor interval.
    """
    values = np.asarray(values_N, np.float64)
    if not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, values.size)
    mean = mean_and_interval(values)
    return Estimate(mean["mean"], mean["high"] - mean["mean"], values.size)


def estimate(rows: Iterable[SeedRow], name: str) -> Estimate:
    """`over_seeds` of a column; for a comparison, over the seeds that the baseline also has."""
    return over_seeds([getattr(row, name) for row in rows if name not in COMPARED or row.compared_at])


def reached(rows: Sequence[SeedRow], name: str) -> tuple[float, int, int]:
    """Median over seeds of a number of steps (infinite: not reached), seeds that reach it, and seeds with a value."""
    values = np.array([getattr(row, name) for row in rows], np.float64)
    values = values[~np.isnan(values)]
    median = float(np.median(values)) if values.size else math.nan
    return median, int(np.isfinite(values).sum()), values.size


def by_cell(rows: Iterable[SeedRow]) -> dict[Cell, list[SeedRow]]:
    """The rows of each cell, in the order of situations and methods."""
    groups: dict[Cell, list[SeedRow]] = {}
    for row in sorted(rows, key=lambda row: cell_order(row.cell)):
        groups.setdefault(row.cell, []).append(row)
    return groups


def rounded(value: float) -> float:
    """Rounds to 5 digits, without a negative zero."""
    return float(f"{float(value):.{DIGITS}g}") + 0.0


def versions() -> dict[str, str]:
    """Versions of Python, of the libraries that the lab's numbers depend on, and of this package."""
    by_library = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            by_library[name] = version(name)
        except PackageNotFoundError:
            by_library[name] = "none"
    return by_library | {"gopo_jax": gopo_jax.__version__}


def versions_text(by_library: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in by_library.items())
