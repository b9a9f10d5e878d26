"""The optimizer and its schedule."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from train.config.checks import check_at_least, check_finite, check_positive


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    learning_rate: float = 1e-6  # after the warm-up
    adam_beta1: float = 0.9  # decay of the gradients' mean, per update; of adamw, and of muon where it is AdamW
    adam_beta2: float = 0.999  # decay of the squared gradients' mean, per update; of adamw and muon too
    adam_epsilon: float = 1e-8  # added to the root of the squared gradients' mean; of adamw and muon too
    weight_decay: float = 0.0  # share of a weight, times the learning rate, taken off it per update
    max_grad_norm: float = 1.0  # gradients of a larger global norm are scaled down to this; .inf: never
    master_weights: bool = False  # keep a float32 copy of bfloat16 parameters, and add updates up in that
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"  # learning rate after the warm-up
    warmup_steps: int = 10  # updates over which the learning rate grows from 0
    # adamw, adafactor, lion, sgd, muon, or the dotted path of a factory like optax's: f(learning_rate, **options)
    name: str = "adamw"
    # of the factory that name stands for (docs/optimizers.md), e.g. {momentum: 0.9} of sgd, {b2: 0.98} of lion
    options: dict[str, Any] = field(default_factory=dict)
    decay_all: bool = False  # weight_decay is for norms and biases too
    # of the state: float32 even of bfloat16 parameters; bfloat16: momentum, or the gradients' mean; null: as parameters
    moments_dtype: Literal["float32", "bfloat16"] | None = None
    offload: bool = False  # keep the state in the host's memory between updates

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "max_grad_norm", "adam_epsilon")
        check_at_least(self, 0, "warmup_steps", "weight_decay")
        check_finite(self, "learning_rate", "adam_epsilon", "weight_decay")  # max_grad_norm .inf: never scaled
        if self.warmup_steps >= 2**31:
            raise ValueError(
                f"optimizer.warmup_steps: expected at most 2**31 - 1 = {2**31 - 1}, got {self.warmup_steps}"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.name != "adamw" or self.options:
            from train.optimizers import check_choice  # here, since optax takes a moment to load

            defaults = {item.name: item.default for item in dataclasses.fields(self)}
            adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
            check_choice(self.name, self.options, [name for name in adam if getattr(self, name) != defaults[name]])
        self._check_kept()

    def _check_kept(self) -> None:
        """Refuses settings of a state that the optimizer does not keep."""
        if self.name not in ("sgd", "adafactor") or self.options.get("momentum"):
            return
        if self.moments_dtype == "bfloat16":
            raise ValueError(
                f"optimizer.moments_dtype: bfloat16 is for momentum, which {self.name} keeps with optimizer.options: "
                f"{{momentum: 0.9}} alone; set it too, or leave this out"
            )
        if self.offload and self.name == "sgd" and not self.master_weights:
            raise ValueError(
                "optimizer.offload: sgd has no state without optimizer.options: {momentum: 0.9}; set it too, or leave "
                "this out"
            )

    @property
    def is_float32(self) -> bool:
        """Whether the optimizer computes in float32 whatever the parameters' dtype is."""
        return self.master_weights or self.moments_dtype == "float32"
