"""Names the file that is damaged, from what Orbax and TensorStore raise when they read it.

An array that reads well but is not what was saved lies in the files that the B+tree of its item's OCDBT database names.
"""

import inspect
import json
import logging
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tensorstore
from etils import epath

from models.checkpoint_files import JSON_FILE, STEP_METADATA, is_local

_JSON_FILES = (JSON_FILE, STEP_METADATA, "_METADATA", "_sharding")


class ChangedArray(ValueError):
    """An array is not what was saved."""

    def __init__(self, item: str, array: str, text: str) -> None:
        super().__init__(f"{item}: array {array} {text}")
        self.array, self.text = array, text


def reason_of(error: BaseException, item: epath.Path) -> str:
    """Returns in a few words why an item of a step, or a step, cannot be read: the file, as far as it is known.

    Args:
      item: the directory that was read.
    """
    while error.__cause__ is not None:  # Orbax wraps TensorStore's errors, which name the file
        error = error.__cause__
    if suspect := _suspect_file(item):
        return f"{item.name}/{suspect}"
    if isinstance(error, ChangedArray):
        return f"{_place(item, error.array)}: array {error.array} {error.text}"
    text = re.split(r" \[(?:source locations|tensorstore_spec)", str(error) or type(error).__name__)[0]
    if match := re.match(r"(?:([A-Z_]+): )?.*?Error reading \"([^\"/]+)", text):  # TensorStore's
        files = re.findall(rf"{re.escape(str(item))}/([^\s\"':]*[^\s\"':/])", text)
        place = f"{item.name}/{files[-1]}" if files else _place(item, match[2])
        return f"{place}: array {match[2]} cannot be read" + (f", {match[1]}" if match[1] else "")
    if isinstance(error, LookupError | AttributeError | TypeError):  # what Orbax raises of JSON that it cannot use
        return f"{item.name}: its metadata is damaged"
    return textwrap.shorten(text.replace(str(item), item.name), 200, placeholder=" ...")


def _place(item: epath.Path, array: str) -> str:
    """Returns the file that an array lies in, or the item's name if there are several or the tree is damaged too."""
    if not is_local(item):
        return item.name
    try:
        files = data_files(item, array)
    except (ValueError, LookupError):
        return item.name
    missing = [file for file in files if not (item / file).is_file()]
    if missing:
        return f"{item.name}/{missing[0]} is missing"
    return f"{item.name}/{files[0]}" if len(files) == 1 else item.name


def data_files(item: epath.Path, array: str) -> list[str]:
    """Returns the files of an item on a disk in which an array of it lies.

    Raises:
      ValueError, LookupError: the OCDBT database cannot be read.
    """
    store = tensorstore.KvStore.open({"driver": "file", "path": f"{item}/"}).result()
    places: list[str] = [tensorstore.ocdbt.dump(store).result()["versions"][-1]["root"]["location"]]
    files = set()
    while places:
        place = places.pop()
        for entry in tensorstore.ocdbt.dump(store, node=place).result()["entries"]:
            if "location" in entry:  # of a node below
                places.append(entry["location"])
            elif (key := entry["key"].decode()).startswith(f"{array}/") and not key.endswith(".zarray"):
                files.add(_file_of(entry.get("indirect_value", place)))
    return sorted(files)


def _file_of(place: str) -> str:
    """Returns the file of "value:FOLDER:FILE:OFFSET:LENGTH"."""
    _, folder, file, *_ = place.split(":")
    return folder + file


def _suspect_file(directory: epath.Path) -> str | None:
    """Says which file of a checkpoint on a disk is empty, begins with zeros or is not the JSON that it should be."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file()) if is_local(directory) else []
    for file in files:
        name = file.relative_to(directory)
        with file.open("rb") as opened:
            head = opened.read(64)
        if not any(head):
            return f"{name} {'begins with zeros' if head else 'is empty'}"
        if file.name in _JSON_FILES or file.parent.name == "array_metadatas":
            try:
                json.loads(file.read_bytes())
            except (ValueError, RecursionError):
                return f"{name} is not JSON"
    return None


@contextmanager
def quiet_failures() -> Iterator[None]:
    """Keeps Python from printing the errors of reads that Orbax has begun beside the one that failed.

    They may come when the failure is handled already, so that after one they stay unprinted.
    """
    print_error, log = sys.unraisablehook, logging.getLogger("asyncio")
    is_other = partial(_is_no_read)  # an object of its own, for another failure may have left one

    def print_others(unraisable: Any) -> None:
        frames = traceback.extract_tb(unraisable.exc_traceback)
        is_read = inspect.iscoroutine(unraisable.object) or "asyncio" in (frames[-1].filename if frames else "")
        if not is_read:
            print_error(unraisable)

    sys.unraisablehook = print_others
    log.addFilter(is_other)
    try:
        yield
    except Exception as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # reads that were never begun
            traceback.clear_frames(error.__traceback__)
        raise
    sys.unraisablehook = print_error
    log.removeFilter(is_other)


def _is_no_read(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
