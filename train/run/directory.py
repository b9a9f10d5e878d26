"""A run's directory: what is written into it, read from it, and checked when a run is resumed.

    runs/NAME/{config.yaml, metrics.jsonl, tensorboard/, wandb.json, checkpoints/STEP/, tokenizer/,
               tokenizer_digests.json, completions/, profile/, nonfinite/}

Resuming cuts `metrics.jsonl` back to the restored step (`train.run.metrics_file`).
"""

import contextlib
import importlib
import json
import math
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import yaml

from models.checkpoint import BEST, STOPPED, Checkpoints, checkpoints_folder, read_newest_about, restore_state
from models.checkpoint_failures import SaveError, failure_reason
from models.checkpoint_steps import FOLDER, check_pointer, finalized_steps
from models.finite import first_nonfinite
from models.names import split_step
from models.tokenizer import Tokenizer
from models.tokenizer_copy import TOKENIZER, TOKENIZER_DIGESTS, check_tokenizer_copy, digest_tokenizer
from train.config import RunConfig, resolved
from train.console import console, print_plain
from train.dotted import import_function
from train.processes import gather, is_distributed, is_first
from train.run.best import BestStep
from train.run.callbacks import Callbacks, import_callbacks
from train.run.changes import CONFIG, check_output_dir, check_start, refuse_another
from train.run.files import check_run_directory, disk_errors, write_jsonl, write_parquet, write_whole
from train.run.metrics_file import (
    METRICS,
    MetricsFile,
    lines_text,
    parse_metrics,
    read_metrics,
    rewind_metrics,
    write_rows,
)
from train.run.profile import PROFILE, Profile, finish_trace
from train.run.progress import StepProgress
from train.run.room import CheckpointBytes, check_checkpoints_room
from train.run.schedule import SaveSchedule
from train.run.signals import defer_signals
from train.run.sinks import MLflow, Trackio
from train.run.trackers import CLOSE_SECONDS, TensorBoard, Tracker, WeightsAndBiases
from train.run.writes import append_line, persist
from train.running import RunInterrupted, SetupError, WriteError
from train.state import TrainState

__all__ = [
    "CALIBRATION",
    "COMPLETIONS",
    "CONFIG",
    "METRICS",
    "OPEN_RUNS",
    "MetricsFile",
    "Run",
    "check_imports",
    "check_output_dir",
    "check_run",
    "lines_text",
    "parse_metrics",
    "read_metrics",
    "rewind_metrics",
    "write_rows",
]
_HURRY_SECONDS = 10.0  # how long a run that an error or a signal ends waits for a tracker
COMPLETIONS, CALIBRATION = "completions", "calibration.json"


def check_imports(config: RunConfig) -> None:
    """Refuses callbacks and trackers that cannot be imported.

    Raises:
      ValueError: the first such one.
    """
    import_callbacks(config.callbacks)
    for name in config.log.trackers:
        import_function(name, "log.trackers")


def check_run(config: RunConfig) -> None:
    """Refuses, before anything is read, a directory in which the run could not write or would replace what is no run.

    Raises:
      ValueError: the directory of the run, or of its checkpoints, is refused.
    """
    check_output_dir(config)
    check_start(config)
    path = Path(config.output_dir)
    check_pointer(path, config.checkpoint.directory)
    checkpoints = config.checkpoint.directory or str(checkpoints_folder(path))
    folders = (TOKENIZER, "tensorboard", COMPLETIONS, *([PROFILE] if config.log.profile else []))
    check_imports(config)
    check_run_directory(config.output_dir, folders, checkpoints)
    steps = finalized_steps(checkpoints_folder(path))
    has_rows = (path / METRICS).is_file() and (path / METRICS).stat().st_size > 0
    if steps:  # else the tokenizer is copied anew
        check_tokenizer_copy(path / TOKENIZER)
    elif has_rows and (path / FOLDER).is_file():
        console.print(f"{path / FOLDER}: names {checkpoints_folder(path)}, which has no checkpoint: {path} starts anew")
    if has_rows and not (path / CONFIG).is_file():
        raise ValueError(
            f"{path / METRICS}: is no run's, for there is no {CONFIG} beside it, and a new run would replace it; "
            f"choose another output_dir"
        )


