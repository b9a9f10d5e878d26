"""Data in: rows from a file or the Hub, and batches of prompts as a pure function of (seed, step)."""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.tokenizer import Prompt, Tokenizer, check_messages, check_text
from train.config import ChatConfig, PolicyConfig

Row = dict[str, Any]


def load_rows(source: str, split: str = "train") -> list[Row]:
    """The rows of a JSONL file (.gz too), a parquet file, or a data set on the Hub.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not a JSON object, or no rows at all.
    """
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".json", ".parquet")) and not path.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected JSONL (.gz too) or parquet")
    try:
        rows = _read_jsonl(path) if name.endswith((".jsonl", ".json")) else _read_datasets(source, split)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{source}: cannot be read ({error}); was it downloaded whole?") from error
    if not rows:
        raise ValueError(f"{source}: expected at least one row, got an empty data set")
    return rows


def require_columns(rows: Sequence[Row], source: str, *columns: str) -> None:
    """Refuse data in which a row lacks a column, or has neither text nor chat messages in it."""
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) in (None, "", []):
                raise ValueError(
                    f"{source}: row {number} has no {column!r}; its columns are {', '.join(row) or '(none)'}; "
                    f"name the right one in the config or mend the row"
                )
            try:
                check_text(row[column]) if isinstance(row[column], str) else check_messages(row[column])
            except ValueError as error:
                raise ValueError(f"{source}: row {number}: {column!r}: {error}") from error


def prompt_and_answer(row: Row, column: str, where: str) -> tuple[Prompt, str]:
    """What precedes the answer in `column`, and its text; an answer in chat messages ends with the assistant's.

    Raises:
      ValueError: it ends with another's message.
    """
    prompt, answer = row.get("prompt") or "", row[column]
    if isinstance(answer, str):
        return prompt, answer
    if answer[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: {column!r}: expected messages that end with the assistant's, got {answer[-1]['role']!r}"
        )
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else list(prompt)
    return [*asked, *answer[:-1]], answer[-1]["content"]


def as_chat(prompt: Prompt, chat: ChatConfig, where: str) -> Prompt:
    """The prompt as it is asked: text in a user's message if that is wanted, the system prompt before it.

    Raises:
      ValueError: a system prompt for plain text, or for messages that have one.
    """
    if isinstance(prompt, str) and chat.text_as_chat:
        if not prompt:
            raise ValueError(f"{where}: chat.text_as_chat is set, but there is no prompt; expected a column 'prompt'")
        prompt = [{"role": "user", "content": prompt}]
    if chat.system_prompt is None:
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: chat.system_prompt is set, but this is plain text; expected chat messages, or "
            f"chat.text_as_chat: true"
        )
    if any(message["role"] == "system" for message in prompt):
        raise ValueError(
            f"{where}: chat.system_prompt is set, but the messages have a system message of their own; expected one "
            f"of them; set chat.system_prompt: null or take it out of the data"
        )
    return [{"role": "system", "content": chat.system_prompt}, *prompt]


def asked_and_answered(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig
) -> tuple[list[Prompt], list[str]]:
    """What precedes each row's answer, as it is asked, and the answers in `column`."""
    wheres = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    pairs = [prompt_and_answer(row, column, where) for row, where in zip(rows, wheres, strict=True)]
    prompts = [as_chat(prompt, chat, where) for (prompt, _), where in zip(pairs, wheres, strict=True)]
    return prompts, [answer for _, answer in pairs]


def conversations(rows: Sequence[Row], source: str, column: str, chat: ChatConfig) -> list[Row]:
    """The rows with the column's prompts as they are asked, see `as_chat`."""
    require_columns(rows, source, column)
    return [row | {column: as_chat(row[column], chat, f"{source}: row {i}")} for i, row in enumerate(rows, 1)]


def shuffled(size: int, count: int, seed: int, step: int, attempt: int = 0) -> list[int]:
    """The indices of batch number `step` of `count`: epochs of one permutation each, a new one every epoch.

    Each attempt has an order of its own.
    """
    positions = range(step * count, (step + 1) * count)
    keys = {epoch: [seed, epoch, attempt] if attempt else [seed, epoch] for epoch in {i // size for i in positions}}
    epochs = {epoch: np.random.default_rng(key).permutation(size) for epoch, key in keys.items()}
    return [int(epochs[i // size][i % size]) for i in positions]


def fitting(rows: Sequence[Row], source: str, column: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """The numbers of the rows whose rendered prompt has 1 to max_length tokens.

    Raises:
      ValueError: no prompt fits.
    """
    lengths = [len(ids) for ids in tokenizer.prompt_ids([row[column] for row in rows])]
    kept = [i for i, length in enumerate(lengths) if 0 < length <= max_length]
    if not kept:
        raise ValueError(
            f"{source}: none of the {len(rows)} prompts has at most max_prompt_length = {max_length} tokens "
            f"(the shortest has {min(lengths)}); raise the limit or use other data"
        )
    return kept


class Prompts:
    """Rows with a prompt that fits, in an order that depends on (seed, step) alone."""

    def __init__(self, source: str, split: str, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        column, max_length = config.data.prompt_column, config.max_prompt_length
        rows = conversations(load_rows(source, split), source, column, config.chat)
        self.rows = [rows[i] for i in fitting(rows, source, column, tokenizer, max_length)]
        self.too_long = len(rows) - len(self.rows)
        self.column, self.source = column, source
        self.other_columns = sorted({name for row in self.rows for name in row} - {column})

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, seed: int, step: int, count: int, attempt: int = 0) -> list[Row]:
        """The `count` rows of a step: a pure function of (seed, step, attempt)."""
        return [self.rows[i] for i in shuffled(len(self.rows), count, seed, step, attempt)]

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        return [row[self.column] for row in rows]

    def columns(self, rows: Sequence[Row], part: slice = slice(None)) -> dict[str, list[Any]]:
        """The other columns of some of the rows, which reward functions get by name; None where a row has none."""
        return {name: [row.get(name) for row in rows[part]] for name in self.other_columns}


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _read_datasets(source: str, split: str) -> list[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        if source.endswith(".parquet"):
            return load_dataset("parquet", data_files=source, split="train").to_list()
        return load_dataset(source, split=split).to_list()
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: neither a .jsonl or .parquet file nor a data set that the Hub could give "
            f"({type(error).__name__}); check the spelling or the network"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{source}: cannot be read: {error}") from error
