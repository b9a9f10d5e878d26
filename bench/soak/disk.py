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
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT_SECONDS = 300
APART_SECONDS = 20  # between the ends of two processes, on a busy machine too
_DISK = "disk"  # the mounted folder, in a case's folder
_SIZE = "24m"
_CAN_MOUNT = "GOPO_JAX_SOAK_MOUNTED"  # set in the processes whose disk is a tmpfs
_REPLY = "result: "


class Disk:
    """The disk of a case, as the disturbed process sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, leaving: int = 0, folder: Path | None = None) -> None:
        """Fills the disk, or another that is mounted in it, up to some bytes."""
        if _CAN_MOUNT not in os.environ:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (leaving, hard))
            return
        place = (folder or self._folder) / "filler"
        with contextlib.suppress(OSError), open(place, "ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        if leaving:
            os.truncate(place, max(0, place.stat().st_size - leaving))

    def fill_under(self, file: Path) -> None:
        """Fills the disk so that not even a line can be added to a file: its last page is filled with blank lines."""
        with open(file, "ab") as opened:
            opened.write(b"\n" * (-file.stat().st_size % 4096))
        self.fill() if _CAN_MOUNT in os.environ else self.fill(file.stat().st_size)

    def free(self) -> None:
        """Makes room again."""
        if _CAN_MOUNT not in os.environ:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            return
        for filler in self._folder.rglob("filler"):
            filler.unlink()

    def free_later(self, seconds: float) -> None:
        threading.Thread(target=lambda: _in_turn(lambda: time.sleep(seconds), self.free), daemon=True).start()

    def make_read_only(self) -> None:
        """Mounts the checkpoints read-only over themselves; the open lock in them forbids to remount them."""
        folder = str(self._folder / "run" / "checkpoints")
        for options in (["--bind", folder], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, folder], check=True)

    def make_writable(self) -> None:
        subprocess.run(["umount", str(self._folder / "run" / "checkpoints")], check=True)

    def mount(self, folder: Path | None = None) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder or self._folder)]
        subprocess.run(command, check=True)


class Case(NamedTuple):
    """A moment in which the disk fails, and what must come of it."""

    arrange: Callable[[Disk], None]  # in the process that trains or exports
    code: int = 1
    line: str = "could not be written (No space left on device)"  # a part of the one line
    saved: int = 2  # the newest step then; 0: none
    settings: Sequence[str] = ()
    needs_mount: bool = False
    exports: bool = False
    warns: bool = False  # the line is a warning on the standard output
    folders: Sequence[str] = ()  # in the run's directory, each on a small disk of its own
    processes: int = 1
    second: Callable[[Disk], None] = lambda disk: None  # arranged in the second process


def before(target: str, action: Callable[..., None], *, call: int = 1) -> None:
    """Does something before the nth call of a function, named by its module and its dotted name."""
    from importlib import import_module

    module, _, name = target.partition(":")
    owner: Any = import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), iter(range(1, 10**9))

    def patched(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            action()
        return original(*args, **options)

    setattr(owner, last, patched)


def _in_turn(*actions: Callable[[], object]) -> None:
    for action in actions:
        action()


def _run_folder(disk: Disk) -> Path:
    return disk._folder / "run"


def _wait_settings(disk: Disk) -> None:
    import train.run.writes

    train.run.writes.RETRY_SECONDS = 1.0


def _fill_before_save(disk: Disk, call: int = 3, leaving: int = 0) -> None:
    """Fills the disk when the saves before have ended; one that removes an older step would make room."""
    from models.checkpoint import wait_for_saves

    before(
        "models.checkpoint:Checkpoints.save", lambda: _in_turn(wait_for_saves, lambda: disk.fill(leaving)), call=call
    )


def _read_only_before_save(disk: Disk) -> None:
    from models.checkpoint import wait_for_saves

    before("models.checkpoint:Checkpoints.save", lambda: _in_turn(wait_for_saves, disk.make_read_only), call=3)


def _save_waits(disk: Disk) -> None:
    from models.checkpoint import wait_for_saves

    _wait_settings(disk)
    before(
        "models.checkpoint:Checkpoints.save",
        lambda: _in_turn(wait_for_saves, disk.fill, lambda: disk.free_later(3)),
        call=3,
    )


def _fill_under_metrics(disk: Disk) -> None:
    from models.checkpoint import wait_for_saves

    wait_for_saves()
    disk.fill_under(_run_folder(disk) / "metrics.jsonl")


def _metrics_wait(disk: Disk) -> None:
    _wait_settings(disk)
    before(
        "train.run.directory:append_line",
        lambda: _in_turn(lambda: _fill_under_metrics(disk), lambda: disk.free_later(3)),
        call=3,
    )


def _terminated(disk: Disk) -> None:
    from models.checkpoint import wait_for_saves

    _wait_settings(disk)

    def fill() -> None:
        wait_for_saves()
        disk.fill()
        threading.Timer(3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    before("models.checkpoint:Checkpoints.save", fill, call=3)


def _metrics_wait_long(disk: Disk) -> None:
    _wait_settings(disk)
    before("train.run.directory:append_line", lambda: _fill_under_metrics(disk), call=3)


def _terminated_when_full(disk: Disk) -> None:
    def watch() -> None:
        while not (disk._folder / "filler").exists():
            time.sleep(0.1)
        time.sleep(3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


WAIT = ("--checkpoint.on_error", "wait")
CASES: dict[str, Case] = {
    "config": Case(lambda disk: before("train.run.directory:write_whole", disk.fill), saved=0),
    "tokenizer": Case(lambda disk: before("models.tokenizer:Tokenizer.save", disk.fill), saved=0),
    "metrics": Case(
        lambda disk: before("train.run.directory:append_line", lambda: _fill_under_metrics(disk), call=3)
    ),
    "tensorboard": Case(
        lambda disk: before(
            "train.run.trackers:TensorBoard.write_row",
            lambda: disk.fill(folder=_run_folder(disk) / "tensorboard"),
            call=2,
        ),
        code=0, saved=4, warns=True, needs_mount=True, folders=["tensorboard"],
    ),
    "completions": Case(
        lambda disk: before(
            "train.run.directory:write_parquet", lambda: disk.fill(folder=_run_folder(disk) / "completions"), call=2
        ),
        code=0, saved=4, warns=True, needs_mount=True, folders=["completions"],
    ),
    "save, not begun": Case(_fill_before_save),
    "save, in flight": Case(lambda disk: _fill_before_save(disk, leaving=60_000)),
    "last save": Case(lambda disk: _fill_before_save(disk, call=4, leaving=60_000), saved=3),
    "save, keep 1": Case(
        lambda disk: _fill_before_save(disk, leaving=60_000), settings=("--checkpoint.keep", "1")
    ),
    "base of adapters": Case(
        lambda disk: before("models.checkpoint:Checkpoints.restore_or_save_base", lambda: disk.fill(40_000)),
        saved=0, settings=("--lora.rank", "2"),
    ),
    "save, read-only": Case(
        _read_only_before_save, line="could not be written (Read-only file system)", needs_mount=True,
    ),
    "save, waits": Case(_save_waits, code=0, saved=4, settings=WAIT, warns=True),
    "metrics, waits": Case(_metrics_wait, code=0, saved=4, settings=WAIT, warns=True),
    "SIGTERM while it waits": Case(_terminated, code=143, line="SIGTERM ended the run", settings=WAIT),
    "two processes, metrics": Case(
        lambda disk: before("train.run.directory:append_line", lambda: _fill_under_metrics(disk), call=3), processes=2
    ),
    "two processes, save": Case(_fill_before_save, processes=2),
    "two processes, save in flight": Case(lambda disk: _fill_before_save(disk, leaving=60_000), processes=2),
    "two processes, save, waits": Case(_save_waits, code=0, saved=4, settings=WAIT, warns=True, processes=2),
    "two processes, SIGTERM to the second while the first waits": Case(
        _metrics_wait_long, second=_terminated_when_full, processes=2,
        code=143, line="SIGTERM ended the run", settings=WAIT, needs_mount=True,
    ),
    "export": Case(lambda disk: before("train.export:save_pretrained", disk.fill), saved=4, exports=True),
    "export, tokenizer": Case(lambda disk: before("models.tokenizer:Tokenizer.save", disk.fill), saved=4, exports=True),
}  # fmt: skip


# The processes


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
        for environment, *files in zip(_environments(processes), *logs, strict=True):
            with open(files[0], "wb") as out_file, open(files[1], "wb") as error_file:
                options: dict[str, Any] = {"stdout": out_file, "stderr": error_file, "env": environment}
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


def _environments(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [dict(os.environ)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [{**os.environ, **names, "JAX_PROCESS_ID": str(index)} for index in range(processes)]


def inside(name: str, folder: Path) -> None:
    """Runs a case where its disk can be mounted, and prints what was wrong."""
    case, disk = CASES[name], Disk(folder / _DISK)
    folder.mkdir()
    (folder / _DISK).mkdir()
    if _CAN_MOUNT in os.environ:
        disk.mount()
        for inner in case.folders:
            (_run_folder(disk) / inner).mkdir(parents=True)
            disk.mount(_run_folder(disk) / inner)
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
    environment = {**os.environ, **({_CAN_MOUNT: "1"} if mounted else {})}
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
