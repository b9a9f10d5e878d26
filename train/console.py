"""The console that all programs print to; it is quiet in every process but the first."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(soft_wrap=True, markup=False, emoji=False)  # a path in brackets or :colons: is printed as it is


def print_plain(text: str) -> None:
    """Prints text as it is: brackets are no markup, numbers get no colour."""
    console.print(text, markup=False, highlight=False)


def progress_bar() -> Progress:
    """Returns a progress bar with count, elapsed and remaining time; it shows nothing where there is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *times, console=console, disable=console.quiet or not console.is_terminal)
