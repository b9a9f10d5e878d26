"""A user's callbacks: classes named in `callbacks`, told of a run's start, steps, validations and end.

    class Mail:
        def __init__(self, run: pathlib.Path, config: PolicyConfig): ...    # the run's directory, and its settings

        def start(self, step: int): ...                                     # the step that it goes on from; 0: none
        def step(self, step: int, metrics: dict[str, float]): ...           # a row of metrics.jsonl, once it is written
        def validation(self, step: int, metrics: dict[str, float]): ...     # of a validation alone
        def end(self, step: int, reason: str): ...                          # the last step; "done", or what ended it

Each hook may be missing. They are called on the first process, one after the other, and the run waits for them. What
they raise ends the run as an error in any function of a user does, its last step saved; in `end` it is printed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.console import print_plain
from train.dotted import import_function
from train.user_code import contained

HOOKS = ("start", "step", "validation", "end")


def import_callbacks(names: Sequence[str]) -> list[Any]:
    """Returns the classes at dotted paths.

    Raises:
      ValueError: one cannot be imported, or has none of the hooks.
    """
    found = [import_function(name, "callbacks") for name in names]
    for name, made in zip(names, found, strict=True):
        if not any(hasattr(made, hook) for hook in HOOKS):
            raise ValueError(f"callbacks: {name}: expected a class with some of the methods {', '.join(HOOKS)}")
    return found


class Callbacks:
    """The callbacks of a run.

    Args:
      names: dotted paths of classes.
      run: the run's directory.
      config: its settings.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Any) -> None:
        self._objects: list[tuple[str, Any]] = []
        for name, made in zip(names, import_callbacks(names), strict=True):
            with contained(f"callbacks: {name}"):
                self._objects.append((name, made(run, config)))

    def call(self, hook: str, *arguments: Any) -> None:
        """Calls a hook of all that have it."""
        for name, callback in self._objects:
            if (method := getattr(callback, hook, None)) is not None:
                with contained(f"callbacks: {name}.{hook}"):
                    method(*(dict(value) if isinstance(value, Mapping) else value for value in arguments))

    def end(self, step: int, reason: str) -> None:
        """Calls `end` once; what it raises is printed, for the run has ended already."""
        objects, self._objects = self._objects, []
        for name, callback in objects:
            if (method := getattr(callback, "end", None)) is not None:
                try:
                    with contained(f"callbacks: {name}.end"):
                        method(step, reason)
                except Exception as error:
                    print_plain(f"callbacks: {name}.end: {type(error).__name__}: {error}")
