"""What the timed programs of JAX and of torch share; it imports neither."""

import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

END_ID = 1  # ends a completion; never drawn, since the least length is the greatest


def median_seconds(call: Callable[[], Any], repeats: int, wait: Callable[[Any], object]) -> tuple[float, Any]:
    """Returns the median seconds of `repeats` calls, after an untimed one that compiles, and the last result.

    Args:
      call: starts the work.
      wait: returns when the work behind a result of `call` has ended.
    """
    result = call()
    wait(result)
    seconds = []
    for _ in range(repeats):
        del result  # its memory is free while the next call runs
        began = time.perf_counter()
        result = call()
        wait(result)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def process_peak_bytes() -> float:
    """Returns the most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def write_figures(file: str, figures: Mapping[str, Any]) -> None:
    """Writes figures as JSON, whole or not at all: the process may be ended at any time."""
    temporary = Path(f"{file}.tmp")
    temporary.write_text(json.dumps(figures), encoding="utf-8")
    temporary.replace(file)
