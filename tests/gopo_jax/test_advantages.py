"""Laws of the group advantages. Every expected value is a formula in NumPy, written another way than the code."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gopo_jax
from gopo_jax import (
    ADVANTAGES,
    dr_grpo_advantages,
    gopo_advantages,
    grpo_advantages,
    odrpo_advantages,
    rloo_advantages,
    soft_gopo_advantages,
)

gopo = jax.jit(gopo_advantages, static_argnames="ties")
grpo = jax.jit(grpo_advantages, static_argnames="scale")
rloo = jax.jit(rloo_advantages)

VARIANTS: dict[str, Callable[..., jax.Array]] = {
    "gopo": gopo,
    "gopo ordinal": functools.partial(gopo, ties="ordinal"),
    "grpo": grpo,
    "grpo epsilon 0": functools.partial(grpo, epsilon=0.0),
    "grpo batch": functools.partial(grpo, scale="batch"),
    "grpo none": functools.partial(grpo, scale="none"),
    "rloo": rloo,
    "dr_grpo": jax.jit(dr_grpo_advantages),
    "soft_gopo": jax.jit(soft_gopo_advantages),
    "odrpo": jax.jit(odrpo_advantages),
}
every_variant = pytest.mark.parametrize("advantages", VARIANTS.values(), ids=VARIANTS.keys())
every_rule = pytest.mark.parametrize("advantages", [gopo, grpo, rloo], ids=["gopo", "grpo", "rloo"])
every_shape = pytest.mark.parametrize("shape", [(2,), (16, 8), (2, 1, 3, 7)], ids=str)
FULL = np.ones((16, 8), bool)  # one shape, always with a mask, where the shape does not matter: compiled once


def random_rewards(shape: tuple[int, ...] = FULL.shape, *, ties: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(-2, 2, shape) if ties else rng.normal(size=shape)).astype(np.float32)


def with_holes(
    shape: tuple[int, ...] = FULL.shape, *, ties: bool, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards with some NaN, a mask, and where both leave an entry valid."""
    rng = np.random.default_rng(seed)
    rewards = random_rewards(shape, ties=ties, seed=seed)
    rewards[rng.random(shape) < 0.2] = np.nan
    mask = rng.random(shape) < 0.75
    return rewards, mask, mask & ~np.isnan(rewards)


