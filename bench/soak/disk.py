"""Runs on disks that fill up, become read-only or break: `python -m bench.soak.disk [CASE ...]`.

Each case trains a tiny policy for four steps on a tmpfs of its own, in a mount namespace that needs no rights. In the
moment that the case is about, the disk is filled to its last byte (or made read-only). Then

    the program ends by itself, with the exit code and the one line that are expected
    the step before is whole: the disk has room again, the same command goes on, and ends with the parameters and
    metrics of a run that was never disturbed, bit for bit

Of two processes both end by themselves, soon after one another, with the same exit code and one line in all.

Where nothing can be mounted, RLIMIT_FSIZE refuses all writes of the process instead (EFBIG); cases about a part of the
disk or about read-only ones are left out then, and that is said.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.soak.disk_cases import CAN_MOUNT, CASES, Case, Disk, run_folder
from bench.soak.tiny import process_environments

TIMEOUT_SECONDS = 300
APART_SECONDS = 20  # between the ends of two processes, on a busy machine too
_DISK = "disk"  # the mounted folder, in a case's folder
_REPLY = "result: "


def act(name: str, folder: Path) -> int:
    """Trains or exports, with the disk disturbed as the case has it."""
    from train.__main__ import main as train_main

    case = CASES[name]
    arrange = case.second if os.environ.get("JAX_PROCESS_ID") == "1" else case.arrange
    arrange(Disk(folder / _DISK))
    return train_main(export_arguments(folder) if case.exports else run_arguments(folder, case))


def run_arguments(folder: Path, case: Case) -> list[str]:
    return [
        "policy",
        "--config",
        str(folder.parent / "policy.yaml"),
        "--output_dir",
        str(folder / _DISK / "run"),
        *case.settings,
    ]


def export_arguments(folder: Path) -> list[str]:
    return ["export", "--checkpoint", str(folder / _DISK / "run"), "--out", str(folder / _DISK / "out")]


class Ended(NamedTuple):
    code: int | None  # None: it did not end; of several processes the code of all, or -1 if they differ
    out: str
    error: str
    seconds: float
    apart: float = 0.0  # seconds between the first end of several processes and the last one


def start(arguments: Sequence[str], processes: int = 1) -> Ended:
    """Runs a program to its end, as one process or as several on loopback."""
    began, ends = time.monotonic(), list[float]()
    with tempfile.TemporaryDirectory() as name:
        logs = [[Path(name, f"{kind}{index}") for index in range(processes)] for kind in ("out", "error")]
        started = []
        for environment, *files in zip(process_environments(processes), *logs, strict=True):
            with open(files[0], "wb") as out_file, open(files[1], "wb") as error_file:
                options: dict[str, Any] = {"stdout": out_file, "stderr": error_file, "env": os.environ | environment}
                started.append(subprocess.Popen([sys.executable, *arguments], **options))
        running = set(started)
        while running and time.monotonic() - began < TIMEOUT_SECONDS:
            time.sleep(0.02)
            ended = {process for process in running if process.poll() is not None}
            ends += [time.monotonic()] * len(ended)
            running -= ended
        for process in running:
            process.kill()
            process.wait()
        out, error = ("".join(log.read_text(errors="replace") for log in kind) for kind in logs)
    codes = {process.returncode for process in started}
    code = None if running else codes.pop() if len(codes) == 1 else -1
    return Ended(code, out, error, time.monotonic() - began, max(ends, default=0) - min(ends, default=0))


def inside(name: str, folder: Path) -> None:
    """Runs a case where its disk can be mounted, and prints what was wrong."""
    case, disk = CASES[name], Disk(folder / _DISK)
    folder.mkdir()
    (folder / _DISK).mkdir()
    if CAN_MOUNT in os.environ:
        disk.mount()
        for inner in case.folders:
            (run_folder(disk) / inner).mkdir(parents=True)
            disk.mount(run_folder(disk) / inner)
    if case.exports:
        start(["-m", "train", *run_arguments(folder, case)])
    ended = start(["-m", __spec__.name if __spec__ else "bench.soak.disk", "--act", name, str(folder)], case.processes)
    faults = [*ending_faults(case, ended), *disk_faults(case, folder)]
    if case.line.endswith("(Read-only file system)"):
        disk.make_writable()
    disk.free()
    if not case.exports:
        again = start(["-m", "train", *run_arguments(folder, case)], case.processes)
        faults += run_faults(folder, case) if again.code == 0 else [f"does not go on: {again.error[-300:]}"]
    elif start(["-m", "train", *export_arguments(folder)]).code != 0:
        faults.append("cannot be exported again")
    line = next((text for text in (ended.out + ended.error).splitlines() if case.line in text), "")
    print(_REPLY + json.dumps({"faults": faults, "code": ended.code, "seconds": ended.seconds, "line": line}))


def ending_faults(case: Case, ended: Ended) -> list[str]:
    """What is wrong with the end of the disturbed process."""
    if ended.code is None:
        return [f"hangs: {ended.error[-300:]}"]
    faults = [] if ended.code == case.code else [f"exit code {ended.code}, expected {case.code}: {ended.error[-300:]}"]
    lines = ended.error.splitlines()
    expected = 0 if case.warns else 1
    if len(lines) != expected:
        faults.append(f"{len(lines)} lines on the standard error, expected {expected}: {ended.error[-1500:]}")
    if ended.apart > APART_SECONDS:
        faults.append(f"the processes ended {ended.apart:.0f} s apart")
    place = ended.out if case.warns else ended.error
    if sum(case.line in line.replace("File too large", "No space left on device") for line in place.splitlines()) != 1:
        faults.append(f"expected one line with {case.line!r}, got {place[-300:]}")
    return faults


def disk_faults(case: Case, folder: Path) -> list[str]:
    """What is wrong with the files that the disturbed process left."""
    checkpoints = folder / _DISK / "run" / "checkpoints"
    entries = sorted(entry.name for entry in checkpoints.iterdir()) if checkpoints.is_dir() else []
    steps = [int(entry) for entry in entries if entry.isdigit()]
    faults = [] if max(steps, default=0) == case.saved else [f"steps {steps}, expected the newest to be {case.saved}"]
    left = [entry for entry in entries if not entry.isdigit() and entry != "base"]
    left += [path.name for path in (folder / _DISK).rglob("*.tmp")]
    left += [path.name for path in (folder / _DISK).glob("*.partial")]
    if case.processes > 1:  # others may still write there; the next start removes it
        left = [name for name in left if "orbax-checkpoint-tmp" not in name]
    if left and "Read-only" not in case.line:
        faults.append(f"left behind: {left}")
    if case.exports and (folder / _DISK / "out").exists():
        faults.append("an export that has failed is there")
    return faults


def run_faults(folder: Path, case: Case) -> list[str]:
    """How a run differs from one that was never disturbed."""
    from train.run.metrics_file import read_metrics

    run, reference = folder / _DISK / "run", folder.parent / reference_name(case) / _DISK / "run"
    faults = []
    if read_metrics(run, clock=False) != read_metrics(reference, clock=False):
        faults.append("other metrics than the undisturbed run")
    if parameters(run, case.processes) != parameters(reference, case.processes):
        faults.append("other parameters than the undisturbed run")
    return faults


def parameters(run: Path, processes: int = 1) -> list[bytes]:
    import jax

    from bench.soak.kills import arrays
    from models.checkpoint import load_model
    from models.hf_weights import split

    if processes > 1:  # Orbax refuses to load what other devices have saved
        return list(arrays(run / "checkpoints" / "4" / "params").values())
    return [bytes(memoryview(jax.device_get(leaf))) for leaf in jax.tree.leaves(split(load_model(run))[1])]


def reference_name(case: Case) -> str:
    if case.processes > 1:
        return "undisturbed_processes"
    return "undisturbed_adapters" if "--lora.rank" in case.settings else "undisturbed"


# The whole


def prepare(folder: Path) -> None:
    """Writes a tokenizer, prompts and a config."""
    from models.tokenizer import train_bpe

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    prompts = [f"{first} {second} {third}" for first in words for second in words[:3] for third in words[:2]]
    train_bpe(prompts, folder / "tokenizer", 280)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    network = {"vocab_size": 280, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    network |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    config = {
        "output_dir": "set by each case",
        "model": {"architecture": network, "tokenizer": str(folder / "tokenizer")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "rewards": [{"function": "length", "options": {"target": 4}}],
        "max_steps": 4, "prompts_per_step": 4, "num_generations": 4, "microbatch_prompts": 2,
        "max_prompt_length": 24, "max_completion_length": 8,
        "optimizer": {"learning_rate": 1e-3}, "validation": {"prompts": 0},
        "checkpoint": {"every": 1}, "log": {"progress": False, "completions_every": 1},
    }  # fmt: skip
    (folder / "policy.yaml").write_text(json.dumps(config))  # JSON is YAML


def can_mount() -> bool:
    """Whether a tmpfs can be mounted in a namespace of one's own."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", folder]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def workplace(names: Iterable[str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="disk-") as name:
        folder = Path(name)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        prepare(folder)
        wanted = {reference_name(CASES[name]) for name in names}
        for case in (CASES["config"], CASES["base of adapters"], CASES["two processes, save"]):
            if reference_name(case) not in wanted:
                continue
            undisturbed = folder / reference_name(case)
            (undisturbed / _DISK).mkdir(parents=True)
            ended = start(["-m", "train", *run_arguments(undisturbed, case)], case.processes)
            if ended.code != 0:
                raise SystemExit(f"the undisturbed run has failed: {ended.error[-2000:]}")
        yield folder


