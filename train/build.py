"""Builds a run from its config: the mesh, the tokenizer, the network, the optimizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """Returns AdamW behind a clip of the gradient's global norm, and its learning rate's schedule.

    The schedule warms up linearly from 0.
    """
    rate, decay = config.learning_rate, max(max_steps - config.warmup_steps, 1)
    after = {  # the warm-up
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(rate, decay),
    }[config.lr_scheduler_type]
    warmup = optax.linear_schedule(0.0, rate, max(config.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps]) if config.warmup_steps else after
    adamw = optax.adamw(
        schedule, config.adam_beta1, config.adam_beta2, config.adam_epsilon, weight_decay=config.weight_decay
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
    return (with_master_weights(optimizer) if config.master_weights else optimizer), schedule


class MasterWeights(NamedTuple):
    """The state of an optimizer with master weights."""

    master: Any  # the parameters in float32
    inner: Any  # the wrapped optimizer's state


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer: it updates float32 master weights; the parameters are the master weights in their own dtype.

    A bfloat16 parameter has 8 bits: an update below 1/512 of the parameter would be lost, every time.
    """

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> MasterWeights:
        return MasterWeights(to_float32(params), optimizer.init(to_float32(params)))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, MasterWeights]:
        updates, inner = optimizer.update(to_float32(gradient), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), master, params)
        return jax.tree.map(jnp.subtract, to_float32(rounded), to_float32(params)), MasterWeights(master, inner)

    return optax.GradientTransformation(init, update)


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
    """Prints a warning if the updates of AdamW, at most about its learning rate, change less than half the parameters.

    Master weights add small updates up, so with them there is nothing to warn of.
    """
    if config.master_weights:
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
