"""Reads rows of responses, from `python -m eval generate` or any other source, and writes results."""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.rows import Row, is_number
from train.run.files import write_whole


def write_json(out: str, result: Mapping[str, Any]) -> None:
    """Writes a result as one line of JSON, atomically; creates the directory."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), json.dumps(result, ensure_ascii=False) + "\n")


def user_text(prompt: Any) -> str:
    """The text that a prompt asks: a text prompt, or the last user message of a chat.

    Raises:
      ValueError: neither text nor chat messages with a user message.
    """
    if isinstance(prompt, str):
        return prompt
    contents = [m.get("content") for m in prompt if isinstance(m, dict)] if isinstance(prompt, list) else []
    users = [text for text, m in zip(contents, prompt, strict=True) if m.get("role") == "user"] if contents else []
    if not users or not isinstance(users[-1], str):
        raise ValueError(f"expected a prompt that is text, or chat messages with a user's, got {str(prompt)[:80]!r}")
    return users[-1]


def response_text(row: Row) -> str:
    """A row's response: column "completion" if the row has a prompt_id, else "response"; null is the empty text.

    A row with only one of the two columns uses that column.

    Raises:
      ValueError: the row has neither column, or the response is not text.
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


def map_rows(rows: Sequence[Any], source: str, function: Callable[[Any], Any]) -> list[Any]:
    """Applies `function` to every row; errors name the row."""
    values = []
    for number, row in enumerate(rows, 1):
        try:
            values.append(function(row))
        except ValueError as error:
            raise ValueError(f"{source}: row {number}: {error}") from error
    return values


def prompt_text(row: Row) -> str:
    """The text that a row's prompt asks.

    Raises:
      ValueError: the row has no prompt.
    """
    if row.get("prompt") is None:
        raise ValueError(f"has no 'prompt'; its columns are {', '.join(row) or '(none)'}")
    return user_text(row["prompt"])


def squeeze_blanks(text: str) -> str:
    """Replaces every run of white space by one blank, and strips the ends."""
    return " ".join(text.split())


def groups_of(keys: Iterable[Hashable]) -> list[list[int]]:
    """Row indices of each key, in the order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def temperature_of(row: Row) -> float | None:
    """A row's temperature; None if it is missing or not a finite number."""
    temperature: Any = row.get("temperature")
    return float(temperature) if is_number(temperature) else None


def rows_by_temperature(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Row indices at each temperature, in rising order; rows without a temperature are left out."""
    groups: dict[float, list[int]] = {}
    for i, row in enumerate(rows):
        if (temperature := temperature_of(row)) is not None:
            groups.setdefault(temperature, []).append(i)
    return {f"{temperature:g}": groups[temperature] for temperature in sorted(groups)}