class Run:
    """An open run directory.

    Attributes:
      start: the step that the run starts or goes on from, known after `resume`.
      restored: what the checkpoint that it goes on from holds beside the state.
      beside: returns what `save` puts there.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Mapping[str, Any],
        tokenizer: Tokenizer,
        pins: Mapping[str, Mapping[str, Any]] | None = None,
        previous: bool = False,
    ) -> None:
        """Opens the directory, and writes the config and the tokenizer into it.

        Args:
          config: the run's config, as the user gave it.
          model: the network's Hugging Face config.
          tokenizer: the run's tokenizer.
          pins: what the run was started from, see `train.pins`.
          previous: whether to go on from the checkpoint before the newest one, which is set aside.

        Raises:
          ValueError: see `check_output_dir`; a checkpoint directory that not every process sees; or `previous` of a
            run that early stopping has ended.
        """
        self.path = Path(config.output_dir)
        if previous and (self.path / STOPPED).is_file():
            raise ValueError(
                f"--resume previous: {self.path} was ended by early stopping, and is its best step; to train "
                f"on, delete {STOPPED} in it"
            )
        self.config = config
        plain = json.loads(json.dumps(resolved(config)))
        check_output_dir(config)
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / CONFIG, yaml.safe_dump(plain, sort_keys=False))
        self._about = {"model": dict(model), "run": plain, "pins": dict(pins or {})}
        self._about |= {"lora": plain["lora"]} if config.lora.rank else {}
        keep = {name: getattr(config.checkpoint, name) for name in ("keep", "keep_every", "weights_only", "directory")}
        with disk_errors(checkpoints_folder(self.path)):
            self._checkpoints = Checkpoints(self.path, **keep, previous=previous)
        self._check_shared()
        is_new = self._checkpoints.latest() is None
        if is_first() and (is_new or not (self.path / TOKENIZER).is_dir()):  # a run that goes on has the one it had
            self._save_tokenizer(tokenizer)
        self._trackers: list[Tracker] = []
        self._callbacks = Callbacks((), self.path, config)
        self._tracker_seconds = CLOSE_SECONDS
        self._is_warned = False  # that completions could not be written
        self._progress = StepProgress(self.path.name, config.max_steps, config.log.progress)
        self._profile = Profile(None, self.path, 0)
        self._schedule = SaveSchedule(config.checkpoint, config.max_steps)
        self._best = BestStep(self.path, config.checkpoint)
        self._started = time.perf_counter()
        self._step = 0  # the one that was begun last, from 1
        self.start = 0
        self.restored: dict[str, Any] = {}
        self.beside: Callable[[], dict[str, Any]] = dict
        OPEN_RUNS.add(self)

    def _save_tokenizer(self, tokenizer: Tokenizer) -> None:
        copy, digests = self.path / TOKENIZER, self.path / TOKENIZER_DIGESTS
        with disk_errors(copy):
            digests.unlink(missing_ok=True)  # of another copy: a kill may come before the new ones
            tokenizer.save(copy)
        write_whole(digests, json.dumps(digest_tokenizer(copy, tokenizer.path), indent=2) + "\n")

    def _check_shared(self) -> None:
        """Refuses a checkpoint directory that not every process sees."""
        if not is_distributed():
            return
        number = gather(np.random.default_rng().integers(2**31, size=1, dtype=np.int32))[0]
        probe = checkpoints_folder(self.path) / f"shared-{number}.tmp"
        if is_first():
            probe.write_text("all processes see this")
        gather(np.zeros(1))  # barrier: the file is written
        seen = probe.exists()
        gather(np.zeros(1))  # barrier: all processes have looked
        if is_first():
            probe.unlink()
        if not seen:
            raise ValueError(
                f"{checkpoints_folder(self.path)}: process {jax.process_index()} does not see what process 0 writes "
                f"there; expected one directory for all: a shared output_dir, or checkpoint.directory on one "
                f"(gs:// too)"
            )

    def resume(self, state: TrainState, beside: Mapping[str, Any] = MappingProxyType({})) -> TrainState:
        """Restores the newest checkpoint, if there is one, into `state`; cuts metrics.jsonl back to its step.

        Args:
          beside: arrays like those that the checkpoint holds beside the state, for `restored`.
        """
        latest = self._checkpoints.latest()
        self._check_room(state, latest, _tree_bytes(dict(beside)) if beside else 0)
        origin = self._about["pins"].get("start_from", {}).get("exact") if latest is None else None
        if origin is not None:
            items = _optimizer_items(state) | dict(beside)
            params, train, frozen = restore_state(origin, state.params, items, state.frozen)
            self.restored = {name: train.pop(name) for name in beside}
            state = state._replace(params=params, frozen=frozen, **train)
            self.start = self.origin
            console.print(f"{self.path}: starting from {origin}, to step {self.config.max_steps}")
        if state.frozen:
            state = state._replace(frozen=self._restore_or_save_base(state.frozen))
        if latest is not None and (self.config.checkpoint.directory is not None or (self.path / FOLDER).is_file()):
            about = read_newest_about(self.path)
            refuse_another(self.config, about["run"], checkpoints_folder(self.path))
        if latest is not None:
            state = self._restore(latest, state, beside)
            self.start = latest
            self._say_where(latest)
        if is_first():
            if origin is not None:
                rows = [row for row in read_metrics(split_step(origin)[0]) if row["step"] <= self.start]
                write_rows(self.path / METRICS, rows)
            else:
                rewind_metrics(self.path / METRICS, latest)
            self._open_trackers()
            self._callbacks = Callbacks(self.config.callbacks, self.path, self.config)
            self._callbacks.call("start", self.start)
        if latest is not None:
            self._best.replay([row for row in read_metrics(self.path) if row["step"] > self.origin], latest)
            self.keep_best(self._best.step)
        return state

    def _say_where(self, latest: int) -> None:
        if latest <= self.config.max_steps:
            console.print(f"{self.path}: going on from step {latest} of {self.config.max_steps}")
            return
        console.print(
            f"{self.path}: has reached step {latest} already, so that max_steps: {self.config.max_steps} trains "
            f"nothing; raise it, or begin another run at an earlier step with start_from: {self.path}@STEP"
        )

    @property
    def origin(self) -> int:
        """The step of another run that this one was started from (`start_from`); 0: none."""
        pin = self._about["pins"].get("start_from")
        return 0 if pin is None else int(split_step(pin["exact"])[1])

    def _restore_or_save_base(self, frozen: Any) -> Any:
        bases: list[Any] = []
        restore = lambda: bases.append(self._checkpoints.restore_or_save_base(frozen))  # noqa: E731
        self._persist(restore, "base", together=True)
        return bases[-1]

    def _restore(self, step: int, state: TrainState, beside: Mapping[str, Any]) -> TrainState:
        try:
            params, train = self._checkpoints.restore(step, state.params, _optimizer_items(state) | dict(beside))
        except ValueError as error:
            if not re.search(r"structures do not match: opt_state|train\.opt_state\.\S+ was (not )?saved", str(error)):
                raise
            name = self.config.optimizer.name
            raise ValueError(f"{error}; the state there is not of the optimizer of optimizer.name: {name}") from error
        self.restored = {name: train.pop(name) for name in beside}
        return state._replace(params=params, **train)

    def _check_room(self, state: TrainState, latest: int | None, more: int) -> None:
        """Refuses a disk that does not take the next checkpoints, of the state and so many bytes more."""
        steps = range((latest or self.origin) + 1, self.config.max_steps + 1)
        due = sum(self._schedule.is_planned(step) for step in steps)
        size = CheckpointBytes(
            base=_tree_bytes(state.frozen) if latest is None else 0,
            step=_tree_bytes((state.params, state.opt_state)) + more,
            weights=_tree_bytes(state.params),
        )
        folder = str(checkpoints_folder(self.path))
        check_checkpoints_room(folder, self.config.checkpoint, steps, due, size, is_new=latest is None)

    def _open_trackers(self) -> None:
        if self.config.log.tensorboard:
            folder = self.path / "tensorboard"
            self._trackers.append(Tracker(str(folder), lambda: TensorBoard(folder, self.start)))
        log, plain = self.config.log, resolved(self.config)
        if log.wandb_project:
            _require("wandb", "log.wandb_project")
            settings: dict[str, Any] = {"project": log.wandb_project, "config": plain}
            self._trackers.append(Tracker("Weights & Biases", lambda: WeightsAndBiases(self.path, settings)))
        if (experiment := log.mlflow_experiment) is not None:
            _require("mlflow", "log.mlflow_experiment")
            self._trackers.append(Tracker("MLflow", lambda: MLflow(self.path, experiment, plain)))
        if (project := log.trackio_project) is not None:
            _require("trackio", "log.trackio_project")
            self._trackers.append(Tracker("Trackio", lambda: Trackio(self.path, project, plain)))
        for name in log.trackers:
            make = import_function(name, "log.trackers")
            self._trackers.append(Tracker(name, partial(make, self.path, plain)))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one row of metrics to metrics.jsonl and the trackers; NaN, a metric without a value, is left out."""
        self._profile.logged(step)
        if not is_first():
            return
        row = {name: float(value) for name, value in values.items()}
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        line = json.dumps({"step": step, **row}) + "\n"
        self._persist(lambda: append_line(self.path / METRICS, line), self.path / METRICS, recover=self._settle_save)
        for tracker in self._trackers:
            tracker.write_row(step, row)
        self._callbacks.call("step", step, row)

    def persist(self, write: Callable[[Path, str], None], name: str, text: str) -> None:
        """Calls `write(file, text)` for a file of the run that has to be kept; to be called on the first process."""
        file = self.path / name
        self._persist(lambda: write(file, text), file, recover=self._settle_save)

    def _persist(self, write: Callable[[], None], place: object, **options: Any) -> None:
        persist(write, place, self.config.checkpoint.on_error, **options)

    def _settle_save(self) -> None:
        """Ends the save in flight: if it has failed, for want of room too, what it has left is removed."""
        if not is_distributed():
            with contextlib.suppress(SaveError):
                self._checkpoints.wait()

    def write_completions(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes completions/NAME.jsonl; they are texts for reading, so that a full disk does not stop a run here."""
        if is_first():
            with self._warnings():
                write_jsonl(self.path / COMPLETIONS / f"{name}.jsonl", rows)

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        """Turns the first failure to write completions into a warning, and those that follow into nothing."""
        try:
            yield
        except OSError as error:
            if not self._is_warned:
                reason = failure_reason(error.__cause__ or error)
                print_plain(
                    f"warning: {self.path / COMPLETIONS}: could not be written ({reason}); the run goes on without "
                    f"what is missing there"
                )
            self._is_warned = True

    def completions_due(self, step: int) -> bool:
        every = self.config.log.completions_every
        return bool(every) and step % every == 0

    def write_table(self, step: int, table: Mapping[str, Sequence[Any]]) -> None:
        """Writes completions/train_STEP.parquet, and a table to each tracker."""
        if not is_first():
            return
        with self._warnings():
            columns = {"step": [step] * len(table["prompt"])} | dict(table)
            write_parquet(self.path / COMPLETIONS / f"train_{step:06d}.parquet", columns)
        for tracker in self._trackers:
            tracker.write_table(step, table)

    def checkpoint_due(self, step: int) -> bool:
        """Whether to save after this step; to be asked once a step, by every process: all get the same answer."""
        return self._schedule.is_due(step) or step == self._best.step

    def validated(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Takes a validation into account for `checkpoint.best`, and returns its metrics.

        Raises:
          SetupError: it has no such metric.
        """
        self._best.observe(step, metrics)
        self._callbacks.call("validation", step, metrics)
        return metrics

    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint in the background; with checkpoint.on_error: wait, before the next step.

        Raises:
          FloatingPointError: a parameter is not finite: the step's update has spoilt it.
          WriteError: this save, or the one before, has failed.
        """
        if name := first_nonfinite(state.params):
            raise FloatingPointError(
                f"step {step}: {name} has NaN or infinite values after the update: the run has diverged; the "
                f"checkpoints are as they were; go on from an earlier one with a lower optimizer.learning_rate"
            )
        self._schedule.saved(step)
        if step == self._best.step:
            self.keep_best(step)
            self._persist(self._best.write, self.path / BEST)

        def write() -> None:
            self._checkpoints.save(step, state.params, _optimizer_items(state) | self.beside(), self._about)
            if self.config.checkpoint.on_error == "wait":  # in the next step its arrays would be gone
                self._checkpoints.wait()

        self._persist(write, f"step {step}", together=True, recover=self._reopen_checkpoints)

    def _reopen_checkpoints(self) -> None:
        if is_distributed() and self.config.checkpoint.on_error == "wait":  # else they have been, or the run ends
            self._checkpoints.reopen()

    def keep_best(self, step: int) -> None:
        """Keeps this step's checkpoint, whatever `checkpoint.keep` is, until the next call."""
        self._checkpoints.best = step

    def delete_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        self._checkpoints.delete_after(step)

    def wait(self) -> None:
        """Waits for the checkpoint in flight.

        Raises:
          WriteError: it could not be saved.
        """
        persist(self._checkpoints.wait, "", "stop")

    def steps(self) -> Iterator[int]:
        """Iterates over the remaining steps behind a progress bar, which also shows the values passed to `show`.

        Raises:
          RunInterrupted: a signal came, and the step before is saved; see `train.run.signals`.
          WriteError: a checkpoint could not be saved.
        """
        total = self.config.max_steps
        if self.start < total:
            self._profile = Profile(self.config.log.profile, self.path, self.start)
        with self._progress.begin(self.start):
            defer_signals()
            self._schedule.restart_clock()
            for step in range(self.start, total):
                self._step = step + 1
                with self._profile.step(step + 1):
                    yield step
                self._progress.advance(step + 1)
                persist(self._checkpoints.check, "", "stop")
                if number := self._schedule.interruption(step + 1):
                    raise RunInterrupted(number, f"{self.path}: interrupted", is_agreed=True)  # see `abandon`

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows metrics beside the progress bar; without a terminal, prints a line ten times in a run."""
        self._progress.show(step, values)

    def close(self, ending: str | None = None) -> None:
        """Waits for the checkpoint in flight, closes the trackers, and prints how the run ended.

        Raises:
          WriteError: the checkpoint could not be saved.
        """
        finish_trace()
        self.wait()
        OPEN_RUNS.discard(self)
        self._checkpoints.close()
        self._close_trackers()
        self._callbacks.end(self._step or self.start, ending or "done")
        ending = ending or f"{self.config.max_steps} steps"
        console.print(f"{self.path}: done, {ending}, {time.perf_counter() - self._started:.0f} s")

    def _close_trackers(self) -> None:
        while self._trackers:
            self._trackers.pop(0).close(self._tracker_seconds)

    def abandon(self, error: BaseException) -> None:
        """Ends a run whose loop `error` has left, after the save in flight; tells the error what is saved."""
        OPEN_RUNS.discard(self)
        self._progress.stop()
        self._tracker_seconds = _HURRY_SECONDS
        self._close_trackers()
        self._callbacks.end(self._step, error.name if isinstance(error, RunInterrupted) else type(error).__name__)
        if isinstance(error, SetupError | FloatingPointError) or not (self._step or isinstance(error, WriteError)):
            return  # its message says all this; or nothing was begun
        saved = self._checkpoints.newest_saved()
        at = f"step {self._step} of {self.config.max_steps}"
        go_on = "no step is saved; the same command starts it anew"
        if saved is not None:
            go_on = f"step {saved} is saved; the same command goes on from there"
        if isinstance(error, WriteError):
            error.line += f"; {go_on}"
        elif isinstance(error, RunInterrupted):
            error.line = f"{self.path}: {error.name} ended the run after {at}; {go_on}"
        else:
            error.add_note(f"{self.path}: {type(error).__name__} ended the run in {at}; {go_on}")


OPEN_RUNS: weakref.WeakSet[Run] = weakref.WeakSet()


def _require(package: str, setting: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{setting}: needs the package {package}; install it or leave this out") from error


def _tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _optimizer_items(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step}
