"""A step in which nothing is scored says so; several in a row end the run, with everything saved."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoint import Checkpoints, find_step
from train.config import CheckpointConfig, PolicyConfig, RewardSpec
from train.loop import train_policy
from train.rewards.returned import RewardError
from train.rewards.watch import MAX_SILENT, ScoreWatch
from train.run.directory import Run, read_metrics
from train.run.metrics import UpdateMetrics
from train.running import exit_code

NONE, ONE = np.full((2, 2, 1), np.nan), np.array([[[np.nan], [1.0]], [[np.nan], [np.nan]]])


def test_only_steps_in_a_row_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    watch, lines = ScoreWatch("run", ["f"]), 0
    for rewards_PGR in [NONE] * (MAX_SILENT - 1) + [ONE] + [NONE] * (MAX_SILENT - 1):
        watch.look("step 1", rewards_PGR)
        watch.look("validation at step 1", NONE, counts=False)
        said = capsys.readouterr().out
        lines += said.count("run: step 1: no reward for any of 4 completions (f: all unscorable)")
        assert "validation at step 1: no reward for any" in said and not watch.is_hopeless
    assert lines == 2 * (MAX_SILENT - 1)
    watch.look("step 9", NONE)
    assert watch.is_hopeless


def test_one_of_several_rewards_that_scores_nothing_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = ScoreWatch("run", ["judge", "length"])
    for step in range(2 * MAX_SILENT):
        watch.look(f"step {step}", np.concatenate([NONE, ONE], -1))
    assert not watch.is_hopeless
    assert capsys.readouterr().out == (
        f"run: step {MAX_SILENT - 1}: judge has scored no completion of {MAX_SILENT} steps in a row; only the other "
        f"rewards are learned from\n"
    )


def test_the_reasons_are_said_and_rewards_of_weight_0_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    why = {"judge": "connection refused", "rm": "its scores are NaN or infinite"}.get
    watch = ScoreWatch("run", ["judge", "length", "rm"], np.array([1.0, 0.0, -2.0]), why)
    for step in range(MAX_SILENT):
        watch.look(f"step {step}", np.concatenate([NONE, ONE, NONE], -1))
    reasons = "; judge: connection refused; rm: its scores are NaN or infinite"
    assert watch.is_hopeless and str(watch.error(3)).endswith(f"start again to go on{reasons}")
    assert capsys.readouterr().out.splitlines()[0] == (
        f"run: step 0: no reward for any of 4 completions (judge, rm: all unscorable); nothing is learned from them"
        f"{reasons}"
    )


def test_a_run_in_which_nothing_can_be_scored_ends_saved(
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class NoUpdate:
        def old_and_ref_logprobs(self, state: Any, ref_params: Any, batch: Any) -> tuple[Any, float]:
            return batch, 0.0

        def __call__(self, state: Any, *_: Any) -> tuple[Any, list[UpdateMetrics]]:
            return state, [UpdateMetrics({"grad_norm": (0.0, 1.0)}, [{"loss": (0.0, 1.0)}])]

    monkeypatch.setattr("train.loop.Update", lambda *_: NoUpdate())
    module: Any = types.ModuleType("unscored")
    module.unfit = lambda completions: [None] * len(completions)
    monkeypatch.setitem(sys.modules, "unscored", module)
    changes: dict[str, Any] = {"max_steps": 9, "checkpoint": CheckpointConfig(every=100)}
    config = policy_config(tmp_path, rewards=[RewardSpec(function="unscored.unfit")], **changes)
    words = (
        f"step {MAX_SILENT}: no reward for any completion of {MAX_SILENT} steps in a row .*; unfit: it returned None"
    )
    with pytest.raises(RewardError, match=words):
        train_policy(config)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(MAX_SILENT + 1))
    assert find_step(tmp_path / "run")[1] == MAX_SILENT
    assert f"ended after step {MAX_SILENT} of 9" in capsys.readouterr().out


def test_an_error_in_a_later_step_loses_no_checkpoint(
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waited: list[Checkpoints] = []  # other tests' checkpoints may still be open in this process: not asked about
    opened: list[Checkpoints] = []
    open_checkpoints = Checkpoints.__init__

    def remember(self: Checkpoints, *arguments: Any, **options: Any) -> None:
        open_checkpoints(self, *arguments, **options)
        opened.append(self)

    monkeypatch.setattr(Checkpoints, "__init__", remember)
    monkeypatch.setattr(Checkpoints, "wait", lambda self: waited.append(self))

    def fails() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "resume", refuse)
            train_policy(policy_config(tmp_path, rewards=[RewardSpec(function="length")]))

    def refuse(*_: Any) -> Any:
        raise RewardError("f: got None")

    assert exit_code(fails) == 2 and len(opened) == 1
    assert waited.count(opened[0]) == 1
    assert capsys.readouterr().err == "error: f: got None\n"
