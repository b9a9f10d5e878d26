"""Several processes as one program: how they find each other, who does what on the host, what all of them know.

Every process runs the same lines. What lives on devices is sharded over all of them (`models.sharding`). On the host
each process decodes and scores its share of a step's prompts, and `gather` gives every process the whole; the first
process alone writes metrics, logs and texts, and all of them write their part of a checkpoint.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

ADDRESS, COUNT, INDEX = LAUNCH_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 30  # until all have come; until one that does not answer is given up


class JoinError(RuntimeError):
    """The processes of a program cannot find each other. The message is the whole story."""


def connect() -> None:
    """Join the other processes of this program, if it has any; before anything is computed.

    TPU pods, Slurm and Open MPI say by themselves who there is. Elsewhere three environment variables do:
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0).

    Raises:
      JoinError: some of the three variables, but not all; numbers that cannot be; the others did not come in time.
    """
    given = {name: os.environ[name] for name in LAUNCH_VARIABLES if os.environ.get(name)}
    if given and len(given) < len(LAUNCH_VARIABLES):
        missing = ", ".join(name for name in LAUNCH_VARIABLES if name not in given)
        raise JoinError(
            f"{', '.join(given)}: set, but not {missing}; expected all of {', '.join(LAUNCH_VARIABLES)} or none"
        )
    if not given and not _announced():
        return
    join = partial(
        jax.distributed.initialize,
        initialization_timeout=JOIN_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if not given:
        join()
        return
    address, count, index = (given[name] for name in LAUNCH_VARIABLES)
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise JoinError(f"{COUNT}, {INDEX}: expected a number and one from 0 below it, got {count!r} and {index!r}")
    try:
        join(address, int(count), int(index))
    except (RuntimeError, ValueError) as error:
        raise JoinError(
            f"process {index} of {count} could not join the others at {address} ({error}); is the first one running, "
            f"and can its port be reached from here?"
        ) from error


def _announced() -> bool:
    """Whether this is one of several tasks of Slurm or Open MPI, or a machine with TPUs."""
    tasks = (os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return any(int(number) > 1 for number in tasks) or (chips and importlib.util.find_spec("libtpu") is not None)


def is_distributed() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    return jax.process_index() == 0


def share(count: int) -> slice:
    """Which of so many rows are this process's.

    Raises:
      ValueError: fewer rows than processes.
    """
    index, processes = jax.process_index(), jax.process_count()
    if count < processes:
        raise ValueError(f"expected at least one prompt for each of the {processes} processes, got {count}")
    return slice(count * index // processes, count * (index + 1) // processes)


def gather(mine: np.ndarray) -> np.ndarray:
    """The rows of all processes on every one of them, in the processes' order; the other axes are of one size."""
    if not is_distributed():
        return mine
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(mine)))).tolist()
    padded = np.pad(mine, [(0, max(sizes) - len(mine)), *[(0, 0)] * (mine.ndim - 1)])
    stacked = np.asarray(multihost_utils.process_allgather(padded))
    return np.concatenate([rows[:size] for rows, size in zip(stacked, sizes, strict=True)])


def gather_lists(mine: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same for lists of whole numbers, of any lengths."""
    if not is_distributed():
        return [list(row) for row in mine]
    lengths = gather(np.array([len(row) for row in mine], np.int32))
    padded = np.zeros((len(mine), int(lengths.max(initial=0))), np.int32)
    for row, numbers in zip(padded, mine, strict=True):
        row[: len(numbers)] = numbers
    return [row[:length].tolist() for row, length in zip(gather(padded), lengths, strict=True)]


def broadcast_from_first(ask: Callable[[], Any]) -> Any:
    """The first process' answer, in JSON's types, on all of them; only it is asked."""
    answer = ask() if is_first() else None
    said = gather_lists([list(json.dumps(answer).encode())])[0]
    return json.loads(bytes(said))


def abort(code: int) -> NoReturn:
    """End this process at once, after an error: one that left in good order would wait for the others to end too.

    They see it gone and fail: in the middle of a collective at once, else within HEARTBEAT_SECONDS.
    """
    print(f"process {jax.process_index()} of {jax.process_count()} has failed and ends", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
