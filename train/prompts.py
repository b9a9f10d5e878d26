"""Data in: rows from a file or the Hub, and batches of prompts as a pure function of (seed, step)."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.tokenizer import Prompt, Tokenizer, check_messages, check_text, pad
from train.config import ChatConfig, PolicyConfig
from train.console import console
from train.token_cache import prompt_ids

Row = dict[str, Any]


def is_file_name(source: str) -> bool:
    """Whether a source of rows is a file; else it is a name on the Hub."""
    return source.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))


def load_rows(
    source: str, split: str = "train", columns: Mapping[str, str] | None = None, setting: str = "data.columns"
) -> list[Row]:
    """The rows of a JSONL file (.gz too), a parquet file, or a data set on the Hub; `columns` renames: ours -> theirs.

    Args:
      setting: what the user knows `columns` by, for an error.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is not a JSON object, no rows at all, or a row without a column that is to be renamed.
    """
    path = Path(source)
    if is_file_name(source) and not path.is_file():
        raise FileNotFoundError(f"{source}: no such file; expected JSONL (.gz too) or parquet")
    jsonl = is_file_name(source) and not source.endswith(".parquet")
    try:
        rows = _read_jsonl(path) if jsonl else _read_datasets(source, split)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{source}: cannot be read ({error}); was it downloaded whole?") from error
    if not rows:
        raise ValueError(f"{source}: expected at least one row, got an empty data set")
    return renamed(rows, source, columns, setting) if columns else rows


def renamed(rows: Sequence[Row], source: str, columns: Mapping[str, str], setting: str) -> list[Row]:
    """The rows with their columns under our names; a column that had the name already gives way."""
    for number, row in enumerate(rows, 1):
        for ours, theirs in columns.items():
            if theirs not in row:
                raise ValueError(
                    f"{source}: row {number} has no {theirs!r}, which {setting} takes as {ours!r}; its columns are "
                    f"{', '.join(row) or '(none)'}"
                )
    taken = set(columns.values())
    return [
        {name: value for name, value in row.items() if name not in taken}
        | {ours: row[theirs] for ours, theirs in columns.items()}
        for row in rows
    ]


def require_columns(rows: Sequence[Row], source: str, *columns: str, setting: str = "the config") -> None:
    """Refuse data in which a row lacks a column, or has neither text nor chat messages in it.

    Args:
      setting: where the user names the columns, for an error.
    """
    for number, row in enumerate(rows, 1):
        for column in columns:
            if row.get(column) in (None, "", []):
                raise ValueError(
                    f"{source}: row {number} has no {column!r}; its columns are {', '.join(row) or '(none)'}; "
                    f"name the right one in {setting} or mend the row"
                )
            try:
                check_text(row[column]) if isinstance(row[column], str) else check_messages(row[column])
            except ValueError as error:
                raise ValueError(f"{source}: row {number}: {column!r}: {error}") from error


def prompt_and_answer(row: Row, column: str, where: str) -> tuple[Prompt, str]:
    """What precedes the answer in `column`, and its text; an answer in chat messages ends with the assistant's.

    Some data sets have the prompt twice, as a column and as the beginning of the answer's messages; it is asked once.
    System messages come first, wherever they stood.

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
    system, asked = _system_apart(
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
    )
    more, before = _system_apart(answer[:-1])
    twice = [_said(message) for message in before[: len(asked)]] == [_said(message) for message in asked]
    new = [message for message in more if _said(message) not in map(_said, system)]
    return [*system, *new, *([] if twice else asked), *before], answer[-1]["content"]


def _system_apart(messages: Prompt) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The system messages at the beginning, and the others."""
    listed: list[dict[str, str]] = list(messages) if isinstance(messages, list) else []
    count = next((i for i, message in enumerate(listed) if message["role"] != "system"), len(listed))
    return listed[:count], listed[count:]


def _said(message: Mapping[str, str]) -> tuple[str, str]:
    return message["role"], message["content"].strip()


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


def conversations(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig, setting: str = "the config"
) -> list[Row]:
    """The rows with the column's prompts as they are asked: see `as_chat`, `without_answer`, `require_columns`."""
    require_columns(rows, source, column, setting=setting)
    wheres = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    return [
        row | {column: as_chat(without_answer(row[column], where), chat, where)}
        for row, where in zip(rows, wheres, strict=True)
    ]


def without_answer(prompt: Prompt, where: str) -> Prompt:
    """Messages that end with the assistant's are a conversation with its answer: the prompt is what precedes that."""
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt
    if len(prompt) == 1:
        raise ValueError(f"{where}: expected messages that ask something, got the assistant's alone")
    return prompt[:-1]


