"""Rows of responses as the evaluations of texts read them, and the file that an evaluation writes.

`python -m eval generate` writes such rows, or anyone else.
"""

import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.rows import Row
from train.processes import first_says
from train.run.files import write_whole


def check_out(out: str, *others: str, several: bool = False) -> None:
    """Refuse, before anything is computed, a file that cannot be written, or would replace another one in use.

    Args:
      others: what is read, and what else is written; names that are no files, such as a Hub data set's, are none.
      several: this may be one of several processes, of which the first alone writes.

    Raises:
      ValueError: see above.
    """
    refused = first_says(lambda: _write_problem(out, others)) if several else _write_problem(out, others)
    if refused:
        raise ValueError(refused)


def _write_problem(out: str, others: Sequence[str]) -> str | None:
    file = Path(out)
    if file.is_dir():
        return f"{out}: is a directory; expected the name of a file to write"
    there = next((other for other in others if Path(other).resolve() == file.resolve()), None)
    if there is not None:
        return f"{out}: is the same file as {there}, which it would replace; name another file to write"
    above = next(parent for parent in file.absolute().parents if parent.exists())
    if not above.is_dir():
        return f"{out}: cannot be written, {above} is a file; expected a directory there, or another file to write"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{out}: cannot be written, {above} does not permit it; name a file in another directory"
    return None


def write_json(out: str, result: Mapping[str, Any]) -> None:
    """A result as one line of JSON, whole, in a directory that is made if need be."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), json.dumps(result, ensure_ascii=False) + "\n")


def user_text(prompt: Any) -> str:
    """What a prompt asks: itself, or of chat messages the last one of the user.

    Raises:
      ValueError: neither text nor messages with one of the user.
    """
    if isinstance(prompt, str):
        return prompt
    said = [m.get("content") for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    users = [text for text, m in zip(said, prompt, strict=True) if m.get("role") == "user"] if said else []
    if not users or not isinstance(users[-1], str):
        raise ValueError(f"expected a prompt that is text, or chat messages with a user's, got {str(prompt)[:80]!r}")
    return users[-1]


def response_text(row: Row) -> str:
    """A row's response; null is an empty one. Of a row with a prompt_id it is "completion", of others "response".

    A row that has only one of the two columns means that one.

    Raises:
      ValueError: it has none, or it is not text.
    """
    names = [name for name in ("completion", "response") if name in row]
    if not names:
        raise ValueError(f"has neither 'response' nor 'completion'; its columns are {', '.join(row) or '(none)'}")
    text = row[names[0] if "prompt_id" in row else names[-1]]
    if text is None:
        return ""
    if isinstance(text, list) and text and isinstance(text[-1], dict) and isinstance(text[-1].get("content"), str):
        return text[-1]["content"]
    if not isinstance(text, str):
        raise ValueError(f"expected a response that is text or null, got {type(text).__name__}")
    return text


def map_rows(rows: Sequence[Any], source: str, what: Callable[[Any], Any]) -> list[Any]:
    """what(row) of every row; its errors say which row."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(what(row))
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from error
    return found


def prompt_text(row: Row) -> str:
    """The text that a row asks.

    Raises:
      ValueError: it has no prompt.
    """
    if row.get("prompt") is None:
        raise ValueError(f"has no 'prompt'; its columns are {', '.join(row) or '(none)'}")
    return user_text(row["prompt"])


def squeeze_blanks(text: str) -> str:
    """The text with its white space, of whatever kind, as single blanks and none at its ends."""
    return " ".join(text.split())


def groups_of(keys: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of the rows of each key, in the order of its first row."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def temperature_of(row: Row) -> float | None:
    """A row's temperature; None where it has none, or something that is no finite number."""
    given = row.get("temperature")
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        return None
    return float(given)


def rows_by_temperature(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The numbers of the rows at each temperature, in rising order; nothing where rows have none."""
    groups: dict[float, list[int]] = {}
    for i, row in enumerate(rows):
        if (temperature := temperature_of(row)) is not None:
            groups.setdefault(temperature, []).append(i)
    return {f"{temperature:g}": groups[temperature] for temperature in sorted(groups)}
