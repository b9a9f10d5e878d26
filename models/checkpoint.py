"""Orbax checkpoints of a run: one atomic step each, with everything that evaluation and resuming need.

runs/NAME/checkpoints/STEP/params   the trained parameters, a nested dict of arrays
                          /train    optimizer state and the rest of the trainer's state; not in a step that is marked as
                                    one of weights alone, by a file WEIGHTS_ONLY
                          /digests  JSON that tells damaged arrays from those that were saved
                          /about    JSON: {"model": a Hugging Face config, "run": the resolved run config,
                                    "pins": what the run was started from, and "lora" if the run trains adapters}
runs/NAME/checkpoints/base          the frozen parameters of a run that trains adapters

To store checkpoints elsewhere, for example in gs://BUCKET/NAME, `checkpoints` is a file with that name in it.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from models.checkpoint_restore import BASE, StepReader, read_about_item, restore_base
from models.checkpoint_saves import Checkpoints, wait_for_saves
from models.checkpoint_steps import (
    BEST,
    FOLDER,
    STOPPED,
    best_step,
    checkpoints_folder,
    finalized_steps,
    find_step,
    folder_of,
    is_run,
    resolve_step,
    set_checkpoints_folder,
    set_damaged_aside,
    whole_steps,
)
from models.config import Qwen3Config, read_config
from models.finite import require_finite_weights
from models.hf_weights import abstract_model, abstract_params, as_layout, load_pretrained, split
from models.lora import Lora, merge_adapters, merge_trainable, split_trainable
from models.names import split_step
from models.qwen3 import Backbone
from models.sharding import Layout
from models.weight_files import could_be_on_hub, describe_local, find_directory

__all__ = [
    "BASE",
    "BEST",
    "FOLDER",
    "STOPPED",
    "Checkpoints",
    "best_step",
    "check_loadable",
    "checkpoints_folder",
    "find_step",
    "is_run",
    "load_adapters",
    "load_model",
    "read_about",
    "read_newest_about",
    "resolve_step",
    "set_checkpoints_folder",
    "set_damaged_aside",
    "wait_for_saves",
]


def read_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item: {"model": ..., "run": ...}, and "lora" if it has adapters."""
    return _reader(*find_step(checkpoint)).about()


def read_step_about(checkpoint: str | Path) -> dict[str, Any]:
    """Reads a checkpoint's `about` item; one of several processes may call this alone."""
    run, step = find_step(checkpoint)
    return read_about_item(checkpoints_folder(run) / str(step))


def restore_state(checkpoint: str | Path, params: Any, train: Any, frozen: Any) -> tuple[Any, Any, Any]:
    """Restores parameters, trainer state and the base of adapters of RUN@STEP, laid out as the given trees.

    Raises:
      ValueError: the step cannot be read.
    """
    run, step = find_step(checkpoint)
    reader = _reader(run, step)
    base = restore_base(checkpoints_folder(run), frozen, reader.digests()) if frozen else frozen
    return _restore_params(run, step, params), reader.arrays("train", train), base


def read_newest_about(run: str | Path, directory: str | None = None) -> dict[str, Any]:
    """Reads the `about` item of the newest checkpoint that has a readable one; {} without checkpoints.

    In contrast to `read_about`, one of several processes may call this alone.

    Args:
      run: a run's directory, which may not exist yet.
      directory: where its checkpoints are, if the run's directory does not say so.

    Raises:
      ValueError: there are checkpoints, and none has a readable `about`.
    """
    if (Path(run) / FOLDER).exists():
        folder = checkpoints_folder(run)
    elif directory is not None:
        folder = folder_of(directory)
    else:
        return {}
    reason: Exception | None = None
    for step in reversed(finalized_steps(folder)):
        try:
            return read_about_item(folder / str(step))
        except (OSError, ValueError) as error:
            reason = reason or error
    if reason is not None:
        raise ValueError(f"{folder}: no checkpoint in it can be read ({reason})") from reason
    return {}


def _reader(run: Path, step: int) -> StepReader:
    folder = checkpoints_folder(run)

    def remedy() -> str:
        others = [other for other in whole_steps(folder) if other != step]
        nearest = max(others, key=lambda other: (other < step, other), default=None)
        return "; put its files back" + ("" if nearest is None else f", or name another step, such as {run}@{nearest}")

    return StepReader(run, folder, step, remedy)


def _restore_params(run: Path, step: int, params: Any) -> Any:
    """Restores the trained parameters of a step; raises ValueError if they are not finite."""
    restored = _reader(run, step).arrays("params", params)
    require_finite_weights(restored, f"{run}: step {step}")
    return restored


