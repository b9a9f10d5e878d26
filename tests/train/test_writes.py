"""A disk that does not take what has to be kept: one line, or a wait; what is saved stays."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train.run.directory
import train.run.writes
from models.checkpoint import Checkpoints
from models.checkpoint_failures import failure_reason, is_disk_failure, save_error
from models.sharding import make_layout
from train.build import make_optimizer, make_tokenizer
from train.config import CheckpointConfig, PolicyConfig
from train.run.directory import COMPLETIONS, METRICS, Run, read_metrics
from train.run.files import write_parquet, write_whole
from train.run.lock import owns_its_run
from train.run.writes import append_line, persist
from train.running import WriteError, exit_code
from train.state import TrainState, make_state

FULL = OSError(28, "No space left on device")
MakeConfig = Callable[..., PolicyConfig]


def failing(times: int, write: Callable[..., Any], error: Exception = FULL) -> Callable[..., Any]:
    """`write`, whose first calls fail."""
    left = iter([error] * times)

    def attempt(*arguments: Any, **options: Any) -> Any:
        if (failure := next(left, None)) is not None:
            raise failure
        return write(*arguments, **options)

    return attempt


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.run.writes, "RETRY_SECONDS", 0.01)


@pytest.fixture
def program(policy_config: MakeConfig, tmp_path: Path) -> Callable[..., tuple[PolicyConfig, Callable[[], None]]]:
    """program(on_error, after_step=lambda step: None): a run of 4 steps of a state of two numbers, saved each step."""

    def make(on_error: str = "stop", act: Callable[[int], None] = lambda step: None, **settings: Any) -> Any:
        checkpoint = CheckpointConfig(every=1, on_error=on_error, **settings)  # type: ignore[arg-type]
        config = replace(policy_config(tmp_path), max_steps=4, checkpoint=checkpoint)
        tokenizer = make_tokenizer(config.model, config.chat)

        @owns_its_run
        def train_numbers(config: PolicyConfig) -> None:
            run = Run(config, {}, tokenizer)
            state = run.resume(numbers())
            for step in run.steps():
                run.write(step + 1, {"loss": 1.0 + step})
                run.write_table(step + 1, {"prompt": ["a"], "reward": [1.0]})
                act(step + 1)
                run.save(step + 1, state)
            run.close()

        return config, lambda: train_numbers(config)

    return make


def numbers() -> TrainState:
    optimizer, _ = make_optimizer(PolicyConfig.__dataclass_fields__["optimizer"].default_factory(), 4)
    start = jax.device_put(np.zeros(2, np.float32), make_layout().sharding((None,)))
    return make_state({"layers": {"x": start}}, optimizer, make_layout())


def saved_steps(config: PolicyConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir() if path.is_dir())


# What a failure is


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space left on device [os_error_code='28']"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
    ids=["python", "tensorstore", "tokenizers", "safetensors"],
)
def test_the_reason_is_the_operating_systems(error: Exception) -> None:
    assert failure_reason(error) == "No space left on device" and is_disk_failure(error)


def test_another_failure_keeps_its_text() -> None:
    assert failure_reason(ValueError("a\nb")) == "ValueError: a b" and not is_disk_failure(ValueError("a"))
    assert not is_disk_failure(FileNotFoundError(2, "No such file or directory"))


# Files


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    write_whole(file, "old")
    monkeypatch.setattr(Path, "replace", failing(1, Path.replace))
    with pytest.raises(WriteError, match=r"config\.yaml: could not be written \(No space left on device\); make room"):
        write_whole(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    with pytest.raises(FileNotFoundError):  # no fault of a disk
        write_whole(tmp_path / "absent" / "x", "")


def test_a_table_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", failing(1, Path.replace))
    with pytest.raises(WriteError):
        write_parquet(tmp_path / "a.parquet", {"x": [1]})
    assert list(tmp_path.iterdir()) == []


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, "one\n")
    monkeypatch.setattr(os, "fsync", failing(1, os.fsync))
    with pytest.raises(OSError):
        append_line(file, "two\n")
    append_line(file, "three\n")
    assert file.read_text() == "one\nthree\n"


# Stop or wait


def test_persist_stops_at_the_first_failure() -> None:
    recovered: list[int] = []
    with pytest.raises(WriteError, match=r"^x: could not be written \(No space left on device\); make room there"):
        persist(failing(1, lambda: None), "x", "stop", recover=lambda: recovered.append(1))
    assert recovered == [1]


def test_persist_waits_with_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[int] = []
    persist(failing(3, lambda: tries.append(1)), "x", "wait")
    lines = capsys.readouterr().out.splitlines()
    assert tries == [1] and len(lines) == 2 and lines[1] == "x: written; the run goes on"
    assert lines[0].startswith("warning: x: could not be written (No space left on device); the run waits and tries")


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_other_processes_failures_count_if_all_write(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    monkeypatch.setattr(train.run.writes, "is_distributed", lambda: True)
    monkeypatch.setattr(train.run.writes, "decide_to_stop", lambda also: (0, also()))
    answers = iter([np.array([False, True]), np.array([False, False])])
    monkeypatch.setattr(train.run.writes, "gather", lambda flag: next(answers))
    tries: list[int] = []
    persist(lambda: tries.append(1), "x", "wait", together=together)
    assert len(tries) == (2 if together else 1)


# A run


@pytest.mark.parametrize("name", ["_give_up_states", "wait"], ids=["begin", "flight"])
def test_a_save_that_fails_stops_the_run(
    name: str, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The step before stays, with keep: 1 too, and the same command goes on."""
    error = ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']")
    steps: list[int] = []

    def act(step: int) -> None:
        steps.append(step)
        if steps == [1, 2, 3]:
            failure = error if name == "_give_up_states" else save_error(Path("/checkpoints/2"), error)
            monkeypatch.setattr(Checkpoints, name, failing(1, getattr(Checkpoints, name), failure))

    config, run = program("stop", act, keep=1)
    assert exit_code(run) == 1
    monkeypatch.undo()
    output = capsys.readouterr().err
    step = 3 if name == "_give_up_states" else 2
    assert output.count("\n") == 1 and f"/checkpoints/{step}: could not be written (No space left on device)" in output
    assert output.endswith("; step 2 is saved; the same command goes on from there\n")
    assert saved_steps(config) == ["2"]
    assert exit_code(run) == 0 and saved_steps(config) == ["4"] and steps == [1, 2, 3, 3, 4]
    assert [row["step"] for row in read_metrics(config.output_dir)] == [1, 2, 3, 4]


