"""Writes files atomically."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows to a JSONL file, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(file: Path, text: str) -> None:
    """Writes a file atomically: it is there complete, or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
