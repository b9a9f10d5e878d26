"""The paper's advantage and loss, with its exact settings, are its formulas written out number by number.

GOPO, https://arxiv.org/abs/2602.03876: rewards to ranks by a double argsort, A = 2 - 4 (rank - 1) / (G - 1), the
clipped token ratio, the k3 penalty; its trainer takes the mean over the tokens of each micro-batch, then of those.
The settings are those of a recipe with `--variant gopo_paper`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopo_jax import policy_loss
from train.config import PolicyConfig
from train.parse import parse

RECIPE = Path(__file__).parents[2] / "configs" / "tldr" / "qwen3_8b_gopo.yaml"
CONFIG = parse(PolicyConfig, ["--config", str(RECIPE), "--variant", "gopo_paper"])
ARGUMENTS = ("clip_low", "clip_high", "ratio", "surrogate", "surrogate_options", "aggregate", "kl", "beta")
P, G, T, MICROBATCHES = 6, 8, 5, 3
BETA, CLIP = 0.04, 0.2


def transcribed(
    logprobs: np.ndarray, old: np.ndarray, ref: np.ndarray, rewards: np.ndarray, lengths: np.ndarray
) -> tuple[float, np.ndarray]:
    """Loss and gradient, in float64, one token after the other."""
    loss, gradient = 0.0, np.zeros(logprobs.shape)
    for part in np.split(np.arange(P), MICROBATCHES):
        tokens = lengths[part].sum()
        for p in part:
            best_first = sorted(range(G), key=lambda g: -rewards[p, g])  # sorted() keeps equals in their order
            for g in range(G):
                advantage = 2 - 4 * best_first.index(g) / (G - 1)
                for t in range(lengths[p, g]):
                    now, before, reference = logprobs[p, g, t], old[p, g, t], ref[p, g, t]
                    ratio = np.exp(now - before)
                    clipped = min(max(ratio, 1 - CLIP), 1 + CLIP)
                    surrogate = min(ratio * advantage, clipped * advantage)
                    penalty = np.exp(reference - now) - (reference - now) - 1
                    loss += (-surrogate + BETA * penalty) / tokens / MICROBATCHES
                    moves = ratio * advantage <= clipped * advantage
                    slope = -ratio * advantage * moves + BETA * (1 - np.exp(reference - now))
                    gradient[p, g, t] = slope / tokens / MICROBATCHES
    return loss, gradient


@pytest.mark.parametrize("spread", [0.0, 0.5], ids=["one update per batch", "off policy"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_paper_s_loss(spread: float, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logprobs = rng.uniform(-3, -0.1, (P, G, T))
    old, ref = (logprobs + s * rng.normal(size=logprobs.shape) for s in (spread, 0.3))
    rewards = rng.integers(0, 4, (P, G)).astype(float) if ties else rng.normal(size=(P, G))
    lengths = rng.integers(1, T + 1, (P, G))
    mask = np.arange(T) < lengths[..., None]

    def loss(logprobs: jax.Array) -> jax.Array:
        advantages = CONFIG.advantage_function(rewards, **CONFIG.advantage_options)
        options = {name: getattr(CONFIG.loss, name) for name in ARGUMENTS}
        arrays = (logprobs, jnp.asarray(old, jnp.float32), advantages, jnp.asarray(mask), jnp.asarray(ref, jnp.float32))
        parts = [
            policy_loss(*part[:4], ref_logprobs=part[4], denominator=MICROBATCHES, **options)[0]
            for part in zip(*(jnp.split(array, MICROBATCHES) for array in arrays), strict=True)
        ]
        return jnp.stack(parts).sum()

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(logprobs, jnp.float32))
    expected, expected_gradient = transcribed(logprobs, old, ref, rewards, lengths)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7)


def test_the_settings_are_the_paper_s() -> None:
    loss = CONFIG.loss
    assert (loss.beta, loss.kl, loss.kl_in, loss.clip_low, loss.clip_high) == (BETA, "k3", "loss", CLIP, CLIP)
    assert loss.aggregate == "token_per_microbatch" and CONFIG.advantage_options == {"ties": "ordinal"}
    assert CONFIG.updates_per_step == 1 and loss.token_broadcast == "uniform"
