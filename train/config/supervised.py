"""The configs of `train sft` and `train reward`."""

import re
from dataclasses import dataclass, field
from typing import Literal

from train.config.checks import check_at_least, check_finite
from train.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Stop when validation no longer improves; the run then is its best step."""

    patience: int | None = None  # validations without improvement before it stops; null: no early stopping
    metric: Literal["loss", "accuracy"] = "loss"  # what has to improve on data.validation; accuracy: of reward models
    min_delta: float = 0.0  # only what is better by more than this is an improvement

    def __post_init__(self) -> None:
        check_at_least(self, 0, "min_delta")
        check_finite(self, "min_delta")
        if self.patience is not None:
            check_at_least(self, 1, "patience")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """What `train sft` and `train reward` share."""

    batch_size: int = 32  # rows per step: sequences (packed: rows of max_length), or prompts with their answers
    max_length: int = 1024  # tokens; longer rows are left out, counted and printed
    eval_steps: int = 25  # steps between validations
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)  # when to stop before max_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch_size", "eval_steps")
        check_at_least(self, 2, "max_length")
        if self.chat.continue_final_message:
            raise ValueError(
                "chat.continue_final_message: is for train policy and eval generate; expected false: sft and reward "
                "learn from whole answers"
            )
        if self.data.test is not None or self.data.drop_duplicates:
            raise ValueError("data.test, data.drop_duplicates: are for train policy; leave them out")
        validated = self.data.validation is not None or self.data.validation_rows
        if self.early_stopping.patience is not None and not validated:
            raise ValueError(
                "early_stopping.patience: needs data.validation (or validation_rows), whose loss or accuracy is watched"
            )
        if self.checkpoint.best is not None and self.early_stopping.patience is not None:
            raise ValueError("checkpoint.best, early_stopping.patience: each keeps its own best step; set one of them")
        if self.checkpoint.best is not None and not (validated or self.data.held_out):
            raise ValueError("checkpoint.best: needs data.validation (or validation_rows), whose metric it names")
        for name in self.data.held_out:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"data.held_out: expected names of letters, digits and any of _ . - (they stand in the metrics' "
                    f"names), got {name!r}"
                )


@dataclass(frozen=True, kw_only=True)
class SftConfig(SupervisedConfig):
    """`train sft`: supervised fine-tuning of a policy."""

    packing: bool = False  # several examples in each row of max_length tokens, none of which sees another

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_stopping.metric == "accuracy":
            raise ValueError("early_stopping.metric: accuracy is for reward models; expected loss")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(SupervisedConfig):
    """`train reward`: a reward model from comparisons."""

    loss: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"  # of pairs; of a prompt's whole order
    center_rewards_coefficient: float = 0.0  # bradley_terry: weight of (r_chosen + r_rejected)^2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "center_rewards_coefficient")
        check_finite(self, "center_rewards_coefficient")
        if self.loss != "bradley_terry" and self.center_rewards_coefficient:
            raise ValueError(f"center_rewards_coefficient: is a part of loss: bradley_terry, got loss: {self.loss}")
