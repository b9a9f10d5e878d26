"""The update: gradients of micro-batches add up in float32, whatever the parameters are stored in."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import train.packing
from models.checkpoint import load_model
from models.hf_weights import split
from models.sharding import make_layout
from train.batch import make_batch
from train.build import make_optimizer
from train.config import LossConfig, OptimizerConfig, PolicyConfig
from train.objective import make_advantages
from train.packing import microbatches
from train.run.metrics import fetch_metrics
from train.state import copy_tree, make_state
from train.update import Update


@pytest.mark.parametrize("master", [False, True], ids=["rounded", "master weights"])
def test_many_small_gradients_add_up(
    master: bool, policy_config: Callable[..., PolicyConfig], make_groups: Callable[..., Any], tmp_path: Path
) -> None:
    """300 times a gradient is 300 times as much; a sum in bfloat16 would stop at 256 times."""
    model = replace(policy_config(tmp_path).model, param_dtype="bfloat16")
    config = policy_config(
        tmp_path, model=model, optimizer=OptimizerConfig(master_weights=master), loss=LossConfig(beta=0.0)
    )
    layout = make_layout()
    graphdef, params = split(load_model(str(model.path), mesh=layout, param_dtype="bfloat16"))
    optimizer, _ = make_optimizer(config.optimizer, 10)
    state = make_state(copy_tree(params), optimizer, layout)
    update = Update(graphdef, optimizer, config, layout, state)
    groups = make_groups(config)
    batch = make_batch(groups, config)
    batch = batch._replace(advantages_PG=make_advantages(config)(groups.rewards_PGR, 0.0))
    _, micro = next(iter(microbatches(batch, config.microbatch_prompts, layout)))

    def summed(times: int) -> Any:
        total = update.programs.zero_grads(state.params)
        for _ in range(times):
            total, _ = update.programs.accumulate(total, state, None, micro, np.float32(100))
        return jax.device_get(total)

    one, many = summed(1), summed(300)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, 300 * a, rtol=1e-4), one, many)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(many)} == {"float32"}

    dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)  # noqa: E731
    before = dtypes(state)
    after, metrics = update.programs.apply_gradients(state, many)
    assert dtypes(after) == before
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(many)))
    assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("spoilt", ["gradient", "loss", None])
def test_an_update_that_is_not_finite_is_left_out_as_a_whole(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, spoilt: str | None
) -> None:
    """Parameters, moments and the count of updates stay as they were."""
    config, layout = policy_config(tmp_path, skip_nonfinite=1), make_layout()
    params = {"layers": {"x": jax.device_put(np.ones(8, np.float32), layout.sharding((None,)))}}
    optimizer, _ = make_optimizer(config.optimizer, 10)
    state = make_state(params, optimizer, layout)
    update = Update(None, optimizer, config, layout, state)
    before = jax.device_get(state)
    gradient = {"layers": {"x": np.full(8, np.nan if spoilt == "gradient" else 1.0, np.float32)}}
    losses = [np.float32(0.5), np.float32(np.inf if spoilt == "loss" else 0.5)]
    after, metrics = update.programs.apply_gradients(state, gradient, losses)
    assert float(metrics["frac_updates_skipped"][0]) == float(spoilt is not None)
    same = jax.tree.map(np.array_equal, before, jax.device_get(after))
    assert all(jax.tree.leaves(same)) == (spoilt is not None)


def test_prompts_cut_to_their_micro_batch_teach_the_same(
    policy_config: Callable[..., PolicyConfig],
    make_groups: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient, metrics and log-probabilities are those of prompts that are all padded to the longest."""
    config = policy_config(tmp_path, num_iterations=2, loss=LossConfig(beta=0.1, logprob_chunk=64))
    groups = make_groups(config)
    lengths_P, S = np.array([3, 40, 7, 33], np.int32), 64
    prompt_PS = np.random.default_rng(3).integers(0, 300, (4, S)) * (np.arange(S) < lengths_P[:, None])
    batch = make_batch(groups._replace(prompt_PS=prompt_PS.astype(np.int32), lengths_P=lengths_P), config)
    batch = batch._replace(advantages_PG=make_advantages(config)(groups.rewards_PGR, 0.0))
    layout = make_layout()
    assert {micro.prompt_PS.shape[1] for _, micro in microbatches(batch, 2, layout)} == {8, 64}
    graphdef, params = split(load_model(str(config.model.path), mesh=layout))
    reference, sgd = jax.tree.map(lambda p: p * 1.01, params), optax.sgd(1.0)  # the step is the gradient
    update = Update(graphdef, sgd, config, layout, make_state(params, sgd, layout))

    def updated() -> tuple[Any, ...]:
        state = make_state(copy_tree(params), sgd, layout)
        filled, _ = update.old_and_ref_logprobs(state, reference, batch)
        after, metrics = update.optimizer_step(state, reference, filled)
        logprobs = [np.where(batch.mask_PGT, array, 0) for array in (filled.old_PGT, filled.ref_PGT)]
        return after.params, fetch_metrics([metrics]), logprobs

    cut = updated()
    monkeypatch.setattr(train.packing, "prompt_width", lambda longest, S, *_: S)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cut, updated())
