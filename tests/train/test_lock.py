"""What a program writes has one owner: who may not have it is told who has, and a dead owner's lock is taken over."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train.loop
import train.run.lock as lock_module
from eval.texts.resumable import GrowingFile
from models.checkpoint import Checkpoints
from train.config import CheckpointConfig, PolicyConfig
from train.loop import train_policy
from train.run.directory import Run
from train.run.lock import LOCK, Lock, _start_time, acquire_all, owned, release_all
from train.running import SetupError

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
MakeConfig = Callable[..., PolicyConfig]


def hold(place: Path) -> subprocess.Popen[str]:
    """Another process that has the lock of a directory, until it is killed."""
    program = f"from train.run.lock import Lock; import time; print(Lock({str(place)!r}).acquire(), flush=True)"
    command = [sys.executable, "-c", f"{program}; time.sleep(600)"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "None\n"
    process.stdout.close()
    return process


def test_an_owner_is_named_until_it_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed, an owner waits as a zombie until its parent asks for it, and is no owner any more."""
    owner = hold(tmp_path)
    try:
        for lock in (Lock(tmp_path), Lock(str(tmp_path / ".." / tmp_path.name))):
            refusal = lock.acquire()
            assert refusal is not None and f"is in use by process {owner.pid} on {HOST} since 2" in refusal
            assert "wait for its end or stop it" in refusal and "\n" not in refusal
            lock.release()  # is not the owner's
        os.kill(owner.pid, signal.SIGSTOP)
        assert Lock(tmp_path).acquire(), "an owner that is stopped for a while goes on"
    finally:
        owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed
    lock = Lock(tmp_path)
    assert lock.acquire() is None
    assert f"was in use by process {owner.pid}" in capsys.readouterr().out
    owner.wait()
    lock.release()
    assert not list(tmp_path.iterdir())


def record(place: Path, **changes: Any) -> Path:
    """The lock of this process, as if another had written it."""
    assert Lock(place).acquire() is None
    file = place / LOCK
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


@pytest.mark.parametrize(
    "changes",
    [
        {"started": "1"},  # another process has its pid since
        {"pid": 2**22 + 1},  # above the highest pid
        {"boot": "an earlier start of this machine"},
        {"namespace": "pid:[1]", "flock": False},  # a container on this machine, that has ended
    ],
)
def test_a_dead_owner_has_no_lock(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = record(tmp_path, **changes)
    if "flock" in changes:  # what holds a lock that nobody opened
        text = file.read_text()
        file.unlink()
        file.write_text(text)
    lock = Lock(tmp_path)
    assert lock.acquire() is None
    lock.release()
    assert not file.exists()


def test_an_owner_in_another_container_lives_while_its_file_is_locked(tmp_path: Path) -> None:
    owner = hold(tmp_path)
    file = tmp_path / LOCK
    with file.open("r+") as opened:  # the file that it holds, as if written in its container
        text = json.dumps(json.load(opened) | {"namespace": "pid:[1]", "pid": 1, "host": "container"})
        opened.seek(0)
        opened.write(text)
        opened.truncate()
    assert "is in use by process 1 on container since" in str(Lock(tmp_path).acquire())
    owner.kill()
    owner.wait()
    assert Lock(tmp_path).acquire() is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"host": "elsewhere", "boot": "another"}, "process {pid} on elsewhere since .* delete {file}"),
        ("", "{file}: expected the JSON of the program that writes to {place}, .* delete that file"),
        ("[1]", "expected the JSON"),
        ('{"pid": "x", "host": "a", "since": "b"}', "expected the JSON"),
    ],
)
def test_whom_nobody_can_see_keeps_the_lock(tmp_path: Path, text: str | dict[str, str], words: str) -> None:
    file = record(tmp_path, **text) if isinstance(text, dict) else tmp_path / LOCK
    if isinstance(text, str):
        file.write_text(text)
    refused = Lock(tmp_path).acquire()
    with pytest.raises(ValueError, match=words.format(pid=os.getpid(), file=file, place=tmp_path)):
        raise ValueError(refused)
    assert file.exists()


def test_a_lock_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="No space left"):
        patch.setattr("train.run.lock.os.fsync", full)
        with owned(Lock(tmp_path)):
            pass
    assert not list(tmp_path.iterdir())
    with owned(Lock(tmp_path)):  # nothing is in the way of the next start
        assert list(tmp_path.iterdir())


def test_without_proc_a_process_is_told_by_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    monkeypatch.setattr("train.run.lock.Path", lambda path: Path(f"/nowhere{path}"))
    assert _start_time(os.getpid()) == "" and _start_time(ended.pid) is None


