"""One owner for what a program writes: a second start is refused, and the lock of a dead owner is taken over.

A lock is a file beside the rest, {"host", "boot", "namespace", "pid", "started", "since"}, which its owner creates
before it writes anything else and removes at its end. Whether an owner still runs:

    same kernel, same process namespace   a process with this pid and this start time exists
    same kernel, another container        the lock file is still locked (flock), which ends with the process
    same host, started again since        it does not
    another host                          nobody knows here: the user is told which file to remove

All processes of a program count as one owner: process 0 takes the lock, and every process learns of a refusal.
"""

import contextlib
import fcntl
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from etils import epath

from models.checkpoint import checkpoints_folder, wait_for_saves
from train.config import PolicyConfig, SupervisedConfig
from train.console import print_plain
from train.processes import (
    broadcast_from_first,
    end_with_others,
    failure_of_another,
    gather,
    is_distributed,
    is_first,
)
from train.run.directory import OPEN_RUNS, check_run
from train.run.profile import finish_trace
from train.run.signals import watch_signals
from train.running import RunInterrupted, WriteError, setup_errors

LOCK = "lock.json"  # in a directory; FILE.lock.json beside a file
_SAVE_SECONDS = 20  # how long a process that fails waits for a save; others take part in it, and may be gone
_OTHERS_SAVE_SECONDS = 3  # the same if another process has failed, which has waited already
_TRIES = 3  # to take a lock over; more only if others try at the same time

Owner = dict[str, Any]
RunConfigT = TypeVar("RunConfigT", bound=PolicyConfig | SupervisedConfig)
P = ParamSpec("P")


