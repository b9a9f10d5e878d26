"""Calibration of a reward model: is it right as often as its probabilities say?

In a comparison with scores r_i and r_j, the model's confidence that the higher score is the better answer is
sigmoid(|r_i - r_j|), from 0.5 to 1. It is calibrated if it is right in 80 % of the comparisons with confidence 0.8.
"""

from typing import Any

import numpy as np

BINS = 10  # of equal width, from 0.5 to 1


def reliability_bins(differences: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """Sorts comparisons into bins of confidence.

    Args:
      differences: for each comparison, the score of the better answer minus the score of the other.
      bins: number of bins of equal width between 0.5 and 1.

    Returns:
      A row per bin, {"low", "high", "confidence", "accuracy", "count"}: edges, means and number of comparisons. The
      means of an empty bin are None. Equal scores count as one half right, at confidence 0.5.
    """
    differences = np.asarray(differences, np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(differences)))
    correct = np.where(differences == 0, 0.5, differences > 0)
    edges = np.linspace(0.5, 1, bins + 1)
    bin_of = np.minimum(np.digitize(confidence, edges) - 1, bins - 1)  # a confidence of 1 is in the last bin
    rows = []
    for i in range(bins):
        mask = bin_of == i
        means = {"confidence": confidence[mask].mean(), "accuracy": correct[mask].mean()} if mask.any() else {}
        row: dict[str, Any] = {"low": edges[i], "high": edges[i + 1], "confidence": None, "accuracy": None} | means
        rows.append({k: None if v is None else float(v) for k, v in row.items()} | {"count": int(mask.sum())})
    return rows


def expected_calibration_error(differences: np.ndarray, bins: int = BINS) -> float:
    """Returns the distance between accuracy and confidence, averaged over the comparisons.

        ECE = sum over bins of (count / sum of counts) |accuracy - confidence|

    with the bins of `reliability_bins`.

    Args:
      differences: for each comparison, the score of the better answer minus the score of the other.
      bins: number of bins of equal width between 0.5 and 1.

    Returns:
      A number from 0 (calibrated) to 1; NaN without comparisons.

    References:
      Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015;
      Guo et al., https://arxiv.org/abs/1706.04599, equation 3.
    """
    rows = [row for row in reliability_bins(differences, bins) if row["count"]]
    if not rows:
        return float("nan")
    gap = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return gap / sum(row["count"] for row in rows)
