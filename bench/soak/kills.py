"""Runs that are ended by force again and again until they are whole: each has to equal the run that was left alone.

    python -m bench.soak kills [--short] [--seed N] [--workers N] [--folder DIR]

Of each kind one run is left alone. Another is started as often as it takes; all its starts but the last are ended by
kill -9 or SIGTERM at a random moment: some time after the start (imports, locks, restoring, compiling), after a step's
row in metrics.jsonl, or after a checkpoint has appeared that is still being written. At the end the newest weights and
optimizer state, metrics.jsonl without the clock, and all completions have to be the same bits. A SIGTERM may lose no
step: the last one in metrics.jsonl is saved.
"""

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bench.soak.tiny import (
    ROOT,
    environment,
    policy_settings,
    process_environments,
    reward_settings,
    sft_settings,
    write_materials,
)

HANGS = 300  # seconds until a program that has not ended counts as hanging
POLL = 0.001  # seconds
TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written


class Kind(NamedTuple):
    """A kind of run."""

    name: str
    program: str  # of python -m train
    settings: Callable[..., dict[str, Any]]
    changes: dict[str, Any]
    processes: int = 1
    kills: int = 5
    terms: int = 2


KINDS = (
    Kind("policy", "policy", policy_settings, {}),
    Kind("sft", "sft", sft_settings, {}),
    Kind("reward", "reward", reward_settings, {}),
    Kind("adapters", "policy", policy_settings, {"lora": {"rank": 4}, "checkpoint": {"keep": 2}}, terms=1),
    Kind(
        "early stopping",
        "sft",
        sft_settings,
        {"early_stopping": {"patience": 4}, "eval_steps": 2, "optimizer": {"learning_rate": 0.01}},
        terms=1,
    ),
    Kind("two processes", "policy", policy_settings, {}, processes=2),
)
SHORT = ("policy", "early stopping")  # with 2 kills and 1 SIGTERM each


class Moment(NamedTuple):
    """When a start is ended, and how."""

    signal: int
    phase: str  # "start", "step" or "save"
    step: int  # of the row that is waited for
    delay: float  # seconds after the start, the row, or the beginning of a save
    victims: tuple[int, ...]  # processes that get the signal

    def __str__(self) -> str:
        place = "the start" if self.phase == "start" else f"{self.phase} {self.step}"
        return f"{signal.Signals(self.signal).name} {1000 * self.delay:.0f} ms after {place}"


class Start(NamedTuple):
    """How one start of a run ended."""

    moment: Moment | None
    is_cut: bool  # whether the signal came before its end
    is_saving: bool  # whether it left a checkpoint that is not whole
    redone: int  # steps in metrics.jsonl after the newest checkpoint
    faults: list[str]


class Result(NamedTuple):
    """What came of all starts of one kind of run."""

    kind: Kind
    starts: list[Start]
    differences: list[str]

    @property
    def faults(self) -> list[str]:
        return [*(fault for start in self.starts for fault in start.faults), *self.differences]

    def cut_by(self, number: int) -> list[Start]:
        return [start for start in self.starts if start.is_cut and start.moment and start.moment.signal == number]


class Progress:
    """The last step that a start has written to metrics.jsonl; each start begins with a new file."""

    def __init__(self, run: Path) -> None:
        self._file = run / "metrics.jsonl"
        self._before = self._identity()

    def _identity(self) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self._file.stat().st_ino
        return None

    def step(self) -> int:
        """Returns -1 before the file is written anew."""
        from train.run.metrics_file import parse_metrics

        if self._identity() in (None, self._before):
            return -1
        rows = parse_metrics(self._file).rows
        return int(rows[-1]["step"]) if rows else 0


