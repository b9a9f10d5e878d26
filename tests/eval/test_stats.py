"""Intervals cover, swapping mirrors, length is controlled for, kappa is Cohen's."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.stats import cohen_kappa, length_controlled, position_bias, summary, win_rate_interval


def judged(rng: np.random.Generator, mean: float, prompts: int = 200, pairs: int = 4, tied: float = 0.2) -> np.ndarray:
    """Win rates of prompts that differ: each has a rate of its own around `mean`; some of its pairs tie."""
    own_P = rng.beta(4 * mean, 4 * (1 - mean), size=(prompts, 1))
    wins = (rng.random((prompts, pairs)) < own_P).astype(float)
    tie = rng.random((prompts, pairs)) < tied  # whoever would have won: half of the wins become halves
    return np.where(tie, 0.5, wins).mean(1)


def expected(mean: float, tied: float) -> float:
    return (1 - tied) * mean + tied / 2


def coverage(draw: Callable[[np.random.Generator], np.ndarray], true: float, repetitions: int) -> float:
    inside = 0
    for seed in range(repetitions):
        low, high, _ = win_rate_interval(draw(np.random.default_rng([seed, 7])), seed)
        inside += low <= true <= high
    return inside / repetitions


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["several pairs a prompt, with ties", "one pair a prompt"])
@pytest.mark.parametrize("mean", [0.3, 0.5])  # beyond 0.5 all is mirrored, see below
def test_95_percent_intervals_cover_93_to_97_percent(kind: str, mean: float) -> None:
    tied = 0.2 if kind.startswith("several") else 0.0
    pairs = 4 if tied else 1
    found = coverage(lambda rng: judged(rng, mean, pairs=pairs, tied=tied), expected(mean, tied), 1000)
    print(f"win rate {expected(mean, tied):.2f}, {kind}: {100 * found:.1f} % of 1,000 intervals cover it")
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("prompts", [1, 2, 5, 19])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, None])
def test_few_prompts_have_a_stated_finite_interval(prompts: int, value: float | None) -> None:
    rates_P = judged(np.random.default_rng(prompts), 0.6, prompts) if value is None else np.full(prompts, value)
    low, high, method = win_rate_interval(rates_P, seed=0)
    assert method == "wilson" and 0 <= low <= rates_P.mean() <= high <= 1 and high - low > 0


@pytest.mark.parametrize("value", [0.0, 1 / 3, 0.5, 1.0])
def test_prompts_that_all_agree_claim_no_certainty(value: float) -> None:
    """Wilson's formula, with each prompt as one trial."""
    P, z = 193, 1.959963984540054
    low, high, method = win_rate_interval(np.full(P, value), seed=0)
    centre, half = value + z * z / (2 * P), z * math.sqrt(value * (1 - value) / P + z * z / (4 * P * P))
    np.testing.assert_allclose([low, high], np.array([centre - half, centre + half]) / (1 + z * z / P), atol=1e-9)
    assert method == "wilson"


@pytest.mark.parametrize("wins", [0, 1, 9, 10, 19])
def test_whole_wins_have_scipy_s_wilson_interval(wins: int) -> None:
    found = win_rate_interval(np.arange(19) < wins, seed=0)
    np.testing.assert_allclose(found[:2], binomtest(wins, 19).proportion_ci(0.95, method="wilson"), atol=1e-12)
    assert found.method == "wilson"


def test_wilson_covers_small_samples_at_least() -> None:
    for mean, prompts in itertools.product((0.3, 0.5, 0.7), (5, 19)):
        assert coverage(lambda rng, m=mean, p=prompts: judged(rng, m, p, tied=0.0), mean, 1000) >= 0.93


def test_twenty_prompts_are_enough_for_a_bootstrap_and_missing_ones_are_left_out() -> None:
    rates_P = judged(np.random.default_rng(0), 0.6, 20)
    assert win_rate_interval(rates_P, 0).method == "bca" and win_rate_interval(rates_P[:19], 0).method == "wilson"
    holes = np.insert(rates_P, (0, 5, 20), math.nan)
    assert summary(holes, 0) == summary(rates_P, 0) and summary(holes, 0)["prompts"] == 20
    assert win_rate_interval(np.array([math.nan]), 0).method == "none" and summary(np.array([]), 0)["prompts"] == 0
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], got -0.5 to 1"):
        win_rate_interval(np.array([1, -0.5]), 0)