def try_case(name: str, folder: Path, *, mounted: bool) -> dict[str, Any]:
    place = folder / ("case_" + name.replace(" ", "_").replace(",", ""))
    command = [sys.executable, "-m", "bench.soak.disk", "--inside", name, str(place)]
    environment = {**os.environ, **({CAN_MOUNT: "1"} if mounted else {})}
    done = subprocess.run(
        ["unshare", "-Urm", *command] if mounted else command, capture_output=True, text=True, env=environment
    )
    shutil.rmtree(place, ignore_errors=True)
    replies = [line for line in done.stdout.splitlines() if line.startswith(_REPLY)]
    if not replies:
        return {
            "faults": [f"the case itself has failed: {done.stderr[-1000:]}"],
            "code": None,
            "seconds": 0,
            "line": "",
        }
    return dict(json.loads(replies[0].removeprefix(_REPLY)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak.disk", description="Runs on disks that fill up.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--act", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.act:
        return act(options.act[0], Path(options.act[1]))
    if options.inside:
        inside(options.inside[0], Path(options.inside[1]))
        return 0
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; expected any of {', '.join(CASES)}")
    mounted = can_mount()
    if not mounted:
        print("no tmpfs can be mounted here; writes are refused by RLIMIT_FSIZE instead")
    failed = 0
    print("| the disk fails at | exit code | seconds | the line |\n|---|---|---|---|", flush=True)
    with workplace(options.cases or CASES) as folder:
        for name in options.cases or CASES:
            if CASES[name].needs_mount and not mounted:
                print(f"| {name} | | | left out: needs a mount |", flush=True)
                continue
            result = try_case(name, folder, mounted=mounted)
            failed += bool(result["faults"])
            line = result["line"].replace(str(folder), "").replace("|", "\\|")
            print(f"| {name} | {result['code']} | {result['seconds']:.0f} | {line} |", flush=True)
            for fault in result["faults"]:
                print(f"FAILED: {name}: {fault}", flush=True)
    print(f"{failed} cases failed" if failed else "all cases passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
