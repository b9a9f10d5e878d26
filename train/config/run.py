"""What the configs of `train sft`, `train reward` and `train policy` share."""

from dataclasses import dataclass, field

from models.lora import Lora
from train.config.checkpoint import CheckpointConfig
from train.config.checks import check_at_least, check_seed
from train.config.data import DataConfig
from train.config.log import LogConfig
from train.config.mesh import MeshConfig
from train.config.model import ChatConfig, ModelConfig
from train.config.optimizer import OptimizerConfig


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
        check_at_least(self, 1, "max_steps")
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
