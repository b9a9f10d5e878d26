"""Group policy optimization, whole: prompts, rollouts, rewards, advantages, loss, update.

Every step of `train_policy`:

    1  prompts      P prompts, a pure function of (seed, step); with dynamic sampling more, until all groups differ
    2  tokens       prompt_PS, right-padded, with lengths
    3  rollouts     G completions each: tokens_PGT, their log-probabilities and lengths; the prompt computed once; with
                    rollout_ahead those of the next step are sampled while this one's rewards are waited for
    4  rewards      rewards_PGR, every reward by itself, and their weighted sum rewards_PG; NaN = unscorable
    5  advantages   ADVANTAGES[name](rewards_PG): the one line in which GOPO and GRPO differ
    6  loss         clipped policy loss and KL penalty on the log-probabilities of the same tokens
    7  update       micro-batches of whole groups, their completions packed into rows; one optimizer step, or several
    8  move the reference policy if that is due; log, validate, checkpoint; a run that nothing can score ends

With one update per batch the policy that is trained is the policy that sampled, so the old log-probabilities are the
new ones without their gradient and need no forward pass. The host waits for rollouts and rewards alone: a step is
logged when the next rollouts are dispatched (`train.run.log`), or at once if it saves something. Steps 5 and 6 are in
`train.objective`, step 7 in `train.update`. Left out on purpose: rollouts on other machines.
"""

from functools import partial

from models.decoding import choose_decoding
from models.generate import Generator
from models.hf_weights import split
from models.sharding import Layout
from models.slots import Part, join_parts
from models.stop_strings import check_stop_strings
from train.batch import Groups, choose, completion_table, is_enough, make_batch
from train.build import generator_options, make_model, make_optimizer, make_tokenizer, policy_layout, warn_of_rounding
from train.config import PolicyConfig
from train.console import console
from train.data.prompts import Prompts, load_prompts
from train.objective import make_advantages
from train.pins import Pins
from train.processes import share
from train.reference import check_reference, make_reference
from train.rewards import Rewards
from train.rewards.parts import PartScores
from train.rewards.watch import ScoreWatch
from train.rollouts import Rollouts, empty_rollouts
from train.run.directory import Run
from train.run.lock import owns_its_run
from train.run.log import StepLog
from train.run.metrics import Timer, rollout_metrics
from train.run.nonfinite import write_batch
from train.running import setup_errors
from train.state import make_state, offload_optimizer
from train.update import Update
from train.validation import Validation, check_best


