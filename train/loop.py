"""Group policy optimization, whole: prompts, rollouts, rewards, advantages, loss, update.

Every step of `train_policy`:

    1  prompts      P prompts, a pure function of (seed, step); with dynamic sampling more, until all groups differ
    2  tokens       prompt_PS, right-padded, with lengths
    3  rollouts     G completions each: tokens_PGT, their log-probabilities and lengths; the prompt computed once
    4  rewards      rewards_PGR, every reward apart, and their weighted sum rewards_PG; NaN = unscorable
    5  advantages   ADVANTAGES[name](rewards_PG): the one line in which GOPO and GRPO differ
    6  loss         clipped policy loss and KL penalty on the log-probabilities of the same tokens
    7  update       micro-batches of whole groups, their completions packed into rows; one optimizer step, or several
    8  log, validate, checkpoint

With one update per batch the policy that is trained is the one that sampled, so the old log-probabilities are the
new ones without their gradient and cost no forward pass of their own.
Left out on purpose: rollouts on other machines.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax import kl_penalty, policy_loss, sampler_correction, token_broadcast
from gopo_jax.losses import Metrics
from models.generate import Generator
from models.hf_weights import split
from models.lora import join
from models.sharding import Layout, fetch, to_host
from train import state as training
from train.batch import Groups, choose, completion_table, is_enough, make_batch
from train.config import PolicyConfig
from train.metrics import (
    Run,
    Timer,
    console,
    require_finite,
    rollout_metrics,
    sampling_metrics,
    setup_errors,
    throughput,
)
from train.packing import unpack
from train.processes import share
from train.prompts import Prompts, load_prompts
from train.rewards import Rewards, combine, completion_ids
from train.state import TrainState
from train.update import Update


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
        advantages = make_advantages(config)  # a wrong option is refused here, before a reward model is read
        columns = [name for name in prompts.other_columns if not len(validation) or name in validation.other_columns]
        rewards = Rewards(config.rewards, layout, config.model.dtype, config.reward_combination, columns)
        rewards.check(prompts.prompts(prompts.rows[:1])[0])
        model = training.make_model(config.model, config.lora, layout, config.seed, tokenizer)
        graphdef, params, network = *split(model), model.config
        run = Run(config, model.config.to_hf(), tokenizer)
        optimizer, schedule = training.make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
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
        began, timer, drawn = time.perf_counter(), Timer(), list[Groups]()
        while not drawn or not is_enough(drawn, advantages, config):
            # 1 prompts
            attempt = len(drawn)
            rows = prompts.batch(config.seed, step, config.prompts_per_step, attempt)
            # 2 tokens
            prompt_PS, lengths_P = prompts.encode(rows)
            # 3 rollouts
            with timer("generate"):
                key = training.stream_key(config.seed, training.TRAIN, step, attempt)
                sampled = generator.rollout(state.all_params, prompt_PS, lengths_P, key, config.num_generations)
                rollout = jax.tree.map(fetch, sampled)
            # 4 rewards
            with timer("reward"):
                mine = share(len(rows))  # each process scores its part, and all get the whole
                texts_PG = tokenizer.decode(rollout.tokens_PGT[mine], rollout.lengths_PG[mine])
                ids_PG = completion_ids(rollout.tokens_PGT[mine], rollout.lengths_PG[mine])
                columns_P = prompts.columns(rows, mine)
                rewards_PGR = rewards.score(prompts.prompts(rows[mine]), texts_PG, columns_P, ids_PG)
            drawn.append(Groups(rows, prompt_PS, lengths_P, rollout, rewards_PGR))
        groups = choose(drawn, advantages, config)
        rewards_PG, rollout = rewards.combine(groups.rewards_PGR), groups.rollout
        batch = make_batch(groups, config)
        with timer("update"):
            before, penalty_PG = update.before(state, ref_params, batch)
            # 5 advantages
            advantages_PG = advantages(groups.rewards_PGR, penalty_PG)
            # 6 loss, 7 update
            state, metrics = update(state, ref_params, batch | before | {"advantages_PG": advantages_PG}, step)
        # 8 log, validate, checkpoint
        done = step + 1
        require_finite(done, metrics)
        metrics |= rewards.metrics(groups.rewards_PGR)
        metrics |= rollout_metrics(rewards_PG, rollout.lengths_PG, rollout.finished_PG)
        metrics |= {"sampling/attempts": len(drawn), "epoch": done * config.prompts_per_step / len(prompts)}
        metrics |= {"learning_rate": schedule(done * config.updates_per_step - 1)}
        if run.completions_due(done):
            texts_PG = tokenizer.decode(rollout.tokens_PGT, rollout.lengths_PG)
            asked = prompts.prompts(groups.rows)
            run.write_table(done, completion_table(asked, texts_PG, groups, list(rewards.scorers), advantages_PG))
        if config.validation.due(done, config.max_steps):
            with timer("validation"):
                metrics |= evaluate(state, done)
        seconds = time.perf_counter() - began
        metrics |= {**timer.seconds, "timing_s/step": seconds}
        metrics |= throughput(config, network, drawn, seconds)
        run.write(done, metrics)
        run.show(done, {name: metrics.get(name, math.nan) for name in ("reward", "kl", "perf/tokens_per_s")})
        if run.checkpoint_due(done):
            run.save(done, state)
    run.close()


def make_advantages(config: PolicyConfig) -> Callable[..., np.ndarray]:
    """(rewards_PGR, penalty_PG) -> advantages_PG, jitted; a penalty is taken off the combined reward."""
    weights_R = np.array([spec.weight for spec in config.rewards], np.float32)
    apart = config.takes_every_reward
    options = config.advantage_options | ({"weights_R": weights_R} if apart else {})
    function = jax.jit(partial(config.advantage_function, **options))

    def advantages(rewards_PGR: np.ndarray, penalty_PG: Any = 0.0) -> np.ndarray:
        if apart:
            return np.asarray(function(rewards_PGR))
        return np.asarray(function(combine(rewards_PGR, weights_R, config.reward_combination) - penalty_PG))

    shape = (config.prompts_per_step, config.num_generations)
    found = advantages(np.zeros((*shape, len(weights_R)), np.float32))
    if found.shape != shape:
        raise ValueError(f"advantage: {config.advantage}: expected advantages of shape {shape}, got {found.shape}")
    return advantages


def logprobs_of(graphdef: Any, config: PolicyConfig, params: Any, batch: dict[str, jax.Array], **options: Any) -> Any:
    """Tempered log-probabilities of the sampled tokens, [P, G, T]; with_entropy: entropies too."""
    model, tokens_PBT = nnx.merge(graphdef, params), batch["tokens_PBT"]
    hidden_PBTD = model.predict(batch["prompt_PS"], batch["lengths_P"], tokens_PBT, batch["offset_PBT"])
    options |= {"chunk_tokens": config.loss.logprob_chunk, "temperature": config.temperature}
    found_PBT = model.logprobs(hidden_PBTD, tokens_PBT, **options)
    return jax.tree.map(lambda array_PBT: unpack(array_PBT, batch["slot_PGT"]), found_PBT)


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
    settings, mask_PGT, sampled_PGT = config.loss, batch["mask_PGT"], batch["sampled_PGT"]
    logprobs_PGT, entropy_PGT = logprobs_of(graphdef, config, join(params, frozen), batch, with_entropy=True)
    now_PGT = jax.lax.stop_gradient(logprobs_PGT)
    old_PGT, ref_PGT = batch.get("old_PGT", now_PGT), batch.get("ref_PGT")
    if settings.beta and ref_PGT is None:
        ref_PGT = jax.lax.stop_gradient(logprobs_of(graphdef, config, join(ref_params, frozen), batch))
    penalized = settings.beta > 0 and settings.kl_in == "loss"
    weights_PGT = None
    if settings.importance_sampling_mode is not None:
        bounds = {"clip_max": settings.importance_sampling_clip_max, "clip_min": settings.importance_sampling_clip_min}
        mode = settings.importance_sampling_mode
        weights_PGT = sampler_correction(old_PGT, sampled_PGT, mask_PGT, mode=mode, **bounds)
    loss, metrics = policy_loss(
        logprobs_PGT,
        old_PGT,
        token_broadcast(batch["advantages_PG"], mask_PGT.shape[-1], settings.token_broadcast),
        mask_PGT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        ratio=settings.ratio,
        surrogate=settings.surrogate,
        surrogate_options=settings.surrogate_options,
        weights=weights_PGT,
        aggregate=settings.aggregate,
        denominator=denominator,
        max_length=config.max_completion_length,
        kl=settings.kl if penalized else None,
        ref_logprobs=ref_PGT if penalized else None,
        beta=settings.beta if penalized else 0.0,
    )
    count = mask_PGT.sum(dtype=jnp.float32)
    metrics["entropy"] = (jnp.where(mask_PGT, entropy_PGT, 0).sum(), count)
    if ref_PGT is not None and not penalized:  # it is in the reward, and worth seeing
        kl_PGT = kl_penalty(jnp.where(mask_PGT, now_PGT, 0), jnp.where(mask_PGT, ref_PGT, 0), settings.kl)
        metrics["kl"] = (kl_PGT.sum(), count)
    metrics |= sampling_metrics(old_PGT, sampled_PGT, mask_PGT, weights_PGT)
    return loss, jax.lax.stop_gradient(metrics)


def make_update(graphdef: Any, optimizer: Any, config: PolicyConfig, layout: Layout, state: TrainState) -> Update:
    objective = partial(policy_objective, graphdef=graphdef, config=config)
    return Update(objective, partial(logprobs_of, graphdef, config), optimizer, config, layout, state)


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
    drawn = generator.complete(state.all_params, prompts, key, G, settings.batch_prompts)
    texts_PG, lengths_PG, finished_PG, tokens_PGT = drawn
    mine = share(len(rows))
    ids_PG = completion_ids(tokens_PGT[mine], lengths_PG[mine])
    rewards_PGR = rewards.score(prompts[mine], texts_PG[mine], validation.columns(rows, mine), ids_PG)
    rewards_PG, metrics = rewards.combine(rewards_PGR), rewards.metrics(rewards_PGR)
    table = [
        {
            "prompt_id": p,
            "prompt": prompts[p],
            "completion": texts_PG[p][g],
            "reward": None if math.isnan(rewards_PG[p, g]) else float(rewards_PG[p, g]),
            "length": int(lengths_PG[p, g]),
            "stop_reason": "stop" if finished_PG[p, g] else "length",
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
