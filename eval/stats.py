"""The statistics of an evaluation: means over prompts, paired gains, win rates, agreement of judges, all intervals.

The prompt is the unit: completions of one prompt are averaged first, and errors and intervals are over prompts.
All intervals are made here: Student's for a mean, BCa or Wilson's for a win rate, percentiles of the bootstrap for a
statistic that may be infinite.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Scores = Sequence[float | None]  # of the completions of one prompt; None or NaN = unscorable
RESAMPLES, CONFIDENCE = 9999, 0.95
REFITS = 1999  # resamples of a statistic that is a regression
NEWTON_STEPS = 100  # of that regression, at most
MIN_PROMPTS = 20  # from which on a bootstrap is tried


def prompt_means(scores: Sequence[Scores]) -> np.ndarray:
    """Returns the mean score [P] of each prompt's completions; NaN for a prompt without a scorable one."""
    valid = [_valid(group) for group in scores]
    return np.array([group.mean() if group.size else math.nan for group in valid])


def mean_and_error(values_P: np.ndarray) -> dict[str, float]:
    """Returns mean, standard_error = std(ddof 1) / sqrt(prompts), and prompts: those that have a value."""
    values = np.asarray(values_P, np.float64)
    values = values[~np.isnan(values)]
    return {
        "mean": float(values.mean()) if values.size else math.nan,
        "standard_error": float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan,
        "prompts": int(values.size),
    }


def paired_gain(before_P: np.ndarray, after_P: np.ndarray) -> dict[str, float]:
    """Returns the mean of after - before over prompts, its standard error, and their quotient."""
    gain = mean_and_error(np.asarray(after_P, np.float64) - np.asarray(before_P, np.float64))
    mean, error = gain["mean"], gain["standard_error"]
    if error > 0:
        quotient = mean / error
    else:
        quotient = 0.0 if mean == 0 else math.nan
    return gain | {"in_standard_errors": quotient}


def win_rate_of_pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How often A beats B: the mean over all pairs of completions of 1[a > b] + 1[a = b] / 2.

    Args:
      a, b: [..., G] scores of A's and of B's completions; the two G may differ.

    Returns:
      [...] in [0, 1].
    """
    a, b = a[..., :, None], b[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def win_rates(scores_a: Sequence[Scores], scores_b: Sequence[Scores]) -> np.ndarray:
    """Returns `win_rate_of_pairs` [P] of each prompt's scorable completions; NaN for a prompt without such a pair."""
    pairs = [(_valid(a), _valid(b)) for a, b in zip(scores_a, scores_b, strict=True)]
    return np.array([float(win_rate_of_pairs(a, b)) if a.size and b.size else math.nan for a, b in pairs])


def same_text_same_score(
    texts_a: Sequence[Sequence[str]],
    texts_b: Sequence[Sequence[str]],
    scores_a: Sequence[Scores],
    scores_b: Sequence[Scores],
) -> tuple[list[Scores], list[Scores]]:
    """Gives equal completions of a prompt their mean score: rounding must not make one of them win."""
    new_a: list[Scores] = []
    new_b: list[Scores] = []
    for row_a, row_b, one, other in zip(texts_a, texts_b, scores_a, scores_b, strict=True):
        scores: dict[str, list[float]] = {}
        for text, score in zip([*row_a, *row_b], [*one, *other], strict=True):
            scores.setdefault(text, []).extend(_valid([score]))
        mean = {text: sum(values) / len(values) if values else None for text, values in scores.items()}
        new_a.append([mean[text] for text in row_a])
        new_b.append([mean[text] for text in row_b])
    return new_a, new_b


class Interval(NamedTuple):
    """A 95 % interval and its method: "t", "bca", "wilson", "percentile", or "none" (NaN) without enough values."""

    low: float
    high: float
    method: str


NO_INTERVAL = Interval(math.nan, math.nan, "none")


def mean_and_interval(values_P: np.ndarray) -> dict[str, Any]:
    """Returns `mean_and_error` with low, high and method of Student's interval; a single value has none.

    mean ± t_{0.975, P-1} standard_error
    """
    from scipy.stats import t  # slow to import

    mean = mean_and_error(values_P)
    if mean["prompts"] < 2:
        return mean | NO_INTERVAL._asdict()
    half = float(t.ppf((1 + CONFIDENCE) / 2, mean["prompts"] - 1)) * mean["standard_error"]
    return mean | Interval(mean["mean"] - half, mean["mean"] + half, "t")._asdict()


