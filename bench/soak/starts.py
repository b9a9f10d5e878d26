"""Two starts of a run within two seconds: one trains, the other is refused in one line, and nothing is written twice.

    python -m bench.soak starts

The second start has the first one's directory, or a directory of its own and the first one's checkpoints. The run that
trains has to equal one that was left alone, bit for bit. Prints a line for each case, and what taking and giving back a
lock costs.
"""

import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.soak.kills import HANGS, Kind, differences, launch, start_once
from bench.soak.tiny import policy_settings, write_materials

POLICY = Kind("policy", "policy", policy_settings, {})
PAUSES = (0, 1, 2)  # seconds between the two starts
PLACES = ("one directory", "one directory of checkpoints")
LOCKS = 200


def start_twice(folder: Path, materials: Path, whole: Path, place: str, pause: float) -> tuple[str, list[str]]:
    """Starts a run twice; returns what the refused one said, and what should not have been."""
    folder.mkdir(parents=True)
    runs, configs = [folder / "run", folder / ("run" if place == PLACES[0] else "other")], list[Path]()
    for number, run in enumerate(runs):
        changes: dict[str, Any] = (
            {} if run.name == "run" else {"checkpoint": {"directory": str(runs[0] / "checkpoints")}}
        )
        configs.append(folder / f"{number}.yaml")
        configs[-1].write_text(yaml.safe_dump(POLICY.settings(materials, run, **changes)))
    logs, processes = [folder / f"{number}.txt" for number in range(2)], []
    try:
        for config, log in zip(configs, logs, strict=True):
            processes += launch(POLICY, config, [log])
            time.sleep(pause)
        codes = [process.wait(timeout=HANGS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if sorted(codes) != [0, 2]:
        return "", [f"exit codes {codes}, expected one 0 and one 2 ({folder})"]
    refused, trained = codes.index(2), codes.index(0)
    lines = logs[refused].read_text(errors="replace").splitlines()
    faults = [] if len(lines) == 1 else [f"{len(lines)} lines, expected 1 ({logs[refused]})"]
    if runs[refused] != runs[trained] and runs[refused].exists():
        faults.append(f"{runs[refused]} was made by the start that was refused")
    if trained == 0 or place == PLACES[0]:  # one of the other directory keeps its checkpoints elsewhere
        faults += differences(whole, runs[trained], f"{place}, {pause} s")
    return lines[0] if lines else "", faults


def lock_seconds(folder: Path) -> Iterator[float]:
    """Yields how long it takes to take the lock of a directory, and to give it back."""
    from train.run.lock import Lock

    for _ in range(LOCKS):
        began, lock = time.perf_counter(), Lock(folder)
        if refusal := lock.acquire():
            raise RuntimeError(refusal)
        lock.release()
        yield time.perf_counter() - began


def main(arguments: Sequence[str]) -> int:
    """Runs `python -m bench.soak starts`."""
    import argparse

    argparse.ArgumentParser(prog="python -m bench.soak starts").parse_args(arguments)
    faults, began = list[str](), time.monotonic()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax: an item read alone has no file of the whole step
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True)))
        materials, whole = folder / "materials", folder / "whole"
        write_materials(materials)
        (folder / "whole.yaml").write_text(yaml.safe_dump(POLICY.settings(materials, whole)))
        faults += start_once(POLICY, folder / "whole.yaml", whole, None, folder / "log").faults
        for place in PLACES:
            for pause in PAUSES:
                case = folder / f"{place}-{pause}".replace(" ", "_")
                line, wrong = start_twice(case, materials, whole, place, pause)
                print(f"{place}, {pause} s: {line.replace(str(case), '')}", *wrong, sep="\n", flush=True)
                faults += wrong
        print(f"a lock taken and given back: {1000 * statistics.median(lock_seconds(folder)):.2f} ms")
    print(f"starts: {len(faults)} faults, {time.monotonic() - began:.0f} s")
    return 1 if faults else 0
