"""Caches the token ids of prompts: tokenizing 100,000 posts takes longer than everything else before step 1.

There is one file per data set in XDG_CACHE_HOME (or ~/.cache) / gopo_jax / tokens, named by a hash of the tokenizer,
the chat settings and the prompts, so that it is never out of date. It may be deleted at any time.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.tokenizer import Prompt, Tokenizer
from train.console import console

CACHE_VERSION = 1  # of the files' format, and of how this code renders prompts
MIN_CACHED_PROMPTS = 1_000  # fewer are tokenized faster than the tokenizer is hashed
CHUNK_PROMPTS = 4_096  # prompts tokenized at a time: their ids are Python numbers, 36 bytes each


def prompt_ids(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Returns the int32 token ids of each rendered prompt, from the cache where it has them."""
    if len(prompts) < MIN_CACHED_PROMPTS or tokenizer.fingerprint is None:
        return _tokenize(prompts, tokenizer)
    file = cache_directory() / f"{cache_key(prompts, tokenizer.fingerprint)}.npz"
    if file.is_file():
        try:
            return _read(file, len(prompts))
        except Exception as error:  # the readers of zip and npy raise many kinds
            console.print(f"{file}: damaged ({error}); the prompts are tokenized again", markup=False)
    ids = _tokenize(prompts, tokenizer)
    try:
        _write(file, ids)
    except OSError as error:
        console.print(f"{file}: cannot be written ({error}); the next run tokenizes again", markup=False)
    return ids


def cache_directory() -> Path:
    """Returns the directory of all cached token ids."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "gopo_jax" / "tokens"


def cache_key(prompts: Sequence[Prompt], fingerprint: str) -> str:
    """Returns the name of a data set's file: a hash of tokenizer and prompts, with the chat settings applied."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {fingerprint}\n".encode())
    for prompt in prompts:
        digest.update(json.dumps(prompt).encode() + b"\n")
    return digest.hexdigest()


def _tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[np.ndarray]:
    chunks = (tokenizer.prompt_ids(prompts[i : i + CHUNK_PROMPTS]) for i in range(0, len(prompts), CHUNK_PROMPTS))
    return [np.array(ids, np.int32) for chunk in chunks for ids in chunk]


def _read(file: Path, count: int) -> list[np.ndarray]:
    with file.open("rb") as opened, np.load(opened) as arrays:  # a zip file, whose checksums are verified
        ids, lengths = arrays["ids"], arrays["lengths"]
    if ids.dtype != np.int32 or lengths.shape != (count,) or lengths.sum() != len(ids):
        raise ValueError("lengths and ids do not belong together")
    return np.split(ids, np.cumsum(lengths)[:-1])


def _write(file: Path, ids: Sequence[np.ndarray]) -> None:
    """Writes the file atomically: a process that is killed, or another that writes it too, leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with temporary.open("wb") as out:
        np.savez(out, ids=np.concatenate(ids), lengths=np.array([len(row) for row in ids], np.int64))
    temporary.replace(file)
