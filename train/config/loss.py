"""The loss of a policy's update: the penalty, the importance ratio, and which tokens count."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from gopo_jax import SURROGATES
from train import dotted
from train.config.checks import check_at_least, check_finite

SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    beta: float = 0.04  # weight of the KL penalty; 0: no reference policy is kept
    # estimator of the KL divergence from the reference policy (docs/algorithms.md)
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"  # where the penalty goes; reward: its sum over a completion is taken off
    # the reference policy: a run, RUN@STEP, a Hugging Face directory or Hub name; default: the policy at its start
    reference: str | None = None
    reference_sync_steps: int | None = None  # steps after which the reference moves towards the policy; null: never
    reference_mixup: float = 0.6  # the policy's share then: mixup x policy + (1 - mixup) x reference
    clip_low: float = 0.2  # of surrogate clip: the importance ratio is clipped to at least 1 - clip_low; .inf: never
    clip_high: float = 0.2  # of surrogate clip: the importance ratio is clipped to at most 1 + clip_high; .inf: never
    # the importance ratio: of each token; of the completion per token (GSPO); both; of the completion as a whole
    ratio: Literal["token", "sequence", "sequence_token", "trajectory"] = "token"
    surrogate: Literal["clip", "cispo", "sapo"] = "clip"  # what the importance ratio and the advantage become
    # of the surrogate, e.g. {dual_clip: 3.0}, {clip_max: 5.0}
    surrogate_options: dict[str, Any] = field(default_factory=dict)
    # the mean over all tokens (DAPO); over completions of their mean (GRPO); over completions x max_completion_length
    # (Dr. GRPO); over micro-batches of their mean over tokens
    aggregate: Literal["token", "sequence", "constant", "token_per_microbatch"] = "token"
    # how a completion's advantage is spread over its tokens
    token_broadcast: Literal["uniform", "log_decay", "poly_decay", "loglog_decay"] = "uniform"
    mask_truncated_completions: bool = False  # completions cut at max_completion_length teach nothing
    # how tokens are weighted by (trainer's probability / sampler's), where the two do not agree; null: not at all
    importance_sampling_mode: SamplerCorrection | None = None
    importance_sampling_clip_max: float = 2.0  # the largest such weight; .inf: any
    importance_sampling_clip_min: float = 0.0  # the smallest such weight
    # weight of a bonus for the policy's mean entropy per token; 0: none
    entropy_coef: float = 0.0
    # share of a step's tokens, those of the highest entropy, whose surrogate counts; 1: all; 0.2 in its paper
    top_entropy_quantile: float = 1.0
    # Clip-Cov: share of a step's tokens that lose their gradient, at random among those whose covariance of
    # log-probability and advantage is high; 0: off; 0.0002 in its paper
    clip_cov_ratio: float = 0.0
    clip_cov_lb: float = 1.0  # of Clip-Cov: the covariance is above this
    clip_cov_ub: float = 5.0  # of Clip-Cov: the covariance is below this; .inf: any
    # KL-Cov: share of a step's tokens, those of the highest covariance, that are held near the old policy; 0: off
    kl_cov_ratio: float = 0.0
    ppo_kl_coef: float = 1.0  # of KL-Cov: weight of |log-probability - old log-probability|
    offload_reference: bool = False  # keep the reference policy in the host's memory between updates
    # tokens whose logits exist at a time on each device, at least one of every row; null: 1024 on CPUs, 4096 elsewhere
    logprob_chunk: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 0, "beta", "clip_low", "clip_high", "importance_sampling_clip_min")
        check_finite(self, "beta", "importance_sampling_clip_min")
        check_at_least(self, self.importance_sampling_clip_min, "importance_sampling_clip_max")
        bounds = (self.importance_sampling_clip_min, self.importance_sampling_clip_max)
        if self.importance_sampling_mode is None and bounds != (0.0, 2.0):
            raise ValueError(
                "loss.importance_sampling_clip_min, loss.importance_sampling_clip_max: are of "
                "loss.importance_sampling_mode, which is null; set it too"
            )
        self._check_reference()
        check_at_least(self, 1, *["logprob_chunk"] * (self.logprob_chunk is not None))
        self._check_entropy()
        known = [
            name for name in dotted.option_names(SURROGATES[self.surrogate]) if name not in ("clip_low", "clip_high")
        ]
        dotted.check_options(self.surrogate_options, known, "loss.surrogate_options", self.surrogate)
        for name, value in self.surrogate_options.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or (name == "dual_clip" and not value > 1):
                wanted = "a number above 1" if name == "dual_clip" else "a number"
                raise ValueError(f"loss.surrogate_options: {name}: expected {wanted}, got {value!r}")
            if not value > 0:
                raise ValueError(f"loss.surrogate_options: {name}: expected a number above 0, got {value}")
            if name.startswith("temperature") and value == math.inf:
                raise ValueError(f"loss.surrogate_options: {name}: expected a finite number, got {value}")
        if self.surrogate != "clip" and (self.clip_low, self.clip_high) != (0.2, 0.2):
            raise ValueError(
                f"loss.clip_low, loss.clip_high: are of the surrogate clip; {self.surrogate} has "
                f"surrogate_options: {', '.join(known)}"
            )
        if self.kl_in == "reward" and not self.beta:
            raise ValueError("loss.kl_in: reward needs a penalty; set loss.beta above 0")
        if self.kl_in == "reward" and self.mask_truncated_completions:
            raise ValueError(
                "loss.kl_in: reward and mask_truncated_completions: the completions that are masked would be compared "
                "without a penalty; choose one of the two"
            )

    def _check_entropy(self) -> None:
        check_finite(self, "entropy_coef", "ppo_kl_coef")
        check_at_least(self, 0, "ppo_kl_coef")
        for name in ("top_entropy_quantile", "clip_cov_ratio", "kl_cov_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not self.top_entropy_quantile:
            raise ValueError("loss.top_entropy_quantile: 0 leaves no token to learn from; expected a share above 0")
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ValueError(
                f"loss.clip_cov_lb: expected a number below clip_cov_ub = {self.clip_cov_ub}, got {self.clip_cov_lb}"
            )
        if not self.clip_cov_ratio and (self.clip_cov_lb, self.clip_cov_ub) != (1.0, 5.0):
            raise ValueError("loss.clip_cov_lb, loss.clip_cov_ub: are of Clip-Cov; set loss.clip_cov_ratio above 0")
        if self.kl_cov_ratio and not self.ppo_kl_coef:
            raise ValueError("loss.ppo_kl_coef: 0 leaves KL-Cov no penalty; set it above 0, or loss.kl_cov_ratio to 0")
        if not self.kl_cov_ratio and self.ppo_kl_coef != 1:
            raise ValueError("loss.ppo_kl_coef: is of KL-Cov; set loss.kl_cov_ratio above 0")

    @property
    def token_choices(self) -> tuple[str, ...]:
        """The fields of a `train.batch.Batch` with tokens that are chosen before the first update."""
        return (
            *["top_entropy_PGT"] * (self.top_entropy_quantile < 1),
            *["clip_cov_PGT"] * (self.clip_cov_ratio > 0),
            *["kl_cov_PGT"] * (self.kl_cov_ratio > 0),
        )

    def _check_reference(self) -> None:
        for name in ("reference", "reference_sync_steps"):
            if getattr(self, name) is not None and not self.beta:
                raise ValueError(f"loss.{name}: is of the KL penalty, which loss.beta: 0 leaves out; set loss.beta")
        if self.reference_sync_steps is not None:
            check_at_least(self, 1, "reference_sync_steps")
        elif self.reference_mixup != 0.6:
            raise ValueError(
                f"loss.reference_mixup: {self.reference_mixup} needs loss.reference_sync_steps, when it is used"
            )
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"loss.reference_mixup: expected a number in (0, 1], got {self.reference_mixup}")
