"""The log of a policy's steps, each written once its update has ended; until then the devices already draw the next."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.config import Qwen3Config
from train.batch import Groups
from train.config import PolicyConfig
from train.run.directory import Run
from train.run.metrics import Timer, UpdateMetrics, fetch_metrics, require_finite, throughput


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

    def hold(
        self, step: int, updates: Sequence[UpdateMetrics], metrics: Mapping[str, Any], drawn: Sequence[Groups]
    ) -> None:
        """Takes a step whose update is dispatched, with the metrics that are known already and all that was drawn."""
        self._step, self._updates, self._metrics, self._drawn = step, updates, dict(metrics), drawn

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
        found = fetch_metrics(self._updates)
        self._timer.lap("update")
        require_finite(self._step, found)
        self._metrics, self._updates = found | self._metrics, ()

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
