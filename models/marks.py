"""Texts in which something that looks like a special token is marked as text."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Rendered(NamedTuple):
    """A text for the model, with `mark` inside of everything in a message that looks like a special token."""

    marked: str
    mark: str = ""

    @property
    def text(self) -> str:
        """The text without marks."""
        return self.marked.replace(self.mark, "") if self.mark else self.marked

    def after(self, count: int) -> "Rendered":
        """Returns what follows the first `count` characters of the text."""
        start, parts = 0, self.marked.split(self.mark) if self.mark else [self.marked]
        for part in parts:
            if count <= len(part):
                break
            start, count = start + len(part) + len(self.mark), count - len(part)
        rest = self.marked[start + count :]
        return Rendered(rest, self.mark) if self.mark and self.mark in rest else Rendered(rest)


def token_start_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns the pattern of the first character of a token's text; group 1 is the whole text."""
    longest_first = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first)) or '(?!)'})).", re.DOTALL)


def all_strings(value: Any) -> list[str]:
    """Returns all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in all_strings(item)]


def insert_marks(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """Inserts the mark behind the first character of each token's text in nested lists and dictionaries."""
    if isinstance(value, str):
        return starts.sub(lambda match: match[0] + mark, value)
    if isinstance(value, dict):
        return {insert_marks(key, starts, mark): insert_marks(item, starts, mark) for key, item in value.items()}
    return [insert_marks(item, starts, mark) for item in value] if isinstance(value, list) else value


def unused_mark(texts: Sequence[str]) -> str:
    """Returns a noncharacter (Unicode reserves them for internal use) that is in none of the texts."""
    free = (chr(code) for code in range(0xFDD0, 0xFDF0))
    mark = next((mark for mark in free if not any(mark in text for text in texts)), None)
    if mark is None:
        raise ValueError("a text has all 32 noncharacters U+FDD0 to U+FDEF; expected text, remove one of them")
    return mark
