"""Laws of what stands between the rollout and the update: the choice of groups, the mask, the minibatches."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gopo_jax import gopo_advantages
from models.sampler import Rollout
from train.batch import Batch, Groups, choose, completion_table, has_signal, is_enough, make_batch, minibatches
from train.data.rows import batch_indices

G, T, R = 3, 4, 2


def groups(rewards: Any, first: int = 0, S: int = 5) -> Groups:
    """One group for each row of rewards ([P, G] or [P, G, R]); group p says first + p everywhere."""
    rewards_PGR = np.asarray(rewards, np.float32)
    rewards_PGR = rewards_PGR[..., None] if rewards_PGR.ndim == 2 else rewards_PGR
    number_P = first + np.arange(len(rewards_PGR))
    shape = (len(number_P), G, T)
    rollout = Rollout(
        np.broadcast_to(number_P[:, None, None], shape),
        np.zeros(shape, np.float32),
        np.broadcast_to([1, T, 2], shape[:2]),
        np.broadcast_to([True, False, True], shape[:2]),
    )
    rows = [{"prompt": str(number)} for number in number_P]
    return Groups(rows, np.broadcast_to(number_P[:, None], (len(rows), S)), number_P, rollout, rewards_PGR)


NAN = np.nan
FLAT, SPREAD = [[1.0, 1, 1], [NAN, 1, 1], [NAN, NAN, 5], [NAN, NAN, NAN]], [[1.0, 1, 2], [NAN, 0, 1], [3, NAN, -1]]


def settings(prompts: int = 3, attempts: int = 2, mask_truncated: bool = False) -> Any:
    loss = SimpleNamespace(mask_truncated_completions=mask_truncated)
    return SimpleNamespace(prompts_per_step=prompts, dynamic_sampling_attempts=attempts, loss=loss)


def advantages(rewards_PGR: np.ndarray) -> np.ndarray:
    return np.asarray(gopo_advantages(rewards_PGR[..., 0]))


def test_a_group_teaches_when_an_advantage_is_not_zero() -> None:
    assert not has_signal(groups(FLAT), advantages, settings()).any()
    assert has_signal(groups(SPREAD), advantages, settings()).all()
    watched = np.stack([[FLAT[0]] * 2, [FLAT[0], SPREAD[0]]], -1)  # a second reward, which the advantage does not see
    assert not has_signal(groups(watched), advantages, settings()).any()
    only_cut = groups([[1.0, 2, 1]])._replace(rewards_PGR=np.array([[[NAN], [2.0], [NAN]]]))
    whole = lambda rewards_PGR: np.ones(rewards_PGR.shape[:2])  # noqa: E731
    assert (
        has_signal(only_cut, whole, settings()).all()
        and not has_signal(only_cut, whole, settings(mask_truncated=True)).any()
    )


def test_groups_that_teach_come_first_and_others_fill_up() -> None:
    drawn = [groups([FLAT[0], SPREAD[0], FLAT[1]]), groups([SPREAD[1], FLAT[2], SPREAD[2]], first=10, S=8)]
    assert not is_enough(drawn[:1], advantages, settings()) and is_enough(drawn[:1], advantages, settings(prompts=1))
    assert is_enough(drawn[:1], advantages, settings(attempts=1)) and is_enough(drawn, advantages, settings(attempts=9))
    assert not is_enough(drawn, advantages, settings(prompts=4, attempts=9))
    chosen = choose(drawn, advantages, settings())
    np.testing.assert_array_equal(chosen.lengths_P, [1, 10, 12])
    assert [row["prompt"] for row in chosen.rows] == ["1", "10", "12"]
    np.testing.assert_array_equal(chosen.rollout.tokens_PGT[:, 0, 0], [1, 10, 12])
    np.testing.assert_array_equal(chosen.rewards_PGR[..., 0], [SPREAD[0], SPREAD[1], SPREAD[2]])
    np.testing.assert_array_equal(chosen.prompt_PS[0], [1] * 5 + [0] * 3)  # padded to the longest
    np.testing.assert_array_equal(choose(drawn, advantages, settings(5)).lengths_P, [1, 10, 12, 0, 2])
    assert choose(drawn[:1], advantages, settings()) is drawn[0]


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_the_mask_is_lengths_and_what_is_scored_and_finished(mask_truncated: bool) -> None:
    config = settings(mask_truncated=mask_truncated)
    mask_PGT = make_batch(groups([[1.0, 2, 3], [NAN, 2, 3]]), config).mask_PGT
    lengths = [[1, 0 if mask_truncated else T, 2], [0, 0 if mask_truncated else T, 2]]
    np.testing.assert_array_equal(mask_PGT, np.arange(T) < np.array(lengths)[..., None])


def test_a_completion_counts_when_any_of_its_rewards_is_there() -> None:
    rewards = np.array([[[1.0, NAN], [NAN, NAN], [NAN, 2]]])
    np.testing.assert_array_equal(make_batch(groups(rewards), settings()).mask_PGT.any(-1), [[True, False, True]])


@pytest.mark.parametrize("attempt", [0, 1, 2])
def test_each_attempt_has_an_order_of_its_own_and_always_the_same(attempt: int) -> None:
    orders = [batch_indices(20, 20, 3, 5, attempt) for _ in range(2)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(20))
    assert all(orders[0] != batch_indices(20, 20, 3, 5, other) for other in range(3) if other != attempt)
    assert batch_indices(20, 20, 3, 5) == batch_indices(20, 20, 3, 5, 0)


def test_every_prompt_is_in_one_minibatch_of_each_pass() -> None:
    tokens_PGT = np.arange(8)[:, None, None] * np.ones((8, G, T), int)
    batch = Batch(np.zeros((8, 1), int), np.arange(8), tokens_PGT, np.zeros((8, G, T)), tokens_PGT > 0)
    parts = list(minibatches(batch, 2, 3, seed=0, step=5))
    assert len(parts) == 12
    passes = [np.concatenate([part.lengths_P for part in parts[i : i + 4]]) for i in (0, 4, 8)]
    for order in passes:
        np.testing.assert_array_equal(np.sort(order), np.arange(8))
    assert len({tuple(order) for order in passes}) == 3
    again = list(minibatches(batch, 2, 3, seed=0, step=5))
    assert all((a.lengths_P == b.lengths_P).all() for a, b in zip(parts, again, strict=True))
    assert all((part.tokens_PGT[:, 0, 0] == part.lengths_P).all() for part in parts)
    (whole,) = minibatches(batch, 8, 1, seed=0, step=5)
    np.testing.assert_array_equal(whole.lengths_P, np.arange(8))


def test_the_table_of_completions() -> None:
    found = groups(np.arange(2 * G * R).reshape(2, G, R))
    texts = [["a", "b", "c"], ["d", "e", "f"]]
    table = completion_table(["p", "q"], texts, found, ["one", "two"], np.array([[2.0, 0, -2]] * 2))
    assert table["prompt"] == ["p"] * 3 + ["q"] * 3 and table["completion"] == list("abcdef")
    assert table["rewards/one"] == [0, 2, 4, 6, 8, 10] and table["rewards/two"] == [1, 3, 5, 7, 9, 11]
    assert table["advantage"] == [2, 0, -2] * 2 and table["stop_reason"] == ["stop", "length", "stop"] * 2
