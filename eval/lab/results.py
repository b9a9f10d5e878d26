"""What the lab's cells say: the numbers of every seed, paired with those of a baseline, and intervals over seeds.

The seed is the unit: everything is a mean over validation prompts and completions first, one number for each seed, and
intervals are over seeds alone. A seed gives every method of a situation the same start, proxy and prompts; therefore
methods are compared seed by seed. Every number is rounded to 5 digits here, so that tables and pictures are the same
whether they are drawn from cells or from the CSV files of `eval.lab.tables`.
"""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np

import gopo_jax
from eval.lab.cells import DISTORTIONS, METHODS, REGIMES, Cell, Outcome
from eval.report.steps import first_crossing
from eval.stats import mean_and_interval, win_rate_of_pairs

BASELINE, DIGITS = "grpo", 5
LIBRARIES = ("jax", "flax", "optax", "numpy")


class SeedRow(NamedTuple):
    """A cell's numbers for one seed. NaN: there is none; infinite steps: not reached.

    Rewards are in standard deviations of the start, kl in nats per completion, length in tokens. The baseline is the
    cell of the same situation with the method "grpo"; its own rows are compared with themselves.
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
    last_step: int  # of the last evaluation, which "final" numbers are of
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
    common_kl: float  # the smaller final kl of the two that are compared
    gold_at_kl: float  # where the policy first has that kl
    compared_at: int  # the last step that the baseline evaluated too; 0: no comparison, and NaN from here on
    proxy_difference: float
    gold_difference: float
    gold_at_kl_difference: float
    win_rate: float  # by the gold reward
    steps_to_proxy: float  # to the baseline's final one
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
    """All that the lab's table, files and pictures are made of."""

    command: str
    seeds: tuple[int, ...]
    versions: str
    rows: Sequence[SeedRow]
    curves: Sequence[CurvePoint]


class Estimate(NamedTuple):
    mean: float
    half: float  # the interval is mean ± half; NaN where there is none
    seeds: int


def summarize(outcomes: Iterable[Outcome], command: str) -> Tables:
    """The numbers of all cells that there are, in the order of situations and methods.

    Args:
      outcomes: of any part of the grid; a situation without the baseline has no comparison.
      command: that made them; it is written into the files.

    Raises:
      ValueError: nothing to summarize, a cell that is given twice, or arrays that do not fit together.
    """
    found = sorted(outcomes, key=lambda outcome: place_of(outcome.cell))
    if not found:
        raise ValueError("lab: expected at least one cell that has ended, got none; run `python -m eval lab` first")
    situations: dict[Cell, dict[str, Outcome]] = {}
    for outcome in found:
        check(outcome)
        methods = situations.setdefault(situation(outcome.cell), {})
        if outcome.cell.method in methods:
            raise ValueError(f"{outcome.cell.name}: expected each cell once, got it twice")
        methods[outcome.cell.method] = outcome
    rows = [row for methods in situations.values() for row in rows_of(methods)]
    curves = [point for outcome in found for point in curve(outcome)]
    seeds = sorted({row.seed for row in rows})
    made_with = dict.fromkeys(versions_text(outcome.about.get("versions") or versions()) for outcome in found)
    return Tables(command, tuple(seeds), " | ".join(made_with), rows, curves)


def situation(cell: Cell) -> Cell:
    """All of a cell but its method."""
    return replace(cell, method="")


def place_of(cell: Cell) -> tuple[int, int, int, float, int]:
    """Where a cell stands in tables."""
    order = [names.index(name) if name in names else len(names) for names, name in (
        (REGIMES, cell.regime), (DISTORTIONS, cell.distortion), (METHODS, cell.method)
    )]  # fmt: skip
    return (order[0], order[1], cell.group_size, cell.noise, order[2])


def check(outcome: Outcome) -> None:
    """Raises: ValueError: arrays of another number of seeds or evaluations than the cell says."""
    N, E = len(outcome.about["seeds"]), len(outcome.steps_E)
    for name in ("proxy_NEPG", "gold_NEPG", "length_NEPG", "kl_NEPG"):
        shape = getattr(outcome, name).shape
        if len(shape) != 4 or shape[:2] != (N, E) or 0 in shape:
            raise ValueError(
                f"{outcome.cell.name}: {name}: expected [{N} seeds, {E} evaluations, prompts, completions], got "
                f"{list(shape)}; delete the file and run the cell again"
            )


