"""A run ends in good order: a signal loses no step, a second one ends at once, an error loses no save."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import train.loop
from models.checkpoint import Checkpoints, load_model
from models.hf_weights import split
from models.lora import Lora
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    PolicyConfig,
    RewardModelConfig,
    RewardSpec,
)
from train.loop import train_policy
from train.run.directory import Run, read_metrics
from train.run.lock import LOCK, owns_its_run
from train.run.schedule import SaveSchedule
from train.run.signals import SIGNALS, decide_to_stop, defer_signals, watch_signals
from train.running import RunInterrupted, exit_code
from train.supervised.reward_model import train_reward_model

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., PolicyConfig]


@pytest.fixture(autouse=True)
def handlers_are_as_before() -> Iterator[None]:
    """Gives every test handlers of its own: a shell ignores SIGINT for what it starts in the background."""
    found = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    left = [signal.signal(number, handler) for number, handler in found.items()]
    assert left == [signal.SIG_DFL] * len(SIGNALS) and signal.set_wakeup_fd(-1) == -1


def send(number: int = signal.SIGTERM) -> None:
    """Sends this process a signal, and waits until it is noted."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not decide_to_stop()[0] and time.monotonic() < deadline:
        time.sleep(0.001)


def weights(run: Path, step: int) -> Any:
    return split(load_model(f"{run}@{step}"))[1]


def assert_equal_runs(one: Path, other: Path, step: int) -> None:
    assert read_metrics(one, clock=False) == read_metrics(other, clock=False)
    jax.tree.map(np.testing.assert_array_equal, weights(one, step), weights(other, step))


# A signal loses no step


