"""A missing reward improves no rank: its completion is left out, or the worst of its group; `ignore` is TRL's rule."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gopo_jax import gopo_advantages, grpo_advantages
from models.sampler import Rollout
from train.batch import Groups, choose, learned_mask
from train.config import PolicyConfig, RewardSpec
from train.objective import make_advantages
from train.rewards import Rewards
from train.rewards.precision import combine, missing_masks
from train.rewards.watch import ScoreWatch

NAN = np.nan
# A reward model could not read the last completion, which a function likes as much as another.
UNREAD = np.array([[[-7, NAN], [-5, 0.9], [-3, 0.8], [NAN, 0.9]]])
G, RULES, ADVANTAGES = 4, ("leave_out", "group_min", "ignore"), (gopo_advantages, grpo_advantages)


def random_rewards(seed: int, R: int, P: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rewards_PGR = rng.integers(-9, 9, (P, G, R)).astype(np.float64)
    rewards_PGR[rng.random(rewards_PGR.shape) < 0.3] = NAN
    return rewards_PGR


def test_a_sum_of_one_less_would_be_the_best() -> None:
    weights_R = np.ones(2)
    np.testing.assert_allclose(combine(UNREAD, weights_R, "sum", ["ignore"] * 2), [[-7, -4.1, -2.2, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(
        combine(UNREAD, weights_R, "sum", ["leave_out", "ignore"]), [[-7, -4.1, -2.2, NAN]], rtol=1e-6
    )
    np.testing.assert_allclose(
        combine(UNREAD, weights_R, "sum", ["group_min", "ignore"]), [[-7, -4.1, -2.2, -7]], rtol=1e-6
    )


@pytest.mark.parametrize("combination", ["sum", "mean", "minimum"])
@pytest.mark.parametrize("weights", [[1.0], [-2.0], [1.0, 1.0], [0.5, -1.5, 3.0]], ids=str)
def test_a_missing_reward_gives_no_positive_advantage(combination: str, weights: list[float]) -> None:
    rewards_PGR, weights_R = random_rewards(len(weights), len(weights)), np.array(weights)
    lacks_PGR = np.isnan(rewards_PGR)
    for rules in itertools.product(RULES, repeat=len(weights)):
        combined_PG = combine(rewards_PGR, weights_R, combination, rules)
        left_out_PG, _ = missing_masks(rewards_PGR, weights_R, rules)
        np.testing.assert_array_equal(np.isnan(combined_PG), left_out_PG)
        strict_PG = lacks_PGR[..., np.array(rules) != "ignore"].any(-1)
        out_PG = lacks_PGR[..., np.array(rules) == "leave_out"].any(-1)
        assert left_out_PG[out_PG].all()
        for advantages in ADVANTAGES:
            advantages_PG = np.asarray(advantages(combined_PG))
            assert (advantages_PG[strict_PG] <= 1e-6).all()
            assert (advantages_PG[left_out_PG] == 0).all()
            worst_P1 = np.min(advantages_PG, -1, keepdims=True, where=~left_out_PG, initial=np.inf)
            assert (advantages_PG <= worst_P1 + 1e-6)[strict_PG & ~left_out_PG].all()


def test_ignore_is_what_no_rule_is() -> None:
    rewards_PGR, weights_R = random_rewards(3, 2), np.array([1.0, 0.5])
    for combination in ("sum", "mean", "minimum"):
        np.testing.assert_array_equal(
            combine(rewards_PGR, weights_R, combination), combine(rewards_PGR, weights_R, combination, ["ignore"] * 2)
        )


def test_the_rewards_of_whole_completions_stay_as_they_are() -> None:
    rewards_PGR, weights_R = random_rewards(4, 2), np.array([1.0, 0.5])
    whole_PG = ~np.isnan(rewards_PGR).any(-1)
    for rule in RULES:
        combined_PG = combine(rewards_PGR, weights_R, "sum", [rule] * 2)
        np.testing.assert_array_equal(combined_PG[whole_PG], combine(rewards_PGR, weights_R, "sum")[whole_PG])


def test_a_group_without_a_whole_completion_has_no_worst() -> None:
    rewards_PGR = np.array([[[NAN, 1.0], [NAN, 2.0], [NAN, NAN]]])
    assert np.isnan(combine(rewards_PGR, np.ones(2), "sum", ["group_min", "ignore"])).all()


def test_a_reward_without_weight_is_missed_by_nobody() -> None:
    for rule in RULES:
        assert combine(np.array([[[NAN, 1.0], [3.0, 2.0]]]), np.array([0.0, 1.0]), "sum", [rule, "ignore"])[0, 0] == 1


def test_by_default_a_model_is_left_out_and_a_function_ignored() -> None:
    assert RewardSpec(model="m").missing_rule == "leave_out" and RewardSpec(function="length").missing_rule == "ignore"
    assert RewardSpec(model="m", missing="ignore").missing_rule == "ignore"
    functions = [RewardSpec(function="length", name="a", missing="leave_out"), RewardSpec(function="length", name="b")]
    rewards = Rewards(functions, None, "float32")
    np.testing.assert_array_equal(rewards.left_out(UNREAD), [[False, False, False, True]])
    assert np.isnan(rewards.combine(UNREAD)[0, 3])


@pytest.fixture
def config_of(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> Callable[..., PolicyConfig]:
    """config_of(missing, **changes): the rewards "model", with that rule, and "function"."""

    def make(missing: Any, **changes: Any) -> PolicyConfig:
        specs = [RewardSpec(function="length", name="model", missing=missing), RewardSpec(function="length")]
        return policy_config(tmp_path, rewards=specs, prompts_per_step=1, microbatch_prompts=1, **changes)

    return make


@pytest.mark.parametrize(("missing", "expected"), [("leave_out", 0), ("group_min", -4 / 3), ("ignore", 2)])
def test_the_rule_reaches_the_advantages(missing: str, expected: float, config_of: Any) -> None:
    advantages_PG = make_advantages(config_of(missing))(UNREAD)
    assert advantages_PG[0, 3] == pytest.approx(expected)


def test_a_penalty_does_not_lift_the_worst(config_of: Any) -> None:
    penalty_PG = np.array([[0.0, 9.0, 9.0, -9.0]])
    assert make_advantages(config_of("group_min"))(UNREAD, penalty_PG)[0, 3] < 0


def test_where_each_reward_is_ranked_apart_there_is_no_rule(config_of: Any) -> None:
    assert config_of(None, advantage="gdpo").missing_rules == ["ignore", "ignore"]
    with pytest.raises(ValueError, match="rewards.missing: is for rewards that are combined into one; gdpo takes"):
        config_of("group_min", advantage="gdpo")


def test_what_is_left_out_teaches_nothing_and_moves_with_its_group() -> None:
    settings: Any = SimpleNamespace(
        prompts_per_step=1, dynamic_sampling_attempts=2, loss=SimpleNamespace(mask_truncated_completions=False)
    )
    rollout = Rollout(np.zeros((1, G, 1), int), np.zeros((1, G, 1)), np.ones((1, G), int), np.ones((1, G), bool))
    drawn = [
        Groups([{}], np.zeros((1, 1), int), np.ones(1, int), rollout, rewards_PGR, missing_masks(rewards_PGR, *how)[0])
        for how in [(np.ones(2), ["leave_out", "ignore"])]
        for rewards_PGR in (np.ones((1, G, 2)), UNREAD)
    ]
    chosen = choose(drawn, lambda rewards_PGR: np.asarray(gopo_advantages(rewards_PGR[..., 0])), settings)
    np.testing.assert_array_equal(learned_mask(chosen, settings), [[True, True, True, False]])


def test_a_step_is_silent_when_nothing_is_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ScoreWatch("run", ["model", "length"])
    watch.look("step 1", np.array([[[NAN, 1.0], [NAN, 2.0]]]), np.full((1, 2), NAN))
    assert "step 1: no reward for any of 2 completions (model: all unscorable)" in capsys.readouterr().out
    assert watch.silent_steps == 1
