"""Laws of a step's log: the next rollouts are dispatched before an update is waited for; nothing is out of order."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import train.loop
import train.run.log
from models.sampler import Rollout
from train.config import CheckpointConfig, LogConfig, PolicyConfig, RewardSpec, ValidationConfig
from train.loop import train_policy
from train.run.directory import Run, read_metrics
from train.run.metrics import Timer, UpdateMetrics, fetch_metrics

Events = list[str]


@pytest.fixture
def recorded(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[PolicyConfig, Events]]:
    """recorded(loss_of_step, **overrides): a config whose runs compute nothing, and what they did in what order."""

    def make(loss_of_step: Callable[[int], float], **overrides: Any) -> tuple[PolicyConfig, Events]:
        events: Events = []

        class NoUpdate:
            def old_and_ref_logprobs(self, state: Any, ref_params: Any, batch: Any) -> tuple[Any, float]:
                return batch, 0.0

            def __call__(self, state: Any, ref_params: Any, batch: Any, step: int) -> tuple[Any, list[UpdateMetrics]]:
                events.append(f"update {step + 1}")
                return state, [UpdateMetrics({"grad_norm": (1.0, 1.0)}, [{"loss": (loss_of_step(step + 1), 1.0)}])]

        def rollout(self: Any, params: Any, prompt_PS: Any, lengths_P: Any, key: Any, G: int, *_: Any) -> Rollout:
            events.append("rollout")
            P, T = len(prompt_PS), 8
            tokens_PGT = np.full((P, G, T), 40, np.int32)
            return Rollout(tokens_PGT, np.zeros((P, G, T), np.float32), np.full((P, G), T), np.ones((P, G), bool))

        def noted(owner: Any, name: str, event: Callable[..., str]) -> None:
            function = getattr(owner, name)

            def call(*arguments: Any) -> Any:
                events.append(event(*arguments))
                return function(*arguments)

            monkeypatch.setattr(owner, name, call)

        monkeypatch.setattr(train.loop, "Update", lambda *_: NoUpdate())
        monkeypatch.setattr(train.loop.Generator, "rollout", rollout)
        noted(train.run.log, "fetch_metrics", lambda _: "fetch")
        noted(Run, "write", lambda run, step, values: f"write {step}")
        noted(Run, "write_table", lambda run, step, table: f"table {step}")
        noted(Run, "write_completions", lambda run, name, rows: "validation")
        noted(Run, "save", lambda run, step, state: f"save {step}")
        settings: dict[str, Any] = {
            "rewards": [RewardSpec(function="eval.speed.workloads.even_share", name="r")],
            "validation": ValidationConfig(prompts=0),
            "checkpoint": CheckpointConfig(every=3),
            "max_steps": 5,
        }
        return policy_config(tmp_path, **(settings | overrides)), events

    return make


def test_a_step_is_logged_when_the_next_rollouts_are_dispatched(recorded: Callable[..., Any]) -> None:
    config, events = recorded(lambda step: 0.5)
    train_policy(config)
    late = ["rollout", "fetch", "write 1", "update 2", "rollout", "fetch", "write 2", "update 3"]
    assert events[:10] == ["rollout", "update 1", *late]
    assert events[10:] == [
        *["fetch", "write 3", "save 3"],  # what is saved is known to be finite, and its row is there
        *["rollout", "update 4", "rollout", "fetch", "write 4", "update 5", "fetch", "write 5", "save 5"],
    ]
    assert [row["step"] for row in read_metrics(config.output_dir)] == [1, 2, 3, 4, 5]


def test_what_a_step_writes_waits_for_its_update(recorded: Callable[..., Any]) -> None:
    config, events = recorded(
        lambda step: 0.5,
        max_steps=3,
        log=LogConfig(tensorboard=False, progress=False, completions_every=1),
        validation=ValidationConfig(every=2, prompts=4, num_generations=4, batch_prompts=4),
    )
    train_policy(config)
    begin = ["rollout", "validation", "write 0"]
    first = ["rollout", "update 1", "fetch", "table 1"]
    second = ["rollout", "write 1", "update 2", "fetch", "table 2", "rollout", "validation"]
    third = ["rollout", "write 2", "update 3", "fetch", "table 3", "rollout", "validation", "write 3", "save 3"]
    assert events == begin + first + second + third
    rows = read_metrics(config.output_dir)
    assert ["validation/reward" in row for row in rows] == [True, False, True, True]


@pytest.mark.parametrize(("step", "last"), [(2, "rollout"), (3, "update 3")], ids=["late", "at a checkpoint"])
def test_nothing_is_saved_of_a_run_that_has_diverged(recorded: Callable[..., Any], step: int, last: str) -> None:
    config, events = recorded(lambda done: math.nan if done >= step else 0.5)
    with pytest.raises(FloatingPointError, match=f"step {step}: loss is nan"):
        train_policy(config)
    assert events[-2:] == [last, "fetch"]
    assert not any(event.startswith("save") for event in events)
    assert [row["step"] for row in read_metrics(config.output_dir)] == list(range(1, step))


def test_what_a_step_that_is_not_finite_learned_from_is_in_the_run(recorded: Callable[..., Any]) -> None:
    config, _ = recorded(lambda step: math.nan if step == 2 else 0.5)
    with pytest.raises(FloatingPointError, match=r"the rewards of this step, .*run/nonfinite/step_000002.jsonl"):
        train_policy(config)
    folder = Path(config.output_dir) / "nonfinite"
    assert {file.name for file in folder.iterdir()} == {"step_000002.jsonl", "step_000002.yaml"}
    rows = [json.loads(line) for line in (folder / "step_000002.jsonl").read_text().splitlines()]
    assert len(rows) == config.prompts_per_step * config.num_generations
    for row in rows:
        assert len(row["tokens"]) == len(row["sampled_logprobs"]) == row["length"] and row["prompt_tokens"]
        assert math.isfinite(row["rewards/r"]) and math.isfinite(row["advantage"])
    assert yaml.safe_load((folder / "step_000002.yaml").read_text())["max_steps"] == config.max_steps


def test_so_many_steps_in_a_row_are_skipped(recorded: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 2, 3 and 5 are skipped; the third in a row would not be."""
    config, events = recorded(lambda step: math.nan if step in (2, 3, 5) else 0.5, skip_nonfinite=2)
    train_policy(config)
    assert [row["step"] for row in read_metrics(config.output_dir) if "loss" not in row] == [2, 3, 5]
    assert events[-1] == "save 5"
    said = [line for line in capsys.readouterr().out.replace("\n", " ").split("run: step ") if "is left out" in line]
    assert [line[0] for line in said] == ["2", "3", "5"]
    assert len(list((Path(config.output_dir) / "nonfinite").glob("*.jsonl"))) == 3
    config = replace(config, output_dir=f"{config.output_dir}2", skip_nonfinite=1)
    with pytest.raises(FloatingPointError, match="step 3: loss is nan.*, 2 such steps in a row"):
        train_policy(config)


