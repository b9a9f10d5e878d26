"""Every setting of every program: names, types, defaults. Nothing reads a setting from anywhere else.

`python -m train policy --config x.yaml --optimizer.learning_rate 2e-6` reads the YAML, then the command line. A module
is a section of such a file (model, data, optimizer, loss, ...) or what one program adds (supervised, policy, plan,
export). Import from here.
"""

from train.config.checkpoint import CheckpointConfig
from train.config.checks import check_sampling, check_seed
from train.config.data import DataConfig, DataSource
from train.config.export import ExportConfig
from train.config.log import LogConfig, ProfileConfig
from train.config.loss import LossConfig, SamplerCorrection
from train.config.mesh import MeshConfig
from train.config.model import ChatConfig, ModelConfig
from train.config.optimizer import OptimizerConfig
from train.config.plain import hide_passwords, resolved
from train.config.plan import CHIP_NAMES, PlanConfig
from train.config.policy import PolicyConfig
from train.config.rewards import MissingRule, RewardSpec
from train.config.run import RunConfig
from train.config.supervised import EarlyStoppingConfig, RewardModelConfig, SftConfig, SupervisedConfig
from train.config.validation import ValidationConfig

__all__ = [
    "CHIP_NAMES",
    "ChatConfig",
    "CheckpointConfig",
    "DataConfig",
    "DataSource",
    "EarlyStoppingConfig",
    "ExportConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "MissingRule",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "PolicyConfig",
    "ProfileConfig",
    "RewardModelConfig",
    "RewardSpec",
    "RunConfig",
    "SamplerCorrection",
    "SftConfig",
    "SupervisedConfig",
    "ValidationConfig",
    "check_sampling",
    "check_seed",
    "hide_passwords",
    "resolved",
]
