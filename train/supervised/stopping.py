"""Early stopping: a run that no longer improves on its validation set ends, and is then its best step.

What is known is a function of the rows of metrics.jsonl, so a run that was killed and started again stops where it
would have stopped. At the end, in this order: STOPPED is written, the checkpoints behind the best are removed. A run
in which STOPPED is found only removes what is still there.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from models.checkpoint import folder_of
from train.config import EarlyStoppingConfig
from train.console import console
from train.processes import gather, is_first
from train.run.directory import METRICS, Run, read_metrics
from train.run.files import write_whole

STOPPED = "stopped.json"


class EarlyStopping:
    """The best validation so far, and how many there have been since.

    A validation is an improvement if it is better than the best one by more than `min_delta`; the first is one. The
    untrained start, step 0, does not take part.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config, self.on = config, config.patience is not None
        self.best_step, self.last_step, self.since = 0, 0, 0
        self._best = np.float32(math.inf)  # float32: what a restart reads from the file compares the same everywhere

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take a validation into account; returns whether early stopping is on and this is its best step so far."""
        if not self.on:
            return False
        value = np.float32(metrics.get(f"validation/{self.config.metric}", math.nan))
        self._take(step, value if self.config.metric == "loss" else -value)
        return self.best_step == step

    def recall(self, run: Run) -> None:
        """Take all validations up to the step that `run` goes on from into account.

        Raises:
          ValueError: metrics.jsonl does not reach to that step, or the best step's checkpoint is gone.
        """
        if not self.on or not run.start:
            return
        rows, sign = read_metrics(run.path), 1 if self.config.metric == "loss" else -1
        if is_first() and (not rows or rows[-1]["step"] < run.start):
            raise ValueError(
                f"{run.path / METRICS}: expected rows up to step {run.start}, where the run goes on; early stopping "
                f"needs them: put the file back, or start over in another output_dir"
            )
        key = f"validation/{self.config.metric}"
        seen = [(row["step"], sign * row.get(key, math.nan)) for row in rows if "timing_s/validation" in row]
        mine = np.array(seen if is_first() else [], np.float32).reshape(-1, 2)
        for step, value in gather(mine):
            self._take(int(step), value)
        if self.best_step and not (folder_of(run.path) / str(self.best_step)).exists():
            raise ValueError(
                f"{run.path}: by these early_stopping settings its best step is {self.best_step}, whose checkpoint was "
                f"not kept; go on with the settings it had, or start over in another output_dir"
            )
        run.keep_best(self.best_step)

    def _take(self, step: int, value: np.float32) -> None:
        """`value` is the better the lower; NaN is never an improvement."""
        self.last_step = step
        if not self.best_step or value < self._best - np.float32(self.config.min_delta):
            self.best_step, self.since = step, 0
            self._best = np.float32(math.inf) if np.isnan(value) else value
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        return self.config.patience is not None and self.since >= self.config.patience

    def finish(self, run: Run) -> None:
        """End the run: from now on RUN is its best step."""
        if not self.on:
            run.close()
            return
        run.wait()
        if is_first():
            said = {"step": self.last_step, "best_step": self.best_step, "metric": self.config.metric}
            write_whole(run.path / STOPPED, json.dumps(said) + "\n")
        close_at_best(run, self.last_step, self.best_step)


def best_step(run: str | Path) -> int | None:
    """The step that a run which has ended by early stopping is; None if it has not."""
    file = Path(run) / STOPPED
    return int(json.loads(file.read_text(encoding="utf-8"))["best_step"]) if file.is_file() else None


def has_stopped(run: Run) -> bool:
    """Whether the run has ended by early stopping; what a kill left undone is then done."""
    file = run.path / STOPPED
    found = np.zeros((0, 2), np.int32)
    if is_first() and file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        found = np.array([[said["step"], said["best_step"]]], np.int32)
    for step, best in gather(found):
        close_at_best(run, int(step), int(best))
        return True
    return False


def close_at_best(run: Run, step: int, best: int) -> None:
    run.drop_after(best)
    run.close(f"ended at step {step}; the run is its best step, {best}")
    console.print(
        f"{run.path}: to train on from there, delete {STOPPED} in it and raise what ended it, early_stopping.patience "
        f"or max_steps"
    )
