"""Callbacks are told of what happens in a run, and trackers get its rows: those of others' packages and one's own."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from train.config import LogConfig, PolicyConfig, ValidationConfig
from train.loop import train_policy
from train.run.callbacks import Callbacks
from train.run.directory import check_run, read_metrics
from train.run.sinks import MLflow, Trackio, flat
from train.running import SetupError

MakeConfig = Callable[..., PolicyConfig]
ROWS = [(1, {"loss": 0.5, "rewards/a b/mean": 1.0}), (2, {"loss": 0.25})]
TABLE = {"prompt": ["p", "q"], "completion": ["a|b", "\x1b[2J"], "reward": [0.5, None]}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a config name what is in this file."""
    monkeypatch.setitem(sys.modules, "test_callbacks", sys.modules[__name__])


class Noted:
    """A callback, and a tracker."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, run: Path, config: Any) -> None:
        Noted.calls.append(("made", run.name))

    def start(self, step: int) -> None:
        Noted.calls.append(("start", step))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        Noted.calls.append(("step", step, sorted(metrics)[0]))
        metrics.clear()

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        Noted.calls.append(("validation", step, all(name.startswith("validation/") for name in metrics)))
        metrics.clear()

    def end(self, step: int, reason: str) -> None:
        Noted.calls.append(("end", step, reason))


class Sink:
    """A tracker of one's own."""

    rows: ClassVar[list[int]] = []

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        self.run = run

    def write_row(self, step: int, row: dict[str, float]) -> None:
        Sink.rows.append(step)

    def write_table(self, step: int, table: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Leaves:
    def __init__(self, run: Path, config: Any) -> None: ...

    def step(self, step: int, metrics: dict[str, float]) -> None:
        raise SystemExit(0)

    def end(self, step: int, reason: str) -> None:
        raise KeyError(reason)


class NoHook: ...


def test_what_callbacks_are_told(policy_config: MakeConfig, tmp_path: Path) -> None:
    """They see copies; a run that goes on tells from where."""
    Noted.calls, Sink.rows = [], []
    config = policy_config(
        tmp_path,
        max_steps=2,
        callbacks=["test_callbacks.Noted"],
        validation=ValidationConfig(every=2, prompts=4, num_generations=2, batch_prompts=4),
        log=LogConfig(tensorboard=False, progress=False, trackers=["test_callbacks.Sink"]),
    )
    train_policy(config)
    first = ("step", 0, "validation/completions/clipped_ratio")
    assert Noted.calls[:4] == [("made", "run"), ("start", 0), ("validation", 0, True), first]
    # a step is logged when the next one's rollouts are dispatched, or at once where something is saved
    assert [call[:2] for call in Noted.calls[4:]] == [("step", 1), ("validation", 2), ("step", 2), ("end", 2)]
    assert Noted.calls[-1] == ("end", 2, "done")
    assert Sink.rows == [0, 1, 2] and "validation/reward" in read_metrics(tmp_path / "run")[-1]
    train_policy(replace(config, max_steps=3))
    assert [call for call in Noted.calls if call[0] in ("start", "end")][2:] == [("start", 2), ("end", 3, "done")]


def test_a_callback_that_ends_the_program_ends_the_run_in_one_line(
    policy_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = policy_config(
        tmp_path, callbacks=["test_callbacks.Leaves"], validation=ValidationConfig(prompts=0), max_steps=2
    )
    with pytest.raises(SetupError, match=r"callbacks: test_callbacks.Leaves.step: .*SystemExit"):
        train_policy(config)
    assert "callbacks: test_callbacks.Leaves.end: KeyError: 'SetupError'" in capsys.readouterr().out


def test_callbacks_that_are_none(policy_config: MakeConfig, tmp_path: Path) -> None:
    for name, message in (
        ("test_callbacks.NoHook", "expected a class with some of"),
        ("no.such", "cannot be imported"),
    ):
        with pytest.raises(ValueError, match=f"callbacks: {name}: {message}"):
            check_run(policy_config(tmp_path, callbacks=[name]))
    with pytest.raises(ValueError, match="log.trackers: no.such: cannot be imported"):
        check_run(policy_config(tmp_path, log=LogConfig(trackers=["no.such"])))
    with pytest.raises(ValueError, match="log.mlflow_experiment: needs the package no_package"):
        from train.run.directory import _require

        _require("no_package", "log.mlflow_experiment")
    Callbacks([], tmp_path, None).call("start", 0)


def test_settings_by_their_names() -> None:
    assert flat({"a": 1, "b": {"c": [2], "d": {}}}) == [("a", 1), ("b.c", [2]), ("b.d", {})]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the real package, in a folder: a run that goes on writes to the page that it had."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what mlflow-skinny has
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    for step, row in ROWS:
        sink = MLflow(tmp_path, "gopo", {"optimizer": {"learning_rate": 1e-6}})
        sink.write_row(step, row)
        sink.close()
    client = mlflow.tracking.MlflowClient()
    (page,) = client.search_runs([client.get_experiment_by_name("gopo").experiment_id])
    assert page.data.params == {"optimizer.learning_rate": "1e-06"} and page.info.status == "FINISHED"
    history = client.get_metric_history(page.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.25)]
    assert page.data.metrics["rewards/a b/mean"] == 1.0


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the real package, on this machine."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for step, row in ROWS:
        sink = Trackio(tmp_path, "gopo", {"optimizer": {"learning_rate": 1e-6}})
        sink.write_row(step, row)
        sink.write_table(step, TABLE)
        sink.close()
    name = f"{tmp_path.name}-{json.loads((tmp_path / 'trackio.json').read_text())['id'][:6]}"
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("gopo", name)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 0.5), (2, 0.25)]
