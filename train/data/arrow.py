"""Reads rows of Arrow's formats: parquet, Arrow files and streams, and the directories that `datasets` saves.

Needs neither the library `datasets` nor its cache.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_Row = dict[str, Any]
_SAVED, _SAVED_SPLITS = (
    "state.json",
    "dataset_dict.json",
)  # beside one data set, and several


def read_parquet(path: Path) -> list[_Row]:
    """Reads a parquet file.

    Raises:
      ValueError: a damaged file, or one with two columns of one name.
    """
    import pyarrow.parquet

    def read() -> tuple[Any, Iterable[Any]]:
        table = pyarrow.parquet.ParquetFile(file)
        return table.schema_arrow, table.iter_batches()

    with path.open("rb") as file:  # an open file: pyarrow takes parts of a path, such as lr=1, for columns
        return _rows(path, "parquet", read)


def read_arrow(path: Path) -> list[_Row]:
    """Reads an Arrow file or an Arrow stream, which `datasets` caches and saves.

    Raises:
      ValueError: a damaged file, or one with two columns of one name.
    """
    import pyarrow.ipc

    def read() -> tuple[Any, Iterable[Any]]:
        if file.read(6) != b"ARROW1":
            file.seek(0)
            stream = pyarrow.ipc.open_stream(file)
            return stream.schema, stream
        table = pyarrow.ipc.open_file(file)
        return table.schema, map(table.get_batch, range(table.num_record_batches))

    with path.open("rb") as file:
        return _rows(path, "Arrow", read)


def _rows(path: Path, kind: str, read: Callable[[], tuple[Any, Iterable[Any]]]) -> list[_Row]:
    """Returns the rows of `read() -> schema, batches`, their JSON decoded."""
    import pyarrow

    rows: list[_Row] = []
    try:
        schema, batches = read()
        for batch in batches:
            rows += batch.to_pylist()
        for field in schema:
            if (decode := _json_decoder(field.type)) is not None:
                for row in rows:
                    row[field.name] = decode(row[field.name])
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as {kind} ({reason}); was it downloaded whole?") from error
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


def is_saved(directory: Path) -> bool:
    """Returns whether `datasets` has saved a data set, or several splits of one, in a directory (`save_to_disk`)."""
    return any((directory / name).is_file() for name in (_SAVED, _SAVED_SPLITS))


def read_saved(directory: Path, split: str) -> list[_Row]:
    """Reads a data set that `datasets` has saved; of several splits the one that is named.

    Raises:
      ValueError: no such split, or a damaged or missing file.
    """
    if (directory / _SAVED_SPLITS).is_file():
        splits = _names(directory / _SAVED_SPLITS, lambda saved: saved["splits"])
        if split not in splits:
            raise ValueError(f"{directory}: has no split {split!r}; expected one of {', '.join(splits)}")
        directory = directory / split
    files = _names(directory / _SAVED, lambda saved: [part["filename"] for part in saved["_data_files"]])
    if missing := [name for name in files if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: has no {missing[0]}, which its {_SAVED} names; was it copied whole?")
    return [row for name in files for row in read_arrow(directory / name)]


def _names(file: Path, choose: Callable[[Any], list[str]]) -> list[str]:
    """Returns the names that a file of `datasets` lists."""
    try:
        return list(choose(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: cannot be read ({type(error).__name__}: {error}), so the data set in its directory cannot; was "
            f"it copied whole?"
        ) from error
