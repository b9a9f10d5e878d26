"""Every setting of every program: names, types, defaults. Nothing reads a setting from anywhere else.

`python -m train policy --config x.yaml --optimizer.learning_rate 2e-6` reads the YAML, then the command line.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from gopo_jax import ADVANTAGES, SURROGATES
from models.config import Qwen3Config
from models.lora import Lora
from models.tokenizer import check_text, tokenizer_path
from train import dotted
from train.private import hide_secrets

MissingRule = Literal["leave_out", "group_min", "ignore"]
SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    # where the weights start: a run, RUN@STEP, a Hugging Face directory or Hub name; kept when the run goes on
    path: str | None = None
    architecture: Qwen3Config | None = None  # instead of path: this network with random weights
    tokenizer: str | None = None  # a tokenizer directory or Hub name; default: the one that belongs to path
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; products of float32 are not TF32
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the parameters and the optimizer state
    # the backward pass recomputes: nothing; all but matmuls; whole layers
    remat: Literal["none", "dots", "full"] = "full"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("model: expected either path (pretrained) or architecture (random weights), not both")
        if self.path is None and self.tokenizer is None:
            raise ValueError("model.tokenizer: needed with model.architecture; give a tokenizer directory")

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or tokenizer_path(str(self.path))


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How prompts are rendered for the policy; a reward model reads the same messages by its own template."""

    system_prompt: str | None = None  # before the messages; null: none at all, which is not ""
    text_as_chat: bool = False  # a prompt that is plain text becomes a user's message
    enable_thinking: bool = False  # passed to the chat template
    # of a policy: a prompt whose messages end with the assistant's is the beginning of the answer, which goes on in the
    # same turn; false: it is asked without that message
    continue_final_message: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One of several sources of rows to train on."""

    source: str  # a file, glob:PATTERN, or a data set's name on the Hub
    # how often its rows are drawn, relative to the others'; null, of all sources alike: as often as it has rows
    weight: float | None = None
    columns: dict[str, str] | None = None  # instead of data.columns
    split: str | None = None  # of a Hub data set; default: data.split
    name: str | None = None  # in the metrics; default: the last part of source


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    # a file (JSON Lines, a JSON array, CSV, Arrow, parquet), glob:PATTERN, or a data set's name on the Hub; a resumed
    # run keeps its first rows. Or several, as [{source: a.jsonl, weight: 2}, {source: b.jsonl, weight: 1}]
    train: str | list[DataSource]
    validation: str | None = None  # like train: rows to validate on; default: validation_rows, or none
    test: str | None = None  # of a policy: only compared with train, so that prompts in both are known
    split: str = "train"  # of a Hub data set: the split of train
    validation_split: str = "validation"  # of a Hub data set: the split of validation
    test_split: str = "test"  # of a Hub data set: the split of test
    validation_rows: int = 0  # without validation: so many rows of train are held out to validate on
    split_seed: int = 0  # which rows are held out, and which are sampled of more than validation.prompts
    prompt_column: str = "prompt"  # text, or a list of chat messages; where the prompt alone has another name
    columns: dict[str, str] = field(default_factory=dict)  # our name -> theirs, e.g. {prompt: question}
    drop_duplicates: bool = False  # of a policy: do not train on prompts that are in validation or test
    held_out: dict[str, str] = field(default_factory=dict)  # of sft, reward: more validation sets, name -> source

    def __post_init__(self) -> None:
        _at_least(self, 0, "validation_rows", "split_seed")
        if self.validation is not None and self.validation_rows:
            raise ValueError("data: expected validation (data of its own) or validation_rows (cut off train), not both")
        if self.prompt_column != "prompt" and "prompt" in (self.columns or {}):
            raise ValueError("data: expected prompt_column or columns.prompt, not both")
        if not isinstance(self.train, str):
            _check_sources(self.train, self.prompt_column)

    @property
    def sources(self) -> list[DataSource]:
        """The sources to train on, with their columns and splits, and names that differ."""
        given = [DataSource(source=self.train)] if isinstance(self.train, str) else self.train
        names = [source.name or _last_part(source.source) for source in given]
        numbered = [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
        return [
            dataclasses.replace(
                source,
                columns=(self.columns or {}) if source.columns is None else source.columns,
                split=source.split or self.split,
                name=source.name or name,
            )
            for source, name in zip(given, numbered, strict=True)
        ]

    @property
    def weights(self) -> list[float] | None:
        """The weights of the sources to train on; None: they have none."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    @property
    def train_text(self) -> str:
        """The sources to train on, for a message."""
        return self.train if isinstance(self.train, str) else ", ".join(source.source for source in self.train)


