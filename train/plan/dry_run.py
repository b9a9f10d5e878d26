"""`--dry_run`: what a run would do, from its config alone: its data, networks, memory and schedule.

Files are read, and tokenized where that takes seconds and the tokenizer is on this machine; data sets on the Hub are
asked for their columns and rows, or looked up in schemas.yaml where the Hub cannot be reached. Of networks the shapes
are known without their weights. Nothing is compiled (that is `train plan`), trained or written, but that ids of many
prompts go to the cache. What the machine that trains may have, the judge's key and IFEval's splitter of sentences, is
not looked for.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import yaml
from rich.table import Table

from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, abstract_params
from models.lora import separate
from models.sharding import Layout
from models.tokenizer import Tokenizer
from train.build import make_layout_for, make_optimizer, policy_layout
from train.config import DataConfig, PlanConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.console import console, print_plain
from train.data.chats import as_chat, prompts_and_answers
from train.data.prompts import Prompts, Splits, load_splits
from train.data.rows import Row, is_file_name, load_rows, require_columns
from train.plan.devices import GIB, HBM, USABLE_SHARE, simulated_devices
from train.plan.programs import bytes_per_device, network_config, parameter_count, resident_bytes, step_parts
from train.rewards.functions import function_scorer
from train.running import setup_errors
from train.state import abstract_opt_state
from train.supervised import reward_model, sft
from train.supervised.program import load_examples

SCHEMAS = Path(__file__).with_name("schemas.yaml")
HUB_SECONDS = 5
MAX_TOKENIZED_ROWS = 20_000  # rows that are no longer tokenized in seconds
TrainingConfig = SftConfig | RewardModelConfig | PolicyConfig


def dry_run(config: TrainingConfig, devices: int | None, chip: str | None) -> None:
    """Print it, for so many devices (None: those of this machine).

    Raises:
      SetupError: a mistake in the config or the data.
    """
    with setup_errors():
        if chip is not None and chip not in HBM:
            raise ValueError(f"--chip: expected one of {', '.join(HBM)}, got {chip!r}")
        known = describe_data(config)
        network, tokenizer = describe_networks(config, known.columns)
        known = tokenize_data(config, tokenizer, known)
        layout, arrays, saved = memory_per_device(config, network, devices)
    describe_memory(layout, arrays, chip)
    describe_schedule(config, known, saved)


def bytes_text(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


# Data


class DataPart(NamedTuple):
    name: str  # train, validation or test
    source: str
    split: str


def data_parts(config: TrainingConfig) -> list[DataPart]:
    data = config.data
    found = [DataPart("train", data.train, data.split)]
    if data.validation is not None:
        found.append(DataPart("validation", data.validation, data.validation_split))
    elif isinstance(config, PolicyConfig) and config.validation.prompts and not data.validation_rows:
        found.append(DataPart("validation", data.train, data.validation_split))
    found += [DataPart(f"held out, {name}", source, data.validation_split) for name, source in data.held_out.items()]
    if data.test is not None:
        found.append(DataPart("test", data.test, data.test_split))
    return found


class DataSummary(NamedTuple):
    """What is known of the data; None: not known."""

    train: int | None  # rows to train on, packed ones where rows are packed
    validation: int | None
    columns: Collection[str] | None  # of both, which reward functions may ask for
    splits: Splits | None = None  # a policy's rows
    rows: int | None = None  # of all parts together, all of them from files


def describe_data(config: TrainingConfig) -> DataSummary:
    """Print the data."""
    data, found = config.data, {part.name: describe_part(config, part) for part in data_parts(config)}
    counts = {name: count for name, (count, _) in found.items()}
    files = all(is_file_name(part.source) for part in data_parts(config))
    rows = sum(filter(None, counts.values())) if files else None
    splits = load_splits(config) if files and isinstance(config, PolicyConfig) else None
    if splits is not None:
        counts |= {"train": len(splits.train), "validation": len(splits.validation)}
        print_plain(f"  {splits.duplicates} prompts of train are in validation or test too" + dropped_text(data))
    elif data.validation_rows and (known := counts["train"]) is not None:
        if known <= data.validation_rows:
            raise ValueError(f"data.validation_rows: expected fewer than the {known} rows that there are")
        counts["train"] = known - data.validation_rows
    if data.validation_rows:
        counts["validation"] = data.validation_rows
        print_plain(f"  {data.validation_rows} rows of train held out to validate on, by seed {data.split_seed}")
    columns: set[str] | None = {*(found["train"][1] or ())} - {data.prompt_column}
    for name in ("train", "validation"):
        known_columns = found.get(name, found["train"])[1]
        columns = None if columns is None or known_columns is None else columns & {*known_columns}
    return DataSummary(counts["train"], counts.get("validation"), columns, splits, rows)


def tokenize_data(config: TrainingConfig, tokenizer: Tokenizer | None, known: DataSummary) -> DataSummary:
    """Do with the rows what the run does before its first step, where that takes seconds and no network."""
    if tokenizer is None or known.rows is None or known.rows > MAX_TOKENIZED_ROWS:
        print_plain(
            f"tokens: not counted, which needs a tokenizer that is here and at most {MAX_TOKENIZED_ROWS:,} rows in files"
        )
        packed = isinstance(config, SftConfig) and config.packing
        return known._replace(train=None) if packed else known
    if isinstance(config, PolicyConfig):
        assert known.splits is not None
        source = config.data.validation or config.data.train
        prompts = Prompts(known.splits.train, config.data.train, config, tokenizer)
        validation = Prompts(known.splits.validation, source, config, tokenizer)
        print_plain(f"tokens: {prompts.too_long} prompts of train and {validation.too_long} of validation are too long")
        return known._replace(train=len(prompts), validation=len(validation))
    task = reward_model.reward_model_task(config) if isinstance(config, RewardModelConfig) else sft.sft_task(config)
    train, _ = load_examples(config, task, tokenizer)
    return known._replace(train=len(train))


def dropped_text(data: DataConfig) -> str:
    return ": left out" if data.drop_duplicates else ""


def describe_part(config: TrainingConfig, part: DataPart) -> tuple[int | None, Collection[str] | None]:
    """Print one part of the data, and refuse what could not be used; how many rows it has, and which columns."""
    if is_file_name(part.source):
        rows = load_rows(part.source, part.split, config.data.columns)
        check_data_rows(config, rows, part.source)
        print_plain(f"{part.name}: {part.source}: {len(rows):,} rows, columns {', '.join(rows[0])}")
        return len(rows), {name for row in rows for name in row}
    schema, origin = look_up_schema(part.source)
    if schema is None:
        print_plain(f"{part.name}: {part.source}: {origin}; its rows and columns are checked when it is loaded")
        return None, None
    if part.split not in schema["splits"]:
        raise ValueError(f"{part.source}: has no split {part.split!r}; expected one of {', '.join(schema['splits'])}")
    ours = check_columns(config, schema["columns"], part.source)
    columns = ", ".join(f"{name} ({kind})" for name, kind in schema["columns"].items())
    count = schema["splits"][part.split]
    print_plain(f"{part.name}: {part.source}, {part.split}: {count:,} rows, columns {columns} [{origin}]")
    return int(count), ours


def required_columns(config: TrainingConfig, columns: Mapping[str, Any]) -> list[str]:
    """Which columns the program reads, under our names."""
    if isinstance(config, PolicyConfig):
        return [config.data.prompt_column]
    if isinstance(config, RewardModelConfig):
        return ["completions", "scores"] if "completions" in columns else ["chosen", "rejected"]
    return [next((name for name in ("text", "completion", "messages") if name in columns), "completion")]


def check_data_rows(config: TrainingConfig, rows: Sequence[Row], source: str) -> None:
    """Refuse rows that could not be used, whatever the tokenizer."""
    if isinstance(config, PolicyConfig):
        require_columns(rows, source, config.data.prompt_column)
    elif isinstance(config, RewardModelConfig):
        reward_model.check_comparison_rows(rows, source)
        for side in ("chosen", "rejected") if "completions" not in rows[0] else ():
            prompts_and_answers(rows, source, side, config.chat)
    elif "text" not in (rows := sft.check_sft_rows(rows, source, config.chat))[0]:
        prompts_and_answers(rows, source, "completion", config.chat)


def check_columns(config: TrainingConfig, columns: Mapping[str, str], source: str) -> Collection[str]:
    """Refuse a data set without the columns that are read; all its columns, under our names."""
    theirs = config.data.columns.values()
    for name in theirs:
        if name not in columns:
            raise ValueError(f"{source}: has no column {name!r} (data.columns); its columns are {', '.join(columns)}")
    ours = {name: kind for name, kind in columns.items() if name not in theirs}
    ours |= {name: columns[other] for name, other in config.data.columns.items()}
    for name in required_columns(config, ours):
        if name not in ours:
            raise ValueError(
                f"{source}: has no column {name!r}; its columns are {', '.join(columns)}; see data.columns"
            )
    asked = ours.get(required_columns(config, ours)[0] if isinstance(config, PolicyConfig) else "prompt")
    if asked is not None:
        as_chat("text" if asked == "string" else [{"role": "user", "content": "text"}], config.chat, source)
    return ours


@functools.cache
def look_up_schema(name: str) -> tuple[dict[str, Any] | None, str]:
    """{"splits": rows of each, "columns": their types} of a data set on the Hub, and where that is known from."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    kept = yaml.safe_load(SCHEMAS.read_text(encoding="utf-8")).get(name)
    origin = "the Hub was not reached: as train/plan/schemas.yaml had it"
    try:
        card = HfApi().dataset_info(name, timeout=HUB_SECONDS).card_data
        if (found := schema_from_card(card.to_dict() if card else {})) is not None:
            return found, "from the Hub"
        origin = "not on its card: as train/plan/schemas.yaml had it"
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name}: neither a .jsonl or .parquet file nor a data set on the Hub") from error
    except Exception as error:  # whatever a network does: there is the kept one
        if kept is None:
            return (
                None,
                f"the Hub was not reached ({type(error).__name__}) and train/plan/schemas.yaml does not have it",
            )
    return kept, origin if kept else "not described on its card"


