"""Builds a run from its config: the mesh, the tokenizer, the network, the optimizer."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from models.checkpoint import check_loadable, load_model
from models.config import POLICY
from models.hf_weights import abstract_model, flatten, nest, split
from models.lora import Lora
from models.qwen3 import Backbone
from models.sharding import Layout, make_layout, parameter_shardings
from models.tokenizer import Tokenizer
from train.config import ChatConfig, MeshConfig, ModelConfig, OptimizerConfig, PolicyConfig
from train.console import console
from train.optimizers import (
    DIRECTIONS,
    SETTINGS,
    check_runs,
    decay_weights,
    make_custom,
    make_direction,
    with_float32_state,
    with_master_weights,
)
from train.state import INIT, stream_key


def make_layout_for(
    mesh: MeshConfig, *batches: int, groups: Sequence[int] = (), devices: Sequence[jax.Device] | None = None
) -> Layout:
    """Returns the layout of a mesh.

    Args:
      batches: numbers of rows that are sharded over the axis "prompt".
      groups: numbers of completions per prompt that are sharded over the axis "group".
      devices: default: all devices of JAX.

    Raises:
      ValueError: a mesh that does not divide the batches or the groups.
    """
    layout = make_layout(
        data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, rules=mesh.rules, attention=mesh.attention, devices=devices
    )
    for rows in batches:
        if rows % layout.shard_count("prompt"):
            raise ValueError(
                f"mesh: {rows} rows (of a step, of rollout_prompts, of a micro-batch, or of a batch_prompts) cannot be "
                f"split over {layout.shard_count('prompt')} devices; choose sizes that are multiples of it, or another "
                f"mesh"
            )
    for size in groups:
        if size > 1 and size % layout.shard_count("group"):
            raise ValueError(
                f"mesh.rules: {size} completions per prompt cannot be split over {layout.shard_count('group')} "
                f"devices; choose num_generations (of the run and of its validation) that are multiples of it"
            )
    return layout


def policy_layout(config: PolicyConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """Returns the layout of a run of `train policy`.

    Raises:
      ValueError: a mesh that does not divide the batches of policy, reward models and validation, or their groups.
    """
    batches = [spec.batch_prompts for spec in config.all_rewards if spec.model]
    batches += [config.prompts_per_step, config.microbatch_prompts, config.validation.batch_prompts]
    batches += [] if config.rollout_prompts is None else [config.rollout_prompts]
    groups = (config.num_generations, config.validation.num_generations)
    return make_layout_for(config.mesh, *batches, groups=groups, devices=devices)


def generator_options(config: PolicyConfig) -> dict[str, Any]:
    """Returns what a `models.generate.Generator` takes of a run's settings."""
    sampling = ("temperature", "top_k", "top_p", "min_tokens", "min_p", "repetition_penalty", "stop")
    sizes = ("max_prompt_length", "max_completion_length", "rollout_prompts")
    options = {name: getattr(config, name) for name in (*sampling, *sizes)}
    return options | {"sampling_copy": config.mesh.sampling_copy, "decoding": config.mesh.decoding}


def make_tokenizer(model: ModelConfig, chat: ChatConfig) -> Tokenizer:
    """Returns the tokenizer of a run.

    Raises:
      FileNotFoundError: there is no model, or no tokenizer, at the config's path.
    """
    if model.path is not None:
        check_loadable(
            model.path
        )  # first: of a wrong path, "no tokenizer" alone would hide that the model is missing too
    return Tokenizer(model.tokenizer_path, chat.enable_thinking, chat.continue_final_message)


