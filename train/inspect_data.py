"""`python -m train inspect`: a run's data in numbers, and its first rows as the models see them; no weight is read."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from models.tokenizer import Tokenizer
from train import reward_model, sft
from train import state as training
from train.config import PolicyConfig, RewardModelConfig, SupervisedConfig
from train.metrics import console, setup_errors
from train.prompts import (
    Prompts,
    Row,
    hold_out,
    load_rows,
    load_splits,
    prompt_key,
)
from train.show import line, show

Lengths = Mapping[str, Sequence[int]]  # by what is measured, in tokens


def inspect(config: SupervisedConfig | RewardModelConfig | PolicyConfig, count: int) -> None:
    """Print counts, lengths and duplicates of all parts of the data, then its first `count` rows.

    Raises:
      SetupError: a mistake in the config or the data.
    """
    with setup_errors():
        tokenizer = training.make_tokenizer(config.model, config.chat)
        if isinstance(config, PolicyConfig):
            inspect_policy(config, tokenizer)
        else:
            inspect_supervised(config, tokenizer)
    show(config, count)


def inspect_policy(config: PolicyConfig, tokenizer: Tokenizer) -> None:
    data, splits = config.data, load_splits(config)
    table = new_table(f"max_prompt_length {config.max_prompt_length}")
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    for name, rows in parts.items():
        if rows:
            prompts = Prompts(rows, data.train, config, tokenizer)
            lengths: dict[str, Sequence[int]] = {"prompts": prompts.lengths}
            answers = [row["completion"] for row in rows if isinstance(row.get("completion"), str)]
            if answers:
                lengths["completions"] = [len(ids) for ids in tokenizer.encode_literally(answers)]
            add(table, name, lengths, {"prompts": prompts.too_long})
    console.print(table)
    for name, rows in parts.items():
        if rows:
            line(f"{name}: {repeated(rows, data.prompt_column)} of {len(rows):,} prompts stand in an earlier row too")
    dropped = ", left out" if data.drop_duplicates else ""
    line(f"{splits.duplicates} prompts of train are in validation or test too{dropped}")


def repeated(rows: Sequence[Row], column: str) -> int:
    """How many prompts stood in an earlier row already."""
    return len(rows) - len({prompt_key(row[column]) for row in rows})


def inspect_supervised(config: SupervisedConfig, tokenizer: Tokenizer) -> None:
    data = config.data
    parts = {"train": load_rows(data.train, data.split, data.columns)}
    if data.validation_rows:
        rows = parts["train"]
        kept, out = hold_out(len(rows), data.validation_rows, data.split_seed)
        parts = {"train": [rows[i] for i in kept], "validation": [rows[i] for i in out]}
    elif data.validation is not None:
        parts["validation"] = load_rows(data.validation, data.validation_split, data.columns)
    parts |= {name: load_rows(source, data.validation_split, data.columns) for name, source in data.held_out.items()}
    table, notes = new_table(f"max_length {config.max_length}"), []
    for name, rows in parts.items():
        if isinstance(config, RewardModelConfig):
            comparisons = reward_model.encode(rows, tokenizer, data.train, config.chat)
            answers = list(zip(*(c.rows for c in comparisons), strict=True)) if "chosen" in rows[0] else []
            measured: Lengths = {
                kind: [len(ids) for ids in side] for kind, side in zip(("chosen", "rejected"), answers, strict=False)
            } or {"answers": [len(ids) for c in comparisons for ids in c.rows]}
            (longer,) = reward_model.length_baseline(comparisons).values()
            notes.append(f"{name}: the better answer is the longer one in {100 * longer:.1f} % of the comparisons")
        else:
            examples = sft.encode(rows, tokenizer, data.train, config.chat)
            measured = {
                "prompts": [learned_from for _, learned_from in examples],
                "rows": [len(e[0]) for e in examples],
            }
        over = {
            kind: sum(n > config.max_length for n in found) for kind, found in measured.items() if kind != "prompts"
        }
        add(table, name, measured, over)
    console.print(table)
    for note in notes:
        line(note)


def new_table(limit: str) -> Table:
    columns = ("tokens of", "", "rows", "min", "median", "95 %", "max", f"over {limit}")
    table = Table(box=None)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    return table


def add(table: Table, part: str, lengths: Lengths, over: Mapping[str, int]) -> None:
    """A row for each kind of text; `over`: how many are longer than the limit, of those kinds that have one."""
    for kind, found in lengths.items():
        numbers = [len(found), *(round(float(np.percentile(found, q))) for q in (0, 50, 95, 100))]
        table.add_row(part, kind, *(f"{n:,}" for n in numbers), f"{over[kind]:,}" if kind in over else "")
