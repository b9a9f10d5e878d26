"""Whether a disk takes the checkpoints that a run will save."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.filesize import decimal

from train.config import CheckpointConfig
from train.console import console
from train.run.files import check_room, free_bytes


class CheckpointBytes(NamedTuple):
    """What checkpoints take on a disk."""

    base: int  # once, with the first one; 0: it is there already
    step: int  # each of them
    weights: int  # one that has lost the trainer's state


def check_checkpoints_room(
    folder: str, config: CheckpointConfig, steps: Sequence[int], due: int, size: CheckpointBytes, is_new: bool
) -> None:
    """Refuses a disk that does not take the next checkpoints; says so if it does not take all that are to come.

    With `checkpoint.keep` there is one more than that number while the oldest is replaced.

    Args:
      folder: the directory of the checkpoints; in a bucket there is room.
      steps: those that are to come.
      due: the number of them that are saved.
      is_new: the run has no checkpoint yet.

    Raises:
      ValueError: there is no room for the next ones.
    """
    if "://" in folder or not due:
        return
    at_once = min(due, (config.keep or 0) + 1 if is_new else 1)
    needed = size.base + at_once * size.step
    kept = f"checkpoint.keep: {config.keep}, and one more while saving,"
    check_room(Path(folder), needed, kept if at_once > 1 else "a checkpoint")
    free = free_bytes(Path(folder))
    if config.keep is None and free is not None and free < size.base + due * size.step:
        console.print(
            f"{folder}: {due} checkpoints of {decimal(size.step)} are to come, and {decimal(free)} are free there; a "
            f"smaller checkpoint.keep or a larger checkpoint.every needs less"
        )
    period = config.keep_every
    stay = sum(step % period == 0 for step in steps) if period else 0
    old = size.weights if config.weights_only else size.step
    if stay and free is not None and free < needed + stay * old:
        console.print(
            f"{folder}: {stay} checkpoints of {decimal(old)} stay for checkpoint.keep_every: {period}, and "
            f"{decimal(free)} are free there; a larger one, or checkpoint.weights_only: true, needs less"
        )
