"""Laws of reading local files: the named file as it is, whatever its name; another format is named in one line."""

import bz2
import datetime
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.data.rows import load_rows

ROWS: list[dict[str, Any]] = [{"prompt": "Good food", "wanted": 1}, {"prompt": "Schön – sí [1]", "wanted": None}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
JSONL = "\n".join(LINES) + "\n"


def parquet_of(file: Path, rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.read_bytes()


@pytest.fixture(autouse=True)
def without_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Local files need no data set library, no cache and no home."""
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr("train.data.rows._read_hub", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", JSONL),
        ("ROWS.JSONL", JSONL),
        ("rows.ndjson", JSONL),
        ("rows.json", JSONL),
        ("array.json", json.dumps(ROWS)),
        ("array.jsonl", "\n" + json.dumps(ROWS, indent=2)),
        ("bom.jsonl", "\ufeff" + JSONL),
        ("bom_array.json", "\ufeff" + json.dumps(ROWS)),
        ("crlf.jsonl", JSONL.replace("\n", "\r\n")),
        ("no_end.jsonl", JSONL.rstrip()),
        ("blank.jsonl", "\n\n" + "\n \n".join(LINES) + "\n\n"),
        ("rows.jsonl.gz", gzip.compress(JSONL.encode())),
        ("Array.JSON.GZ", gzip.compress(json.dumps(ROWS).encode())),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_every_form_gives_the_same_rows(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load_rows(name) == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "PARQUET"])
@pytest.mark.parametrize("folder", ["a b", "run[12]", "lr[1e-6]", "a*", "a?", "~x", "%41", "a@5", "é", "lr=1", "#"])
def test_the_file_that_is_named_and_no_other(folder: str, ending: str, tmp_path: Path) -> None:
    for other in ("run1", "ab", "A", "x"):  # what the names above would be as patterns, escapes or homes
        Path(other).mkdir(exist_ok=True)
        (Path(other) / f"rows.{ending}").write_text("{}")
    file = Path(folder) / f"rows.{ending}"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(JSONL.encode() if ending == "jsonl" else parquet_of(tmp_path / "x.parquet", ROWS))
    assert load_rows(str(file)) == load_rows(str(file.absolute())) == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_file_is_read_anew_whatever_its_time(ending: str) -> None:
    for rows in ([{"text": "old"}], [{"text": "new"}]):
        file = Path(f"rows.{ending}")
        file.write_text(json.dumps(rows[0]))
        if ending == "parquet":
            parquet_of(file, rows)
        os.utime(file, (315532800, 315532800))
        assert load_rows(str(file)) == rows


def test_values_of_parquet(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    when = datetime.datetime(2020, 1, 1, 3)
    messages = [{"role": "user", "content": "Warm?"}, {"role": "assistant", "content": None, "calls": [call]}]
    columns = {
        "messages": [messages, None, []],
        "when": pa.array([when, None, when], pa.timestamp("us")),
        "label": pa.array(["x", None, "y"]).dictionary_encode(),
        "large": pa.array(["x", None, "y"], pa.large_string()),
        "pair": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
        "half": pa.array([0.5, None, float("inf")], pa.float32()),
        "bytes": [b"\xff", None, b""],
        "json": pa.array(['{"a": [1]}', None, "2"], pa.json_()),
        "jsons": pa.ListArray.from_arrays(pa.array([0, None, 2, 2]), pa.array(['{"a": 1}', None], pa.json_())),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    first, second, third = load_rows("rows.parquet")
    filled = [messages[0] | {"calls": None}, messages[1]]  # a field that is missing in one place only is null
    assert first == {
        "messages": filled,
        "when": when,
        "label": "x",
        "large": "x",
        "pair": [1, 2],
        "half": 0.5,
        "bytes": b"\xff",
        "json": {"a": [1]},
        "jsons": [{"a": 1}, None],
    }
    assert set(second) == set(columns) and not any(value is not None for value in second.values())
    assert third["messages"] == third["jsons"] == [] and third["json"] == 2


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "rows.csv": ("prompt,wanted\na,1\n", "got .csv; pandas.read_csv"),
    "csv.jsonl": ("prompt,wanted\na,1\n", "line 1 is not JSON .*, but 'prompt,wanted'"),
    "rows.txt": (JSONL, "got text in a file .txt; if it is JSON Lines, name it .jsonl"),
    "rows": (JSONL, "got text in a file without an ending"),
    "powershell.jsonl": (JSONL.encode("utf-16"), "got text in UTF-16, as PowerShell writes it: convert it to UTF-8"),
    "utf_16.jsonl": (JSONL.encode("utf-16-be"), "got text in UTF-16"),
    "utf_16.jsonl.gz": (gzip.compress(JSONL.encode("utf-16")), "got text in UTF-16"),
    "latin.jsonl": (JSONL.encode("latin-1", "replace"), "line 2 has the byte 0xf6 at its place 16; expected UTF-8"),
    "not.jsonl.gz": (JSONL, "expected gzip, as the name says, got plain text"),
    "packed.jsonl": (gzip.compress(JSONL.encode()), "expected plain text, as the name says, got gzip"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode())[:-9], "cannot be read .*; was it downloaded whole"),
    "not.parquet": (JSONL, "expected parquet, as the name says, got plain text"),
    "rows.parquet.gz": (gzip.compress(b"PAR1"), "expected JSON Lines .* or parquet .*, got gzip"),
    "cut.parquet": (b"PAR1 and no end", "cannot be read as parquet"),
    "parquet.jsonl": (b"PAR1", "got parquet"),
    "pointer.parquet": ("version https://git-lfs.github.com/spec/v1\n", "got a pointer of Git LFS"),
    "page.jsonl": ("<!DOCTYPE html>", "got a web page"),
    "rows.jsonl.bz2": (bz2.compress(JSONL.encode()), "got compressed by bzip2"),
    "zeros.jsonl": (b"\0" * 64, "got binary data"),
    "empty.parquet": ("", "expected at least one row, got an empty file"),
    "blank.jsonl": ("\n \n", "expected at least one row, got an empty data set"),
    "lists.jsonl": ("[1]\n[2]\n", "line 1: expected a JSON object, got list"),
    "numbers.json": ("[1, 2]", "item 1 of the array: expected a JSON object, got int"),
    "cut.json": (json.dumps(ROWS)[:-5], "begins as a JSON array and is none"),
    "pretty.json": (json.dumps(ROWS[0], indent=1), "line 1 is not JSON .* or one array of objects"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_met_is_named(name: str) -> None:
    content, words = REFUSED[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{name}: .*{words}") as caught:
        load_rows(name)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_named() -> None:
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe.jsonl")
    for name, words in {
        "folder.jsonl": "is a directory without data files",
        "pipe.jsonl": "is a pipe or a device",
        "\udcff.jsonl": "is not UTF-8; rename the file",
        "": "expected the name of a file or of a data set on the Hub, got ''",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_rows(name)
    for name in ("none.JSONL", "none.csv", "./none", "a b/c", "é/a", "none@1", "a%20b", "s3://bucket/rows.jsonl"):
        with pytest.raises(FileNotFoundError, match="no such file; expected JSON Lines"):
            load_rows(name)
    with pytest.raises(FileNotFoundError, match="no such file .~ is a shell's: write the whole path.; expected"):
        load_rows("~/rows.jsonl")


def test_a_column_twice_is_refused() -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), "rows.parquet")
    with pytest.raises(ValueError, match="rows.parquet: has two columns 'a'"):
        load_rows("rows.parquet")
