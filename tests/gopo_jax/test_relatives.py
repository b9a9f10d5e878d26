"""Laws of the advantages of single papers. Every expected value is a formula in NumPy, or a plain loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from gopo_jax import (
    ADVANTAGES,
    gdpo_advantages,
    gopo_advantages,
    gopo_multi_advantages,
    grpo_advantages,
    krpo_advantages,
    odrpo_advantages,
    reinforce_pp_advantages,
    soft_gopo_advantages,
)

P, G, R = 12, 6, 3
SEVERAL = ("gopo_multi", "gdpo")  # those that take every reward apart


def rewards_with_holes(*last: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rewards with some NaN, and a mask that leaves some completions out."""
    rng = np.random.default_rng(0)
    shape = (P, G, *last)
    rewards = (rng.integers(0, 4, shape) if ties else rng.normal(size=shape)).astype(np.float32)
    rewards[rng.random(shape) < 0.15] = np.nan
    return rewards, rng.random((P, G)) < 0.8


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "gopo"])
def test_left_out_is_as_if_deleted(name: str) -> None:
    """Batch statistics included: entries that do not count, and whole groups of them, change nothing."""
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(P, 4)).astype(np.float32)
    padded = np.full((P + 1, 6), np.nan, np.float32)
    padded[:P, [0, 2, 3, 5]] = rewards
    masked, keep = np.where(np.isnan(padded), 1e6, padded), ~np.isnan(padded)
    padded[P, 1], keep[P, 1] = 7.0, True  # one entry alone has nothing to be compared with
    function: Callable[..., jax.Array] = jax.jit(ADVANTAGES[name])
    whole, by_nan, by_mask = (x[..., None] if name in SEVERAL else x for x in (rewards, padded, masked))
    expected = np.zeros((P + 1, 6))
    expected[:P, [0, 2, 3, 5]] = function(whole)
    np.testing.assert_allclose(function(by_nan), expected, atol=1e-5)
    np.testing.assert_allclose(function(by_mask, keep), expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "krpo"])
def test_a_batch_of_equal_rewards_gives_exact_zeros(name: str) -> None:
    """Whatever the rounding of their mean: 0.1 in float32, summed 96 times, is not 9.6."""
    function = jax.jit(ADVANTAGES[name])
    for value in (0.1, 0.7, 3.3, -1e6 / 3):
        rewards = np.full((P, 8) + (1,) * (name in SEVERAL), value, np.float32)
        np.testing.assert_array_equal(function(rewards), np.zeros((P, 8)))


@pytest.mark.parametrize("name", ["reinforce_pp", "krpo", *SEVERAL])
def test_no_gradient_and_errors(name: str) -> None:
    function, extra = ADVANTAGES[name], (1,) * (name in SEVERAL)
    rewards, mask = rewards_with_holes(*extra)
    assert not jax.jit(jax.grad(lambda r: (function(r, mask) ** 2).sum()))(np.nan_to_num(rewards)).any()
    with pytest.raises(ValueError, match="at least 2 completions per prompt"):
        function(np.zeros((3, 1, *extra)))
    with pytest.raises(ValueError, match="mask_PG: expected the shape"):
        function(np.zeros((2, 4, *extra)), np.ones(4, bool))
    with pytest.raises(TypeError, match="complex64"):
        function(np.zeros((2, 4, *extra), np.complex64))


# Over the batch


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_pp_is_normalised_over_the_batch(baseline: Any) -> None:
    rewards, mask = rewards_with_holes()
    valid = mask & ~np.isnan(rewards)
    valid &= valid.sum(-1, keepdims=True) >= 2
    means = np.array([r[v].mean() if v.any() else 0 for r, v in zip(rewards, valid, strict=True)])
    values = rewards.astype(float) - (means[:, None] if baseline == "group" else 0)
    expected = np.where(valid, (values - values[valid].mean()) / values[valid].std(ddof=1), 0)
    np.testing.assert_allclose(reinforce_pp_advantages(rewards, mask, baseline=baseline), expected, atol=1e-5)


