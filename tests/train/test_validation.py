"""Validation has settings and rewards of its own, from which nothing is learned; its best step stays, by name."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train.loop
from models.checkpoint import BEST, Checkpoints, best_step, find_step, load_model
from models.hf_weights import split
from train.config import CheckpointConfig, PolicyConfig, RewardSpec, ValidationConfig, hide_passwords
from train.loop import train_policy
from train.run.best import BestStep
from train.run.directory import read_metrics
from train.running import SetupError

MakeConfig = Callable[..., PolicyConfig]
REWARD = CheckpointConfig(best="validation/reward")


class Killed(BaseException):
    pass


def observed(config: CheckpointConfig, values: list[float]) -> BestStep:
    best = BestStep(Path("run"), config)
    for step, value in enumerate(values):
        best.observe(step, {str(config.best): value})
    return best


@pytest.mark.parametrize(
    ("config", "values", "step"),
    [
        pytest.param(REWARD, [9, 1, 3, 3, 2], 2, id="the first of the highest, the start apart"),
        pytest.param(REWARD, [0, math.nan, -5, math.nan], 2, id="no number is no best"),
        pytest.param(REWARD, [0, -math.inf], 0, id="nothing better than nothing"),
        pytest.param(replace(REWARD, best="validation/loss"), [0, 3, 1, 2], 2, id="less of a loss"),
        pytest.param(replace(REWARD, greater_is_better=False), [0, 3, 1, 2], 2, id="less, as it is said"),
    ],
)
def test_the_best_step(config: CheckpointConfig, values: list[float], step: int, tmp_path: Path) -> None:
    """What a restart reads from the metrics gives the same one."""
    assert observed(config, values).step == step
    again = BestStep(tmp_path, config)
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    again.replay([{"step": i, str(config.best): value} for i, value in enumerate([*values, 99.0])], len(values) - 1)
    assert again.step == step


def test_a_best_step_is_named_once_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / BEST).write_text('{"metric": "validation/reward", "improvements": [[2, 0.1], [4, 0.5], [6, 0.7]]}')
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert best_step(tmp_path) is None
    for step in (2, 3, 4, 5):
        checkpoints.best = step - step % 2
        checkpoints.save(step, {"w": np.zeros(1)}, {"step": np.zeros(1)}, {})
    checkpoints.close()
    assert best_step(tmp_path) == 4 and find_step(f"{tmp_path}@best") == (tmp_path, 4)
    assert find_step(tmp_path) == (tmp_path, 5)


def test_a_metric_that_no_validation_has() -> None:
    with pytest.raises(
        SetupError, match=r"checkpoint.best: expected a metric of the validation, one of a, b; got 'val"
    ):
        BestStep(Path("run"), REWARD).observe(0, {"b": 1.0, "a": 2.0})


def test_a_best_step_that_was_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"by checkpoint.best: validation/reward its best step is 1, whose checkpoint"):
        BestStep(tmp_path, REWARD).replay([{"step": 1, "validation/reward": 1.0}], 2)


@pytest.mark.slow
def test_validation_teaches_nothing_and_its_best_step_stays(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: Callable[[Any], Any]
) -> None:
    """Rewards and sampling of its own change nothing that is learned; a killed run keeps the same best step."""
    own = [RewardSpec(function="length", name="short", options={"target": 3})]
    validation = {"every": 1, "prompts": 4, "num_generations": 2, "batch_prompts": 4}
    plain = policy_config(
        tmp_path, max_steps=4, output_dir=str(tmp_path / "plain"), validation=ValidationConfig(**validation)
    )
    whole = replace(
        plain,
        output_dir=str(tmp_path / "whole"),
        validation=ValidationConfig(**validation, temperature=0.5, top_k=3, max_completion_length=5, rewards=own),
        checkpoint=CheckpointConfig(every=3, keep=1, best="validation/rewards/short/mean"),
    )
    for config in (plain, whole):
        train_policy(config)
    learned = [
        [{name: value for name, value in row.items() if not name.startswith("validation/")} for row in rows]
        for rows in (read_metrics(config.output_dir, clock=False) for config in (plain, whole))
    ]
    assert learned[0][1:] == learned[1][1:]
    texts = (tmp_path / "whole/completions/validation_000002.jsonl").read_text()
    rows = [json.loads(line) for line in texts.splitlines()]
    assert max(row["length"] for row in rows) <= 5 and all("rewards/short" in row for row in rows)

    shorts = [row["validation/rewards/short/mean"] for row in read_metrics(whole.output_dir)]
    best = 1 + int(np.argmax(shorts[1:]))
    assert find_step(f"{whole.output_dir}@best")[1] == best
    assert {path.name for path in (tmp_path / "whole/checkpoints").iterdir()} == {str(best), "4"}

    cut, make_batch, calls = replace(whole, output_dir=str(tmp_path / "cut")), train.loop.make_batch, list[int]()

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == best + 2:
            raise Killed
        return make_batch(*arguments)

    if best < 3:
        with monkeypatch.context() as patch, dies(Killed):
            patch.setattr(train.loop, "make_batch", killed)
            train_policy(cut)
    train_policy(cut)
    assert (tmp_path / "cut" / BEST).read_text() == (tmp_path / "whole" / BEST).read_text()
    weights = [split(load_model(f"{config.output_dir}@best"))[1] for config in (whole, cut)]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_passwords_of_validation_are_hidden() -> None:
    spec = {"function": "judge", "options": {"api_key": "secret"}}
    hidden = hide_passwords({"rewards": [spec], "validation": {"rewards": [spec]}})
    assert "secret" not in str(hidden)
