"""What the scripts beside it share: their command line, the work that they read, and the figures that they write.

It needs Python alone, and Linux: the scripts run in environments without gopo_jax and without jax.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

WORK_FILE = "work.json"
WRITTEN_BY = "`python -m eval speed --workload NAME --prepare FOLDER`"


class PeerError(ValueError):
    """A mistake of the one who runs a script, printed as one line."""


@dataclass(frozen=True)
class Work:
    """What `eval/speed/peers.py` writes to work.json, which is what `python -m train policy` does on that workload."""

    folder: Path  # where work.json lies, and where a script may write
    network: dict[str, Any]  # config.json of transformers
    dtype: str  # of parameters and computation
    tokenizer: str  # a directory in the folder
    prompts: list[str]  # in the order of the steps, then from the first again
    end_ids: list[int]  # tokens that end a completion
    pad_id: int
    prompts_per_step: int
    num_generations: int  # completions per prompt
    max_prompt_length: int  # tokens
    max_completion_length: int  # tokens
    temperature: float
    beta: float  # weight of the KL penalty
    clip: float  # the importance ratio is clipped to 1 - clip .. 1 + clip
    learning_rate: float  # of AdamW
    adam_betas: list[float]
    adam_epsilon: float
    weight_decay: float
    max_grad_norm: float

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts_per_step * self.num_generations


class StepClock:
    """Seconds of every step; `end` is to be called when a step's work has ended, not when it was dispatched."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cold_start_s = 0.0  # from the start of the process to the end of its first step
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begins the first step."""
        self._last = time.perf_counter()

    def end(self) -> None:
        """Ends a step and begins the next."""
        now = time.perf_counter()
        if not self.seconds:
            self.cold_start_s = process_seconds()
        self.seconds.append(now - self._last)
        self._last = now


# Trains for so many steps, ends each on the clock, and returns the mean length of each step's completions, in tokens.
Program = Callable[[Work, int, StepClock], list[float]]


def even_share(completions: list[str]) -> list[float]:
    """Returns the share of each completion's characters that have an even code point: the workloads' reward."""
    return [sum(1 - ord(character) % 2 for character in text) / (len(text) or 1) for text in completions]


def process_seconds() -> float:
    """Returns how long ago this process was started, by the kernel's clock: imports count too."""
    behind_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(behind_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def read_work(folder: Path) -> Work:
    """Reads a folder's work.json.

    Raises:
      PeerError: there is none, it is of another version, or the environment asks for other work.
    """
    file = folder / WORK_FILE
    if not file.is_file():
        raise PeerError(f"{file}: no such file; {WRITTEN_BY} writes it")
    values = json.loads(file.read_text(encoding="utf-8"))
    names = {field.name for field in fields(Work)} - {"folder"}
    if values.keys() != names:
        different = ", ".join(sorted(values.keys() ^ names))
        raise PeerError(f"{file}: written by another version (see {different}); write it again: {WRITTEN_BY}")
    work = Work(folder=folder.resolve(), **values)
    check_environment(work, file)
    return work


def check_environment(work: Work, file: Path) -> None:
    """Refuses PEER_PROMPT, PEER_COMPLETION or PEER_ENDS that say otherwise than the work.

    They tell the same to scripts that make the work themselves.
    """
    for name, length in (("PEER_PROMPT", work.max_prompt_length), ("PEER_COMPLETION", work.max_completion_length)):
        if os.environ.get(name, str(length)) != str(length):
            raise PeerError(f"{name}: expected {length} tokens, as in {file}, got {os.environ[name]}")
    ends = os.environ.get("PEER_ENDS")
    every = max(work.end_ids) if ends is None or not ends.isdigit() else int(ends)
    if ends is not None and (every < 1 or not {every, 2 * every} <= set(work.end_ids)):
        raise PeerError(f"PEER_ENDS: expected none, or a number whose multiples are end_ids in {file}, got {ends}")


def installed_versions(script: str, packages: str) -> dict[str, str]:
    """Returns the versions of packages.

    Args:
      packages: what pip is given for this script, NAME==VERSION with spaces between.

    Raises:
      PeerError: one of them is not installed; the message has the command that installs them all.
    """
    versions = {}
    for requirement in packages.split():
        name = requirement.partition("==")[0]
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise PeerError(
                f"{script}: expected a Python that has {name}, got {sys.executable}; "
                f"install it: {sys.executable} -m pip install {packages}"
            ) from None
    return versions


def peak_rss_mib() -> float:
    """Returns the most memory that this program has had; `ru_maxrss` also holds the peak of the one that started it."""
    status = Path("/proc/self/status")
    peaks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return float(peaks[0]) / 1024


def run_script(script: str, packages: str, program: Program) -> int:
    """Runs a script's command line and returns its exit code: 2 for a mistake of the one who runs it."""
    parser = argparse.ArgumentParser(prog=script)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("check", help="say whether everything that the peer needs is installed")
    training = kinds.add_parser("grpo", help="train, and measure every step")
    training.add_argument("--data", type=Path, required=True, help=f"a folder with {WORK_FILE}, from {WRITTEN_BY}")
    training.add_argument("--steps", type=int, required=True, help="how many steps to train")
    training.add_argument("--out", type=Path, help="a file to append the figures to, as one line of JSON")
    options = parser.parse_args()
    try:
        versions = installed_versions(script, packages)
        if options.kind == "check":
            return 0
        if options.steps < 1:
            raise PeerError(f"--steps: expected at least 1, got {options.steps}")
        work = read_work(options.data)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clock = StepClock()
    lengths = program(work, options.steps, clock)
    steps = zip(clock.seconds, lengths, strict=True)
    figures = {
        "versions": versions,
        "steps": [{"step": seconds, "completion_tokens": length} for seconds, length in steps],
        "cold_start_s": clock.cold_start_s,
        "peak_rss_mib": peak_rss_mib(),
    }
    line = json.dumps(figures)
    print(line)
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return 0
