"""Orbax checkpoints of a run: one atomic step each, with everything that evaluation and resuming need.

runs/NAME/checkpoints/STEP/params   the trained parameters, a nested dict of arrays
                          /train    optimizer state and the rest of the trainer's state; not in a step that is marked as
                                    one of weights alone, by a file WEIGHTS_ONLY
                          /about    JSON: {"model": a Hugging Face config, "run": the resolved run config,
                                    "pins": what the run was started from, and "lora" if the run trains adapters}
runs/NAME/checkpoints/base          the frozen parameters of a run that trains adapters

To store checkpoints elsewhere, for example in gs://BUCKET/NAME, `checkpoints` is a file with that name in it.
"""

import contextlib
import json
import textwrap
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
from models.checkpoint_files import (
    ABOUT,
    give_up_state,
    is_weights_only,
    list_steps,
    missing_array_file,
    missing_part,
    warn_once,
)
from models.config import Qwen3Config, read_config
from models.finite import require_finite_weights
from models.hf_weights import abstract_model, abstract_params, as_layout, load_pretrained, split
from models.lora import Lora, merge_adapters, merge_trainable, split_trainable
from models.names import split_step
from models.qwen3 import Backbone
from models.sharding import Layout
from models.weight_files import could_be_on_hub, describe_local

FOLDER, BASE, STOPPED, BEST = "checkpoints", "base", "stopped.json", "best.json"


def checkpoints_folder(run: str | Path) -> epath.Path:
    """Returns the directory of a run's checkpoints."""
    path = Path(run).absolute() / FOLDER
    return epath.Path(path.read_text(encoding="utf-8").rstrip("\r\n") if path.is_file() else path)


def is_run(checkpoint: str | Path) -> bool:
    """Whether "runs/NAME" or "runs/NAME@STEP" names a run directory with checkpoints."""
    return (Path(split_step(checkpoint)[0]) / FOLDER).exists()


def best_step(run: str | Path) -> int | None:
    """Returns the best step of a run that ended by early stopping, or has `checkpoint.best`; None for any other run."""
    stopped, best = Path(run) / STOPPED, Path(run) / BEST
    if stopped.is_file():
        return int(json.loads(stopped.read_text(encoding="utf-8"))["best_step"])
    if not best.is_file():
        return None
    improvements = json.loads(best.read_text(encoding="utf-8"))["improvements"]
    saved = set(_finalized_steps(checkpoints_folder(run)))  # the newest is written before its checkpoint is whole
    return max((int(step) for step, _ in improvements if step in saved), default=None)


def set_checkpoints_folder(run: str | Path, directory: str) -> None:
    """Writes the directory of a run's checkpoints into the run's directory.

    Raises:
      ValueError: the run has checkpoints in another directory.
    """
    folder, exists = _as_folder(directory), (Path(run) / FOLDER).exists()
    if exists and checkpoints_folder(run) != folder:
        raise ValueError(
            f"checkpoint.directory: {directory}, but the checkpoints of {run} are in {checkpoints_folder(run)}"
        )
    if not exists:
        Path(run).mkdir(parents=True, exist_ok=True)
        temporary = Path(run) / f"{FOLDER}.{jax.process_index()}.tmp"  # several processes may write at once
        temporary.write_text(f"{folder}\n", encoding="utf-8")
        temporary.replace(Path(run) / FOLDER)


