"""Digests of the tokenizer that a run keeps: they tell files that were damaged or edited from those that were saved.

RUN/tokenizer/              the copy
RUN/tokenizer_digests.json  {"tokenizer": what it was copied from, "sha256": {file: digest}}; older runs have none
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from models.config import read_json

TOKENIZER, TOKENIZER_DIGESTS = "tokenizer", "tokenizer_digests.json"
# Files that a tokenizer is read from; generation_config.json has the ids that end a completion.
_FILES = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|generation_config)\.json"
    r"|(merges|vocab)\.txt|.*\.jinja|tokenizer\.model"
)


def files_of_tokenizer(directory: Path) -> list[Path]:
    """Returns the files in a directory that a tokenizer is read from, in order."""
    return sorted(file for file in directory.iterdir() if _FILES.fullmatch(file.name))


def digest_tokenizer(copy: Path, source: str) -> dict[str, Any]:
    """Returns what tokenizer_digests.json holds of a copy of the tokenizer `source`."""
    return {"tokenizer": source, "sha256": {file.name: _sha256(file) for file in files_of_tokenizer(copy)}}


def check_tokenizer_copy(copy: Path) -> None:
    """Compares a run's copy of its tokenizer with its digests; any other directory has none.

    Raises:
      ValueError: a file is not what was saved, or the digests cannot be read.
    """
    beside = copy.parent / TOKENIZER_DIGESTS
    if copy.name != TOKENIZER or not copy.is_dir() or not beside.is_file():
        return
    try:
        record = read_json(beside)
        source, saved = str(record["tokenizer"]), dict(record["sha256"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{beside}: is damaged, so that {copy} cannot be compared with what was saved; put it back, or delete it "
            f"to take the tokenizer as it is"
        ) from error
    now = {file.name: _sha256(file) for file in files_of_tokenizer(copy)}
    for name in sorted(saved.keys() | now.keys()):
        if saved.get(name) != now.get(name):
            kind = "is missing" if name not in now else "is new" if name not in saved else "has changed"
            raise ValueError(
                f"{copy / name}: {kind} since the run was started, as {beside} says; delete {copy}, and the run's own "
                f"command copies it anew from {source}; or delete {beside} to accept the files as they are"
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
