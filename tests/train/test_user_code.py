"""A reward function neither ends the run in silence, nor moves it to another directory, nor hangs unseen."""

import asyncio
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train.config import RewardSpec
from train.dotted import import_function
from train.loop import train_policy
from train.rewards.functions import function_scorer
from train.running import SetupError, exit_code

ROOT = Path(__file__).parents[2]


class Away(BaseException):
    """An exception that `except Exception` does not catch."""


class Rude:
    """A number that ends the program when it is read."""

    shape = ()

    def item(self) -> float:
        sys.exit(0)


def raises(error: BaseException) -> Callable[..., Any]:
    def end(completions: list[str]) -> Any:
        raise error

    return end


def swallowed(completions: list[str]) -> Any:
    try:
        os._exit(0)
    except Exception:
        return [0.0] * len(completions)


ENDS: dict[str, tuple[Callable[..., Any], str]] = {
    "sys.exit": (lambda completions: sys.exit(), "raised SystemExit"),
    "sys.exit 0": (lambda completions: sys.exit(0), "raised SystemExit(0)"),
    "sys.exit text": (lambda completions: sys.exit("good"), "raised SystemExit('good')"),
    "exit": (lambda completions: exit(0), "raised SystemExit(0)"),
    "quit": (lambda completions: quit(), "raised SystemExit"),
    "raise SystemExit": (raises(SystemExit(0)), "raised SystemExit(0)"),
    "os._exit 0": (lambda completions: os._exit(0), "called os._exit(0)"),
    "os._exit 3": (lambda completions: os._exit(3), "called os._exit(3)"),
    "os._exit in try": (swallowed, "called os._exit(0)"),
    "GeneratorExit": (raises(GeneratorExit()), "raised GeneratorExit"),
    "CancelledError": (raises(asyncio.CancelledError()), "raised CancelledError"),
    "BaseException": (raises(Away("far")), "raised Away('far')"),
    "exit in a result": (lambda completions: [Rude()] * len(completions), "raised SystemExit(0)"),
}


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """define(function, name): the dotted path of a function that stands in a module of its own."""

    def put(function: Callable[..., Any], name: str = "f") -> str:
        module = type(sys)("rude_rewards")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "rude_rewards", module)
        return f"rude_rewards.{name}"

    return put


@pytest.fixture
def scorer(define: Callable[..., str]) -> Callable[..., Callable[..., Any]]:
    """scorer(function, name): its scorer."""

    def make(function: Callable[..., Any], name: str = "f") -> Callable[..., Any]:
        return function_scorer(define(function, name))

    return make


def score(scorer: Callable[..., Any]) -> list[Any]:
    return scorer(["p"], [["a", "b"]], {}).tolist()


@pytest.mark.parametrize("way", ENDS)
def test_a_function_that_ends_the_program_is_one_line_and_a_failure(
    way: str, scorer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    function, deed = ENDS[way]
    code = exit_code(lambda: score(scorer(function)), own_devices=True, several=False)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: rewards.function: rude_rewards.f: {deed}") and error.count("\n") == 1
    assert os._exit.__module__ == "posix"  # the real one again


def test_ctrl_c_and_other_exceptions_pass_through(scorer: Callable[..., Any]) -> None:
    for error in (KeyboardInterrupt(), ZeroDivisionError("x"), StopIteration(), MemoryError()):
        with pytest.raises(type(error)):
            score(scorer(raises(error)))


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_a_module_that_ends_the_program_when_it_is_imported(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"ends_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SetupError, match=f"^rewards.function: {name}.f: (raised SystemExit|called os._exit)"):
        import_function(f"{name}.f", "rewards.function")


def test_os_exit_in_a_thread_is_a_failure_and_in_a_forked_child_its_own_end() -> None:
    code = """
import os, sys, threading, time
from train.user_code import contained

with contained("rewards.function: m.f"):
    child = os.fork()
    if not child:
        os._exit(0)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    threading.Thread(target=os._exit, args=(0,)).start()
    time.sleep(10)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "child 0\n")
    assert done.stderr == "error: rewards.function: m.f: called os._exit(0) in a thread, which ends the run\n"


def child_process(completions: list[str]) -> list[float]:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(len, completions)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning")
def test_a_function_may_have_processes_of_its_own(scorer: Callable[..., Any]) -> None:
    assert score(scorer(child_process)) == [[1, 1]]


def test_the_working_directory_of_a_function_is_its_own(
    scorer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "theirs", "theirs/deeper"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "run")
    seen: list[str] = []

    def wanders(completions: list[str]) -> list[float]:
        seen.append(os.path.relpath(os.getcwd(), tmp_path))
        os.chdir(tmp_path / "theirs" if len(seen) == 1 else "deeper" if len(seen) == 2 else tmp_path / "run")
        return [0.0] * len(completions)

    scores = scorer(wanders)
    for _ in range(4):
        score(scores)
        assert Path.cwd() == tmp_path / "run"
    assert seen == ["run", "theirs", "theirs/deeper", "run"]


def test_a_failing_function_moves_the_run_nowhere(
    scorer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(completions: list[str]) -> Any:
        os.chdir("/")
        sys.exit(0)

    with pytest.raises(SetupError):
        score(scorer(fails))
    assert Path.cwd() == tmp_path
    monkeypatch.setattr("train.user_code._state.directory", None)


def test_a_run_stays_in_its_directory_and_is_saved_when_a_function_ends_it(
    define: Callable[..., str],
    policy_config: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.user_code._state.directory", None)
    calls: list[int] = []

    def roams(completions: list[str]) -> list[float]:
        os.chdir(tmp_path / "elsewhere")
        calls.append(len(completions))
        if len(calls) == 3:  # validation, step 1, step 2
            os._exit(0)
        return [float(len(text)) for text in completions]

    config = policy_config(tmp_path, output_dir="run", rewards=[RewardSpec(function=define(roams, "roams"))])
    assert exit_code(lambda: train_policy(config), own_devices=True, several=False) == 2
    error = capsys.readouterr().err
    assert "error: rewards.function: rude_rewards.roams: called os._exit(0), which" in error
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir() and not (tmp_path / "run" / "lock.json").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # steps 0 and 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_hang_says_which_reward_since_when_and_where(
    scorer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.user_code.HANG_SECONDS", 0.1)
    release = threading.Event()

    def stuck(completions: list[str]) -> list[float]:
        release.wait(0.55)
        return [0.0] * len(completions)

    scores = scorer(stuck, "stuck")
    score(scores)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 3  # after 0.1, 0.2 and 0.4 s
    for line in lines:
        assert line.startswith("rewards: rude_rewards.stuck: has not returned for ") and "since " in line
        assert "stuck (train/test_user_code.py:" in line and "wait (" in line
    score(scores)  # as long as the first: nothing new
    assert capsys.readouterr().out == ""


def test_a_quick_function_says_nothing_and_leaves_no_thread(
    scorer: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    score(scorer(lambda completions: [1.0] * len(completions)))
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "hang watch"]
    assert capfd.readouterr() == ("", "")


def test_a_function_that_holds_the_interpreter_has_its_stack_printed() -> None:
    code = """
import re, train.user_code as user_code

user_code.HANG_SECONDS, user_code.GIL_SECONDS = 0.1, 0.2
with user_code.HangWatch("rewards: m.f", __file__ if "__file__" in globals() else "")():
    re.fullmatch(r"(a+)+b", "a" * 25)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("rewards: m.f: has not returned") or "fullmatch" in done.stderr


def test_without_a_standard_error_nothing_breaks(scorer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert score(scorer(lambda completions: [1.0] * len(completions))) == [[1, 1]]
