"""Loads a policy's prompts, split into train, validation and test; tokenizes them once and draws batches of them."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from models.tokenizer import Prompt, Tokenizer, pad
from train.config import PolicyConfig
from train.console import console
from train.data.chats import normalize_prompts
from train.data.mix import Mix, join_sources, numbered
from train.data.rows import Row, hold_out, load_rows, sample_indices
from train.data.token_cache import prompt_ids
from train.pins import Pins


def fitting_indices(rows: Sequence[Row], source: str, column: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Returns the indices of the rows whose rendered prompt has 1 to max_length tokens.

    Raises:
      ValueError: no prompt fits.
    """
    return _within_limit(prompt_ids([row[column] for row in rows], tokenizer), source, max_length)


def _within_limit(ids: Sequence[np.ndarray], source: str, max_length: int) -> list[int]:
    indices = [i for i, row in enumerate(ids) if 0 < len(row) <= max_length]
    if ids and not indices:
        raise ValueError(
            f"{source}: none of the {len(ids)} prompts has at most max_prompt_length = {max_length} tokens "
            f"(the shortest has {min(map(len, ids))}); raise the limit or use other data"
        )
    return indices


class Prompts:
    """Tokenized rows whose prompt is not too long; `batch` draws them in an order that depends on (seed, step) alone.

    Args:
      source: where the rows are from, for a message.
      owners: the number of each row's source in `config.data.sources`, ascending; None: all are of one.

    Attributes:
      rows: the rows, their prompts with the chat settings applied.
      lengths: tokens of every prompt, those that are too long included.
      too_long: how many rows are left out, with a prompt of no token or of more than `max_length`.
      other_columns: names of all columns but the prompt's.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        source: str,
        config: PolicyConfig,
        tokenizer: Tokenizer,
        owners: Sequence[int] | None = None,
    ) -> None:
        self.column, self.source, self.max_length = config.data.prompt_column, source, config.max_prompt_length
        ids = prompt_ids([row[self.column] for row in rows], tokenizer)
        self._pad_id, self.lengths = tokenizer.pad_id, [len(row) for row in ids]
        if owners is None:
            indices = _within_limit(ids, source, self.max_length)
            self._mix = Mix([source], [len(indices)])
        else:
            indices = []
            for number, part in enumerate(config.data.sources):
                own = [i for i, owner in enumerate(owners) if owner == number]
                indices += [own[i] for i in _within_limit([ids[i] for i in own], part.source, self.max_length)]
            self._mix = Mix.of_rows(config.data, [owners[i] for i in indices])
        self.rows, self._ids = [rows[i] for i in indices], [ids[i] for i in indices]
        self.too_long = len(rows) - len(indices)
        self._number = {id(row): number for number, row in enumerate(self.rows)}
        self.other_columns = sorted({name for row in self.rows for name in row} - {self.column})

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, seed: int, step: int, count: int, attempt: int = 0) -> list[Row]:
        """Returns the `count` rows of a step: a pure function of (seed, step, attempt)."""
        return [self.rows[i] for i in self._mix.indices(count, seed, step, attempt)]

    def source_metrics(self, rows: Sequence[Row], rewards_PG: np.ndarray, drawn: int) -> dict[str, float]:
        """Returns the metrics of each of several sources in a batch: see `Mix.metrics`, and data/NAME/reward, its mean.

        Args:
          drawn: rows that the run has drawn so far.
        """
        indices = [self._number[id(row)] for row in rows]
        metrics, sources = self._mix.metrics(indices, drawn), self._mix.sources(indices)
        for number, name in enumerate(self._mix.names if metrics else ()):
            rewards = rewards_PG[sources == number]
            scored = rewards[~np.isnan(rewards)]
            metrics[f"data/{name}/reward"] = float(scored.mean()) if scored.size else math.nan
        return metrics

    def first(self, count: int) -> list[Row]:
        """Returns the first `count` rows of each source."""
        return [self.rows[i] for i in self._mix.first(count)]

    def encode(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """Returns right-padded `prompt_PS` and `lengths_P`.

        Args:
          rows: elements of `self.rows`, the objects and not copies: their tokens are looked up by identity.
        """
        return pad([self._ids[self._number[id(row)]] for row in rows], self._pad_id, self.max_length)

    def sample(self, count: int, seed: int) -> None:
        """Keeps a random sample of `count` rows, in their order."""
        indices = sample_indices(len(self.rows), count, seed)
        self._mix = Mix([self.source], [len(indices)])
        self.rows, self._ids = [self.rows[i] for i in indices], [self._ids[i] for i in indices]
        self._number = {id(row): number for number, row in enumerate(self.rows)}

    def prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """Returns the prompts of some of the rows."""
        return [row[self.column] for row in rows]

    def one_of_each_kind(self) -> list[Prompt]:
        """Returns the first prompt that is text, and the first with each combination of roles and tool calls."""
        kinds: dict[Any, Prompt] = {}
        for prompt in self.prompts(self.rows):
            turns = prompt if isinstance(prompt, list) else []
            kinds.setdefault(frozenset((turn["role"], bool(turn.get("tool_calls"))) for turn in turns), prompt)
        return list(kinds.values())

    def columns(self, rows: Sequence[Row], part: slice = slice(None)) -> dict[str, list[Any]]:
        """Returns the other columns of some of the rows, for reward functions; None where a row lacks a column."""
        return {name: [row.get(name) for row in rows[part]] for name in self.other_columns}


class Splits(NamedTuple):
    """A policy's data, the chat settings applied to its prompts."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    duplicates: int  # rows of train whose prompt is in validation or test too; data.drop_duplicates removes them
    owners: list[int] | None = None  # of each row of train, the number of its source; None: there is one


