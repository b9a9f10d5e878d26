"""The best step of a run by a metric of its validation: kept whatever else is removed, and named by RUN@best.

Which step that is, is a function of the rows of metrics.jsonl, so a run that was killed and started again keeps the
same. BEST holds every improvement so far, as a step is written there before its checkpoint is whole: the newest of them
that is whole is the best one (`models.checkpoint.best_step`), for the one before stays until then.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoint import BEST, checkpoints_folder
from train.config import CheckpointConfig
from train.processes import gather, is_first
from train.run.files import write_whole
from train.running import SetupError


class BestStep:
    """Tracks the best validation so far. The untrained start, step 0, does not count; NaN never is the best.

    Args:
      run: the run's directory.
      config: says which metric, and whether more of it is better.
    """

    def __init__(self, run: Path, config: CheckpointConfig) -> None:
        self.step = 0  # 0: none yet
        self._run, self._metric, self._sign = run, config.best, 1 if config.is_greater_better else -1
        self._improvements: list[tuple[int, float]] = []

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes a validation into account.

        Raises:
          SetupError: the validation has no such metric.
        """
        if self._metric is None:
            return
        if self._metric not in metrics:
            raise SetupError(
                f"checkpoint.best: expected a metric of the validation, one of {', '.join(sorted(metrics))}; got "
                f"{self._metric!r}"
            )
        if step > 0:
            self._update(step, metrics[self._metric])

    def replay(self, rows: Sequence[Mapping[str, Any]], start: int) -> None:
        """Takes the validations up to step `start`, from which the run goes on, into account.

        Args:
          rows: of metrics.jsonl; those of process 0 count.

        Raises:
          ValueError: the best step's checkpoint was not kept.
        """
        if self._metric is None:
            return
        found = [(row["step"], row[self._metric]) for row in rows if self._metric in row and 0 < row["step"] <= start]
        for step, value in gather(np.array(found if is_first() else [], np.float32).reshape(-1, 2)):
            self._update(int(step), float(value))
        if self.step and not (checkpoints_folder(self._run) / str(self.step)).exists():
            raise ValueError(
                f"{self._run}: by checkpoint.best: {self._metric} its best step is {self.step}, whose checkpoint was "
                f"not kept; go on with the setting it had, leave it out, or start over in another output_dir"
            )
        self.write()

    def write(self) -> None:
        """Writes BEST."""
        if self._metric is not None and is_first():
            values = [[step, value] for step, value in self._improvements]
            write_whole(self._run / BEST, json.dumps({"metric": self._metric, "improvements": values}) + "\n")

    def _update(self, step: int, value: float) -> None:
        value = float(np.float32(value))  # float32: values that a restart reads compare alike on every process
        best = self._improvements[-1][1] if self._improvements else -self._sign * math.inf
        if self._sign * value > self._sign * best:  # NaN is not
            self.step = step
            self._improvements.append((step, value))
