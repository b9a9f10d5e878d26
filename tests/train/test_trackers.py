"""Trackers cannot stop a run: what fails or blocks in them costs one warning."""

import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import train.run.trackers
from train.run.trackers import TensorBoard, Tracker

ROW = {"reward": 0.5, "loss": 2.0}
TABLE = {"prompt": ["a\nb", "c"], "reward": [1.0, 2.0]}


class Sink:
    """Notes what it is given; `fails` at the rows of these steps, `blocks` until `opened` is set."""

    def __init__(self, fails: tuple[int, ...] = (), blocks: bool = False, error: BaseException | None = None) -> None:
        self.fails, self.blocks, self.error = fails, blocks, error or OSError(28, "No space left on device")
        self.opened, self.steps, self.is_closed = threading.Event(), list[int](), False

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        if self.blocks:
            self.opened.wait(60)
        if step in self.fails:
            raise self.error
        self.steps.append(step)

    def write_table(self, step: int, table: Any) -> None:
        self.write_row(step, {})

    def flush(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def test_rows_arrive_in_order_and_the_sink_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink()
    tracker = Tracker("x", lambda: sink)
    for step in range(5):
        tracker.write_row(step, ROW)
    tracker.write_table(5, TABLE)
    tracker.close()
    assert sink.steps == [0, 1, 2, 3, 4, 5] and sink.is_closed and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ConnectionError("refused\nby peer"), SystemExit(1)],
    ids=["full", "network", "exit"],
)
def test_a_write_that_fails_is_one_warning(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink(fails=(2, 3), error=error)
    tracker = Tracker("runs/x/tensorboard", lambda: sink)
    for step in range(20):
        tracker.write_row(step, ROW)
        time.sleep(0.002)
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert sink.steps == [0, 1] and sink.is_closed and len(lines) == 1
    assert lines[0].startswith("warning: runs/x/tensorboard: could not be written (")
    assert lines[0].endswith("the run goes on without it; metrics.jsonl has every step")


def test_a_tracker_that_does_not_open_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    def no_sink() -> Sink:
        raise TimeoutError("init timed out")

    tracker = Tracker("Weights & Biases", no_sink)
    tracker.write_row(1, ROW)
    tracker.close()
    assert capsys.readouterr().out.splitlines() == [
        "warning: Weights & Biases: could not be written (TimeoutError: init timed out); the run goes on without it; "
        "metrics.jsonl has every step"
    ]


def test_a_write_that_blocks_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.run.trackers, "_WAITING_ROWS", 3)
    sink = Sink(blocks=True)
    tracker = Tracker("x", lambda: sink)
    began = time.monotonic()
    for step in range(10):
        tracker.write_row(step, ROW)
    tracker.close(0.05)
    assert time.monotonic() - began < 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "x: is 3 rows behind" in lines[0]
    sink.opened.set()  # it goes on: what waited is written
    tracker.close()
    assert sink.steps[:2] == [0, 1] and sink.is_closed


def read_events(folder: Path) -> list[Any]:
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_shows_rows_and_texts(tmp_path: Path) -> None:
    tracker = Tracker("x", lambda: TensorBoard(tmp_path / "tensorboard", 6))
    tracker.write_row(7, ROW)
    tracker.write_table(7, TABLE)
    tracker.close()
    events = read_events(tmp_path / "tensorboard")
    values = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert values == [(7, "reward"), (7, "loss"), (7, "completions/text_summary")]
    assert [value.simple_value for event in events for value in event.summary.value][:2] == [0.5, 2.0]
    text = events[-1].summary.value[0].tensor.string_val[0].decode()
    assert text.splitlines() == ["prompt | reward", "--- | ---", "a b | 1.0", "c | 2.0"]
    assert [event.step for event in events if event.session_log.status == 1] == [7]  # START: what came after is hidden


def full_file(path: str) -> BinaryIO:
    return open("/dev/full", "wb")


def test_tensorboard_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tensorboardX.record_writer.open_file", full_file)
    tracker = Tracker("x", lambda: TensorBoard(tmp_path, 0))
    for step in range(100):
        tracker.write_row(step, ROW)
    tracker.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "could not be written (No space left on device)" in lines[0]