# one cell


def means(outcome: Outcome) -> dict[str, np.ndarray]:
    """proxy, gold, kl and length [N, E]: means over prompts and completions."""
    arrays = {
        "proxy": outcome.proxy_NEPG,
        "gold": outcome.gold_NEPG,
        "kl": outcome.kl_NEPG,
        "length": outcome.length_NEPG,
    }
    return {name: array.mean((2, 3), dtype=np.float64) for name, array in arrays.items()}


def alone(outcome: Outcome) -> dict[str, np.ndarray]:
    """The numbers [N] of a cell that need no other one, by their names in `SeedRow`."""
    mean_NE = means(outcome)
    seeds = np.arange(len(mean_NE["gold"]))
    peak_N = mean_NE["gold"].argmax(1)
    start = {name: values_NE[:, 0] for name, values_NE in mean_NE.items()}
    final = {name: values_NE[:, -1] for name, values_NE in mean_NE.items()}
    gold_peak = mean_NE["gold"][seeds, peak_N]
    proxy_gain, gold_gain = final["proxy"] - start["proxy"], final["gold"] - start["gold"]
    nothing = np.full(len(seeds), math.nan)
    return final | {
        "proxy_accuracy": np.broadcast_to(outcome.about.get("proxy_accuracy", math.nan), nothing.shape),
        "proxy_start": start["proxy"],
        "gold_start": start["gold"],
        "proxy_gain": proxy_gain,
        "gold_gain": gold_gain,
        "gain_gap": proxy_gain - gold_gain,
        "gold_peak": gold_peak,
        "peak_step": outcome.steps_E[peak_N],
        "over_optimisation": gold_peak - final["gold"],
        "rank_length": mean_of_valid(outcome.training.get("rank_length", nothing[:, None])),
    }


def mean_of_valid(values_NM: np.ndarray) -> np.ndarray:
    """Means [N] over the steps that have a value; NaN for a seed with none."""
    valid_NM = ~np.isnan(values_NM)
    total_N, count_N = np.where(valid_NM, values_NM, 0).sum(1, dtype=np.float64), valid_NM.sum(1)
    return np.divide(total_N, count_N, out=np.full(len(count_N), math.nan), where=count_N > 0)


def curve(outcome: Outcome) -> list[CurvePoint]:
    points = []
    mean_NE = means(outcome)
    for e, step in enumerate(outcome.steps_E):
        values: dict[str, Any] = {"step": int(step), "seeds": len(outcome.about["seeds"])}
        for name, values_NE in mean_NE.items():
            estimate = over_seeds(values_NE[:, e])
            values |= {name: rounded(estimate.mean), f"{name}_half": rounded(estimate.half)}
        points.append(CurvePoint(**asdict(outcome.cell), **values))
    return points


# methods of one situation


def rows_of(methods: Mapping[str, Outcome]) -> list[SeedRow]:
    """The rows of the methods of one situation."""
    baseline = methods.get(BASELINE)
    rows = []
    for outcome in methods.values():
        common_kl = smallest_final_kl([outcome, *([baseline] if baseline else [])])
        numbers = alone(outcome) | at_kl(outcome, common_kl)
        numbers |= against(outcome, baseline, common_kl)
        for n, seed in enumerate(outcome.about["seeds"]):
            values: dict[str, Any] = {name: rounded(values_N[n]) for name, values_N in numbers.items()}
            values |= {name: rounded(outcome.about.get(name, math.nan)) for name in ("learning_rate", "beta")}
            values |= {name: int(numbers[name][n]) for name in ("peak_step", "compared_at")}
            values |= {"last_step": int(outcome.steps_E[-1])}
            rows.append(SeedRow(**asdict(outcome.cell), seed=int(seed), **values))
    return rows


