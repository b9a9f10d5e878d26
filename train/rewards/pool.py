"""Worker processes that call a reward function: started once, kept for the run, killed at a time limit and replaced.

A worker is a program of its own (`train.rewards.worker`), not a fork: JAX's threads do not survive one. It imports no
JAX unless the function does, and then JAX is that of the CPU. It ends with the run, in whatever way the run ends.
"""

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from train.rewards.call import Call, CallFailed, Outcome, pause_before

WORKER = str(Path(__file__).with_name("worker.py"))
POLL_SECONDS = 0.2  # between looks whether a worker that does not answer still runs
Tasks = queue.SimpleQueue["tuple[Future[Outcome], Call] | None"]


class Worker:
    """One worker process, and what replaces it.

    Args:
      setup: what the worker is told first: name, dotted, is_ours.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup, self._is_ready, self.is_closed = setup, False, False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._pipe = -1
        self._lock = threading.RLock()  # the pool may be forgotten, and closed, in any moment

    def start(self) -> None:
        """Starts the process, unless it runs; does not wait for it."""
        with self._lock:
            if self._process is not None or self.is_closed:
                return
            self._connection, theirs = Pipe()
            their_pipe, self._pipe = os.pipe()
            self._process = subprocess.Popen(
                [sys.executable, "-u", WORKER, str(theirs.fileno()), str(their_pipe)],
                pass_fds=(theirs.fileno(), their_pipe),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # signals to the run's process group are the run's
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            theirs.close()
            os.close(their_pipe)
            self._is_ready = False
            self._connection.send({"path": sys.path, **self._setup})

    def call(self, payload: bytes, seconds: float | None) -> Outcome:
        """Makes a call.

        Raises:
          CallFailed: no rewards within `seconds`, which do not begin before the function is imported; or another
            reason.
        """
        self.start()
        if not self._is_ready:
            kind, message = self._receive(None)
            if kind == "broken":
                self.kill()
                raise CallFailed("refused", message, is_final=True)
            self._is_ready = True
        try:
            self._connected.send_bytes(payload)
        except OSError:
            self._died()
        kind, reply = self._receive(seconds)
        if kind == "done":
            return Outcome(*reply)
        failed_as, line, details, is_final = reply
        raise CallFailed(failed_as, line, details=details, is_final=is_final)

    @property
    def _connected(self) -> Connection:
        if self._connection is None:
            raise CallFailed("died", "its workers have been ended", is_final=True)
        return self._connection

    def _receive(self, seconds: float | None) -> tuple[str, Any]:
        until = None if seconds is None else time.monotonic() + seconds
        connection, process = self._connected, self._process
        while True:
            left = POLL_SECONDS if until is None else min(POLL_SECONDS, max(0.0, until - time.monotonic()))
            try:
                if connection.poll(left):
                    return connection.recv()
                if process is None or exit_status(process) is not None:
                    self._died()
            except (EOFError, OSError):
                self._died()
            if until is not None and time.monotonic() >= until:
                self.kill()
                raise CallFailed("late", f"no rewards within {seconds:g} s")

    def _died(self) -> NoReturn:
        """Replaces a process whose connection has closed.

        Raises:
          CallFailed: always; says how the process ended.
        """
        process, until, how = self._process, time.monotonic() + 1, "by closing its connection"
        while process is not None and time.monotonic() < until:
            if (status := exit_status(process)) is not None:
                how = status
                break
            time.sleep(0.01)
        self.kill()
        raise CallFailed("died", f"its worker process ended {how}")

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            os.close(self._pipe)

    def close(self) -> None:
        self.is_closed = True
        self.kill()


def exit_status(process: subprocess.Popen[bytes]) -> str | None:
    """Returns how a child process has ended, "by SIGKILL" or "with exit code 3"; None while it runs.

    It is not reaped: its number stays its own, until its group has been killed too.
    """
    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        return None if process.poll() is None else f"with status {process.returncode}"
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return "with the run"  # killed and reaped by `kill`, in another thread
    if ended is None:
        return None
    if ended.si_code == os.CLD_EXITED:
        return f"with exit code {ended.si_status}"
    return f"by {signal.Signals(ended.si_status).name}"


class WorkerPool:
    """Calls a function in `count` worker processes; to be closed, or forgotten.

    Args:
      seconds: after which a call has failed, and its worker is killed; None: never.
      retries: attempts after the first.
    """

    def __init__(self, setup: dict[str, Any], count: int, *, seconds: float | None, retries: int) -> None:
        self._workers = [Worker(setup) for _ in range(count)]
        self._tasks: Tasks = queue.SimpleQueue()
        self._seconds, self._retries, self._is_started = seconds, retries, False
        self.close = weakref.finalize(self, _close, self._workers, self._tasks)  # at the program's end at the latest

    def start(self) -> None:
        """Starts the processes, which import the function, once."""
        if self._is_started:
            return
        self._is_started = True
        for worker in self._workers:
            worker.start()
            arguments = (worker, self._tasks, self._seconds, self._retries)
            threading.Thread(target=_work, args=arguments, daemon=True, name="reward worker").start()

    def submit(self, call: Call) -> Future[Outcome]:
        """Has a call made by the next worker that is free."""
        self.start()
        future: Future[Outcome] = Future()
        self._tasks.put((future, call))
        return future


def _work(worker: Worker, tasks: Tasks, seconds: float | None, retries: int) -> None:
    """Makes calls by one worker, until there is none (None); refers to no pool, so that one may be forgotten."""
    while (task := tasks.get()) is not None:
        future, call = task
        try:
            future.set_result(_attempt(worker, call, seconds, retries))
        except BaseException as error:  # raised where it is waited for
            future.set_exception(error)


def _attempt(worker: Worker, call: Call, seconds: float | None, retries: int) -> Outcome:
    try:
        payload = pickle.dumps(call)
    except Exception as error:
        line = f"its arguments cannot be sent to a worker process ({type(error).__name__}: {error}); set workers: 0"
        raise CallFailed("refused", line, is_final=True) from error
    for attempt in itertools.count(1):
        try:
            outcome = worker.call(payload, seconds)
            return outcome._replace(rewards=np.asarray(outcome.rewards, np.float64))
        except CallFailed as failure:
            failure.attempts = attempt
            if failure.is_final or worker.is_closed or attempt > retries:
                raise
            if failure.kind == "raised":
                time.sleep(pause_before(attempt))
    raise AssertionError


def _close(workers: list[Worker], tasks: Tasks) -> None:
    for worker in workers:
        worker.close()
        tasks.put(None)