def shuffled(size: int, count: int, seed: int, step: int, attempt: int = 0) -> list[int]:
    """The indices of batch number `step` of `count`: epochs of one permutation each, a new one every epoch.

    Each attempt has an order of its own.
    """
    positions = range(step * count, (step + 1) * count)
    keys = {epoch: [seed, epoch, attempt] if attempt else [seed, epoch] for epoch in {i // size for i in positions}}
    epochs = {epoch: np.random.default_rng(key).permutation(size) for epoch, key in keys.items()}
    return [int(epochs[i // size][i % size]) for i in positions]


def hold_out(count: int, rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` rows are kept and which `rows` are held out, both in order: a pure function of the arguments.

    Raises:
      ValueError: nothing would be kept.
    """
    if rows >= count:
        raise ValueError(f"data.validation_rows: expected fewer than the {count} rows that there are, got {rows}")
    out = np.random.default_rng(seed).choice(count, rows, replace=False)
    return np.setdiff1d(np.arange(count), out).tolist(), np.sort(out).tolist()


def sampled(count: int, wanted: int, seed: int) -> list[int]:
    """Which `wanted` of `count` rows are taken, in order; all of them if there are no more."""
    return hold_out(count, wanted, seed)[1] if wanted < count else list(range(count))


def fitting(rows: Sequence[Row], source: str, column: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """The numbers of the rows whose rendered prompt has 1 to max_length tokens.

    Raises:
      ValueError: no prompt fits.
    """
    return _fitting(prompt_ids([row[column] for row in rows], tokenizer), source, max_length)


def _fitting(ids: Sequence[np.ndarray], source: str, max_length: int) -> list[int]:
    kept = [i for i, row in enumerate(ids) if 0 < len(row) <= max_length]
    if ids and not kept:
        raise ValueError(
            f"{source}: none of the {len(ids)} prompts has at most max_prompt_length = {max_length} tokens "
            f"(the shortest has {min(map(len, ids))}); raise the limit or use other data"
        )
    return kept


class Prompts:
    """Rows with a prompt that fits, in an order that depends on (seed, step) alone; `rows` are as they are asked."""

    def __init__(self, rows: Sequence[Row], source: str, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        self.column, self.source, self.max_length = config.data.prompt_column, source, config.max_prompt_length
        ids = prompt_ids([row[self.column] for row in rows], tokenizer)
        self._pad_id, self.lengths = tokenizer.pad_id, [len(row) for row in ids]  # of all rows
        kept = _fitting(ids, source, self.max_length)
        self.rows, self._ids = [rows[i] for i in kept], [ids[i] for i in kept]
        self.too_long = len(rows) - len(kept)
        self._number = {id(row): number for number, row in enumerate(self.rows)}
        self.other_columns = sorted({name for row in self.rows for name in row} - {self.column})

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, seed: int, step: int, count: int, attempt: int = 0) -> list[Row]:
        """The `count` rows of a step: a pure function of (seed, step, attempt)."""
        return [self.rows[i] for i in shuffled(len(self.rows), count, seed, step, attempt)]

    def encode(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded `prompt_PS` and `lengths_P` of some of `self.rows` themselves, which were tokenized once."""
        return pad([self._ids[self._number[id(row)]] for row in rows], self._pad_id, self.max_length)

    def sample(self, count: int, seed: int) -> None:
        """Keep that many rows, in their order."""
        kept = sampled(len(self.rows), count, seed)
        self.rows, self._ids = [self.rows[i] for i in kept], [self._ids[i] for i in kept]
        self._number = {id(row): number for number, row in enumerate(self.rows)}

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        return [row[self.column] for row in rows]

    def columns(self, rows: Sequence[Row], part: slice = slice(None)) -> dict[str, list[Any]]:
        """The other columns of some of the rows, which reward functions get by name; None where a row has none."""
        return {name: [row.get(name) for row in rows[part]] for name in self.other_columns}


class Splits(NamedTuple):
    """A policy's data, prompts as they are asked."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    duplicates: int  # rows of train whose prompt is in validation or test too; data.drop_duplicates takes them out


def load_splits(config: PolicyConfig) -> Splits:
    """The rows of train, validation and test, as `config.data` says."""
    data = config.data

    def load(source: str, split: str) -> list[Row]:
        return conversations(load_rows(source, split, data.columns), source, data.prompt_column, config.chat)

    train, validation = load(data.train, data.split), []
    if data.validation_rows:
        kept, out = hold_out(len(train), data.validation_rows, data.split_seed)
        train, validation = [train[i] for i in kept], [train[i] for i in out]
    elif config.validation.prompts:
        validation = load(data.validation or data.train, data.validation_split)
    test = load(data.test, data.test_split) if data.test else []
    both = set(in_common(train, [*validation, *test], data.prompt_column))
    if data.drop_duplicates:
        train = [row for number, row in enumerate(train) if number not in both]
        if not train:
            raise ValueError(f"{data.train}: every prompt is in validation or test too; expected others to train on")
    return Splits(train, validation, test, len(both))


def in_common(rows: Sequence[Row], others: Sequence[Row], column: str) -> list[int]:
    """The numbers of the rows whose prompt is among the others' too, whatever its case and its white space."""
    seen = {prompt_key(row[column]) for row in others}
    return [number for number, row in enumerate(rows) if prompt_key(row[column]) in seen]


def prompt_key(prompt: Prompt) -> bytes:
    """A hash of what is asked, without the system prompt; of a long text it is what one keeps."""
    asked = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] != "system"]
    return hashlib.blake2b(" ".join(" ".join(asked).split()).casefold().encode(), digest_size=16).digest()


def load_prompts(config: PolicyConfig, tokenizer: Tokenizer) -> tuple[Prompts, Prompts]:
    """What is trained on and what is validated on; prompts that they have in common are counted and printed."""
    data, splits = config.data, load_splits(config)
    if splits.duplicates:
        done = "left out" if data.drop_duplicates else "kept; data.drop_duplicates: true leaves them out"
        console.print(f"{data.train}: {splits.duplicates} prompts are in validation or test too: {done}", markup=False)
    prompts = Prompts(splits.train, data.train, config, tokenizer)
    validation = Prompts(splits.validation, data.validation or data.train, config, tokenizer)
    validation.sample(config.validation.prompts, data.split_seed)
    return prompts, validation


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as lines:  # Windows' programs begin a file with a mark
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
