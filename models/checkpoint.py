"""Orbax checkpoints of a run: one atomic step each, with everything that evaluation and resuming need.

runs/NAME/checkpoints/STEP/params   the trained parameters, a nested dict of arrays
                          /train    optimizer state and whatever else the trainer carries
                          /about    JSON: {"model": a Hugging Face config, "run": the resolved run config, and
                                    "lora" where adapters are trained}
runs/NAME/checkpoints/base          of a run that trains adapters: all other parameters, which never change

Where they are to lie elsewhere, for example in gs://BUCKET/NAME, `checkpoints` is a file with the name of that place.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from models.config import Qwen3Config, read_config
from models.hf_weights import abstract_model, abstract_params, as_layout, load_pretrained, split
from models.lora import Lora, merge_adapters, merge_trainable, split_trainable
from models.qwen3 import Backbone
from models.sharding import Layout
from models.weight_files import could_be_on_hub

FOLDER, BASE = "checkpoints", "base"


def checkpoints_folder(run: str | Path) -> epath.Path:
    """Where a run's checkpoints lie."""
    here = Path(run).absolute() / FOLDER
    return epath.Path(here.read_text(encoding="utf-8").strip() if here.is_file() else here)


def is_run(checkpoint: str | Path) -> bool:
    """Whether "runs/NAME" or "runs/NAME@STEP" is a run directory with checkpoints."""
    return (Path(str(checkpoint).partition("@")[0]) / FOLDER).exists()


def set_checkpoints_folder(run: str | Path, directory: str) -> None:
    """Say in a run's directory where its checkpoints lie.

    Raises:
      ValueError: it says something else already.
    """
    there = epath.Path(directory if "://" in directory else Path(directory).absolute())
    if is_run(run) and checkpoints_folder(run) != there:
        raise ValueError(
            f"checkpoint.directory: {directory}, but the checkpoints of {run} are in {checkpoints_folder(run)}"
        )
    if not is_run(run):
        Path(run).mkdir(parents=True, exist_ok=True)
        mine = Path(run) / f"{FOLDER}.{jax.process_index()}.tmp"  # several processes may write at once
        mine.write_text(f"{there}\n", encoding="utf-8")
        mine.replace(Path(run) / FOLDER)


class Checkpoints:
    """The checkpoints of one run directory. A killed save leaves the previous step intact."""

    def __init__(self, run: str | Path, *, keep: int | None = None, directory: str | None = None) -> None:
        """Of a run whose checkpoints lie in `directory`; None = in the run's own."""
        if directory is not None:
            set_checkpoints_folder(run, directory)
        self._keep, self.best = keep, 0  # `best`: a step that is kept although there are `keep` newer ones
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if keep is None else self, create=True, cleanup_tmp_directories=True
        )
        self._folder = checkpoints_folder(run)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Orbax asks which checkpoints, of which the last is the newest, are to stay."""
        newest = len(checkpoints) - (self._keep or len(checkpoints))
        return [i >= newest or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]

    def delete_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, params: Any, train: Any, about: dict[str, Any]) -> None:
        """Save in the background; a later save waits for an earlier one."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), train=ocp.args.StandardSave(train), about=ocp.args.JsonSave(about)
            ),
        )

    def restore(self, step: int, params: Any, train: Any) -> tuple[Any, Any]:
        """Parameters and trainer state of a step, with the shapes and shardings of the given trees."""
        as_abstract = ocp.utils.to_shape_dtype_struct
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(jax.tree.map(as_abstract, params)),
                train=ocp.args.StandardRestore(jax.tree.map(as_abstract, train)),
            ),
        )
        return restored["params"], restored["train"]

    def restore_or_save_base(self, frozen: Any) -> Any:
        """What is never trained: as it was first kept; kept now if it was not yet."""
        kept = _is_finalized(self._folder / BASE)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("all have looked before one writes")
        if kept:
            return _restore_base(self._folder, frozen)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self._folder / BASE, frozen, force=True)  # over what a killed save left
        return frozen

    def wait(self) -> None:
        """Wait for the save in flight."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in flight; nothing can be saved any more."""
        self._manager.close()


def _is_finalized(folder: epath.Path) -> bool:
    """Whether a checkpoint is there and was not cut short; in a bucket that is not one and the same."""
    return folder.is_dir() and ocp.utils.is_checkpoint_finalized(folder)


