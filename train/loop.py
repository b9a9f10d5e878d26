"""Group policy optimization, whole: prompts, rollouts, rewards, advantages, loss, update.

Every step of `train_policy`:

    1  prompts      P prompts, a pure function of (seed, step)
    2  tokens       prompt_PS, right-padded, with lengths
    3  rollouts     G completions each: tokens_PGT, their log-probabilities and lengths; the prompt computed once
    4  rewards      rewards_PG, NaN = unscorable
    5  advantages   ADVANTAGES[name](rewards_PG): the one line in which GOPO and GRPO differ
    6  loss         clipped policy loss and KL penalty on the log-probabilities of the same tokens
    7  update       micro-batches of whole groups, their completions packed into rows; one optimizer step
    8  log, validate, checkpoint

One update per batch: the policy that is trained is the one that sampled, so the old log-probabilities are the
new ones without their gradient and cost no forward pass of their own.
Left out on purpose: several updates per batch, rollouts on other machines.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gopo_jax import ADVANTAGES, loss_count, policy_loss
from gopo_jax.losses import Metrics
from models.generate import Generator
from models.hf_weights import split
from models.lora import join
from models.sampler import Rollout
from models.sharding import Layout, fetch, to_device, to_host
from train import state as training
from train.config import PolicyConfig
from train.metrics import Run, Timer, console, divide, rollout_metrics, setup_errors
from train.packing import Batch, cut, unpack
from train.processes import share
from train.prompts import Prompts, load_prompts
from train.rewards import Rewards
from train.state import TrainState


def train_policy(config: PolicyConfig) -> None:
    """Run, or go on with, the run in `config.output_dir`.

    Raises:
      SetupError: a mistake in the config or the data, before anything is computed.
    """
    with setup_errors():
        layout = training.policy_layout(config)
        tokenizer = training.make_tokenizer(config.model, config.chat)
        prompts, validation = load_prompts(config, tokenizer)
        for count in filter(None, (config.prompts_per_step, len(validation.rows[: config.validation.prompts]))):
            share(count)  # fewer prompts than processes are refused here
        rewards = Rewards(config.rewards, layout, config.model.dtype)
        rewards.check(prompts.prompts(prompts.rows[:1])[0])
        advantages = jax.jit(partial(ADVANTAGES[config.advantage], **config.advantage_options))
        # a wrong option is refused here
        advantages(np.zeros((config.prompts_per_step, config.num_generations), np.float32))
        model = training.make_model(config.model, config.lora, layout, config.seed, tokenizer)
        graphdef, params = split(model)
        run = Run(config, model.config.to_hf(), tokenizer)
        optimizer, schedule = training.make_optimizer(config.optimizer, config.max_steps)
        first = training.make_state(params, optimizer, layout)
        ref_params = training.copy(first.params) if config.loss.beta else None  # adapters: fresh ones change nothing
        ref_params = to_host(ref_params) if config.loss.offload_reference else ref_params
        state = run.resume(first)
        del model, params, first  # a resumed run has others

    generator = Generator(
        graphdef,
        tokenizer,
        layout,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_tokens=config.min_tokens,
        sampling_copy=config.mesh.sampling_copy,
    )
    update = make_update(graphdef, optimizer, config, layout, state)
    evaluate = partial(validate, run, config, validation, rewards, generator)
    describe(run, config, prompts, validation, layout)
    if run.start == 0 and config.validation.due(0, config.max_steps):
        run.write(0, evaluate(state, 0))

    for step in run.steps():
        began, timer = time.perf_counter(), Timer()
        # 1 prompts
        rows = prompts.batch(config.seed, step, config.prompts_per_step)
        # 2 tokens
        prompt_PS, lengths_P = prompts.encode(rows)
        # 3 rollouts
        with timer("generate"):
            key = training.stream_key(config.seed, training.TRAIN, step)
            drawn = generator.rollout(state.all_params, prompt_PS, lengths_P, key, config.num_generations)
            rollout = jax.tree.map(fetch, drawn)
        # 4 rewards
        with timer("reward"):
            mine = share(len(rows))  # each process scores its part, and all get the whole
            texts_PG = tokenizer.decode(rollout.tokens_PGT[mine], rollout.lengths_PG[mine])
            rewards_PG, metrics = rewards.score(prompts.prompts(rows[mine]), texts_PG, prompts.columns(rows, mine))
        # 5 advantages
        advantages_PG = advantages(rewards_PG)
        # 6 loss, 7 update
        with timer("update"):
            batch = make_batch(prompt_PS, lengths_P, rollout, rewards_PG, advantages_PG)
            state, learned = update(state, to_device(ref_params), batch)
            metrics |= divide(learned)
        # 8 log, validate, checkpoint
        done = step + 1
        metrics |= rollout_metrics(rewards_PG, rollout.lengths_PG, rollout.finished_PG)
        metrics |= {"learning_rate": schedule(step), "epoch": done * config.prompts_per_step / len(prompts)}
        if config.validation.due(done, config.max_steps):
            with timer("validation"):
                metrics |= evaluate(state, done)
        seconds = time.perf_counter() - began
        metrics |= {**timer.seconds, "timing_s/step": seconds, "perf/tokens_per_s": rollout.lengths_PG.sum() / seconds}
        run.write(done, metrics)
        run.show(done, {name: metrics.get(name, math.nan) for name in ("reward", "kl", "perf/tokens_per_s")})
        if run.checkpoint_due(done):
            run.save(done, state)
    run.close()


def make_batch(
    prompt_PS: np.ndarray, lengths_P: np.ndarray, rollout: Rollout, rewards_PG: np.ndarray, advantages_PG: jax.Array
) -> Batch:
    """What the loss needs, [P, ...]. Tokens behind the end are masked out, and unscorable completions."""
    tokens_PGT, sampled_PGT, lengths_PG, _ = map(np.asarray, rollout)
    mask_PGT = np.arange(tokens_PGT.shape[-1]) < lengths_PG[..., None]
    return {
        "prompt_PS": prompt_PS,
        "lengths_P": lengths_P,
        "tokens_PGT": tokens_PGT,
        "sampled_PGT": sampled_PGT,
        "mask_PGT": mask_PGT & ~np.isnan(rewards_PG)[..., None],
        "advantages_PG": np.asarray(advantages_PG),
    }


def policy_objective(
    params: Any,
    ref_params: Any,
    frozen: Any,
    batch: dict[str, jax.Array],
    denominator: jax.Array,
    *,
    graphdef: Any,
    config: PolicyConfig,
) -> tuple[jax.Array, Metrics]:
    """The loss of some whole groups, divided by the count of the whole batch, and its metrics."""

    def logprobs_of(params: Any, **options: Any) -> Any:
        model, tokens_PBT = nnx.merge(graphdef, join(params, frozen)), batch["tokens_PBT"]
        hidden_PBTD = model.predict(batch["prompt_PS"], batch["lengths_P"], tokens_PBT, batch["offset_PBT"])
        options |= {"chunk_tokens": config.loss.logprob_chunk, "temperature": config.temperature}
        found_PBT = model.logprobs(hidden_PBTD, tokens_PBT, **options)
        return jax.tree.map(lambda array_PBT: unpack(array_PBT, batch["slot_PGT"]), found_PBT)

    logprobs_PGT, entropy_PGT = logprobs_of(params, with_entropy=True)
    penalized = ref_params is not None
    loss, metrics = policy_loss(
        logprobs_PGT,
        jax.lax.stop_gradient(logprobs_PGT),
        batch["advantages_PG"],
        batch["mask_PGT"],
        clip_low=config.loss.clip_low,
        clip_high=config.loss.clip_high,
        ratio=config.loss.ratio,
        aggregate=config.loss.aggregate,
        denominator=denominator,
        max_length=config.max_completion_length,
        kl=config.loss.kl if penalized else None,
        ref_logprobs=jax.lax.stop_gradient(logprobs_of(ref_params)) if penalized else None,
        beta=config.loss.beta,
    )
    mask_PGT = batch["mask_PGT"]
    count = mask_PGT.sum(dtype=jnp.float32)
    drift_PGT = jnp.abs(logprobs_PGT - batch["sampled_PGT"])
    metrics["entropy"] = (jnp.where(mask_PGT, entropy_PGT, 0).sum(), count)
    metrics["sampling/sampling_logp_difference/mean"] = (jnp.where(mask_PGT, drift_PGT, 0).sum(), count)
    return loss, jax.lax.stop_gradient(metrics)


class UpdatePrograms(NamedTuple):
    """The jitted parts of an update."""

    nothing: Any  # params -> a gradient of zeros
    add: Any  # (gradient so far, state, ref_params, micro-batch, denominator) -> gradient, metrics
    apply: Any  # (state, gradient) -> state, metrics


def update_programs(
    graphdef: Any, optimizer: optax.GradientTransformation, config: PolicyConfig, state: TrainState
) -> UpdatePrograms:
    """Those of `make_update`; `state` says where everything lies."""
    microbatches = config.prompts_per_step // config.microbatch_prompts
    loss_and_gradient = jax.value_and_grad(partial(policy_objective, graphdef=graphdef, config=config), has_aux=True)
    where = training.shardings(state)

    @partial(jax.jit, out_shardings=where.params)
    def nothing(params: Any) -> Any:
        exact = jnp.float32 if config.optimizer.master_weights else None
        return jax.tree.map(partial(jnp.zeros_like, dtype=exact), params)

    @partial(jax.jit, donate_argnums=0, out_shardings=(where.params, None))
    def add(total: Any, state: TrainState, ref_params: Any, micro: Any, denominator: jax.Array) -> tuple[Any, Metrics]:
        (loss, metrics), gradient = loss_and_gradient(state.params, ref_params, state.frozen, micro, denominator)
        metrics["loss"] = (loss, jnp.ones(()) / microbatches)
        return jax.tree.map(jnp.add, total, gradient), metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=(where, None))
    def apply(state: TrainState, gradient: Any) -> tuple[TrainState, Metrics]:
        return training.apply(optimizer, state, gradient), {"grad_norm": (optax.tree.norm(gradient), jnp.ones(()))}

    return UpdatePrograms(nothing, add, apply)


def make_update(
    graphdef: Any, optimizer: optax.GradientTransformation, config: PolicyConfig, layout: Layout, state: TrainState
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step on a batch: the gradients of its micro-batches are added up in place, then applied."""
    microbatches = config.prompts_per_step // config.microbatch_prompts
    programs = update_programs(graphdef, optimizer, config, state)

    def update(state: TrainState, ref_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        aggregate = config.loss.aggregate
        count = loss_count(jnp.asarray(batch["mask_PGT"]), aggregate, max_length=config.max_completion_length)
        denominator = microbatches * count if aggregate == "token_per_microbatch" else count
        gradient, parts = programs.nothing(state.params), []
        for micro in cut(batch, config.microbatch_prompts, layout):
            gradient, metrics = programs.add(gradient, state, ref_params, micro, denominator)
            parts.append(metrics)
        state, metrics = programs.apply(state, gradient)
        return state, metrics | jax.tree.map(lambda *sums: sum(sums), *jax.device_get(parts))

    return update


def validate(
    run: Run,
    config: PolicyConfig,
    validation: Prompts,
    rewards: Rewards,
    generator: Generator,
    state: TrainState,
    step: int,
) -> dict[str, float]:
    """Sample the first validation prompts, score them, keep the texts; metrics under validation/."""
    settings = config.validation
    rows = validation.rows[: settings.prompts]
    prompts, G = validation.prompts(rows), settings.num_generations
    key = training.stream_key(config.seed, training.VALIDATION, step)
    texts_PG, lengths_PG, finished_PG = generator.complete(state.all_params, prompts, key, G, settings.batch_prompts)
    mine = share(len(rows))
    rewards_PG, metrics = rewards.score(prompts[mine], texts_PG[mine], validation.columns(rows, mine))
    table = [
        {
            "prompt_id": p,
            "prompt": prompts[p],
            "completion": texts_PG[p][g],
            "reward": None if math.isnan(rewards_PG[p, g]) else float(rewards_PG[p, g]),
            "length": int(lengths_PG[p, g]),
            "finished": bool(finished_PG[p, g]),
        }
        for p in range(len(rows))
        for g in range(G)
    ]
    run.write_completions(f"validation_{step:06d}", table)
    metrics |= rollout_metrics(rewards_PG, lengths_PG, finished_PG)
    return {f"validation/{name}": value for name, value in metrics.items()}


def describe(run: Run, config: PolicyConfig, prompts: Prompts, validation: Prompts, layout: Layout) -> None:
    """What is about to happen, in three lines."""
    completions = config.prompts_per_step * config.num_generations
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    console.print(
        f"{run.path}: {config.advantage} on {len(prompts)} prompts ({prompts.too_long} left out, longer than "
        f"{config.max_prompt_length} tokens), {len(validation)} to validate on ({validation.too_long} left out)\n"
        f"  per step {config.prompts_per_step} prompts x {config.num_generations} = {completions} completions of up to "
        f"{config.max_completion_length} tokens, in micro-batches of {config.microbatch_prompts} prompts "
        f"({config.microbatch_prompts * config.num_generations} completions); mesh {mesh}"
    )