def resampled_counts(prompts: int, seed: int) -> Iterator[np.ndarray]:
    """Yields how often [X, P] each resample of the bootstrap has each prompt, RESAMPLES rows in all."""
    rng = np.random.default_rng(seed)
    size = max(1, 2**22 // prompts)
    for start in range(0, RESAMPLES, size):
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=min(size, RESAMPLES - start))


def percentile_interval(statistic_X: np.ndarray) -> Interval:
    """Returns the percentile bootstrap interval of a statistic's values on resamples, which may be infinite.

    The ends are values of resamples: between a finite and an infinite one there is nothing to interpolate.
    """
    low, high = np.quantile(statistic_X, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="inverted_cdf")
    return Interval(float(low), float(high), "percentile")


def win_rate_interval(rates_P: np.ndarray, seed: int) -> Interval:
    """The 95 % interval of the mean over prompts of win rates.

    With 20 prompts or more that do not all agree: the bootstrap over prompts, bias-corrected and accelerated (BCa).
    Else Wilson's score interval with each prompt as one trial,
      (p + z^2 / 2P ± z sqrt(p (1 - p) / P + z^2 / 4P^2)) / (1 + z^2 / P),
    which exists where all prompts agree (BCa is NaN there, percentiles have no width) and for a single prompt; it is
    wide rather than narrow, since rates between 0 and 1 vary less than single trials with the same mean.
    Swapping the sides, rates -> 1 - rates, mirrors it exactly: see `_canonical`.

    Args:
      rates_P: [P] in [0, 1]; NaN = no result, left out.
      seed: of the resamples.

    Raises:
      ValueError: rates outside [0, 1].
    References:
      Efron, Better bootstrap confidence intervals, 1987; Wilson, Probable inference, 1927.
    """
    margins_P, sign = _canonical(_rates(rates_P))
    if not margins_P.size:
        return NO_INTERVAL
    resample = partial(_bootstrap, margins_P, np.mean, RESAMPLES, seed, 2**22 // margins_P.size)
    interval, _ = _bca_or_wilson(margins_P.mean(), margins_P.size, resample if np.ptp(margins_P) > 0 else None)
    return _as_rates(interval, sign)


def summary(rates_P: np.ndarray, seed: int) -> dict[str, Any]:
    """Returns mean, standard_error and prompts of win rates as `mean_and_error`, with their interval's fields."""
    margins_P, sign = _canonical(_rates(rates_P))
    margin = mean_and_error(margins_P)
    mean, error = _as_rate(sign * margin["mean"]), margin["standard_error"] / 2
    return margin | {"mean": mean, "standard_error": error} | win_rate_interval(rates_P, seed)._asdict()


class NotConvergedError(ValueError):
    """An iteration that did not end, on data that no test has."""


def length_controlled(
    rates_J: np.ndarray, length_a_J: np.ndarray, length_b_J: np.ndarray, prompt_J: np.ndarray, seed: int
) -> dict[str, Any]:
    """The win rate of A over B at equal length: by a logistic regression of the outcome on the difference in length.

      P(A wins) = sigmoid(theta + phi tanh(d / std(d))), d = length of A - length of B;   sigmoid(theta) is the result.

    Each prompt has weight 1, shared by its pairs. Where the length decides everything (or one side wins everything)
    the likelihood has no maximum; therefore two half prompts that tie are added, at tanh = -1 and at tanh = 1: the
    estimate is finite, mirrors exactly, and their share vanishes as prompts are added.
    Dubois et al. have another term, how hard each instruction is for a baseline; it needs many models on the same
    instructions and is left out.

    Args:
      rates_J: [J] of pairs: 1 where A wins, 1/2 for a tie, 0; NaN = no result, left out.
      length_a_J, length_b_J: [J] in any unit; a pair in which one is NaN is left out.
      prompt_J: [J] which prompt a pair belongs to.
      seed: of the resamples.

    Returns:
      As `summary`, the interval by BCa over prompts, or Wilson's as for `win_rate_interval`; standard_error is the
      standard deviation of the resamples, NaN without them. All NaN with method "none" without pairs, and where every
      pair has the same difference in length that is not 0: then length and skill cannot be told apart.
    Raises:
      NotConvergedError: the regression did not converge.
    References:
      Dubois et al., Length-controlled AlpacaEval, https://arxiv.org/abs/2404.04475, section 3.
    """
    rates_J, difference_J = _rates(rates_J, keep_nan=True), np.subtract(length_a_J, length_b_J, dtype=np.float64)
    valid_J = ~np.isnan(rates_J + difference_J)
    margins_J, sign = _canonical(rates_J[valid_J])
    difference_J = sign * difference_J[valid_J]
    _, prompt_J = np.unique(np.asarray(prompt_J)[valid_J], return_inverse=True)
    nothing = {"mean": math.nan, "standard_error": math.nan} | NO_INTERVAL._asdict()
    deviation = difference_J.std() if difference_J.size else 0.0
    if not difference_J.size or (deviation == 0 and difference_J[0] != 0):
        return nothing | {"prompts": int(prompt_J.max(initial=-1)) + 1}
    length_J = np.tanh(difference_J / deviation) if deviation else np.zeros_like(difference_J)
    pairs_P = np.bincount(prompt_J)

    def at_equal_length(prompts_XP: np.ndarray, axis: int) -> np.ndarray:
        """The margin of A at equal length, 2 sigmoid(theta) - 1, for each choice of prompts."""
        choices = prompts_XP.reshape(-1, prompts_XP.shape[-1])
        numbers_XP = choices + len(pairs_P) * np.arange(len(choices))[:, None]
        count_XP = np.bincount(numbers_XP.ravel(), minlength=choices.shape[0] * len(pairs_P))
        weight_XJ = (count_XP.reshape(-1, len(pairs_P)) / pairs_P)[:, prompt_J]
        fitted = _regressions(weight_XJ, length_J, outcome_J, start=whole)
        return np.tanh(fitted[0] / 2).reshape(prompts_XP.shape[:-1])

    prompts_P, outcome_J = np.arange(len(pairs_P)), (1 + margins_J) / 2
    whole = _regressions((1 / pairs_P)[None, prompt_J], length_J, outcome_J, start=np.zeros((2, 1)))
    margin = math.tanh(whole[0, 0] / 2)
    resample = partial(_bootstrap, prompts_P, at_equal_length, REFITS, seed, 2**21 // len(margins_J))
    interval, error = _bca_or_wilson(margin, len(pairs_P), resample if np.ptp(margins_J) > 0 else None)
    result = {"mean": _as_rate(sign * margin), "standard_error": error / 2, "prompts": len(pairs_P)}
    return result | _as_rates(interval, sign)._asdict()


def _regressions(weight_XJ: np.ndarray, length_J: np.ndarray, outcome_J: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Returns theta and phi [2, X] of weighted logistic regressions outcome ~ sigmoid(theta + phi length); Newton."""
    x = np.append(length_J, (-1, 1))
    y = np.append(outcome_J, (0.5, 0.5))
    weight = np.pad(weight_XJ, ((0, 0), (0, 2)), constant_values=0.5)
    coefficients = np.repeat(start, len(weight) // start.shape[1], axis=1)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(coefficients[0][:, None] + coefficients[1][:, None] * x)))
        error, curvature = weight * (y - p), weight * p * (1 - p)
        slope_0, slope_1 = error.sum(1), error @ x
        h_00, h_01, h_11 = curvature.sum(1), curvature @ x, curvature @ (x * x)
        step = np.stack((h_11 * slope_0 - h_01 * slope_1, h_00 * slope_1 - h_01 * slope_0)) / (h_00 * h_11 - h_01**2)
        coefficients += np.clip(step, -2, 2)  # a full step may overshoot where the outcomes are nearly separated
        if np.abs(step).max() < 1e-9:
            return coefficients
    raise NotConvergedError(
        f"length_controlled: the regression did not converge in {NEWTON_STEPS} steps; please report the judgements, "
        f"judgements.jsonl"
    )


def cohen_kappa(labels_1: Sequence[Hashable], labels_2: Sequence[Hashable]) -> float:
    """Agreement of two judges beyond chance.

      kappa = (o - e) / (1 - e), o the share of equal labels, e = sum_k share_1(k) share_2(k).

    1 for equal labels, 0 on average for independent ones. NaN without labels, and where both judges give one and the
    same label throughout: chance alone agrees always, and nothing is left to be beyond it.

    References:
      Cohen, A coefficient of agreement for nominal scales, 1960.
    """
    N = len(labels_1)
    equal = sum(one == other for one, other in zip(labels_1, labels_2, strict=True))
    counts_1, counts_2 = Counter(labels_1), Counter(labels_2)
    chance = sum(count * counts_2[label] for label, count in counts_1.items())  # whole numbers: times N^2
    return (N * equal - chance) / (N * N - chance) if chance < N * N else math.nan


def position_bias(first_wins_J: np.ndarray) -> dict[str, Any]:
    """The share of verdicts for the answer that was shown first; without bias it is one half if all are shown twice.

    Args:
      first_wins_J: [J] 1 where the first one won, 1/2 for a tie, 0; NaN = no verdict, left out.

    Returns:
      share, verdicts, and Wilson's interval with each verdict as one trial: low, high, method.
    """
    margins_J, sign = _canonical(_rates(first_wins_J))
    if not margins_J.size:
        return {"share": math.nan, "verdicts": 0} | NO_INTERVAL._asdict()
    interval = _as_rates(_wilson(margins_J.mean(), margins_J.size), sign)
    return {"share": _as_rate(sign * margins_J.mean()), "verdicts": int(margins_J.size)} | interval._asdict()


def _rates(values: np.ndarray, keep_nan: bool = False) -> np.ndarray:
    rates = np.asarray(values, np.float64)
    if np.any((rates < 0) | (rates > 1)):
        raise ValueError(f"win rates: expected values in [0, 1], got {np.nanmin(rates)} to {np.nanmax(rates)}")
    return rates if keep_nan else rates[~np.isnan(rates)]


def _canonical(rates: np.ndarray) -> tuple[np.ndarray, float]:
    """Margins 2 rate - 1 times a sign that makes their mean positive (their first that is not 0, if the mean is 0).

    Both ways to call the two sides give the same numbers here and differ in the sign alone. Margins are rounded to
    multiples of 2^-40, so that 1/3 and 2/3, which are not each other's complement in floating point, become so;
    sums of up to 2^13 of them are exact.
    """
    margins = np.round((2 * rates - 1) * 2**40) / 2**40
    leading = [value for value in (margins.sum(), *margins[margins != 0][:1]) if value != 0]
    sign = -1.0 if leading and leading[0] < 0 else 1.0
    return sign * margins + 0.0, sign  # + 0.0: no negative zeros


def _as_rate(margin: float) -> float:
    """(1 + margin) / 2 so that _as_rate(-margin) == 1 - _as_rate(margin) to the last bit."""
    upper = (1 + abs(float(margin))) / 2
    return upper if margin >= 0 or math.isnan(margin) else 1 - upper


def _as_rates(margins: Interval, sign: float) -> Interval:
    """Returns an interval of canonical margins as one of win rates."""
    low, high = (margins.low, margins.high) if sign > 0 else (-margins.high, -margins.low)
    return Interval(_as_rate(low), _as_rate(high), margins.method)


def _bca_or_wilson(margin: float, prompts: int, resample: Callable[[], Any] | None) -> tuple[Interval, float]:
    """Returns a margin's interval, and its standard error by the bootstrap (NaN without one).

    BCa from `resample()`; Wilson's without it (None), for fewer prompts than MIN_PROMPTS, and where BCa is NaN.
    """
    error = math.nan
    if resample is not None and prompts >= MIN_PROMPTS:
        result = resample()
        error, (low, high) = float(result.standard_error), result.confidence_interval
        if math.isfinite(low + high):
            return Interval(float(low), float(high), "bca"), error
    return _wilson(margin, prompts), error


def _wilson(margin: float, trials: int) -> Interval:
    """Wilson's interval for margins m = 2 p - 1: (m ± z sqrt((1 - m^2) / n + z^2 / n^2)) / (1 + z^2 / n).

    scipy.stats.binomtest has it for whole numbers of successes alone; a mean of win rates is a fraction of the trials.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    half = z * math.sqrt((1 - margin**2) / trials + (z / trials) ** 2)
    low, high = ((margin + side * half) / (1 + z * z / trials) for side in (-1, 1))
    # where it touches an end, up to rounding
    return Interval(max(-1.0, min(low, margin)), min(1.0, max(high, margin)), "wilson")


def _bootstrap(values: np.ndarray, statistic: Callable[..., np.ndarray], resamples: int, seed: int, batch: int) -> Any:
    """Returns scipy's BCa bootstrap of a statistic over the last axis; an interval that does not exist is NaN."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():  # a NaN says it all
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        return bootstrap(
            (values,),
            statistic,
            n_resamples=resamples,
            batch=max(1, batch),
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        )


def without_nan(value: Any) -> Any:
    """Replaces NaN by None at every depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _valid(scores: Scores) -> np.ndarray:
    values = np.array([math.nan if score is None else score for score in scores], np.float64)
    return values[~np.isnan(values)]
