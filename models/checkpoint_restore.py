"""Reads what a step of a run holds, and compares it with the digests that were saved in the same step.

STEP/digests is JSON: {"arrays": name -> digest, "about": digest, "sha256": of these two}. The names are "params.NAME"
and "train.NAME", and "base.NAME" where adapters are trained. A step from before there were digests is read without
comparison. What cannot be read, or is not what was saved, is one ValueError that names run, step and file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from models.checkpoint_damage import ChangedArray, quiet_failures, reason_of
from models.checkpoint_files import ABOUT, DIGESTS, JSON_FILE, has_digests, missing_array_file, warn_once
from models.digests import array_name, digest_json, first_change
from models.finite import require_finite_weights

BASE = "base"  # beside the steps: the frozen parameters of a run that trains adapters

Digests = Mapping[str, str]


def make_digests(arrays: Digests, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is saved of the digests of a step's arrays and of the JSON that describes the run."""
    digests = {"arrays": dict(arrays), ABOUT: digest_json(about)}
    return digests | {"sha256": digest_json(digests)}


class StepReader:
    """Reads one step of a run.

    Args:
      run: the run's directory, for messages.
      folder: the directory of its checkpoints.
      step: a step with a directory there.
      remedy: returns how to go on if the step cannot be read, for the end of a message.
    """

    def __init__(self, run: str | Path, folder: epath.Path, step: int, remedy: Callable[[], str]) -> None:
        self._run, self._step, self._remedy = run, step, remedy
        self._path = folder / str(step)

    def about(self) -> dict[str, Any]:
        """Reads the JSON that describes the run.

        Raises:
          ValueError: it cannot be read, or is not what was saved.
        """
        with self._named_errors(ABOUT):
            return read_about_item(self._path)

    def digests(self) -> Digests | None:
        """Reads the digests of the arrays; None of a step from before there were digests.

        Raises:
          ValueError: they cannot be read, or are not what was saved.
        """
        with self._named_errors(DIGESTS):
            digests = _read_digests(self._path)
        return None if digests is None else digests["arrays"]

    def arrays(self, item: str, target: Any) -> Any:
        """Restores the arrays of an item with the shapes, dtypes and shardings of a pytree.

        Raises:
          ValueError: they cannot be read, or are not what was saved.
        """
        digests = self.digests()
        if digests is None:
            warn_once(f"{self._run}: is from before checkpoints had digests: damage to its arrays would not be noticed")
        with self._named_errors(item):
            return restore_arrays(self._path / item, item, target, digests)

    @contextmanager
    def _named_errors(self, item: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of damaged files Orbax and TensorStore raise nearly everything
            raise ValueError(
                f"{self._run}: step {self._step} is not a checkpoint that can be read "
                f"({reason_of(error, self._path / item)}){self._remedy()}"
            ) from error


def read_about_item(step: epath.Path) -> dict[str, Any]:
    """Reads the JSON that describes a run in a step's directory.

    Raises:
      OSError, ValueError: it cannot be read, or is not what was saved.
    """
    about, digests = _read_json(step / ABOUT), _read_digests(step)
    if digests is not None and digest_json(about) != digests[ABOUT]:
        raise ValueError(f"{ABOUT}/{JSON_FILE}: is not what was saved")
    return about


def _read_digests(step: epath.Path) -> dict[str, Any] | None:
    if not has_digests(step):
        return None
    digests = _read_json(step / DIGESTS)
    if digests.pop("sha256", None) != digest_json(digests):
        raise ValueError(f"{DIGESTS}/{JSON_FILE}: is not what was saved")
    return digests


def _read_json(item: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads((item / JSON_FILE).read_bytes())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
        raise ValueError(f"{item.name}/{JSON_FILE}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{item.name}/{JSON_FILE}: is not a JSON object")
    return value


def restore_base(folder: epath.Path, frozen: Any, digests: Digests | None) -> Any:
    """Restores the frozen base of adapters, and compares it with the digests in a step, if that has some of it.

    Raises:
      ValueError: it is not whole, cannot be read, or has parameters that are not finite.
    """
    if missing := missing_array_file(folder / BASE):
        raise ValueError(
            f"{folder / BASE}: is not whole ({missing}); the adapters of every step in {folder} need it: put it back"
        )
    has_base = digests is not None and any(name.startswith(f"{BASE}.") for name in digests)
    try:
        base = restore_arrays(folder / BASE, BASE, frozen, digests if has_base else None)
    except Exception as error:  # of damaged files Orbax and TensorStore raise nearly everything
        raise ValueError(
            f"{folder / BASE}: cannot be read ({reason_of(error, folder / BASE)}); the adapters of every step in "
            f"{folder} need it: put it back"
        ) from error
    require_finite_weights(base, str(folder / BASE))
    return base


def restore_arrays(directory: epath.Path, item: str, target: Any, digests: Digests | None) -> Any:
    """Restores a pytree of arrays, cast to the dtypes of `target`.

    With digests, arrays that are cast are restored one at a time, and compared before: memory holds no more than the
    result and one array as it was saved.

    Raises:
      ValueError: an array is not what was saved. Orbax and TensorStore raise others.
    """
    with quiet_failures():
        return _restore_arrays(directory, item, jax.tree.map(ocp.utils.to_shape_dtype_struct, target), digests)


def _restore_arrays(directory: epath.Path, item: str, target: Any, digests: Digests | None) -> Any:
    if digests is None:
        return _restore(directory, target)
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    named = {f"{item}.{array_name(path)}": (path, leaf) for path, leaf in leaves}
    if differing := sorted({name for name in digests if name.startswith(f"{item}.")} ^ named.keys()):
        raise ValueError(f"{differing[0]} was {'not saved' if differing[0] in named else 'saved, but is not expected'}")
    dtypes = {name: digests[name].partition("[")[0] for name in named}
    if not _is_nested_dict(target) or all(leaf.dtype == dtypes[name] for name, (_, leaf) in named.items()):
        return _compared(item, _restore(directory, target), digests)
    cast = []
    for name, (path, leaf) in named.items():
        sharding = _saved_sharding(directory, path) if leaf.sharding is None else leaf.sharding
        stored = jax.ShapeDtypeStruct(leaf.shape, dtypes[name], sharding=sharding)
        restored = _compared(item, _restore_part(directory, _nested(path, stored)), digests)
        cast += [array.astype(leaf.dtype) for array in jax.tree.leaves(restored)]
    return jax.tree.unflatten(structure, cast)


def _restore(directory: epath.Path, target: Any) -> Any:
    return ocp.StandardCheckpointHandler().restore(directory, args=ocp.args.StandardRestore(target))


def _saved_sharding(directory: epath.Path, path: Any) -> jax.sharding.Sharding:
    """Returns how an array in a nested dictionary was sharded, which Orbax takes where no sharding is given."""
    metadata: Any = ocp.StandardCheckpointHandler().metadata(directory)
    for key in path:
        metadata = metadata[key.key]
    return metadata.sharding.to_jax_sharding()


def _restore_part(directory: epath.Path, target: dict[str, Any]) -> Any:
    """Restores some of the arrays of a nested dictionary."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)
    return ocp.PyTreeCheckpointHandler().restore(directory, args=args)


def _compared(item: str, restored: Any, digests: Digests) -> Any:
    if change := first_change({item: restored}, digests):
        raise ChangedArray(item, change.name.removeprefix(f"{item}."), change.text)
    return restored


def _is_nested_dict(tree: Any) -> bool:
    if isinstance(tree, dict):
        return all(_is_nested_dict(value) for value in tree.values())
    return jax.tree_util.all_leaves([tree])


def _nested(path: Any, leaf: Any) -> Any:
    """Returns the nested dictionary with a leaf alone, at this path."""
    for key in reversed(path):
        leaf = {key.key: leaf}
    return leaf