def _as_folder(directory: str) -> epath.Path:
    return epath.Path(directory if "://" in directory else Path(directory).absolute())


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
    ) -> None:
        """Opens a run's checkpoints.

        Args:
          run: the run's directory.
          keep: the number of newest checkpoints to keep; None = all.
          keep_every: older steps that are a multiple of this are kept too; None = none of them.
          weights_only: what is kept by `keep_every` alone loses the trainer's state.
          directory: where to store checkpoints; None = in the run's directory.

        Raises:
          ValueError: keep below 1, which would delete every checkpoint; see `set_checkpoints_folder` and
            `set_damaged_aside`.
        """
        if keep is not None and keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, or None to keep all, got {keep}")
        if directory is not None:
            set_checkpoints_folder(run, directory)
        self._keep, self._keep_every, self._weights_only = keep, keep_every, weights_only
        self.best = 0  # a step to keep although there are `keep` newer ones
        silence_orbax()
        self._folder, self._saving = checkpoints_folder(run), 0  # the step whose save was begun last
        set_damaged_aside(self._folder)
        self._manager = self._open()
        _OPEN.add(self)

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if self._keep is None else self, create=True, cleanup_tmp_directories=True
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
        for step in _finalized_steps(self._folder)[: -self._keep]:
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
        return max(_finalized_steps(self._folder), default=None)

    def save(self, step: int, params: Any, train: Any, about: dict[str, Any]) -> None:
        """Saves in the background; a later save waits for an earlier one.

        Older steps are removed, as `keep` has it, after this one is complete.

        Raises:
          SaveError: the save could not be begun, or the one before has failed.
        """
        self.wait()
        self._saving = step
        with self._save_errors():
            self._give_up_states()
            if jax.process_index() == 0:
                check_writable(self._folder, str(step))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    train=ocp.args.StandardSave(train),
                    about=ocp.args.JsonSave(about),
                ),
            )

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
        self._manager = self._open()

    def restore(self, step: int, params: Any, train: Any) -> tuple[Any, Any]:
        """Restores parameters and trainer state of a step, with the shapes and shardings of the given trees.

        Raises:
          ValueError: the step cannot be read, or has parameters that are not finite.
        """
        as_abstract = ocp.utils.to_shape_dtype_struct
        restored = _restore_items(
            self._manager,
            self._folder,
            step,
            params=ocp.args.StandardRestore(jax.tree.map(as_abstract, params)),
            train=ocp.args.StandardRestore(jax.tree.map(as_abstract, train)),
        )
        require_finite_weights(restored["params"], f"{self._folder}: step {step}")
        return restored["params"], restored["train"]

    def restore_or_save_base(self, frozen: Any) -> Any:
        """Returns the frozen parameters that the run saved first; saves these if it has no checkpoint yet.

        A run that was killed before its first checkpoint starts anew, perhaps from other parameters.

        Raises:
          ValueError: the run has checkpoints, which need what it saved, and that is not whole or not finite.
          SaveError: they could not be saved.
        """
        is_saved = self.latest() is not None and _is_finalized(self._folder / BASE)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all processes have looked before one writes")
        if is_saved:
            return _restore_base(self._folder, frozen)
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
        """Waits for the save in flight.

        Raises:
          SaveError: it has failed.
        """
        with self._save_errors():
            self._manager.wait_until_finished()

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


def _is_finalized(folder: epath.Path) -> bool:
    """Whether a checkpoint exists and was written completely; in a bucket a killed save leaves a directory too."""
    return folder.is_dir() and ocp.utils.is_checkpoint_finalized(folder)


