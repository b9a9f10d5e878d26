"""Builds what a run is made of from its config: the mesh, the tokenizer, the network, the optimizer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from train.state import INIT, stream_key


def make_layout_for(
    mesh: MeshConfig, *batches: int, groups: Sequence[int] = (), devices: Sequence[jax.Device] | None = None
) -> Layout:
    """The mesh of a run; refuses one that does not divide the given numbers of rows and sizes of groups."""
    layout = make_layout(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, rules=mesh.rules, devices=devices)
    for rows in batches:
        if rows % layout.shard_count("prompt"):
            raise ValueError(
                f"mesh: {rows} rows (of a step, of a micro-batch, or of a batch_prompts) cannot be split over "
                f"{layout.shard_count('prompt')} devices; choose sizes that are multiples of it, or another mesh"
            )
    for size in groups:
        if size > 1 and size % layout.shard_count("group"):
            raise ValueError(
                f"mesh.rules: {size} completions per prompt cannot be split over {layout.shard_count('group')} "
                f"devices; choose num_generations (of the run and of its validation) that are multiples of it"
            )
    return layout


def policy_layout(config: PolicyConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh of a run of `train policy`; refuses one that does not divide everything that is put on it."""
    batches = [spec.batch_prompts for spec in config.rewards if spec.model]
    batches += [config.prompts_per_step, config.microbatch_prompts, config.validation.batch_prompts]
    groups = (config.num_generations, config.validation.num_generations)
    return make_layout_for(config.mesh, *batches, groups=groups, devices=devices)


def make_tokenizer(model: ModelConfig, chat: ChatConfig) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
      FileNotFoundError: no model, or no tokenizer, where the config says.
    """
    if model.path is not None:
        check_loadable(model.path)  # first: of a wrong path, that there is no tokenizer is half the story
    return Tokenizer(model.tokenizer_path, chat.enable_thinking)


def make_model(
    model: ModelConfig, lora: Lora, layout: Layout, seed: int, tokenizer: Tokenizer, architecture: str = POLICY
) -> Backbone:
    """The network a run starts from: pretrained, or random, as a policy or as a reward model.

    A reward model may start from a policy's backbone; its head is then new. Adapters are always new.

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
        given = flatten(split(loaded)[1])
    else:
        assert model.architecture is not None  # ModelConfig has checked it
        tokenizer.check_vocab_size(model.architecture.vocab_size, "model.architecture")
        ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_ids}
        config, given = dataclasses.replace(model.architecture, architecture=architecture, **ids), {}
    options |= {"layout": layout, "lora": lora}
    abstract = abstract_model(config, **options)
    graphdef, _ = split(abstract)
    shardings = {k: v for k, v in flatten(parameter_shardings(abstract, layout)).items() if k not in given}

    def new(key: jax.Array) -> dict[str, jax.Array]:
        whole = flatten(split(type(abstract)(config, nnx.Rngs(params=key, lora=key), **options))[1])
        return {name: whole[name] for name in shardings}

    init = jax.jit(
        new,
        out_shardings=shardings,
        # it runs once: on a CPU compiling it well takes longer than running it
        compiler_options={"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None,
    )
    values = given | init(stream_key(seed, INIT, 0))
    return nnx.merge(graphdef, nest({name: values[name] for name in flatten(split(abstract)[1])}))


def make_optimizer(config: OptimizerConfig, max_steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clip of the global norm; the schedule warms up linearly from 0."""
    rate, decay = config.learning_rate, max(max_steps - config.warmup_steps, 1)
    after = {
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
    master: Any  # the parameters in float32
    inner: Any


def with_master_weights(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer on float32 copies of the parameters, which are the copies' rounded to what they are stored in.

    A bfloat16 parameter has 8 bits: an update below 1/512 of it would be lost, every time.
    """

    def exact(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> MasterWeights:
        return MasterWeights(exact(params), optimizer.init(exact(params)))

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, MasterWeights]:
        updates, inner = optimizer.update(exact(gradient), state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        rounded = jax.tree.map(lambda m, p: m.astype(p.dtype), master, params)
        return jax.tree.map(jnp.subtract, exact(rounded), exact(params)), MasterWeights(master, inner)

    return optax.GradientTransformation(init, update)
