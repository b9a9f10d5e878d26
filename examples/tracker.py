"""A tracker and a callback of your own: a table of each metric, and a line for the phone when a run ends.

    python -m train policy --config configs/tldr/tiny_gopo.yaml --output_dir runs/own_tracker \
      --log.trackers examples.tracker.Table --callbacks examples.tracker.Bell
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Table:
    """Appends a line `step,metric,value` for each number to RUN/metrics.csv.

    Args:
      run: the run's directory.
      settings: the run's settings, as in its config.yaml.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        self._file = (run / "metrics.csv").open("a", newline="")
        self._writer = csv.writer(self._file)

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        self._writer.writerows((step, name, value) for name, value in row.items())

    def write_table(self, step: int, table: Mapping[str, Sequence[Any]]) -> None:
        """Leaves out the completions: they are in RUN/completions."""

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Bell:
    """Says how a run ended; put your own mail or chat in the place of `print`.

    Args:
      run: the run's directory.
      config: the run's settings.
    """

    def __init__(self, run: Path, config: Any) -> None:
        self._name, self._reward = run.name, float("nan")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._reward = metrics.get("reward", self._reward)

    def end(self, step: int, reason: str) -> None:
        print(f"{self._name} has ended at step {step} ({reason}), reward {self._reward:.4g}")
