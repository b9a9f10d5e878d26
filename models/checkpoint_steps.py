"""The steps in the directory of a run's checkpoints: what names them, which are complete, set aside or being removed.

    STEP                 written completely; perhaps not whole any more, see `models.checkpoint_files`
    STEP.damaged         was not whole when the run was started again
    STEP.aside           was the newest when the run was started again from the one before it
    removed/STEP         is being removed: a kill leaves no step that is half there

Of several processes, all call what renames and removes, and the first one does it.
"""

import contextlib
import errno
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from models.checkpoint_files import is_local, is_weights_only, list_steps, missing_part, warn_once
from models.config import read_json
from models.names import split_step

FOLDER, STOPPED, BEST = "checkpoints", "stopped.json", "best.json"
REMOVED = "removed"
_OURS = re.compile(r"\d+\..*|base.*|removed|lock\.json.*|.*[.-]tmp.*")  # what is there before the first step
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of a file system that does not sync directories


def checkpoints_folder(run: str | Path) -> epath.Path:
    """Returns the directory of a run's checkpoints.

    Raises:
      ValueError: the file that names it (see `models.checkpoint`) holds no name.
    """
    path = Path(run).absolute() / FOLDER
    return epath.Path(_read_pointer(path) if path.is_file() else path)


def _read_pointer(file: Path) -> str:
    name = file.read_bytes().decode("utf-8", "backslashreplace").rstrip("\r\n")
    if not name.strip() or re.search("[\0-\x1f]", name):
        raise ValueError(
            f"{file}: expected one line, the directory of the run's checkpoints, got {textwrap.shorten(name, 200)!r}; "
            f"write its name there"
        )
    return name


def check_pointer(run: str | Path, directory: str | None) -> None:
    """Checks, before a run goes on, that the file that names its checkpoints' directory means one of this run.

    Args:
      directory: what the settings name, which has to be the same; None = nothing.

    Raises:
      ValueError: it names no directory, or one that holds other files and no checkpoint.
    """
    file, folder = Path(run) / FOLDER, checkpoints_folder(run)
    if not file.is_file() or not is_local(folder) or (directory is not None and folder_of(directory) != folder):
        return  # the last is refused by `set_checkpoints_folder`
    found = None
    if not folder.is_dir():
        found = "where no directory is"
    elif directory is None and not list_steps(folder):
        others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
        found = f"where no checkpoint is, but {others[0]}" if others else None
    if found:
        raise ValueError(
            f"{file}: says that the checkpoints of {run} are in {str(folder)!r}, {found}; correct that name, or put "
            f"the directory back; to start over, delete that file"
        )


def is_run(checkpoint: str | Path) -> bool:
    """Whether "runs/NAME" or "runs/NAME@STEP" names a run directory with checkpoints."""
    return (Path(split_step(checkpoint)[0]) / FOLDER).exists()


def best_step(run: str | Path) -> int | None:
    """Returns the best step of a run that ended by early stopping, or has `checkpoint.best`; None for any other run."""
    stopped, best = Path(run) / STOPPED, Path(run) / BEST
    if stopped.is_file():
        return read_stopped(run)["best_step"]
    if not best.is_file():
        return None
    saved = set(finalized_steps(checkpoints_folder(run)))  # the newest is written before its checkpoint is whole
    with _damage_named(best):
        improvements = read_json(best)["improvements"]
        return max((int(step) for step, _ in improvements if step in saved), default=None)


def read_stopped(run: str | Path) -> dict[str, int]:
    """Returns the steps at which early stopping ended a run: {"step": the last, "best_step": the best}.

    Raises:
      ValueError: the file is damaged.
    """
    file = Path(run) / STOPPED
    with _damage_named(file):
        record = read_json(file)
        return {name: int(record[name]) for name in ("step", "best_step")}


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{file}: is damaged, and does not say which step of the run is the best: put it back"
        ) from error


def set_checkpoints_folder(run: str | Path, directory: str) -> None:
    """Writes the directory of a run's checkpoints into the run's directory.

    Raises:
      ValueError: the run has checkpoints in another directory.
    """
    folder, exists = folder_of(directory), (Path(run) / FOLDER).exists()
    if exists and checkpoints_folder(run) != folder:
        raise ValueError(
            f"checkpoint.directory: {directory}, but the checkpoints of {run} are in {checkpoints_folder(run)}"
        )
    if not exists:
        Path(run).mkdir(parents=True, exist_ok=True)
        if is_local(folder):  # what the file names is there from the start: if it is not, it has gone
            folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(run) / f"{FOLDER}.{jax.process_index()}.tmp"  # several processes may write at once
        temporary.write_text(f"{folder}\n", encoding="utf-8")
        _sync(temporary)
        temporary.replace(Path(run) / FOLDER)


def folder_of(directory: str) -> epath.Path:
    """Returns a directory on a disk, relative to where the program runs, or in a bucket."""
    return epath.Path(directory if "://" in directory else Path(directory).absolute())


