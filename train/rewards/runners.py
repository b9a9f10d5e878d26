"""Where a reward function is called: here, in an event loop, in a thread, or in worker processes.

All but the first run while other rewards are computed. A runner's `start` returns a function for each call, which waits
for its outcome.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from train.rewards.call import Call, CallFailed, Outcome, RewardFunction, pause_before
from train.rewards.pool import WorkerPool
from train.user_code import working_directory

GRACE = 1.0  # seconds beyond its limit until a coroutine is given up that does not let itself be cancelled
POLL_SECONDS = 0.5  # between looks whether it has to be
Wait = Callable[[], Outcome]


class Runner(Protocol):
    """Makes calls of one reward function."""

    def start(self, calls: Sequence[Call]) -> list[Wait]:
        """Begins the calls."""
        ...


class Here:
    """Calls a function in the main thread, one call after the other, at once."""

    def __init__(self, function: RewardFunction, retries: int) -> None:
        self._function, self._retries = function, retries

    def start(self, calls: Sequence[Call]) -> list[Wait]:
        return [self._called(call) for call in calls]

    def _called(self, call: Call) -> Wait:
        future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        try:
            future.set_result(with_retries(partial(self._function, call), self._retries))
        except CallFailed as failure:
            future.set_exception(failure)
        return future.result


class InWorkers:
    """Calls a function in worker processes."""

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool

    def start(self, calls: Sequence[Call]) -> list[Wait]:
        return [self.pool.submit(call).result for call in calls]


class InThreads:
    """Calls a function that waits for another machine, in threads; one that is late is left behind.

    Args:
      count: calls at a time.
      seconds: until an attempt has failed; None: never.
    """

    def __init__(self, function: RewardFunction, count: int, seconds: float | None, retries: int) -> None:
        self._function, self._count, self._seconds, self._retries = function, count, seconds, retries

    def start(self, calls: Sequence[Call]) -> list[Wait]:
        futures = [concurrent.futures.Future[Outcome]() for _ in calls]
        tasks = queue.SimpleQueue[Any]()
        for task in zip(futures, calls, strict=True):
            tasks.put(task)
        for _ in range(min(self._count, len(calls))):
            threading.Thread(target=self._work, args=(tasks,), daemon=True, name="remote reward").start()
        return [future.result for future in futures]

    def _work(self, tasks: queue.SimpleQueue[Any]) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                future, call = tasks.get_nowait()
                try:
                    future.set_result(with_retries(partial(self._attempt, call), self._retries))
                except BaseException as error:  # raised where it is waited for
                    future.set_exception(error)

    def _attempt(self, call: Call) -> Outcome:
        done: concurrent.futures.Future[Outcome] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(self._function(call, beside=True))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, daemon=True, name="remote reward's attempt").start()
        try:
            return done.result(self._seconds)
        except TimeoutError:
            raise CallFailed("late", f"no rewards within {self._seconds:g} s") from None


class InLoop:
    """Awaits an async function in the event loop that all async rewards of the program share.

    Args:
      seconds: after which a call is cancelled; None: never.
    """

    def __init__(self, function: RewardFunction, seconds: float | None, retries: int) -> None:
        self._function, self._seconds, self._retries = function, seconds, retries

    def start(self, calls: Sequence[Call]) -> list[Wait]:
        return [_Awaited(self._function, call, self._seconds, self._retries) for call in calls]


class _Awaited:
    """One call in the event loop, with its attempts."""

    def __init__(self, function: RewardFunction, call: Call, seconds: float | None, retries: int) -> None:
        self._function, self._call, self._seconds, self._retries = function, call, seconds, retries
        self._attempt, self._began = 1, time.monotonic()
        self._directory = working_directory()
        self._loop = EventLoop.running()
        self._future = self._loop.submit(self._run())

    async def _run(self) -> Outcome:
        while True:
            self._began = time.monotonic()
            try:
                return await self._once()
            except CallFailed as failure:
                failure.attempts = self._attempt
                if failure.is_final or self._attempt > self._retries:
                    raise
                if failure.kind == "raised":
                    await asyncio.sleep(pause_before(self._attempt))
            self._attempt += 1

    async def _once(self) -> Outcome:
        late = CallFailed("late", f"no rewards within {self._seconds or 0:g} s")
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return await self._function.awaited(self._call)
        except BaseException as error:
            if limit.expired():
                raise late from None
            if isinstance(error, CallFailed):
                raise
            raise CallFailed("refused", str(error), error=error, is_final=True) from error

    def __call__(self) -> Outcome:
        try:
            while True:
                try:
                    return self._future.result(POLL_SECONDS)
                except TimeoutError:
                    self._check_loop()
        finally:
            if self._directory is not None and working_directory() != self._directory:
                os.chdir(self._directory)  # the run stays where it was

    def _check_loop(self) -> None:
        """Gives the loop up if a call blocks it: a coroutine that does not await cannot be ended."""
        if self._seconds is None or time.monotonic() < self._began + self._seconds + GRACE:
            if not self._loop.is_given_up:
                return
            raise CallFailed("late", "another async reward has blocked the event loop", is_final=True)
        self._loop.is_given_up = True
        line = f"no rewards within {self._seconds:g} s (it blocks its event loop and goes on in a thread)"
        failure = CallFailed("late", line, is_final=True)
        failure.attempts = self._attempt
        raise failure


class EventLoop:
    """An event loop in a thread of its own."""

    _newest: "EventLoop | None" = None

    def __init__(self) -> None:
        self.is_given_up = False
        self._loop, self._futures = asyncio.new_event_loop(), set[concurrent.futures.Future[Any]]()
        threading.Thread(target=self._run, daemon=True, name="async rewards").start()

    @classmethod
    def running(cls) -> "EventLoop":
        """Returns the program's loop, or a new one where that was given up."""
        if cls._newest is None or cls._newest.is_given_up:
            cls._newest = cls()
        return cls._newest

    def submit(self, coroutine: Coroutine[Any, Any, Outcome]) -> "concurrent.futures.Future[Outcome]":
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        except BaseException as error:  # of a task that a reward function has made: it ends the loop
            self.is_given_up = True
            for future in list(self._futures):
                line = f"raised {error!r:.80} in a task of its own"
                future.set_exception(CallFailed("refused", line, is_final=True))


def with_retries(attempt: Callable[[], Outcome], retries: int) -> Outcome:
    """Makes attempts until one succeeds.

    Raises:
      CallFailed: the last one's failure.
    """
    for number in itertools.count(1):
        try:
            return attempt()
        except CallFailed as failure:
            failure.attempts = number
            if failure.is_final or number > retries:
                raise
            if failure.kind != "late":
                time.sleep(getattr(failure.error, "pause", None) or pause_before(number))
    raise AssertionError