def gdpo_by_loop(rewards: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """TRL's `normalize_then_sum`, completion by completion; NaN where a completion misses every reward."""
    total = np.zeros((P, G))
    for p in range(P):
        for k in range(R):
            column = rewards[p, :, k].astype(float)
            there = ~np.isnan(column)
            std = column[there].std(ddof=1) if there.sum() > 1 else 0.0
            total[p, there] += weights[k] * (column[there] - column[there].mean()) / (std + 1e-4)
    total[np.isnan(rewards).all(-1)] = np.nan
    return (total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 1e-4)


def test_gdpo_is_trl_s_normalize_then_sum() -> None:
    rewards, _ = rewards_with_holes(R)
    rewards[0, 0], weights = np.nan, np.array([1.0, 0.5, -2.0], np.float32)
    found = gdpo_advantages(rewards, weights_R=weights)
    np.testing.assert_allclose(found, np.nan_to_num(gdpo_by_loop(rewards, weights)), atol=1e-4)


# Several rewards, ranked


def test_gopo_over_several_rewards_is_the_weighted_mean_of_each() -> None:
    rewards, mask = rewards_with_holes(R, ties=True)
    rewards[0, 0], weights = np.nan, np.array([1.0, 0.5, -2.0], np.float32)
    each = [np.asarray(gopo_advantages(rewards[..., k], mask)) for k in range(R)]
    expected = sum(w * a for w, a in zip(weights, each, strict=True)) / np.abs(weights).sum()
    found = np.asarray(gopo_multi_advantages(rewards, mask, weights_R=weights))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found).max() <= 2 and not found[0, 0]
    np.testing.assert_array_equal(gopo_multi_advantages(rewards[..., :1], mask), each[0])


def test_the_scale_of_no_reward_counts_when_each_is_ranked() -> None:
    rewards, mask = rewards_with_holes(2, ties=True)
    scaled = np.stack([np.exp(rewards[..., 0]) * 1000, rewards[..., 1] - 7], -1)
    np.testing.assert_array_equal(gopo_multi_advantages(scaled, mask), gopo_multi_advantages(rewards, mask))
    with pytest.raises(ValueError, match="weights_R: expected one for each of 2 rewards, got shape .3,."):
        gopo_multi_advantages(rewards, mask, weights_R=np.ones(3))
    with pytest.raises(ValueError, match="rewards_PGR: expected .* got shape .4,."):
        gdpo_advantages(np.ones(4))


# Between GOPO and GRPO


@pytest.mark.parametrize("ties", [False, True])
def test_soft_ranks_are_gopo_at_zero_and_grpo_at_infinity(ties: bool) -> None:
    rewards, mask = rewards_with_holes(ties=ties)
    hard, z_score = gopo_advantages(rewards, mask), grpo_advantages(rewards, mask, epsilon=0.0)
    np.testing.assert_allclose(soft_gopo_advantages(rewards, mask, temperature=1e-5), hard, atol=1e-3)
    np.testing.assert_allclose(soft_gopo_advantages(rewards, mask, temperature=1e3), z_score, rtol=2e-3, atol=2e-3)
    found = np.asarray(soft_gopo_advantages(rewards, mask))
    np.testing.assert_allclose(found.sum(-1), 0, atol=1e-5)
    np.testing.assert_allclose(soft_gopo_advantages(3 * rewards + 1, mask), found, atol=1e-4)
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        soft_gopo_advantages(rewards, temperature=0.0)


# Filtered, decomposed


def test_krpo_is_the_filter_in_the_order_of_the_group() -> None:
    rewards, mask = rewards_with_holes()
    expected = np.zeros((P, G))
    for p in range(P):
        mean, variance = 0.0, 1.0
        valid = mask[p] & ~np.isnan(rewards[p])
        for g in np.flatnonzero(valid) if valid.sum() >= 2 else ():
            predicted = variance + 1e-5
            gain = predicted / (predicted + 1e-2)
            mean += gain * (float(rewards[p, g]) - mean)
            variance = (1 - gain) * predicted
            expected[p, g] = (rewards[p, g] - mean) / (np.sqrt(variance) + 1e-8)
    np.testing.assert_allclose(krpo_advantages(rewards, mask), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("levels", [None, (0, 1, 2, 3), (1.5, 2.5, 99.0)])
def test_odrpo_adds_the_advantages_of_every_level(levels: Any, scale: Any) -> None:
    rewards, mask = rewards_with_holes(ties=True)
    expected = np.zeros((P, G))
    for p in range(P):
        valid = mask[p] & ~np.isnan(rewards[p])
        r = rewards[p, valid]
        for level in (np.unique(r) if levels is None else levels) if valid.sum() >= 2 else ():
            b = (r >= level).astype(float)
            expected[p, valid] += (b - b.mean()) / (b.std(ddof=1) + 1e-4 if scale == "group" else 1)
    np.testing.assert_allclose(odrpo_advantages(rewards, mask, levels=levels, scale=scale), expected, atol=1e-4)


def test_odrpo_without_scale_is_dr_grpo_and_an_outlier_moves_its_own_level_alone() -> None:
    rewards, mask = rewards_with_holes(ties=True)
    centred = grpo_advantages(rewards, mask, scale="none")
    np.testing.assert_allclose(odrpo_advantages(rewards, mask, levels=range(4), scale="none"), centred, atol=1e-5)
    odrpo = functools.partial(odrpo_advantages, np.array([1.0, 1, 2, 2, 3, 9], np.float32))
    np.testing.assert_array_equal(odrpo(), odrpo_advantages(np.array([1.0, 1, 2, 2, 3, 999], np.float32)))
    with pytest.raises(ValueError, match="levels: expected at least one"):
        odrpo(levels=())
