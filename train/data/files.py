"""Reads rows from one local file, as it is: JSON Lines or a JSON array (both also in gzip), or parquet.

The name says what a file holds, and its first bytes must agree: what is something else is named in the error.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_Row = dict[str, Any]

UNDERSTOOD = "JSON Lines or a JSON array (.jsonl, .json; .gz too) or parquet (.parquet)"
_ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
_OTHER_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet.gz", ".arrow", ".txt", ".xlsx", ".zip", ".zst")
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?"
_TEXT, _GZIP, _PARQUET = "plain text", "gzip", "parquet"
_HEAD = 512  # bytes by which a file's content is told

_MAGIC = (  # how files begin, and what they are; the first that fits
    (b"PAR1", _PARQUET),
    (b"\x1f\x8b", _GZIP),
    (b"ARROW1", "an Arrow file"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
    (b"SQLite format 3", "an SQLite database"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: fetch that with git lfs pull"),
    (b"<", "a web page or XML, not data: was it downloaded from the right address?"),
    (b"\xff\xfe\x00\x00", "text in UTF-32"),
    (b"\xff\xfe", "text in UTF-16, as PowerShell writes it: convert it to UTF-8"),
    (b"\xfe\xff", "text in UTF-16: convert it to UTF-8"),
)


def is_local(source: str) -> bool:
    """Returns whether a source of rows can only be a file here; otherwise it is a data set's name on the Hub.

    A directory here does not hide a data set of its name, unless it holds data itself.
    """
    path = Path(source)
    if source.lower().endswith((*_ENDINGS, *_OTHER_ENDINGS)) or not re.fullmatch(_HUB_NAME, source):
        return True
    return path.is_file() or (path.is_dir() and bool(_data_files(path)))


def _data_files(directory: Path) -> list[Path]:
    """Returns the data files in a directory and the directories in it."""
    files = [*directory.glob("*"), *directory.glob("*/*")]
    return sorted(file for file in files if file.name.lower().endswith((*_ENDINGS, *_OTHER_ENDINGS)) and file.is_file())


def read_file(source: str) -> list[_Row]:
    """Reads the rows of a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a directory, a file of another format than its name says, or one that cannot be read.
    """
    if not _is_utf8(source):
        raise ValueError(f"{source!r}: this name is not UTF-8; rename the file")
    if not source.strip():
        raise ValueError(f"expected the name of a file or of a data set on the Hub, got {source!r}")
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source}: is a directory{_examples(path)}; expected a file of {UNDERSTOOD}")
    if not path.exists():
        home = " (~ is a shell's: write the whole path)" if source.startswith("~") else ""
        raise FileNotFoundError(f"{source}: no such file{home}; expected {UNDERSTOOD}, or a data set's name on the Hub")
    if not path.is_file():
        raise ValueError(f"{source}: is a pipe or a device; expected a file, which can be read again")
    try:
        return _reader(path)(path)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{source}: cannot be read ({reason}); was it downloaded whole?") from error


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _examples(directory: Path) -> str:
    files = _data_files(directory)
    return f" with {files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}" if files else " without data files"


def _reader(path: Path) -> Callable[[Path], list[_Row]]:
    """Returns the function that reads a file; refuses a name that is not understood, or that its content belies."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    name, content = path.name.lower(), _content(head)
    if not head:
        raise ValueError(f"{path}: expected at least one row, got an empty file")
    if not name.endswith(_ENDINGS):
        raise ValueError(f"{path}: expected {UNDERSTOOD}, {_other_format(path, content)}")
    expected = _PARQUET if name.endswith(".parquet") else _GZIP if name.endswith(".gz") else _TEXT
    if content == expected == _GZIP:
        with gzip.open(path, "rb") as unpacked:
            content, expected = _content(unpacked.read(_HEAD)), _TEXT
    if content != expected:
        renamed = content in (_PARQUET, _GZIP, _TEXT)
        hint = "; is its name's ending right?" if renamed else ""
        raise ValueError(f"{path}: expected {expected}, as the name says, got {content}{hint}")
    return _read_parquet if expected == _PARQUET else _read_json


