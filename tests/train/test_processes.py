"""Several processes are one program: what each does is its part, what all of them get is the whole."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from train import processes
from train.config import CheckpointConfig, LossConfig, PolicyConfig, RewardSpec, ValidationConfig
from train.run.directory import read_metrics

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., PolicyConfig]


def test_the_shares_are_the_whole_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (3, 4, 7, 128):
        for several in (1, 2, 3):
            monkeypatch.setattr(jax, "process_count", lambda several=several: several)
            rows: list[int] = []
            for index in range(several):
                monkeypatch.setattr(jax, "process_index", lambda index=index: index)
                mine = list(range(count))[processes.share(count)]
                assert 0 <= len(mine) - count // several <= 1
                rows += mine
            assert rows == list(range(count))
    with pytest.raises(ValueError, match="at least one prompt for each of the 3 processes, got 2"):
        processes.share(2)


def test_one_process_has_everything() -> None:
    mine = np.arange(6).reshape(3, 2)
    assert processes.gather(mine) is mine
    assert processes.gather_lists([[1, 2], []]) == [[1, 2], []]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", "", ""), "JAX_COORDINATOR_ADDRESS: set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (("", "2", "0"), "JAX_NUM_PROCESSES, JAX_PROCESS_ID: set, but not JAX_COORDINATOR_ADDRESS"),
        (("localhost:1234", "2", "2"), "expected a number and one from 0 below it, got '2' and '2'"),
        (("localhost:1234", "two", "0"), "got 'two' and '0'"),
    ],
)
def test_processes_that_cannot_find_each_other_are_told_why(
    given: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(processes.LAUNCH_VARIABLES, given, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.JoinError, match=message):
        processes.connect()


class Service(dict[str, str]):
    """The keys of JAX's coordination service."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]

    def key_value_delete(self, key: str) -> None:
        self.pop(key, None)


def be_process(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)


def test_the_first_failure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    monkeypatch.setattr(processes, "_service", lambda: service)
    be_process(1, monkeypatch)
    assert processes.failure_of_another() is None
    assert processes.report_failure(143) is None and processes.failure_of_another() is None
    be_process(0, monkeypatch)
    assert processes.failure_of_another() == 143
    assert processes.report_failure(1) == 143


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_ends_with_another_that_fails_and_not_else(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    service, calls = Service(), list[object]()
    monkeypatch.setattr(processes, "_service", lambda: service)
    monkeypatch.setattr(processes, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", calls.append)
    be_process(0, monkeypatch)
    with processes.end_with_others(lambda: calls.append("prepared")):
        assert list(service) == ["gopo_jax/watching/0"]
        if fails:
            service["gopo_jax/failure/first"] = "1 2"
        time.sleep(0.2)
    assert calls == (["prepared", 2] if fails else [])
    assert not service.key_value_dir_get("gopo_jax/watching/")


def launch(config: PolicyConfig, folder: Path, count: int, devices: int) -> list[subprocess.Popen[str]]:
    """`python -m train policy` as so many processes on loopback, each with so many CPU devices."""
    file = folder / f"{count}.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-m", "train", "policy", "--config", str(file)]
    started = []
    for index in range(count):
        names = dict(zip(processes.LAUNCH_VARIABLES, (f"localhost:{port}", str(count), str(index)), strict=True))
        own = environment | (names if count > 1 else {})
        with open(folder / f"{count}-{index}.log", "w") as out:
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=own, stdout=out, stderr=subprocess.STDOUT, text=True)
            )
    return started


def run(config: PolicyConfig, folder: Path, count: int, devices: int) -> list[dict[str, float]]:
    """Its metrics; all processes must end well."""
    started = launch(config, folder, count, devices)
    codes = [process.wait(timeout=400) for process in started]
    logs = [(folder / f"{count}-{index}.log").read_text()[-2000:] for index in range(count)]
    assert codes == [0] * count, logs
    return read_metrics(config.output_dir)


