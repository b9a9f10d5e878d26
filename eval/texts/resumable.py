"""A JSONL file that is written batch by batch, and that a restarted program resumes.

OUT.partial holds the rows so far, OUT.settings.json the settings that made them; OUT exists once it is complete.
OUT.lock.json is there while a program writes them: a second one is refused.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train import processes
from train.console import print_plain
from train.data.rows import Row, load_rows
from train.run.files import write_whole
from train.run.lock import Lock, acquire_all, release_all

_HASHED_SETTINGS = {"data": "other data (or another --limit)", "weights": "other weights"}  # settings that are hashes


class GrowingFile:
    """Only process 0 does I/O; every process knows the row count. A `with` block around its use ends its lock."""

    def __init__(self, out: str, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Starts a new file, or resumes an existing one.

        Raises:
          ValueError: an existing file was made with other settings, or its settings are unknown; or another program
            writes it.
        """
        self.out = Path(out)
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        self.settings_file = self.out.with_name(f"{self.out.name}.settings.json")
        self._settings = json.loads(json.dumps(settings))  # as they read back from JSON
        self._lock = Lock(out, is_file=True)
        status = processes.broadcast_from_first(self._new_status if overwrite else self._existing_status)
        if status["refused"]:
            release_all([self._lock])
            raise ValueError(status["refused"])
        self.complete: bool = status["complete"]
        self.rows: int = status["rows"]
        self._started = self.rows > 0

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_: object) -> None:
        release_all([self._lock])

    def _new_status(self) -> dict[str, Any]:
        return {"refused": acquire_all([self._lock]), "complete": False, "rows": 0}

    def _existing_status(self) -> dict[str, Any]:
        refused = self._refusal(self._settings)
        if not refused and not self.out.is_file():  # what is complete is only read
            refused = acquire_all([self._lock]) or self._refusal(self._settings)
        complete = self.out.is_file()
        return {"refused": refused, "complete": complete, "rows": 0 if refused or complete else self._whole_lines()}

    def _start_files(self) -> None:
        """Removes old files, writes the settings; called with the first rows: failures before then change no file."""
        self._started = True
        self.out.parent.mkdir(parents=True, exist_ok=True)
        for file in (self.out, self.partial, self.settings_file):
            file.unlink(missing_ok=True)
        write_whole(self.settings_file, json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n")

    def _refusal(self, settings: dict[str, Any]) -> str | None:
        """The reason why the existing files cannot be resumed, or None."""
        old = [file for file in (self.out, self.partial) if file.is_file()]
        if not old:
            return None
        if not self.settings_file.is_file():
            return (
                f"{old[0]}: is there already, without the settings it was made with ({self.settings_file.name}); "
                f"name another file, or start anew with --overwrite true"
            )
        before = self._settings_before()
        if before is None:
            return (
                f"{self.settings_file}: expected the JSON of the settings that {old[0].name} was made with, got what "
                f"is none; name another --out, or start anew with --overwrite true"
            )
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if not names:
            return None
        what = "; ".join(_HASHED_SETTINGS.get(n) or f"{n} {before.get(n)!r}, now {settings.get(n)!r}" for n in names)
        return f"{old[0]}: was made with other settings: {what}; name another file, or start anew with --overwrite true"

    def _settings_before(self) -> dict[str, Any] | None:
        """The settings of the existing rows; None if the file is not valid JSON of settings."""
        try:
            before = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except ValueError:  # another program damaged it: this class writes it atomically
            return None
        return before if isinstance(before, dict) else None

    def _whole_lines(self) -> int:
        """Counts the rows up to the first that is damaged; the rows behind it are made again."""
        rows = 0
        if not self.partial.is_file():
            return rows
        with self.partial.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):  # a kill cut it
                    break
                try:
                    json.loads(line.decode())
                except ValueError:  # UnicodeDecodeError too
                    print_plain(f"{self.partial}: line {rows + 1} is damaged; the file goes on from there")
                    break
                rows += 1
        return rows

    def keep(self, rows: int) -> None:
        """Truncates the file after the first `rows` rows, which removes a partial batch or line."""
        self.rows = rows
        if not processes.is_first() or not self.partial.is_file():
            return
        with self.partial.open("rb+") as file:
            for _ in range(rows):
                file.readline()
            file.truncate(file.tell())

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows; they are on disk when this returns."""
        self.rows += len(rows)
        if not processes.is_first():
            return
        if not self._started:
            self._start_files()
        with self.partial.open("ab") as file:
            file.write("".join(as_line(row) for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> list[Row]:
        """Marks the file as complete; returns its rows on process 0, else []."""
        if not processes.is_first():
            return []
        if not self.complete:
            self.partial.replace(self.out)
        self.complete = True
        return load_rows(str(self.out))


def as_line(row: Mapping[str, Any]) -> str:
    """Formats a row as a line of JSONL; values that JSON lacks, such as dates, become text."""
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
