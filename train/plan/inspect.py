"""`python -m train inspect`: prints statistics of a run's data, and its first rows as the models see them.

No weight is read.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from models.tokenizer import Tokenizer
from train.build import make_tokenizer
from train.config import PolicyConfig, RewardModelConfig, SupervisedConfig
from train.console import console, print_plain, visible
from train.data.mix import join_sources
from train.data.prompts import Prompts, load_splits, prompt_key
from train.data.rows import Row, hold_out, load_rows
from train.plan.show import show_rows
from train.running import setup_errors
from train.supervised.comparisons import Comparison, comparison_key, count_answers, count_turned, is_empty
from train.supervised.reward_model import encode_comparisons, length_baseline
from train.supervised.sft import encode_examples

Lengths = Mapping[str, Sequence[int]]  # kind of text -> tokens of each


def inspect(config: SupervisedConfig | RewardModelConfig | PolicyConfig, count: int) -> None:
    """Prints counts, lengths and duplicates of all parts of the data, then its first `count` rows.

    Raises:
      SetupError: a mistake in the config or the data.
    """
    with setup_errors():
        tokenizer = make_tokenizer(config.model, config.chat)
        if isinstance(config, PolicyConfig):
            inspect_policy(config, tokenizer)
        else:
            inspect_supervised(config, tokenizer)
    show_rows(config, count)


def inspect_policy(config: PolicyConfig, tokenizer: Tokenizer) -> None:
    """Prints lengths of prompts and completions, and duplicates within and between the parts of the data."""
    data, splits = config.data, load_splits(config)
    table = length_table(f"max_prompt_length {config.max_prompt_length}")
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    sources = {"train": data.train_text, "validation": data.validation or data.train_text, "test": str(data.test)}
    for name, rows in parts.items():
        if rows:
            owners = splits.owners if name == "train" else None
            prompts = Prompts(rows, sources[name], config, tokenizer, owners)
            lengths: dict[str, Sequence[int]] = {"prompts": prompts.lengths}
            answers = [row["completion"] for row in rows if isinstance(row.get("completion"), str)]
            if answers:
                lengths["completions"] = [len(ids) for ids in tokenizer.encode_literally(answers)]
            add_length_rows(table, name, lengths, {"prompts": prompts.too_long})
    console.print(table)
    for name, rows in parts.items():
        if rows:
            if empty := sum(is_empty(row["completion"]) for row in rows if isinstance(row.get("completion"), str)):
                print_plain(f"{name}: {empty:,} of {len(rows):,} completions are empty")
            repeated = count_repeated(rows, data.prompt_column)
            print_plain(f"{name}: {repeated} of {len(rows):,} prompts stand in an earlier row too")
    dropped = ", left out" if data.drop_duplicates else ""
    print_plain(f"{splits.duplicates} prompts of train are in validation or test too{dropped}")


def count_repeated(rows: Sequence[Row], column: str) -> int:
    """Returns the number of rows whose prompt stands in an earlier row too."""
    return len(rows) - len({prompt_key(row[column]) for row in rows})


class Part(NamedTuple):
    """A part of a supervised run's data: the same rows as they were read and as tokens."""

    name: str
    rows: list[Row]
    examples: list[Any]

    def select(self, name: str, indices: Sequence[int]) -> "Part":
        return Part(name, [self.rows[i] for i in indices], [self.examples[i] for i in indices])


def inspect_supervised(config: SupervisedConfig, tokenizer: Tokenizer) -> None:
    """Prints lengths and duplicates; of comparisons also equal and empty answers, and whether the longer is better."""
    parts = load_parts(config, tokenizer)
    table, notes = length_table(f"max_length {config.max_length}"), []
    for name, rows, examples in parts:
        if isinstance(config, RewardModelConfig):
            lengths = comparison_lengths(examples)
            notes.append(f"{name}: {count_answers(rows, examples)}")
            notes.append(f"{name}: {count_turned(examples):,} pairs stand in an earlier row the other way round")
            for longer in length_baseline(examples).values():  # empty without comparisons
                notes.append(f"{name}: the better answer is the longer one in {100 * longer:.1f} % of the comparisons")
        else:
            lengths = {"prompts": [prompt for _, prompt in examples], "rows": [len(ids) for ids, _ in examples]}
        over = {
            kind: sum(n > config.max_length for n in tokens) for kind, tokens in lengths.items() if kind != "prompts"
        }
        add_length_rows(table, name, lengths, over)
    console.print(table)
    for note in [*duplicate_notes(parts), *notes]:
        print_plain(note)


