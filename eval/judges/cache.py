"""Stores replies of judges on disk by the content of the request, so that no reply is paid for twice."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.rewards.chat_api import Reply


class Cache:
    """A sqlite3 file of replies. Each is committed on arrival: a killed program loses no received reply."""

    def __init__(self, file: Path) -> None:
        """Opens or creates the file.

        Raises:
          ValueError: the file cannot be written, or is not a cache.
        """
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(file, timeout=60)  # seconds to wait while another judge writes
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = NORMAL")  # whole after a kill; power loss may cost the last few
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT "
                "NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL)"
            )
            self._rows.commit()
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"--cache {file}: cannot be used as a cache ({error}); name another file") from error

    def get(self, key: str) -> Reply | None:
        row = self._rows.execute(
            "SELECT text, finish_reason, prompt_tokens, completion_tokens FROM replies WHERE key = ?", (key,)
        ).fetchone()
        return Reply(*row) if row else None

    def put(self, key: str, reply: Reply) -> None:
        with self._rows:
            self._rows.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)", (key, *reply))

    def __len__(self) -> int:
        return self._rows.execute("SELECT count(*) FROM replies").fetchone()[0]

    def close(self) -> None:
        self._rows.close()


def content_key(content: Mapping[str, Any]) -> str:
    """sha256 of everything that determines a reply."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