def _other_format(path: Path, content: str) -> str:
    if content != _TEXT:
        return f"got {content}"
    if path.name.lower().endswith((".csv", ".tsv")):
        separator = ', sep="\\t"' if path.name.lower().endswith(".tsv") else ""
        convert = f'pandas.read_csv(IN{separator}).to_json(OUT, orient="records", lines=True)'
        return f"got {path.suffix}; {convert} converts it"
    return f"got text in a file {path.suffix or 'without an ending'}; if it is JSON Lines, name it .jsonl"


def _content(head: bytes) -> str:
    """Returns what a file is, by its first bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, name in _MAGIC:
        if head.startswith(start) or text.startswith(start):
            return name
    if b"\x00" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        return "text in UTF-16: convert it to UTF-8" if abs(even - odd) > len(head) // 4 else "binary data"
    return _TEXT


def _read_json(path: Path) -> list[_Row]:
    """Reads objects, one on each line or all in one array."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    rows: list[_Row] = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:  # skips the byte-order mark of Windows' programs
            for number, line in enumerate(lines, 1):
                if not rows and line.lstrip().startswith("["):
                    return _array_rows(path, number, line, lines.read())
                if line.strip():
                    rows.append(_row(path, number, line))
    except UnicodeDecodeError:  # says where in a piece of the file, not where in the file
        with opener(path, "rb") as lines:
            raise ValueError(f"{path}: {_first_undecodable(lines)}; expected UTF-8: convert the file") from None
    return rows


def _first_undecodable(lines: Iterable[bytes]) -> str:
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return f"line {number} has the byte 0x{line[error.start]:02x} at its place {error.start + 1}"
    return "is cut off in a character"


def _row(path: Path, number: int, line: str) -> _Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also of numbers with too many digits
        whole = "; expected a whole object on each line, or one array of objects" if line.strip() == "{" else ""
        raise ValueError(f"{path}: line {number} is not JSON ({error}), but {line.strip()[:40]!r}{whole}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}: line {number}: expected a JSON object, got {type(row).__name__}")
    return row


def _array_rows(path: Path, number: int, line: str, rest: str) -> list[_Row]:
    """Returns the rows of an array that begins on line `number`."""
    try:
        rows = json.loads(line + rest)
    except (ValueError, RecursionError) as error:
        if rest.strip() and line.rstrip().endswith("]"):  # an array on each line
            _row(path, number, line)
        raise ValueError(f"{path}: begins as a JSON array and is none ({error})") from error
    for count, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: item {count} of the array: expected a JSON object, got {type(row).__name__}")
    return list(rows)


def _read_parquet(path: Path) -> list[_Row]:
    import pyarrow
    import pyarrow.parquet

    rows: list[_Row] = []
    try:
        with path.open("rb") as file:  # an open file: pyarrow takes parts of a path, such as lr=1, for columns
            table = pyarrow.parquet.ParquetFile(file)
            schema = table.schema_arrow
            for batch in table.iter_batches():
                rows += batch.to_pylist()
        for field in schema:
            if (decode := _json_decoder(field.type)) is not None:
                for row in rows:
                    row[field.name] = decode(row[field.name])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as parquet ({reason}); was it downloaded whole?") from error
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"{path}: has two columns {twice[0]!r}; expected each once")
    return rows


def _json_decoder(kind: Any) -> Callable[[Any], Any] | None:
    """Returns what decodes the values of an Arrow type that has JSON texts in it; None if it has none."""
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _json_decoder(kind.value_type)
        return inner and (lambda value: None if value is None else [inner(item) for item in value])
    if types.is_struct(kind):
        decoders = {field.name: decode for field in kind if (decode := _json_decoder(field.type)) is not None}
        if decoders:
            return lambda value: value and value | {name: decode(value[name]) for name, decode in decoders.items()}
    return None
