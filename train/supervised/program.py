"""The loop that `train sft` and `train reward` share: batches of token rows, a loss, validation, checkpoints."""

import json
import math
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
from models.lora import merge_trainable
from models.sharding import Layout, fetch
from models.tokenizer import Tokenizer
from train.build import make_layout_for, make_model, make_optimizer, make_tokenizer, warn_of_rounding
from train.config import ChatConfig, DataConfig, SupervisedConfig
from train.console import console
from train.data.mix import Mix, join_sources, numbered
from train.data.rows import Row, hold_out, load_rows
from train.pins import Pins
from train.processes import is_first
from train.run.directory import CALIBRATION, Run
from train.run.files import write_whole
from train.run.lock import owns_its_run
from train.run.metrics import Timer, mean_metrics, require_finite
from train.running import setup_errors
from train.state import TrainState, apply_gradient, load_optimizer, make_state, offload_optimizer, tree_shardings
from train.supervised.calibration import expected_calibration_error, reliability_bins
from train.supervised.stopping import EarlyStopping, has_stopped

TokenBatch = dict[str, np.ndarray]


class LossAux(NamedTuple):
    """What an objective returns beside the loss."""

    metrics: Metrics  # "loss" among them
    differences: jax.Array  # for each comparison, the better answer's score minus the other's; NaN: no comparison


class SupervisedTask(NamedTuple):
    """What differs between `train sft` and `train reward`: how rows become tokens, and the loss of a batch."""

    encode: Callable[[Sequence[Row], Tokenizer, str, ChatConfig], list[Any]]  # (.., source, chat) -> examples
    length: Callable[[Any], int]  # tokens of the longest row of an example
    collate: Callable[[Sequence[Any], Tokenizer, int], TokenBatch]  # (examples, tokenizer, max_length) -> arrays
    objective: Callable[..., tuple[jax.Array, LossAux]]  # (params, batch, graphdef) -> loss, aux
    baselines: Callable[[Sequence[Any]], dict[str, float]]  # validation examples -> metrics
    architecture: str = POLICY
    pack: Callable[[list[Any], str], list[Any]] = lambda examples, source: (
        examples
    )  # examples that fit -> rows of a batch


@owns_its_run
def train_supervised(config: SupervisedConfig, task: SupervisedTask, *, previous: bool = False) -> None:
    """Starts or resumes the run in `config.output_dir`.

    Args:
      previous: whether to resume from the checkpoint before the newest one, which is set aside.

    Raises:
      SetupError: a mistake in the config or the data, before anything is computed.
      FloatingPointError: the run has diverged; nothing of the step in which it did is written.
    """
    with setup_errors():
        layout, pins = make_layout_for(config.mesh, config.batch_size), Pins(config)
        start = pins.model(config.model)  # under exact names
        tokenizer = make_tokenizer(start, config.chat)
        examples, held_out, mix = load_mixed_examples(config, task, tokenizer, pins)
        model = make_model(start, config.lora, layout, config.seed, tokenizer, task.architecture)
        graphdef, params = split(model)
        run = Run(config, model.config.to_hf(), tokenizer, pins.pins, previous)
        stopping = EarlyStopping(config.early_stopping)
        if has_stopped(run):
            return
        optimizer, schedule = make_optimizer(config.optimizer, config.max_steps)
        state = run.resume(make_state(params, optimizer, layout))
        warn_of_rounding(config.optimizer, state.params)
        stopping.replay(run, run.origin)
        del model, params  # a resumed run has its own

    objective = partial(task.objective, graphdef=graphdef)
    update = make_supervised_update(objective, optimizer, state)
    if config.optimizer.offload:
        update, state = make_offloaded_update(objective, optimizer, state), offload_optimizer(state)
    evaluate_batch = jax.jit(lambda params, batch: objective(params, batch)[1])

    def arrays(batch: Sequence[Any]) -> dict[str, jax.Array]:
        return put_batch(layout, fill_batch(task.collate(batch, tokenizer, config.max_length), config.batch_size))

    def evaluate(state: TrainState) -> Evaluation:
        evaluation = Evaluation({}, {})
        for name, rows in held_out.items():
            metrics, bins = evaluate_set(rows, partial(evaluate_batch, state.all_params), arrays, config.batch_size)
            metrics |= task.baselines(rows)
            evaluation.metrics.update({f"{name}/{key}": value for key, value in metrics.items()})
            evaluation.bins.update({name: bins} if bins else {})
        return evaluation

    if run.start == 0 and held_out:
        run.write(0, run.validated(0, evaluate(state).metrics))
    for step in run.steps():
        if stopping.exhausted:
            break
        timer = Timer()
        drawn = mix.indices(config.batch_size, config.seed, step)
        batch = [examples[i] for i in drawn]
        with timer("update"):
            state, sums = update(state, arrays(batch))
            sums = jax.device_get(sums)
            metrics = mean_metrics(sums)
        done, best = step + 1, False
        without_value = [name for name, (_, count) in sums.items() if not count]
        require_finite(done, metrics, without_value, "the rows of this step")
        metrics |= {"learning_rate": schedule(step), "epoch": done * config.batch_size / len(examples)}
        metrics |= mix.metrics(drawn, done * config.batch_size)
        if held_out and (done % config.eval_steps == 0 or done == config.max_steps):
            with timer("validation"):
                evaluation = evaluate(state)
            metrics |= run.validated(done, evaluation.metrics)
            best = stopping.observe(done, evaluation.metrics)
            if best or not stopping.enabled:
                write_calibration(run, done, evaluation)
        run.write(done, metrics | timer.take())
        run.show(done, {name: metrics[name] for name in ("loss", "accuracy") if name in metrics})
        if best:
            run.keep_best(done)
        if run.checkpoint_due(done) or best:
            run.save(done, state)
    stopping.finish(run)


