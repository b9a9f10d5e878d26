"""The console that all programs print to; it is quiet in every process but the first.

Texts of models, names and paths are data: no markup is read in them, and control characters are shown, not obeyed.
"""

import contextlib
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# All control characters but line ends and tabs, those that turn the direction of writing, and broken characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Returns a text with each control character written out, such as \\x1b; a terminal would obey them."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def in_one_line(text: str) -> str:
    """Returns a text with its line ends written out too: names in an error may have some."""
    return visible(re.sub("[\n\u2028\u2029]", lambda match: repr(match[0])[1:-1], text))


class PlainConsole(Console):
    """A console that shows the control characters of the texts it prints; its own colours are none of them.

    An output that takes no more, a file on a full disk or a pipe without a reader, ends the printing, not the program.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may be the same file
                reason = error.strerror
                print(f"warning: the standard output takes no more ({reason}); nothing is printed", file=sys.stderr)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what Python still holds would fail again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = PlainConsole(soft_wrap=True, markup=False, emoji=False)  # a path in brackets or :colons: is printed as it is


def print_plain(text: str) -> None:
    """Prints text as it is: brackets are no markup, numbers get no colour."""
    console.print(text, markup=False, highlight=False)


def progress_bar() -> Progress:
    """Returns a progress bar with count, elapsed and remaining time; it shows nothing where there is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, disable=console.quiet or not console.is_terminal)
