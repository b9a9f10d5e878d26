"""What tests of one update share: completions that nobody sampled, and the programs that learn from them."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoint import load_model
from models.hf_weights import split
from models.sampler import Rollout
from models.sharding import make_layout
from train.batch import Batch, Groups, make_batch
from train.build import make_optimizer
from train.config import PolicyConfig
from train.objective import make_advantages
from train.run.metrics import fetch_metrics
from train.state import TrainState, copy_tree, make_state
from train.update import Update

VOCABULARY = 300  # of the tiny policy


def random_groups(config: PolicyConfig, rewards_PG: np.ndarray | None = None) -> Groups:
    """Completions of unequal lengths; where no rewards are given, one is unscorable and a group has equal ones."""
    P, G, S, T = config.prompts_per_step, config.num_generations, 6, config.max_completion_length
    rng = np.random.default_rng(0)
    random_PG = rng.normal(size=(P, G)).astype(np.float32)
    random_PG[0, 1], random_PG[1] = np.nan, 3.0
    rollout = Rollout(
        jnp.asarray(rng.integers(0, VOCABULARY, (P, G, T))),
        jnp.asarray(rng.normal(-3, 1, (P, G, T)), jnp.float32),
        jnp.asarray(rng.integers(1, T + 1, (P, G))),
        jnp.ones((P, G), bool),
    )
    rewards_PG = random_PG if rewards_PG is None else rewards_PG
    prompt_PS, lengths_P = rng.integers(0, VOCABULARY, (P, S)), rng.integers(1, S + 1, P)
    return Groups([], prompt_PS, lengths_P, rollout, rewards_PG[..., None])


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., Groups]:
    """make_groups(config, rewards_PG=None): see `random_groups`."""
    return random_groups


class Updated(NamedTuple):
    batch: Batch  # what was learned from, advantages and all
    after: TrainState
    metrics: dict[str, float]


@pytest.fixture(scope="session")
def update_once() -> Callable[..., Updated]:
    """update_once(config, groups): steps 5 to 7 of the loop, on the policy that the config names.

    The reference is another policy, so that a KL penalty has a gradient at once. Configs that differ in their
    advantages alone share their compiled programs.
    """
    programs: dict[str, Update] = {}
    layout = make_layout(data=1)

    def update(config: PolicyConfig, groups: Groups) -> Updated:
        graphdef, params = split(load_model(str(config.model.path), mesh=layout))
        optimizer, _ = make_optimizer(config.optimizer, config.max_steps * config.updates_per_step)
        state = make_state(copy_tree(params), optimizer, layout)
        same = replace(config, output_dir="x", advantage="gopo", advantage_options={}, rewards=config.rewards[:1])
        key = repr(replace(same, rewards=[replace(same.rewards[0], options={})], dynamic_sampling_attempts=1))
        if key not in programs:
            programs[key] = Update(graphdef, optimizer, config, layout, state)
        ref_params = jax.tree.map(lambda p: p * 1.01, params) if config.loss.beta else None
        batch, penalty_PG = programs[key].old_and_ref_logprobs(state, ref_params, make_batch(groups, config))
        batch = batch._replace(advantages_PG=make_advantages(config)(groups.rewards_PGR, penalty_PG))
        after, updates = programs[key](state, ref_params, batch, 0)
        return Updated(batch, after, fetch_metrics(updates))

    return update
