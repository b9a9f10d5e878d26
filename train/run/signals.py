"""SIGTERM, SIGINT and SIGHUP: the first one ends a run after the step it is in, a second one ends the process at once.

    before the first step   RunInterrupted is raised at once: nothing is lost
    from then on            the step is finished and saved, and RunInterrupted is raised (`Run.steps`)
    a second signal         the process ends, whatever it does

Python calls its handlers on the main thread between two of its instructions, never during a compilation or a wait for
devices; so a thread reads the signals from the wakeup descriptor, to which the interpreter writes them at once.

Several processes end after the same step. Only one of them may get a signal, and not in the same step as another; so
the first process decides after each step and the others ask it, by JAX's coordination service: a message of 1 ms,
for which no device is waited for. An all-gather of a flag would wait for the update, and so undo that the next rollouts
are dispatched before it ends. JAX's preemption sync point costs nothing until there is a notice, but knows SIGTERM
alone, swallows a second one, and is no clock for `checkpoint.every_minutes`. The handler that `jax.distributed`
installs for it, also in a single process, swallows SIGTERM unless somebody asks; it is replaced while a run is open.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from train.processes import decide_on_first, notify_first
from train.running import RunInterrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_ONE_SECONDS = 1.0  # signals so close are one: `timeout` and many launchers send it to a process and to its group


class _Watch:
    """Receives the signals while it is open. To be made on the main thread."""

    def __init__(self) -> None:
        self.first = 0  # the number of the first signal; 0: none yet
        self.is_deferred = False  # whether the first one waits for the end of a step
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        self._handlers = {number: signal.signal(number, self._handle) for number in taken}
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.is_deferred:
            self.is_deferred = True  # what follows is the end already
            name = signal.Signals(number).name
            raise RunInterrupted(
                number,
                f"{name}: ended before a step was begun; what is saved is as it was; the same command starts again",
            )

    def _read(self) -> None:
        """Notes the first signal; ends the process at a second one."""
        came = 0.0
        while number := self._reader.recv(1)[0]:
            if number not in SIGNALS:
                continue
            if not self.first:
                self.first, came = number, time.monotonic()
                if self.is_deferred:
                    notify_first(number)
            elif time.monotonic() - came > _ONE_SECONDS:
                name = signal.Signals(number).name
                os.write(2, f"{name}: the second signal; ended at once, without the step it was in\n".encode())
                os._exit(128 + number)

    def close(self) -> None:
        """Gives the signals back to their handlers."""
        self.restore()
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def restore(self) -> None:
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's


_open: list[_Watch] = []


@contextlib.contextmanager
def watch_signals() -> Iterator[None]:
    """Ends a run in good order on a signal, while the body runs; without effect on any but the main thread."""
    if _open or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch()
    _open.append(watch)
    try:
        yield
    finally:
        _open.remove(watch)
        watch.close()


def defer_signals() -> None:
    """From now on a first signal raises nothing: `decide_to_stop` tells of it."""
    for watch in _open:
        watch.is_deferred = True
        if watch.first:  # it came in this very moment
            notify_first(watch.first)


def decide_to_stop(also: Callable[[], bool] = lambda: False) -> tuple[int, bool]:
    """Returns the number of a signal that any process has got, or 0, and what `also` returns on the first process.

    Every process returns the same; all of them have to ask equally often.
    """

    def decide(notified: int) -> tuple[int, bool]:
        return noticed_signal() or notified, also()

    number, value = decide_on_first(decide)
    return int(number), bool(value)


def noticed_signal() -> int:
    """Returns the number of the first signal that this process has got, or 0."""
    return next((watch.first for watch in _open if watch.first), 0)


def _forget_in_child(*_: Any) -> None:
    """A forked process shares the descriptors: a signal to a worker of a reward function must not end the run."""
    for watch in _open:
        watch.restore()
    _open.clear()


os.register_at_fork(after_in_child=_forget_in_child)
