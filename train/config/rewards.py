"""One of the rewards that a policy is trained for."""

from dataclasses import dataclass, field
from typing import Any, Literal

from train.config.checks import check_at_least, check_finite, check_positive

MissingRule = Literal["leave_out", "group_min", "ignore"]


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """One reward: a reward model or a Python function, with its weight in the sum."""

    model: str | None = None  # a run of `train reward`, a Hugging Face directory or Hub name
    function: str | None = None  # built-in (docs/rewards.md) or a dotted path: f(prompts, completions, **columns)
    options: dict[str, Any] = field(default_factory=dict)  # of the function, e.g. {rouge_type: rouge2}
    weight: float = 1.0  # in the sum of the rewards
    name: str | None = None  # in the metrics; default: the model's or function's last part
    max_length: int = 4096  # of prompt and completion, in the reward model's tokens; longer: unscorable, counted
    batch_prompts: int = 32  # prompts scored at a time
    offload: bool = False  # keep the model in the host's memory while nothing is scored
    # a completion that this reward cannot score: is left out of ranks and loss; counts as the worst of its group; is
    # scored by the other rewards alone. null: leave_out for a model, ignore for a function
    missing: MissingRule | None = None
    # of a function: so many processes call it, each for a part of a step's prompts (at most batch_prompts), beside the
    # other rewards; 0: the run itself calls it. Of remote: requests at a time, 0: 8
    workers: int = 0
    timeout_s: float | None = None  # of a function: seconds after which a call has failed; null: never (remote: 60)
    retries: int | None = None  # of a function: attempts after the first; null: 0 (remote: 3)
    # of a function: a call that raises or is late ends the run, or leaves its completions unscorable, which is counted
    on_error: Literal["stop", "unscorable"] = "stop"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.function is None):
            raise ValueError("rewards: each expects either model or function, not both")
        if self.model is not None and self.options:
            raise ValueError("rewards.options: are those of a function; a reward model has none")
        calling = [self.workers, self.timeout_s, self.retries, self.on_error]
        if self.model is not None and calling != [0, None, None, "stop"]:
            raise ValueError(
                "rewards.workers, timeout_s, retries, on_error: are for functions; a reward model has none"
            )
        if self.function is not None and (self.offload or self.max_length != 4096):
            raise ValueError("rewards.offload, max_length: are for reward models; a function has none")
        check_at_least(self, 0, "workers", *["retries"] * (self.retries is not None))
        if self.timeout_s is not None:
            check_positive(self, "timeout_s")
            check_finite(self, "timeout_s")
        check_at_least(self, 1, "max_length", "batch_prompts")
        check_finite(self, "weight")

    @property
    def missing_rule(self) -> MissingRule:
        """`missing`, or the default of its kind: a sum without a reward model's part could rank a completion best."""
        return self.missing or ("leave_out" if self.model is not None else "ignore")

    @property
    def label(self) -> str:
        return self.name or str(self.model or self.function).rstrip("/").replace(".", "/").split("/")[-1]
