"""Times an update whose prompts differ in length, and the same with every prompt padded to the longest of the batch.

    python -m bench.prompt_widths [ROUNDS]

The work is that of `eval speed --workload w2` (512 + 64 tokens, 8 completions of a prompt, micro-batches of 2), with 16
prompts of 32 to 512 tokens. The two take turns in one process, after a call of each that compiles.
"""

import statistics
import sys
import time

import jax
import numpy as np

import train.packing
from eval.speed.timed_programs import random_state
from eval.speed.workloads import WORKLOADS
from models.sharding import make_layout
from train.batch import Batch
from train.build import make_optimizer
from train.config import DataConfig, ModelConfig, PolicyConfig, RewardSpec
from train.state import copy_tree
from train.update import Update

P, SHORTEST = 16, 32


def main(rounds: int) -> None:
    work = WORKLOADS["w2"]
    config = PolicyConfig(
        output_dir="unused",
        model=ModelConfig(architecture=work.network, tokenizer="unused"),
        data=DataConfig(train="unused"),
        rewards=[RewardSpec(function="eval.speed.workloads.even_share")],
        max_steps=1,
        prompts_per_step=P,
        microbatch_prompts=work.microbatch_prompts,
        max_prompt_length=work.prompt,
        max_completion_length=work.completion,
    )
    layout, rng = make_layout(), np.random.default_rng(0)
    graphdef, state = random_state(config, layout)
    update = Update(graphdef, make_optimizer(config.optimizer, 1)[0], config, layout, state)
    reference = copy_tree(state.params)
    lengths_P = np.linspace(SHORTEST, work.prompt, P).astype(np.int32)
    shape, V = (P, work.num_generations, work.completion), work.network.vocab_size
    batch = Batch(
        prompt_PS=np.where(np.arange(work.prompt) < lengths_P[:, None], rng.integers(2, V, (P, work.prompt)), 0),
        lengths_P=lengths_P,
        tokens_PGT=rng.integers(2, V, shape).astype(np.int32),
        sampled_PGT=np.zeros(shape, np.float32),
        mask_PGT=np.ones(shape, bool),
        advantages_PG=rng.normal(size=shape[:2]).astype(np.float32),
    )
    seconds: dict[str, list[float]] = {"own width": [], "full width": []}
    own_width = train.packing.prompt_width
    for turn in range(1 + rounds):
        for name, width in (("own width", own_width), ("full width", lambda longest, S, *_: S)):
            train.packing.prompt_width = width
            began = time.perf_counter()
            state, metrics = update.optimizer_step(state, reference, batch)
            jax.block_until_ready((state, metrics))
            seconds[name] += [time.perf_counter() - began] if turn else []
    own, full = (statistics.median(values) for values in seconds.values())
    print(f"update: own width {own:.2f} s, full width {full:.2f} s, {full / own:.2f} times; medians of {rounds}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
