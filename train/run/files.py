"""What a program will write: refuses, before anything is computed, names, places and disks that will not take it.

Files are written atomically.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from models.checkpoint_failures import failure_reason, is_disk_failure
from train.processes import broadcast_from_first
from train.running import WriteError

ROWS_ENDINGS = (".jsonl", ".ndjson", ".json")  # of files of rows, as `train.data.files` reads them back
_BESIDE = (
    ".tmp",
    ".partial",
    ".settings.json",
    ".settings.json.tmp",
)  # ends of names beside a file
_NAME_BYTES = 255  # of each part of a path, on every common file system
_LEAST_ROOM = 2**20  # bytes that must be free where texts are written
_FOR_A_SHELL = r"(~[\w.-]*|\$\w+|\$\{\w+\})/|~$"
_PATTERN = r"[*?]|\[[^/]+\]|\\"  # what Orbax takes for a pattern, and TensorStore for a separator


def check_out(out: str, *others: str, several: bool = False, rows: bool = False) -> None:
    """Refuses an output file that cannot be written, or that would replace a file in use.

    Args:
      others: files that are read or also written; names that are not files, such as a Hub data set's, are allowed.
      several: this may be one of several processes; only process 0 writes.
      rows: the file will be read back as rows, so that its name must say so.

    Raises:
      ValueError: the file is refused.
    """
    _refuse(lambda: _file_problem(out, others, rows), several)


def check_out_directory(out: str, *names: str, others: Sequence[str] = ()) -> None:
    """Refuses a directory in which a program could not write the files `names`; see `check_out`."""
    _refuse(lambda: _name_problem(out) or _first(_file_problem(str(Path(out) / name), others) for name in names), False)


def check_run_directory(out: str, folders: Sequence[str], checkpoints: str) -> None:
    """Refuses a run's directory that cannot be written, or that would replace what is no run.

    Args:
      out: the directory.
      folders: those that the run will make in it.
      checkpoints: the directory of the checkpoints; it may be in a bucket.

    Raises:
      ValueError: the directory is refused.
    """

    def problem() -> str | None:
        directory = Path(out)
        places = [directory / folder for folder in ("", *folders)]
        found = _name_problem(out) or _checkpoints_problem(checkpoints)
        if found is None and "://" not in checkpoints:
            found = _name_problem(checkpoints)
            places.append(Path(checkpoints))
        if found is None and re.search(r"@(\d+|best)$", directory.name):
            found = f"{out}: would be read as a step of {out.rpartition('@')[0]}; choose a name that does not end so"
        if found is None and directory.exists() and not directory.is_dir():
            found = f"{out}: is a file; expected a directory for the run, new or its own"
        return found or _first(_place_problem(place / "x", str(place)) for place in places)

    _refuse(problem, True)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuses a disk that does not have so many bytes left.

    Raises:
      ValueError: there is not enough room.
    """
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise ValueError(
            f"{folder}: {what} takes {decimal(needed)}, but only {decimal(free)} are free there; make room or choose "
            f"another place"
        )


def free_bytes(folder: Path) -> int | None:
    """Returns the bytes that are free where a directory is or will be; None if the file system does not say."""
    total, _, free = shutil.disk_usage(_existing(folder))
    return free if total else None


def _refuse(problem: Any, several: bool) -> None:
    found = broadcast_from_first(problem) if several else problem()
    if found:
        raise ValueError(found)


def _first(problems: Any) -> str | None:
    return next((problem for problem in problems if problem), None)


def _file_problem(out: str, others: Sequence[str], rows: bool = False) -> str | None:
    if problem := _name_problem(out):
        return problem
    file = Path(out)
    if file.is_dir() or out.endswith("/"):
        return f"{out}: is a directory; expected the name of a file to write"
    if file.exists() and not file.is_file():
        return f"{out}: is a pipe or a device; expected the name of a file to write"
    if rows and not out.lower().endswith(ROWS_ENDINGS):
        return f"{out}: expected a name that ends in .jsonl, for rows are written as JSON Lines"
    beside = {file.with_name(file.name + end).resolve(): end for end in ("", *_BESIDE)}
    for other in others:
        if (end := beside.get(Path(other).resolve())) is not None:
            same = "is the same file as" if not end else f"is written by way of {file.name}{end}, which is"
            return f"{out}: {same} {other}, which it would replace; name another file to write"
    return _place_problem(file)


def _name_problem(out: str) -> str | None:
    if not out.strip():
        return f"expected the name of what to write, got {out!r}"
    if any(ord(character) < 32 or "\ud800" <= character <= "\udfff" for character in out):
        return f"{out!r}: has a character in it that is no part of a name, or is not UTF-8; name it otherwise"
    *folders, name = Path(out).absolute().parts
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in (*folders, name + _BESIDE[-1])):
        return f"{out}: a part of it is longer than {_NAME_BYTES - len(_BESIDE[-1])} bytes; choose a shorter name"
    if re.match(r"\w[\w+.-]+:/", out):
        return f"{out}: is an address; expected a name on a disk of this machine"
    if (shells := re.match(_FOR_A_SHELL, out)) and not Path(shells[0]).exists():
        first = shells[0].rstrip("/")
        return f"{out}: {first} means something to a shell alone; write the whole path, or ./{out} if it is a name"
    return None


def _checkpoints_problem(folder: str) -> str | None:
    text = folder if "://" in folder else str(Path(folder).absolute())
    if (character := re.search(_PATTERN, text)) is None:
        return None
    return (
        f"{folder}: checkpoints cannot be kept in a directory with {character[0]!r} in its path, which Orbax takes for "
        f"a pattern; choose another output_dir, or set checkpoint.directory"
    )


def _existing(path: Path) -> Path:
    """Returns the path or the nearest directory above it that exists; a link to nothing exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))


def _place_problem(file: Path, shown: str | None = None) -> str | None:
    """The reason why a file, or its directory, cannot be made; None if it can.

    Args:
      shown: what an error names; default: the file.
    """
    shown = shown or str(file)
    parent = _existing(file.parent)
    if not parent.is_dir():
        what = "a link to nothing" if parent.is_symlink() and not parent.exists() else "a file"
        return f"{shown}: cannot be written, {parent} is {what}; expected a directory there, or another name"
    try:
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError
        with tempfile.TemporaryFile(dir=parent):  # the rights alone do not say whether a file system can be written
            pass
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        return f"{shown}: cannot be written, {parent} does not permit it{reason}; choose another directory"
    if (free := free_bytes(parent)) is not None and free < _LEAST_ROOM:
        return f"{shown}: cannot be written, {parent} has {decimal(free)} left; make room or choose another directory"
    return None


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows to a JSONL file, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(file: Path, text: str) -> None:
    """Writes a file atomically: it is there complete, or not at all, whatever fails, the machine too.

    Raises:
      WriteError: the disk does not take it; the file is as it was.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    with disk_errors(file), _removed_on_failure(temporary):
        with open(temporary, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)


def write_parquet(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns to a parquet file, atomically.

    Raises:
      WriteError: the disk does not take it; nothing is left of it.
    """
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with disk_errors(file), _removed_on_failure(temporary):
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), temporary)
        temporary.replace(file)


@contextlib.contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def disk_errors(place: object) -> Iterator[None]:
    """Names the place if a disk is full, read-only or broken, whatever library raises it.

    Raises:
      WriteError: it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, WriteError) or not is_disk_failure(error):
            raise
        reason = failure_reason(error)
        raise WriteError(
            f"{place}: could not be written ({reason}); make room there or choose another place"
        ) from error
