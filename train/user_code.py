"""Runs a user's functions so that they cannot end the run without a word, move it to another directory, or hang unseen.

Python's own ways out are caught: `sys.exit` and other exceptions that are no `Exception`, and `os._exit`. Machine code
that ends the process cannot be caught in it; then the lock of the run's directory stays (`train.run.lock`), and the
next start says that the program before did not end itself.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from train.console import console, print_plain
from train.running import RunInterrupted, SetupError

HANG_SECONDS = 60.0  # until a call that has not returned is reported, the first time
GIL_SECONDS = 5.0  # more, until the interpreter's stack is printed: no Python thread could report
_exit = os._exit


class _ExitCall(BaseException):
    """Raised by `os._exit` in a user's function in place of the end."""


class _Containment:
    """State of the process while a user's code runs in it.

    Attributes:
      running: the names of such code, by the thread that runs it; several for the thread of an event loop.
      process: the process that runs it; a forked child has a copy of this state.
      directory: the working directory in which such code was left, if it is not the run's.
    """

    def __init__(self) -> None:
        self.running: dict[int, list[str]] = {}
        self.process = 0
        self.directory: str | None = None
        self.lock = threading.Lock()


_state = _Containment()


@contextlib.contextmanager
def contained(what: str, *, own_directory: bool = True) -> Iterator[None]:
    """Runs a user's code, which cannot end the process in silence or change the run's working directory.

    The code finds the working directory that it left itself; the run keeps its own. A signal passes through.

    Args:
      what: its name, as messages show it, e.g. "rewards.function: my_rewards.brevity".
      own_directory: False for code that runs beside other code: then the caller keeps the directory.

    Raises:
      SetupError: the code raised an exception that is no `Exception`, or called `os._exit`.
    """
    _enter(what)
    try:
        with _own_directory() if own_directory else contextlib.nullcontext():
            yield
    except (Exception, KeyboardInterrupt, RunInterrupted):
        raise
    except BaseException as error:
        deed = str(error) if isinstance(error, _ExitCall) else f"raised {error!r:.80}"
        raise SetupError(
            f"{what}: {deed}, which would have ended the run; return rewards, or raise an Exception"
        ) from error
    finally:
        _leave(what)


def _enter(what: str) -> None:
    with _state.lock:
        _state.process = os.getpid()
        _state.running.setdefault(threading.get_ident(), []).append(what)
        os._exit = _refuse_exit


def _leave(what: str) -> None:
    thread = threading.get_ident()
    with _state.lock:
        _state.running[thread].remove(what)
        if not _state.running[thread]:
            del _state.running[thread]
        if not _state.running:
            os._exit = _exit


def _refuse_exit(status: int) -> NoReturn:
    """Stands in for `os._exit` while a user's code runs."""
    asked_by, running = sys._getframe(1).f_globals.get("__name__", ""), dict(_state.running)
    if not running or _state.process != os.getpid() or asked_by.startswith("train."):  # e.g. a forked child's end
        _exit(status)
    deed = f"called os._exit({status})"
    if threading.get_ident() in running:
        raise _ExitCall(deed)
    what = next(names[-1] for names in running.values())
    print(f"error: {what}: {deed} in a thread, which ends the run", file=sys.stderr)
    sys.stderr.flush()
    _exit(status or 1)


@contextlib.contextmanager
def _own_directory() -> Iterator[None]:
    """Gives users' code a working directory of its own, at first the run's."""
    run_directory = working_directory()
    if _state.directory is not None:
        with contextlib.suppress(OSError):  # removed since
            os.chdir(_state.directory)
    try:
        yield
    finally:
        left_in = working_directory()
        _state.directory = None if left_in == run_directory else left_in
        if run_directory is not None and left_in != run_directory:
            os.chdir(run_directory)


def working_directory() -> str | None:
    """Returns the working directory; None if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


class HangWatch:
    """Prints one line when a call does not return: which, since when and where it is; again each time that doubles.

    A call of which that is known waits longer: twice the longest that has returned. A call that never lets another
    thread run, as a regular expression's, is reported by `faulthandler`, which prints the stack.

    Args:
      what: the name of what is called.
      file: the caller's, whose frames are not shown.
    """

    def __init__(self, what: str, file: str) -> None:
        self._what, self._file, self._patience = what, file, HANG_SECONDS

    @contextlib.contextmanager
    def __call__(self, place: Callable[[], str] | None = None) -> Iterator[None]:
        """Watches the call that the block makes.

        Args:
          place: tells where the call is; default: the stack of this thread.
        """
        began, since, done = time.monotonic(), time.strftime("%H:%M:%S"), threading.Event()
        thread = threading.get_ident()

        def watch() -> None:
            wait = self._patience
            while not done.wait(wait):
                faulthandler.cancel_dump_traceback_later()
                wait = time.monotonic() - began
                at = stack_text(thread, self._file) if place is None else place()
                tell(f"{self._what}: has not returned for {wait:.0f} s, since {since}; it is at {at}")

        dumps = place is None and _dump_later(self._patience + GIL_SECONDS)
        threading.Thread(target=watch, daemon=True, name="hang watch").start()
        try:
            yield
        finally:
            done.set()
            if dumps:
                faulthandler.cancel_dump_traceback_later()
            self._patience = max(self._patience, 2 * (time.monotonic() - began))


def stack_text(thread: int, file: str) -> str:
    """Returns the calls of a thread inside of a file's frames, as "f (a.py:1) > ... > g (b.py:2)"."""
    frame, calls = sys._current_frames().get(thread), list[str]()
    while frame is not None and frame.f_code.co_filename != file:
        calls.insert(0, _call_text(frame))
        frame = frame.f_back
    return _shortened(calls)


def await_text(coroutine: Any) -> str:
    """Returns what a coroutine waits in, as "f (a.py:1) > ... > g (b.py:2)"."""
    calls = list[str]()
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        calls.append(_call_text(frame))
        coroutine = coroutine.cr_await
    return _shortened(calls)


def _call_text(frame: FrameType) -> str:
    code = frame.f_code
    return f"{code.co_name} ({os.sep.join(code.co_filename.split(os.sep)[-2:])}:{frame.f_lineno})"


def _shortened(calls: Sequence[str]) -> str:
    return " > ".join(calls if len(calls) <= 4 else [*calls[:2], "...", *calls[-2:]])


def _dump_later(seconds: float) -> bool:
    """Has the stacks printed after some time, unless it is taken back; returns False where that cannot be done."""
    try:
        faulthandler.dump_traceback_later(seconds)
    except (AttributeError, ValueError, OSError, RuntimeError):  # no standard error, or one that is no file
        return False
    return True


def tell(text: str) -> None:
    """Prints a line, on every process."""
    if console.quiet:
        print(text, file=sys.stderr, flush=True)
    else:
        print_plain(text)
