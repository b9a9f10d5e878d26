"""Saves that fail: the reason in a few words, without Orbax's tracebacks, and the removal of what they leave behind."""

import errno
import functools
import logging
import os
import re
import shutil
import sys
import textwrap
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

_DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
_NUMBER = r"os_error_code='(\d+)'|\(os error (\d+)\)|Os \{ code: (\d+)"
_WRITER_SECONDS, _PAUSE_SECONDS, _TRIES = 30.0, 0.05, 20
_PROBE, _PROBE_BYTES = "probe.tmp", 4096
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of what Orbax has not completed, on a disk


class SaveError(OSError):
    """A checkpoint could not be saved. The steps before are as they were, and nothing is left of this one.

    Attributes:
      place: what could not be written.
      reason: why.
    """

    def __init__(self, text: str, place: str, reason: str) -> None:
        super().__init__(text)
        self.place, self.reason = place, reason


def save_error(place: epath.Path, error: Exception) -> SaveError:
    """Returns the error of a save that Orbax or TensorStore has failed with `error`."""
    reason = failure_reason(error)
    return SaveError(f"{place}: could not be written ({reason})", str(place), reason)


def failure_reason(error: BaseException) -> str:
    """Returns the operating system's reason if the error has one, such as "No space left on device"."""
    number = os_error_number(error)
    if number is not None:
        return os.strerror(number)
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")


def os_error_number(error: BaseException) -> int | None:
    """Returns the operating system's number of an error; TensorStore and the libraries in Rust have it in the text."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := re.search(_NUMBER, str(error))):
        number = int(next(filter(None, match.groups())))
    return number if number in errno.errorcode else None


def is_disk_failure(error: BaseException) -> bool:
    """Whether a disk is full, read-only or broken."""
    return os_error_number(error) in _DISK_FAILURES


def check_writable(folder: epath.Path) -> None:
    """Makes a directory and a file where a step will be saved, and removes them; only on a disk.

    Orbax's threads would wait minutes for a directory that cannot be made, and so would the end of the process.

    Raises:
      OSError: there is no room, or the disk is read-only.
    """
    if "://" in str(folder):
        return
    probe = Path(folder) / _PROBE  # no name of Orbax's temporary directories, which it removes in the background
    try:
        probe.mkdir(parents=True, exist_ok=True)
        (probe / "block").write_bytes(bytes(_PROBE_BYTES))
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def check_writable_together(folder: epath.Path) -> None:
    """Does it on the first process, for all: the others would wait minutes in a barrier of Orbax's.

    Raises:
      OSError: on every process.
    """
    failure: OSError | None = None
    if jax.process_index() == 0:
        try:
            check_writable(folder)
        except OSError as error:
            failure = error
    number = -1 if failure is None else failure.errno or 0
    if jax.process_count() > 1:
        number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if failure is None and number >= 0:
        failure = OSError(number, os.strerror(number))
    if failure is not None:
        raise failure


def remove_unfinished(folder: epath.Path, name: str) -> None:
    """Removes what a failed save of `name` has left in a directory on a disk, so that others have the room.

    In a bucket Orbax removes it when the checkpoints are opened again.
    """
    if "://" in str(folder):
        return
    for thread in threading.enumerate():  # the first of Orbax's threads that fails is reported; others still write
        if type(thread).__module__.startswith("orbax"):
            threading.Thread.join(thread, _WRITER_SECONDS)  # their own join raises
    looks = 0
    for _ in range(_TRIES):
        entries = [entry for entry in folder.iterdir() if entry.name.startswith(f"{name}{_TEMPORARY}")]
        for entry in entries:
            shutil.rmtree(entry, ignore_errors=True)  # it may be read-only
        looks = 0 if entries else looks + 1
        if looks == 2:
            return
        time.sleep(_PAUSE_SECONDS)  # TensorStore makes a file's directory again


def _is_orbax(record: logging.LogRecord) -> bool:
    """Whether a record is about an exception of a coroutine of Orbax's."""
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    return "orbax" in record.getMessage() or any("orbax" in frame.filename for frame in frames)


@functools.cache
def silence_orbax() -> None:
    """Leaves Orbax's errors to the exceptions that it raises too: it logs each in several threads, with tracebacks."""
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.exc_info is None)
    logging.getLogger("asyncio").addFilter(lambda record: not _is_orbax(record))
    # the writes of a save that has failed, which nobody waits for
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize\S* was never awaited", RuntimeWarning)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # TensorStore has something to say to the loop of a thread that has failed and ended
        is_late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not is_late:
            previous(unraisable)

    sys.unraisablehook = hook
