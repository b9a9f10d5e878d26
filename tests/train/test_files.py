"""Laws of reading local files: the named file as it is, whatever its name; another format is named in one line."""

import bz2
import datetime
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from train.data.rows import load_rows

ROWS: list[dict[str, Any]] = [{"prompt": "Good food", "wanted": 1}, {"prompt": "Schön – sí [1]", "wanted": None}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
JSONL = "\n".join(LINES) + "\n"


QUOTED = 'prompt,wanted\nGood food,1\n"Schön – sí [1]",\n'


def arrow_of(rows: list[dict[str, Any]], *, stream: bool = False, chunk: int | None = None) -> bytes:
    """Rows as an Arrow file or stream, in batches of `chunk` rows."""
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return sink.getvalue().to_pybytes()


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
        ("rows.csv", QUOTED),
        ("ROWS.CSV", "\ufeff" + QUOTED.replace("\n", "\r\n")),
        ("no_end.csv", QUOTED.rstrip()),
        ("blank.csv", "\n" + QUOTED.replace("\n", "\n\n")),
        ("index.csv", ',prompt,wanted\n0,Good food,1\n1,"Schön – sí [1]",\n'),
        ("rows.csv.gz", gzip.compress(QUOTED.encode())),
        ("rows.tsv", QUOTED.replace(",", "\t")),
        ("rows.arrow", arrow_of(ROWS)),
        ("batches.arrow", arrow_of(ROWS, chunk=1)),
        ("stream.arrow", arrow_of(ROWS, stream=True, chunk=1)),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_every_form_gives_the_same_rows(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert load_rows(name) == ROWS


@pytest.mark.parametrize("ending", ["jsonl", "csv", "arrow", "parquet", "PARQUET"])
@pytest.mark.parametrize("folder", ["a b", "run[12]", "lr[1e-6]", "a*", "a?", "~x", "%41", "a@5", "é", "lr=1", "#"])
def test_the_file_that_is_named_and_no_other(folder: str, ending: str, tmp_path: Path) -> None:
    for other in ("run1", "ab", "A", "x"):  # what the names above would be as patterns, escapes or homes
        Path(other).mkdir(exist_ok=True)
        (Path(other) / f"rows.{ending}").write_text("{}")
    file = Path(folder) / f"rows.{ending}"
    file.parent.mkdir(exist_ok=True)
    content = {"jsonl": JSONL.encode(), "csv": QUOTED.encode(), "arrow": arrow_of(ROWS)}
    file.write_bytes(content.get(ending) or parquet_of(tmp_path / "x.parquet", ROWS))
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


@pytest.mark.parametrize("form", ["parquet", "file", "stream"])
def test_values_of_arrow(form: str, tmp_path: Path) -> None:
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
    table, name = pa.table(columns), "rows.parquet" if form == "parquet" else "rows.arrow"
    if form == "parquet":
        pq.write_table(table, name)
    else:
        with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(name, table.schema) as writer:
            writer.write_table(table)
    first, second, third = load_rows(name)
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


def test_cells_of_csv_are_text_unless_a_column_is_all_numbers() -> None:
    long = "x" * 200_000
    lines = [
        "prompt,a,b,c,d,e,f,g",
        '"a, ""b""\r\nc",1,1.50,007,yes,,-2e3,"[1, 2]"',
        f'{long},-3,2,8,,,0,"<|im_end|>"',
        '5,,3,9,no,"",1,x',
    ]
    Path("rows.csv").write_text("\n".join(lines), newline="")
    first, second, third = load_rows("rows.csv")
    assert first == {
        "prompt": 'a, "b"\r\nc', "a": 1, "b": 1.5, "c": "007", "d": "yes", "e": None, "f": -2000.0, "g": "[1, 2]"
    }  # fmt: skip
    assert second["prompt"] == long and [second[name] for name in "abc"] == [-3, 2, "8"]
    assert third == {"prompt": "5", "a": None, "b": 3, "c": "9", "d": "no", "e": None, "f": 1, "g": "x"}
    assert {type(row["a"]) for row in (first, second)} == {int}
    Path("sums.csv").write_text("question,completion,margin\n1,2,0.5\n3,4,1\n")
    rows = load_rows("sums.csv", columns={"prompt": "question"})
    assert rows[0] == {"prompt": "1", "completion": "2", "margin": 0.5}, "a prompt and an answer are text"


def test_a_pattern_is_its_files_in_order_where_it_is_said_to_be_one() -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "a/10.jsonl", "a/2.csv", "[a]/1.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        row = {"prompt": name, "n": len(name)}
        Path(name).write_text(json.dumps(row) + "\n" if name.endswith("l") else f"prompt,n\n{name},{len(name)}\n")
    Path("a/folder.jsonl").mkdir()

    def prompts(source: str) -> list[str]:
        return [row["prompt"] for row in load_rows(source)]

    assert prompts("glob:a/*.jsonl") == ["a/1.jsonl", "a/10.jsonl"]
    assert prompts("glob:**/*.jsonl") == ["[a]/1.jsonl", "a/1.jsonl", "a/10.jsonl", "b/2.jsonl"]
    assert prompts("[a]/1.jsonl") == ["[a]/1.jsonl"] and prompts("glob:[a]/1.jsonl") == ["a/1.jsonl"]
    assert load_rows("glob:*/2.csv") == [{"prompt": "a/2.csv", "n": 7}]
    with pytest.raises(FileNotFoundError, match=r"^glob:c/\*.jsonl: no file matches the pattern"):
        load_rows("glob:c/*.jsonl")
    Path("glob:x.jsonl").write_text(json.dumps({"prompt": "literal"}))
    assert prompts("glob:x.jsonl") == ["literal"]
    Path("a/read.me").write_text("x")
    with pytest.raises(ValueError, match=r"^a/read.me: expected JSON Lines .* got text in a file .me"):
        load_rows("glob:a/*.*e*")


def test_a_data_set_that_was_saved_is_read_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HOME", str(Path.cwd()))
    rows = [{"prompt": f"Number {i}.", "turns": [{"role": "user", "content": "Hi"}]} for i in range(7)]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk("whole", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.select([4, 2])).save_to_disk("parts")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_rows("whole") == load_rows("parts") == load_rows("parts/train") == rows
    assert load_rows("parts", "test") == [rows[4], rows[2]]
    with pytest.raises(ValueError, match="^parts: has no split 'validation'; expected one of train, test"):
        load_rows("parts", "validation")
    Path("whole/data-00001-of-00003.arrow").unlink()
    with pytest.raises(ValueError, match="^whole: has no data-00001-of-00003.arrow, which its state.json names; was"):
        load_rows("whole")
    Path("parts/test/state.json").write_text("{}")
    with pytest.raises(ValueError, match="^parts/test/state.json: cannot be read .KeyError: '_data_files'.*copied"):
        load_rows("parts", "test")


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "short.csv": ("prompt,wanted\na,1\nb\n", "the row that ends in line 3 has 1 cells, the first line 2"),
    "long.csv": ('prompt,wanted\n"a\n",1\nb,2,3\n', "the row that ends in line 4 has 3 cells"),
    "open.csv": ('prompt\n"a\nb\n', "line 3 is no row of a table .unexpected end of data"),
    "quote.csv": ('prompt\n"a"b\n', "line 2 is no row of a table .*double quotes"),
    "semicolons.csv": ("prompt;wanted\na;1\n", "expected ',' between the cells, as the name says, got ';'"),
    "commas.tsv": ("prompt,wanted\na,1\n", r"expected '\\t' between the cells"),
    "twice.csv": ("prompt,prompt\na,b\n", "has two columns 'prompt'"),
    "head.csv": ("prompt,wanted\n", "expected at least one row, got an empty data set"),
    "latin.csv": ("prompt\nSchön\n".encode("latin-1"), "line 2 has the byte 0xf6 at its place 4; expected UTF-8"),
    "cut.csv.gz": (gzip.compress(QUOTED.encode())[:-9], "cannot be read .*; was it downloaded whole"),
    "parquet.csv": (b"PAR1", "expected plain text, as the name says, got parquet; is its name's ending right"),
    "not.arrow": (JSONL, "expected an Arrow file, as the name says, got plain text; is its name's ending right"),
    "cut.arrow": (arrow_of(ROWS)[:-9], "cannot be read as Arrow .*; was it downloaded whole"),
    "cut_stream.arrow": (arrow_of(ROWS, stream=True)[:-20], "cannot be read as Arrow .*; was it downloaded whole"),
    "stream.jsonl": (arrow_of(ROWS, stream=True), "expected plain text, as the name says, got an Arrow file"),
    "empty.arrow": (b"", "expected at least one row, got an empty file"),
    "none.arrow": (arrow_of(ROWS[:0]), "expected at least one row, got an empty data set"),
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
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, "rows.parquet")
    with pa.ipc.new_file("rows.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(ValueError, match=f"{name}: has two columns 'a'"):
            load_rows(name)
