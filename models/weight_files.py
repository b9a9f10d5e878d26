"""Weight files of a Hugging Face directory: finds them locally or on the Hub, checks them, reads parts of tensors."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from models.config import read_json
from models.names import split_commit

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
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
        if not _all_finite(array):
            raise ValueError(
                f"{self.file}: {self.name} has NaN or infinite values; expected finite weights: the training that "
                f"wrote them diverged or the file was damaged"
            )
        return array


def _all_finite(array: np.ndarray) -> bool:
    if array.dtype.name == "bfloat16":  # numpy has no fast test: look for exponents with all bits set
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def could_be_on_hub(name: str | Path) -> bool:
    """Whether a name looks like ORGANISATION/MODEL, and not like a path below an existing directory."""
    text = str(name)
    return text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not Path(text).parent.is_dir()


def find_directory(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Returns a local directory, or that of a model on the Hub, downloaded or from the cache.

    Args:
      path_or_hub_id: a directory, ORGANISATION/MODEL, or ORGANISATION/MODEL@COMMIT.
      weights: whether the weight files are downloaded too.

    Raises:
      FileNotFoundError: neither exists.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if not could_be_on_hub(path_or_hub_id):
        raise FileNotFoundError(f"{path}: no such directory; expected a Hugging Face model directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        patterns = ["*.json", "*.txt", "*.jinja"] + ["*.safetensors"] * weights  # no pickles
        name, commit = split_commit(path_or_hub_id)
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{path_or_hub_id}: no such directory here, and the Hub could not give a model of that name "
            f"({type(error).__name__}); check the spelling, or download the model where there is a network"
        ) from error


@contextmanager
def open_weights(directory: Path) -> Iterator[dict[str, StoredTensor]]:
    """Opens the weight files of a directory; yields their tensors by name.

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


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an uninitialised array at a multiple of 64 bytes: JAX on a CPU uses such memory without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
