"""What a run does when a disk does not take what has to be kept: it ends in one line, or waits (`checkpoint.on_error`).

What has to be kept are the checkpoints, metrics.jsonl and the few files that a run is resumed from. Texts for reading,
profiles and trackers are left out with a warning instead.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from models.checkpoint_failures import SaveError, failure_reason
from train.console import print_plain
from train.processes import gather, is_distributed, noticed_by_others
from train.run.signals import decide_to_stop, noticed_signal
from train.running import RunInterrupted, WriteError

RETRY_SECONDS = 60.0  # between two tries of a run that waits for its disk
_LOOK_SECONDS = 1.0  # between two looks whether a signal came


def persist(
    write: Callable[[], None],
    place: object,
    on_error: Literal["stop", "wait"],
    *,
    recover: Callable[[], None] = lambda: None,
    together: bool = False,
) -> None:
    """Calls `write`; if it fails, ends the run, or calls it again every minute until it works.

    Args:
      write: may be called again after an OSError.
      place: what is written, as a message names it.
      on_error: of the config.
      recover: called after each failure.
      together: every process calls this; with on_error: wait all of them try again if one has failed.

    Raises:
      WriteError: with on_error: stop.
      RunInterrupted: a signal came while the run waited.
    """
    is_waiting = False
    while True:
        failure: OSError | None = None
        try:
            write()
        except OSError as error:
            failure = error
        place, reason = _place_and_reason(failure, place)
        agrees = together and on_error == "wait" and is_distributed()
        if not (gather(np.array([failure is not None])).any() if agrees else failure):
            if is_waiting:
                print_plain(f"{place}: written; the run goes on")
            return
        recover()
        if on_error == "stop":
            raise WriteError(f"{place}: could not be written ({reason}); make room there or mend that disk")
        if not is_waiting:
            print_plain(
                f"warning: {place}: could not be written ({reason}); the run waits and tries again every "
                f"{RETRY_SECONDS:.0f} s (checkpoint.on_error: wait)"
            )
        is_waiting = True
        _pause(str(place), together)


def _place_and_reason(failure: OSError | None, place: object) -> tuple[object, str]:
    if isinstance(failure, SaveError):
        return failure.place, failure.reason
    return place, "another process failed" if failure is None else failure_reason(failure)


def _pause(place: str, together: bool) -> None:
    due = time.monotonic() + RETRY_SECONDS
    is_due, is_shared = False, together or not is_distributed()
    while not is_due:
        time.sleep(min(_LOOK_SECONDS, RETRY_SECONDS))
        if is_shared:
            number, is_due = decide_to_stop(lambda: time.monotonic() >= due)
        else:
            number, is_due = noticed_signal() or noticed_by_others(), time.monotonic() >= due
        if number:
            raise RunInterrupted(number, f"{place}: interrupted while the run waited for room", is_agreed=is_shared)


def append_line(file: Path, line: str) -> None:
    """Appends a line to a file and syncs it; if that fails, the file is as it was.

    Raises:
      OSError: it failed.
    """
    size = file.stat().st_size if file.is_file() else 0
    try:
        with open(file, "a", encoding="utf-8") as opened:
            opened.write(line)
            opened.flush()
            os.fsync(opened.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(file, size)
        raise