def per_group(function: Callable[[np.ndarray], np.ndarray], rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Apply a formula to the valid entries of every group, deleting the others; too small a group gives zeros."""
    out = np.zeros(rewards.shape)
    for index in np.ndindex(rewards.shape[:-1]):
        if valid[index].sum() >= 2:
            out[index][valid[index]] = function(rewards[index][valid[index]].astype(np.float64))
    return out


def gopo_by_counting(r: np.ndarray) -> np.ndarray:
    """The mid-rank of i is 1 + (how many are better) + (how many others are equal) / 2."""
    better = (r[None, :] > r[:, None]).sum(1)
    equal = (r[None, :] == r[:, None]).sum(1) - 1
    return 2 - 4 * (better + equal / 2) / (r.size - 1)


def gopo_by_double_argsort(r: np.ndarray) -> np.ndarray:
    """The rule of the paper's code."""
    rank = 1 + np.argsort(np.argsort(-r, kind="stable"), kind="stable")
    return 2 - 4 * (rank - 1) / (r.size - 1)


def grpo_by_numpy(r: np.ndarray, epsilon: float = 1e-4) -> np.ndarray:
    return (r - r.mean()) / (r.std(ddof=1) + epsilon) if np.ptp(r) else np.zeros(r.size)


def rloo_by_loop(r: np.ndarray) -> np.ndarray:
    return np.array([r[i] - np.delete(r, i).mean() for i in range(r.size)])


# GOPO


@pytest.mark.parametrize(
    "ranked", [gopo_advantages, lambda r: gopo_jax.gopo_multi_advantages(np.asarray(r)[..., None])]
)
@pytest.mark.parametrize("low", [2**24, 1e9, 1e-60, -(2**53) + 4])
def test_the_order_of_the_hosts_numbers_is_taken_before_float32(ranked: Any, low: float) -> None:
    step = low if low < 1 and low > 0 else 1
    rewards = [low + 2 * step, low, float("nan"), low + step, low]
    expected = np.asarray(gopo_advantages(np.array([3, 1, np.nan, 2, 1], np.float32)))
    np.testing.assert_array_equal(ranked(np.array(rewards)), expected)
    np.testing.assert_array_equal(ranked(rewards), expected)


@every_shape
def test_gopo_is_the_counting_formula(shape: tuple[int, ...]) -> None:
    for seed, ties in itertools.product(range(4), (False, True)):
        rewards, mask, valid = with_holes(shape, ties=ties, seed=seed)
        advantages = gopo(rewards, mask)
        np.testing.assert_allclose(advantages, per_group(gopo_by_counting, rewards, valid), atol=1e-6)
        np.testing.assert_allclose(np.sum(advantages, -1), 0, atol=1e-5)


@every_shape
def test_gopo_is_the_double_argsort_where_ties_do_not_decide(shape: tuple[int, ...]) -> None:
    rewards, mask, valid = with_holes(shape, ties=False, seed=1)
    np.testing.assert_allclose(gopo(rewards, mask), per_group(gopo_by_double_argsort, rewards, valid), atol=1e-6)
    for ties in (False, True):
        rewards, mask, valid = with_holes(shape, ties=ties, seed=1)
        expected = per_group(gopo_by_double_argsort, rewards, valid)
        np.testing.assert_allclose(gopo(rewards, mask, ties="ordinal"), expected, atol=1e-6)


@pytest.mark.parametrize("ties", ["average", "ordinal"])
@pytest.mark.parametrize(
    "monotone", [lambda r: 3 * r - 7, np.exp, lambda r: r**3, np.arctan], ids=["affine", "exp", "cube", "arctan"]
)
def test_gopo_sees_only_the_order(monotone: Callable[[np.ndarray], np.ndarray], ties: str) -> None:
    rewards, mask, _ = with_holes(ties=True)
    np.testing.assert_array_equal(gopo(monotone(rewards), mask, ties=ties), gopo(rewards, mask, ties=ties))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int32])
def test_gopo_of_another_dtype_is_that_of_the_same_values_in_float32(dtype: Any) -> None:
    rewards = (4 * random_rewards(ties=False)).astype(dtype)
    advantages = gopo(rewards, FULL)
    assert advantages.dtype == jnp.float32
    np.testing.assert_array_equal(advantages, gopo(rewards.astype(np.float32), FULL))


@every_shape
def test_gopo_mean_square_without_ties(shape: tuple[int, ...]) -> None:
    advantages = gopo(random_rewards(shape, ties=False), np.ones(shape, bool))
    expected = 4 * (shape[-1] + 1) / (3 * (shape[-1] - 1))
    np.testing.assert_allclose(np.square(advantages).mean(-1), expected, rtol=1e-6)


@pytest.mark.parametrize("group", [2, 3, 4, 5])
@pytest.mark.parametrize("answer_rewards", [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]], ids=["distinct", "tied"])
def test_gopo_expected_advantage_is_the_pairwise_win_rate(group: int, answer_rewards: list[float]) -> None:
    """E[A_i | completion i] = 4 w_i - 2, w_i = P(i beats a fresh completion), ties half: summed over all groups."""
    rewards_O, policy_O = np.array(answer_rewards), np.array([0.5, 0.2, 0.3])
    others = np.array(list(itertools.product(range(3), repeat=4)))
    probability = policy_O[others].prod(-1)
    for mine in range(3):
        answers_PG = np.column_stack([np.full(len(others), mine), others])
        mask_PG = np.broadcast_to(np.arange(5) < group, answers_PG.shape)  # a smaller group: the others sum out
        expected_advantage = probability @ np.asarray(gopo(rewards_O[answers_PG], mask_PG))[:, 0]
        wins = (rewards_O[mine] > rewards_O) + (rewards_O[mine] == rewards_O) / 2
        np.testing.assert_allclose(expected_advantage, 4 * policy_O @ wins - 2, atol=1e-6)