def set_damaged_aside(folder: epath.Path) -> None:
    """Renames the steps that are not whole to STEP.damaged, so that they are neither restored nor counted, and says so.

    Raises:
      ValueError: there are steps, and none is whole, or the newest that is holds weights alone.
    """
    damaged = {step: missing_part(folder / str(step)) for step in _finalized_steps(folder)}
    whole = [step for step, missing in damaged.items() if not missing]
    damaged = {step: missing for step, missing in damaged.items() if missing}
    if damaged and not whole:
        raise ValueError(f"{_none_whole(folder, damaged)}; put one back, or delete {folder} to start over")
    if whole and is_weights_only(folder / str(whole[-1])):
        raise ValueError(
            f"{folder}: a run goes on from its newest checkpoint, and step {whole[-1]} has weights alone; put a "
            f"newer one back, or start another run with model.path: RUN@{whole[-1]}"
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("all processes have looked before one renames")
    if jax.process_index() == 0:
        for step, missing in damaged.items():
            names = (f"{step}.damaged{number or ''}" for number in range(1000))
            aside = next(folder / name for name in names if not (folder / name).exists())
            (folder / str(step)).rename(aside)
            warn_once(
                f"{folder / str(step)}: is not whole ({missing}); it is passed over, and is now called {aside.name}"
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints are renamed")


def _finalized_steps(folder: epath.Path) -> list[int]:
    return [step for step in list_steps(folder) if _is_finalized(folder / str(step))]


def _none_whole(folder: epath.Path, damaged: dict[int, str | None]) -> str:
    newest = max(damaged)
    return f"{folder}: none of the checkpoints in it is whole (step {newest}: {damaged[newest]})"


def find_step(checkpoint: str | Path) -> tuple[Path, int]:
    """Returns the run directory and step of "runs/NAME" (its newest whole step), "runs/NAME@STEP" or "runs/NAME@best".

    Raises:
      FileNotFoundError: no such run, no whole checkpoint in it, not that step, or that step is not whole.
    """
    run, step = split_step(checkpoint)
    folder = checkpoints_folder(run)
    steps = _finalized_steps(folder)
    if not steps:
        raise FileNotFoundError(f"{run}: not a checkpoint; expected a run directory with {FOLDER}/STEP in it")
    if not step:
        return Path(run), _newest_whole_step(folder, steps)
    number = best_step(run) if step == "best" else int(step)
    if number is None:
        raise FileNotFoundError(
            f"{checkpoint}: no best step is known, as early stopping has not ended this run; expected one of "
            f"{', '.join(map(str, steps))}"
        )
    if number not in steps:
        raise FileNotFoundError(f"{checkpoint}: no such step; expected one of {', '.join(map(str, steps))}")
    if missing := missing_part(folder / str(number)):
        others = ", ".join(str(s) for s in steps if not missing_part(folder / str(s)))
        raise FileNotFoundError(
            f"{checkpoint}: that step is not whole ({missing}); "
            + (f"expected one of {others}" if others else "and no other step is")
        )
    return Path(run), number


def _newest_whole_step(folder: epath.Path, steps: Sequence[int]) -> int:
    """Returns the newest step that is whole; says which newer ones are not.

    Raises:
      FileNotFoundError: no step is whole.
    """
    damaged: dict[int, str | None] = {}
    for step in reversed(steps):
        missing = missing_part(folder / str(step))
        if missing is None:
            for newer, part in damaged.items():
                warn_once(f"{folder / str(newer)}: is not whole ({part}); it is passed over for step {step}")
            return step
        damaged[step] = missing
    raise FileNotFoundError(f"{_none_whole(folder, damaged)}; put one back, or name another checkpoint")


def resolve_step(checkpoint: str) -> str:
    """Resolves RUN to RUN@newest; other names pass through."""
    return "{}@{}".format(*find_step(checkpoint)) if is_run(checkpoint) else checkpoint


def read_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item: {"model": ..., "run": ...}, and "lora" if it has adapters."""
    return _restore(*find_step(checkpoint), about=ocp.args.JsonRestore())["about"]


def read_step_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item; one of several processes may call this alone."""
    run, step = find_step(checkpoint)
    return dict(ocp.JsonCheckpointHandler().restore(checkpoints_folder(run) / str(step) / ABOUT))


def restore_state(checkpoint: str | Path, params: Any, train: Any, frozen: Any) -> tuple[Any, Any, Any]:
    """Restores parameters, trainer state and the base of adapters of RUN@STEP, laid out as the given trees.

    Raises:
      ValueError: the step cannot be read.
    """
    run, step = find_step(checkpoint)
    items = {"params": params, "train": train}
    abstract = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for name, tree in items.items()}
    restored = _restore(run, step, **{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
    base = _restore_base(checkpoints_folder(run), frozen) if frozen else frozen
    return restored["params"], restored["train"], base


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
        folder = _as_folder(directory)
    else:
        return {}
    reason: Exception | None = None
    for step in reversed(_finalized_steps(folder)):
        try:
            return dict(ocp.JsonCheckpointHandler().restore(folder / str(step) / "about"))
        except (OSError, ValueError) as error:
            reason = reason or error
    if reason is not None:
        raise ValueError(f"{folder}: no checkpoint in it can be read ({reason})") from reason
    return {}


def _restore(run: Path, step: int, **items: Any) -> Any:
    with ocp.CheckpointManager(checkpoints_folder(run)) as manager:
        return _restore_items(manager, run, step, **items)


def _restore_params(run: Path, step: int, params: Any) -> Any:
    """Restores the trained parameters of a step; raises ValueError if they are not finite."""
    restored = _restore(run, step, params=ocp.args.StandardRestore(params))["params"]
    require_finite_weights(restored, f"{run}: step {step}")
    return restored


def _restore_items(manager: ocp.CheckpointManager, run: Any, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, FileNotFoundError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(f"{run}: step {step} is not a checkpoint that can be read ({reason})") from error


def _restore_base(folder: epath.Path, frozen: Any) -> Any:
    if missing := missing_array_file(folder / BASE):
        raise ValueError(
            f"{folder / BASE}: is not whole ({missing}); the adapters of every step in {folder} need it: put it back"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        base = checkpointer.restore(folder / BASE, jax.tree.map(ocp.utils.to_shape_dtype_struct, frozen))
    require_finite_weights(base, str(folder / BASE))
    return base


def _checkpoint_dtype(run: Path, step: int, *, base: bool) -> Any:
    directory = checkpoints_folder(run) / BASE if base else checkpoints_folder(run) / str(step) / "params"
    return ocp.StandardCheckpointHandler().metadata(directory)["embed_VD"].dtype


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
        steps = ", ".join(map(str, _finalized_steps(checkpoints_folder(before))))
        raise FileNotFoundError(f"{path}: no such step; expected one of {steps}")
    raise FileNotFoundError(f"{path}: no such directory; expected {expected}{describe_local(path)}")


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
    layout, about = as_layout(mesh), read_about(path)
    lora = Lora(**about["lora"]) if "lora" in about else None
    config = Qwen3Config.from_hf(about["model"], source=str(path))
    dtype = _checkpoint_dtype(run, step, base=lora is not None) if dtype == "auto" else dtype
    options |= {"dtype": dtype, "param_dtype": param_dtype or dtype, "layout": layout}
    trained, frozen = split_trainable(abstract_params(abstract_model(config, lora=lora, **options), layout))
    params = _restore_params(run, step, trained)
    if lora is not None:
        params = merge_adapters(merge_trainable(params, _restore_base(checkpoints_folder(run), frozen)), lora)
    return nnx.merge(split(abstract_model(config, **options))[0], params)
