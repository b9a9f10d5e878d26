"""Which settings may differ between a run and its continuation, and which of one that starts from a step of another.

goes on        in the same output_dir: MAY_CHANGE and PLACEMENT change no number that is already written
`start_from`   a new run that begins at RUN@STEP: all but what the saved parameters and optimizer state belong to
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.checkpoint import checkpoints_folder, is_run, read_newest_about, read_step_about, resolve_step
from models.checkpoint_files import is_weights_only, warn_once
from models.names import split_step
from train.config import RunConfig, hide_passwords, resolved
from train.running import naming
from train.strict_yaml import load_yaml

CONFIG = "config.yaml"
# Settings that may differ between a run and its continuation: they change no number that is already written.
MAY_CHANGE = (
    "max_steps",
    "log",
    "callbacks",
    "checkpoint",
    "mesh",
    "output_dir",
    "early_stopping",
    "rollout_prompts",
    "skip_nonfinite",
)
# So may these, in any section: they say where arrays lie, how much is computed at a time, what failures come to.
PLACEMENT = (
    "offload",
    "offload_reference",
    "logprob_chunk",
    "batch_prompts",
    "workers",
    "timeout_s",
    "retries",
    "on_error",
)
# What the parameters and the optimizer's state of a step belong to.
_OF_STATE = (
    "model.path",
    "model.architecture",
    "model.tokenizer",
    "model.param_dtype",
    "lora.",
    "optimizer.name",
    "optimizer.options",
    "optimizer.master_weights",
    "optimizer.moments_dtype",
    "rollout_ahead",
    "loss.reference_sync_steps",
)
# With rollout_ahead the rollouts of the next step too.
_OF_ROLLOUTS = (
    "seed",
    "data",
    "chat",
    "prompts_per_step",
    "num_generations",
    "max_prompt_length",
    "max_completion_length",
)
_OF_PROGRAMS = ("rewards", "packing", "center_rewards_coefficient")  # each is a setting of one program alone
_SHOWN = 3  # more settings that an error names


def check_output_dir(config: RunConfig) -> None:
    """Refuses an output_dir before anything is loaded.

    Raises:
      ValueError: it holds a run of another config, or its name means a step of another run.
    """
    path = Path(config.output_dir)
    if not path.is_dir() and is_run(path):
        other, step = split_step(path)
        raise ValueError(
            f"output_dir: {path} is the name of step {step} of the run {other}; expected a name that does not end in "
            f"@{step}"
        )
    if (path / CONFIG).is_file():
        refuse_another(config, _read_config(path / CONFIG), path)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        saved = load_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not YAML: expected UTF-8 text ({error.reason})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file}: expected 'key: value' lines, got {type(saved).__name__}")
    return saved


def refuse_another(config: RunConfig, saved: dict[str, Any], place: Any) -> None:
    """Refuses to go on with a run of another config; a setting that the saved one lacks has its default."""
    saved = _with_decay_rule(saved, config, place)
    plain, saved = _plain(config), hide_passwords(_with_defaults(saved, config))
    kept = [key for key in plain if key not in MAY_CHANGE]
    changed = [
        difference
        for key in kept
        for difference in differences(_without_placement(saved.get(key)), _without_placement(plain[key]), key)
    ]
    if changed:
        changed.sort(key=lambda difference: not difference[0].endswith(".name"))  # which optimizer, before its options
        (key, old, new), *others = changed
        more = f", and in {_names(others)}" if others else ""
        raise ValueError(
            f"{place}: holds a run with another config ({key}: {old!r}, now {new!r}){more}; choose another place, or "
            f"delete that directory to start over; with another output_dir, start_from: {place}@STEP goes on from a "
            f"step of it"
        )


def differences(old: Any, new: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted key, old, new) of every leaf in which two values of a setting differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*new, *old]):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{key}[{number}]")
    elif old != new:
        yield key, old, new


def _names(changed: list[tuple[str, Any, Any]]) -> str:
    count = len(changed) - _SHOWN
    return ", ".join(key for key, _, _ in changed[:_SHOWN]) + (f" and {count} more" if count > 0 else "")


def _plain(config: RunConfig) -> dict[str, Any]:
    return dict(json.loads(json.dumps(resolved(config))))


def check_start(config: RunConfig) -> None:
    """Refuses a `start_from` whose state the run could not go on with; one that has checkpoints does not need it.

    Raises:
      ValueError, FileNotFoundError: it is refused.
    """
    name = config.start_from
    if name is None or read_newest_about(config.output_dir, config.checkpoint.directory):
        return
    if not is_run(name):
        raise ValueError(f"start_from: {name}: expected a run, or RUN@STEP; for weights alone set model.path")
    with naming("start_from"):
        exact = resolve_step(name)
    run, step = split_step(exact)
    if is_weights_only(checkpoints_folder(run) / step):
        raise ValueError(f"start_from: {exact} has weights alone; expected a step with the optimizer's state")
    if config.max_steps <= int(step):
        raise ValueError(
            f"start_from: {exact}: max_steps counts its steps too; expected more than {step}, got {config.max_steps}"
        )
    plain, saved = _plain(config), read_step_about(exact)["run"]
    if alone := [key for key in _OF_PROGRAMS if (key in plain) != (key in saved)]:
        raise ValueError(f"start_from: {exact} is of another program ({alone[0]} is a setting of one of the two)")
    saved = _with_defaults(saved, config)
    belongs = _OF_STATE + (_OF_ROLLOUTS if plain.get("rollout_ahead") else ())
    changed = [
        difference
        for key in plain
        for difference in differences(saved.get(key), plain[key], key)
        if difference[0].startswith(belongs)
    ]
    for key, old, new in changed:
        raise ValueError(
            f"start_from: {exact}: its state belongs to other settings ({key}: {old!r}, now {new!r}); keep those of it"
        )


def _with_decay_rule(saved: dict[str, Any], config: RunConfig, place: Any) -> dict[str, Any]:
    """Lets a run go on that is older than `optimizer.decay_all`; says so where that changes its weights' decay."""
    optimizer = saved.get("optimizer")
    if not isinstance(optimizer, dict) or "decay_all" in optimizer:
        return saved
    if optimizer.get("weight_decay") and not config.optimizer.decay_all:
        warn_once(
            f"{place}: optimizer.weight_decay was for norms and biases too when this run was started, and now leaves "
            f"them out; optimizer.decay_all: true goes on as before"
        )
    return {**saved, "optimizer": {**optimizer, "decay_all": config.optimizer.decay_all}}


def _with_defaults(saved: Any, config: Any) -> Any:
    """Fills a saved config up with the defaults of settings that did not exist when it was saved."""
    if isinstance(config, list) and isinstance(saved, list) and len(config) == len(saved):
        return [_with_defaults(old, new) for old, new in zip(saved, config, strict=True)]
    if not dataclasses.is_dataclass(config) or not isinstance(saved, dict):
        return saved
    filled = dict(saved)
    for item in dataclasses.fields(config):
        if item.name in saved:
            filled[item.name] = _with_defaults(saved[item.name], getattr(config, item.name))
        elif item.default is not dataclasses.MISSING:
            filled[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            value = item.default_factory()
            filled[item.name] = resolved(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(filled))


def _without_placement(value: Any) -> Any:
    """Returns a section of a config without the settings in `PLACEMENT`."""
    if isinstance(value, list):
        return [_without_placement(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k not in PLACEMENT}
    return kept | {"rewards": _without_placement(kept["rewards"])} if "rewards" in kept else kept  # of a validation
