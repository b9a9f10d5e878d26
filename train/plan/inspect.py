"""`python -m train inspect`: a run's data in numbers, and its first rows as the models see them; no weight is read."""

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
from train.supervised import reward_model, sft

Lengths = Mapping[str, Sequence[int]]  # by what is measured, in tokens


def inspect(config: SupervisedConfig | RewardModelConfig | PolicyConfig, count: int) -> None:
    """Print counts, lengths and duplicates of all parts of the data, then its first `count` rows.

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
            print_plain(
                f"{name}: {count_repeated(rows, data.prompt_column)} of {len(rows):,} prompts stand in an earlier row too"
            )
    dropped = ", left out" if data.drop_duplicates else ""
    print_plain(f"{splits.duplicates} prompts of train are in validation or test too{dropped}")


def count_repeated(rows: Sequence[Row], column: str) -> int:
    """How many prompts stood in an earlier row already."""
    return len(rows) - len({prompt_key(row[column]) for row in rows})


def inspect_supervised(config: SupervisedConfig, tokenizer: Tokenizer) -> None:
    data = config.data
    encode = reward_model.encode_comparisons if isinstance(config, RewardModelConfig) else sft.encode_examples

    def load(source: str, split: str) -> list[Any]:
        return [*encode(load_rows(source, split, data.columns), tokenizer, source, config.chat)]

    parts = [("train", load(data.train, data.split))]
    if data.validation_rows:
        rows = parts[0][1]
        kept, out = hold_out(len(rows), data.validation_rows, data.split_seed)
        parts = [("train", [rows[i] for i in kept]), ("validation", [rows[i] for i in out])]
    elif data.validation is not None:
        parts.append(("validation", load(data.validation, data.validation_split)))
    parts += [(name, load(source, data.validation_split)) for name, source in data.held_out.items()]
    table, notes = length_table(f"max_length {config.max_length}"), []
    for name, examples in parts:
        if isinstance(config, RewardModelConfig):
            measured = comparison_lengths(examples)
            for longer in reward_model.length_baseline(examples).values():  # none if nothing is compared
                notes.append(f"{name}: the better answer is the longer one in {100 * longer:.1f} % of the comparisons")
        else:
            measured = {"prompts": [prompt for _, prompt in examples], "rows": [len(ids) for ids, _ in examples]}
        over = {
            kind: sum(n > config.max_length for n in found) for kind, found in measured.items() if kind != "prompts"
        }
        add_length_rows(table, name, measured, over)
    console.print(table)
    for note in notes:
        print_plain(note)


def comparison_lengths(examples: Sequence[reward_model.Comparison]) -> Lengths:
    """Tokens of the answers, prompt included; of pairs, those of the better and of the worse ones."""
    if any(example.scores != [1, 0] for example in examples):
        return {"answers": [len(ids) for example in examples for ids in example.rows]}
    return {kind: [len(e.rows[side]) for e in examples] for side, kind in enumerate(("chosen", "rejected"))}


def length_table(limit: str) -> Table:
    columns = ("tokens of", "", "rows", "min", "median", "95 %", "max", f"over {limit}")
    table = Table(box=None)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    return table


def add_length_rows(table: Table, part: str, lengths: Lengths, over: Mapping[str, int]) -> None:
    """A row for each kind of text; `over`: how many are longer than the limit, of those kinds that have one."""
    for kind, found in lengths.items():
        numbers = [len(found), *(round(float(np.percentile(found, q))) for q in (0, 50, 95, 100))]
        table.add_row(part, kind, *(f"{n:,}" for n in numbers), f"{over[kind]:,}" if kind in over else "")