@owns_its_run
def train_policy(config: PolicyConfig, *, previous: bool = False) -> None:
    """Trains a policy; continues the run in `config.output_dir` if there is one.

    Args:
      previous: whether to continue from the checkpoint before the newest one, which is set aside.

    Raises:
      SetupError: a mistake in the config or the data, before anything is computed; or, all saved, nothing could be
        scored in several steps in a row.
    """
    with setup_errors():
        layout, pins = policy_layout(config), Pins(config)
        start, reward_specs = pins.model(config.model), pins.rewards(config.rewards)  # under exact names
        other = pins.reference(config.model, config.loss.reference)  # None: the reference is the policy at its start
        tokenizer = make_tokenizer(start, config.chat)
        check_stop_strings(config.stop, tokenizer)
        check_reference(other, start)
        check_best(config)
        prompts, validation = load_prompts(config, tokenizer, pins)
        for count in filter(None, (config.prompts_per_step, len(validation.rows[: config.validation.prompts]))):
            share(count)  # fewer prompts than processes are refused here
        advantages = make_advantages(config)  # a wrong option is refused here, before a reward model is read
        columns = [name for name in prompts.other_columns if not len(validation) or name in validation.other_columns]
        settings = (layout, config.model.dtype, config.reward_combination, columns, config.missing_rules)
        rewards = Rewards(reward_specs, *settings)
        own_specs = pins.rewards(config.validation.rewards)
        own_rewards = Rewards(own_specs, layout, config.model.dtype, columns=validation.other_columns)
        rewards.check_data(prompts, validation)
        own_rewards.check_data(validation)
        model = make_model(start, config.lora, layout, config.seed, tokenizer)
        graphdef, params, network = *split(model), model.config
        choose_decoding(config.mesh.decoding, layout, network)  # one that the devices cannot do is refused here
        run = Run(config, model.config.to_hf(), tokenizer, pins.pins, previous)
        optimizer, schedule = make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
        initial = make_state(params, optimizer, layout)
        reference = make_reference(config, other, initial.params, layout, tokenizer)
        beside = reference.abstract | ({"ahead": empty_rollouts(config)} if config.rollout_ahead else {})
        state = run.resume(initial, beside)
        reference.restore(run.restored)
        warn_of_rounding(config.optimizer, state.params)
        del model, params, initial  # a resumed run has other arrays: free these

    options, own = generator_options(config), config.validation.sampling
    generator = Generator(graphdef, tokenizer, layout, **options)
    rollouts = Rollouts(config, prompts, generator, run.restored.get("ahead"))
    run.beside = lambda: rollouts.saved() | reference.saved
    update = Update(graphdef, optimizer, config, layout, state)
    state = offload_optimizer(state) if config.optimizer.offload else state
    watch = ScoreWatch(config.output_dir, list(rewards.scorers), rewards.weights_R, rewards.why_unscorable)
    validating = Generator(graphdef, tokenizer, layout, **options | own) if own else generator
    evaluate = Validation(run, config, validation, rewards, own_rewards, validating, watch)
    for each in (rewards, own_rewards):
        each.belong_to(run.path, config.max_steps, len(prompts) / config.prompts_per_step)
    describe(run, config, prompts, validation, layout)
    if run.start == 0 and config.validation.due(0, config.max_steps):
        run.write(0, run.validated(0, evaluate(state, 0)))

    timer = Timer()
    log = StepLog(run, config, network, timer)
    for step in run.steps():
        rewards.at(step, f"step {step + 1}")
        attempts = list[Groups]()
        while not attempts or not is_enough(attempts, advantages, config):
            # 1 prompts, 2 tokens, 3 rollouts, dispatched to the devices; see Rollouts.draw
            with timer("generate"):
                drawn = rollouts.draw(state.all_params, step, len(attempts))
                log.write()  # the step before: its update ends while these rollouts are dispatched already
            # 4 rewards of the groups that have ended, while others are sampled; of all groups at once by default
            rows, parts = drawn.rows, list[Part]()
            scores = PartScores(rewards, tokenizer, prompts.prompts(rows), prompts.columns(rows))
            for ended in timer.each("generate", drawn.parts):
                parts.append(ended)
                with timer("reward"):
                    scores.add(ended)
            with timer("reward"):
                rewards_PGR = scores.of_all()
            scored = (rewards_PGR, rewards.left_out(rewards_PGR), scores.columns())
            attempts.append(Groups(rows, drawn.prompt_PS, drawn.lengths_P, join_parts(parts), *scored))
        groups = choose(attempts, advantages, config)
        rewards_PG, rollout = rewards.combine(groups.rewards_PGR), groups.rollout
        with timer("update"):
            batch, penalty_PG = update.old_and_ref_logprobs(state, reference.params, make_batch(groups, config))
            # 5 advantages
            advantages_PG = advantages(groups.rewards_PGR, penalty_PG)
            # 6 loss, 7 update
            state, updates = update(state, reference.params, batch._replace(advantages_PG=advantages_PG), step)
        # 8 reference, log, validate, checkpoint
        done = step + 1
        reference.follow(done, state.params)
        metrics = rewards.metrics(groups.rewards_PGR) | reference.metrics(done)
        metrics |= rollout_metrics(rewards_PG, rollout.lengths_PG, rollout.finished_PG)
        metrics |= {"sampling/attempts": len(attempts), "epoch": done * config.prompts_per_step / len(prompts)}
        metrics |= prompts.source_metrics(groups.rows, rewards_PG, done * config.prompts_per_step)
        metrics |= {"learning_rate": schedule(done * config.updates_per_step - 1)}
        names, step_prompts = list(rewards.scorers), prompts.prompts(groups.rows)
        dump = partial(write_batch, config, done, step_prompts, tokenizer, groups, names, advantages_PG)
        log.hold(done, updates, metrics, attempts, dump)
        if run.completions_due(done):
            log.wait()  # here and below: a run that has diverged writes nothing more
            texts_PG = tokenizer.decode(rollout.tokens_PGT, rollout.lengths_PG)
            endings_PG = generator.endings(rollout)
            run.write_table(done, completion_table(step_prompts, texts_PG, groups, names, advantages_PG, endings_PG))
        if config.validation.due(done, config.max_steps):
            log.wait()
            with timer("validation"):
                log.add(run.validated(done, evaluate(state, done)))
        watch.look(f"step {done}", groups.rewards_PGR, rewards_PG)
        if run.checkpoint_due(done) or watch.is_hopeless:
            log.write()
            run.save(done, state)
            timer.restart()  # saving is no part of a step
        if watch.is_hopeless:
            run.close(f"ended after step {done} of {config.max_steps}")
            raise watch.error(done)
    run.close()
    for each in (rewards, own_rewards):
        each.close()


def describe(run: Run, config: PolicyConfig, prompts: Prompts, validation: Prompts, layout: Layout) -> None:
    """Prints the run's data, batch sizes and mesh in three lines."""
    completions = config.prompts_per_step * config.num_generations
    mesh = " x ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
    console.print(
        f"{run.path}: {config.advantage} on {len(prompts)} prompts ({prompts.too_long} left out, longer than "
        f"{config.max_prompt_length} tokens), {len(validation)} to validate on ({validation.too_long} left out)\n"
        f"  per step {config.prompts_per_step} prompts x {config.num_generations} = {completions} completions of up to "
        f"{config.max_completion_length} tokens, in micro-batches of {config.microbatch_prompts} prompts "
        f"({config.microbatch_prompts * config.num_generations} completions); mesh {mesh}"
    )
