"""Replies of judges on disk, by what was asked: what was paid for once is there for good."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

# ends of a reply that is not whole; servers have many words for an ordinary end ("stop", "eos_token", none at all)
CUT_OFF = (
    *("length", "max_tokens", "max_output_tokens", "content_filter", "content management policy", "safety"),
    *("refusal", "tool_calls", "tool_use", "function_call", "abort", "error"),
)


class Reply(NamedTuple):
    """What a server answered.

    `finish_reason` is its own word, "" if it gives none, or "refusal" where the model declined as a whole.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def cut_off(self) -> bool:
        """Whether the server says that this is not the whole reply: cut, filtered, or refused."""
        return is_cut_off(self.finish_reason)


class Cache:
    """A sqlite3 file of replies. Each is committed as it comes: a killed program loses none that it had received."""

    def __init__(self, file: Path) -> None:
        """Raises: ValueError: a file that cannot be written, or is something else."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._rows = sqlite3.connect(file, timeout=60)  # seconds to wait for another judge that writes
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = NORMAL")  # whole after a kill; the last few may go with the power
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


def is_cut_off(finish_reason: str) -> bool:
    return any(word in finish_reason.lower() for word in CUT_OFF)


def content_key(content: Mapping[str, Any]) -> str:
    """sha256 of all that determines a reply."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
