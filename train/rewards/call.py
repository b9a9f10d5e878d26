"""One call of a reward function, in whatever process: what it gets, what it logs, what it gives, how it fails.

This module and what it imports are free of JAX, so that a worker process is up in a moment (`train.rewards.worker`).
"""

import contextlib
import copy
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from train.rewards.returned import RewardError, Scores, read_returned
from train.user_code import HangWatch, await_text, contained

PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before a call that has failed is tried again; doubled each time
PROVIDED = ("trainer_state", "log_metric", "log_extra", "log_columns")  # filled for parameters of these names
ROOT = str(Path(__file__).parents[2])


class TrainerState(NamedTuple):
    """Where the run is, by the names of transformers' TrainerState."""

    global_step: int = 0  # finished steps
    max_steps: int = 0
    epoch: float = 0.0  # passes over the prompts


class Call(NamedTuple):
    """The arguments of one call."""

    values: dict[str, Any]  # one entry per completion, by parameter; the call gets copies
    options: dict[str, Any]
    provided: Sequence[str]  # those of `PROVIDED` that the function takes
    state: TrainerState
    size: int  # completions


class Outcome(NamedTuple):
    """What a call gave."""

    rewards: np.ndarray  # [size] float64, NaN = unscorable
    metrics: list[tuple[str, float]]  # of log_metric
    columns: dict[str, list[Any]]  # of log_columns, one value per completion
    why: str | None = None  # why some are unscorable


class CallFailed(Exception):
    """A call gave no rewards.

    Attributes:
      kind: raised: an exception; refused: a message says all; late: the time limit; died: the worker ended.
      line: the reason, in one line.
      details: the traceback, "" where there is none.
      error: what was raised in this process.
      is_final: another attempt would fail too.
      attempts: how many have failed.
    """

    def __init__(
        self,
        kind: Literal["raised", "refused", "late", "died"],
        line: str,
        *,
        details: str = "",
        error: BaseException | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(line)
        self.kind, self.line, self.details, self.error, self.is_final = kind, line, details, error, is_final
        self.attempts = 1


class CallLog:
    """Takes what a function logs while it is called."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self.metrics: list[tuple[str, float]] = []
        self.columns: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Logs a number of this call. NaN and None are left out."""
        value = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
        if value is not None and (not isinstance(value, numbers.Real) or math.isinf(value)):
            raise RewardError(f"{self._name}: log_metric: {name}: expected a finite number, got {str(value)[:60]!r}")
        if value is not None and not math.isnan(value):
            self.metrics.append((str(name), float(value)))

    def log_columns(self, name: str, values: Sequence[Any]) -> None:
        """Logs one value for each completion of this call, for the table of completions."""
        values = [plain_value(value) for value in values]
        if len(values) != self._count:
            raise RewardError(
                f"{self._name}: log_columns: {name}: expected {self._count} values, one per completion, got "
                f"{len(values)}"
            )
        self.columns[str(name)] = values


class RewardFunction:
    """A reward function with its name, called so that it can neither end the run nor change what is not its own.

    Args:
      name: as the config has it.
      is_ours: a ValueError of it is a message to the user, not a fault.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, is_ours: bool) -> None:
        self.name, self._function, self._is_ours = name, function, is_ours
        self._watch = HangWatch(f"rewards: {name}", __file__)

    def __call__(self, call: Call, *, beside: bool = False) -> Outcome:
        """Calls a `def`.

        Args:
          beside: in a thread, while other code runs, by one who gives up what hangs.

        Raises:
          CallFailed: it raised something.
        """
        log = CallLog(self.name, call.size)
        try:
            watch = contextlib.nullcontext() if beside else self._watch()
            with contained(f"rewards.function: {self.name}", own_directory=not beside), watch:
                returned = self._function(**arguments_of(call, log))
                rewards = read_returned(self.name, returned, call.size)  # calls methods of an object of theirs
        except Exception as error:
            raise self._failed(error) from error
        return Outcome(rewards, log.metrics, log.columns, why_unscorable(returned, rewards))

    async def awaited(self, call: Call) -> Outcome:
        """Awaits an `async def`.

        Raises:
          CallFailed: it raised something.
        """
        log = CallLog(self.name, call.size)
        try:
            with contained(f"rewards.function: {self.name}", own_directory=False):
                waiting = self._function(**arguments_of(call, log))
                with self._watch(place=lambda: await_text(waiting)):
                    returned = await waiting
                rewards = read_returned(self.name, returned, call.size)
        except Exception as error:
            raise self._failed(error) from error
        return Outcome(rewards, log.metrics, log.columns, why_unscorable(returned, rewards))

    def _failed(self, error: Exception) -> CallFailed:
        if self._is_ours and isinstance(error, ValueError) and not isinstance(error, RewardError):
            error = RewardError(str(error)).with_traceback(error.__traceback__)
        is_final = bool(getattr(error, "is_final", False))
        return failure_of(error, is_final=is_final)


def why_unscorable(returned: Any, rewards: np.ndarray) -> str | None:
    """Returns why some of the rewards are NaN; None if none is."""
    if not np.isnan(rewards).any():
        return None
    return (returned.why if isinstance(returned, Scores) else None) or "it returned None or NaN"


def failure_of(error: Exception, *, is_final: bool = False) -> CallFailed:
    """Returns the failure of a call that raised `error`; one of ours says all in its message."""
    from train.running import SetupError

    if isinstance(error, SetupError):
        return CallFailed("refused", str(error), error=error, is_final=is_final)
    line = f"{type(error).__name__}: {error}"
    return CallFailed("raised", line[:500], details=traceback_text(error), error=error, is_final=is_final)


def arguments_of(call: Call, log: CallLog) -> dict[str, Any]:
    """Returns the keyword arguments of a call: copies, and what functions are provided with."""
    provided = {
        "trainer_state": call.state,
        "log_metric": log.log_metric,
        "log_extra": log.log_columns,  # TRL's name
        "log_columns": log.log_columns,
    }
    return copied(call.values) | copied(call.options) | {name: provided[name] for name in call.provided}


def traceback_text(error: BaseException) -> str:
    """Returns a traceback from the first frame that is not of this folder on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__ and frames.tb_next is not None:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def pause_before(attempt: int) -> float:
    """Returns the seconds to wait before an attempt; 1 is the first repetition."""
    return min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)


def copied(value: Any) -> Any:
    """Returns a deep copy; rows of JSON are copied without `copy.deepcopy`, which takes ten times as long."""
    if isinstance(value, str | int | float | None):
        return value
    if type(value) is list:
        return [copied(item) for item in value]
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


def plain_value(value: Any) -> Any:
    """Returns a value as JSON has it: a number, a text, a boolean or None; anything else as text."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    return float(value) if isinstance(value, numbers.Real) else str(value)


def merged(outcomes: Sequence[Outcome | None], counts: Sequence[int]) -> tuple[np.ndarray, Mapping[str, list[Any]]]:
    """Joins the outcomes of a step's calls, in their order; those that failed (None) are NaN and have no columns."""
    pairs = list(zip(outcomes, counts, strict=True))
    rewards = [np.full(count, np.nan) if outcome is None else outcome.rewards for outcome, count in pairs]
    names = dict.fromkeys(name for outcome in outcomes if outcome is not None for name in outcome.columns)
    empty: dict[str, list[Any]] = {}
    columns = {
        name: [
            value
            for outcome, count in pairs
            for value in (empty if outcome is None else outcome.columns).get(name, [None] * count)
        ]
        for name in names
    }
    return np.concatenate(rewards), columns