@pytest.mark.parametrize("pairs", [1, 2, 3, 7, 9, 48])
@pytest.mark.parametrize("prompts", [1, 19, 20, 61])
def test_swapping_a_and_b_mirrors_exactly(pairs: int, prompts: int) -> None:
    """== for any share of wins and ties; 1 - k/n and (n - k)/n are not the same number, the result is."""
    rng = np.random.default_rng([pairs, prompts])
    halves = rng.integers(0, 2 * pairs + 1, size=prompts)
    one, other = (summary(k / (2 * pairs), seed=3) for k in (halves, 2 * pairs - halves))
    assert one["mean"] == 1 - other["mean"] and other["mean"] == 1 - one["mean"]
    assert (one["low"], one["high"]) == (1 - other["high"], 1 - other["low"])
    assert (other["low"], other["high"]) == (1 - one["high"], 1 - one["low"])
    same = ("prompts", "method", *(("standard_error",) if prompts > 1 else ()))
    assert [one[key] for key in same] == [other[key] for key in same]
    np.testing.assert_allclose(one["mean"], (halves / (2 * pairs)).mean(), rtol=1e-11)
    assert summary(1 - halves / (2 * pairs), seed=3) == other or prompts == 1  # whose standard error is NaN


def test_a_mean_of_one_half_mirrors_too() -> None:
    rates_P = np.array([0.25, 0.75, 1, 0] * 6)
    one, other = win_rate_interval(rates_P, 0), win_rate_interval(1 - rates_P, 0)
    assert (one.low, one.high) == (1 - other.high, 1 - other.low) and one.method == "bca"


# length


def pairs_of(
    rng: np.random.Generator, prompts: int = 400, each: int = 3, longer: float = 10.0
) -> tuple[np.ndarray, ...]:
    """Lengths of A and of B, A's longer on average, and each pair's prompt."""
    N = prompts * each
    return rng.normal(70, 20, N), rng.normal(60, 20, N), np.repeat(np.arange(prompts), each)


def test_where_length_plays_no_part_it_is_the_plain_win_rate() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.2, 0.5):
        a, b, prompt = pairs_of(rng, prompts=400)
        wins = (rng.random(len(a)) < rate).astype(float)
        found = length_controlled(wins, a, b, prompt, seed=0)
        np.testing.assert_allclose(found["mean"], wins.mean(), atol=0.025)
        assert found["low"] < wins.mean() < found["high"] and found["method"] == "bca"


def test_a_judge_of_length_alone_is_undecided_at_equal_length() -> None:
    """Separation: a likelihood without a maximum. The longer side's plain win rate is far from one half."""
    a, b, prompt = pairs_of(np.random.default_rng(1))
    found = length_controlled((a > b).astype(float), a, b, prompt, seed=0)
    assert (a > b).mean() > 0.6
    assert abs(found["mean"] - 0.5) < 0.1 and 0 < found["low"] < 0.5 < found["high"] < 1


def test_the_rate_at_equal_length_is_found_again() -> None:
    """Outcomes drawn from the model itself."""
    rng = np.random.default_rng(2)
    a, b, prompt = pairs_of(rng, prompts=1500, each=1)
    logits = 0.4 + 1.5 * np.tanh((a - b) / (a - b).std())
    wins = rng.random(len(a)) < 1 / (1 + np.exp(-logits))
    found = length_controlled(wins.astype(float), a, b, prompt, seed=0)
    assert found["low"] < 1 / (1 + math.exp(-0.4)) < found["high"] and found["high"] - found["low"] < 0.07
    assert wins.mean() > found["high"]


