"""Orbax checkpoints of a run: one atomic step each, with everything that evaluation and resuming need.

runs/NAME/checkpoints/STEP/params   the trained parameters, a nested dict of arrays
                          /train    optimizer state and the rest of the trainer's state; not in a step that is marked as
                                    one of weights alone, by a file WEIGHTS_ONLY
                          /digests  JSON that tells damaged arrays from those that were saved
                          /about    JSON: {"model": a Hugging Face config, "run": the resolved run config,
                                    "pins": what the run was started from, and "lora" if the run trains adapters}
runs/NAME/checkpoints/base          the frozen parameters of a run that trains adapters

To store checkpoints elsewhere, for example in gs://BUCKET/NAME, `checkpoints` is a file with that name in it.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models.checkpoint_failures import check_writable, remove_unfinished, save_error, silence_orbax
from models.checkpoint_files import DIGESTS, give_up_state, missing_array_file, warn_once
from models.checkpoint_restore import Digests, StepReader, make_digests, read_about_item, reason_of, restore_arrays
from models.checkpoint_steps import (
    BEST,
    FOLDER,
    REMOVED,
    STOPPED,
    best_step,
    checkpoints_folder,
    finalized_steps,
    find_step,
    finish_removals,
    folder_of,
    is_finalized,
    is_run,
    resolve_step,
    resumable_steps,
    set_checkpoints_folder,
    set_damaged_aside,
    set_newest_aside,
    whole_steps,
)
from models.config import Qwen3Config, read_config
from models.digests import digest_arrays
from models.finite import require_finite_weights
from models.hf_weights import abstract_model, abstract_params, as_layout, load_pretrained, split
from models.lora import Lora, merge_adapters, merge_trainable, split_trainable
from models.names import split_step
from models.qwen3 import Backbone
from models.sharding import Layout
from models.tensorstore_memory import spare_memory
from models.weight_files import could_be_on_hub, describe_local, find_directory

__all__ = [
    "BASE",
    "BEST",
    "FOLDER",
    "STOPPED",
    "Checkpoints",
    "best_step",
    "check_loadable",
    "checkpoints_folder",
    "find_step",
    "is_run",
    "load_adapters",
    "load_model",
    "read_about",
    "read_newest_about",
    "resolve_step",
    "set_checkpoints_folder",
    "set_damaged_aside",
    "wait_for_saves",
]
BASE = "base"


class Checkpoints:
    """The checkpoints of one run directory. A killed save leaves the previous step intact."""

    def __init__(
        self,
        run: str | Path,
        *,
        keep: int | None = None,
        keep_every: int | None = None,
        weights_only: bool = False,
        directory: str | None = None,
        previous: bool = False,
    ) -> None:
        """Opens a run's checkpoints.

        Args:
          run: the run's directory.
          keep: the number of newest checkpoints to keep; None = all.
          keep_every: older steps that are a multiple of this are kept too; None = none of them.
          weights_only: what is kept by `keep_every` alone loses the trainer's state.
          directory: where to store checkpoints; None = in the run's directory.
          previous: whether to go on from the step before the newest one, which is set aside.

        Raises:
          ValueError: keep below 1, which would delete every checkpoint; see `set_checkpoints_folder`,
            `set_newest_aside` and `set_damaged_aside`.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, or None to keep all, got {keep}")
        if directory is not None:
            set_checkpoints_folder(run, directory)
        self._keep, self._keep_every, self._weights_only = keep, keep_every, weights_only
        self.best = 0  # a step to keep although there are `keep` newer ones
        self._run, self._folder, self._saving = run, checkpoints_folder(run), 0  # the step whose save was begun last
        self._base: Digests = {}  # digests of the frozen base of adapters
        self._unsynced: int | None = None  # the step that was saved last, until it is on the disk for certain
        silence_orbax()
        finish_removals(self._folder)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("removals are finished")
        if previous:
            set_newest_aside(self._folder)
        set_damaged_aside(self._folder)
        spare_memory()
        self._manager = self._open()
        _OPEN.add(self)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if self._keep is None else self,
            create=True,
            cleanup_tmp_directories=True,
            todelete_subdir=REMOVED,  # a kill while files are deleted one by one would leave half a step
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Orbax's preservation policy: returns for each checkpoint, oldest first, whether to keep it."""
        newest = len(checkpoints) - (self._keep or len(checkpoints))
        return [
            i >= newest or checkpoint.step == self.best or self._is_kept_by_period(checkpoint.step)
            for i, checkpoint in enumerate(checkpoints)
        ]

    def _is_kept_by_period(self, step: int) -> bool:
        return self._keep_every is not None and step % self._keep_every == 0

    def _give_up_states(self) -> None:
        """Removes the trainer's state of the steps that are kept by `keep_every` alone."""
        if self._keep is None or not self._weights_only or jax.process_index() != 0:
            return
        for step in finalized_steps(self._folder)[: -self._keep]:
            if self._is_kept_by_period(step) and step != self.best:
                with contextlib.suppress(OSError):  # a full disk; it is tried again at the next save
                    give_up_state(self._folder / str(step))

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def latest(self) -> int | None:
        """Returns the newest step, or None without checkpoints."""
        return self._manager.latest_step()

    def newest_saved(self) -> int | None:
        """Returns the newest step that is finalized on the disk; one that is being saved, or could not be, is none."""
        return max(finalized_steps(self._folder), default=None)

    def save(self, step: int, params: Any, train: Any, about: dict[str, Any]) -> None:
        """Saves in the background, with digests of it all; a later save waits for an earlier one.

        Older steps are removed, as `keep` has it, after this one is complete.

        Raises:
          SaveError: the save could not be begun, or the one before has failed.
        """
        self.wait()
        self._saving = step
        digests = make_digests({**digest_arrays({"params": params, "train": train}), **self._base}, about)
        args = {"params": ocp.args.StandardSave(params), "train": ocp.args.StandardSave(train)}
        json_args = {"about": ocp.args.JsonSave(about), DIGESTS: ocp.args.JsonSave(digests)}
        with self._save_errors():
            self._give_up_states()
            if jax.process_index() == 0:
                check_writable(self._folder)
            self._manager.save(step, args=ocp.args.Composite(**args, **json_args))
        self._unsynced = step

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:  # of several processes some may be writing yet
                with contextlib.suppress(OSError):  # a disk that cannot be read either
                    self.reopen()
            raise save_error(self._folder / str(self._saving), error) from error

    def reopen(self) -> None:
        """Removes what a failed save has left, and forgets the failure; to be called by all processes.

        Raises:
          OSError: the directory cannot be used.
        """
        with contextlib.suppress(Exception):  # the failure that the caller knows
            self._manager.close()
        if jax.process_index() == 0:
            remove_unfinished(self._folder, str(self._saving))
        self._unsynced = None
        self._manager = self._open()

    def restore(self, step: int, params: Any, train: Any) -> tuple[Any, Any]:
        """Restores parameters and trainer state of a step, with the shapes and shardings of the given trees.

        Raises:
          ValueError: the step cannot be read, is not what was saved, or has parameters that are not finite.
        """
        self.wait()  # it may be the one in flight
        reader = self._reader(step)
        reader.about()  # what loads the run needs it
        restored = reader.arrays("params", params), reader.arrays("train", train)
        require_finite_weights(restored[0], f"{self._folder}: step {step}")
        return restored

    def _reader(self, step: int) -> StepReader:
        def remedy() -> str:
            earlier = [other for other in resumable_steps(self._folder) if other < step]
            if earlier:
                return f"; put its files back, or go on from step {earlier[-1]} with --resume previous"
            return f"; no earlier step is whole: put its files back, or delete {self._folder} to start over"

        return StepReader(self._run, self._folder, step, remedy)

    def restore_or_save_base(self, frozen: Any) -> Any:
        """Returns the frozen parameters that the run saved first; saves these if it has no checkpoint yet.

        A run that was killed before its first checkpoint starts anew, perhaps from other parameters.

        Raises:
          ValueError: the run has checkpoints, which need what it saved, and that is not whole, damaged or not finite.
          SaveError: they could not be saved.
        """
        latest = self.latest()
        is_saved = latest is not None and is_finalized(self._folder / BASE)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all processes have looked before one writes")
        if latest is not None and is_saved:
            frozen = _restore_base(self._folder, frozen, self._reader(latest).digests())
            self._base = digest_arrays({BASE: frozen})
            return frozen
        self._base = digest_arrays({BASE: frozen})
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self._folder / BASE, frozen, force=True)  # overwrites a killed save
        except Exception as error:
            if jax.process_count() == 1:
                remove_unfinished(self._folder, BASE)
            raise save_error(self._folder / BASE, error) from error
        return frozen

    def check(self) -> None:
        """Looks, without waiting, whether the last save has failed.

        Raises:
          SaveError: it has. Each failure is raised once.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in flight, and for the removal of what it replaces.

        Raises:
          SaveError: it has failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()
            finish_removals(self._folder, self._unsynced)
        self._unsynced = None

    def close(self) -> None:
        """Waits for the save in flight and closes the manager."""
        self.wait()
        self._manager.close()
        self._give_up_states()
        _OPEN.discard(self)


_OPEN: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


def wait_for_saves() -> None:
    """Waits for the saves in flight of all open checkpoints, after an error; prints those that fail too."""
    for checkpoints in list(_OPEN):
        try:
            checkpoints.wait()
        except Exception as error:  # the first error is the one that is raised
            warn_once(f"a checkpoint could not be saved: {error}")


def read_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item: {"model": ..., "run": ...}, and "lora" if it has adapters."""
    return _reader(*find_step(checkpoint)).about()


