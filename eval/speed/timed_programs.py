"""Times the compiled programs of a policy's step on one device: sampling, gradient, optimizer, and the whole update.

    python -m eval.speed.timed_programs SETTINGS.json FIGURES.json

SETTINGS.json has `program`: "machine" (what this machine is), or "step" with `arguments`, a command line of `python -m
train policy`, and `repeats`. Files that the arguments name are not read: weights and prompts are random, and every
completion has max_completion_length tokens. FIGURES.json is written anew after every program, so that what was measured
survives if the process is ended. It is a process of its own since peak memory cannot be reset, and since what one
process has of a device's memory another cannot use.
"""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from eval.speed.machine import copy_gbytes, matmul_gflops
from eval.speed.timing import END_ID, median_seconds, process_peak_bytes, write_figures
from models.compile_cache import enable_compile_cache
from models.generate import SamplingCopy, known_drawing, sampling_program
from models.hf_weights import abstract_model, split
from models.sampler import Rollout, SamplingParams
from models.sharding import Layout, fetch, parameter_shardings
from train.batch import Batch
from train.build import make_optimizer, policy_layout
from train.config import PolicyConfig
from train.packing import microbatches
from train.parse import parse
from train.plan.chips import CHIPS, chip_of
from train.state import TrainState, copy_tree, make_state
from train.update import Update

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "flax", "optax", "torch", "transformers")


def time_programs(
    config: PolicyConfig, repeats: int, report: Callable[[dict[str, float]], None] = lambda figures: None
) -> dict[str, float]:
    """Returns median seconds and peak bytes of a step's programs, with the arrays in memory that a run has there.

    Args:
      config: `model.architecture` is the network; no file that it names is read.
      repeats: timed calls of each program, after one that compiles it.
      report: called with all figures so far after each program.
    """
    device = jax.devices()[0]
    layout = policy_layout(config, [device])
    graphdef, state = random_state(config, layout)
    reference = copy_tree(state.params) if config.loss.beta else None
    figures: dict[str, float] = {}

    seconds, rollout = sampling_seconds(config, graphdef, state, layout, repeats)
    figures |= {"sample_s": seconds, "sample_peak_bytes": peak_bytes(device)}
    report(figures)

    batch = full_batch(config, rollout)
    del rollout
    for name, value in update_seconds(config, graphdef, state, reference, batch, layout, repeats).items():
        figures |= {name: value, "step_peak_bytes": peak_bytes(device)}
        report(figures)
    return figures


def random_state(config: PolicyConfig, layout: Layout) -> tuple[Any, TrainState]:
    """Returns the graphdef of the config's network, and a state with random weights."""
    network = config.model.architecture
    options: dict[str, Any] = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    options |= {"remat": config.model.remat, "layout": layout}
    model = abstract_model(network, **options)  # type: ignore[arg-type]
    init = jax.jit(
        lambda: split(type(model)(network, nnx.Rngs(0), **options))[1],  # type: ignore[arg-type]
        out_shardings=parameter_shardings(model, layout),
    )
    return split(model)[0], make_state(init(), make_optimizer(config.optimizer, config.max_steps)[0], layout)