class Evaluation(NamedTuple):
    """What is measured on the held-out data."""

    metrics: dict[str, float]
    bins: dict[
        str, list[dict[str, Any]]
    ]  # of each set of comparisons, see `train.supervised.calibration.reliability_bins`


def write_calibration(run: Run, step: int, evaluation: Evaluation) -> None:
    """Writes calibration.json, which holds the last validation or, with early stopping, the best one."""
    if evaluation.bins and is_first():
        run.persist(write_whole, CALIBRATION, json.dumps({"step": step, "sets": evaluation.bins}, indent=1) + "\n")


def evaluate_set(
    examples: Sequence[Any],
    evaluate_batch: Callable[[Any], LossAux],
    arrays: Callable[[Sequence[Any]], Any],
    batch_size: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns metrics averaged over all examples; for comparisons also the calibration error, and its bins."""
    totals: dict[str, list[tuple[float, float]]] = {}
    differences = []
    for start in range(0, len(examples), batch_size):
        metrics, batch_differences = evaluate_batch(arrays(examples[start : start + batch_size]))
        differences.append(fetch(batch_differences).ravel())
        for key, pair in jax.device_get(metrics).items():
            totals.setdefault(key, []).append(pair)
    sums = {key: np.sum(pairs, 0) for key, pairs in totals.items()}
    means = {key: float(total / count) if count else math.nan for key, (total, count) in sums.items()}
    compared = np.concatenate(differences)
    compared = compared[~np.isnan(compared)]
    if not compared.size:
        return means, []
    return means | {"ece": expected_calibration_error(compared)}, reliability_bins(compared)


def load_examples(
    config: SupervisedConfig, task: SupervisedTask, tokenizer: Tokenizer, pins: Pins | None = None
) -> tuple[list[Any], dict[str, list[Any]]]:
    """Returns the first two of `load_mixed_examples`."""
    return load_mixed_examples(config, task, tokenizer, pins)[:2]


def load_mixed_examples(
    config: SupervisedConfig, task: SupervisedTask, tokenizer: Tokenizer, pins: Pins | None = None
) -> tuple[list[Any], dict[str, list[Any]], Mix]:
    """Loads and encodes the rows to train on, each validation set by its metrics' prefix, and the order to train in.

    Rows that do not fit into max_length are left out; their number is printed.

    Args:
      pins: of a run, which goes on with the rows that it was started with.

    Raises:
      ValueError: no row of a data set fits.
    """
    data = config.data

    def load(setting: str, source: str, split_name: str, columns: dict[str, str] = data.columns) -> list[Any]:
        rows = load_rows(source, split_name, columns)
        rows = rows if pins is None else pins.rows(setting, source, rows)
        return task.encode(rows, tokenizer, source, config.chat)

    def short_ones(examples: Sequence[Any], source: str) -> list[Any]:
        short = [example for example in examples if 2 <= task.length(example) <= config.max_length]
        limits = f"2 to {config.max_length} tokens"
        console.print(f"{source}: {len(short)} rows ({len(examples) - len(short)} left out, not of {limits})")
        if not short:
            raise ValueError(
                f"{source}: none of the {len(examples)} rows has 2 to max_length = {config.max_length} tokens"
            )
        return short

    def fitting(examples: Sequence[Any], source: str) -> list[Any]:
        return task.pack(short_ones(examples, source), source)

    parts = [
        load(numbered("data.train", i, data), part.source, str(part.split), part.columns or {})
        for i, part in enumerate(data.sources)
    ]
    (train, owners), held_out = join_sources(parts), {}
    if data.validation_rows:
        remaining, validation = hold_out(len(train), data.validation_rows, data.split_seed)
        held_out["validation"] = fitting([train[i] for i in validation], f"{data.train_text}, held out")
        parts = [[train[i] for i in remaining if owners[i] == number] for number in range(len(parts))]
    elif data.validation is not None:
        rows = load("data.validation", data.validation, data.validation_split)
        held_out["validation"] = fitting(rows, data.validation)
    for name, source in data.held_out.items():
        held_out[f"validation/{name}"] = fitting(load(f"data.held_out.{name}", source, data.validation_split), source)
    short = [short_ones(part, source.source) if part else [] for part, source in zip(parts, data.sources, strict=True)]
    examples, mix = pack_sources(data, task, short)
    return examples, held_out, mix


def pack_sources(data: DataConfig, task: SupervisedTask, parts: Sequence[list[Any]]) -> tuple[list[Any], Mix]:
    """Packs the examples of each source with a weight by themselves, all others together; returns rows and order."""
    if data.weights is not None:
        sources = zip(parts, data.sources, strict=True)
        rows, owners = join_sources([task.pack(part, source.source) if part else [] for part, source in sources])
        return rows, Mix.of_rows(data, owners)
    examples, owners = join_sources(parts)
    rows = task.pack(examples, data.train_text)
    if rows is examples:
        return rows, Mix.of_rows(data, owners)
    return rows, Mix([data.train_text], [len(rows)])  # a row has examples of several sources


def make_supervised_update(
    objective: Callable[..., tuple[jax.Array, LossAux]], optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns the jitted (state, batch) -> state, metrics: one optimizer step, which donates the state's buffers."""

    @partial(jax.jit, donate_argnums=0, out_shardings=(tree_shardings(state), None))
    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        gradient, metrics = gradient_and_metrics(objective, state, batch)
        return apply_gradient(optimizer, state, gradient), metrics

    return update


def make_offloaded_update(
    objective: Callable[..., tuple[jax.Array, LossAux]], optimizer: optax.GradientTransformation, state: TrainState
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """Returns the same step as two programs: the optimizer's state is on the devices for the second alone.

    Args:
      state: on the devices; it fixes where every array lies.
    """
    placement = tree_shardings(state)
    gradients = jax.jit(partial(gradient_and_metrics, objective), out_shardings=(placement.params, None))
    apply = jax.jit(partial(apply_gradient, optimizer), donate_argnums=0, out_shardings=placement)

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        gradient, metrics = gradients(state._replace(opt_state=None), batch)
        return offload_optimizer(apply(load_optimizer(state), gradient)), metrics

    return update


def gradient_and_metrics(
    objective: Callable[..., tuple[jax.Array, LossAux]], state: TrainState, batch: Any
) -> tuple[Any, Metrics]:
    """Returns the gradient of the trained parameters, and the metrics of a step."""
    loss = lambda params: objective(merge_trainable(params, state.frozen), batch)  # noqa: E731
    (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
    return gradient, aux.metrics | {"grad_norm": (optax.tree.norm(gradient), jnp.ones(()))}


def fill_batch(batch: TokenBatch, size: int) -> TokenBatch:
    """Fills a batch up to `size` with rows that `real_B` masks out: every batch has the shape that is compiled."""
    missing = size - len(next(iter(batch.values())))
    batch = {name: np.concatenate([array, np.repeat(array[-1:], missing, 0)]) for name, array in batch.items()}
    return batch | {"real_B": np.arange(size) < size - missing}


def put_batch(layout: Layout, batch: TokenBatch) -> dict[str, jax.Array]:
    """Puts the arrays of a batch on the devices, their first axis sharded as prompts are."""
    return {name: layout.put(array, ("prompt", *(None,) * (array.ndim - 1))) for name, array in batch.items()}
