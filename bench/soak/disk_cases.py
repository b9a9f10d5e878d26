"""The cases of `bench.soak.disk`: when and how a disk fails, arranged in the process that is disturbed."""

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_SIZE = "24m"
CAN_MOUNT = "GOPO_JAX_SOAK_MOUNTED"  # set in the processes whose disk is a tmpfs


class Disk:
    """The disk of a case, as the disturbed process sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, leaving: int = 0, folder: Path | None = None) -> None:
        """Fills the disk, or another that is mounted in it, up to some bytes."""
        if CAN_MOUNT not in os.environ:
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
        self.fill() if CAN_MOUNT in os.environ else self.fill(file.stat().st_size)

    def free(self) -> None:
        """Makes room again."""
        if CAN_MOUNT not in os.environ:
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


def run_folder(disk: Disk) -> Path:
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
    disk.fill_under(run_folder(disk) / "metrics.jsonl")


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
            lambda: disk.fill(folder=run_folder(disk) / "tensorboard"),
            call=2,
        ),
        code=0, saved=4, warns=True, needs_mount=True, folders=["tensorboard"],
    ),
    "completions": Case(
        lambda disk: before(
            "train.run.directory:write_parquet", lambda: disk.fill(folder=run_folder(disk) / "completions"), call=2
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
