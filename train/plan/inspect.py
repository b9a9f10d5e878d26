"""`python -m train inspect`: prints statistics of a run's data, and its first rows as the models see them.

No weight is read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from models.tokenizer import Tokenizer
from train.build import make_tokenizer
from train.config import PolicyConfig, RewardModelConfig, SupervisedConfig
from train.console import console, print_plain
from train.data.prompts import Prompts, load_splits, prompt_key
from train.data.rows import Row, hold_out, load_rows
from train.plan.show import show_rows
from train.running import setup_errors
from train.supervised.reward_model import Comparison, encode_comparisons, length_baseline
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
    sources = {"train": data.train, "validation": data.validation or data.train, "test": str(data.test)}
    for name, rows in parts.items():
        if rows:
            prompts = Prompts(rows, sources[name], config, tokenizer)
            lengths: dict[str, Sequence[int]] = {"prompts": prompts.lengths}
            answers = [row["completion"] for row in rows if isinstance(row.get("completion"), str)]
            if answers:
                lengths["completions"] = [len(ids) for ids in tokenizer.encode_literally(answers)]
            add_length_rows(table, name, lengths, {"prompts": prompts.too_long})
    console.print(table)
    for name, rows in parts.items():
        if rows:
            repeated = count_repeated(rows, data.prompt_column)
            print_plain(f"{name}: {repeated} of {len(rows):,} prompts stand in an earlier row too")
    dropped = ", left out" if data.drop_duplicates else ""
    print_plain(f"{splits.duplicates} prompts of train are in validation or test too{dropped}")


def count_repeated(rows: Sequence[Row], column: str) -> int:
    """Returns the number of rows whose prompt stands in an earlier row too."""
    return len(rows) - len({prompt_key(row[column]) for row in rows})


def inspect_supervised(config: SupervisedConfig, tokenizer: Tokenizer) -> None:
    """Prints lengths of prompts, rows and answers; of comparisons also the accuracy of "the longer is better"."""
    data = config.data
    encode = encode_comparisons if isinstance(config, RewardModelConfig) else encode_examples

    def load(source: str, split: str) -> list[Any]:
        return [*encode(load_rows(source, split, data.columns), tokenizer, source, config.chat)]

    parts = [("train", load(data.train, data.split))]
    if data.validation_rows:
        rows = parts[0][1]
        remaining, held_out = hold_out(len(rows), data.validation_rows, data.split_seed)
        parts = [("train", [rows[i] for i in remaining]), ("validation", [rows[i] for i in held_out])]
    elif data.validation is not None:
        parts.append(("validation", load(data.validation, data.validation_split)))
    parts += [(name, load(source, data.validation_split)) for name, source in data.held_out.items()]
    table, notes = length_table(f"max_length {config.max_length}"), []
    for name, examples in parts:
        if isinstance(config, RewardModelConfig):
            lengths = comparison_lengths(examples)
            for longer in length_baseline(examples).values():  # empty without comparisons
                notes.append(f"{name}: the better answer is the longer one in {100 * longer:.1f} % of the comparisons")
        else:
            lengths = {"prompts": [prompt for _, prompt in examples], "rows": [len(ids) for ids, _ in examples]}
        over = {
            kind: sum(n > config.max_length for n in tokens) for kind, tokens in lengths.items() if kind != "prompts"
        }
        add_length_rows(table, name, lengths, over)
    console.print(table)
    for note in notes:
        print_plain(note)


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
        table.add_row(part, kind, *(f"{n:,}" for n in numbers), f"{over[kind]:,}" if kind in over else "")