def schema_from_card(card: Mapping[str, Any]) -> dict[str, Any] | None:
    info = card.get("dataset_info")
    info = info[0] if isinstance(info, list) and info else info  # of several configurations the first
    if not isinstance(info, dict) or not info.get("features") or not info.get("splits"):
        return None
    columns = {feature["name"]: feature_type(feature) for feature in info["features"]}
    return {"splits": {split["name"]: split["num_examples"] for split in info["splits"]}, "columns": columns}


def feature_type(feature: Mapping[str, Any]) -> str:
    if isinstance(feature.get("dtype"), str):
        return str(feature["dtype"])
    inner = feature.get("list") or feature.get("sequence") or "objects"
    if isinstance(inner, list):
        return "list of {" + ", ".join(f"{item['name']}: {feature_type(item)}" for item in inner) + "}"
    return f"list of {inner if isinstance(inner, str) else feature_type(inner)}"


# Networks


def describe_networks(config: TrainingConfig, columns: Collection[str] | None) -> tuple[Qwen3Config, Tokenizer | None]:
    """Print the shapes of the networks; the one that is trained, and its tokenizer if that is here."""
    network = network_config(config.model.path) if config.model.path else config.model.architecture
    assert network is not None  # ModelConfig has checked it
    if isinstance(config, RewardModelConfig):
        network = dataclasses.replace(network, architecture=REWARD_MODEL)
    elif network.is_reward_model:
        raise ValueError(f"model.path: {config.model.path} is a reward model; expected a policy")
    print_network("model", config.model.path or "random weights", network)
    tokenizer = None
    if Path(config.model.tokenizer_path).is_dir() or config.model.tokenizer_path.count("/") != 1:
        tokenizer = Tokenizer(config.model.tokenizer_path, config.chat.enable_thinking)
        tokenizer.check_fits(network.vocab_size, config.model.path or "model.architecture")
        print_plain(f"tokenizer {tokenizer.path}: {tokenizer.size:,} ids")
    else:
        print_plain(f"tokenizer {config.model.tokenizer_path}: on the Hub, not read")
    for spec in config.rewards if isinstance(config, PolicyConfig) else ():
        if spec.function is not None:
            function_scorer(spec.function, spec.options, columns, runs_here=False)
            print_plain(f"reward {spec.label}: {spec.function}, weight {spec.weight:g}")
            continue
        judge = network_config(str(spec.model))
        if not judge.is_reward_model:
            raise ValueError(f"rewards: {spec.model} is a policy; expected a reward model")
        print_network(f"reward {spec.label}, weight {spec.weight:g}", str(spec.model), judge)
    return network, tokenizer