def test_gopo_ranks_infinite_rewards_and_takes_the_two_zeros_for_equal() -> None:
    group = np.array([0.0, -np.inf, np.inf, np.nan, -0.0, -np.inf, 1.0, np.nan], np.float32)
    rewards = np.stack([np.roll(group, shift) for shift in range(16)])
    expected = per_group(gopo_by_counting, rewards, ~np.isnan(rewards))
    np.testing.assert_allclose(gopo(rewards, FULL), expected, atol=1e-6)
    assert expected[0, 2] == 2 and expected[0, 1] == expected[0, 5] and expected[0, 0] == expected[0, 4]


def test_four_equal_rewards_give_a_gradient_from_nothing_in_ordinal_mode_only() -> None:
    rewards, mask = np.full(FULL.shape, 5, np.float32), np.broadcast_to(np.arange(8) < 4, FULL.shape)
    np.testing.assert_array_equal(gopo(rewards, mask), np.zeros(FULL.shape))
    ordinal = np.asarray(gopo(rewards, mask, ties="ordinal"))[:, :4]
    np.testing.assert_allclose(ordinal, [[2, 2 / 3, -2 / 3, -2]] * 16, rtol=1e-6)


# GRPO and RLOO


@every_shape
@pytest.mark.parametrize("epsilon", [1e-4, 0.0, 0.5])
def test_grpo_is_the_z_score(shape: tuple[int, ...], epsilon: float) -> None:
    rewards, mask, valid = with_holes(shape, ties=False, seed=3)
    expected = per_group(lambda r: grpo_by_numpy(r, epsilon), rewards, valid)
    np.testing.assert_allclose(grpo(rewards, mask, epsilon=epsilon), expected, atol=2e-5)


def test_grpo_epsilon_is_that_of_the_paper_by_default() -> None:
    rewards, mask, valid = with_holes(ties=False, seed=3)
    rewards *= 1e-3
    np.testing.assert_allclose(grpo(rewards, mask), per_group(grpo_by_numpy, rewards, valid), atol=2e-5)


@every_shape
def test_grpo_batch_scale_divides_by_the_deviation_of_all_valid_rewards(shape: tuple[int, ...]) -> None:
    rewards, mask, valid = with_holes(shape, ties=False, seed=4)
    deviation = rewards[valid].astype(np.float64).std(ddof=1) if valid.sum() >= 2 else 0.0
    expected = per_group(lambda r: (r - r.mean()) / (deviation + 1e-4), rewards, valid)
    np.testing.assert_allclose(grpo(rewards, mask, scale="batch"), expected, atol=2e-5)


@every_shape
def test_grpo_without_scale_is_the_centred_reward(shape: tuple[int, ...]) -> None:
    rewards, mask, valid = with_holes(shape, ties=False, seed=5)
    expected = per_group(lambda r: r - r.mean(), rewards, valid)
    np.testing.assert_allclose(grpo(rewards, mask, scale="none"), expected, atol=1e-5)


@every_shape
def test_grpo_mean_square(shape: tuple[int, ...]) -> None:
    advantages = grpo(random_rewards(shape, ties=False), np.ones(shape, bool), epsilon=0.0)
    np.testing.assert_allclose(np.square(advantages).mean(-1), (shape[-1] - 1) / shape[-1], rtol=1e-5)


@every_shape
def test_rloo_is_the_reward_minus_the_mean_of_the_others(shape: tuple[int, ...]) -> None:
    rewards, mask, valid = with_holes(shape, ties=False, seed=6)
    expected = per_group(rloo_by_loop, rewards, valid)
    np.testing.assert_allclose(rloo(rewards, mask), expected, atol=1e-5)


@every_shape
def test_rloo_is_grpo_without_scale_times_g_over_g_minus_one(shape: tuple[int, ...]) -> None:
    rewards, mask, group = random_rewards(shape, ties=True), np.ones(shape, bool), shape[-1]
    expected = np.asarray(grpo(rewards, mask, scale="none")) * group / (group - 1)
    np.testing.assert_allclose(rloo(rewards, mask), expected, rtol=1e-5, atol=1e-7)


# All of them


@every_variant
def test_only_the_differences_of_rewards_count(advantages: Callable[..., jax.Array]) -> None:
    rewards, mask, _ = with_holes(ties=True)
    np.testing.assert_allclose(advantages(rewards + 64, mask), advantages(rewards, mask), atol=1e-5)


