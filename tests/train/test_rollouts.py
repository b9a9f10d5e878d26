"""Rollouts of the next step are sampled with the weights of this one, and a run that goes on has them still."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train.loop
from models.checkpoint import load_model
from models.hf_weights import split
from train.config import CheckpointConfig, LossConfig, PolicyConfig, ValidationConfig
from train.loop import train_policy
from train.rollouts import Rollouts, empty_rollouts
from train.run.directory import read_metrics

MakeConfig = Callable[..., PolicyConfig]


class Killed(BaseException):
    pass


class Numbered:
    """Prompts and a generator that note what is sampled: (step, weights)."""

    def __init__(self) -> None:
        self.sampled: list[tuple[int, str]] = []
        self._step = 0

    def batch(self, seed: int, step: int, count: int, attempt: int) -> list[int]:
        self._step = step
        return [step]

    def encode(self, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([rows]), np.array([1])

    def rollouts(self, params: str, *_: Any) -> list[str]:
        self.sampled.append((self._step, params))
        return [f"of step {self._step}"]


@pytest.mark.parametrize(
    ("ahead", "sampled"),
    [
        (0, [(0, "w0"), (1, "w1"), (2, "w2")]),
        (1, [(0, "w0"), (1, "w0"), (2, "w1")]),
    ],
)
def test_which_weights_sample_which_step(
    policy_config: MakeConfig, tmp_path: Path, ahead: int, sampled: list[tuple[int, str]]
) -> None:
    """The next step's prompts are sampled before this step's rollouts are given out; nothing behind the last step."""
    noted: Any = Numbered()
    rollouts = Rollouts(settings(policy_config, tmp_path, ahead, max_steps=3), noted, noted, None)
    for step in range(3):
        drawn = rollouts.draw(f"w{step}", step)
        assert (drawn.rows, list(drawn.parts)) == ([step], [f"of step {step}"])
    assert noted.sampled == sampled


def settings(policy_config: MakeConfig, place: Path, ahead: int = 1, **overrides: Any) -> PolicyConfig:
    return policy_config(
        place,
        rollout_ahead=ahead,
        loss=LossConfig(importance_sampling_mode="token_truncate"),
        validation=ValidationConfig(prompts=0),
        checkpoint=CheckpointConfig(every=2),
        **overrides,
    )


@pytest.mark.slow
def test_a_run_that_goes_on_learns_from_the_rollouts_that_it_had_drawn(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: Callable[[Any], Any]
) -> None:
    whole = settings(policy_config, tmp_path / "whole", max_steps=4)
    cut, make_batch, calls = replace(whole, output_dir=str(tmp_path / "cut")), train.loop.make_batch, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return make_batch(*arguments)

    train_policy(whole)
    with monkeypatch.context() as patch, dies(Killed):
        patch.setattr(train.loop, "make_batch", killed)
        train_policy(cut)
    train_policy(cut)
    rows = [read_metrics(config.output_dir, clock=False) for config in (whole, cut)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    weights = [split(load_model(config.output_dir))[1] for config in (whole, cut)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    drift = [row["sampling/sampling_logp_difference/max"] for row in rows[0]]
    assert max(drift[:2]) < 1e-4 < min(drift[2:]), "weights differ from the third step on: the first rate is 0"


def test_shapes_of_what_is_saved(policy_config: MakeConfig, tmp_path: Path) -> None:
    """A checkpoint whose next step is drawn, and one whose is not, have the same arrays."""
    config = settings(policy_config, tmp_path, prompts_per_step=2, microbatch_prompts=1)
    noted: Any = Numbered()
    rollouts = Rollouts(config, noted, noted, empty_rollouts(config))
    assert rollouts.saved()["ahead"].keys() == empty_rollouts(config).keys()
    rollouts.draw("w0", 0)
    assert [step for step, _ in noted.sampled] == [0, 1], "the empty one is of no step"
