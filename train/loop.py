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
from functools import partial
from typing import Any

import jax

from models.generate import Generator
from models.hf_weights import split
from models.sharding import Layout, fetch, to_host
from train.batch import Groups, choose, completion_table, is_enough, make_batch
from train.build import make_model, make_optimizer, make_tokenizer, policy_layout
from train.config import PolicyConfig
from train.console import console
from train.data.prompts import Prompts, load_prompts
from train.objective import logprobs_of, make_advantages, policy_objective
from train.processes import share
from train.rewards import Rewards
from train.rewards.functions import completion_ids
from train.run.directory import Run
from train.run.metrics import Timer, require_finite, rollout_metrics, throughput
from train.running import setup_errors
from train.state import TRAIN, VALIDATION, TrainState, copy, make_state, stream_key
from train.update import Update


def train_policy(config: PolicyConfig) -> None:
    """Run, or go on with, the run in `config.output_dir`.

    Raises:
      SetupError: a mistake in the config or the data, before anything is computed.
    """
    with setup_errors():
        layout = policy_layout(config)
        tokenizer = make_tokenizer(config.model, config.chat)
        prompts, validation = load_prompts(config, tokenizer)
        for count in filter(None, (config.prompts_per_step, len(validation.rows[: config.validation.prompts]))):
            share(count)  # fewer prompts than processes are refused here
        advantages = make_advantages(config)  # a wrong option is refused here, before a reward model is read
        columns = [name for name in prompts.other_columns if not len(validation) or name in validation.other_columns]
        rewards = Rewards(config.rewards, layout, config.model.dtype, config.reward_combination, columns)
        rewards.check(prompts.prompts(prompts.rows[:1])[0])
        model = make_model(config.model, config.lora, layout, config.seed, tokenizer)
        graphdef, params, network = *split(model), model.config
        run = Run(config, model.config.to_hf(), tokenizer)
        optimizer, schedule = make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
        first = make_state(params, optimizer, layout)
        ref_params = copy(first.params) if config.loss.beta else None  # adapters: fresh ones change nothing
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
                key = stream_key(config.seed, TRAIN, step, attempt)
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
    key = stream_key(config.seed, VALIDATION, step)
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
