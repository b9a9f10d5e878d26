"""The data of a run as its config describes it: parts, rows and columns, checked without a tokenizer and a download.

The Hub is asked for the columns and row counts of a data set; where it cannot be reached, schemas.yaml has them.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import DataConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.console import print_plain
from train.data.chats import as_chat, read_exchanges
from train.data.files import is_local
from train.data.prompts import Splits, load_splits
from train.data.rows import Row, load_rows, require_columns
from train.strict_yaml import load_yaml
from train.supervised.reward_model import check_comparison_rows
from train.supervised.sft import check_sft_rows

SCHEMAS = Path(__file__).with_name("schemas.yaml")
HUB_SECONDS = 5
TrainingConfig = SftConfig | RewardModelConfig | PolicyConfig


class DataPart(NamedTuple):
    """A part of a run's data and where it is read from."""

    name: str  # train, validation or test
    source: str
    split: str
    columns: Mapping[str, str]  # our name -> theirs


def data_parts(config: TrainingConfig) -> list[DataPart]:
    """Returns the parts that a run reads; rows held out of train are none."""
    data = config.data

    def train_parts(name: str, split: str | None = None) -> list[DataPart]:
        return [
            DataPart(
                name if len(data.sources) == 1 else f"{name}, {source.name}",
                source.source,
                split or str(source.split),
                source.columns or {},
            )
            for source in data.sources
        ]

    parts = train_parts("train")
    if data.validation is not None:
        parts.append(DataPart("validation", data.validation, data.validation_split, data.columns or {}))
    elif isinstance(config, PolicyConfig) and config.validation.prompts and not data.validation_rows:
        parts += train_parts("validation", data.validation_split)
    parts += [
        DataPart(f"held out, {name}", source, data.validation_split, data.columns or {})
        for name, source in data.held_out.items()
    ]
    if data.test is not None:
        parts.append(DataPart("test", data.test, data.test_split, data.columns or {}))
    return parts


DescribedPart = tuple[int | None, Collection[str] | None]  # number of rows, columns; None: not known


class DataSummary(NamedTuple):
    """Facts about the data; None: not known."""

    train: int | None  # number of rows to train on; of packed rows, if the run packs
    validation: int | None  # number of rows to validate on
    columns: Collection[str] | None  # in train and in validation, so that reward functions may ask for them
    splits: Splits | None = None  # a policy's rows
    rows: int | None = None  # number of rows of all parts, if all are files


def describe_data(config: TrainingConfig) -> DataSummary:
    """Prints all parts of the data, and what is held out or left out of them."""
    data = config.data
    described = joined_parts({part.name: describe_part(config, part) for part in data_parts(config)})
    counts = {name: count for name, (count, _) in described.items()}
    files = all(is_local(part.source) for part in data_parts(config))
    rows = sum(filter(None, counts.values())) if files else None
    splits = load_splits(config) if files and isinstance(config, PolicyConfig) else None
    if splits is not None:
        counts |= {"train": len(splits.train), "validation": len(splits.validation)}
        print_plain(f"  {splits.duplicates} prompts of train are in validation or test too" + dropped_text(data))
    elif data.validation_rows and (count := counts["train"]) is not None:
        if count <= data.validation_rows:
            raise ValueError(f"data.validation_rows: expected fewer than the {count} rows that there are")
        counts["train"] = count - data.validation_rows
    if data.weights is not None:
        shares = [
            f"{part.name} {weight / sum(data.weights):.1%}"
            for part, weight in zip(data.sources, data.weights, strict=True)
        ]
        print_plain(f"  rows of train are drawn by weight: {', '.join(shares)}")
    if data.validation_rows:
        counts["validation"] = data.validation_rows
        print_plain(f"  {data.validation_rows} rows of train held out to validate on, by seed {data.split_seed}")
    columns: set[str] | None = {*(described["train"][1] or ())} - {data.prompt_column}
    for name in ("train", "validation"):
        part_columns = described.get(name, described["train"])[1]
        columns = None if columns is None or part_columns is None else columns & {*part_columns}
    return DataSummary(counts["train"], counts.get("validation"), columns, splits, rows)


def joined_parts(described: Mapping[str, DescribedPart]) -> dict[str, DescribedPart]:
    """Returns the numbers of rows and the columns of train, validation and so on; those of several sources together."""
    joined: dict[str, DescribedPart] = {}
    for part, (count, columns) in described.items():
        name = part if part.startswith("held out") else part.partition(",")[0]
        others, other_columns = joined.get(name, (0, ()))
        total = None if count is None or others is None else others + count
        joined[name] = (total, None if columns is None or other_columns is None else {*other_columns, *columns})
    return joined


def dropped_text(data: DataConfig) -> str:
    """Returns what happens to duplicates, behind their number."""
    return ": left out" if data.drop_duplicates else ""


