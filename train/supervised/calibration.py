"""Calibration of a reward model: does it win as many comparisons as its probabilities say?

Of a comparison with scores r_i and r_j the model says that the higher one is better with probability
sigmoid(|r_i - r_j|), from 0.5 to 1. It is calibrated if, of those it gives 0.8, it is right about 80 %.
"""

from typing import Any

import numpy as np

BINS = 10  # of equal width, from 0.5 to 1


def reliability_bins(differences: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """The comparisons by confidence: for each bin its edges, mean confidence, accuracy, and count.

    Args:
      differences: [N] score of the answer that is better minus score of the other, each comparison once.
      bins: how many, of equal width between 0.5 and 1.

    Returns:
      A row per bin, {"low", "high", "confidence", "accuracy", "count"}; of an empty bin the means are None. Equal
      scores count as one half right, at confidence 0.5.
    """
    differences = np.asarray(differences, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    right = np.where(differences == 0, 0.5, differences > 0)
    edges = np.linspace(0.5, 1, bins + 1)
    bin_of = np.minimum(np.digitize(confidence, edges) - 1, bins - 1)  # a confidence of 1 is in the last bin
    rows = []
    for i in range(bins):
        here = bin_of == i
        means = {"confidence": confidence[here].mean(), "accuracy": right[here].mean()} if here.any() else {}
        row: dict[str, Any] = {"low": edges[i], "high": edges[i + 1], "confidence": None, "accuracy": None} | means
        rows.append({k: None if v is None else float(v) for k, v in row.items()} | {"count": int(here.sum())})
    return rows


def expected_calibration_error(differences: np.ndarray, bins: int = BINS) -> float:
    """How far accuracy and confidence are apart, on average over the comparisons.

        ECE = sum over bins of (count / N) |accuracy - confidence|

    with the bins of `reliability`: 10 of equal width between 0.5 and 1.

    Args:
      differences: [N] score of the answer that is better minus score of the other, each comparison once.
      bins: how many.

    Returns:
      A number from 0 (calibrated) to 1; NaN without comparisons.

    References:
      Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015;
      Guo et al., https://arxiv.org/abs/1706.04599, equation 3.
    """
    rows = [row for row in reliability_bins(differences, bins) if row["count"]]
    if not rows:
        return float("nan")
    apart = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return apart / sum(row["count"] for row in rows)