def is_finalized(folder: epath.Path) -> bool:
    """Whether a checkpoint exists and was written completely; in a bucket a killed save leaves a directory too."""
    return folder.is_dir() and ocp.utils.is_checkpoint_finalized(folder)


def finalized_steps(folder: epath.Path) -> list[int]:
    """Returns the steps that were written completely, in order."""
    return [step for step in list_steps(folder) if is_finalized(folder / str(step))]


def whole_steps(folder: epath.Path) -> list[int]:
    """Returns the steps that have all of their files, in order."""
    return [step for step in finalized_steps(folder) if missing_part(folder / str(step)) is None]


def resumable_steps(folder: epath.Path) -> list[int]:
    """Returns the whole steps that have more than weights, in order."""
    return [step for step in whole_steps(folder) if not is_weights_only(folder / str(step))]


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
    steps = finalized_steps(folder)
    if not steps and (Path(run) / FOLDER).is_file():
        raise FileNotFoundError(
            f"{run}: not a checkpoint; {Path(run) / FOLDER} says that they are in {str(folder)!r}, where no step is; "
            f"correct that name, or put them back"
        )
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


def set_damaged_aside(folder: epath.Path) -> None:
    """Renames the steps that are not whole to STEP.damaged, so that they are neither restored nor counted, and says so.

    Raises:
      ValueError: there are steps, and none is whole, or the newest that is holds weights alone.
    """
    damaged = {step: missing_part(folder / str(step)) for step in finalized_steps(folder)}
    whole = [step for step, missing in damaged.items() if not missing]
    damaged = {step: missing for step, missing in damaged.items() if missing}
    if damaged and not whole:
        raise ValueError(f"{_none_whole(folder, damaged)}; put one back, or delete {folder} to start over")
    if whole and is_weights_only(folder / str(whole[-1])):
        raise ValueError(
            f"{folder}: a run goes on from its newest checkpoint, and step {whole[-1]} has weights alone; put a "
            f"newer one back, or start another run with model.path: RUN@{whole[-1]}"
        )
    _barrier("all processes have looked before one renames")
    if jax.process_index() == 0:
        for step, missing in damaged.items():
            aside = _rename_aside(folder / str(step), "damaged")
            warn_once(f"{folder / str(step)}: is not whole ({missing}); it is passed over, and is now called {aside}")
    _barrier("damaged checkpoints are renamed")


def set_newest_aside(folder: epath.Path) -> None:
    """Renames the newest step to STEP.aside, so that the run goes on from the one before it, and says so.

    Raises:
      ValueError: no whole step is before it, or one with weights alone.
    """
    steps = finalized_steps(folder)
    before = [step for step in whole_steps(folder) if step < steps[-1]]
    if not before or before[-1] not in resumable_steps(folder):
        present = f"of its steps {', '.join(map(str, steps))} none" if steps else "no step"
        raise ValueError(
            f"--resume previous: {folder}: expected a step before the newest one from which the run can go on, got "
            f"{present}; leave the option out, or delete that directory to start over"
        )
    _barrier("all processes have looked before one renames")
    if jax.process_index() == 0:
        newest = folder / str(steps[-1])
        aside = _rename_aside(newest, "aside")
        warn_once(f"{newest}: is passed over, as --resume previous says, and is now called {aside}")
    _barrier("the newest checkpoint is renamed")


def _rename_aside(path: epath.Path, ending: str) -> str:
    names = (f"{path.name}.{ending}{number or ''}" for number in range(1000))
    aside = next(name for name in names if not (path.parent / name).exists())
    path.rename(path.parent / aside)
    return aside


def finish_removals(folder: epath.Path, saved: int | None = None) -> None:
    """Removes the steps that Orbax has moved into `removed`, after what replaces them is on the disk for certain.

    A machine that fails may lose the newest files of a run: if no step is whole without them, the newest whole one of
    those that were to be removed is put back.

    Args:
      saved: a step to write out to the disk first.
    """
    if jax.process_index() != 0:
        return
    if saved is not None:
        sync_files(folder / str(saved))
    removed = folder / REMOVED
    if not removed.is_dir():
        return
    if not whole_steps(folder) and (last := whole_steps(removed)):
        (removed / str(last[-1])).rename(folder / str(last[-1]))
        warn_once(f"{folder / str(last[-1])}: is put back, for no newer step is whole")
    try:
        removed.rmtree()
    except OSError as error:
        warn_once(f"{removed}: could not be removed: {error}")


def sync_files(directory: epath.Path) -> None:
    """Writes a directory's files out to the disk; TensorStore does so with arrays, Orbax not with the rest."""
    if not is_local(directory) or not directory.is_dir():
        return
    for path in (*Path(directory).rglob("*"), directory, directory.parent):
        _sync(path)


def _sync(path: os.PathLike[str]) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(opened)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
