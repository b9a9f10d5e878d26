"""`--dry_run`: prints the data, networks, memory and schedule of a run, from its config alone.

Files are read, and tokenized where that takes seconds and the tokenizer is on this machine. The Hub is asked for the
columns and row counts of a data set; where it cannot be reached, schemas.yaml has them. Networks are shapes without
weights. Nothing is compiled (`train plan` does), trained or written, except that token ids of many prompts are cached.
The judge's key and IFEval's sentence splitter are not required: the machine that trains may have them.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, abstract_params
from models.lora import split_trainable
from models.sharding import Layout
from models.stop_strings import check_stop_strings
from models.tokenizer import Tokenizer
from models.weight_files import could_be_on_hub
from train.build import make_layout_for, make_optimizer, policy_layout
from train.config import DataConfig, PlanConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.console import console, print_plain
from train.data.chats import as_chat, read_exchanges
from train.data.files import is_local
from train.data.prompts import Prompts, Splits, load_splits
from train.data.rows import Row, load_rows, require_columns
from train.plan.chips import CHIPS, GIB, USABLE_SHARE
from train.plan.devices import simulated_devices
from train.plan.programs import (
    SLOTS,
    bytes_per_device,
    network_config,
    parameter_count,
    resident_bytes,
    step_parts,
)
from train.reference import check_networks
from train.rewards.functions import function_scorer
from train.running import setup_errors
from train.state import abstract_opt_state
from train.strict_yaml import load_yaml
from train.supervised.program import load_examples
from train.supervised.reward_model import check_comparison_rows, reward_model_task
from train.supervised.sft import check_sft_rows, sft_task

SCHEMAS = Path(__file__).with_name("schemas.yaml")
HUB_SECONDS = 5
MAX_TOKENIZED_ROWS = 20_000  # more are not tokenized in seconds
TrainingConfig = SftConfig | RewardModelConfig | PolicyConfig


def dry_run(config: TrainingConfig, devices: int | None, chip: str | None) -> None:
    """Prints data, networks, memory and schedule of a run.

    Args:
      devices: number of devices of the run; None: the mesh's, or those of this machine.
      chip: a key of CHIPS, whose memory the arrays are compared with.

    Raises:
      SetupError: a mistake in the config or the data.
    """
    with setup_errors():
        if chip is not None and chip not in CHIPS:
            raise ValueError(f"--chip: expected one of {', '.join(CHIPS)}, got {chip!r}")
        summary = describe_data(config)
        network, tokenizer = describe_networks(config, summary.columns)
        if tokenizer is not None and isinstance(config, PolicyConfig):
            check_stop_strings(config.stop, tokenizer)
        summary = tokenize_data(config, tokenizer, summary)
        layout, arrays, saved = memory_per_device(config, network, devices)
    describe_memory(layout, arrays, chip)
    describe_schedule(config, summary, saved)


def bytes_text(count: float) -> str:
    """Returns a number of bytes in GiB or MiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"


# Data


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


def tokenize_data(config: TrainingConfig, tokenizer: Tokenizer | None, summary: DataSummary) -> DataSummary:
    """Tokenizes the rows as the run will, where that takes seconds and no network; returns the updated counts."""
    if tokenizer is None or summary.rows is None or summary.rows > MAX_TOKENIZED_ROWS:
        limit = f"at most {MAX_TOKENIZED_ROWS:,} rows in files"
        print_plain(f"tokens: not counted, which needs a tokenizer that is here and {limit}")
        is_packed = isinstance(config, SftConfig) and config.packing
        return summary._replace(train=None) if is_packed else summary
    if isinstance(config, PolicyConfig):
        assert summary.splits is not None
        source, splits = config.data.validation or config.data.train_text, summary.splits
        prompts = Prompts(splits.train, config.data.train_text, config, tokenizer, splits.owners)
        validation = Prompts(splits.validation, source, config, tokenizer)
        print_plain(f"tokens: {prompts.too_long} prompts of train and {validation.too_long} of validation are too long")
        return summary._replace(train=len(prompts), validation=len(validation))
    task = reward_model_task(config) if isinstance(config, RewardModelConfig) else sft_task(config)
    train, _ = load_examples(config, task, tokenizer)
    return summary._replace(train=len(train))


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


# Networks


def describe_networks(config: TrainingConfig, columns: Collection[str] | None) -> tuple[Qwen3Config, Tokenizer | None]:
    """Prints the shapes of all networks; returns the trained one, and its tokenizer if that is on this machine."""
    network = network_config(config.model.path) if config.model.path else config.model.architecture
    assert network is not None  # ModelConfig has checked it
    if isinstance(config, RewardModelConfig):
        network = dataclasses.replace(network, architecture=REWARD_MODEL)
    elif network.is_reward_model:
        raise ValueError(f"model.path: {config.model.path} is a reward model; expected a policy")
    print_network("model", config.model.path or "random weights", network)
    tokenizer = None
    if not could_be_on_hub(config.model.tokenizer_path):
        chat = config.chat
        tokenizer = Tokenizer(config.model.tokenizer_path, chat.enable_thinking, chat.continue_final_message)
        tokenizer.check_vocab_size(network.vocab_size, config.model.path or "model.architecture")
        print_plain(f"tokenizer {tokenizer.path}: {tokenizer.size:,} ids")
    else:
        print_plain(f"tokenizer {config.model.tokenizer_path}: on the Hub, not read")
    if isinstance(config, PolicyConfig) and (reference := config.loss.reference) is not None:
        other = network_config(reference)
        check_networks(reference, other, network)
        print_network("reference", reference, other)
    for spec in config.all_rewards if isinstance(config, PolicyConfig) else ():
        if spec.function is not None:
            function_scorer(spec.function, spec.options, columns, runs_here=False, spec=spec)
            print_plain(f"reward {spec.label}: {spec.function}, weight {spec.weight:g}")
            continue
        scorer = network_config(str(spec.model))
        if not scorer.is_reward_model:
            raise ValueError(f"rewards: {spec.model} is a policy; expected a reward model")
        print_network(f"reward {spec.label}, weight {spec.weight:g}", str(spec.model), scorer)
    return network, tokenizer


