"""Rewards keep the order and the differences of float64, and are float32 where that loses neither."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax.experimental import multihost_utils

from gopo_jax import ADVANTAGES
from train import processes
from train.config import PolicyConfig, RewardSpec
from train.objective import make_advantages
from train.rewards.precision import combine, narrow
from train.run.metrics import rollout_metrics

CLOSE = {
    "beyond 24 bits": [2.0**24, 2.0**24 + 1, 2.0**24 + 2, 2.0**24 + 3],
    "a tier and a score": [1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3],
    "two tiers": [0.0, 1e9, 1e9 + 1, 2e9],
    "tiny": [1e-60, 2e-60, 3e-60, 4e-60],
    "around a number": [0.1, 0.1 + 1e-12, 0.1 + 2e-12, 0.1 + 3e-12],
}
every_group = pytest.mark.parametrize("rewards", CLOSE.values(), ids=CLOSE.keys())


@pytest.fixture
def advantages_of(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> Callable[..., np.ndarray]:
    """advantages_of(name, rewards_PGR, **config)."""

    def compute(name: str, rewards_PGR: Any, penalty_PG: Any = 0.0, **changes: Any) -> np.ndarray:
        P, G, R = np.shape(rewards_PGR)
        specs = [RewardSpec(function="length", name=str(r)) for r in range(R)]
        shape = {"prompts_per_step": P, "microbatch_prompts": 1, "num_generations": G}
        config = policy_config(tmp_path, advantage=name, rewards=specs, **shape, **changes)
        return make_advantages(config)(np.asarray(rewards_PGR), penalty_PG)

    return compute


@every_group
@pytest.mark.parametrize("name", ["gopo", "gopo_multi"])
def test_ranks_are_those_of_pythons_numbers(name: str, rewards: list[float], advantages_of: Any) -> None:
    advantages_PG = advantages_of(name, np.array([rewards, rewards[::-1]])[..., None])
    ranked = advantages_of(name, np.array([[1.0, 2, 3, 4], [4, 3, 2, 1]])[..., None])
    assert advantages_PG.dtype == np.float32
    np.testing.assert_array_equal(advantages_PG, ranked)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "soft_gopo", "odrpo", "gdpo"])
def test_differences_are_those_of_pythons_numbers(name: str, advantages_of: Any) -> None:
    small_PG1 = np.array([[0.0, 1, 2, 5]])[..., None]
    np.testing.assert_allclose(advantages_of(name, 1e9 + small_PG1), advantages_of(name, small_PG1), rtol=1e-5)


def test_a_penalty_is_taken_off_before_the_numbers_are_rounded(advantages_of: Any) -> None:
    penalty_PG = np.array([[0.3, 0.2, 0.1, 0.0]], np.float32)
    np.testing.assert_allclose(advantages_of("dr_grpo", np.full((1, 4, 1), 2.0**24), penalty_PG).sum(), 0, atol=1e-6)
    assert (np.diff(advantages_of("gopo", np.full((1, 4, 1), 2.0**24), penalty_PG)) > 0).all()


def test_float32_stays_as_it_is(advantages_of: Any) -> None:
    rewards_PG = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    rewards_PG[0, 1] = np.nan
    for name in ("gopo", "grpo"):
        expected_PG = np.asarray(ADVANTAGES[name](rewards_PG))
        for rewards in (rewards_PG, rewards_PG.astype(np.float64)):
            assert combine(rewards[..., None], np.ones(1), "sum").dtype == np.float32
            np.testing.assert_allclose(advantages_of(name, rewards[..., None]), expected_PG, rtol=1e-6)


@every_group
def test_only_what_float32_would_lose_stays_float64(rewards: list[float]) -> None:
    assert narrow(np.array([rewards])).dtype == np.float64
    assert narrow(np.array([[0.1, 0.2, np.nan, 0.7], [np.nan] * 4, [1e9 / 3] * 4][:2])).dtype == np.float32


def test_metrics_count_the_ties_of_pythons_numbers() -> None:
    rewards_PG = combine(np.array([CLOSE["a tier and a score"]])[..., None], np.ones(1), "sum")
    metrics = rollout_metrics(rewards_PG, np.ones((1, 4), np.int32), np.ones((1, 4), bool))
    assert metrics["rank/tie_frac"] == metrics["frac_reward_zero_std"] == 0
    assert metrics["reward_std"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1))


def test_sums_that_are_equal_in_decimals_tie() -> None:
    weights_R = np.array([0.1, 0.2, 0.3])
    rewards_PGR = np.array([[[1.0, 1, 0], [0, 0, 1]]])
    assert 0.1 + 0.2 != 0.3
    for combination in ("sum", "mean"):
        assert np.ptp(combine(rewards_PGR, weights_R, combination)) == 0
    far = combine(np.array([[[1e9, 1.0, 0], [1e9, 2.0, 0]]]), np.array([1, 0.1, 1]), "sum")
    assert far[0, 1] > far[0, 0], "what differs does not"


def test_processes_exchange_all_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_jax_does(rows: np.ndarray) -> np.ndarray:  # two processes with the same rows, 64 bits rounded to 32
        narrowed = {"f": np.float32, "i": np.int32}.get(rows.dtype.kind, rows.dtype)
        return np.stack([rows.astype(narrowed)] * 2)

    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", as_jax_does)
    for rows in (np.array(list(CLOSE.values())), np.arange(3) + 2**60, np.array([[1.5]], np.float32)):
        np.testing.assert_array_equal(processes.gather(rows), np.concatenate([rows, rows]))
