"""Several processes as one program: how they connect, what each does on the host, how they exchange host data.

Every process runs the same lines. Device arrays are sharded over all processes (`models.sharding`). On the host each
process decodes and scores its share of a step's prompts, and `gather` gives every process the rows of all. The first
process alone writes metrics, logs and texts; every process writes its part of a checkpoint.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # the coordination service's client has no public name
from jax.experimental import multihost_utils

from train.accelerators import has_tpu, has_tpu_compiler

ADDRESS, COUNT, INDEX = LAUNCH_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_NOTICES, _DECISION = "gopo_jax/notice/", "gopo_jax/decision/"  # keys in the coordination service
_FAILURE, _WATCHING = "gopo_jax/failure/", "gopo_jax/watching/"
_DECISION_SECONDS = 3600  # the first process may be saving; one that has ended is noticed sooner, by its heartbeat
_turns = itertools.count()
JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 30  # wait for all to connect; give up a process that does not answer
_LOOK_SECONDS, _GRACE_SECONDS = 1.0, 2.0  # between looks whether another has failed; to end by oneself then
_PREPARE_SECONDS, _LEAVE_SECONDS = 10.0, 15.0  # for `prepare` of end_with_others; the first waits for the others' ends


class JoinError(RuntimeError):
    """The processes of a program could not connect. The user sees the message alone."""


def connect() -> None:
    """Connects the processes of this program, if it has several; to be called before anything is computed.

    TPU pods, Slurm and Open MPI tell JAX which processes there are. Elsewhere three environment variables do:
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).

    Raises:
      JoinError: only some of the three variables are set; invalid numbers; the other processes did not come in time.
    """
    settings = {name: os.environ[name] for name in LAUNCH_VARIABLES if os.environ.get(name)}
    if settings and len(settings) < len(LAUNCH_VARIABLES):
        missing = ", ".join(name for name in LAUNCH_VARIABLES if name not in settings)
        raise JoinError(
            f"{', '.join(settings)}: set, but not {missing}; expected all of {', '.join(LAUNCH_VARIABLES)} or none"
        )
    if not settings and not _has_launcher():
        return
    join = partial(
        jax.distributed.initialize,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not settings:
        join()
        return
    address, count, index = (settings[name] for name in LAUNCH_VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise JoinError(f"{COUNT}, {INDEX}: expected a number and one from 0 below it, got {count!r} and {index!r}")
    try:
        join(address, int(count), int(index))
    except (RuntimeError, ValueError) as error:
        raise JoinError(
            f"process {index} of {count} could not join the others at {address} ({error}); is the first one running, "
            f"and can its port be reached from here?"
        ) from error


def _has_launcher() -> bool:
    """Returns whether this is one of several tasks of Slurm or Open MPI, or a machine with TPUs."""
    tasks = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    return any(int(number) > 1 for number in tasks) or (has_tpu() and has_tpu_compiler())


def is_distributed() -> bool:
    """Returns whether the program runs in several processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Returns whether this is the process that writes metrics, logs and texts."""
    return jax.process_index() == 0


def share(count: int) -> slice:
    """Slice of `count` rows that this process owns.

    Raises:
      ValueError: there are fewer rows than processes.
    """
    index, processes = jax.process_index(), jax.process_count()
    if count < processes:
        raise ValueError(f"expected at least one prompt for each of the {processes} processes, got {count}")
    return slice(count * index // processes, count * (index + 1) // processes)


def gather(rows: np.ndarray) -> np.ndarray:
    """All-gathers rows: returns those of all processes, in the processes' order; the other axes must agree."""
    if not is_distributed():
        return rows
    if rows.dtype.itemsize == 8:  # JAX would round 64 bits to 32: their halves travel
        halves = np.ascontiguousarray(rows).reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint32)
        gathered = gather(halves)
        return gathered.view(rows.dtype).reshape(len(gathered), *rows.shape[1:])
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(rows)))).tolist()
    padded = np.pad(rows, [(0, max(sizes) - len(rows)), *[(0, 0)] * (rows.ndim - 1)])
    stacked = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([part[:size] for part, size in zip(stacked, sizes, strict=True)])


