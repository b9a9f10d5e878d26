"""Checks of values that several sections of a config share; each raises a ValueError in one line."""

import math
from typing import Any

import numpy as np

from models.messages import check_text

SECTIONS = {  # the settings that are sections of a config, by their class
    "CheckpointConfig": "checkpoint.",
    "DataConfig": "data.",
    "EarlyStoppingConfig": "early_stopping.",
    "LogConfig": "log.",
    "LossConfig": "loss.",
    "OptimizerConfig": "optimizer.",
    "ProfileConfig": "log.profile.",
    "RewardSpec": "rewards.",
    "ValidationConfig": "validation.",
}


def check_sampling(config: Any) -> None:
    """Refuses values of min_p, repetition_penalty and stop that no program can sample with.

    Raises:
      ValueError: the first such value.
    """
    if not 0 <= config.min_p <= 1:
        raise ValueError(f"min_p: expected a number in [0, 1], got {config.min_p}")
    check_positive(config, "repetition_penalty")
    check_finite(config, "repetition_penalty")
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


def check_divides(name: str, part: int, whole_name: str, whole: int) -> None:
    if part < 1 or whole % part:
        raise ValueError(f"{name}: expected a divisor of {whole_name} = {whole}, got {part}")


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise ValueError(f"{setting_name(config, name)}: expected a number above 0, got {value}")
        if value < float(np.finfo(np.float32).tiny):
            raise ValueError(
                f"{setting_name(config, name)}: expected a number above 0, got {value}, which is 0 in float32"
            )


def check_finite(config: Any, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"{setting_name(config, name)}: expected a finite number, got {getattr(config, name)}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{setting_name(config, name)}: expected at least {least}, got {getattr(config, name)}")


def setting_name(config: Any, name: str) -> str:
    """Returns the name of a config's field as a user writes it: that of a section has the section in front."""
    return f"{SECTIONS.get(type(config).__name__, '')}{name}"