@every_rule
def test_left_out_entries_are_as_if_deleted(advantages: Callable[..., jax.Array]) -> None:
    rewards = random_rewards((16, 5), ties=False)
    garbage = np.array([[np.nan, np.inf, 1e30]] * 16, np.float32)
    padded = np.concatenate([rewards[:, :2], garbage, rewards[:, 2:]], -1)
    keep = np.array([True, True, False, False, False, True, True, True])
    masked = np.asarray(advantages(padded, np.broadcast_to(keep, padded.shape)))
    unscorable = np.asarray(advantages(np.where(keep, padded, np.nan), FULL))
    for result in (masked, unscorable):
        np.testing.assert_allclose(result[:, keep], advantages(rewards), atol=1e-6)
        np.testing.assert_array_equal(result[:, ~keep], 0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gopo ordinal"])
@every_shape
def test_a_constant_group_gives_exact_zeros(name: str, shape: tuple[int, ...]) -> None:
    for value in (0.0, 10.1, -3.3, 1e6 / 3):
        rewards = np.full(shape, value, np.float32)
        np.testing.assert_array_equal(VARIANTS[name](rewards, np.ones(shape, bool)), np.zeros(shape))
    groups = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None] / 3, FULL.shape)
    np.testing.assert_array_equal(VARIANTS[name](groups, FULL), np.zeros(FULL.shape))


@every_variant
def test_fewer_than_two_valid_entries_give_zeros(advantages: Callable[..., jax.Array]) -> None:
    rewards, mask = random_rewards(ties=False), FULL.copy()
    rewards[::3] = np.nan
    rewards[1::3, 1:] = np.nan
    mask[2::3, 3:] = False
    rewards[2::3, :2] = np.nan
    np.testing.assert_array_equal(advantages(rewards, mask), np.zeros(FULL.shape))


@every_rule
def test_compiled_is_eager_and_no_mask_is_a_full_mask(advantages: Callable[..., jax.Array]) -> None:
    rewards, _, _ = with_holes(ties=True)
    with jax.disable_jit():
        eager = advantages(rewards)
    np.testing.assert_allclose(advantages(rewards, FULL), eager, atol=1e-6)


@every_rule
def test_vmap_is_the_batch(advantages: Callable[..., jax.Array]) -> None:
    rewards, mask, _ = with_holes(ties=True)
    np.testing.assert_allclose(jax.vmap(advantages)(rewards, mask), advantages(rewards, mask), atol=1e-6)


@every_variant
def test_no_gradient_flows_into_rewards(advantages: Callable[..., jax.Array]) -> None:
    rewards, mask, _ = with_holes((2, 5), ties=True)
    gradient = jax.jit(jax.grad(lambda r: (advantages(r, mask) * jnp.arange(5.0)).sum()))(rewards)
    np.testing.assert_array_equal(gradient, np.zeros((2, 5)))


@every_rule
def test_an_empty_batch_gives_an_empty_batch(advantages: Callable[..., jax.Array]) -> None:
    assert advantages(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_the_table_holds_the_functions_by_name() -> None:
    assert dict(ADVANTAGES) == {name: getattr(gopo_jax, f"{name}_advantages") for name in ADVANTAGES}
    assert {"gopo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gdpo", "krpo", "odrpo"} < ADVANTAGES.keys()


# Errors


@every_variant
def test_errors_say_what_was_expected(advantages: Callable[..., jax.Array]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 completions per prompt \(num_generations >= 2\).*\(3, 1\)"):
        advantages(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="rewards_PG: .*scalar"):
        advantages(1.0)
    with pytest.raises(ValueError, match=r"mask_PG: expected the shape of rewards_PG, \(2, 4\), got \(4,\)"):
        advantages(np.zeros((2, 4)), np.ones(4, bool))
    with pytest.raises(TypeError, match="rewards_PG: .*bool"):
        advantages(np.zeros((2, 4), bool))
    with pytest.raises(TypeError, match="rewards_PG: .*complex64"):
        advantages(np.zeros((2, 4), np.complex64))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="ties: expected one of 'average', 'ordinal', got 'min'"):
        gopo(np.zeros(4), ties="min")
    with pytest.raises(ValueError, match="scale: expected one of 'group', 'batch', 'none', got 'std'"):
        grpo(np.zeros(4), scale="std")
