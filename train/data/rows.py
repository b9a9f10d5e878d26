"""Reads rows of data from a file or the Hub, checks and renames their columns, and selects rows by seed."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.messages import check_messages, check_text
from train.data.files import file_names, is_local, read_files
from train.data.sheets import is_sheet, with_numbers

Row = dict[str, Any]


def load_rows(
    source: str, split: str = "train", columns: Mapping[str, str] | None = None, setting: str = "data.columns"
) -> list[Row]:
    """Reads the rows of files (see `train.data.files`), or of a data set on the Hub.

    Args:
      columns: new name -> name in the data, for columns that are renamed.
      setting: the user's name for `columns`, for an error.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, no rows at all, or a row without a column that is to be renamed.
    """
    local = is_local(source)
    rows = read_files(source, split) if local else _read_hub(source, split)
    if not rows:
        raise ValueError(f"{source}: expected at least one row, got an empty data set")
    rows = rename_columns(rows, source, columns, setting) if columns else rows
    return with_numbers(rows) if local and all(map(is_sheet, file_names(source))) else rows


def rename_columns(rows: Sequence[Row], source: str, columns: Mapping[str, str], setting: str) -> list[Row]:
    """Renames columns (new name -> name in the data); a column that had the new name already is dropped."""
    for number, row in enumerate(rows, 1):
        for ours, theirs in columns.items():
            if theirs not in row:
                raise ValueError(
                    f"{source}: row {number} has no {theirs!r}, which {setting} takes as {ours!r}; its columns are "
                    f"{', '.join(row) or '(none)'}"
                )
    renamed = set(columns.values())
    return [
        {name: value for name, value in row.items() if name not in renamed}
        | {ours: row[theirs] for ours, theirs in columns.items()}
        for row in rows
    ]


def require_columns(rows: Sequence[Row], source: str, *columns: str, setting: str = "the config") -> None:
    """Refuses data in which a row lacks a column, or has neither text nor chat messages in it.

    Args:
      setting: where the user names the columns, for an error.

    Raises:
      ValueError: the first such row.
    """
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) in (None, "", []):
                raise ValueError(
                    f"{source}: row {number} has no {column!r}; its columns are {', '.join(row) or '(none)'}; "
                    f"name the right one in {setting} or mend the row"
                )
            try:
                check_text(row[column]) if isinstance(row[column], str) else check_messages(row[column])
            except ValueError as error:
                raise ValueError(f"{source}: row {number}: {column!r}: {error}") from error


def is_number(value: Any, largest: float = sys.float_info.max) -> bool:
    """Whether a value of a row is a number, no boolean, and finite; JSON has integers that no float can hold."""
    return type(value) in (int, float) and -largest <= value <= largest


def batch_indices(size: int, count: int, seed: int, step: int, attempt: int = 0) -> list[int]:
    """Returns the `count` row indices of batch number `step`; each epoch is a new permutation of the `size` rows.

    Each attempt has permutations of its own.
    """
    return permuted(size, range(step * count, (step + 1) * count), seed, attempt)


def permuted(size: int, positions: Sequence[int], seed: int, attempt: int = 0, source: int = 0) -> list[int]:
    """Returns the row indices at positions of an endless stream, each epoch of which is a permutation of `size` rows.

    Each attempt, and each of several sources, has permutations of its own; trailing zeros change no key.
    """
    keys = {epoch: [seed, epoch, attempt, source] for epoch in {i // size for i in positions}}
    epochs = {epoch: np.random.default_rng(key).permutation(size) for epoch, key in keys.items()}
    return [int(epochs[i // size][i % size]) for i in positions]


def hold_out(count: int, rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Holds `rows` of `count` rows out: returns the indices that remain and those held out, both sorted.

    Raises:
      ValueError: no row would remain.
    """
    if rows >= count:
        raise ValueError(f"data.validation_rows: expected fewer than the {count} rows that there are, got {rows}")
    held_out = np.random.default_rng(seed).choice(count, rows, replace=False)
    return np.setdiff1d(np.arange(count), held_out).tolist(), np.sort(held_out).tolist()


def sample_indices(count: int, rows: int, seed: int) -> list[int]:
    """Returns the sorted indices of a random sample of `rows` of `count` rows; of all, if there are no more."""
    return hold_out(count, rows, seed)[1] if rows < count else list(range(count))


def _read_hub(source: str, split: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    directory = Path(source).is_dir()  # without data: it does not hide the Hub's data set, as it would for `datasets`
    try:
        return load_dataset(f"hf://datasets/{source}" if directory else source, split=split).to_list()
    except (DatasetNotFoundError, ConnectionError) as error:
        there = " (the directory of that name here has no data in it)" if directory else ""
        raise FileNotFoundError(
            f"{source}: neither a .jsonl or .parquet file nor a data set that the Hub could give "
            f"({type(error).__name__}){there}; check the spelling or the network"
        ) from error
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{source}: the Hub's data set cannot be read: {' '.join(str(error).split())}") from error