def find_step(checkpoint: str | Path) -> tuple[Path, int]:
    """The run directory and step of "runs/NAME" (its newest step) or "runs/NAME@STEP".

    Raises:
      FileNotFoundError: no such run, no checkpoint in it, or not that step.
    """
    run, _, wanted = str(checkpoint).partition("@")
    folder = checkpoints_folder(run)
    entries = folder.iterdir() if folder.is_dir() else []
    steps = sorted(int(entry.name) for entry in entries if entry.name.isdigit() and _is_finalized(entry))
    if not steps:
        raise FileNotFoundError(f"{run}: not a checkpoint; expected a run directory with {FOLDER}/STEP in it")
    if not wanted:
        return Path(run), steps[-1]
    if not wanted.isdigit() or int(wanted) not in steps:
        raise FileNotFoundError(f"{checkpoint}: no such step; there are {', '.join(map(str, steps))}")
    return Path(run), int(wanted)


def resolve_step(checkpoint: str) -> str:
    """RUN@STEP of a run, of which the newest step is meant when none is named; else the name itself."""
    return "{}@{}".format(*find_step(checkpoint)) if is_run(checkpoint) else checkpoint


def read_about(checkpoint: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: {"model": ..., "run": ...}, and "lora" if it holds adapters."""
    return _restore(*find_step(checkpoint), about=ocp.args.JsonRestore())["about"]


def _restore(run: Path, step: int, **items: Any) -> Any:
    try:
        with ocp.CheckpointManager(checkpoints_folder(run)) as manager:
            return manager.restore(step, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, FileNotFoundError) as error:
        why = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(f"{run}: step {step} is not a checkpoint that can be read ({why})") from error


def _restore_base(folder: epath.Path, frozen: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / BASE, jax.tree.map(ocp.utils.to_shape_dtype_struct, frozen))


def _checkpoint_dtype(run: Path, step: int, *, base: bool) -> Any:
    directory = checkpoints_folder(run) / BASE if base else checkpoints_folder(run) / str(step) / "params"
    return ocp.StandardCheckpointHandler().metadata(directory)["embed_VD"].dtype


def load_adapters(checkpoint: str | Path) -> tuple[dict[str, Any], Lora, Qwen3Config]:
    """What a run with adapters has trained: their parameters (and a reward model's head), sizes, and the network.

    Raises:
      ValueError: a checkpoint without adapters.
    """
    check_loadable(checkpoint)
    said = read_about(checkpoint) if is_run(checkpoint) else {}
    if "lora" not in said:
        raise ValueError(f"{checkpoint}: has no adapters; expected a run that was trained with lora.rank above 0")
    lora, config = Lora(**said["lora"]), Qwen3Config.from_hf(said["model"], source=str(checkpoint))
    trained, _ = split_trainable(abstract_params(abstract_model(config, lora=lora), None))
    run, step = find_step(checkpoint)
    return _restore(run, step, params=ocp.args.StandardRestore(trained))["params"], lora, config


def check_loadable(path: str | Path) -> None:
    """Refuse what is neither a run with checkpoints, nor a Hugging Face directory, nor possibly a name on the Hub.

    Raises:
      FileNotFoundError: see above.
      ValueError: a config.json that is not supported.
    """
    run = Path(str(path).partition("@")[0])
    if is_run(path):
        find_step(path)
        return
    expected = f"a run directory with {FOLDER}/STEP in it, or a Hugging Face model directory with a config.json"
    if run.is_dir() and (run != Path(path) or not (run / "config.json").is_file()):
        raise FileNotFoundError(f"{path}: not a checkpoint; expected {expected}")
    if run.is_dir():
        read_config(run)
    elif run != Path(path) or not could_be_on_hub(path):
        raise FileNotFoundError(f"{path}: no such directory; expected {expected}")


def load_model(
    path: str | Path,
    *,
    mesh: Mesh | Layout | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    **options: Any,
) -> Backbone:
    """A policy or reward model from a run's checkpoint, a Hugging Face directory, or the Hub.

    With dtype "auto" it computes in the dtype in which the weights are stored. Adapters are merged into their base.

    Raises:
      FileNotFoundError: neither a run with checkpoints nor a model directory.
      ValueError: see `models.hf_weights.load_pretrained`.
    """
    check_loadable(path)
    if not is_run(path):
        return load_pretrained(path, mesh=mesh, dtype=dtype, param_dtype=param_dtype, **options)
    run, step = find_step(path)
    layout, said = as_layout(mesh), read_about(path)
    lora = Lora(**said["lora"]) if "lora" in said else None
    config = Qwen3Config.from_hf(said["model"], source=str(path))
    dtype = _checkpoint_dtype(run, step, base=lora is not None) if dtype == "auto" else dtype
    options |= {"dtype": dtype, "param_dtype": param_dtype or dtype, "layout": layout}
    trained, frozen = split_trainable(abstract_params(abstract_model(config, lora=lora, **options), layout))
    params = _restore(run, step, params=ocp.args.StandardRestore(trained))["params"]
    if lora is not None:
        params = merge_adapters(merge_trainable(params, _restore_base(checkpoints_folder(run), frozen)), lora)
    return nnx.merge(split(abstract_model(config, **options))[0], params)
