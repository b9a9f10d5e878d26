"""The memory of a long run: a tiny policy is trained in one process, and its resident memory is measured as it goes.

    python -m bench.soak leaks [--steps 20000] [--save_every N ...] [--trace]

Prints for each interval of saves (0: none) the slope of the resident memory in MB per 1,000 steps, by least squares
over the steps behind the first fifth. With --trace also the lines of Python whose memory has grown most.
"""

import argparse
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.soak.tiny import environment, policy_settings, write_materials
from train.heaps import limit_heaps

WARM_UP = 0.2  # share of the steps that is not measured: programs are compiled, caches fill up
LINES = 15


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def slope_of(samples: Sequence[tuple[int, int]]) -> float:
    """Returns the slope of (step, bytes) in MB per 1,000 steps, by least squares over all but the first fifth."""
    import numpy as np

    steps, sizes = np.array(samples[int(len(samples) * WARM_UP) :], float).T
    return float(np.polyfit(steps, sizes, 1)[0]) * 1000 / 1e6


def measure(folder: Path, steps: int, save_every: int, *, trace: bool) -> float:
    """Trains a policy for so many steps, saving every so many of them; returns the slope."""
    import yaml

    from train.config import PolicyConfig
    from train.loop import train_policy
    from train.parse import parse
    from train.run.directory import Run

    changes: dict[str, Any] = {
        "max_steps": steps,
        "checkpoint": {"every": save_every or steps + 1, "keep": 3},
        "log": {"completions_every": 0},
        # other lengths of completions would be other programs: a policy that stays what it is, no reward model
        "rewards": [{"function": "length"}],
        "optimizer": {"learning_rate": 1e-6},
    }
    settings = policy_settings(folder / "materials", folder / f"run-{save_every}", **changes)
    settings["validation"]["every"] = steps
    file = folder / f"run-{save_every}.yaml"
    file.write_text(yaml.safe_dump(settings))
    samples, write = list[tuple[int, int]](), Run.write
    before: list[tracemalloc.Snapshot] = []

    def sampled(self: Run, step: int, values: Mapping[str, Any]) -> None:
        write(self, step, values)
        samples.append((step, resident_bytes()))
        if trace and step == int(steps * WARM_UP):
            before.append(tracemalloc.take_snapshot())

    Run.write = sampled  # type: ignore[method-assign]
    try:
        if trace:
            tracemalloc.start()
        train_policy(parse(PolicyConfig, ["--config", str(file)]))
        if trace:
            for line in tracemalloc.take_snapshot().compare_to(before[0], "lineno")[:LINES]:
                print(line)
    finally:
        Run.write = write  # type: ignore[method-assign]
        tracemalloc.stop()
    return slope_of(samples)


def main(arguments: Sequence[str]) -> int:
    """Runs `python -m bench.soak leaks`."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak leaks")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--save_every", type=int, nargs="+", default=[0, 5], help="steps; 0: only at the end")
    parser.add_argument("--trace", action="store_true", help="also print where Python's memory has grown")
    options = parser.parse_args(arguments)
    os.environ.update(environment())
    limit_heaps()
    with tempfile.TemporaryDirectory(prefix="soak-leaks-", ignore_cleanup_errors=True) as folder:
        write_materials(Path(folder) / "materials")
        for save_every in options.save_every:
            began = time.monotonic()
            slope = measure(Path(folder), options.steps, save_every, trace=options.trace)
            saves = f"a save every {save_every} steps" if save_every else "no saves"
            seconds = time.monotonic() - began
            print(f"leaks: {options.steps} steps, {saves}: {slope:.2f} MB per 1,000 steps, {seconds:.0f} s")
            sys.stdout.flush()
    return 0
