"""The program of a worker process: calls one reward function, again and again, until the run ends or kills it.

`train.rewards.pool` starts it as a script, with two file descriptors: of a connection, over which calls come and
outcomes go, and of a pipe on which nothing is ever written. When the run ends, in whatever way, the pipe closes, and
the system ends this process and what it has started, even where the interpreter is held. SIGINT, SIGTERM and SIGHUP,
which launchers send to all processes of a run, do nothing here.

The package `train.rewards` is entered without its __init__, which would import JAX; whoever needs it gets it.
"""

import asyncio
import fcntl
import importlib.util
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

RUN_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(connection: Connection) -> None:
    """Imports the function that the first message names, and answers every further message with an outcome."""
    setup = connection.recv()
    sys.path[:] = setup["path"]
    enter_lightly("train.rewards")
    from train.dotted import import_function
    from train.rewards.call import Call, CallFailed, Outcome, RewardFunction
    from train.rewards.returned import is_async

    try:
        function = import_function(setup["dotted"], "rewards.function")
    except Exception as error:
        connection.send(("broken", str(error)))
        return
    reward, loop = RewardFunction(setup["name"], function, is_ours=setup["is_ours"]), asyncio.new_event_loop()
    asyncio.set_event_loop(loop)

    def answer(call: Call) -> Outcome:
        return loop.run_until_complete(reward.awaited(call)) if is_async(function) else reward(call)

    connection.send(("ready", None))
    while True:
        try:
            received = connection.recv_bytes()
        except EOFError:
            return
        try:
            reply: tuple[str, Any] = ("done", tuple(answer(pickle.loads(received))))
        except CallFailed as failure:
            reply = ("failed", (failure.kind, failure.line, failure.details, failure.is_final))
        except BaseException as error:  # no call: its arguments cannot be read here
            reply = ("failed", ("raised", f"{type(error).__name__}: {error}", "", True))
        connection.send(reply)


def enter_lightly(package: str) -> None:
    """Lets modules of a package be imported without its __init__, which runs when an attribute of it is wanted."""
    spec = importlib.util.find_spec(package)
    loader = None if spec is None else spec.loader
    assert spec is not None and loader is not None
    module = importlib.util.module_from_spec(spec)

    def load(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError
        del module.__getattr__
        loader.exec_module(module)
        return getattr(module, name)

    module.__getattr__ = load  # type: ignore[method-assign]
    sys.modules[package] = module
    parent, _, name = package.rpartition(".")
    setattr(sys.modules[parent], name, module)


def leave_signals_to_the_run() -> None:
    """Makes the run's signals do nothing here; what this process starts has their defaults."""
    for number in RUN_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a program started from here would inherit
    restore = lambda: [signal.signal(number, signal.SIG_DFL) for number in RUN_SIGNALS]  # noqa: E731
    os.register_at_fork(after_in_child=restore)


def end_with(pipe: int) -> None:
    """Has the system end this process group when the other end of a pipe closes."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    try:
        if os.read(pipe, 1) == b"":
            os._exit(1)  # the run has ended before this
    except BlockingIOError:
        return


if __name__ == "__main__":
    leave_signals_to_the_run()
    end_with(int(sys.argv[2]))
    serve(Connection(int(sys.argv[1])))
