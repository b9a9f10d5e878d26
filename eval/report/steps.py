"""Steps that one policy needs to reach another's final score: the first crossing of its validation curve."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.stats import percentile_interval, resampled_counts


def first_crossing(steps_M: np.ndarray, means_XM: np.ndarray, target_X: np.ndarray) -> np.ndarray:
    """The step [X] at which each curve first reaches its target, interpolated linearly between validation steps.

    With m_i < target <= m_i+1,
      s = s_i + (target - m_i) / (m_i+1 - m_i) (s_i+1 - s_i);
    the first step for a curve that starts at or above its target, infinite for a curve that never reaches it.
    """
    reached_XM = means_XM >= target_X[:, None]
    after = reached_XM.argmax(1)
    rows, before = np.arange(len(after)), np.maximum(after - 1, 0)
    low, high = means_XM[rows, before], means_XM[rows, after]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(after > 0, (target_X - low) / (high - low), 0.0)
    crossing_X = steps_M[before] + share * (steps_M[after] - steps_M[before])
    return np.where(reached_XM.any(1), crossing_X, math.inf)


def steps_to_target(
    values_a: Mapping[int, np.ndarray], values_b: Mapping[int, np.ndarray], seed: int
) -> dict[str, Any] | None:
    """The step at which A's mean over prompts reaches B's mean at B's last step, and how much sooner A reaches it.

    Args:
      values_a, values_b: for each validation step the prompts' values [P]; NaN = no value.
      seed: seed of the bootstrap.

    Returns:
      target, final_step; step, and times_as_fast = final_step / step (None if never reached, or from the start);
      low, high: the 95 % percentile bootstrap interval over prompts, resampled jointly for A and B, None if the
      resamples at that end never reach the target; reached: the share of resamples that do. None without values.
    """
    steps = sorted(values_a)
    final = max(values_b)
    table_MP = np.stack([*(values_a[step] for step in steps), values_b[final]]).astype(np.float64)
    if np.isnan(table_MP).all(1).any():
        return None
    P = table_MP.shape[1]
    counts = [np.ones((1, P)), *resampled_counts(P, seed)]  # the first row: every prompt once
    valid_MP, filled_MP = ~np.isnan(table_MP), np.nan_to_num(table_MP)
    with np.errstate(invalid="ignore"):  # a resample without a valid value reaches nothing
        means_XM = np.concatenate([(count @ filled_MP.T) / (count @ valid_MP.T) for count in counts])
    crossing_X = first_crossing(np.array(steps, np.float64), means_XM[:, :-1], means_XM[:, -1])
    low, high, _ = percentile_interval(crossing_X[1:])
    step = float(crossing_X[0])
    return {
        "target": float(means_XM[0, -1]),
        "final_step": final,
        "step": _finite(step),
        "low": _finite(low),
        "high": _finite(high),
        "reached": float(np.isfinite(crossing_X[1:]).mean()),
        "times_as_fast": final / step if 0 < step < math.inf else None,
        "prompts": P,
    }


def steps_to_each_end(values: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]], seed: int) -> list[dict[str, Any]]:
    """`steps_to_reach` of each run to the other's end, by each score: values[score][run][step] is [P]."""
    rows = []
    for score, runs in values.items():
        names: Sequence[str] = tuple(runs)
        for name, other in (names, names[::-1]):
            if (reach := steps_to_target(runs[name], runs[other], seed)) is not None:
                rows.append({"run": name, "reaches": other, "score": score, **reach})
    return rows


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