def _last_part(source: str) -> str:
    """Returns a source's last part without ending and pattern: data of glob:data/*.jsonl, tldr of trl-lib/tldr."""
    parts = [re.sub(r"[^\w-]+", "_", part.split(".")[0]).strip("_") for part in re.split(r"[/:]", source)]
    return next((part for part in reversed(parts) if part), "source")


def _check_sources(sources: list[DataSource], prompt_column: str) -> None:
    if not sources:
        raise ValueError("data.train: expected at least one source, got none")
    for i, source in enumerate(sources):
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise ValueError(
                f"data.train[{i}].weight: expected a finite number above 0, got {source.weight}; leave out a source "
                f"that is not to be drawn"
            )
        if source.name is not None and not re.fullmatch(r"[\w.-]+", source.name):
            raise ValueError(
                f"data.train[{i}].name: expected letters, digits and any of _ . - (it stands in the metrics' names), "
                f"got {source.name!r}"
            )
        if prompt_column != "prompt" and "prompt" in (source.columns or {}):
            raise ValueError(f"data: expected prompt_column or data.train[{i}].columns.prompt, not both")
    without = [source.source for source in sources if source.weight is None]
    if 0 < len(without) < len(sources):
        raise ValueError(
            f"data.train: expected a weight of every source, or of none (then all rows are drawn equally often), got "
            f"none of {', '.join(without)}"
        )
    names = [source.name for source in sources if source.name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"data.train: the sources' names must differ, got {twice!r} twice")


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
        _positive(self, "learning_rate", "max_grad_norm", "adam_epsilon")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _finite(self, "learning_rate", "adam_epsilon", "weight_decay")  # max_grad_norm .inf: never scaled
        if self.warmup_steps >= 2**31:
            raise ValueError(f"warmup_steps: expected at most 2**31 - 1 = {2**31 - 1}, got {self.warmup_steps}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.name != "adamw" or self.options:
            from train.optimizers import check_choice  # here, since optax takes a moment to load

            defaults = {item.name: item.default for item in dataclasses.fields(self)}
            adam = ("adam_beta1", "adam_beta2", "adam_epsilon")
            check_choice(self.name, self.options, [name for name in adam if getattr(self, name) != defaults[name]])

    @property
    def is_float32(self) -> bool:
        """Whether the optimizer computes in float32 whatever the parameters' dtype is."""
        return self.master_weights or self.moments_dtype == "float32"


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int = -1  # devices over which prompts are split; -1: all that are left
    fsdp: int = 1  # devices over which parameters are split, and prompts too
    tensor: int = 1  # devices over which attention heads, the MLP and the vocabulary are split
    rules: dict[str, list[str]] = field(default_factory=dict)  # overrides of models.sharding.RULES
    sampling_copy: bool = True  # sample from whole weights in model.dtype; false: gather each layer for every token
    # how sampling runs the layers: scanned (as CPUs want it), unrolled, kernels (unrolled, attention by kernels for
    # GPUs or TPUs); auto: kernels where the heads allow it, else unrolled; on CPUs and without a sampling copy scanned
    decoding: Literal["auto", "scanned", "unrolled", "kernels"] = "auto"
    # attention of whole rows, where prompts are computed, completions scored and gradients taken: xla, or kernels that
    # keep no scores in memory, for GPUs and TPUs; auto: kernels where they can, see docs/speed.md
    attention: Literal["auto", "xla", "kernels"] = "auto"

    def __post_init__(self) -> None:
        if self.decoding in ("unrolled", "kernels") and not self.sampling_copy:
            raise ValueError(f"mesh.decoding: {self.decoding} needs a copy; expected mesh.sampling_copy: true with it")


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
        _at_least(self, 1, "every")
        if self.every_minutes is not None:
            _positive(self, "every_minutes")
            _finite(self, "every_minutes")
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"checkpoint.keep: expected at least 1, or null to keep all checkpoints, got {self.keep}")
        if self.keep_every is not None:
            self._check_keep_every(self.keep_every)
        elif self.weights_only:
            raise ValueError("checkpoint.weights_only: true needs checkpoint.keep_every, whose checkpoints it shrinks")
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


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    start: int = 3  # the first step of the trace; the first two compile
    steps: int = 2  # how many steps

    def __post_init__(self) -> None:
        _at_least(self, 1, "start", "steps")

    @property
    def last(self) -> int:
        """The last step of the trace."""
        return self.start + self.steps - 1


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = True  # write metrics to output_dir/tensorboard too
    wandb_project: str | None = None  # log to this Weights & Biases project too; the key comes from the environment
    mlflow_experiment: str | None = None  # log to this MLflow experiment too; MLFLOW_TRACKING_URI says where it is
    trackio_project: str | None = None  # log to this Trackio project too
    # trackers of your own: dotted paths of classes with the methods of `train.run.trackers.Sink`
    trackers: list[str] = field(default_factory=list)
    progress: bool = True  # a progress bar, on a terminal
    completions_every: int = 0  # steps between tables of the sampled completions with their rewards; 0: none
    profile: ProfileConfig | None = None  # a trace of some steps, e.g. {start: 3, steps: 2}; null: none

    def __post_init__(self) -> None:
        _at_least(self, 0, "completions_every")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all three programs share."""

    output_dir: str  # the run's directory, e.g. runs/tldr
    model: ModelConfig  # the network that is trained
    data: DataConfig  # the rows that it is trained and validated on
    max_steps: int  # steps in all, also of a run that is continued
    seed: int = 0  # of the order of rows, sampling and new weights; below 2**32
    # begin at a step of another run, RUN@STEP, with its parameters, optimizer, reference, and place in the data, under
    # other settings such as a lower learning rate; for its weights alone set model.path
    start_from: str | None = None
    chat: ChatConfig = field(default_factory=ChatConfig)  # how prompts become tokens
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # the optimizer and its schedule
    lora: Lora = field(default_factory=Lora)  # low-rank adapters, trained instead of all parameters
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)  # what a run can be continued from
    mesh: MeshConfig = field(default_factory=MeshConfig)  # how arrays are split over devices, e.g. data=1,fsdp=8
    log: LogConfig = field(default_factory=LogConfig)  # where metrics and texts are written
    callbacks: list[str] = field(default_factory=list)  # dotted paths of classes, see train.run.callbacks

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_steps")
        check_seed(self.seed)
        if (profile := self.log.profile) is not None and profile.last > self.max_steps:
            raise ValueError(
                f"log.profile: expected steps up to max_steps = {self.max_steps}, got {profile.start} to {profile.last}"
            )
        if self.optimizer.master_weights and (self.model.param_dtype == "float32" or self.lora.rank):
            raise ValueError(
                "optimizer.master_weights: is for parameters that are trained in bfloat16; set model.param_dtype, or "
                "leave it out (float32 parameters and adapters are their own master weights)"
            )


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Stop when validation no longer improves; the run then is its best step."""

    patience: int | None = None  # validations without improvement before it stops; null: no early stopping
    metric: Literal["loss", "accuracy"] = "loss"  # what has to improve on data.validation; accuracy: of reward models
    min_delta: float = 0.0  # only what is better by more than this is an improvement

    def __post_init__(self) -> None:
        _at_least(self, 0, "min_delta")
        _finite(self, "min_delta")
        if self.patience is not None:
            _at_least(self, 1, "patience")


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(RunConfig):
    """What `train sft` and `train reward` share."""

    batch_size: int = 32  # rows per step: sequences (packed: rows of max_length), or prompts with their answers
    max_length: int = 1024  # tokens; longer rows are left out, counted and printed
    eval_steps: int = 25  # steps between validations
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)  # when to stop before max_steps

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_size", "eval_steps")
        _at_least(self, 2, "max_length")
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
        _at_least(self, 0, "center_rewards_coefficient")
        _finite(self, "center_rewards_coefficient")
        if self.loss != "bradley_terry" and self.center_rewards_coefficient:
            raise ValueError(f"center_rewards_coefficient: is a part of loss: bradley_terry, got loss: {self.loss}")


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
        _at_least(self, 0, "workers", *["retries"] * (self.retries is not None))
        if self.timeout_s is not None:
            _positive(self, "timeout_s")
            _finite(self, "timeout_s")
        _at_least(self, 1, "max_length", "batch_prompts")
        _finite(self, "weight")

    @property
    def missing_rule(self) -> MissingRule:
        """`missing`, or the default of its kind: a sum without a reward model's part could rank a completion best."""
        return self.missing or ("leave_out" if self.model is not None else "ignore")

    @property
    def label(self) -> str:
        return self.name or str(self.model or self.function).rstrip("/").replace(".", "/").split("/")[-1]


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
        _at_least(self, 0, "beta", "clip_low", "clip_high", "importance_sampling_clip_min")
        _finite(self, "beta", "importance_sampling_clip_min")
        _at_least(self, self.importance_sampling_clip_min, "importance_sampling_clip_max")
        self._check_reference()
        _at_least(self, 1, *["logprob_chunk"] * (self.logprob_chunk is not None))
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
        _finite(self, "entropy_coef", "ppo_kl_coef")
        _at_least(self, 0, "ppo_kl_coef")
        for name in ("top_entropy_quantile", "clip_cov_ratio", "kl_cov_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not self.clip_cov_lb < self.clip_cov_ub:
            raise ValueError(
                f"loss.clip_cov_lb: expected a number below clip_cov_ub = {self.clip_cov_ub}, got {self.clip_cov_lb}"
            )
        if not self.clip_cov_ratio and (self.clip_cov_lb, self.clip_cov_ub) != (1.0, 5.0):
            raise ValueError("loss.clip_cov_lb, loss.clip_cov_ub: are of Clip-Cov; set loss.clip_cov_ratio above 0")
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
            _at_least(self, 1, "reference_sync_steps")
        elif self.reference_mixup != 0.6:
            raise ValueError(
                f"loss.reference_mixup: {self.reference_mixup} needs loss.reference_sync_steps, when it is used"
            )
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"loss.reference_mixup: expected a number in (0, 1], got {self.reference_mixup}")


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
        _at_least(self, 1, "every", "num_generations", "batch_prompts")
        _at_least(self, 0, "prompts")
        if self.temperature is not None:
            _positive(self, "temperature")
            _finite(self, "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"validation.top_p: expected a number in (0, 1], or null, got {self.top_p}")
        _at_least(self, 0, *["top_k"] * (self.top_k is not None))
        _at_least(self, 1, *["max_completion_length"] * (self.max_completion_length is not None))
        if self.rewards and not self.prompts:
            raise ValueError("validation.rewards: nothing is validated with validation.prompts: 0")

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of sampling that are not those of training."""
        names = ("temperature", "top_p", "top_k", "max_completion_length")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def due(self, step: int, last: int) -> bool:
        """Whether the policy is validated after so many of `last` steps."""
        return self.prompts > 0 and (step % self.every == 0 or step == last)


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
        _at_least(self, 1, "prompts_per_step", "microbatch_prompts", "max_prompt_length", "max_completion_length")
        _at_least(self, 1, "num_iterations", "dynamic_sampling_attempts")
        if self.minibatch_prompts is not None:
            _at_least(self, 1, "minibatch_prompts")
        if self.rollout_prompts is not None and not 1 <= self.rollout_prompts <= self.prompts_per_step:
            raise ValueError(
                f"rollout_prompts: expected a number from 1 to prompts_per_step = {self.prompts_per_step}, or null to "
                f"sample all of them at once, got {self.rollout_prompts}"
            )
        self._check_rollout_ahead()
        _at_least(self, 0, "top_k", "min_tokens", "skip_nonfinite")
        _positive(self, "temperature")
        _finite(self, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_sampling(self)
        _divides("minibatch_prompts", self.update_prompts, "prompts_per_step", self.prompts_per_step)
        whole = "prompts_per_step" if self.minibatch_prompts is None else "minibatch_prompts"
        _divides("microbatch_prompts", self.microbatch_prompts, whole, self.update_prompts)
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


CHIP_NAMES = ("v4", "v5e", "v5p", "v6e", "A100", "H100", "H200", "B200")  # train.plan.chips has their figures


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PolicyConfig):
    """`train plan`: what a policy's run needs of its devices. A policy's settings, and the devices to plan for."""

    # how many to plan for: 8, or of each chip H200=8,v5p=64; default: the product of the mesh's sizes
    devices: int | str | None = None
    # the devices' kind (v4, v5e, v5p, v6e, A100, H100, H200, B200), or several with commas; default: memory of all
    chip: str | None = None
    suggest: bool = False  # try meshes, the likeliest first, with smaller micro-batches where needed; show the best
    tries: int = 4  # with suggest: how many meshes of each kind of chip to compile for
    compare: bool = False  # one table of all meshes and chips that were tried; always so for several chips
    price_per_chip_hour: float | str | None = None  # in any currency: 3.5 for all chips, or H200=3.5,v5p=4.2
    top: int = 0  # list so many of the most expensive kernels of each program, with the named scope of each
    out: str | None = None  # a JSON file to write with all figures; of several plans those of the best
    hlo: str | None = None  # a directory to write each program's compiled text to, as NAME.hlo

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "tries")
        _at_least(self, 0, "top")
        for chip in self.chips:
            if chip not in CHIP_NAMES:
                raise ValueError(f"chip: expected one or more of {', '.join(CHIP_NAMES)}, got {chip!r}")
        _ = self.prices, self.counts

    @property
    def chips(self) -> tuple[str, ...]:
        """The kinds of devices to plan for, each once; none: all, by memory alone."""
        return tuple(dict.fromkeys(name.strip() for name in self.chip.split(","))) if self.chip is not None else ()

    @property
    def prices(self) -> dict[str, float]:
        """The price of an hour of each chip that has one."""
        prices = _by_chip(self.price_per_chip_hour)
        if prices is None or not all(0 <= price < math.inf for price in prices.values()):
            raise ValueError(
                "price_per_chip_hour: expected a price such as 3.5, or H200=3.5,v5p=4.2, "
                f"got {self.price_per_chip_hour!r}"
            )
        return prices

    @property
    def counts(self) -> dict[str, int]:
        """The number of devices of each chip that has one."""
        counts = _by_chip(self.devices)
        if counts is None or not all(count >= 1 and count == int(count) for count in counts.values()):
            raise ValueError(f"devices: expected a number such as 8, or H200=8,v5p=64, got {self.devices!r}")
        return {chip: int(count) for chip, count in counts.items()}


def _by_chip(given: float | str | None) -> dict[str, float] | None:
    """Reads one number for all chips, or NUMBER of each as CHIP=NUMBER,...; None if it is neither."""
    values: dict[str, float] = {}
    for part in [] if given is None else str(given).split(","):
        chip, equals, number = part.strip().rpartition("=")
        if bool(equals) != (chip in CHIP_NAMES) or (values and not equals):
            return None
        try:
            values |= dict.fromkeys([chip] if equals else CHIP_NAMES, float(number))
        except ValueError:
            return None
    return values if all(math.isfinite(value) for value in values.values()) else None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`train export`: a Hugging Face directory of a policy or a reward model, or its adapters alone."""

    checkpoint: str  # a run (its newest step) or RUN@STEP; a Hugging Face directory or Hub name works too
    out: str  # a directory that is not there yet, or empty
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the written weights; auto: as they are stored
    max_shard_size: str = "5GB"  # weights above this are split over several files
    adapters: bool = False  # of a run with lora.rank: the adapters alone, as PEFT loads them; false: merged

    def __post_init__(self) -> None:
        _ = self.max_shard_bytes

    @property
    def max_shard_bytes(self) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB|KB|)", self.max_shard_size.strip(), re.IGNORECASE)
        size = float(match[1]) * {"GB": 1e9, "MB": 1e6, "KB": 1e3, "": 1}[match[2].upper()] if match else 0
        if size < 1:
            raise ValueError(f"max_shard_size: expected a size such as 5GB or 500MB, got {self.max_shard_size!r}")
        return int(size)