def smallest_final_kl(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """For each seed the smallest final KL of the cells that have the seed."""
    smallest: dict[int, float] = {}
    for outcome in outcomes:
        for seed, kl in zip(outcome.about["seeds"], means(outcome)["kl"][:, -1], strict=True):
            smallest[seed] = float(np.fmin(kl, smallest.get(seed, math.nan)))  # one that diverged has no say
    return smallest


def at_kl(outcome: Outcome, common_kl: Mapping[int, float]) -> dict[str, np.ndarray]:
    """Gold reward [N] where a policy first has its seed's common KL, on straight lines between evaluations.

    NaN where it never has: the policy, or all of them, diverged.
    """
    mean_NE = means(outcome)
    target_N = np.array([common_kl[seed] for seed in outcome.about["seeds"]])
    number_E = np.arange(len(outcome.steps_E))
    at_N = first_crossing(number_E.astype(np.float64), mean_NE["kl"], target_N)
    at_N = np.where(np.isinf(at_N), math.nan, at_N)
    gold_N = np.array([np.interp(at, number_E, gold_E) for at, gold_E in zip(at_N, mean_NE["gold"], strict=True)])
    return {"common_kl": target_N, "gold_at_kl": gold_N}


def against(outcome: Outcome, other: Outcome | None, common_kl: Mapping[int, float]) -> dict[str, np.ndarray]:
    """The numbers [N] of a cell beside another one of the same situation, seed by seed.

    At the last step that both evaluated; NaN for seeds that the other has not, or where that step is the start.
    """
    N = len(outcome.about["seeds"])
    found = {"compared_at": np.zeros(N, int)} | {name: np.full(N, math.nan) for name in COMPARED}
    if other is None:
        return found
    _, ours, theirs = np.intersect1d(outcome.about["seeds"], other.about["seeds"], return_indices=True)
    _, at, at_other = np.intersect1d(outcome.steps_E, other.steps_E, return_indices=True)
    if not at.size or outcome.steps_E[at[-1]] == outcome.steps_E[0]:
        return found
    found["compared_at"][ours] = outcome.steps_E[at[-1]]
    ours_NE, theirs_NE, steps_E = means(outcome), means(other), outcome.steps_E.astype(np.float64)
    for name in ("proxy", "gold"):
        target_N = theirs_NE[name][theirs, at_other[-1]]
        found[f"{name}_difference"][ours] = ours_NE[name][ours, at[-1]] - target_N
        crossing_N = first_crossing(steps_E, ours_NE[name][ours], target_N)
        found[f"steps_to_{name}"][ours] = np.where(np.isnan(target_N), math.nan, crossing_N)
    both_at_kl = at_kl(outcome, common_kl)["gold_at_kl"][ours], at_kl(other, common_kl)["gold_at_kl"][theirs]
    found["gold_at_kl_difference"][ours] = np.subtract(*both_at_kl)
    found["win_rate"][ours] = win_rate(outcome.gold_NEPG[ours, at[-1]], other.gold_NEPG[theirs, at_other[-1]])
    return found


def win_rate(a_NPG: np.ndarray, b_NPG: np.ndarray) -> np.ndarray:
    """How often A beats B [N]: the mean over prompts of the mean over all pairs of 1[a > b] + 1[a = b] / 2.

    NaN for a seed with an unscorable completion.

    Raises:
      ValueError: other prompts on one side than on the other.
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
    """`over_seeds` of a column; of a comparison over the seeds that the baseline has too."""
    return over_seeds([getattr(row, name) for row in rows if name not in COMPARED or row.compared_at])


def reached(rows: Sequence[SeedRow], name: str) -> tuple[float, int, int]:
    """Median over seeds of a number of steps (infinite: not reached), seeds that reach it, and seeds that compare."""
    values = np.array([getattr(row, name) for row in rows], np.float64)
    values = values[~np.isnan(values)]
    median = float(np.median(values)) if values.size else math.nan
    return median, int(np.isfinite(values).sum()), values.size


def by_cell(rows: Iterable[SeedRow]) -> dict[Cell, list[SeedRow]]:
    """The rows of each cell, in the order of situations and methods."""
    found: dict[Cell, list[SeedRow]] = {}
    for row in sorted(rows, key=lambda row: place_of(row.cell)):
        found.setdefault(row.cell, []).append(row)
    return found


def rounded(value: float) -> float:
    """To 5 digits, without a negative zero."""
    return float(f"{float(value):.{DIGITS}g}") + 0.0


def versions() -> dict[str, str]:
    """Of Python, of the libraries that the lab's numbers depend on, and of this package."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {"gopo_jax": gopo_jax.__version__}


def versions_text(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())
