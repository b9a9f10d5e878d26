"""Worker processes: parallel, killed when late, replaced when dead, deaf to the run's signals, ended with the run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.config import RewardSpec
from train.rewards import Rewards
from train.rewards.failures import WorkerError
from train.rewards.returned import RewardError

ROOT = Path(__file__).parents[2]
MODULE = """
import asyncio, os, re, subprocess, sys, time

calls = 0

def about(prompts, completions, log_columns, log_metric, trainer_state, **columns):
    global calls
    calls += 1
    log_columns("process", [os.getpid()] * len(completions))
    log_columns("calls", [calls] * len(completions))
    log_metric("jax", "jax" in sys.modules)
    log_metric("step", trainer_state.global_step)
    prompts.clear()
    return [float(len(text)) for text in completions]

async def waits(completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]

def naps(completions, **columns):
    time.sleep(0.4)
    return [0.0] * len(completions)

def hangs(completions, **columns):
    if "hang" in completions:
        re.fullmatch(r"(a+)+b", "a" * 60)  # holds the interpreter
    return [1.0] * len(completions)

def raises(completions, **columns):
    return [1 / 0 for text in completions]

def dies(completions, **columns):
    os.kill(os.getpid(), 9)

def leaves(completions, **columns):
    os._exit(0)

def few(completions, **columns):
    return [0.0]

def once(completions, *, file, **columns):
    if not os.path.exists(file):
        open(file, "w").close()
        os.kill(os.getpid(), 9)
    return [2.0] * len(completions)
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module worker_rewards, importable here and, for workers get this path, there."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "worker_rewards.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Rewards]]:
    """make(function, **settings): the rewards of a run in tmp_path, closed at the end."""
    made: list[Rewards] = []

    def rewards(function: str, **settings: Any) -> Rewards:
        spec = RewardSpec(function=f"worker_rewards.{function}", name="r", **settings)
        made.append(Rewards([spec], None, "float32"))
        made[-1].belong_to(tmp_path, 10, 2.0)
        made[-1].at(3, "step 4")
        return made[-1]

    yield rewards
    for each in made:
        each.close()


def texts(P: int) -> tuple[list[str], list[list[str]]]:
    return [f"p{p}" for p in range(P)], [["a" * p, "b"] for p in range(P)]


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "\nState:\tZ" not in status.read_text() if Path("/proc/self").exists() else os.kill(process, 0) is None
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(is_done: Callable[[], bool], seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not is_done() and time.monotonic() < until:
        time.sleep(0.02)
    return is_done()


def test_workers_give_what_the_run_itself_would_and_are_kept(make: Any) -> None:
    prompts, completions_PG = texts(5)
    rewards = make("about", workers=2, batch_prompts=2)
    for _ in range(2):
        rewards_PGR = rewards.score(prompts, completions_PG, {})
        columns = rewards.take_columns()
    np.testing.assert_array_equal(rewards_PGR[..., 0], [[len(text) for text in group] for group in completions_PG])
    assert prompts == texts(5)[0]
    processes = {value for group in columns["logged/r/process"] for value in group}
    assert os.getpid() not in processes and len(processes) <= 2
    assert max(value for group in columns["logged/r/calls"] for value in group) > 1, "started once, and kept"
    metrics = rewards.metrics(rewards_PGR)
    assert metrics["logged/r/jax"] == 0, "a worker imports no JAX"
    assert metrics["logged/r/step"] == 3
    rewards.close()
    assert wait_for(lambda: not any(map(is_running, processes)))


def test_async_functions_run_in_workers_too(make: Any) -> None:
    prompts, completions_PG = texts(3)
    rewards_PGR = make("waits", workers=2).score(prompts, completions_PG, {})
    np.testing.assert_array_equal(rewards_PGR[..., 0], [[len(text) for text in group] for group in completions_PG])


def test_chunks_run_side_by_side(make: Any) -> None:
    prompts, completions_PG = texts(4)
    rewards = make("naps", workers=4)
    rewards.score(prompts, completions_PG, {})  # the import is no call
    began = time.monotonic()
    rewards.score(prompts, completions_PG, {})
    assert time.monotonic() - began < 1.4, "not 4 x 0.4 s"


def hanging(P: int = 4) -> tuple[list[str], list[list[str]]]:
    prompts, completions_PG = texts(P)
    completions_PG[1] = ["hang", "b"]
    return prompts, completions_PG


def test_a_late_call_ends_the_run_with_its_texts_on_disk(make: Any, tmp_path: Path) -> None:
    words = (
        r"^rewards.function: worker_rewards.hangs: no rewards within 0.3 s, for 2 completions \(2 attempts\); they are "
        r"in .*failed_step_000004_r.jsonl; raise rewards\[\].timeout_s, or set on_error: unscorable$"
    )
    with pytest.raises(RewardError, match=words):
        make("hangs", workers=4, timeout_s=0.3, retries=1).score(*hanging(), {"answer": [0, 1, 2, 3]})
    rows = [
        json.loads(line) for line in (tmp_path / "completions" / "failed_step_000004_r.jsonl").read_text().splitlines()
    ]
    assert [row["completion"] for row in rows] == ["hang", "b"] and rows[0]["prompt"] == "p1"
    assert rows[0]["failure"] == "no rewards within 0.3 s" and rows[0]["answer"] == 1


def test_a_late_call_may_cost_its_completions_alone(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = make("hangs", workers=2, timeout_s=0.3, on_error="unscorable", batch_prompts=1)
    for _ in range(2):
        rewards_PGR = rewards.score(*hanging(), {})
        np.testing.assert_array_equal(rewards_PGR[..., 0], [[1, 1], [np.nan] * 2, [1, 1], [1, 1]])
    assert rewards.metrics(rewards_PGR)["rewards/r/failed"] == 4
    assert rewards.metrics(rewards_PGR)["rewards/r/failed"] == 0, "counted once"
    assert capsys.readouterr().out.count("rewards: r: step 4: no rewards within 0.3 s") == 1, "told once"


def test_an_exception_in_a_worker_is_shown_with_its_traceback(make: Any) -> None:
    with pytest.raises(WorkerError, match=r"(?s)worker_rewards.raises: raised in .*, in raises\n.*ZeroDivisionError"):
        make("raises", workers=1).score(*texts(2), {})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("dies", "^rewards.function: worker_rewards.dies: its worker process ended by SIGKILL before it returned 4"),
        ("leaves", r"^rewards.function: worker_rewards.leaves: called os._exit\(0\), which would have ended the run"),
        ("few", "^worker_rewards.few: expected 4 rewards, one per completion, got 1"),
    ],
)
def test_what_else_may_happen_in_a_worker_is_one_line(function: str, words: str, make: Any) -> None:
    with pytest.raises(RewardError, match=words):
        make(function, workers=1).score(*texts(2), {})


