"""metrics.jsonl: a damaged line costs that line, and is named."""

import json
from pathlib import Path

import pytest

from train.run.metrics_file import METRICS, lines_text, parse_metrics, read_metrics, rewind_metrics

ROWS = [{"step": step, "loss": step / 8} for step in range(9)]
LINES = [json.dumps(row).encode() for row in ROWS]


def write(folder: Path, lines: list[bytes], end: bytes = b"\n") -> Path:
    (folder / METRICS).write_bytes(b"\n".join(lines) + end)
    return folder / METRICS


@pytest.mark.parametrize(
    "line",
    [
        *(LINES[3][:9], LINES[3] + LINES[4], b"\0" * 20, b'{"step": 3, "\xff": 1}', b"null", b"3", b'{"loss": 1}'),
        *(b'{"step": "3"}', b'{"step": null}', b"[]", b"x"),
    ],
)
def test_a_damaged_line_costs_that_line(tmp_path: Path, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """The file as it was is kept beside the one that the run goes on with."""
    file = write(tmp_path, [*LINES[:3], line, *LINES[4:]])
    before, rest = file.read_bytes(), ROWS[:3] + ROWS[4:]
    assert read_metrics(tmp_path) == read_metrics(tmp_path, clock=False) == rest
    assert capsys.readouterr().out.splitlines() == [f"{file}: line 4 is damaged and left out"] * 2
    rewind_metrics(file, 6)
    assert capsys.readouterr().out == (
        f"{file}: line 4 is damaged and left out; the file as it was is {file}.damaged\n"
    )
    assert read_metrics(tmp_path) == rest[:-2]
    assert Path(f"{file}.damaged").read_bytes() == before
    rewind_metrics(file, 6)  # once is enough
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 2


def test_what_a_kill_leaves_is_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A last line without its end; a step that the run has reached is missed all the same."""
    file = write(tmp_path, LINES[:5] + [LINES[5][:7]], end=b"")
    assert read_metrics(tmp_path) == ROWS[:5]
    rewind_metrics(file, 4)
    assert read_metrics(tmp_path) == ROWS[:5] and capsys.readouterr().out == ""
    file = write(tmp_path, LINES[:5] + [LINES[5][:7]], end=b"")
    rewind_metrics(file, 5)
    assert f"line 6 is damaged and left out; the file as it was is {file}.damaged" in capsys.readouterr().out
    write(tmp_path, [*LINES[:4], b"x", LINES[5]])
    rewind_metrics(file, None)
    assert file.read_bytes() == b"" and Path(f"{file}.damaged1").is_file()


def test_lines_of_all_systems_and_none(tmp_path: Path) -> None:
    file = write(tmp_path, [line + b"\r" for line in LINES] + [b"", b"  "])
    assert parse_metrics(file) == (ROWS, [], [])
    assert parse_metrics(tmp_path / "none.jsonl") == ([], [], [])
    assert lines_text([3]) == "line 3 is" and lines_text([1, 2]) == "lines 1, 2 are"
    assert lines_text([*range(1, 9)]) == "lines 1, 2, 3, 4, 5 and 3 more are"
