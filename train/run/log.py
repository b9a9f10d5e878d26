"""The log of a policy's steps, each written once its update has ended; until then the devices already draw the next."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.config import Qwen3Config
from train.batch import Groups
from train.config import PolicyConfig
from train.console import print_plain
from train.run.directory import Run
from train.run.metrics import Timer, UpdateMetrics, fetch_metrics, nonfinite_metric, require_finite, throughput


class StepLog:
    """Holds a step until its update has ended, so that the next rollouts are dispatched without waiting for it.

    Args:
      run: where the steps are written.
      config: the run's config.
      network: the policy's.
      timer: of the loop.
    """

    def __init__(self, run: Run, config: PolicyConfig, network: Qwen3Config, timer: Timer) -> None:
        self._run, self._config, self._network, self._timer = run, config, network, timer
        self._step: int | None = None  # the one that is held
        self._updates: Sequence[UpdateMetrics] = ()  # of which the metrics are still on the devices
        self._metrics: dict[str, Any] = {}
        self._drawn: Sequence[Groups] = ()
        self._write_batch: Callable[[], Path | None] | None = None
        self._skipped = 0  # steps in a row whose updates are left out

    def hold(
        self,
        step: int,
        updates: Sequence[UpdateMetrics],
        metrics: Mapping[str, Any],
        drawn: Sequence[Groups],
        write_batch: Callable[[], Path | None] | None = None,
    ) -> None:
        """Takes a step whose update is dispatched.

        Args:
          step: its number, from 1.
          updates: its metrics that are still computed.
          metrics: those that are known already.
          drawn: all that was sampled for it.
          write_batch: writes its batch, and returns the file, None if that cannot be; called if its update is not
            finite.
        """
        self._step, self._updates, self._metrics, self._drawn = step, updates, dict(metrics), drawn
        self._write_batch = write_batch

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds metrics to the step that is held."""
        self._metrics |= metrics

    def wait(self) -> None:
        """Waits for the end of the held step's update.

        Raises:
          FloatingPointError: the run has diverged, see `train.run.metrics.require_finite`.
        """
        if self._step is None or not self._updates:
            return
        metrics = fetch_metrics(self._updates)
        self._timer.lap("update")
        if name := nonfinite_metric(metrics):
            self._skip_or_stop(self._step, metrics, name)
            metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        else:
            self._skipped = 0
        self._metrics, self._updates = metrics | self._metrics, ()

    def _skip_or_stop(self, step: int, metrics: Mapping[str, float], name: str) -> None:
        """Writes the batch of a step that is not finite, and ends the run unless its update may be left out."""
        self._skipped += 1
        file = self._write_batch() if self._write_batch is not None else None
        allowed = self._config.skip_nonfinite
        if self._skipped > allowed:
            row = f", {allowed + 1} such steps in a row" if allowed else ""
            require_finite(step, metrics, suspects="the rewards of this step" + (f", {file}" if file else "") + row)
        print_plain(
            f"{self._run.path}: step {step}: {name} is {metrics[name]}, so its update is left out ({self._skipped} in "
            f"a row, skip_nonfinite: {allowed})" + (f"; its batch is {file}" if file else "")
        )

    def write(self) -> None:
        """Waits for the held step, writes and shows it; does nothing if none is held."""
        self.wait()
        if self._step is None:
            return
        seconds = self._timer.take()
        training_seconds = seconds["timing_s/step"] - seconds.get("timing_s/validation", 0.0)
        speed = throughput(self._config, self._network, self._drawn, training_seconds)
        metrics = self._metrics | seconds | speed
        self._run.write(self._step, metrics)
        self._run.show(
            self._step, {name: metrics[name] for name in ("reward", "kl", "perf/tokens_per_s") if name in metrics}
        )
        self._step, self._drawn = None, ()
