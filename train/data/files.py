"""Reads rows from local files, as they are: JSON Lines, a JSON array or CSV (all also in gzip), Arrow or parquet.

The name says what a file holds, and its first bytes must agree: what is something else is named in the error.
`glob:PATTERN` stands for the files that match, in the order of their names; every other name is a file's as it is.
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from train.data.arrow import is_saved, read_arrow, read_parquet, read_saved
from train.data.sheets import SHEETS, is_sheet, read_sheet

_Row = dict[str, Any]

UNDERSTOOD = "JSON Lines or a JSON array (.jsonl, .json; .gz too), CSV (.csv), Arrow (.arrow) or parquet (.parquet)"
GLOB = "glob:"
_ENDINGS = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", *SHEETS, ".arrow", ".parquet")
_OTHER_ENDINGS = (".parquet.gz", ".arrow.gz", ".txt", ".xlsx", ".zip", ".zst")
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)?"
_TEXT, _GZIP, _PARQUET, _ARROW = "plain text", "gzip", "parquet", "an Arrow file"
_HEAD = 512  # bytes by which a file's content is told

_MAGIC = (  # how files begin, and what they are; the first that fits
    (b"PAR1", _PARQUET),
    (b"\x1f\x8b", _GZIP),
    (b"ARROW1", _ARROW),
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


def fills_with_nulls(source: str) -> bool:
    """Returns whether rows may have nulls for fields that others have: all of a schema's, as Arrow has them."""
    if not is_local(source) or Path(source).is_dir():
        return True
    return any(name.lower().endswith((".parquet", ".arrow")) for name in file_names(source))


def file_names(source: str) -> list[str]:
    """Returns the names of a local source's files: those that match `glob:PATTERN`, sorted, or the one that is named.

    Raises:
      FileNotFoundError: no file matches.
    """
    if not source.startswith(GLOB) or Path(source).exists():
        return [source]
    names = sorted(name for name in glob.glob(source.removeprefix(GLOB), recursive=True) if not Path(name).is_dir())
    if not names:
        raise FileNotFoundError(f"{source}: no file matches the pattern; expected one such as glob:data/*.jsonl")
    return names


def read_files(source: str, split: str = "train") -> list[_Row]:
    """Reads the rows of a local source: a file, the files of a pattern, or a directory that `datasets` has saved.

    Args:
      split: of a saved data set with several.

    Raises:
      FileNotFoundError: no such file, or none that matches.
      ValueError: see `read_file`.
    """
    if source.strip() and Path(source).is_dir() and is_saved(Path(source)):
        return read_saved(Path(source), split)
    return [row for name in file_names(source) for row in read_file(name)]


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
    kinds = {".parquet": _PARQUET, ".arrow": _ARROW, ".gz": _GZIP}
    expected = kinds.get(Path(name).suffix, _TEXT)
    if content == expected == _GZIP:
        with gzip.open(path, "rb") as unpacked:
            content, expected = _content(unpacked.read(_HEAD)), _TEXT
    if content != expected:
        renamed = content in (_PARQUET, _GZIP, _TEXT, _ARROW)
        hint = "; is its name's ending right?" if renamed else ""
        raise ValueError(f"{path}: expected {expected}, as the name says, got {content}{hint}")
    readers = {_PARQUET: read_parquet, _ARROW: read_arrow}
    return readers.get(expected) or _decoded(read_sheet if is_sheet(name) else _read_json)


def _other_format(path: Path, content: str) -> str:
    if content != _TEXT:
        return f"got {content}"
    return f"got text in a file {path.suffix or 'without an ending'}; if it is JSON Lines, name it .jsonl"


def _content(head: bytes) -> str:
    """Returns what a file is, by its first bytes."""
    if head[:4] == b"\xff" * 4 and 0 < (size := int.from_bytes(head[4:8], "little")) < 2**31 and size % 8 == 0:
        return _ARROW  # a stream: a mark, and the length of the message that follows
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, name in _MAGIC:
        if head.startswith(start) or text.startswith(start):
            return name
    if b"\x00" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        return "text in UTF-16: convert it to UTF-8" if abs(even - odd) > len(head) // 4 else "binary data"
    return _TEXT


def _decoded(read: Callable[[Path], list[_Row]]) -> Callable[[Path], list[_Row]]:
    """Returns a reader of UTF-8 text that says where a file is none."""

    def read_text(path: Path) -> list[_Row]:
        try:
            return read(path)
        except UnicodeDecodeError:  # says where in a piece of the file, not where in the file
            with _opener(path)(path, "rb") as lines:
                raise ValueError(f"{path}: {_first_undecodable(lines)}; expected UTF-8: convert the file") from None

    return read_text


def _opener(path: Path) -> Callable[..., Any]:
    return gzip.open if path.name.lower().endswith(".gz") else open


def _read_json(path: Path) -> list[_Row]:
    """Reads objects, one on each line or all in one array."""
    rows: list[_Row] = []
    with _opener(path)(path, "rt", encoding="utf-8-sig") as lines:  # skips the byte-order mark of Windows' programs
        for number, line in enumerate(lines, 1):
            if not rows and line.lstrip().startswith("["):
                return _array_rows(path, number, line, lines.read())
            if line.strip():
                rows.append(_row(path, number, line))
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
