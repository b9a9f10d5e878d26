"""How many steps one policy needs to get where another one ends: the first crossing of its validation curve."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.stats import CONFIDENCE, RESAMPLES


def first_crossing(steps_S: np.ndarray, means_BS: np.ndarray, target_B: np.ndarray) -> np.ndarray:
    """The step [B] at which each curve first reaches its target.

    On the straight line between validation steps: with m_i < target <= m_i+1,
      s = s_i + (target - m_i) / (m_i+1 - m_i) (s_i+1 - s_i);
    the first step for a curve that starts there, infinite for one that never gets there.
    """
    reached_BS = means_BS >= target_B[:, None]
    after = reached_BS.argmax(1)
    rows, before = np.arange(len(after)), np.maximum(after - 1, 0)
    low, high = means_BS[rows, before], means_BS[rows, after]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(after > 0, (target_B - low) / (high - low), 0.0)
    found = steps_S[before] + share * (steps_S[after] - steps_S[before])
    return np.where(reached_BS.any(1), found, math.inf)


def steps_to_target(
    values_a: Mapping[int, np.ndarray], values_b: Mapping[int, np.ndarray], seed: int
) -> dict[str, Any] | None:
    """The step at which A's mean over prompts reaches B's mean at B's last step, and how much sooner that is.

    Args:
      values_a, values_b: for each validation step [P], the prompts' values; NaN = none.
      seed: of the bootstrap.

    Returns:
      target, final_step; step, and times_as_fast = final_step / step (None if never reached, or from the start);
      low, high: the 95 % percentile bootstrap interval over prompts, the same ones for A and B, None where a resample
      at that end never reaches it; reached: the share of resamples that do. None without values.
    """
    steps = sorted(values_a)
    final = max(values_b)
    table_SP = np.stack([*(values_a[step] for step in steps), values_b[final]]).astype(np.float64)
    if np.isnan(table_SP).all(1).any():
        return None
    P = table_SP.shape[1]
    rng = np.random.default_rng(seed)
    batches: list[np.ndarray] = [np.ones((1, P))]
    for start in range(0, RESAMPLES, size := max(1, 2**22 // P)):
        batches.append(rng.multinomial(P, np.full(P, 1 / P), size=min(size, RESAMPLES - start)))
    valid_SP, filled_SP = ~np.isnan(table_SP), np.nan_to_num(table_SP)
    with np.errstate(invalid="ignore"):  # a resample without a valid value reaches nothing
        means_BS = np.concatenate([(count @ filled_SP.T) / (count @ valid_SP.T) for count in batches])
    crossing_B = first_crossing(np.array(steps, np.float64), means_BS[:, :-1], means_BS[:, -1])
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(crossing_B[1:], tails, method="inverted_cdf")
    step = float(crossing_B[0])
    return {
        "target": float(means_BS[0, -1]),
        "final_step": final,
        "step": _finite(step),
        "low": _finite(low),
        "high": _finite(high),
        "reached": float(np.isfinite(crossing_B[1:]).mean()),
        "times_as_fast": final / step if 0 < step < math.inf else None,
        "prompts": P,
    }


def steps_to_each_end(values: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]], seed: int) -> list[dict[str, Any]]:
    """`steps_to_reach` of each run to the other's end, by each score: values[score][run][step] is [P]."""
    found = []
    for score, runs in values.items():
        names: Sequence[str] = tuple(runs)
        for name, other in (names, names[::-1]):
            if (one := steps_to_target(runs[name], runs[other], seed)) is not None:
                found.append({"run": name, "reaches": other, "score": score, **one})
    return found


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
