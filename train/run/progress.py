"""How far a run has come: a bar on a terminal, elsewhere a line ten times in a run."""

import contextlib
import math
from collections.abc import Iterator, Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.console import console


class StepProgress:
    """Shows the step that a run has reached, and the newest metrics beside it.

    Args:
      name: of the run.
      steps: the number of steps in all.
      is_wanted: with False nothing is shown.
    """

    def __init__(self, name: str, steps: int, is_wanted: bool) -> None:
        self._name, self._steps, self._is_wanted = name, steps, is_wanted
        self._bar: Progress | None = None

    @contextlib.contextmanager
    def begin(self, step: int) -> Iterator[None]:
        """Shows the bar, with so many steps done, while the body runs."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        hidden = not (self._is_wanted and console.is_terminal)  # `show` prints lines instead
        with Progress(*columns, console=console, disable=hidden) as self._bar:
            self._bar.add_task(self._name, total=self._steps, completed=step, shown="")
            yield

    def advance(self, step: int) -> None:
        """Shows that so many steps are done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows metrics beside the bar; without a terminal, prints a line ten times in a run."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not math.isnan(value))
        if self._bar is None or not self._is_wanted:
            return
        self._bar.update(self._bar.task_ids[0], shown=text)
        if not console.is_terminal and step % max(1, self._steps // 10) == 0:
            console.print(f"{self._name} {step}/{self._steps}  {text}")

    def stop(self) -> None:
        """Ends the bar where it is."""
        if self._bar is not None:
            self._bar.stop()