def assert_same(found: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            if not name.startswith(("timing_s/", "perf/")):
                # how far sampler and trainer are apart is rounding alone, and as uncertain as that
                tolerance = 1e-5 if name.startswith("sampling/sampling_logp_difference") else 1e-6
                assert math.isclose(value, other[name], rel_tol=1e-5, abs_tol=tolerance), (row["step"], name)


def vowels(completions: list[str], wanted: list[str], **_: Any) -> list[float | None]:
    """Of one's own share only: as many columns as completions, no more than a process' part."""
    assert len(completions) == len(wanted) <= 32 // jax.process_count()
    return [None if len(text) == 1 else sum(c in "aeiou" for c in text) / 8 for text in completions]


@pytest.fixture
def config_of(policy_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """policy_config with a reward model and a function, validated every other step."""

    def make(folder: Path, **overrides: Any) -> PolicyConfig:
        model = policy_config(folder).rewards[0]
        function = RewardSpec(function="test_processes.vowels", name="vowels")
        settings: dict[str, Any] = {
            "validation": ValidationConfig(every=2, prompts=4, num_generations=2, batch_prompts=4),
            "microbatch_prompts": 4,
            "checkpoint": CheckpointConfig(every=2),
        }
        return policy_config(folder, rewards=[model, function], **(settings | overrides))

    return make


@pytest.mark.slow
def test_several_processes_equal_one(config_of: MakeConfig, tmp_path: Path) -> None:
    """A run begun by 4 x 1 devices, gone on with by 2 x 2 and ended by 1 x 4 is the run of 1 x 4.

    That samples 8 prompts at once, while the others sample 4 at a time and score them as they end.
    """
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, parts = folders
    expected = run(config_of(whole, max_steps=6, prompts_per_step=8), whole, 1, 4)
    for steps, count, devices in ((2, 4, 1), (4, 2, 2), (6, 1, 4)):
        config = config_of(parts, max_steps=steps, prompts_per_step=8, rollout_prompts=4)
        found = run(config, parts, count, devices)
        assert [row["step"] for row in found] == list(range(steps + 1))
        assert_same(found, expected[: steps + 1])
        texts = [(folder / "run" / "completions" / f"validation_{steps:06d}.jsonl").read_text() for folder in folders]
        assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_end(victim: int, config_of: MakeConfig, tmp_path: Path) -> None:
    config = config_of(tmp_path, max_steps=10_000, checkpoint=CheckpointConfig(every=10_000))
    started = launch(config, tmp_path, 2, 1)
    deadline = time.monotonic() + 300
    while len(read_metrics(config.output_dir)) < 3 and time.monotonic() < deadline:
        assert all(process.poll() is None for process in started), (tmp_path / "2-0.log").read_text()[-2000:]
        time.sleep(0.1)
    os.kill(started[victim].pid, signal.SIGKILL)
    began = time.monotonic()
    code = started[1 - victim].wait(timeout=120)
    assert code != 0 and time.monotonic() - began < 60
    log = (tmp_path / f"2-{1 - victim}.log").read_text()
    assert f"process {1 - victim} of 2 has failed" in log or "JAX distributed service" in log, log[-3000:]
    assert started[victim].wait() == -signal.SIGKILL


def raises_on_the_second(completions: list[str], **_: Any) -> list[float]:
    if jax.process_index() == 1:
        raise KeyError("no such answer")
    return [float(len(text)) for text in completions]


@pytest.mark.slow
def test_an_error_of_one_ends_all(config_of: MakeConfig, policy_config: MakeConfig, tmp_path: Path) -> None:
    spec = RewardSpec(function="test_processes.raises_on_the_second", name="r")
    started = launch(policy_config(tmp_path, rewards=[spec]), tmp_path, 2, 1)
    codes = [process.wait(timeout=240) for process in started]
    assert 0 not in codes
    assert "no such answer" in (tmp_path / "2-1.log").read_text()


@pytest.mark.slow
def test_a_signal_to_any_ends_all_after_the_same_step(config_of: MakeConfig, tmp_path: Path) -> None:
    """No step is lost, whichever process gets it: the run that goes on is the one that was not interrupted.

    The rollouts that were drawn ahead are in the checkpoint, of all processes.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    settings: dict[str, Any] = {"max_steps": 16, "checkpoint": CheckpointConfig(every=1000)}
    settings |= {"rollout_ahead": 1, "loss": LossConfig(importance_sampling_mode="token_truncate")}
    run(config_of(whole, **settings), whole, 2, 1)
    config, steps = config_of(cut, **settings), 0
    for signalled in ((1,), (0, 1)):
        started = launch(config, cut, 2, 1)
        deadline = time.monotonic() + 300
        while len(read_metrics(config.output_dir)) < steps + 3 and time.monotonic() < deadline:
            assert all(process.poll() is None for process in started), (cut / "2-0.log").read_text()[-2000:]
            time.sleep(0.02)
        for index in signalled:
            started[index].terminate()
        codes = [process.wait(timeout=120) for process in started]
        logs = [(cut / f"2-{index}.log").read_text() for index in range(2)]
        assert codes == [143, 143], logs
        steps = len(read_metrics(config.output_dir)) - 1
        line = f"SIGTERM ended the run after step {steps} of 16; step {steps} is saved; the same command goes on"
        assert steps < 16 and [log.count(line) for log in logs] == [1, 0], logs
    run(config, cut, 2, 1)
    assert read_metrics(cut / "run", clock=False) == read_metrics(whole / "run", clock=False)
