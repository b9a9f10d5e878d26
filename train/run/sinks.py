"""MLflow and Trackio, as sinks of a `train.run.trackers.Tracker`; their packages are installed by who uses them."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.run.trackers import Table, page_id

MLFLOW, TRACKIO = "mlflow.json", "trackio.json"  # the id of the run's page there
_MLFLOW_CHARACTERS = r"[^\w\-./ ]"  # what the name of a metric may not have
_MLFLOW_VALUE = 6000  # characters of a parameter


class MLflow:
    """A run of an MLflow experiment; the server, or the folder, is MLFLOW_TRACKING_URI of the environment.

    Args:
      run: the run's directory, in which the id of its page is kept.
      experiment: its name; it is made if it is not there.
      config: the settings, as plain values.
    """

    def __init__(self, run: Path, experiment: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        mine = page_id(run, MLFLOW)
        pages = self._client.search_runs([number], f"tags.gopo_jax_run = '{mine}'")
        page = pages[0] if pages else self._client.create_run(number, tags={"gopo_jax_run": mine}, run_name=run.name)
        self._id = page.info.run_id
        self._client.set_terminated(self._id, "RUNNING")
        for name, value in () if pages else flat(config):
            self._client.log_param(self._id, name, str(value)[:_MLFLOW_VALUE])

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        names = {re.sub(_MLFLOW_CHARACTERS, "_", name): value for name, value in row.items()}
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in names.items()])

    def write_table(self, step: int, table: Table) -> None:
        rows = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        self._client.log_text(self._id, text, f"completions/train_{step:06d}.jsonl")

    def flush(self) -> None:
        """Nothing to do: every call is sent."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio:
    """A run of a Trackio project, on this machine or where the environment's TRACKIO_* variables say.

    Args: as those of `MLflow`, with a project's name.
    """

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]) -> None:
        import trackio

        name = f"{run.name}-{page_id(run, TRACKIO)[:6]}"  # a name is all that tells runs apart
        self._page = trackio.init(
            project, name, config=dict(flat(config)), resume="allow", embed=False, auto_log_gpu=False
        )
        self._table = trackio.Table

    def write_row(self, step: int, row: Mapping[str, float]) -> None:
        self._page.log(dict(row), step=step)

    def write_table(self, step: int, table: Table) -> None:
        rows = [list(map(str, values)) for values in zip(*table.values(), strict=True)]
        self._page.log({"completions": self._table(columns=list(table), data=rows)}, step=step)

    def flush(self) -> None:
        """Nothing to do: Trackio has a thread that sends."""

    def close(self) -> None:
        self._page.finish()


def flat(config: Mapping[str, Any], outer: str = "") -> list[tuple[str, Any]]:
    """Returns the settings by their dotted names; a list is one value."""
    found: list[tuple[str, Any]] = []
    for name, value in config.items():
        found += flat(value, f"{outer}{name}.") if isinstance(value, dict) and value else [(f"{outer}{name}", value)]
    return found
