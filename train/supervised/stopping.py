"""Early stopping: a run that no longer improves on its validation set ends, and its best step stands for the run.

The decision is a function of the rows of metrics.jsonl, so a run that was killed and started again stops at the same
step. At the end STOPPED is written, and then the checkpoints after the best are removed. A run that has STOPPED only
removes those that are still there.
"""

import json
import math
from collections.abc import Mapping

import numpy as np

from models.checkpoint import STOPPED, checkpoints_folder
from models.checkpoint_steps import read_stopped
from train.config import EarlyStoppingConfig, SupervisedConfig
from train.console import console
from train.processes import gather, is_first
from train.run.directory import Run
from train.run.files import write_whole
from train.run.metrics_file import METRICS, read_metrics


class EarlyStopping:
    """Tracks the best validation so far, and the number of validations since.

    A validation improves on the best one if it is better by more than `min_delta`; the first always does. The untrained
    start, step 0, does not count.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config, self.enabled = config, config.patience is not None
        self.best_step, self.last_step, self.since = 0, 0, 0
        self._best = np.float32(math.inf)  # float32: values that a restart reads compare alike on every process

    def observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes a validation into account; returns whether it is the best so far, and early stopping is enabled."""
        if not self.enabled:
            return False
        value = np.float32(metrics.get(f"validation/{self.config.metric}", math.nan))
        self._update(step, value if self.config.metric == "loss" else -value)
        return self.best_step == step

    def replay(self, run: Run, origin: int = 0) -> None:
        """Takes all validations up to the step that `run` goes on from into account.

        Args:
          origin: the step of another run that it was started from; what came before does not count.

        Raises:
          ValueError: metrics.jsonl does not reach that step or lacks a validation, or the best step's checkpoint is
            gone.
        """
        if not self.enabled or run.start == origin:
            return
        rows, sign = read_metrics(run.path), 1 if self.config.metric == "loss" else -1
        if is_first() and (not rows or rows[-1]["step"] < run.start):
            raise ValueError(
                f"{run.path / METRICS}: expected rows up to step {run.start}, where the run goes on; early stopping "
                f"needs them: put the file back, or start over in another output_dir"
            )
        assert isinstance(run.config, SupervisedConfig)  # no other run stops early
        every, logged = run.config.eval_steps, {row["step"] for row in rows}
        lost = [step for step in range(every, run.start + 1, every) if step not in logged and step > origin]
        if is_first() and lost:
            raise ValueError(
                f"{run.path / METRICS}: the row of step {lost[0]} is lost, a validation that early stopping needs: put "
                f"the file back, set early_stopping.patience: null, or start over in another output_dir"
            )
        key = f"validation/{self.config.metric}"
        rows = [row for row in rows if row["step"] > origin]  # before, it was another run
        validations = [(row["step"], sign * row.get(key, math.nan)) for row in rows if "timing_s/validation" in row]
        for step, value in gather(np.array(validations if is_first() else [], np.float32).reshape(-1, 2)):
            self._update(int(step), value)
        if self.best_step and not (checkpoints_folder(run.path) / str(self.best_step)).exists():
            raise ValueError(
                f"{run.path}: by these early_stopping settings its best step is {self.best_step}, whose checkpoint was "
                f"not kept; go on with the settings it had, or start over in another output_dir"
            )
        run.keep_best(self.best_step)

    def _update(self, step: int, value: np.float32) -> None:
        """Updates the best step; a lower `value` is better, NaN never is."""
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
        """Ends the run: from now on RUN names its best step."""
        if not self.enabled:
            run.close()
            return
        run.wait()
        if is_first():
            record = {"step": self.last_step, "best_step": self.best_step, "metric": self.config.metric}
            run.persist(write_whole, STOPPED, json.dumps(record) + "\n")
        close_at_best(run, self.last_step, self.best_step)


def has_stopped(run: Run) -> bool:
    """Returns whether the run has ended by early stopping; if so, first removes the checkpoints that a kill left."""
    file = run.path / STOPPED
    steps = np.zeros((0, 2), np.int32)
    if is_first() and file.is_file():
        record = read_stopped(run.path)
        steps = np.array([[record["step"], record["best_step"]]], np.int32)
    for step, best in gather(steps):
        close_at_best(run, int(step), int(best))
        return True
    return False


def close_at_best(run: Run, step: int, best: int) -> None:
    """Removes the checkpoints after the best step, closes the run, and prints how to train on."""
    run.delete_after(best)
    run.close(f"ended at step {step}; the run is its best step, {best}")
    console.print(
        f"{run.path}: to train on from there, delete {STOPPED} in it and raise what ended it, early_stopping.patience "
        f"or max_steps"
    )