def test_all_locks_or_none_and_no_trace(tmp_path: Path) -> None:
    """The directories made for a lock go with it if nothing else is in them; a body that fails releases too."""
    new, used = Lock(tmp_path / "a" / "b"), Lock(tmp_path / "used")
    with pytest.raises(KeyboardInterrupt), owned(new, used):
        assert (tmp_path / "a" / "b" / LOCK).exists()
        with (
            pytest.raises(ValueError, match="used: is in use by"),
            owned(Lock(tmp_path / "c"), Lock(tmp_path / "used")),
        ):
            pytest.fail("refused")
        assert not (tmp_path / "c").exists()
        (tmp_path / "used" / "row").write_text("")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["row", "used"]


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert (
        acquire_all([Lock(tmp_path / "x"), Lock(tmp_path / "file" / "run")]) == f"{tmp_path}/file/run: Not a directory"
    )
    assert acquire_all([Lock(tmp_path / "file")]) == f"{tmp_path}/file: File exists"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_other_processes_of_a_program_learn_of_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 alone looks; the others hold nothing, and release nothing of it."""
    monkeypatch.setattr(lock_module, "is_first", lambda: False)
    monkeypatch.setattr(lock_module, "broadcast_from_first", lambda _: "in use by process 0's neighbour")
    with pytest.raises(ValueError, match="neighbour"), owned(Lock(tmp_path)):
        pytest.fail("refused")
    monkeypatch.setattr(lock_module, "broadcast_from_first", lambda _: None)
    (tmp_path / LOCK).write_text("process 0's")
    with owned(Lock(tmp_path)):
        pass
    assert (tmp_path / LOCK).read_text() == "process 0's"


# Runs and files


class Stopped(Exception):
    pass


def test_a_run_has_one_owner_from_before_its_first_file(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second start is refused before data and weights are read, also by the place of the checkpoints alone."""
    place = CheckpointConfig(every=1, directory=str(tmp_path / "place"))
    config = policy_config(tmp_path, max_steps=1, checkpoint=place)

    def second_starts(*_: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(train.loop, "policy_layout", lambda _: pytest.fail("the second start computes"))
            for other in (config, replace(config, output_dir=str(tmp_path / "b")), at_checkpoints):
                with pytest.raises(SetupError, match=f"is in use by process {os.getpid()} on "):
                    train_policy(other)
        assert not (tmp_path / "b").exists() and not (tmp_path / "run" / "config.yaml").exists()
        raise Stopped

    at_checkpoints = replace(config, output_dir=str(tmp_path / "place"), checkpoint=CheckpointConfig())
    monkeypatch.setattr(Run, "__init__", second_starts)
    with pytest.raises(Stopped):
        train_policy(config)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_an_error_releases_a_run_behind_its_saves(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next owner removes what is half written: the lock goes when the save in flight is done."""
    events: list[str] = []
    wait, release = Checkpoints.wait, Lock.release
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (wait(self), events.append("saved"))[0])
    monkeypatch.setattr(Lock, "release", lambda self: (release(self), events.append("released"))[0])

    def fail(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(Run, "resume", fail)
    with pytest.raises(Stopped):
        train_policy(policy_config(tmp_path, max_steps=1))
    assert "saved" in events and events[-2:] == ["released", "released"] and not list(tmp_path.rglob(LOCK))


def test_a_growing_file_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--overwrite does not take it away; once complete it is only read, by many."""
    out = str(tmp_path / "new" / "out.jsonl")
    with GrowingFile(out, {"seed": 0}) as file:
        for overwrite in (False, True):
            with pytest.raises(ValueError, match="out.jsonl: is in use by process"):
                GrowingFile(out, {"seed": 0}, overwrite=overwrite)
        file.append([{"row": 1}])
        assert file.finish() == [{"row": 1}]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out.jsonl", "out.jsonl.settings.json"}
    monkeypatch.setattr(Lock, "acquire", lambda _: pytest.fail("a complete file needs no lock"))
    for _ in range(2):
        with GrowingFile(out, {"seed": 0}) as file:
            assert file.complete
    assert release_all([Lock(out, is_file=True)]) is None


@pytest.mark.parametrize("line", [b'{"row": 2', b"\0" * 8, b'{"row": "\xff"}'])
def test_a_damaged_line_costs_the_rows_from_there_on(
    tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with GrowingFile(str(out), {"seed": 0}) as file:
        file.append([{"row": number} for number in range(4)])
    lines = file.partial.read_bytes().splitlines(keepends=True)
    file.partial.write_bytes(b"".join([*lines[:2], line + b"\n", lines[3]]))
    with GrowingFile(str(out), {"seed": 0}) as file:
        assert file.rows == 2 and "out.jsonl.partial: line 3 is damaged" in capsys.readouterr().out
        file.keep(2)
        file.append([{"row": number} for number in (2, 3)])
        assert file.finish() == [{"row": number} for number in range(4)]
