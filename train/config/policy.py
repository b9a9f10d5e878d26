"""The config of `train policy`."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gopo_jax import ADVANTAGES
from train import dotted
from train.config.checks import check_at_least, check_divides, check_finite, check_positive, check_sampling
from train.config.loss import LossConfig
from train.config.rewards import MissingRule, RewardSpec
from train.config.run import RunConfig
from train.config.validation import ValidationConfig


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(RunConfig):
    """`train policy`: GOPO, GRPO and their relatives."""

    rewards: list[RewardSpec]  # what the policy is trained for
    reward_combination: Literal["sum", "mean", "minimum"] = "sum"  # how the weighted rewards become one
    advantage: str = "gopo"  # a name in gopo_jax.ADVANTAGES, or the dotted path of a function like those
    # of the advantage, e.g. {ties: ordinal} or {scale: none}
    advantage_options: dict[str, Any] = field(default_factory=dict)
    num_generations: int = 8  # completions per prompt (G)
    prompts_per_step: int = 128  # prompts per step (P)
    # prompts that are sampled at a time; when the completions of some have ended, waiting prompts take their places;
    # null: all at once, which is fastest where memory is enough
    rollout_prompts: int | None = None
    # 1: sample the next step's completions while this one's rewards are waited for, with weights that are one step old
    rollout_ahead: int = 0
    microbatch_prompts: int = 8  # prompts whose gradient is computed at a time
    num_iterations: int = 1  # passes over each batch
    minibatch_prompts: int | None = None  # prompts per update; null: all, one update in each pass
    dynamic_sampling_attempts: int = 1  # batches drawn at most until every group's rewards differ; 1: off
    # steps in a row whose updates are left out where the loss or the gradient is not finite; one more ends the run
    skip_nonfinite: int = 0
    max_prompt_length: int = 1024  # tokens; longer prompts are left out, counted and printed
    max_completion_length: int = 2048  # tokens (T); longer completions are cut
    temperature: float = 1.0  # of sampling, and of the log-probabilities in the loss
    top_p: float = 1.0  # sample from the likeliest tokens that have this probability together; 1: off
    top_k: int = 0  # sample from so many likeliest tokens; 0: off
    min_tokens: int = 0  # of a completion, before which it does not end
    min_p: float = 0.0  # sample from tokens of at least this share of the likeliest one's probability; 0: off
    # logits of tokens in the prompt or the completion so far are divided by this, or multiplied where below 0; 1: off
    repetition_penalty: float = 1.0
    # texts that end a completion, with the token in which the first of them ends, e.g. '["</answer>", "\n\n"]'
    stop: list[str] = field(default_factory=list)
    loss: LossConfig = field(default_factory=LossConfig)  # what the policy's update descends
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # on data.validation, by the rewards

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.held_out:
            raise ValueError("data.held_out: is for train sft and train reward; a policy has data.validation alone")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations: expected at least 2 completions per prompt (they are ranked against each other), "
                f"got {self.num_generations}"
            )
        check_at_least(self, 1, "prompts_per_step", "microbatch_prompts", "max_prompt_length", "max_completion_length")
        check_at_least(self, 1, "num_iterations", "dynamic_sampling_attempts")
        if self.minibatch_prompts is not None:
            check_at_least(self, 1, "minibatch_prompts")
        if self.rollout_prompts is not None and not 1 <= self.rollout_prompts <= self.prompts_per_step:
            raise ValueError(
                f"rollout_prompts: expected a number from 1 to prompts_per_step = {self.prompts_per_step}, or null to "
                f"sample all of them at once, got {self.rollout_prompts}"
            )
        self._check_rollout_ahead()
        check_at_least(self, 0, "top_k", "min_tokens", "skip_nonfinite")
        if self.min_tokens > self.max_completion_length:
            raise ValueError(
                f"min_tokens: expected at most max_completion_length = {self.max_completion_length}, got "
                f"{self.min_tokens}"
            )
        check_positive(self, "temperature")
        check_finite(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_sampling(self)
        check_divides("minibatch_prompts", self.update_prompts, "prompts_per_step", self.prompts_per_step)
        whole = "prompts_per_step" if self.minibatch_prompts is None else "minibatch_prompts"
        check_divides("microbatch_prompts", self.microbatch_prompts, whole, self.update_prompts)
        known = [name for name in dotted.option_names(self.advantage_function) if name != "weights_R"]
        dotted.check_options(self.advantage_options, known, "advantage_options", self.advantage)
        if self.advantage in ADVANTAGES:
            for name, option in self.advantage_options.items():
                if any(not math.isfinite(x) for x in np.ravel(option) if isinstance(x, float)):
                    raise ValueError(f"advantage_options: {name}: expected finite numbers, got {option}")
        if self.loss.kl_in == "reward" and self.takes_every_reward:
            raise ValueError(f"loss.kl_in: reward is taken off one reward; {self.advantage} takes every reward apart")
        if self.loss.kl_cov_ratio and self.updates_per_step == 1:
            raise ValueError(
                "loss.kl_cov_ratio: needs several updates per batch (num_iterations, minibatch_prompts): in the first "
                "one the policy is the old one, and the penalty has no gradient"
            )
        self._check_reference_of_adapters()
        if self.takes_every_reward and any(spec.missing is not None for spec in self.rewards):
            raise ValueError(
                f"rewards.missing: is for rewards that are combined into one; {self.advantage} takes every reward "
                f"apart, and a missing one leaves its own ranking alone; leave it out"
            )
        if not self.rewards:
            raise ValueError("rewards: expected at least one reward, got none")
        if not any(spec.weight for spec in self.rewards):
            raise ValueError("rewards: expected a weight other than 0, got none: nothing would be learned")
        if self.checkpoint.best is not None and not self.validation.prompts:
            raise ValueError("checkpoint.best: nothing is validated with validation.prompts: 0")
        labels = [spec.label for spec in self.all_rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: names must differ, got {labels}; set rewards[i].name")

    def _check_rollout_ahead(self) -> None:
        if self.rollout_ahead not in (0, 1):
            raise ValueError(
                f"rollout_ahead: expected 0 or 1, the steps that are sampled ahead, got {self.rollout_ahead}"
            )
        if self.rollout_ahead and self.loss.importance_sampling_mode is None:
            raise ValueError(
                "rollout_ahead: 1 learns from samples of older weights, which loss.importance_sampling_mode has to "
                "weight; set it, for example to token_truncate"
            )
        for name in ("dynamic_sampling_attempts", "rollout_prompts"):
            if self.rollout_ahead and getattr(self, name) not in (None, 1):
                raise ValueError(
                    f"rollout_ahead: 1 samples a step's prompts once and together; leave {name} out, or rollout_ahead"
                )

    @property
    def all_rewards(self) -> list[RewardSpec]:
        """The rewards that are trained for, then those of the validation alone."""
        return [*self.rewards, *self.validation.rewards]

    @property
    def named_rewards(self) -> list[tuple[str, RewardSpec]]:
        """`all_rewards` with the settings that they are, such as rewards[0], for messages."""
        sections = (("rewards", self.rewards), ("validation.rewards", self.validation.rewards))
        return [(f"{name}[{i}]", spec) for name, specs in sections for i, spec in enumerate(specs)]

    def _check_reference_of_adapters(self) -> None:
        settings = self.loss
        if not self.lora.rank or settings.reference_sync_steps is None:
            return
        if settings.reference is not None:
            raise ValueError(
                "loss.reference and loss.reference_sync_steps with lora.rank: another model's weights cannot follow "
                "adapters; choose one of the two, or train all parameters"
            )
        if settings.reference_mixup != 1:
            raise ValueError(
                "loss.reference_mixup: a mean of adapters is not the adapter of a mean; with lora.rank expected 1 (the "
                f"reference becomes the policy), got {settings.reference_mixup}"
            )

    @property
    def advantage_function(self) -> Callable[..., Any]:
        if self.advantage in ADVANTAGES:
            return ADVANTAGES[self.advantage]
        if "." not in self.advantage:
            raise ValueError(
                f"advantage: expected one of {', '.join(ADVANTAGES)}, or the dotted path of a function, "
                f"got {self.advantage!r}"
            )
        return dotted.import_function(self.advantage, "advantage")

    @property
    def takes_every_reward(self) -> bool:
        """Whether the advantage takes rewards_PGR and weights_R, not their weighted sum rewards_PG."""
        return "weights_R" in inspect.signature(self.advantage_function).parameters

    @property
    def missing_rules(self) -> list[MissingRule]:
        """What becomes of a completion that lacks a reward; `ignore` where the advantage takes each apart."""
        return ["ignore" if self.takes_every_reward else spec.missing_rule for spec in self.rewards]

    @property
    def samples_in_parts(self) -> bool:
        """Whether fewer prompts are sampled at a time than a step has."""
        return self.rollout_prompts not in (None, self.prompts_per_step)

    @property
    def update_prompts(self) -> int:
        """Prompts per optimizer update."""
        return self.minibatch_prompts or self.prompts_per_step

    @property
    def updates_per_step(self) -> int:
        return self.num_iterations * (self.prompts_per_step // self.update_prompts)

    @property
    def logprobs_before_update(self) -> bool:
        """Whether the old and the reference policy's log-probabilities are computed before the first update."""
        return self.updates_per_step > 1 or self.loss.kl_in == "reward" or bool(self.loss.token_choices)
