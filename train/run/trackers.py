"""Trackers, which cannot stop a run: each is written to by a thread of its own.

    a write that fails    one warning; the run goes on without this tracker
    a write that blocks   rows wait in a queue; where it is full one warning, and the rows beyond it are left out
    an end that blocks    is waited for CLOSE_SECONDS at most, then one warning

`metrics.jsonl` has every step, whatever becomes of them. TensorBoard and Weights & Biases are here, others in
`train.run.sinks`; one of your own is a class with the methods of `Sink`, made with (run's directory, settings).
"""

import contextlib
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from models.config import read_json
from train.console import print_plain
from train.run.files import write_whole

WANDB = "wandb.json"  # the id of the run's page in Weights & Biases
CLOSE_SECONDS = 60.0  # how long the end of a whole run waits for a tracker
_WAITING_ROWS = 1000  # rows that wait for a tracker at most
_TEXT_ROWS = 8  # of a table of completions, in TensorBoard

Table = Mapping[str, Sequence[Any]]


class Sink(Protocol):
    """Where a tracker's rows go; every method may fail or block."""

    def write_row(self, step: int, row: Mapping[str, float]) -> None: ...

    def write_table(self, step: int, table: Table) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes to a sink on a thread of its own; no method raises, and none but `close` waits.

    Args:
      name: of the tracker, in warnings.
      make_sink: opens the sink, on the calling thread.
    """

    def __init__(self, name: str, make_sink: Callable[[], Sink]) -> None:
        self._name, self._is_off, self._is_warned = name, False, False
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_ROWS)
        try:
            self._sink = make_sink()
        except Exception as error:
            self._turn_off(error)
            return
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""
        self._send(lambda: self._sink.write_row(step, row))

    def write_table(self, step: int, table: Table) -> None:
        """Sends a table of completions."""
        self._send(lambda: self._sink.write_table(step, table))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Waits for what was sent, up to so many seconds."""
        if self._is_off:
            return
        began = time.monotonic()
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=seconds)
            self._thread.join(max(0.0, seconds - (time.monotonic() - began)))
        if self._thread.is_alive():
            self._warn(f"has not ended within {seconds:.0f} s and is left behind")

    def _send(self, call: Callable[[], None]) -> None:
        if self._is_off:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn(f"is {_WAITING_ROWS} rows behind; rows are left out of it until it goes on")

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call()
                if self._calls.empty():
                    self._sink.flush()
            self._sink.close()
        except BaseException as error:  # SystemExit too
            self._turn_off(error)
            with contextlib.suppress(Exception):  # its file is closed, though what it has not written is lost
                self._sink.close()

    def _turn_off(self, error: BaseException) -> None:
        self._is_off = True
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        self._warn(f"could not be written ({' '.join(reason.split())[:300]}); the run goes on without it")

    def _warn(self, what: str) -> None:
        if not self._is_warned:
            print_plain(f"warning: {self._name}: {what}; metrics.jsonl has every step")
        self._is_warned = True


class TensorBoard:
    """An event file of TensorBoard.

    tensorboardX's own SummaryWriter has a thread, which a failed write ends; then the next rows block for ever.

    Args:
      folder: the directory of event files.
      start: the step that the run goes on from; TensorBoard no longer shows what came after it before.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._writer, self._event = RecordWriter(str(folder / name)), Event
        self._write(0, file_version="brain.Event:2")
        if start:
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in row.items():
            self._write(step, summary=scalar(name, value))

    def write_table(self, step: int, table: Table) -> None:
        from tensorboardX.summary import text

        shown = zip(*(map(str, column[:_TEXT_ROWS]) for column in table.values()), strict=True)
        lines = [" | ".join(table), " | ".join("---" for _ in table), *(" | ".join(row) for row in shown)]
        self._write(step, summary=text("completions", "\n".join(line.replace("\n", " ") for line in lines)))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(step=step, wall_time=time.time(), **content).SerializeToString())

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run's page in Weights & Biases.

    Args:
      run: the run's directory.
      settings: more arguments of `wandb.init`.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, self._page = wandb, wandb.init(name=run.name, id=page_id(run), resume="allow", **settings)

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        self._page.log(row, step=step)

    def write_table(self, step: int, table: Table) -> None:
        columns = {"step": [step] * len(table["prompt"])} | dict(table)
        rows = list(zip(*columns.values(), strict=True))
        self._page.log({"completions": self._wandb.Table(columns=list(columns), data=rows)}, step=step)

    def flush(self) -> None:
        """Nothing to do: wandb has a process that sends."""

    def close(self) -> None:
        self._page.finish()


def page_id(run: Path, name: str = WANDB) -> str:
    """Returns the id of a run's page at a tracker, drawn when the run starts and kept in its directory as `name`.

    A name would not do: two runs of one name would share a page. A copy of a run whose original is still there gets an
    id of its own; a run that was moved keeps its id.
    """
    file, place = run / name, str(run.resolve())
    if file.is_file():
        saved = read_json(file)
        original = Path(saved["run"])
        is_copy = str(original) != place and (original / name).is_file() and read_json(original / name) == saved
        if not is_copy:
            return saved["id"]
    page = {"id": secrets.token_hex(8), "run": place}
    write_whole(file, json.dumps(page) + "\n")
    return page["id"]