def load_splits(config: PolicyConfig, pins: Pins | None = None) -> Splits:
    """Loads the rows of train, validation and test, as `config.data` says.

    Args:
      pins: of a run, which goes on with the rows that it was started with.

    Raises:
      ValueError: with drop_duplicates, no row of train is left.
    """
    data = config.data

    def load(
        setting: str, source: str, split: str, columns: dict[str, str], *, changes_training: bool = True
    ) -> list[Row]:
        rows = load_rows(source, split, columns)
        rows = pins.rows(setting, source, rows) if pins is not None and changes_training else rows
        return normalize_prompts(rows, source, data.prompt_column, config.chat)

    def load_sources(setting: str, split: str | None = None) -> list[list[Row]]:
        return [
            load(numbered(setting, i, data), part.source, split or str(part.split), part.columns or {})
            for i, part in enumerate(data.sources)
        ]

    parts = load_sources("data.train")
    train, owners = join_sources(parts)
    validation: list[Row] = []
    if data.validation_rows:
        remaining, held_out = hold_out(len(train), data.validation_rows, data.split_seed)
        validation = [train[i] for i in held_out]
        train, owners = [train[i] for i in remaining], [owners[i] for i in remaining]
    elif config.validation.prompts and not data.validation:
        validation, _ = join_sources(load_sources("data.validation", data.validation_split))
    elif config.validation.prompts:
        validation = load("data.validation", str(data.validation), data.validation_split, data.columns)
    test = []
    if data.test:
        test = load("data.test", data.test, data.test_split, data.columns, changes_training=data.drop_duplicates)
    duplicates = set(overlapping_rows(train, [*validation, *test], data.prompt_column))
    if data.drop_duplicates:
        remaining = [number for number in range(len(train)) if number not in duplicates]
        train, owners = [train[i] for i in remaining], [owners[i] for i in remaining]
        if not train:
            raise ValueError(
                f"{data.train_text}: every prompt is in validation or test too; expected others to train on"
            )
    return Splits(train, validation, test, len(duplicates), owners if len(parts) > 1 else None)


def overlapping_rows(rows: Sequence[Row], others: Sequence[Row], column: str) -> list[int]:
    """Returns the indices of the rows whose prompt is in `others` too, ignoring case and white space."""
    keys = {prompt_key(row[column]) for row in others}
    return [i for i, row in enumerate(rows) if prompt_key(row[column]) in keys]


def prompt_key(prompt: Prompt) -> bytes:
    """Hashes a prompt without its system messages, ignoring case and white space; 16 bytes stand for a long text."""
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if m["role"] != "system"]
    return hashlib.blake2b(" ".join(" ".join(texts).split()).casefold().encode(), digest_size=16).digest()


def load_prompts(config: PolicyConfig, tokenizer: Tokenizer, pins: Pins | None = None) -> tuple[Prompts, Prompts]:
    """Returns the prompts to train on and those to validate on; prints how many prompts they share."""
    data, splits = config.data, load_splits(config, pins)
    if splits.duplicates:
        action = "left out" if data.drop_duplicates else "kept; data.drop_duplicates: true leaves them out"
        console.print(
            f"{data.train_text}: {splits.duplicates} prompts are in validation or test too: {action}", markup=False
        )
    prompts = Prompts(splits.train, data.train_text, config, tokenizer, splits.owners)
    validation = Prompts(splits.validation, data.validation or data.train_text, config, tokenizer)
    validation.sample(config.validation.prompts, data.split_seed)
    return prompts, validation
