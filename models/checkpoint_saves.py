"""The checkpoints of a run that trains: saved in the background, kept or removed as the config has it, and resumed."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from models.checkpoint_failures import check_writable_together, remove_unfinished, save_error, silence_orbax
from models.checkpoint_files import DIGESTS, give_up_state, warn_once
from models.checkpoint_restore import BASE, Digests, StepReader, make_digests, restore_base
from models.checkpoint_steps import (
    REMOVED,
    checkpoints_folder,
    finalized_steps,
    finish_removals,
    is_finalized,
    resumable_steps,
    set_checkpoints_folder,
    set_damaged_aside,
    set_newest_aside,
)
from models.digests import digest_arrays
from models.finite import require_finite_weights
from models.tensorstore_memory import spare_memory


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
            check_writable_together(self._folder)
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
            frozen = restore_base(self._folder, frozen, self._reader(latest).digests())
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


def wait_for_saves(*, quiet: bool = False) -> None:
    """Waits for the saves in flight of all open checkpoints, after an error; unless quiet, prints those that fail."""
    for checkpoints in list(_OPEN):
        try:
            checkpoints.wait()
        except Exception as error:  # the first error is the one that is raised
            if not quiet:
                warn_once(f"a checkpoint could not be saved: {error}")