def _stored_dtype(reader: StepReader, folder: epath.Path, item: str) -> Any:
    digests = reader.digests()
    if digests is not None and f"{item}.embed_VD" in digests:
        return digests[f"{item}.embed_VD"].partition("[")[0]
    return ocp.StandardCheckpointHandler().metadata(folder)["embed_VD"].dtype


def load_adapters(checkpoint: str | Path) -> tuple[dict[str, Any], Lora, Qwen3Config]:
    """Loads the trained parameters of a run with adapters, with the adapters' and the network's configs.

    Raises:
      ValueError: a checkpoint without adapters, or with adapters that are not finite.
    """
    check_loadable(checkpoint)
    about = read_about(checkpoint) if is_run(checkpoint) else {}
    if "lora" not in about:
        raise ValueError(f"{checkpoint}: has no adapters; expected a run that was trained with lora.rank above 0")
    lora, config = Lora(**about["lora"]), Qwen3Config.from_hf(about["model"], source=str(checkpoint))
    trained, _ = split_trainable(abstract_params(abstract_model(config, lora=lora), None))
    run, step = find_step(checkpoint)
    return _restore_params(run, step, trained), lora, config


def check_loadable(path: str | Path) -> None:
    """Checks that a path may be a model: a run with checkpoints, a Hugging Face directory, or a name on the Hub.

    Raises:
      FileNotFoundError: the path is none of them.
      ValueError: a config.json that is not supported.
    """
    run, step = split_step(path)
    if is_run(path):
        find_step(path)
        return
    expected = f"a run directory with {FOLDER}/STEP in it, or a Hugging Face model directory with a config.json"
    folder = Path(run)
    if not step and could_be_on_hub(path):
        return
    if folder.is_dir() and (step or not (folder / "config.json").is_file()):
        raise FileNotFoundError(f"{path}: not a checkpoint; expected {expected}")
    if folder.is_dir():
        read_config(folder)
        return
    before = str(path).rpartition("@")[0]
    if is_run(before):  # "RUN@last", "RUN@-1"
        steps = ", ".join(map(str, finalized_steps(checkpoints_folder(before))))
        raise FileNotFoundError(f"{path}: no such step; expected one of {steps}")
    raise FileNotFoundError(f"{path}: no such directory; expected {expected}{describe_local(path)}")


def read_network(path: str | Path) -> Qwen3Config:
    """Returns the config of a model's network: of a run, a Hugging Face directory or a name on the Hub.

    Raises:
      FileNotFoundError, ValueError: see `check_loadable`.
    """
    check_loadable(path)
    if is_run(path):
        return Qwen3Config.from_hf(read_about(path)["model"], source=str(path))
    return read_config(find_directory(path, weights=False))


def load_model(
    path: str | Path,
    *,
    mesh: Mesh | Layout | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    **options: Any,
) -> Backbone:
    """Loads a policy or reward model from a run's checkpoint, a Hugging Face directory, or the Hub.

    With dtype "auto" the compute dtype is that of the stored weights. Adapters are merged into their base.

    Args:
      path: "runs/NAME", "runs/NAME@STEP", a directory, or a name on the Hub.
      mesh, dtype, param_dtype, options: as for `models.hf_weights.load_pretrained`.

    Raises:
      FileNotFoundError: neither a run with checkpoints nor a model directory.
      ValueError: weights that are not finite; and see `models.hf_weights.load_pretrained`.
    """
    check_loadable(path)
    if not is_run(path):
        return load_pretrained(path, mesh=mesh, dtype=dtype, param_dtype=param_dtype, **options)
    run, step = find_step(path)
    layout, folder, reader = as_layout(mesh), checkpoints_folder(run), _reader(run, step)
    about = reader.about()
    lora = Lora(**about["lora"]) if "lora" in about else None
    config = Qwen3Config.from_hf(about["model"], source=str(path))
    if dtype == "auto":
        item = "params" if lora is None else BASE
        dtype = _stored_dtype(reader, folder / BASE if lora is not None else folder / str(step) / item, item)
    options |= {"dtype": dtype, "param_dtype": param_dtype or dtype, "layout": layout}
    trained, frozen = split_trainable(abstract_params(abstract_model(config, lora=lora, **options), layout))
    params = _restore_params(run, step, trained)
    if lora is not None:
        base = restore_base(folder, frozen, reader.digests())
        params = merge_adapters(merge_trainable(params, base), lora)
    return nnx.merge(split(abstract_model(config, **options))[0], params)