def make_model(
    model: ModelConfig, lora: Lora, layout: Layout, seed: int, tokenizer: Tokenizer, architecture: str = POLICY
) -> Backbone:
    """Returns the network that a run starts from: pretrained or random, a policy or a reward model.

    A reward model may start from a policy's backbone; its head is then initialised anew, as adapters always are.

    Raises:
      ValueError: a vocabulary smaller than the tokenizer's, or a reward model where a policy is needed.
    """
    options: dict[str, Any] = {"dtype": model.dtype, "param_dtype": model.param_dtype, "remat": model.remat}
    if model.path is not None:
        loaded = load_model(model.path, mesh=layout, **options)
        tokenizer.check_vocab_size(loaded.config.vocab_size, model.path)
        if loaded.config.architecture == architecture and not lora.rank:
            return loaded
        if loaded.config.is_reward_model and architecture == POLICY:
            raise ValueError(f"model.path: {model.path} is a reward model; expected a policy")
        config = loaded.config
        if config.architecture != architecture:
            pad_id = tokenizer.pad_id if config.pad_token_id is None else config.pad_token_id
            config = dataclasses.replace(config, architecture=architecture, pad_token_id=pad_id)
        pretrained = flatten(split(loaded)[1])
    else:
        assert model.architecture is not None  # ModelConfig has checked it
        tokenizer.check_vocab_size(model.architecture.vocab_size, "model.architecture")
        ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_ids}
        config, pretrained = dataclasses.replace(model.architecture, architecture=architecture, **ids), {}
    options |= {"layout": layout, "lora": lora}
    abstract = abstract_model(config, **options)
    graphdef, _ = split(abstract)
    shardings = {k: v for k, v in flatten(parameter_shardings(abstract, layout)).items() if k not in pretrained}

    def init_missing(key: jax.Array) -> dict[str, jax.Array]:
        params = flatten(split(type(abstract)(config, nnx.Rngs(params=key, lora=key), **options))[1])
        return {name: params[name] for name in shardings}

    init = jax.jit(
        init_missing,
        out_shardings=shardings,
        # The program runs once: on a CPU, optimising it takes longer than running it unoptimised.
        compiler_options={"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None,
    )
    values = pretrained | init(stream_key(seed, INIT, 0))
    return nnx.merge(graphdef, nest({name: values[name] for name in flatten(split(abstract)[1])}))


def make_optimizer(config: OptimizerConfig, max_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer behind a clip of the gradient's global norm, and its learning rate's schedule.

    The schedule warms up linearly from 0.

    Raises:
      ValueError: options with which the optimizer cannot be made.
    """
    rate, decay = config.learning_rate, max(max_steps - config.warmup_steps, 1)
    after = {  # the warm-up
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(rate, decay),
    }[config.lr_scheduler_type]
    warmup = optax.linear_schedule(0.0, rate, max(config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after
    make = partial(_make_unclipped, config, schedule)
    is_default = config.name == "adamw" and not config.options
    unclipped = make() if is_default else check_runs(make, config.name, config.options)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), unclipped)
    if config.master_weights:
        return with_master_weights(optimizer), schedule
    return (with_float32_state(optimizer) if config.moments_dtype == "float32" else optimizer), schedule


def _make_unclipped(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer without its clip."""
    if config.name not in DIRECTIONS:
        settings = {name: getattr(config, name) for name in ("weight_decay", "decay_all", "moments_dtype")}
        return make_custom(config.name, config.options, schedule, **settings)
    direction = make_direction(config.name, config.options, {name: getattr(config, name) for name in SETTINGS})
    everything = config.decay_all or not config.weight_decay
    decay = optax.add_decayed_weights(config.weight_decay) if everything else decay_weights(config.weight_decay)
    return optax.chain(direction, decay, optax.scale_by_learning_rate(schedule))


def updated_share(params: Any, size: float) -> float:
    """Returns the share of the bfloat16 parameters that an update of +-`size` changes; 1 if none is bfloat16.

    The others are rounded back to what they were: 8 bits hold no change below 1/512 of a number.
    """

    @jax.jit
    def changed(leaves: list[jax.Array]) -> list[jax.Array]:
        # reduce_precision: from two casts the compiler may take the rounding out
        wide = [leaf.astype(jnp.float32) for leaf in leaves]
        rounded = [[jax.lax.reduce_precision(x + by, 8, 7) for by in (size, -size)] for x in wide]
        return [jnp.mean((up != x) + 0.0 + (down != x)) / 2 for x, (up, down) in zip(wide, rounded, strict=True)]

    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.bfloat16]
    sizes = [leaf.size for leaf in leaves]
    return float(np.average(jax.device_get(changed(leaves)), weights=sizes)) if leaves else 1.0


def warn_of_rounding(config: OptimizerConfig, params: Any) -> None:
    """Prints a warning if updates of about the learning rate, as AdamW's, change less than half of the parameters.

    Master weights add small updates up, so with them there is nothing to warn of.
    """
    if config.master_weights or config.name == "sgd" or config.name not in DIRECTIONS:  # of these, no size is known
        return
    share = updated_share(params, config.learning_rate)
    if share < 0.5:
        console.print(
            f"warning: an update of optimizer.learning_rate = {config.learning_rate:g} changes {share:.1%} of the "
            f"bfloat16 parameters; in the others it is rounded away, in every step: set optimizer.master_weights: true "
            f"(a float32 copy adds the updates up), or model.param_dtype: float32",
            soft_wrap=True,
            markup=False,
        )