def test_a_worker_that_has_died_is_replaced_and_its_call_made_again(make: Any, tmp_path: Path) -> None:
    rewards = make("once", workers=1, retries=1, options={"file": str(tmp_path / "died")})
    assert (rewards.score(*texts(2), {}) == 2).all()


def test_the_example_of_a_reward() -> None:
    function = "examples.custom_reward.brevity"
    spec = RewardSpec(function=function, options={"seconds": 0.01}, workers=2, timeout_s=30.0)
    columns: Any = {"completion": ["one two", "three four"]}
    rewards = Rewards([spec], None, "float32", columns=["completion"])
    rewards_PGR = rewards.score(["p", "q"], [["a b", "a"], ["a b c", ""]], columns)
    np.testing.assert_array_equal(rewards_PGR[..., 0], [[0, -0.5], [-0.5, -1]])
    assert rewards.take_columns() == {"logged/brevity/words": [[2, 1], [3, 0]]}
    assert rewards.metrics(rewards_PGR)["logged/brevity/words"] == 1.5
    rewards.close()


def test_arguments_that_cannot_be_sent_are_named(make: Any) -> None:
    with pytest.raises(RewardError, match="its arguments cannot be sent to a worker process .*; set workers: 0"):
        make("about", workers=1).score(*texts(1), {"column": [lambda: None]})


def test_the_runs_signals_do_nothing_to_a_worker(make: Any) -> None:
    rewards = make("about", workers=1)
    rewards.score(*texts(1), {})
    process = rewards.take_columns()["logged/r/process"][0][0]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process, number)
    time.sleep(0.1)
    rewards.score(*texts(1), {})
    assert rewards.take_columns()["logged/r/process"][0][0] == process
    assert os.getpgid(process) != os.getpgid(0), "a terminal's signals do not reach it"


@pytest.mark.parametrize("function", ["about", "hangs"])
def test_workers_end_with_a_run_that_is_killed(function: str, module: Path) -> None:
    """Even one that holds the interpreter."""
    code = f"""
import sys
sys.path.insert(0, {str(module)!r})
from train.config import RewardSpec
from train.rewards.functions import function_scorer
spec = RewardSpec(function="worker_rewards.{function}", workers=1)
scorer = function_scorer(spec.function, spec=spec)
print("made", flush=True)
wait = scorer.start(["p"], [["hang"]], {{}})
print(scorer._runner.pool._workers[0]._process.pid, flush=True)
wait()
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == "made\n"
        process = int(run.stdout.readline())
        time.sleep(0.5)
        assert is_running(process)
        run.kill()
        run.wait()
    assert wait_for(lambda: not is_running(process))