def test_an_error_between_two_steps_neither_loses_nor_doubles_a_row(
    recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dies: Callable[..., Any]
) -> None:
    config, events = recorded(lambda step: 0.5)

    class Killed(Exception):
        pass

    def killed(when: str) -> Callable[..., Any]:
        def choose(attempts: Any, *rest: Any) -> Any:
            if events.count("rollout") == 2 and when == "step 2":
                raise Killed
            return attempts[0]

        return choose

    with monkeypatch.context() as patch, dies(Killed):
        patch.setattr(train.loop, "choose", killed("step 2"))
        train_policy(config)
    assert [row["step"] for row in read_metrics(config.output_dir)] == [1]  # no checkpoint yet
    train_policy(replace(config, max_steps=4))
    train_policy(config)
    assert [row["step"] for row in read_metrics(config.output_dir)] == [1, 2, 3, 4, 5]


def test_the_phases_of_a_step_leave_no_gap() -> None:
    began = time.perf_counter()
    timer = Timer()
    for _ in range(2):
        with timer("generate"):
            time.sleep(0.001)
    time.sleep(0.001)
    timer.lap("update")
    whole = time.perf_counter() - began
    seconds = timer.take()
    assert seconds["timing_s/step"] == seconds["timing_s/generate"] + seconds["timing_s/update"]
    assert seconds["timing_s/generate"] >= 0.002 and seconds["timing_s/update"] >= 0.001
    assert seconds["timing_s/step"] <= whole
    time.sleep(0.1)
    timer.restart()
    timer.lap("update")
    assert timer.take()["timing_s/update"] < 0.1  # what lies before the restart counts for nothing


def test_metrics_of_several_updates_are_means_over_all_micro_batches() -> None:
    pair = lambda total, count: (np.float32(total), np.float32(count))  # noqa: E731
    updates = [
        UpdateMetrics({"grad_norm": pair(2, 1)}, [{"kl": pair(1, 4)}, {"kl": pair(2, 8)}]),
        UpdateMetrics({"grad_norm": pair(4, 1)}, [{"kl": pair(9, 4)}]),
    ]
    assert fetch_metrics(updates) == {"grad_norm": 3.0, "kl": 12 / 16}
