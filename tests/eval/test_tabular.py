"""Tabular policies end where the theory says: trained with the real losses on samples, and on exact expectations."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.theory.tabular import TabularProblem, trained, trained_exactly
from gopo_jax.theory import stationary_policy

REFERENCE_O, REWARDS_O = (0.5, 0.3, 0.15, 0.05), (0.0, 1.0, 0.2, 3.0)
AS_TRAINED: dict[str, Any] = {"ddof": 1, "epsilon": 1e-4}  # grpo_advantages


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def problem(beta: float) -> TabularProblem:
    return TabularProblem(jnp.array(REFERENCE_O), jnp.array(REWARDS_O), beta)


def predicted(beta: float, **options: Any) -> jax.Array:
    return stationary_policy(jnp.array(REFERENCE_O), jnp.array(REWARDS_O), beta=beta, **AS_TRAINED, **options)


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("advantage", ["gopo", "grpo"])
def test_sampled_training_ends_at_the_stationary_policy(advantage: Any, group_size: int) -> None:
    for beta in (0.1, 0.5, 2.0):
        found_O = trained(
            problem(beta), jax.random.key(0), advantage=advantage, group_size=group_size, groups=128, steps=2000
        )
        expected_O = predicted(beta, advantage=advantage, group_size=group_size)
        np.testing.assert_allclose(found_O, expected_O, atol=0.01)
        assert float(jnp.abs(found_O - jnp.array(REFERENCE_O)).max()) > 0.05  # it went somewhere


@pytest.mark.parametrize(("advantage", "group_size"), [("gopo", 4), ("grpo", 4), ("rloo", 4)])
@pytest.mark.parametrize(("estimator", "kl"), [("k3", "k3"), ("k2", "direct")])
def test_the_expected_gradient_is_zero_there(advantage: Any, group_size: int, estimator: str, kl: Any) -> None:
    """k3 in the loss has the first equation's fixed point; k2 is direct KL, on policy."""
    found_O = trained_exactly(problem(0.5), advantage=advantage, group_size=group_size, kl=estimator)
    np.testing.assert_allclose(found_O, predicted(0.5, advantage=advantage, group_size=group_size, kl=kl), atol=1e-8)


def test_k1_in_the_loss_has_no_expected_gradient() -> None:
    """Its gradient is that of a log-probability, whose mean over the policy is zero: it penalises nothing."""
    ended = [trained_exactly(problem(2.0), advantage="gopo", group_size=4, kl=kl, steps=50) for kl in ("k1", None)]
    np.testing.assert_allclose(*ended, atol=1e-12)
    assert float(ended[0][3]) > 0.9