def print_network(name: str, path: str, network: Qwen3Config) -> None:
    print_plain(
        f"{name}: {path}: {parameter_count(network) / 1e6:,.2f} M parameters, {network.num_hidden_layers} layers "
        f"of width {network.hidden_size}, {network.num_attention_heads} query and {network.num_key_value_heads} "
        f"key/value heads, vocabulary {network.vocab_size:,}"
    )


# Memory


def memory_per_device(
    config: TrainingConfig, network: Qwen3Config, devices: int | None
) -> tuple[Layout, dict[str, float], tuple[float, float]]:
    """The mesh, bytes on each device of every array that has a name, and bytes of a checkpoint: each, and once."""
    if isinstance(config, PolicyConfig):
        fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(PolicyConfig)}
        planned = PlanConfig(**fields)
        layout = policy_layout(planned, stand_in_devices(config, devices))
        rewards = [network_config(spec.model) for spec in config.rewards if spec.model]
        arrays, _ = step_parts(planned, layout, network, rewards)
    else:
        layout = make_layout_for(config.mesh, config.batch_size, devices=stand_in_devices(config, devices))
        arrays = {}
    trained, frozen, opt_state = abstract_state(config, layout, network)
    if not arrays:
        arrays = {"parameters": trained, "base of adapters": frozen, "optimizer": opt_state, "gradient": trained}
        arrays = {name: bytes_per_device(tree) for name, tree in arrays.items()}
    return layout, arrays, (tree_bytes(trained) + tree_bytes(opt_state), tree_bytes(frozen))