def resolved(config: Any) -> dict[str, Any]:
    """The whole config as plain values, as it is saved with every run: without the passwords in options of rewards."""
    return hide_passwords(dataclasses.asdict(config))


def hide_passwords(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a config's plain values without the passwords in the options of reward functions."""
    if isinstance(validation := values.get("validation"), dict):
        values = {**values, "validation": hide_passwords(validation)}
    if not isinstance(values.get("rewards"), list | tuple):
        return values
    rewards = [
        {**spec, "options": hide_secrets(spec["options"])} if isinstance(spec, dict) and spec.get("options") else spec
        for spec in values["rewards"]
    ]
    return {**values, "rewards": rewards}


def _divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole_name} = {whole}, got {part}")


def check_sampling(config: Any) -> None:
    """Refuses values of min_p, repetition_penalty and stop that no program can sample with.

    Raises:
      ValueError: the first such value.
    """
    if not 0 <= config.min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {config.min_p}")
    _positive(config, "repetition_penalty")
    _finite(config, "repetition_penalty")
    if len(set(config.stop)) < len(config.stop) or not all(config.stop):
        raise ValueError(f"stop: expected texts of at least one character, each once, got {config.stop}")
    for text in config.stop:
        check_text(text)


def check_seed(seed: int) -> None:
    """Refuses a seed that another one could not be told from: keys of random numbers hold 32 bits of it.

    Raises:
      ValueError: the seed is not from 0 to 2**32 - 1.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"seed: expected a number from 0 to 2**32 - 1 = {2**32 - 1}, got {seed}, which would draw the same as "
            f"{seed % 2**32}"
        )


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{name}: expected a number above 0, got {value}")
        if value < float(np.finfo(np.float32).tiny):
            raise ValueError(f"{name}: expected a number above 0, got {value}, which is 0 in float32")


def _finite(config: Any, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{name}: expected a finite number, got {getattr(config, name)}")


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)}")