class Lock:
    """The lock of a directory, or of a file. Usable on the process that writes."""

    def __init__(self, place: str | os.PathLike[str], *, is_file: bool = False) -> None:
        path = epath.Path(place) if "://" in str(place) else epath.Path(Path(place).absolute())
        self.file = path.with_name(f"{path.name}.{LOCK}") if is_file else path / LOCK
        self._place, self._created = place, list[epath.Path]()
        self._opened: int | None = None

    def acquire(self) -> str | None:
        """Takes the lock; returns None, or one line that says who has it."""
        self._make_directory()
        refusal: str | None = f"{self.file}: another program takes this lock again and again"
        with _guard(self.file.parent):
            for _ in range(_TRIES):
                if self._create():
                    return None
                if refusal := self._refusal():
                    break
                self.file.unlink(missing_ok=True)
        self._remove_directories()
        return refusal

    def release(self) -> None:
        """Removes the lock, and the directories made for it that are empty; without the lock it does nothing."""
        if self._opened is None:
            return
        with contextlib.suppress(OSError):  # a disk that became read-only: the next start sees that its owner is gone
            self.file.unlink(missing_ok=True)
            self._remove_directories()
        if self._opened >= 0:
            os.close(self._opened)
        self._opened = None

    def _make_directory(self) -> None:
        folder = self.file.parent
        missing = [] if _is_remote(folder) else [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._created = missing

    def _remove_directories(self) -> None:
        for folder in self._created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _create(self) -> bool:
        """Writes the lock, unless there is one already."""
        text = json.dumps(_this_process())
        if _is_remote(self.file):  # a bucket has no exclusive creation: two starts in one moment are not told apart
            if not self.file.exists():
                self.file.write_text(text)
                self._opened = -1
            return self._opened is not None
        try:
            opened = os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(opened, text.encode())
            os.fsync(opened)
        except OSError as error:  # a full disk
            os.close(opened)
            self.file.unlink()
            error.filename = str(self.file)
            raise
        with contextlib.suppress(OSError):  # a file system without flock: the pid alone tells whether its owner lives
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._opened = opened
        return True

    def _refusal(self) -> str | None:
        """Returns why the lock that is there has to be respected; None if its owner is gone."""
        try:
            owner = json.loads(self.file.read_text())
            name = f"process {owner['pid']:d} on {owner['host']} since {owner['since']}"
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return (
                f"{self.file}: expected the JSON of the program that writes to {self._place}, got what is none; if no "
                f"program does, delete that file"
            )
        alive = _is_alive(owner, self.file)
        if alive is None:
            return (
                f"{self._place}: is in use by {name}, and from this host ({socket.gethostname()}) it cannot be seen "
                f"whether that one still runs; if it does not, delete {self.file}"
            )
        if alive:
            return f"{self._place}: is in use by {name}; wait for its end or stop it, or write to another place"
        print_plain(f"{self._place}: was in use by {name}, which no longer runs; taken over from it")
        return None


@contextlib.contextmanager
def owned(*locks: Lock) -> Iterator[None]:
    """Holds locks while the body runs.

    Raises:
      ValueError: another program has one of them; on every process.
    """
    refusal = broadcast_from_first(lambda: acquire_all(locks))
    if refusal:
        raise ValueError(refusal)
    try:
        yield
    finally:
        release_all(locks)


def acquire_all(locks: Sequence[Lock]) -> str | None:
    """Takes all locks or none, on process 0; returns None, or one line that says why not."""
    for number, lock in enumerate(locks):
        try:
            refusal = lock.acquire()
        except OSError as error:  # the other processes wait for an answer
            refusal = str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        if refusal:
            release_all(locks[:number])
            return refusal
    return None


def release_all(locks: Sequence[Lock]) -> None:
    """Releases locks, the last one first."""
    if is_first():
        for lock in reversed(locks):
            lock.release()


def owns_its_run(program: Callable[Concatenate[RunConfigT, P], None]) -> Callable[Concatenate[RunConfigT, P], None]:
    """Decorates a program that trains: it alone writes to its run's directory and checkpoints, or it is refused."""

    @functools.wraps(program)
    def with_locks(config: RunConfigT, *args: P.args, **kwargs: P.kwargs) -> None:
        with watch_signals(), contextlib.ExitStack() as stack:
            with setup_errors():
                check_run(config)  # first: a lock makes the directory
                stack.enter_context(owned(*run_locks(config)))
            try:
                with end_with_others(partial(_end_for_another, config, stack)):
                    program(config, *args, **kwargs)
            except BaseException as error:
                end_in_order(config, error)  # before the lock is released: the next owner removes what is being saved
                raise

    return with_locks


def end_in_order(config: PolicyConfig | SupervisedConfig, error: BaseException) -> None:
    """Waits for the save in flight, finishes the profile's trace and closes the trackers of a run that `error` ends."""
    is_agreed = isinstance(error, RunInterrupted) and error.is_agreed
    is_told = isinstance(error, WriteError | ChildProcessError)  # a line has told already that a disk is full
    waiter = threading.Thread(target=partial(wait_for_saves, quiet=is_told), daemon=True)
    waiter.start()
    seconds = _SAVE_SECONDS if failure_of_another() is None else _OTHERS_SAVE_SECONDS
    waiter.join(seconds if is_distributed() and not is_agreed else None)
    finish_trace()
    for run in list(OPEN_RUNS):
        if run.path == Path(config.output_dir):
            run.abandon(error)
    if is_agreed:
        gather(np.zeros(1))  # barrier: a launcher may kill the others once one has ended


def _end_for_another(config: PolicyConfig | SupervisedConfig, locks: contextlib.ExitStack) -> None:
    end_in_order(config, ChildProcessError("another process has failed"))
    locks.close()


def run_locks(config: PolicyConfig | SupervisedConfig) -> list[Lock]:
    """Returns the locks of a run: its directory's and, wherever it lies, its checkpoints'."""
    places = [config.output_dir, config.checkpoint.directory or str(checkpoints_folder(config.output_dir))]
    locks = [Lock(place) for place in places]
    return locks[: 1 if locks[0].file == locks[1].file else 2]


# Which process has it, and whether it still runs


def _this_process() -> Owner:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "namespace": _namespace(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_alive(owner: Owner, file: epath.Path) -> bool | None:
    """Whether the owner of a lock still runs; None where that cannot be known."""
    here, boot = owner["host"] == socket.gethostname(), _boot()
    if owner.get("boot") != boot:
        return False if here else None
    if boot is None and not here:
        return None
    if owner.get("namespace") == _namespace():
        started = _start_time(owner["pid"])
        return started is not None and started == owner.get("started")
    return _is_flocked(file)


def _boot() -> str | None:
    """Returns what tells the kernel that runs from all others, those of this host's earlier starts too."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else None


def _namespace() -> str | None:
    """Returns the process namespace; a container has pids of its own."""
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else None


def _start_time(pid: int) -> str | None:
    """Returns the start time of a process, in the kernel's ticks; "" where it is unknown, None without the process."""
    if not Path("/proc/self/stat").is_file():  # no Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # another user's
            return ""
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # a dead process waits as Z until its parent asks for it


def _is_flocked(file: epath.Path) -> bool | None:
    """Whether a process of this kernel holds the file's flock; None on a file system without flock."""
    if _is_remote(file):
        return None
    opened = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(opened)
    return False


@contextlib.contextmanager
def _guard(folder: epath.Path) -> Iterator[None]:
    """One start of this host at a time looks at a directory's locks: two would take a dead owner's over at once."""
    if _is_remote(folder):
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without flock
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _is_remote(file: epath.Path) -> bool:
    return "://" in str(file)