def random_prompts(config: PolicyConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompt_PS of random tokens, each of max_prompt_length, and lengths_P."""
    P, S = config.prompts_per_step, config.max_prompt_length
    assert config.model.architecture is not None
    tokens_PS = np.random.default_rng(0).integers(END_ID + 1, config.model.architecture.vocab_size, (P, S))
    return tokens_PS.astype(np.int32), np.full(P, S, np.int32)


def sampling_seconds(
    config: PolicyConfig, graphdef: Any, state: TrainState, layout: Layout, repeats: int
) -> tuple[float, Rollout]:
    """Returns the median seconds of sampling a step's completions, prompts included, and completions on the host."""
    P, T = config.prompts_per_step, config.max_completion_length
    prompt_PS, lengths_P = random_prompts(config)
    prompts = (layout.put(prompt_PS, ("prompt", None)), layout.put(lengths_P, ("prompt",)))
    numbers = layout.put(np.arange(P, dtype=np.int32), ("prompt",))
    sampling = SamplingParams(config.temperature, config.top_k, config.top_p, T, np.array([END_ID], np.int32))
    weights = SamplingCopy(graphdef, state.all_params, layout, config.mesh.decoding)(state.all_params)
    program = sampling_program(graphdef, T, 0)
    options = {"num_generations": config.num_generations, "drawing": known_drawing(weights, sampling)}
    seconds, rollout = median_seconds(
        lambda: program(weights, *prompts, numbers, jax.random.key(0), sampling, **options),
        repeats,
        jax.block_until_ready,
    )
    return seconds, jax.tree.map(fetch, rollout)


def full_batch(config: PolicyConfig, rollout: Rollout) -> Batch:
    """Returns the batch of an update in which every token counts; advantages are random."""
    P, G, T = rollout.tokens_PGT.shape
    advantages_PG = np.random.default_rng(0).normal(size=(P, G)).astype(np.float32)
    arrays = (np.asarray(rollout.tokens_PGT), np.asarray(rollout.logprobs_PGT), np.ones((P, G, T), bool))
    return Batch(*random_prompts(config), *arrays, advantages_PG)


def update_seconds(
    config: PolicyConfig,
    graphdef: Any,
    state: TrainState,
    reference: Any,
    batch: Batch,
    layout: Layout,
    repeats: int,
) -> dict[str, float]:
    """Returns median seconds of an update of the whole batch, of one micro-batch's gradient, and of the optimizer.

    `state` is donated.
    """
    update = Update(graphdef, make_optimizer(config.optimizer, config.max_steps)[0], config, layout, state)

    def update_once() -> Any:
        nonlocal state
        state, metrics = update.optimizer_step(state, reference, batch)
        return state, metrics

    seconds = {"update_s": median_seconds(update_once, repeats, jax.block_until_ready)[0]}

    _, micro = next(microbatches(batch, config.microbatch_prompts, layout))
    gradient, count = update.programs.zero_grads(state.params), np.float32(batch.mask_PGT.sum())
    denominator = layout.put(count, ())

    def accumulate_once() -> Any:
        nonlocal gradient
        gradient, metrics = update.programs.accumulate(gradient, state, reference, micro, denominator)
        return gradient, metrics

    def apply_once() -> Any:
        nonlocal state
        state, metrics = update.programs.apply_gradients(state, gradient)
        return state, metrics

    seconds["gradient_s"] = median_seconds(accumulate_once, repeats, jax.block_until_ready)[0]
    seconds["optimizer_s"] = median_seconds(apply_once, repeats, jax.block_until_ready)[0]
    return seconds


def peak_bytes(device: jax.Device) -> float:
    """Returns the most bytes of the device's memory that were in use so far; on a CPU those of the process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    return process_peak_bytes()


def machine_facts(dtype: str) -> dict[str, Any]:
    """Returns this machine's device, its peaks (the maker's, else measured ones), and versions.

    Args:
      dtype: of the matrix products that are measured where no maker's peak is known.
    """
    device = jax.devices()[0]
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.platform != "cpu":
        versions["runtime"] = " ".join(device.client.platform_version.split())
    chip = chip_of(device.device_kind)
    peak, bandwidth = (CHIPS[chip].flops, CHIPS[chip].bandwidth) if chip else (None, None)
    return {
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "devices": len(jax.devices()),
        "cpu_cores": os.cpu_count(),
        "versions": versions,
        "peak_source": "measured" if None in (peak, bandwidth) else "the maker's",
        "peak_flops": peak or matmul_gflops(dtype) * 1e9,
        "bandwidth": bandwidth or copy_gbytes() * 1e9,
    }


def main(settings_file: str, figures_file: str) -> None:
    """Runs what the settings in a file name: `machine_facts`, or `time_programs`."""
    enable_compile_cache()
    settings, report = json.loads(Path(settings_file).read_text()), partial(write_figures, figures_file)
    if settings["program"] == "machine":
        report(machine_facts(settings["dtype"]))
    else:
        time_programs(parse(PolicyConfig, settings["arguments"]), settings["repeats"], report)


if __name__ == "__main__":
    main(*sys.argv[1:])
