"""Weight files of a Hugging Face directory: finds them locally or on the Hub, checks them, reads parts of tensors."""

import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from models.config import read_json
from models.names import split_commit

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_RUN_FILES = ("checkpoints", "config.yaml", "metrics.jsonl")  # one of these is in every run's directory
_MODEL_FILES = ("config.json", "tokenizer*", "vocab.json", "adapter_*", "*.safetensors*", "*.bin")
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names


class StoredTensor(NamedTuple):
    """A tensor in an open safetensors file."""

    file: Path
    name: str
    view: Any  # safetensors' view; slicing it reads

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.view.get_shape())

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(STORED_DTYPES[self.view.get_dtype()])

    def read(self, *index: slice) -> np.ndarray:
        """Reads a part of the tensor; raises ValueError if it has NaN or infinity."""
        array = self.view[index]
        if not all_finite(array):
            raise ValueError(
                f"{self.file}: {self.name} has NaN or infinite values; expected finite weights: the training that "
                f"wrote them diverged or the file was damaged"
            )
        return array


def all_finite(array: np.ndarray) -> bool:
    """Whether an array on the host, of one of `STORED_DTYPES`, has neither NaN nor infinity."""
    if array.dtype.name == "bfloat16":  # numpy has no fast test: look for exponents with all bits set
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def could_be_on_hub(name: str | Path) -> bool:
    """Whether a name looks like ORGANISATION/MODEL, and does not mean something that is or was to be here.

    A directory of that name hides the Hub's model only if it holds a model, a tokenizer or a run itself. Where the
    first part alone is a directory, the name is taken for a path in it, unless models lie there, and no run.
    """
    model, _ = split_commit(name)
    path = Path(model)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+", model):
        return False
    if path.is_dir():
        return not any(_holds(one, _RUN_FILES + _MODEL_FILES) for one in (path, *_folders(path)))
    if not path.parent.is_dir():
        return not path.exists()
    beside = _folders(path.parent)
    return any(_holds(one, _MODEL_FILES) for one in beside) and not any(_holds(one, _RUN_FILES) for one in beside)


def _folders(directory: Path) -> list[Path]:
    return [folder for folder in directory.glob("*") if folder.is_dir()]


def _holds(directory: Path, names: Iterable[str]) -> bool:
    return any(next(directory.glob(name), None) is not None for name in names)


def describe_local(name: str | Path) -> str:
    """Returns what an error adds if a directory here has a name of the Hub's form, or its first part; else nothing."""
    path = Path(name)
    if path.is_dir():
        return f"; the directory {path} here holds no model"
    if str(name).count("/") == 1 and not path.is_absolute() and path.parent.is_dir():
        return f"; the directory {path.parent} here does not have it" + (
            "" if could_be_on_hub(name) else ", and for its sake the Hub is not asked: rename it, or name a directory"
        )
    return ""


def find_directory(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Returns a local directory, or that of a model on the Hub, downloaded or from the cache.

    Args:
      path_or_hub_id: a directory, ORGANISATION/MODEL, or ORGANISATION/MODEL@COMMIT.
      weights: with False, nothing but the small files is downloaded.

    Raises:
      FileNotFoundError: neither exists.
    """
    path = Path(path_or_hub_id)
    if not could_be_on_hub(path_or_hub_id):
        if path.is_dir():
            return path
        raise FileNotFoundError(
            f"{path}: no such directory; expected a Hugging Face model directory{describe_local(path_or_hub_id)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]  # no pickles
        name, commit = split_commit(path_or_hub_id)
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{path_or_hub_id}: no model of that name here, and the Hub could not give one ({type(error).__name__})"
            f"{describe_local(path_or_hub_id)}; check the spelling, or download the model where there is a network"
        ) from error


@contextmanager
def open_weights(directory: Path, unneeded: Collection[str] = ()) -> Iterator[dict[str, StoredTensor]]:
    """Opens the weight files of a directory; yields their tensors by name.

    Args:
      directory: where the files are.
      unneeded: tensors that the index may name although they are not stored.

    Raises:
      FileNotFoundError: no weights, or a missing file that the index names.
      ValueError: a truncated file, a wrong index, or weights that are not floating point.
    """
    weight_map: dict[str, str] | None = None
    if (directory / SINGLE_FILE).is_file():
        pass  # an index beside it is ignored, as in transformers
    elif (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_string, weight_map.values())):
            raise ValueError(f"{directory / INDEX_FILE}: expected a weight_map from the names of tensors to files")
        weight_map = _without_missing_files(directory, weight_map, unneeded)
    else:
        pickled = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
        raise FileNotFoundError(
            f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither"
            + (f"; {pickled[0].name} is a pickle, which is never loaded: convert it to safetensors" if pickled else "")
        )
    opened: dict[str, StoredTensor] = {}
    with ExitStack() as stack:
        for file in sorted({directory / name for name in (weight_map or {"": SINGLE_FILE}).values()}):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file, but {INDEX_FILE} names it; was the model downloaded whole?"
                )
            try:
                tensors = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: not a readable safetensors file ({error}); was it downloaded whole?"
                ) from error
            opened |= {name: StoredTensor(file, name, tensors.get_slice(name)) for name in tensors.keys()}  # noqa: SIM118
        for name, file_name in (weight_map or {}).items():
            if name not in opened and name in unneeded:
                continue
            if name not in opened or opened[name].file.name != file_name:
                raise ValueError(
                    f"{directory / file_name}: {INDEX_FILE} says that {name} is there, but it is not; are both from "
                    f"one download?"
                )
        for name, stored in opened.items():
            if (dtype := stored.view.get_dtype()) not in STORED_DTYPES:
                raise ValueError(
                    f"{stored.file}: {name} is stored as {dtype}; expected one of {', '.join(STORED_DTYPES)} "
                    f"(quantized weights are not supported)"
                )
        yield opened


def _without_missing_files(directory: Path, weight_map: dict[str, str], unneeded: Collection[str]) -> dict[str, str]:
    """Returns the weight_map without tensors that are not needed and whose file is not there."""
    return {name: file for name, file in weight_map.items() if name not in unneeded or (directory / file).is_file()}


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an uninitialised array at a multiple of 64 bytes: JAX on a CPU uses such memory without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
