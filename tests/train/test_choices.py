"""Entropy and covariance in the update: what is chosen, and what it changes, does not depend on the micro-batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoint import load_model
from models.hf_weights import split
from models.sharding import make_layout
from train.batch import Batch, make_batch
from train.build import make_optimizer
from train.choices import with_token_choices
from train.config import LossConfig, OptimizerConfig, PolicyConfig
from train.packing import microbatches
from train.state import make_state
from train.update import Update

ON: dict[str, Any] = {"top_entropy_quantile": 0.3, "clip_cov_ratio": 0.1, "clip_cov_lb": 0.0, "clip_cov_ub": 9.0}
ON |= {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7, "entropy_coef": 0.5}


@pytest.fixture(scope="module")
def configure(
    policy_config: Callable[..., PolicyConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PolicyConfig]:
    """configure(loss settings, **others): two updates by plain gradients in all but name."""

    def make(loss: dict[str, Any], **overrides: Any) -> PolicyConfig:
        optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, adam_epsilon=10.0, max_grad_norm=1e9)
        settings = {"num_iterations": 2, "optimizer": optimizer, "loss": LossConfig(beta=0.0, **loss)}
        return policy_config(tmp_path_factory.getbasetemp() / "nowhere", **(settings | overrides))

    return make


def test_micro_batches_change_nothing(
    configure: Callable[..., PolicyConfig], update_once: Callable[..., Any], make_groups: Callable[..., Any]
) -> None:
    config = configure(ON)
    groups = make_groups(config)
    whole, parts = (update_once(replace(config, microbatch_prompts=n), groups) for n in (4, 1))
    for name in whole.metrics:
        assert parts.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.after.params, parts.after.params)
    tokens = whole.batch.mask_PGT.sum()
    # a group's first tokens are predicted alike: they are chosen together
    assert whole.metrics["top_entropy/frac"] == pytest.approx(0.3, abs=config.num_generations / tokens)
    assert whole.metrics["clip_cov/frac"] == pytest.approx(int(0.1 * tokens) / tokens)
    assert whole.metrics["kl_cov/frac"] == pytest.approx(int(0.2 * tokens) / tokens)
    assert whole.metrics["kl_cov/penalty"] > 0
    bonus = whole.metrics["policy_loss"] - whole.metrics["loss"]
    assert bonus > 0.5 * 0.9 * whole.metrics["entropy"], "the mean of those with the highest entropies"


def test_settings_that_are_off_change_no_program(configure: Callable[..., PolicyConfig]) -> None:
    """Quantile 1 and coefficients of 0 need no pass before the update, and no more arguments."""
    config = configure({}, num_iterations=1)
    assert not config.loss.token_choices and not config.logprobs_before_update
    batch: Any = object()
    assert with_token_choices(batch, config, 0) is batch
    for name in ("top_entropy_quantile", "clip_cov_ratio"):
        assert configure({name: 0.5}, num_iterations=1).logprobs_before_update


def gradients(update: Update, state: Any, batch: Batch, denominator: Any) -> Any:
    (_, micro), *rest = microbatches(batch, update.config.microbatch_prompts, update.layout)
    assert not rest
    return update.programs.accumulate(update.programs.zero_grads(state.params), state, None, micro, denominator)


def test_tokens_that_are_not_chosen_have_no_gradient(
    configure: Callable[..., PolicyConfig], make_groups: Callable[..., Any]
) -> None:
    """Left out by entropy or covariance is as weight 0: the gradient is the sum of the two parts' by themselves, and
    the mean stays over all tokens."""
    config = configure({}, microbatch_prompts=4)
    layout = make_layout(data=1)
    graphdef, params = split(load_model(str(config.model.path), mesh=layout))
    optimizer, _ = make_optimizer(config.optimizer, 1)
    state = make_state(params, optimizer, layout)
    update = Update(graphdef, optimizer, config, layout, state)
    groups = make_groups(config)
    batch = make_batch(groups, config)
    rng = np.random.default_rng(1)
    batch = batch._replace(advantages_PG=rng.normal(size=batch.mask_PGT.shape[:2]).astype(np.float32))
    some_PGT, count = rng.random(batch.mask_PGT.shape) < 0.4, np.float32(batch.mask_PGT.sum())
    whole, _ = gradients(update, state, batch, count)
    some, metrics = gradients(update, state, batch._replace(top_entropy_PGT=some_PGT), count)
    others, _ = gradients(update, state, batch._replace(clip_cov_PGT=some_PGT), count)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, atol=1e-6), some, others, whole)
    total, tokens = metrics["top_entropy/frac"]
    assert (float(total), float(tokens)) == ((some_PGT & batch.mask_PGT).sum(), batch.mask_PGT.sum())


@pytest.mark.parametrize(
    ("loss", "others", "message"),
    [
        ({"top_entropy_quantile": 1.5}, {}, "loss.top_entropy_quantile: expected a number in \\[0, 1\\], got 1.5"),
        ({"clip_cov_ratio": -0.1}, {}, "loss.clip_cov_ratio: expected a number in \\[0, 1\\], got -0.1"),
        (
            {"clip_cov_ratio": 0.1, "clip_cov_lb": 6.0},
            {},
            "loss.clip_cov_lb: expected a number below clip_cov_ub = 5.0",
        ),
        ({"clip_cov_ub": 6.0}, {}, "loss.clip_cov_lb, loss.clip_cov_ub: are of Clip-Cov; set loss.clip_cov_ratio"),
        ({"ppo_kl_coef": 2.0}, {}, "loss.ppo_kl_coef: is of KL-Cov; set loss.kl_cov_ratio above 0"),
        ({"kl_cov_ratio": 0.1}, {"num_iterations": 1}, "loss.kl_cov_ratio: needs several updates per batch"),
        ({"entropy_coef": float("nan")}, {}, "entropy_coef: expected a finite number, got nan"),
    ],
    ids=["quantile", "share", "bounds", "bounds of nothing", "penalty of nothing", "one update", "no number"],
)
def test_settings_that_make_no_sense_are_refused(
    configure: Callable[..., PolicyConfig], loss: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(loss, **others)