def read_step_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item; one of several processes may call this alone."""
    run, step = find_step(checkpoint)
    return read_about_item(checkpoints_folder(run) / str(step))


def restore_state(checkpoint: str | Path, params: Any, train: Any, frozen: Any) -> tuple[Any, Any, Any]:
    """Restores parameters, trainer state and the base of adapters of RUN@STEP, laid out as the given trees.

    Raises:
      ValueError: the step cannot be read.
    """
    run, step = find_step(checkpoint)
    reader = _reader(run, step)
    base = _restore_base(checkpoints_folder(run), frozen, reader.digests()) if frozen else frozen
    return _restore_params(run, step, params), reader.arrays("train", train), base


def read_newest_about(run: str | Path, directory: str | None = None) -> dict[str, Any]:
    """Reads the `about` item of the newest checkpoint that has a readable one; {} without checkpoints.

    In contrast to `read_about`, one of several processes may call this alone.

    Args:
      run: a run's directory, which may not exist yet.
      directory: where its checkpoints are, if the run's directory does not say so.

    Raises:
      ValueError: there are checkpoints, and none has a readable `about`.
    """
    if (Path(run) / FOLDER).exists():
        folder = checkpoints_folder(run)
    elif directory is not None:
        folder = folder_of(directory)
    else:
        return {}
    reason: Exception | None = None
    for step in reversed(finalized_steps(folder)):
        try:
            return read_about_item(folder / str(step))
        except (OSError, ValueError) as error:
            reason = reason or error
    if reason is not None:
        raise ValueError(f"{folder}: no checkpoint in it can be read ({reason})") from reason
    return {}


def _reader(run: Path, step: int) -> StepReader:
    folder = checkpoints_folder(run)

    def remedy() -> str:
        others = [other for other in whole_steps(folder) if other != step]
        nearest = max(others, key=lambda other: (other < step, other), default=None)
        return "; put its files back" + ("" if nearest is None else f", or name another step, such as {run}@{nearest}")

    return StepReader(run, folder, step, remedy)


def _restore_params(run: Path, step: int, params: Any) -> Any:
    """Restores the trained parameters of a step; raises ValueError if they are not finite."""
    restored = _reader(run, step).arrays("params", params)
    require_finite_weights(restored, f"{run}: step {step}")
    return restored


def _restore_base(folder: epath.Path, frozen: Any, digests: Digests | None) -> Any:
    """Restores the frozen base of adapters, and compares it with the digests in a step, if that has some of it."""
    if missing := missing_array_file(folder / BASE):
        raise ValueError(
            f"{folder / BASE}: is not whole ({missing}); the adapters of every step in {folder} need it: put it back"
        )
    has_base = digests is not None and any(name.startswith(f"{BASE}.") for name in digests)
    try:
        base = restore_arrays(folder / BASE, BASE, frozen, digests if has_base else None)
    except Exception as error:  # of damaged files Orbax and TensorStore raise nearly everything
        raise ValueError(
            f"{folder / BASE}: cannot be read ({reason_of(error, folder / BASE)}); the adapters of every step in "
            f"{folder} need it: put it back"
        ) from error
    require_finite_weights(base, str(folder / BASE))
    return base


def _stored_dtype(reader: StepReader, folder: epath.Path, item: str) -> Any:
    digests = reader.digests()
    if digests is not None and f"{item}.embed_VD" in digests:
        return digests[f"{item}.embed_VD"].partition("[")[0]
    return ocp.StandardCheckpointHandler().metadata(folder)["embed_VD"].dtype


def load_adapters(checkpoint: str | Path) -> tuple[dict[str, Any], Lora, Qwen3Config]:
    """Loads the trained parameters of a run with adapters, with the adapters' and the network's configs.

    Raises:
      ValueError: a checkpoint without adapters, or with adapters that are not finite.
    """
    check_loadable(checkpoint)
    about = read_about(checkpoint) if is_run(checkpoint) else {}
    if "lora" not in about:
        raise ValueError(f"{checkpoint}: has no adapters; expected a run that was trained with lora.rank above 0")
    lora, config = Lora(**about["lora"]), Qwen3Config.from_hf(about["model"], source=str(checkpoint))
    trained, _ = split_trainable(abstract_params(abstract_model(config, lora=lora), None))
    run, step = find_step(checkpoint)
    return _restore_params(run, step, trained), lora, config


def check_loadable(path: str | Path) -> None:
    """Checks that a path may be a model: a run with checkpoints, a Hugging Face directory, or a name on the Hub.

    Raises:
      FileNotFoundError: the path is none of them.
      ValueError: a config.json that is not supported.
    """
    run, step = split_step(path)
    if is_run(path):
        find_step(path)
        return
    expected = f"a run directory with {FOLDER}/STEP in it, or a Hugging Face model directory with a config.json"
    folder = Path(run)
    if not step and could_be_on_hub(path):
        return
    if folder.is_dir() and (step or not (folder / "config.json").is_file()):
        raise FileNotFoundError(f"{path}: not a checkpoint; expected {expected}")
    if folder.is_dir():
        read_config(folder)
        return
    before = str(path).rpartition("@")[0]
    if is_run(before):  # "RUN@last", "RUN@-1"
        steps = ", ".join(map(str, finalized_steps(checkpoints_folder(before))))
        raise FileNotFoundError(f"{path}: no such step; expected one of {steps}")
    raise FileNotFoundError(f"{path}: no such directory; expected {expected}{describe_local(path)}")


def read_network(path: str | Path) -> Qwen3Config:
    """Returns the config of a model's network: of a run, a Hugging Face directory or a name on the Hub.

    Raises:
      FileNotFoundError, ValueError: see `check_loadable`.
    """
    check_loadable(path)
    if is_run(path):
        return Qwen3Config.from_hf(read_about(path)["model"], source=str(path))
    return read_config(find_directory(path, weights=False))


def load_model(
    path: str | Path,
    *,
    mesh: Mesh | Layout | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    **options: Any,
) -> Backbone:
    """Loads a policy or reward model from a run's checkpoint, a Hugging Face directory, or the Hub.

    With dtype "auto" the compute dtype is that of the stored weights. Adapters are merged into their base.

    Args:
      path: "runs/NAME", "runs/NAME@STEP", a directory, or a name on the Hub.
      mesh, dtype, param_dtype, options: as for `models.hf_weights.load_pretrained`.

    Raises:
      FileNotFoundError: neither a run with checkpoints nor a model directory.
      ValueError: weights that are not finite; and see `models.hf_weights.load_pretrained`.
    """
    check_loadable(path)
    if not is_run(path):
        return load_pretrained(path, mesh=mesh, dtype=dtype, param_dtype=param_dtype, **options)
    run, step = find_step(path)
    layout, folder, reader = as_layout(mesh), checkpoints_folder(run), _reader(run, step)
    about = reader.about()
    lora = Lora(**about["lora"]) if "lora" in about else None
    config = Qwen3Config.from_hf(about["model"], source=str(path))
    if dtype == "auto":
        item = "params" if lora is None else BASE
        dtype = _stored_dtype(reader, folder / BASE if lora is not None else folder / str(step) / item, item)
    options |= {"dtype": dtype, "param_dtype": param_dtype or dtype, "layout": layout}
    trained, frozen = split_trainable(abstract_params(abstract_model(config, lora=lora, **options), layout))
    params = _restore_params(run, step, trained)
    if lora is not None:
        base = _restore_base(folder, frozen, reader.digests())
        params = merge_adapters(merge_trainable(params, base), lora)
    return nnx.merge(split(abstract_model(config, **options))[0], params)