def test_a_run_may_wait_for_its_disk(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For a save and for a row of metrics; nothing is lost, and nothing is there twice."""
    monkeypatch.setattr(train.run.directory, "append_line", failing(2, append_line))
    error = save_error(Path("x"), FULL)
    monkeypatch.setattr(Checkpoints, "save", failing(2, Checkpoints.save, error))
    config, run = program("wait")
    assert exit_code(run) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not" in line or "written;" in line]
    assert len(lines) == 4 and saved_steps(config) == ["1", "2", "3", "4"]
    assert [row["step"] for row in read_metrics(config.output_dir)] == [1, 2, 3, 4]


def test_a_signal_ends_a_run_that_waits(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.run.writes, "_LOOK_SECONDS", 0.01)

    def act(step: int) -> None:
        if step == 3:
            monkeypatch.setattr(Checkpoints, "save", failing(10**6, Checkpoints.save, save_error(Path("x"), FULL)))
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    config, run = program("wait", act)
    assert exit_code(run) == 143
    assert "SIGTERM ended the run after step 3 of 4; step 2 is saved" in capsys.readouterr().err
    assert saved_steps(config) == ["1", "2"]


def test_metrics_that_cannot_be_written_stop_the_run(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def act(step: int) -> None:
        if step == 2:
            monkeypatch.setattr(train.run.directory, "append_line", failing(1, append_line))

    config, run = program("stop", act)
    assert exit_code(run) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{METRICS}: could not be written (No space left on device)" in error
    assert error.endswith("; step 2 is saved; the same command goes on from there\n")
    assert saved_steps(config) == ["1", "2"]


def test_completions_and_profiles_stop_nothing(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.run.directory, "write_parquet", failing(2, write_parquet, WriteError("x")))
    config, run = program()
    assert exit_code(run) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not" in line]
    assert len(lines) == 1 and COMPLETIONS in lines[0]
    assert len(list((Path(config.output_dir) / COMPLETIONS).iterdir())) == 2


def test_a_full_disk_under_orbax(tmp_path: Path) -> None:
    """A process that may write no more: the failed step leaves nothing, the one before stays, no line of Orbax's."""
    script = f"""
    import json, resource, sys
    import jax.numpy as jnp, numpy as np
    from models.checkpoint import Checkpoints
    from models.checkpoint_failures import SaveError

    checkpoints = Checkpoints({str(tmp_path)!r}, keep=1)
    array = lambda step: {{"x": jnp.asarray(np.random.default_rng(step).normal(size=100_000), jnp.float32)}}
    save = lambda step: checkpoints.save(step, array(step), {{"step": jnp.asarray(step)}}, {{"model": {{}}}})
    save(1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    failures = []
    for _ in range(2):
        try:
            save(2)
            checkpoints.wait()
        except SaveError as error:
            failures.append([error.reason, checkpoints.latest(), sorted(p.name for p in checkpoints._folder.iterdir())])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(2)
    checkpoints.close()
    print(json.dumps([failures, sorted(p.name for p in checkpoints._folder.iterdir())]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [[["File too large", 1, ["1"]]] * 2, ["2"]]
