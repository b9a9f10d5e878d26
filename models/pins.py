"""Names models and tokenizers exactly, and tells whether they are still the same, without reading whole weight files.

A pin is JSON: {"kind": "model" or "tokenizer", "name": as the user writes it, "exact": RUN@STEP, a directory or
ORGANISATION/MODEL@COMMIT, "hash": of the files, null where the exact name says it all}. `pin_model` and `pin_tokenizer`
make pins, `check_pin` refuses a model or tokenizer that is not what its pin says.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoint import check_loadable, checkpoints_folder, find_step, is_run, resolve_step
from models.config import read_json
from models.names import split_commit
from models.tokenizer_copy import files_of_tokenizer
from models.weight_files import INDEX_FILE, SINGLE_FILE, could_be_on_hub, find_directory

Pin = dict[str, Any]


def pin_model(name: str) -> Pin:
    """Pins the weights that a name means now.

    Raises:
      FileNotFoundError, ValueError: the name is no model's, see `models.checkpoint.check_loadable`.
    """
    check_loadable(name)
    exact = resolve_step(name) if is_run(name) else exact_name(name, weights=True)
    return {"kind": "model", "name": name, "exact": exact, "hash": model_hash(exact)}


def pin_tokenizer(name: str) -> Pin:
    """Pins the tokenizer in a directory or on the Hub."""
    exact = exact_name(name, weights=False)
    return {"kind": "tokenizer", "name": name, "exact": exact, "hash": tokenizer_hash(exact)}


def exact_name(name: str, *, weights: bool) -> str:
    """Returns ORGANISATION/MODEL@COMMIT of a model on the Hub, as far as its commit is known; other names unchanged."""
    if Path(name).is_dir() or not could_be_on_hub(name) or split_commit(name)[1] is not None:
        return name
    snapshot = find_directory(name, weights=weights)
    is_commit = snapshot.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", snapshot.name)
    return f"{name}@{snapshot.name}" if is_commit else name


def check_pin(pin: Mapping[str, Any], setting: str, run: str) -> None:
    """Checks that what a run was started from is still there, and unchanged.

    Args:
      pin: see the module's docstring.
      setting: the user's name for it, for an error.
      run: the run that was started from it, for an error.

    Raises:
      FileNotFoundError: it is gone.
      ValueError: its files have changed.
    """
    name, exact = pin["name"], pin["exact"]
    remedy = "put it back, or start over in another output_dir"
    is_tokenizer = pin["kind"] == "tokenizer"
    try:
        if is_tokenizer or not is_run(exact):
            find_directory(exact, weights=not is_tokenizer)
        else:
            find_step(exact)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{setting}: {name}: {run} was started from {exact}, which is gone ({error}); {remedy}"
        ) from error
    now = tokenizer_hash(exact) if is_tokenizer else model_hash(exact)
    if now != pin["hash"]:
        raise ValueError(
            f"{setting}: {name}: {run} was started from {exact}, whose files have changed since (their hash was "
            f"{str(pin['hash'])[:12]}, now {str(now)[:12]}); {remedy}"
        )


def model_hash(model: str) -> str | None:
    """Hashes a model's config and a few bytes of each of its weight files; None for a name on the Hub."""
    directory = Path(model)
    if is_run(model) or not directory.is_dir():
        return weights_hash(model)
    names = {"config.json", SINGLE_FILE}
    if not (directory / SINGLE_FILE).is_file() and (directory / INDEX_FILE).is_file():
        names |= {INDEX_FILE, *(read_json(directory / INDEX_FILE).get("weight_map") or {}).values()}
    return _hash(_ends_of([directory / name for name in sorted(map(str, names)) if (directory / name).is_file()]))


def tokenizer_hash(directory: str) -> str | None:
    """Hashes the files that a tokenizer is read from; None for a name on the Hub."""
    if not Path(directory).is_dir():
        return None
    files = files_of_tokenizer(Path(directory))
    return _hash([part for file in files for part in (file.name.encode(), file.read_bytes())])


def weights_hash(checkpoint: str) -> str | None:
    """Hashes a few bytes of all of a model's files, to notice replaced weights; None for a name on the Hub."""
    if is_run(checkpoint):  # Orbax writes a time stamp with each step
        run, step = find_step(checkpoint)
        return _hash([(checkpoints_folder(run) / str(step) / "_CHECKPOINT_METADATA").read_bytes()])
    if not Path(checkpoint).is_dir():
        return None
    files = sorted(file for file in Path(checkpoint).iterdir() if re.search(r"\.(json|safetensors)$", file.name))
    return _hash(_ends_of(files))


def _hash(pieces: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(pieces)).hexdigest()


def _ends_of(files: Sequence[Path]) -> list[bytes]:
    return [part for file in files for part in _both_ends(file)]


def _both_ends(file: Path, size: int = 1 << 16) -> Iterator[bytes]:
    length = file.stat().st_size
    with file.open("rb") as opened:
        yield f"{file.name} {length}".encode() + opened.read(size)
        opened.seek(max(0, length - size))
        yield opened.read(size)
