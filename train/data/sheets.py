"""Reads rows of tables in text: CSV, and TSV with tabs; the first line names the columns.

Cells are separated by commas; one with commas, quotes or line breaks stands in double quotes, which are doubled inside.
An empty cell is null. A column without a name, as pandas writes its index, is left out. Cells are text, unless all
of a column are numbers (`with_numbers`).
"""

import csv
import gzip
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHEETS = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
TEXTS = ("prompt", "completion", "text", "chosen", "rejected")  # columns of text, also where all cells are numbers
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")  # as in JSON: 007 and +1 are text
_MAX_DIGITS = 300  # a longer number is text

_Row = dict[str, Any]


def is_sheet(source: str) -> bool:
    """Returns whether a file's name says that it is a table in text."""
    return source.lower().endswith(SHEETS)


def read_sheet(path: Path) -> list[_Row]:
    """Reads the rows of a table, all cells as text or None.

    Raises:
      ValueError: a broken quotation, a row of another length than the head, or a head that names a column twice.
      UnicodeDecodeError: the file is not UTF-8.
    """
    name = path.name.lower()
    opener = gzip.open if name.endswith(".gz") else open
    separator = "\t" if ".tsv" in name[-7:] else ","
    limit = csv.field_size_limit(sys.maxsize)  # of the module: a long text is no error
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as lines:
            return _read_rows(path, csv.reader(lines, delimiter=separator, strict=True), separator)
    finally:
        csv.field_size_limit(limit)


def _read_rows(path: Path, reader: Any, separator: str) -> list[_Row]:
    rows: list[_Row] = []
    head: list[str] = []
    try:
        for cells in filter(None, reader):  # lines without anything are no rows
            if not head:
                _check_head(path, head := cells, separator)
            elif len(cells) != len(head):
                raise ValueError(
                    f"{path}: the row that ends in line {reader.line_num} has {len(cells)} cells, the first line "
                    f"{len(head)}; expected as many, and double quotes around a cell with commas, tabs or line breaks"
                )
            else:
                rows.append({column: cell or None for column, cell in zip(head, cells, strict=True) if column})
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num} is no row of a table ({error}); expected double quotes around a cell with "
            f"commas, tabs or line breaks, and two for each in it"
        ) from error
    return rows


def _check_head(path: Path, head: Sequence[str], separator: str) -> None:
    if twice := [name for name in head if name and head.count(name) > 1]:
        raise ValueError(f"{path}: has two columns {twice[0]!r}; expected each once")
    others = [other for other in ";\t|," if other != separator and len(head) == 1 and other in head[0]]
    if others:
        raise ValueError(
            f"{path}: expected {separator!r} between the cells, as the name says, got {others[0]!r} in the first line"
        )


def with_numbers(rows: list[_Row]) -> list[_Row]:
    """Turns columns of numbers alone into numbers, as JSON would have them; not those of TEXTS."""
    for column in {name for row in rows for name in row} - {*TEXTS}:
        numbers = [None if (cell := row.get(column)) is None else _number(cell) for row in rows]
        if all((number is None) == (row.get(column) is None) for number, row in zip(numbers, rows, strict=True)):
            for row, number in zip(rows, numbers, strict=True):
                row |= {column: number} if column in row else {}
    return rows


def _number(cell: str) -> int | float | None:
    """Returns the number that a cell is; None if it is none, or no finite one."""
    match = _NUMBER.fullmatch(cell)
    if match is None or len(cell) > _MAX_DIGITS:
        return None
    if match[2] is None and match[3] is None:
        return int(cell)
    return number if math.isfinite(number := float(cell)) else None
