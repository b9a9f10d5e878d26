"""`--dry_run`: prints the data, networks, memory and schedule of a run, from its config alone.

Files are read, and tokenized where that takes seconds and the tokenizer is on this machine (`train.plan.data`).
Networks are shapes without weights. Nothing is compiled (`train plan` does), trained or written, except that token ids
of many prompts are cached. The judge's key and IFEval's sentence splitter are not required: the machine that trains may
have them. Callbacks, trackers and functions of rewards are imported, not called.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
from train.config import PlanConfig, PolicyConfig, RewardModelConfig, SftConfig
from train.console import console, print_plain
from train.data.prompts import Prompts
from train.plan.chips import CHIPS, GIB, USABLE_SHARE
from train.plan.data import SCHEMAS, DataSummary, TrainingConfig, describe_data, look_up_schema, schema_from_card
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
from train.run.changes import check_start
from train.run.directory import check_imports
from train.running import setup_errors
from train.state import abstract_opt_state
from train.supervised.program import load_examples
from train.supervised.reward_model import reward_model_task
from train.supervised.sft import sft_task
from train.validation import check_best

__all__ = ["SCHEMAS", "dry_run", "look_up_schema", "memory_per_device", "schema_from_card"]
MAX_TOKENIZED_ROWS = 20_000  # more are not tokenized in seconds


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
        check_start(config)
        check_imports(config)
        if isinstance(config, PolicyConfig):
            check_best(config)
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


# Tokens


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
        other = network_config(reference, "loss.reference")
        check_networks(reference, other, network)
        print_network("reference", reference, other)
    for name, spec in config.named_rewards if isinstance(config, PolicyConfig) else ():
        if spec.function is not None:
            function_scorer(spec.function, spec.options, columns, runs_here=False, spec=spec)
            print_plain(f"reward {spec.label}: {spec.function}, weight {spec.weight:g}")
            continue
        scorer = network_config(str(spec.model), f"{name}.model")
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