def describe_part(config: TrainingConfig, part: DataPart) -> DescribedPart:
    """Prints one part of the data, refuses what the run could not use; returns its number of rows and its columns."""
    if is_local(part.source):
        rows = load_rows(part.source, part.split, part.columns)
        check_data_rows(config, rows, part.source)
        print_plain(f"{part.name}: {part.source}: {len(rows):,} rows, columns {', '.join(rows[0])}")
        return len(rows), {name for row in rows for name in row}
    schema, origin = look_up_schema(part.source)
    if schema is None:
        print_plain(f"{part.name}: {part.source}: {origin}; its rows and columns are checked when it is loaded")
        return None, None
    if part.split not in schema["splits"]:
        raise ValueError(f"{part.source}: has no split {part.split!r}; expected one of {', '.join(schema['splits'])}")
    ours = check_schema_columns(config, schema["columns"], part.source, part.columns)
    columns = ", ".join(f"{name} ({kind})" for name, kind in schema["columns"].items())
    count = schema["splits"][part.split]
    print_plain(f"{part.name}: {part.source}, {part.split}: {count:,} rows, columns {columns} [{origin}]")
    return int(count), ours


def required_columns(config: TrainingConfig, columns: Mapping[str, Any]) -> list[str]:
    """Returns the columns that the program reads, after renaming."""
    if isinstance(config, PolicyConfig):
        return [config.data.prompt_column]
    if isinstance(config, RewardModelConfig):
        return ["completions", "scores"] if "completions" in columns else ["chosen", "rejected"]
    return [next((name for name in ("text", "completion", "messages") if name in columns), "completion")]


def check_data_rows(config: TrainingConfig, rows: Sequence[Row], source: str) -> None:
    """Refuses rows that the run could not use, whatever its tokenizer is."""
    if isinstance(config, PolicyConfig):
        require_columns(rows, source, config.data.prompt_column)
    elif isinstance(config, RewardModelConfig):
        check_comparison_rows(rows, source)
        for side in ("chosen", "rejected") if "completions" not in rows[0] else ():
            read_exchanges(rows, source, side, config.chat)
    elif "text" not in (rows := check_sft_rows(rows, source, config.chat))[0]:
        read_exchanges(rows, source, "completion", config.chat)


def check_schema_columns(
    config: TrainingConfig, columns: Mapping[str, str], source: str, renames: Mapping[str, str]
) -> Collection[str]:
    """Refuses a data set without the columns that the program reads; returns all its columns, after renaming."""
    renamed = renames.values()
    for name in renamed:
        if name not in columns:
            raise ValueError(f"{source}: has no column {name!r} (data.columns); its columns are {', '.join(columns)}")
    ours = {name: kind for name, kind in columns.items() if name not in renamed}
    ours |= {name: columns[other] for name, other in renames.items()}
    for name in required_columns(config, ours):
        if name not in ours:
            raise ValueError(
                f"{source}: has no column {name!r}; its columns are {', '.join(columns)}; see data.columns"
            )
    prompt_type = ours.get(required_columns(config, ours)[0] if isinstance(config, PolicyConfig) else "prompt")
    if prompt_type is not None:
        as_chat("text" if prompt_type == "string" else [{"role": "user", "content": "text"}], config.chat, source)
    return ours


@functools.cache
def look_up_schema(name: str) -> tuple[dict[str, Any] | None, str]:
    """Returns a Hub data set's schema, {"splits": name -> rows, "columns": name -> type}, and where it comes from."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    offline = load_yaml(SCHEMAS.read_text(encoding="utf-8"), str(SCHEMAS)).get(name)
    origin = "the Hub was not reached: as train/plan/schemas.yaml had it"
    try:
        card = HfApi().dataset_info(name, timeout=HUB_SECONDS).card_data
        if (schema := schema_from_card(card.to_dict() if card else {})) is not None:
            return schema, "from the Hub"
        origin = "not on its card: as train/plan/schemas.yaml had it"
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name}: neither a .jsonl or .parquet file nor a data set on the Hub") from error
    except Exception as error:  # a network fails in many ways; the offline schema serves then
        if offline is None:
            return (
                None,
                f"the Hub was not reached ({type(error).__name__}) and train/plan/schemas.yaml does not have it",
            )
    return offline, origin if offline else "not described on its card"


def schema_from_card(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the schema in a data set's card; None if the card has none."""
    info = card.get("dataset_info")
    info = info[0] if isinstance(info, list) and info else info  # the first of several configurations
    if not isinstance(info, dict) or not info.get("features") or not info.get("splits"):
        return None
    columns = {feature["name"]: feature_type(feature) for feature in info["features"]}
    return {"splits": {split["name"]: split["num_examples"] for split in info["splits"]}, "columns": columns}


def feature_type(feature: Mapping[str, Any]) -> str:
    """Returns the type of a column in words."""
    if isinstance(feature.get("dtype"), str):
        return str(feature["dtype"])
    inner = feature.get("list") or feature.get("sequence") or "objects"
    if isinstance(inner, list):
        return "list of {" + ", ".join(f"{item['name']}: {feature_type(item)}" for item in inner) + "}"
    return f"list of {inner if isinstance(inner, str) else feature_type(inner)}"