def stand_in_devices(config: TrainingConfig, count: int | None) -> Sequence[jax.Device] | None:
    """CPU devices to stand for so many, or for as many as the mesh's sizes say; None: take those that are here."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    count = count or (math.prod(sizes) if min(sizes) > 0 else None)
    return simulated_devices(count) if count else None


def abstract_state(config: TrainingConfig, layout: Layout, network: Qwen3Config) -> tuple[Any, Any, Any]:
    """What is trained, what is not, and the optimizer's state; all of them shapes alone."""
    dtypes = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    model = abstract_model(network, lora=config.lora, remat=config.model.remat, layout=layout, **dtypes)
    trained, frozen = separate(abstract_params(model, layout))
    optimizer, _ = make_optimizer(config.optimizer, config.max_steps)
    return trained, frozen, abstract_opt_state(trained, optimizer, layout)


def tree_bytes(tree: Any) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def describe_memory(layout: Layout, arrays: Mapping[str, float], chip: str | None) -> None:
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    table = Table(f"arrays on each device, mesh {mesh}", box=None)
    table.add_column("MiB", justify="right")
    for name, count in arrays.items():
        if count:
            table.add_row(name, f"{count / 2**20:,.1f}")
    console.print(table)
    update = resident_bytes(arrays, ("gradient", "offloaded reference"))
    peak = max(update, resident_bytes(arrays, ("sampling copy", "cache of keys and values")))
    print_plain(f"together at most {bytes_text(peak)}; activations and logits come on top: `train plan` compiles them")
    if chip is not None:
        verdict = "fits" if peak <= USABLE_SHARE * HBM[chip] else "does NOT fit"
        print_plain(f"{chip}: {verdict} without them, {100 * peak / HBM[chip]:.0f} % of {HBM[chip] / GIB:.0f} GiB")


# Schedule


def describe_schedule(config: TrainingConfig, known: DataSummary, saved: tuple[float, float]) -> None:
    steps, optimizer, rows = config.max_steps, config.optimizer, known.train
    if isinstance(config, PolicyConfig):
        P, G = config.prompts_per_step, config.num_generations
        print_plain(
            f"{steps:,} steps of {P} prompts x {G} = {P * G:,} completions, {steps * P * G:,} in all"
            + epochs_text(rows, steps * P)
        )
        if config.updates_per_step > 1:
            print_plain(f"{config.updates_per_step} updates a step, of {config.update_prompts} prompts each")
        due = [step for step in range(steps + 1) if config.validation.due(step, steps)]
        prompts = config.validation.prompts if known.validation is None else known.validation
        each = f"{min(prompts, config.validation.prompts)} prompts x {config.validation.num_generations}"
    else:
        print_plain(f"{steps:,} steps of {config.batch_size} rows" + epochs_text(rows, steps * config.batch_size))
        validated = config.data.validation is not None or config.data.validation_rows or config.data.held_out
        due = [s for s in range(steps + 1) if validated and (s % config.eval_steps == 0 or s == steps)]
        each = "all validation rows"
    print_plain(
        f"learning rate {optimizer.learning_rate:g}: {optimizer.warmup_steps} steps of warm-up, then "
        f"{optimizer.lr_scheduler_type}"
    )
    print_plain(f"{len(due)} validations of {each}" if due else "no validation")
    count = len([s for s in range(1, steps + 1) if s % config.checkpoint.every == 0 or s == steps])
    kept = min(count, config.checkpoint.keep or count)
    (each_bytes, once), place = saved, config.checkpoint.directory or f"{config.output_dir}/checkpoints"
    print_plain(
        f"{count} checkpoints of {bytes_text(each_bytes)} in {place}, {kept} kept: {bytes_text(kept * each_bytes + once)}"
    )


def epochs_text(rows: int | None, used: int) -> str:
    return f"; {used / rows:.2f} epochs of {rows:,} rows" if rows else ""
