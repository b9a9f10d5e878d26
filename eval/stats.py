"""The statistics of a comparison: means over prompts, paired gains, win rates, bootstrap intervals.

The prompt is the unit: completions of one prompt are averaged first, and errors and intervals are over prompts.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np

Scores = Sequence[float | None]  # of the completions of one prompt; None or NaN = unscorable
RESAMPLES, CONFIDENCE = 9999, 0.95


def prompt_means(scores: Sequence[Scores]) -> np.ndarray:
    """The mean score [P] of each prompt's completions; NaN for a prompt of which none is scorable."""
    valid = [_valid(group) for group in scores]
    return np.array([group.mean() if group.size else math.nan for group in valid])


def mean_and_error(values_P: np.ndarray) -> dict[str, float]:
    """mean and standard_error = std(ddof 1) / sqrt(prompts) over the prompts that have a value."""
    values = np.asarray(values_P, np.float64)
    values = values[~np.isnan(values)]
    return {
        "mean": float(values.mean()) if values.size else math.nan,
        "standard_error": float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan,
        "prompts": int(values.size),
    }


def paired_gain(before_P: np.ndarray, after_P: np.ndarray) -> dict[str, float]:
    """The mean of after - before over prompts, its standard error, and their quotient."""
    gain = mean_and_error(np.asarray(after_P, np.float64) - np.asarray(before_P, np.float64))
    mean, error = gain["mean"], gain["standard_error"]
    if error > 0:
        quotient = mean / error
    else:
        quotient = 0.0 if mean == 0 else math.nan
    return gain | {"in_standard_errors": quotient}


def win_rates(scores_a: Sequence[Scores], scores_b: Sequence[Scores]) -> np.ndarray:
    """How often A beats B on each prompt: the mean over all pairs of completions of 1[a > b] + 1[a = b] / 2.

    Args:
      scores_a, scores_b: for each prompt, the judge's scores of A's and of B's completions.

    Returns:
      [P] in [0, 1]; NaN for a prompt without a scorable pair.
    """
    rates = []
    for one, other in zip(scores_a, scores_b, strict=True):
        a, b = _valid(one)[:, None], _valid(other)[None, :]
        rates.append(float(((a > b) + 0.5 * (a == b)).mean()) if a.size and b.size else math.nan)
    return np.array(rates)


def same_text_same_score(
    texts_a: Sequence[Sequence[str]],
    texts_b: Sequence[Sequence[str]],
    scores_a: Sequence[Scores],
    scores_b: Sequence[Scores],
) -> tuple[list[Scores], list[Scores]]:
    """The scores, with equal completions of a prompt given their mean: rounding must not make one of them win."""
    new_a: list[Scores] = []
    new_b: list[Scores] = []
    for row_a, row_b, one, other in zip(texts_a, texts_b, scores_a, scores_b, strict=True):
        found: dict[str, list[float]] = {}
        for text, score in zip([*row_a, *row_b], [*one, *other], strict=True):
            found.setdefault(text, []).extend(_valid([score]))
        mean = {text: sum(values) / len(values) if values else None for text, values in found.items()}
        new_a.append([mean[text] for text in row_a])
        new_b.append([mean[text] for text in row_b])
    return new_a, new_b


def bootstrap_interval(values_P: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval (BCa) of the mean over prompts; by percentiles where BCa does not exist."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    values = np.asarray(values_P, np.float64)
    values = values[~np.isnan(values)]
    if values.size < 2:
        return math.nan, math.nan
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():  # a NaN below says it all
            warnings.simplefilter("ignore", DegenerateDataWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = bootstrap(
                (values,),
                np.mean,
                n_resamples=RESAMPLES,
                confidence_level=CONFIDENCE,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if not math.isnan(interval.low + interval.high):
            break
    return float(interval.low), float(interval.high)


def _valid(scores: Scores) -> np.ndarray:
    values = np.array([math.nan if score is None else score for score in scores], np.float64)
    return values[~np.isnan(values)]
