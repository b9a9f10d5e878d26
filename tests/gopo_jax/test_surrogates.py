"""Laws of ratios, surrogates and weights. Every expected value is a formula in NumPy, or a derivative."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopo_jax import (
    SURROGATES,
    cispo_surrogate,
    clip_surrogate,
    importance_ratio,
    policy_loss,
    sampler_correction,
    sapo_surrogate,
    token_broadcast,
)

P, G, T = 3, 4, 5
every_surrogate = pytest.mark.parametrize("surrogate", SURROGATES)


def batch(spread: float = 0.5) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    logprobs = rng.uniform(-3, -0.1, (P, G, T)).astype(np.float32)
    lengths = rng.integers(0, T + 1, (P, G))
    lengths[0, 0] = 0
    data = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * rng.normal(size=logprobs.shape).astype(np.float32),
        "advantages": rng.normal(size=(P, G)).astype(np.float32),
        "mask": np.arange(T) < lengths[..., None],
    }
    return {name: jnp.asarray(array) for name, array in data.items()}


def ratio_of(data: dict[str, jax.Array], kind: Any) -> jax.Array:
    return importance_ratio(data["logprobs"], data["old_logprobs"], data["mask"], kind)


def test_ratios_are_their_formulas() -> None:
    data = batch()
    mask = np.asarray(data["mask"])
    d = np.where(mask, np.asarray(data["logprobs"] - data["old_logprobs"], float), 0)
    mean = d.sum(-1, keepdims=True) / np.maximum(mask.sum(-1, keepdims=True), 1)
    expected = {"token": d, "sequence": mean, "sequence_token": mean, "trajectory": d.sum(-1, keepdims=True)}
    for kind, log_ratio in expected.items():
        np.testing.assert_allclose(ratio_of(data, kind), np.where(mask, np.exp(log_ratio), 1), rtol=1e-5, err_msg=kind)


def test_gradients_of_ratios() -> None:
    """GSPO-token has GSPO's value and the gradient of each token alone."""
    data = batch()
    mask = np.asarray(data["mask"])
    weights = jnp.asarray(np.random.default_rng(1).normal(size=mask.shape) * mask)

    def gradient(kind: Any) -> np.ndarray:
        return np.asarray(
            jax.grad(lambda x: (weights * ratio_of(data | {"logprobs": x}, kind)).sum())(data["logprobs"])
        )

    sequence, whole = np.asarray(ratio_of(data, "sequence")), np.asarray(ratio_of(data, "trajectory"))
    total, tokens = np.asarray(weights.sum(-1, keepdims=True)), np.maximum(mask.sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(gradient("sequence"), mask * sequence * total / tokens, atol=1e-5)
    np.testing.assert_allclose(gradient("sequence_token"), mask * sequence * weights, atol=1e-5)
    np.testing.assert_allclose(gradient("trajectory"), mask * whole * total, atol=1e-4)


def test_a_trajectory_far_away_has_a_finite_ratio_and_gradient() -> None:
    data = batch() | {"old_logprobs": batch()["logprobs"] - 50.0}  # 5 tokens: exp(250) overflows
    loss = lambda x: policy_loss(**(data | {"logprobs": x}), ratio="trajectory")[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(data["logprobs"])
    assert np.isfinite(value) and np.isfinite(gradient).all()


@every_surrogate
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(surrogate: str) -> None:
    data = batch(spread=0.0)
    gradient = jax.grad(lambda x: policy_loss(**(data | {"logprobs": x}), surrogate=surrogate)[0])(data["logprobs"])
    expected = -data["advantages"][..., None] * data["mask"] / data["mask"].sum()
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@every_surrogate
def test_masked_is_deleted(surrogate: str) -> None:
    data = batch()
    dirty = data | {name: jnp.where(data["mask"], data[name], jnp.nan) for name in ("logprobs", "old_logprobs")}
    loss = lambda x, other: policy_loss(**(other | {"logprobs": x}), surrogate=surrogate)[0]  # noqa: E731
    clean_pair = jax.value_and_grad(loss)(data["logprobs"], data)
    dirty_pair = jax.value_and_grad(loss)(dirty["logprobs"], dirty)
    jax.tree.map(np.testing.assert_array_equal, dirty_pair, clean_pair)


RATIO = jnp.array([0.1, 0.7, 1.0, 1.15, 1.5, 9.0])


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_surrogates_are_their_formulas(advantage: float) -> None:
    w, A, logprobs = np.asarray(RATIO, float), advantage, jnp.linspace(-3, -1, 6)
    clipped = np.minimum(w * A, np.clip(w, 0.8, 1.28) * A)
    found = clip_surrogate(RATIO, logprobs, jnp.full(6, A), clip_high=0.28)
    np.testing.assert_allclose(found, clipped, rtol=1e-6)
    dual = clip_surrogate(RATIO, logprobs, jnp.full(6, A), clip_high=0.28, dual_clip=3.0)
    np.testing.assert_allclose(dual, np.maximum(clipped, 3 * A) if A < 0 else clipped, rtol=1e-6)
    upper = clip_surrogate(RATIO, logprobs, jnp.full(6, A), clip_low=1.0)  # TIC-GRPO: nothing is clipped below
    np.testing.assert_allclose(upper, np.minimum(w * A, np.minimum(w, 1.2) * A), rtol=1e-6)
    cispo = cispo_surrogate(RATIO, logprobs, jnp.full(6, A), clip_max=2.0)
    np.testing.assert_allclose(cispo, np.minimum(w, 2.0) * A * np.asarray(logprobs), rtol=1e-6)
    tau = 1.0 if A > 0 else 1.05
    sapo = sapo_surrogate(RATIO, logprobs, jnp.full(6, A))
    np.testing.assert_allclose(sapo, 4 / tau / (1 + np.exp(-tau * (w - 1))) * A, rtol=1e-6)


@pytest.mark.parametrize("clips", [(0.0, 0.0), (0.0, 0.2), (0.2, 0.0)])
def test_on_policy_no_clip_changes_the_gradient(clips: tuple[float, float]) -> None:
    data = batch(spread=0.0)
    loss = lambda x: policy_loss(**(data | {"logprobs": x}), clip_low=clips[0], clip_high=clips[1])[0]  # noqa: E731
    expected = -data["advantages"][..., None] * data["mask"] / data["mask"].sum()
    np.testing.assert_allclose(jax.grad(loss)(data["logprobs"]), expected, atol=1e-6)


def test_no_token_of_cispo_loses_its_gradient_and_sapo_s_shrinks() -> None:
    data = batch()

    def gradient(surrogate: Any) -> np.ndarray:
        loss = lambda x: policy_loss(**(data | {"logprobs": x}), surrogate=surrogate)[0]  # noqa: E731
        return np.asarray(jax.grad(loss)(data["logprobs"]))

    mask, far = np.asarray(data["mask"]), np.asarray(ratio_of(data, "token")) > 1.2
    mean = np.asarray(data["advantages"][..., None] * data["mask"] / data["mask"].sum())
    expected = -np.minimum(np.asarray(ratio_of(data, "token")), 1.1) * mean
    np.testing.assert_allclose(gradient(partial(cispo_surrogate, clip_max=1.1)), expected, atol=1e-6)
    positive = mask & far & np.asarray(data["advantages"] > 0)[..., None]
    assert positive.any() and not gradient("clip")[positive].any() and gradient("sapo")[positive].all()


def test_options_reach_the_surrogate_and_unknown_names_are_refused() -> None:
    data = batch()
    loss, metrics = policy_loss(**data, surrogate="cispo", surrogate_options={"clip_max": 1.0})
    assert loss != policy_loss(**data, surrogate="cispo")[0]
    cut = (ratio_of(data, "token") > 1) & data["mask"] & (data["advantages"] > 0)[..., None]
    np.testing.assert_array_equal(metrics["cispo_clip_ratio"], (cut.sum(), data["mask"].sum()))
    with pytest.raises(ValueError, match="surrogate: expected one of 'clip', 'cispo', 'sapo', got 'ppo'"):
        policy_loss(**data, surrogate="ppo")
    with pytest.raises(ValueError, match="ratio: expected one of 'token'"):
        policy_loss(**data, ratio="turn")  # type: ignore[arg-type]


# Weights


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_sampler_correction(mode: Any) -> None:
    data = batch()
    old, sampled, mask = (np.asarray(data[name], float) for name in ("old_logprobs", "logprobs", "mask"))
    difference = (old - sampled) * mask
    if mode.startswith("sequence"):
        difference = np.broadcast_to(difference.sum(-1, keepdims=True), mask.shape)
    u = np.exp(difference)
    inside = (u >= 0.5) & (u <= 1.5)
    expected = (np.clip(u, 0.5, 1.5) if mode.endswith("truncate") else u * inside) * mask
    options = {"mode": mode, "clip_max": 1.5, "clip_min": 0.5}
    arrays = (data["old_logprobs"], data["logprobs"], data["mask"])
    np.testing.assert_allclose(sampler_correction(*arrays, **options), expected, rtol=1e-5)
    assert 0 < (inside & (mask > 0)).sum() < mask.sum()
    assert not jax.grad(lambda x: sampler_correction(x, *arrays[1:], **options).sum())(arrays[0]).any()


def test_weights_multiply_the_surrogate_and_not_the_penalty() -> None:
    data = batch()
    weights = jnp.asarray(np.random.default_rng(2).uniform(0.5, 2, (P, G, T)), jnp.float32)
    penalty: dict[str, Any] = {"kl": "k3", "ref_logprobs": data["old_logprobs"], "beta": 0.3}
    # a weight of each token is an advantage of each token, where nothing is clipped
    per_token = weights * data["advantages"][..., None]
    loss = policy_loss(**data, weights=weights, clip_low=1.0, clip_high=1e9, **penalty)[0]
    same = policy_loss(**(data | {"advantages": per_token}), clip_low=1.0, clip_high=1e9, **penalty)[0]
    np.testing.assert_allclose(loss, same, rtol=1e-5)


def test_token_broadcast() -> None:
    t, A = np.arange(1, T + 1), np.array([[1.0, -2.0]])
    expected = {
        "uniform": np.ones(T),
        "log_decay": 1 / np.log(1 + t),
        "poly_decay": 1 / np.sqrt(t),
        "loglog_decay": 1 / np.log(np.log(t + 5)),
    }
    for kind, weights in expected.items():
        np.testing.assert_allclose(token_broadcast(jnp.asarray(A), T, kind), A[..., None] * weights, rtol=1e-6)
