"""A JSONL file that grows batch by batch, and goes on where a killed program left it.

OUT.partial holds the rows so far, OUT.settings.json what they are made with; OUT is there once it is complete.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train import processes
from train.data.rows import Row, load_rows
from train.run.files import write_whole

_HASHED_SETTINGS = {"data": "other data (or another --limit)", "weights": "other weights"}  # settings that are hashes


class GrowingFile:
    """Of several processes the first reads and writes; all of them know how many rows there are."""

    def __init__(self, out: str, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin a file, or find what there is of it.

        Raises:
          ValueError: there is a file of other settings, or one of which nobody knows them.
        """
        self.out = Path(out)
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.settings_file = self.out.with_name(f"{self.out.name}.settings.json")
        self._settings = json.loads(json.dumps(settings))  # as they will be read again
        found = processes.first_says(self._new if overwrite else self._found)
        if found["refused"]:
            raise ValueError(found["refused"])
        self.complete: bool = found["complete"]
        self.rows: int = found["rows"]
        self._begun = self.rows > 0

    def _new(self) -> dict[str, Any]:
        return {"refused": None, "complete": False, "rows": 0}

    def _found(self) -> dict[str, Any]:
        if refused := self._refused(self._settings):
            return {"refused": refused}
        complete = self.out.is_file()
        return {"refused": None, "complete": complete, "rows": 0 if complete else self._whole_lines()}

    def _begin(self) -> None:
        """Not before there is something to write: what is refused, or fails until then, leaves all as it was."""
        self._begun = True
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.out, self.partial, self.settings_file):
            file.unlink(missing_ok=True)
        write_whole(self.settings_file, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")

    def _refused(self, settings: dict[str, Any]) -> str | None:
        """Why what is there cannot be gone on with."""
        there = [file for file in (self.out, self.partial) if file.is_file()]
        if not there:
            return None
        if not self.settings_file.is_file():
            return (
                f"{there[0]}: is there already, without the settings it was made with ({self.settings_file.name}); "
                f"name another file, or start anew with --overwrite true"
            )
        before = self._settings_before()
        if before is None:
            return (
                f"{self.settings_file}: expected the JSON of the settings that {there[0].name} was made with, got what "
                f"is none; name another --out, or start anew with --overwrite true"
            )
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if not names:
            return None
        what = "; ".join(_HASHED_SETTINGS.get(n) or f"{n} {before.get(n)!r}, now {settings.get(n)!r}" for n in names)
        return (
            f"{there[0]}: was made with other settings: {what}; name another file, or start anew with --overwrite true"
        )

    def _settings_before(self) -> dict[str, Any] | None:
        """What there is was made with these; None where the file does not say."""
        try:
            before = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except ValueError:  # a file that something has damaged: it is written whole
            return None
        return before if isinstance(before, dict) else None

    def _whole_lines(self) -> int:
        if not self.partial.is_file():
            return 0
        with self.partial.open("rb") as lines:
            return sum(line.endswith(b"\n") for line in lines)

    def keep(self, rows: int) -> None:
        """Cut what is behind the first so many rows: part of a batch, or of a line."""
        self.rows = rows
        if not processes.is_first() or not self.partial.is_file():
            return
        with self.partial.open("rb+") as file:
            for _ in range(rows):
                file.readline()
            file.truncate(file.tell())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; when this returns, they are on the disk."""
        self.rows += len(rows)
        if not processes.is_first():
            return
        if not self._begun:
            self._begin()
        with self.partial.open("ab") as file:
            file.write("".join(as_line(row) for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> list[Row]:
        """It is complete: its rows, on the first process; elsewhere none."""
        if not processes.is_first():
            return []
        if not self.complete:
            self.partial.replace(self.out)
        self.complete = True
        return load_rows(str(self.out))


def as_line(row: Mapping[str, Any]) -> str:
    """A row of JSONL; what JSON has no form for, such as a date, as its text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