@pytest.mark.parametrize("kind", ["noise", "length", "won", "tied", "thirds"])
@pytest.mark.parametrize("prompts", [1, 7, 40])
def test_swapping_mirrors_the_length_controlled_rate(kind: str, prompts: int) -> None:
    rng = np.random.default_rng([prompts, 3])
    a, b, prompt = pairs_of(rng, prompts)
    kinds = {"noise": rng.integers(0, 3, len(a)), "length": 2 * (a > b), "won": 2, "tied": 1}
    halves = np.broadcast_to(kinds.get(kind, 0), len(a))
    rates, mirrored = halves / 2, (2 - halves) / 2
    if kind == "thirds":
        thirds = rng.integers(0, 4, len(a))
        rates, mirrored = thirds / 3, (3 - thirds) / 3
    one, other = length_controlled(rates, a, b, prompt, 5), length_controlled(mirrored, b, a, prompt, 5)
    assert [one["mean"], one["low"], one["high"]] == [1 - other["mean"], 1 - other["high"], 1 - other["low"]]
    assert 0 <= one["low"] <= one["mean"] <= one["high"] <= 1 and one["prompts"] == prompts
    assert kind != "tied" or one["mean"] == 0.5


def test_a_prompt_with_many_pairs_weighs_as_much_as_one_with_few() -> None:
    prompt = np.repeat(np.arange(30), 2)
    a, b = np.tile([15.0, 5.0], 30), np.full(60, 10.0)  # as often longer as shorter, so that the scale stays
    wins = np.random.default_rng(4).integers(0, 2, 60).astype(float)
    more = [np.concatenate([v, v[prompt < 10], v[prompt < 10]]) for v in (wins, a, b, prompt)]
    once, thrice = length_controlled(wins, a, b, prompt, 0), length_controlled(*more, 0)
    np.testing.assert_allclose(thrice["mean"], once["mean"], rtol=1e-12)


def test_pairs_without_a_length_or_a_result_are_left_out() -> None:
    a, b, prompt = pairs_of(np.random.default_rng(5), prompts=25)
    wins = (a + 5 > b).astype(float)
    holes = [
        np.append(v, extra) for v, extra in ((wins, [math.nan, 1]), (a, [1, math.nan]), (b, [2, 2]), (prompt, [0, 99]))
    ]
    assert length_controlled(*holes, seed=0) == length_controlled(wins, a, b, prompt, seed=0)


def test_length_and_skill_that_cannot_be_told_apart_are_not() -> None:
    def found(difference: float) -> dict[str, Any]:
        return length_controlled(np.ones(30), np.full(30, 5 + difference), np.full(30, 5.0), np.arange(30), seed=0)

    assert found(3)["method"] == "none" and math.isnan(found(3)["mean"]) and found(3)["prompts"] == 30
    assert found(0)["method"] == "wilson"
    np.testing.assert_allclose(found(0)["mean"], 30.5 / 31)  # with the half prompts that tie


# agreement and position


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        ([[20, 5], [10, 15]], 0.4),  # 0.7 agree, 0.5 by chance
        ([[45, 15], [25, 15]], (0.6 - 0.54) / (1 - 0.54)),
        ([[10, 0], [0, 30]], 1.0),
        ([[4, 8], [8, 16]], 0.0),  # independent
        ([[0, 10], [10, 0]], -1.0),
        ([[3, 1, 0], [1, 4, 1], [0, 2, 8]], (15 / 20 - 148 / 400) / (1 - 148 / 400)),
    ],
)
def test_kappa_of_tables_by_hand(table: list[list[int]], kappa: float) -> None:
    cells = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    one, other = zip(*cells, strict=True)
    np.testing.assert_allclose(cohen_kappa(one, other), kappa, atol=1e-15)
    assert cohen_kappa(other, one) == cohen_kappa(one, other)
    assert cohen_kappa(["abc"[i] for i in one], ["abc"[j] for j in other]) == cohen_kappa(one, other)


def test_kappa_is_undefined_only_without_anything_to_disagree_about() -> None:
    assert math.isnan(cohen_kappa([], [])) and math.isnan(cohen_kappa("aaa", "aaa"))
    assert cohen_kappa("aaa", "aab") == 0 and cohen_kappa("aaa", "bbb") == 0
    with pytest.raises(ValueError):
        cohen_kappa("a", "ab")


def test_position_bias_is_the_share_of_the_first() -> None:
    found = position_bias(np.array([1, 1, 0.5, 0, math.nan]))
    assert found["share"] == 0.625 and found["verdicts"] == 4 and found["method"] == "wilson"
    mirrored = position_bias(np.array([0, 0, 0.5, 1]))
    assert (found["low"], found["high"]) == (1 - mirrored["high"], 1 - mirrored["low"])
    assert position_bias(np.array([]))["verdicts"] == 0