def launch(kind: Kind, config: Path, logs: Sequence[Path]) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a run."""
    command = [sys.executable, "-m", "train", kind.program, "--config", str(config)]
    processes = []
    for own, log in zip(process_environments(kind.processes), logs, strict=True):
        with open(log, "wb") as file:
            options: dict[str, Any] = {"cwd": ROOT, "env": environment() | own, "stdout": file}
            processes.append(subprocess.Popen(command, **options, stderr=subprocess.STDOUT))
    return processes


def start_once(kind: Kind, config: Path, run: Path, moment: Moment | None, log: Path) -> Start:
    """Starts a run, ends it at the moment or waits for its end, and looks at what it left."""
    progress, began = Progress(run), time.monotonic()
    logs = [log.with_name(f"{log.name}-{index}.txt") for index in range(kind.processes)]
    processes = launch(kind, config, logs)
    is_cut, faults = False, list[str]()
    try:
        if moment is not None:
            is_cut = _wait_for(moment, began, progress, run, processes)
            for index in moment.victims if is_cut else ():
                processes[index].send_signal(moment.signal)
            if is_cut and moment.signal == signal.SIGKILL:  # what took one machine takes the others soon
                time.sleep(moment.delay)
                for process in processes:
                    process.kill()
        for process in processes:
            process.wait(timeout=HANGS)
    except subprocess.TimeoutExpired:
        faults.append(f"still runs after {HANGS} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    step, saved = progress.step(), max(saved_steps(run), default=0)
    redone = max(0, step - saved)
    faults += _faults(moment if is_cut else None, [process.returncode for process in processes], redone, logs)
    name = f"{kind.name}, {moment or 'whole'}"
    faults = [f"{name}: {fault} ({logs[0]})" for fault in faults]
    return Start(moment, is_cut, is_cut and bool(unfinished_saves(run)), redone, faults)


def _wait_for(
    moment: Moment, began: float, progress: Progress, run: Path, processes: Sequence[subprocess.Popen[bytes]]
) -> bool:
    """Waits for a moment; returns whether all processes still run then."""

    def wait(is_there: Callable[[], bool]) -> bool:
        while not is_there():
            if any(process.poll() is not None for process in processes) or time.monotonic() - began > HANGS:
                return False
            time.sleep(POLL)
        return all(process.poll() is None for process in processes)

    if moment.phase != "start":
        if not wait(lambda: progress.step() >= moment.step):
            return False
        if moment.phase == "save" and not wait(lambda: bool(unfinished_saves(run))):
            return False
        began = time.monotonic()
    return wait(lambda: time.monotonic() - began >= moment.delay)


def _faults(moment: Moment | None, codes: Sequence[int], redone: int, logs: Sequence[Path]) -> Iterator[str]:
    """Yields what a start should not have done."""
    if moment is not None and moment.signal == signal.SIGKILL:
        return
    ended, texts = 0 if moment is None else 128 + moment.signal, [log.read_text(errors="replace") for log in logs]
    early = [-moment.signal] if moment is not None and moment.phase == "start" else []  # Python has just begun
    if any(code not in (ended, *early) for code in codes):
        yield f"exit codes {codes}, expected {ended}"
    if any("Traceback" in text for text in texts):
        yield "a traceback"
    if redone and moment is not None:
        yield f"{redone} steps lost"
    if moment is not None and moment.phase != "start" and "is saved; the same command goes on from" not in texts[0]:
        yield "no line that says what is saved"


def saved_steps(run: Path) -> list[int]:
    """Returns the steps whose checkpoints are whole."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name) for name in os.listdir(run / "checkpoints") if name.isdigit())
    return []


def unfinished_saves(run: Path) -> list[str]:
    """Returns the names of the checkpoints that are being written, or whose writing was cut short."""
    with contextlib.suppress(FileNotFoundError):
        return [name for name in os.listdir(run / "checkpoints") if TEMPORARY in name]
    return []


def random_moments(kind: Kind, draw: random.Random, last: int, seconds: float) -> list[Moment]:
    """Draws the moments at which a run is ended, in the order of its steps.

    Args:
      last: the last step of the run that was left alone.
      seconds: from its start to its first step.
    """
    signals = [signal.SIGKILL] * kind.kills + [signal.SIGTERM] * kind.terms
    draw.shuffle(signals)
    moments = []
    for number, step in zip(signals, sorted(draw.randrange(last - 4) for _ in signals), strict=True):
        is_single = kind.processes == 1 or number == signal.SIGKILL  # processes that begin together may end apart
        phase = draw.choices(("step", "save", "start"), (3, 3, 1 if is_single else 0))[0]
        delay = draw.uniform(0, {"step": 0.1, "save": 0.15, "start": seconds}[phase])
        victims = draw.sample(range(kind.processes), draw.randint(1, kind.processes))
        moments.append(Moment(number, phase, step, delay, tuple(victims)))
    return moments


def soak(kind: Kind, folder: Path, materials: Path, seed: int) -> Result:
    """Runs one kind of run to its end, once alone and once with interruptions, and compares the two."""
    folder.mkdir(parents=True)
    whole, cut, configs = folder / "whole", folder / "cut", list[Path]()
    for run in (whole, cut):
        settings = kind.settings(materials, run, **kind.changes)
        configs.append(folder / f"{run.name}.yaml")
        configs[-1].write_text(yaml.safe_dump(settings))
    began = time.time()
    starts = [start_once(kind, configs[0], whole, None, folder / "log-whole")]
    if starts[0].faults:
        return Result(kind, starts, [])
    seconds = (whole / "config.yaml").stat().st_mtime - began  # much of what comes before the first step
    draw = random.Random(f"{seed} {kind.name}")
    for number, moment in enumerate([*random_moments(kind, draw, max(saved_steps(whole)), 2 * seconds), None]):
        starts.append(start_once(kind, configs[1], cut, moment, folder / f"log-{number:02}"))
    return Result(kind, starts, list(differences(whole, cut, kind.name)))