@pytest.mark.slow
def test_signals_lose_no_step_of_a_reward_model(
    tmp_path: Path,
    tiny_policy_dir: Path,
    sentences: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One signal after the other ends the run after a step, with the shell's exit code."""
    pairs = [{"prompt": s[:8], "chosen": " yes", "rejected": " no"} for s in sentences[:16]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    whole = RewardModelConfig(
        output_dir=str(tmp_path / "whole"),
        model=ModelConfig(path=str(tiny_policy_dir), remat="none"),
        lora=Lora(rank=2),
        data=DataConfig(train=str(tmp_path / "train.jsonl")),
        max_steps=4,
        batch_size=8,
        max_length=16,
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(progress=False),
    )
    cut, write = replace(whole, output_dir=str(tmp_path / "cut")), Run.write
    train_reward_model(whole)
    for last, (number, code) in enumerate([(signal.SIGINT, 130), (signal.SIGHUP, 129)], 2):

        def signalled(self: Run, step: int, values: Any, last: int = last, number: int = number) -> None:
            write(self, step, values)
            if step == last:
                send(number)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "write", signalled)
            assert exit_code(lambda: train_reward_model(cut)) == code
        assert capsys.readouterr().err == (
            f"{cut.output_dir}: {number.name} ended the run after step {last} of 4; step {last} is saved; the same "
            f"command goes on from there\n"
        )
        assert not (tmp_path / "cut" / LOCK).exists()
        assert [row["step"] for row in read_metrics(tmp_path / "cut")] == list(range(1, last + 1))
    train_reward_model(cut)
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole", 4)


def test_signals_lose_no_step_of_a_policy(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a step, which is held while the next rollouts are dispatched, is written before the run ends.

    A signal that comes while a step is saved ends the run after that step.
    """
    make_batch, save = train.loop.make_batch, Checkpoints.save
    whole = policy_config(tmp_path / "whole", max_steps=4, checkpoint=CheckpointConfig(every=3))
    cut = replace(whole, output_dir=str(tmp_path / "cut"))

    def in_step(*arguments: Any) -> Any:
        send()
        return make_batch(*arguments)

    def in_save(self: Checkpoints, *arguments: Any) -> None:
        send()
        save(self, *arguments)

    train_policy(whole)
    for last, place in ((1, (train.loop, "make_batch", in_step)), (3, (Checkpoints, "save", in_save))):
        ended_after = f"SIGTERM ended the run after step {last} of 4; step {last} is saved"
        with monkeypatch.context() as patch, pytest.raises(RunInterrupted, match=ended_after) as ended:
            patch.setattr(*place)
            train_policy(cut)
        assert ended.value.code == 143
        assert [row["step"] for row in read_metrics(tmp_path / "cut")] == list(range(last + 1))
    train_policy(cut)
    assert_equal_runs(tmp_path / "cut", tmp_path / "whole" / "run", 4)


def test_a_signal_before_the_first_step_ends_at_once(
    policy_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @owns_its_run
    def sets_up(config: PolicyConfig) -> None:
        assert (tmp_path / "run" / LOCK).exists()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        pytest.fail("goes on")

    assert exit_code(lambda: sets_up(policy_config(tmp_path))) == 143
    assert not (tmp_path / "run" / LOCK).exists()
    assert re.fullmatch("SIGTERM: ended before a step was begun; .* starts again\n", capsys.readouterr().err)


def test_a_run_that_is_whole_is_done(tmp_path: Path) -> None:
    """A signal in the last step changes nothing."""
    schedule = SaveSchedule(CheckpointConfig(every=100), 3)
    with watch_signals():
        defer_signals()
        assert not schedule.is_due(1) and not schedule.interruption(1)
        send()
        for step in (2, 3):
            assert schedule.is_due(step)
            schedule.saved(step)
            assert schedule.interruption(step) == (signal.SIGTERM if step == 2 else 0)


# Whatever is raised


def test_an_error_is_told_what_is_saved(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_batch, calls, closed = train.loop.make_batch, list[int](), list[Run]()
    close = Run._close_trackers

    def fails_in_step_2(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("no such answer")
        return make_batch(*arguments)

    def noted(self: Run) -> None:
        close(self)
        closed.append(self)

    monkeypatch.setattr(train.loop, "make_batch", fails_in_step_2)
    monkeypatch.setattr(Run, "_close_trackers", noted)
    config = policy_config(tmp_path, max_steps=4, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(KeyError) as raised:
        train_policy(config)
    run = tmp_path / "run"
    assert raised.value.__notes__ == [
        f"{run}: KeyError ended the run in step 2 of 4; step 1 is saved; the same command goes on from there"
    ]
    assert len(closed) == 1 and weights(run, 1)


# When to save


def test_minutes_count_from_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("train.run.schedule.time.monotonic", lambda: now)
    schedule, saved = SaveSchedule(CheckpointConfig(every=5, every_minutes=2), 12), []
    for step in range(1, 13):
        now += 50
        if schedule.is_due(step):
            schedule.saved(step)
            saved.append(step)
    assert saved == [3, 5, 8, 10, 12]
    for minutes, message in ((0, "a number above 0, got 0"), (math.inf, "a finite number, got inf")):
        with pytest.raises(ValueError, match=f"every_minutes: expected {message}"):
            CheckpointConfig(every_minutes=minutes)


# At once: what ends a process is tried in one of its own


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    program = f"""
import ctypes, os, signal, sys, threading, time
from train.run.signals import SIGNALS, decide_to_stop, defer_signals, watch_signals
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)

def later(seconds, *numbers):
    threading.Timer(seconds, lambda: [os.kill(os.getpid(), number) for number in numbers]).start()

{textwrap.dedent(code)}
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_second_signal_ends_the_process_inside_a_long_call() -> None:
    began = time.monotonic()
    ended = in_a_process(
        """
        with watch_signals():
            defer_signals()
            later(0.1, signal.SIGTERM)
            later(1.5, signal.SIGINT)
            while True:
                ctypes.CDLL(None).usleep(100_000_000)  # as a compilation: Python does not run
        """
    )
    assert ended.returncode == 130 and time.monotonic() - began < 60
    assert ended.stderr == "SIGINT: the second signal; ended at once, without the step it was in\n"


def test_what_is_no_second_signal() -> None:
    """One to the process and one to its group; one to a child by fork; one that the shell has switched off."""
    ended = in_a_process(
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with watch_signals():
            defer_signals()
            os.kill(os.getpid(), signal.SIGHUP)
            child = os.fork()
            if not child:
                time.sleep(60)
            time.sleep(0.3)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            time.sleep(0.2)
            assert decide_to_stop() == (0, False)
            later(0, signal.SIGTERM, signal.SIGTERM)
            time.sleep(0.5)
            assert decide_to_stop(lambda: True) == (signal.SIGTERM, True)
            time.sleep(1)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        """
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_real_process_that_is_terminated_loses_no_step(policy_config: MakeConfig, tmp_path: Path) -> None:
    runs = {}
    for name in ("whole", "cut"):
        rewards = [RewardSpec(function="length")]
        config = policy_config(tmp_path / name, max_steps=12, rewards=rewards, checkpoint=CheckpointConfig(every=100))
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(asdict(config)))
        runs[name] = (tmp_path / name / "run", [sys.executable, "-m", "train", "policy", "--config", str(file)])
    run, command = runs["whole"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    run, command = runs["cut"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(read_metrics(run)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    steps = len(read_metrics(run)) - 1
    assert process.returncode == 143 and 3 <= steps < 12
    assert error.splitlines()[-1].endswith(
        f"SIGTERM ended the run after step {steps} of 12; step {steps} is saved; the same command goes on from there"
    )
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_equal_runs(run, runs["whole"][0], 12)