def load_parts(config: SupervisedConfig, tokenizer: Tokenizer) -> list[Part]:
    """Loads the rows to train on, and every set to validate on."""
    data = config.data
    encode = encode_comparisons if isinstance(config, RewardModelConfig) else encode_examples

    def load(name: str, source: str, split: str, columns: Mapping[str, str] = data.columns) -> Part:
        rows = load_rows(source, split, columns)
        return Part(name, rows, [*encode(rows, tokenizer, source, config.chat)])

    sources = [load("train", part.source, str(part.split), part.columns or {}) for part in data.sources]
    rows, examples = (join_sources(column)[0] for column in zip(*(source[1:] for source in sources), strict=True))
    parts = [Part("train", rows, examples)]
    if data.validation_rows:
        remaining, held_out = hold_out(len(parts[0].rows), data.validation_rows, data.split_seed)
        parts = [parts[0].select("train", remaining), parts[0].select("validation", held_out)]
    elif data.validation is not None:
        parts.append(load("validation", data.validation, data.validation_split))
    return parts + [load(name, source, data.validation_split) for name, source in data.held_out.items()]


def duplicate_notes(parts: Sequence[Part]) -> Iterator[str]:
    """Says how many rows and prompts stand twice within each part, and how many of train stand in another one too."""
    row_keys = [list(map(row_key, part.examples)) for part in parts]
    prompt_keys = [[key for key in map(row_prompt_key, part.rows) if key is not None] for part in parts]
    for part, rows, prompts in zip(parts, row_keys, prompt_keys, strict=True):
        repeated = [f"{len(rows) - len(set(rows)):,} of {len(rows):,} rows"]
        repeated += [f"{len(prompts) - len(set(prompts)):,} of {len(prompts):,} prompts"] if prompts else []
        yield f"{part.name}: {' and '.join(repeated)} stand in an earlier row too"
    for part, rows, prompts in zip(parts[1:], row_keys[1:], prompt_keys[1:], strict=True):
        shared = [f"{len(set(rows) & set(row_keys[0])):,} rows"]
        shared += [f"{len(set(prompts) & set(prompt_keys[0])):,} prompts"] if prompts else []
        yield f"{' and '.join(shared)} of train are in {part.name} too"


def row_key(example: Any) -> Hashable:
    """Returns what two equal rows have in common: a comparison's, or the tokens of an example of `train sft`."""
    return comparison_key(example) if isinstance(example, Comparison) else tuple(example[0])


def row_prompt_key(row: Row) -> bytes | None:
    """Hashes the prompt of a row, see `prompt_key`; None if it has none of its own."""
    prompt = row.get("prompt")
    for name in ("chosen", "completion", "messages"):
        if not prompt and isinstance(row.get(name), list):
            prompt = row[name][:-1]
    if not prompt:
        return None
    if not isinstance(prompt, str):
        prompt = [{"role": str(turn["role"]), "content": str(turn.get("content") or "")} for turn in prompt]
    return prompt_key(prompt)


def comparison_lengths(examples: Sequence[Comparison]) -> Lengths:
    """Returns the tokens of the answers, prompt included; of pairs, those of chosen and rejected answers apart."""
    if any(example.scores != [1, 0] for example in examples):
        return {"answers": [len(ids) for example in examples for ids in example.rows]}
    return {kind: [len(e.rows[side]) for e in examples] for side, kind in enumerate(("chosen", "rejected"))}


def length_table(limit: str) -> Table:
    """Returns a table for `add_length_rows` without rows."""
    columns = ("tokens of", "", "rows", "min", "median", "95 %", "max", f"over {limit}")
    table = Table(box=None)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    return table


def add_length_rows(table: Table, part: str, lengths: Lengths, over: Mapping[str, int]) -> None:
    """Adds a row for each kind of text.

    Args:
      over: number of texts longer than the limit, for the kinds that have a limit.
    """
    for kind, tokens in lengths.items():
        numbers = [len(tokens), *(round(float(np.percentile(tokens, q))) for q in (0, 50, 95, 100))]
        cells = [*(f"{n:,}" for n in numbers), f"{over[kind]:,}" if kind in over else ""]
        table.add_row(Text(visible(part)), kind, *cells)