def differences(whole: Path, cut: Path, name: str) -> Iterator[str]:
    """Yields in what two runs differ: metrics without the clock, texts, results, and the newest weights."""
    from train.run.metrics_file import read_metrics

    rows, others = read_metrics(whole, clock=False), read_metrics(cut, clock=False)
    if rows != others:
        first = next((row["step"] for row, other in zip(rows, others, strict=False) if row != other), "the last")
        yield f"{name}: metrics.jsonl differs from step {first} on"
    files = [{file.relative_to(run) for file in sorted(_result_files(run))} for run in (whole, cut)]
    if files[0] != files[1]:
        yield f"{name}: not the same files: {', '.join(map(str, sorted(files[0] ^ files[1])))}"
    for file in sorted(files[0] & files[1]):
        if (whole / file).read_bytes() != (cut / file).read_bytes():
            yield f"{name}: {file} differs"
    steps, other_steps = saved_steps(whole), saved_steps(cut)
    if not steps or steps[-1:] != other_steps[-1:]:
        yield f"{name}: the newest steps are {steps[-1:]} and {other_steps[-1:]}"
    for step in sorted({*steps} & {*other_steps}):
        for item in ("params", "train"):
            part = Path("checkpoints") / str(step) / item
            if arrays(whole / part) != arrays(cut / part):
                yield f"{name}: {part} differs"
    if (whole / "checkpoints" / "base").is_dir() and arrays(whole / "checkpoints/base") != arrays(
        cut / "checkpoints/base"
    ):
        yield f"{name}: checkpoints/base differs"


def _result_files(run: Path) -> list[Path]:
    return [
        *run.glob("completions/*"),
        *run.glob("calibration.json"),
        *run.glob("stopped.json"),
        *run.glob("*damaged*"),
    ]


def arrays(directory: Path) -> dict[str, bytes]:
    """Reads the arrays of a checkpoint's item, whatever processes and devices wrote it: names to bytes."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(directory, restore_args=args)
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def table(results: Sequence[Result]) -> str:
    """Returns one line for each kind of run, and their sum."""
    head = f"{'run':<16}{'kill -9':>8}{'in saves':>10}{'SIGTERM':>9}{'starts':>8}{'steps redone':>14}"
    lines, sums = [f"{head}{'steps lost':>12}  identical"], [0] * 6
    for result in results:
        kills, terms = result.cut_by(signal.SIGKILL), result.cut_by(signal.SIGTERM)
        counts = [len(kills), sum(s.is_saving for s in kills), len(terms), len(result.starts)]
        counts += [sum(s.redone for s in kills), sum(s.redone for s in terms)]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        lines.append(_line(result.kind.name, counts, not result.differences and len(result.starts) > 1))
    return "\n".join([*lines, _line("all", sums, not any(result.faults for result in results))])


def _line(name: str, counts: Sequence[int], is_identical: bool) -> str:
    widths = (8, 10, 9, 8, 14, 12)
    numbers = "".join(f"{count:>{width}}" for count, width in zip(counts, widths, strict=True))
    return f"{name:<16}{numbers}  {'yes' if is_identical else 'NO'}"


def run(folder: Path, *, short: bool, seed: int, workers: int) -> int:
    """Ends runs of all kinds by force; prints a table and returns the exit code: 1 if anything differs or is lost."""
    began = time.monotonic()
    print(f"kills: seed {seed}", flush=True)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax: an item read alone has no file of the whole step
    kinds = [kind._replace(kills=2, terms=1) for kind in KINDS if kind.name in SHORT] if short else list(KINDS)
    write_materials(folder / "materials")
    with tempfile.TemporaryDirectory(prefix="soak-xla-") as cache, ThreadPoolExecutor(workers) as pool:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)  # what one start compiles, the others need not
        places = [folder / kind.name.replace(" ", "_") for kind in kinds]
        results = list(pool.map(lambda kind, place: soak(kind, place, folder / "materials", seed), kinds, places))
    print(table(results))
    faults = [fault for result in results for fault in result.faults]
    print(*faults, f"kills: {len(faults)} faults, {time.monotonic() - began:.0f} s", sep="\n", flush=True)
    return 1 if faults else 0


def main(arguments: Sequence[str]) -> int:
    """Runs `python -m bench.soak kills`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m bench.soak kills")
    parser.add_argument("--short", action="store_true", help="two kinds of runs, for less than a minute")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the moments")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, help="a new directory, which stays; default: a temporary one")
    options = parser.parse_args(arguments)
    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("short", "seed", "workers")}
    if options.folder is not None:
        return run(options.folder, **chosen)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        return run(Path(folder), **chosen)
