"""Which checkpoints a run writes, and which of them stay."""

from dataclasses import dataclass
from typing import Literal

from train.config.checks import check_at_least, check_finite, check_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 25  # steps between checkpoints; the last step is always saved
    every_minutes: float | None = None  # save too when so many minutes have passed since the last save; null: by steps
    keep: int | None = None  # how many of the newest checkpoints stay, at least 1; null: all of them
    keep_every: int | None = None  # of the older checkpoints, those at multiples of this stay too; null: none
    weights_only: bool = False  # what keep_every keeps loses the optimizer's state, when it has become old
    best: str | None = None  # a metric of the validation, such as validation/reward, whose best step stays; RUN@best
    greater_is_better: bool | None = None  # whether more of that metric is better; null: unless its name ends in loss
    directory: str | None = None  # a directory or gs://BUCKET/NAME; default: output_dir/checkpoints
    # when a checkpoint or metrics.jsonl cannot be written (a full disk): end the run with what is saved, or wait for
    # each save and try again every minute until it works
    on_error: Literal["stop", "wait"] = "stop"

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every")
        if self.every_minutes is not None:
            check_positive(self, "every_minutes")
            check_finite(self, "every_minutes")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"checkpoint.keep: expected at least 1, or null to keep all checkpoints, got {self.keep}")
        if self.keep_every is not None:
            self._check_keep_every(self.keep_every)
        elif self.weights_only:
            raise ValueError("checkpoint.weights_only: true needs checkpoint.keep_every, whose checkpoints it shrinks")
        if self.best is not None and not self.best.startswith("validation/"):
            raise ValueError(
                f"checkpoint.best: expected a metric of the validation, such as validation/reward, got {self.best!r}"
            )
        if self.best is None and self.greater_is_better is not None:
            raise ValueError("checkpoint.greater_is_better: is of checkpoint.best, which is null; set it too")

    @property
    def is_greater_better(self) -> bool:
        """Whether more of the metric `best` is better."""
        return not (self.best or "").endswith("loss") if self.greater_is_better is None else self.greater_is_better

    def _check_keep_every(self, period: int) -> None:
        if self.keep is None:
            raise ValueError(f"checkpoint.keep_every: {period} needs checkpoint.keep; without it all checkpoints stay")
        if period < 1 or period % self.every:
            raise ValueError(
                f"checkpoint.keep_every: expected a multiple of checkpoint.every: {self.every}, or null, got {period}"
            )
