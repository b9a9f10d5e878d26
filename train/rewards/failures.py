"""What becomes of a call of a reward function that gave no rewards: its texts are kept; the run ends, or goes on."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from train.rewards.call import CallFailed, TrainerState
from train.rewards.returned import RewardError
from train.user_code import tell


class WorkerError(RuntimeError):
    """A reward function raised an exception in a worker process; the message is its traceback."""


class Moment(NamedTuple):
    """When functions are called.

    Attributes:
      when: "step 3", or "validation at step 0".
      directory: the run's; None: there is no run.
    """

    state: TrainerState = TrainerState()
    when: str = "now"
    directory: Path | None = None

    def file(self, reward: str) -> Path | None:
        """Returns where the texts of failed calls of a reward are kept, in the run's completions."""
        if self.directory is None:
            return None
        when = re.sub(r"\d+", lambda number: f"{int(number[0]):06d}", self.when)
        process = f"_process_{jax.process_index()}" if jax.process_index() else ""  # each writes its own
        words = re.sub(r"[^\w.-]+", "_", f"{when}_{reward}{process}")
        return self.directory / "completions" / f"failed_{words}.jsonl"


class Clock(NamedTuple):
    """What is known of a run, before a step of it.

    Attributes:
      steps_per_epoch: steps in which every prompt comes once.
    """

    directory: Path | None = None
    max_steps: int = 0
    steps_per_epoch: float = math.inf

    def moment(self, step: int, when: str) -> Moment:
        """Returns the moment after `step` finished steps."""
        return Moment(TrainerState(step, self.max_steps, step / self.steps_per_epoch), when, self.directory)


class Failures:
    """The failed calls of one reward.

    Args:
      label: the reward's, in metrics.
      name: the function's, in the config.
      stops: whether a failure ends the run.

    Attributes:
      count: completions without a reward since the last `take`.
    """

    def __init__(self, label: str, name: str, *, stops: bool) -> None:
        self._label, self._name, self._stops = label, name, stops
        self._is_told, self.count = False, 0

    def take(self) -> int:
        """Returns `count` and sets it to 0."""
        count, self.count = self.count, 0
        return count

    def handle(self, failure: CallFailed, rows: Sequence[Mapping[str, Any]], moment: Moment) -> None:
        """Writes the texts of a failed call, and counts them or ends the run.

        Args:
          rows: prompt, completion and columns of every completion of the call.

        Raises:
          RewardError: the run ends by one line.
          Exception: what the function raised.
        """
        file = self._write(failure, rows, moment)
        place = "" if file is None else f"; they are in {file}"
        if self._stops:
            self._stop(failure, len(rows), place)
        self.count += len(rows)
        if not self._is_told:
            self._is_told = True
            tell(
                f"rewards: {self._label}: {moment.when}: {failure.line} ({attempts_text(failure)}); {len(rows)} "
                f"completions are unscorable{place}; further failures are counted in rewards/{self._label}/failed"
                + (f"\n{failure.details}" if failure.details else "")
            )

    def _stop(self, failure: CallFailed, count: int, place: str) -> None:
        head, tried = f"rewards.function: {self._name}", f"({attempts_text(failure)})"
        if failure.kind == "late":
            raise RewardError(
                f"{head}: {failure.line}, for {count} completions {tried}{place}; raise rewards[].timeout_s, or set "
                f"on_error: unscorable"
            )
        if failure.kind == "died":
            raise RewardError(f"{head}: {failure.line} before it returned {count} rewards {tried}{place}")
        if place:
            tell(f"{head}: has failed for {count} completions{place}")
        if failure.error is not None:
            raise failure.error
        if failure.kind == "raised":
            raise WorkerError(f"{head}: raised in a worker process:\n{failure.details or failure.line}")
        says_whose = failure.line.startswith((f"{self._name}:", "rewards.function:"))
        raise RewardError(failure.line if says_whose else f"{head}: {failure.line}")

    def _write(self, failure: CallFailed, rows: Sequence[Mapping[str, Any]], moment: Moment) -> Path | None:
        file = moment.file(self._label)
        if file is None:
            return None
        about = {"reward": self._label, "failure": failure.line}
        lines = [json.dumps(about | dict(row), default=str) + "\n" for row in rows]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as opened:
                opened.writelines(lines)
        except OSError as error:
            tell(f"{file}: the texts of a failed call cannot be written ({error.strerror})")
            return None
        return file


def attempts_text(failure: CallFailed) -> str:
    return "1 attempt" if failure.attempts == 1 else f"{failure.attempts} attempts"
