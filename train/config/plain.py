"""A config as plain values, as it is saved with a run."""

import dataclasses
from typing import Any

from train.private import hide_secrets


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
