"""The files that a complete checkpoint has. Their contents are not read: damage inside them shows when it is restored.

An interrupted copy, a full disk or a hand that tidies up leaves steps behind that lack some; see `missing_part`.
"""

import functools
import json
import sys
from collections.abc import Sequence

from etils import epath

ARRAY_ITEMS, ABOUT, DIGESTS = ("params", "train"), "about", "digests"
JSON_FILE = "metadata"  # Orbax's name of the file of a JSON item
STEP_METADATA, _MARKER = "_CHECKPOINT_METADATA", "commit_success.txt"
_ARRAY_FILES = ("_METADATA", "manifest.ocdbt")
WEIGHTS_ONLY = "WEIGHTS_ONLY"  # the file that marks a step of which the trainer's state was given up


def list_steps(folder: epath.Path) -> list[int]:
    """Returns the steps that have a directory in a run's checkpoints, whole or not, in order."""
    entries = folder.iterdir() if folder.is_dir() else []
    return sorted(int(entry.name) for entry in entries if entry.name.isdigit() and entry.is_dir())


def missing_part(step: epath.Path) -> str | None:
    """Says what the directory of a step lacks; None if it is whole."""
    if not any(step.iterdir()):
        return "its directory is empty"
    arrays = ARRAY_ITEMS[:1] if is_weights_only(step) else ARRAY_ITEMS
    json_items = [ABOUT, DIGESTS] if has_digests(step) else [ABOUT]
    items = [*arrays, *json_items]
    if absent := [item for item in items if not (step / item).is_dir()]:
        return f"{' and '.join(absent)} missing"
    files = [f"{item}/{file}" for item in arrays for file in _ARRAY_FILES]
    return (
        _missing_file(step, (STEP_METADATA, *files, *(f"{item}/{JSON_FILE}" for item in json_items)))
        or _missing_marker(step, items)
        or _uncommitted(step / STEP_METADATA)
    )


def is_weights_only(step: epath.Path) -> bool:
    """Whether a step was made one of its weights alone, from which no run can go on."""
    return (step / WEIGHTS_ONLY).exists()


def give_up_state(step: epath.Path) -> None:
    """Makes a step one of its weights alone; one that was interrupted in this is gone on with."""
    state = step / ARRAY_ITEMS[1]
    if state.exists():
        (step / WEIGHTS_ONLY).write_text("the optimizer's state was removed: checkpoint.weights_only\n")
        state.rmtree()


def has_digests(step: epath.Path) -> bool:
    """Whether a step was saved with digests, even if they are gone."""
    if (step / DIGESTS).is_dir():
        return True
    try:
        return DIGESTS in json.loads((step / STEP_METADATA).read_bytes())["item_handlers"]
    except (OSError, ValueError, LookupError, TypeError):  # `missing_part` says so
        return False


def is_local(directory: epath.Path) -> bool:
    """Whether a directory is on a disk, not in a bucket."""
    return "://" not in str(directory)


def missing_array_file(item: epath.Path) -> str | None:
    """Says what the directory of saved arrays lacks; None if it is whole."""
    return "missing" if not item.is_dir() else _missing_file(item, _ARRAY_FILES)


def _missing_file(folder: epath.Path, names: Sequence[str]) -> str | None:
    for name in names:
        file = folder / name
        if not file.is_file():
            return f"{name} missing"
        if not file.stat().length:
            return f"{name} is empty"
    return None


def _missing_marker(step: epath.Path, items: Sequence[str]) -> str | None:
    """Orbax marks a complete step and its items; an older version marked none on a local disk."""
    of_items = [f"{item}/{_MARKER}" for item in items]
    absent = [marker for marker in (*of_items, _MARKER) if not (step / marker).is_file()]
    return f"{absent[0]} missing" if absent and not set(of_items) <= set(absent) else None


def _uncommitted(metadata: epath.Path) -> str | None:
    try:
        committed = json.loads(metadata.read_text(encoding="utf-8")).get("commit_timestamp_nsecs", True)
    except (ValueError, AttributeError):
        return f"{metadata.name} is damaged"
    return None if committed else f"{metadata.name} says that it was not completed"


@functools.cache
def warn_once(text: str) -> None:
    """Prints a line to the standard error, once in a program: one resolves a checkpoint's name in several places."""
    print(text, file=sys.stderr)