def print_network(name: str, path: str, network: Qwen3Config) -> None:
    """Prints a network's path, parameters and shape."""
    print_plain(
        f"{name}: {path}: {parameter_count(network) / 1e6:,.2f} M parameters, {network.num_hidden_layers} layers "
        f"of width {network.hidden_size}, {network.num_attention_heads} query and {network.num_key_value_heads} "
        f"key/value heads, vocabulary {network.vocab_size:,}"
    )


# Memory


def memory_per_device(
    config: TrainingConfig, network: Qwen3Config, devices: int | None
) -> tuple[Layout, dict[str, float], tuple[float, float]]:
    """Returns the mesh, the bytes of each array on each device, and the bytes of checkpoints.

    The latter are two numbers: bytes of every checkpoint, and bytes that are saved once (the base of adapters).
    """
    if isinstance(config, PolicyConfig):
        fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(PolicyConfig)}
        planned = PlanConfig(**fields)
        layout = policy_layout(planned, stand_in_devices(config, devices))
        rewards = [network_config(spec.model) for spec in config.all_rewards if spec.model]
        arrays, _ = step_parts(planned, layout, network, rewards)
    else:
        layout = make_layout_for(config.mesh, config.batch_size, devices=stand_in_devices(config, devices))
        arrays = {}
    trained, frozen, opt_state = abstract_state(config, layout, network)
    if not arrays:
        moments = "offloaded optimizer" if config.optimizer.offload else "optimizer"
        arrays = {"parameters": trained, "base of adapters": frozen, moments: opt_state, "gradient": trained}
        arrays = {name: bytes_per_device(tree) for name, tree in arrays.items()}
    saved = tree_bytes(trained) + tree_bytes(opt_state)
    if isinstance(config, PolicyConfig) and config.loss.reference_sync_steps is not None:
        saved += tree_bytes(trained)  # the reference
    return layout, arrays, (saved, tree_bytes(frozen))


def stand_in_devices(config: TrainingConfig, count: int | None) -> Sequence[jax.Device] | None:
    """Returns `count` simulated devices, or as many as the mesh's sizes say; None: take this machine's devices."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    count = count or (math.prod(sizes) if min(sizes) > 0 else None)
    return simulated_devices(count) if count else None


def abstract_state(config: TrainingConfig, layout: Layout, network: Qwen3Config) -> tuple[Any, Any, Any]:
    """Returns trained parameters, frozen parameters and optimizer state as ShapeDtypeStructs."""
    dtypes = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    model = abstract_model(network, lora=config.lora, remat=config.model.remat, layout=layout, **dtypes)
    trained, frozen = split_trainable(abstract_params(model, layout))
    optimizer, _ = make_optimizer(config.optimizer, config.max_steps)
    return trained, frozen, abstract_opt_state(trained, optimizer, layout)


def tree_bytes(tree: Any) -> float:
    """Returns the bytes of a tree of arrays, over all devices."""
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def describe_memory(layout: Layout, arrays: Mapping[str, float], chip: str | None) -> None:
    """Prints the arrays on each device, the most that are there together, and whether they fit a chip."""
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    table = Table(f"arrays on each device, mesh {mesh}", box=None)
    table.add_column("MiB", justify="right")
    for name, count in arrays.items():
        if count:
            table.add_row(name, f"{count / 2**20:,.1f}")
    console.print(table)
    update = resident_bytes(arrays, ("gradient", "offloaded reference", "offloaded optimizer"))
    peak = max(update, resident_bytes(arrays, ("sampling copy", SLOTS)))
    print_plain(f"together at most {bytes_text(peak)}; activations and logits come on top: `train plan` compiles them")
    if chip is not None:
        memory = CHIPS[chip].memory
        verdict = "fits" if peak <= USABLE_SHARE * memory else "does NOT fit"
        print_plain(f"{chip}: {verdict} without them, {100 * peak / memory:.0f} % of {memory / GIB:.0f} GiB")


# Schedule


def describe_schedule(config: TrainingConfig, summary: DataSummary, saved: tuple[float, float]) -> None:
    """Prints steps, epochs, learning rate, validations and checkpoints."""
    steps, optimizer, rows = config.max_steps, config.optimizer, summary.train
    if isinstance(config, PolicyConfig):
        P, G = config.prompts_per_step, config.num_generations
        print_plain(
            f"{steps:,} steps of {P} prompts x {G} = {P * G:,} completions, {steps * P * G:,} in all"
            + epochs_text(rows, steps * P)
        )
        if config.samples_in_parts:
            print_plain(
                f"{config.rollout_prompts} prompts sampled at a time; waiting ones take the places of ended ones"
            )
        if config.updates_per_step > 1:
            print_plain(f"{config.updates_per_step} updates a step, of {config.update_prompts} prompts each")
        due = [step for step in range(steps + 1) if config.validation.due(step, steps)]
        prompts = config.validation.prompts if summary.validation is None else summary.validation
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
    total = bytes_text(kept * each_bytes + once)
    print_plain(f"{count} checkpoints of {bytes_text(each_bytes)} in {place}, {kept} kept: {total}")


def epochs_text(rows: int | None, used: int) -> str:
    """Returns the number of epochs that `used` rows are, if the number of rows is known."""
    return f"; {used / rows:.2f} epochs of {rows:,} rows" if rows else ""