def gather_lists(lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """All-gathers lists of integers, as `gather`; they may differ in length."""
    if not is_distributed():
        return [list(numbers) for numbers in lists]
    lengths = gather(np.array([len(numbers) for numbers in lists], np.int32))
    padded = np.zeros((len(lists), int(lengths.max(initial=0))), np.int32)
    for row, numbers in zip(padded, lists, strict=True):
        row[: len(numbers)] = numbers
    return [row[:length].tolist() for row, length in zip(gather(padded), lengths, strict=True)]


def broadcast_from_first(compute: Callable[[], Any]) -> Any:
    """Calls a function on the first process alone and returns its value, of JSON's types, on every process."""
    value = compute() if is_first() else None
    return json.loads(bytes(gather_lists([list(json.dumps(value).encode())])[0]))


def notify_first(number: int) -> None:
    """Sends the first process a number, of which it learns in its next `decide_on_first`. Usable on any thread."""
    if is_distributed():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended, and so will this process
            _service().key_value_set(f"{_NOTICES}{jax.process_index()}", str(number), True)


def noticed_by_others() -> int:
    """Returns, on the first process, a number of `notify_first`; 0: there is none, or this is another process."""
    notices = _service().key_value_dir_get(_NOTICES) if is_distributed() and is_first() else []
    return int(notices[0][1]) if notices else 0


def decide_on_first(decide: Callable[[int], Any]) -> Any:
    """Returns decide(number) of the first process, of JSON's types, on every process; no device is waited for.

    Args:
      decide: called on the first process alone, with a number of `notify_first`, or 0.
    """
    if not is_distributed():
        return decide(0)
    client, turn = _service(), next(_turns)
    if not is_first():
        return json.loads(client.blocking_key_value_get(f"{_DECISION}{turn}", 1000 * _DECISION_SECONDS))
    value = decide(noticed_by_others())
    client.key_value_set(f"{_DECISION}{turn}", json.dumps(value))
    if turn >= 2:  # read by all, for since then they have exchanged the data of a step
        client.key_value_delete(f"{_DECISION}{turn - 2}")
    return value


def _service() -> Any:
    """Returns the client of JAX's coordination service, which every process of several has."""
    return distributed.global_state.client


def report_failure(code: int) -> int | None:
    """Tells the other processes that this one fails.

    Returns:
      The exit code of the process that has failed before, for which this one ends too; None if this is the first.
    """
    if is_distributed():
        try:
            _service().key_value_set(f"{_FAILURE}first", f"{jax.process_index()} {code}")
        except jax.errors.JaxRuntimeError:  # there is one already, or the service has ended
            return failure_of_another()
    return None


def failure_of_another() -> int | None:
    """Returns the exit code of another process that has failed; None if none has told so."""
    if is_distributed():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service has ended
            for _, failure in _service().key_value_dir_get(_FAILURE):
                index, code = map(int, failure.split())
                return None if index == jax.process_index() else code
    return None


@contextlib.contextmanager
def end_with_others(prepare: Callable[[], None]) -> Iterator[None]:
    """Ends this process, quietly and with the same code, if another fails while the body runs.

    The body may be waiting for that one, in a collective or in a barrier of Orbax's, where no exception reaches it.

    Args:
      prepare: called before this process ends, on a thread of its own.
    """
    if not is_distributed():
        yield
        return
    is_over, name = threading.Event(), f"{_WATCHING}{jax.process_index()}"
    _service().key_value_set(name, "", True)
    watch = threading.Thread(target=_end_after_failure, args=(prepare, is_over), name="other processes", daemon=True)
    watch.start()
    try:
        yield
        _service().key_value_delete(name)
    finally:
        is_over.set()
        watch.join(_LEAVE_SECONDS)  # in the midst of it, it ends the process


def _end_after_failure(prepare: Callable[[], None], is_over: threading.Event) -> None:
    while not is_over.wait(_LOOK_SECONDS):
        code = failure_of_another()
        if code is not None:
            if not is_over.wait(_GRACE_SECONDS):
                preparing = threading.Thread(target=prepare, daemon=True)
                preparing.start()
                preparing.join(_PREPARE_SECONDS)
                _leave(code)
            return


def abort(code: int, *, is_told: bool = False) -> NoReturn:
    """Ends this process, after an error: an orderly exit would wait for the other processes to end too.

    The others that are in `end_with_others` end as well; those elsewhere fail in their next collective, or within
    HEARTBEAT_SECONDS.

    Args:
      is_told: whether a line has told already why; else one tells which process has failed.
    """
    if not is_told:
        with contextlib.suppress(OSError):  # the output may be a file on a full disk too
            print(f"process {jax.process_index()} of {jax.process_count()} has failed and ends", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends this process; the first one after the others that watch, to which JAX's service, a part of it, is fatal."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client, due = _service(), time.monotonic() + _LEAVE_SECONDS
        client.key_value_delete(f"{_WATCHING}{jax.process_index()}")
        while is_first() and client.key_value_dir_get(_WATCHING) and time.monotonic() < due:
            time.sleep(0.05)
    os._exit(code)
