"""When and how a policy is validated."""

from dataclasses import dataclass, field
from typing import Any

from train.config.checks import check_at_least, check_finite, check_positive
from train.config.rewards import RewardSpec


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    every: int = 25  # steps between validations, which come at step 0 and at the end too
    prompts: int = 500  # a sample of so many of data.validation, by data.split_seed; 0: no validation
    num_generations: int = 1  # completions per prompt
    batch_prompts: int = 64  # prompts sampled at a time
    temperature: float | None = None  # of sampling; null, here and in the next three: that of training
    top_p: float | None = None  # sample from the likeliest tokens that have this probability together
    top_k: int | None = None  # sample from so many likeliest tokens; 0: off
    max_completion_length: int | None = None  # tokens
    rewards: list[RewardSpec] = field(default_factory=list)  # scored too; nothing is learned from them

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every", "num_generations", "batch_prompts")
        check_at_least(self, 0, "prompts")
        if self.temperature is not None:
            check_positive(self, "temperature")
            check_finite(self, "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"validation.top_p: expected a number in (0, 1], or null, got {self.top_p}")
        check_at_least(self, 0, *["top_k"] * (self.top_k is not None))
        check_at_least(self, 1, *["max_completion_length"] * (self.max_completion_length is not None))
        if self.rewards and not self.prompts:
            raise ValueError("validation.rewards: nothing is validated with validation.prompts: 0")
        if self.sampling and not self.prompts:
            raise ValueError(
                f"validation.{next(iter(self.sampling))}: nothing is sampled with validation.prompts: 0; leave it out"
            )
        if any(spec.weight != 1 for spec in self.rewards):
            raise ValueError(
                "validation.rewards: weight is for rewards that are trained for; these are scored alone: leave it out"
            )
        if any(spec.missing is not None for spec in self.rewards):
            raise ValueError(
                "validation.rewards: missing is for rewards that are trained for; these are scored alone: leave it out"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that are not those of training."""
        names = ("temperature", "top_p", "top_k", "max_completion_length")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def due(self, step: int, last: int) -> bool:
        """Whether the policy is validated after so many of `last` steps."""
        return self.prompts > 0 and (step % self.every == 0 or step == last)
