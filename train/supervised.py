"""The loop that `train sft` and `train reward` share: batches of token rows, a loss, validation, checkpoints."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gopo_jax.losses import Metrics
from models.config import POLICY
from models.hf_weights import split
from models.lora import join
from models.sharding import Layout
from models.tokenizer import Tokenizer
from train import state as training
from train.config import ChatConfig, SupervisedConfig
from train.metrics import Run, Timer, console, divide, setup_errors
from train.prompts import Row, hold_out, load_rows, shuffled
from train.state import TrainState

Batch = dict[str, np.ndarray]


class Task(NamedTuple):
    """What differs between the two: how a row becomes tokens, and the loss of a batch."""

    encode: Callable[[Sequence[Row], Tokenizer, str, ChatConfig], list[Any]]  # (.., source, chat) -> examples
    length: Callable[[Any], int]  # the longest token row of an example
    collate: Callable[[Sequence[Any], Tokenizer, int], Batch]  # (examples, tokenizer, max_length) -> arrays
    objective: Callable[..., tuple[jax.Array, Metrics]]  # (params, batch, graphdef) -> loss, metrics
    baselines: Callable[[Sequence[Any]], dict[str, float]]  # of the validation examples
    architecture: str = POLICY


def train_supervised(config: SupervisedConfig, task: Task) -> None:
    """Run, or go on with, the run in `config.output_dir`.

    Raises:
      SetupError: a mistake in the config or the data, before anything is computed.
    """
    with setup_errors():
        layout = training.make_layout_for(config.mesh, config.batch_size)
        tokenizer = training.make_tokenizer(config.model, config.chat)
        examples, held_out = load_examples(config, task, tokenizer)
        model = training.make_model(config.model, config.lora, layout, config.seed, tokenizer, task.architecture)
        graphdef, params = split(model)
        run = Run(config, model.config.to_hf(), tokenizer)
        optimizer, schedule = training.make_optimizer(config.optimizer, config.max_steps)
        state = run.resume(training.make_state(params, optimizer, layout))
        del model, params  # a resumed run has others

    objective = partial(task.objective, graphdef=graphdef)
    update = make_update(objective, optimizer, state)
    judge = jax.jit(lambda params, batch: objective(params, batch)[1])
    baselines = task.baselines(held_out)

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, list[tuple[float, float]]] = {}
        for start in range(0, len(held_out), config.batch_size):
            batch = held_out[start : start + config.batch_size]
            arrays = task.collate(batch, tokenizer, config.max_length)
            found = judge(state.all_params, put(layout, fill(arrays, config.batch_size)))
            for name, pair in jax.device_get(found).items():
                totals.setdefault(name, []).append(pair)
        means = {name: float(np.sum([p[0] for p in v]) / np.sum([p[1] for p in v])) for name, v in totals.items()}
        return {f"validation/{name}": value for name, value in (means | baselines).items()}

    if run.start == 0 and held_out:
        run.write(0, evaluate(state))
    for step in run.steps():
        began, timer = time.perf_counter(), Timer()
        batch = [examples[i] for i in shuffled(len(examples), config.batch_size, config.seed, step)]
        arrays = task.collate(batch, tokenizer, config.max_length)
        with timer("update"):
            state, learned = update(state, put(layout, fill(arrays, config.batch_size)))
            metrics = divide(learned)
        done = step + 1
        metrics |= {"learning_rate": schedule(step), "epoch": done * config.batch_size / len(examples)}
        if held_out and (done % config.eval_steps == 0 or done == config.max_steps):
            with timer("validation"):
                metrics |= evaluate(state)
        run.write(done, metrics | timer.seconds | {"timing_s/step": time.perf_counter() - began})
        run.show(done, {name: metrics[name] for name in ("loss", "accuracy") if name in metrics})
        if run.checkpoint_due(done):
            run.save(done, state)
    run.close()


def load_examples(config: SupervisedConfig, task: Task, tokenizer: Tokenizer) -> tuple[list[Any], list[Any]]:
    """Encoded rows to train on and to validate on, those that fit into max_length; how many did not is printed."""
    data = config.data

    def load(source: str, split_name: str) -> list[Any]:
        return task.encode(load_rows(source, split_name, data.columns), tokenizer, source, config.chat)

    train, held_out = load(data.train, data.split), []
    if data.validation_rows:
        kept, out = hold_out(len(train), data.validation_rows, data.split_seed)
        train, held_out = [train[i] for i in kept], [train[i] for i in out]
    elif data.validation is not None:
        held_out = load(data.validation, data.validation_split)
    fit = [
        fitting(examples, source, config.max_length, task)
        for examples, source in ((train, data.train), (held_out, data.validation or f"{data.train}, held out"))
    ]
    return fit[0], fit[1]


def fitting(examples: Sequence[Any], source: str, max_length: int, task: Task) -> list[Any]:
    """Those of 2 to max_length tokens; how many are not is printed."""
    kept = [example for example in examples if 2 <= task.length(example) <= max_length]
    if examples:
        left_out = len(examples) - len(kept)
        console.print(f"{source}: {len(kept)} rows ({left_out} left out, not of 2 to {max_length} tokens)")
    if examples and not kept:
        raise ValueError(f"{source}: none of the {len(examples)} rows has 2 to max_length = {max_length} tokens")
    return kept


def make_update(
    objective: Callable[..., tuple[jax.Array, Metrics]], optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """One optimizer step on a batch, jitted; the state's buffers are reused, its shardings kept."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(training.shardings(state), None))
    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        of_trained = lambda params: objective(join(params, state.frozen), batch)  # noqa: E731
        (loss, metrics), gradient = jax.value_and_grad(of_trained, has_aux=True)(state.params)
        one = jnp.ones(())
        metrics |= {"loss": (loss, one), "grad_norm": (optax.tree.norm(gradient), one)}
        return training.apply(optimizer, state, gradient), metrics

    return update


def fill(batch: Batch, size: int) -> Batch:
    """Rows up to the batch size, masked out: one shape, nothing new to compile."""
    missing = size - len(next(iter(batch.values())))
    batch = {name: np.concatenate([array, np.repeat(array[-1:], missing, 0)]) for name, array in batch.items()}
    return batch | {"real_B": np.arange(size) < size - missing}


def put(layout: Layout, batch: Batch) -> dict[str, jax.Array]:
    return {name: layout.put(array, ("prompt", *(None,) * (array.ndim - 1))) for name, array in batch.items()}
