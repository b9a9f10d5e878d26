"""Laws of the entropy bonus, and of the tokens that are chosen by entropy or covariance: numbers by plain NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopo_jax import (
    clip_cov,
    entropy_bonus,
    kl_cov,
    policy_loss,
    token_covariances,
    token_logprobs,
    top_entropy_mask,
)

P, G, T, V, D = 3, 4, 7, 23, 8
RNG = np.random.default_rng(0)
MASK_PGT = np.arange(T) < RNG.integers(0, T + 1, (P, G))[..., None]
ENTROPY_PGT = RNG.gamma(1.0, 1.0, (P, G, T)).astype(np.float32)
LOGPROBS_PGT = -RNG.gamma(1.0, 2.0, (P, G, T)).astype(np.float32)
ADVANTAGES_PG = RNG.normal(0, 2, (P, G)).astype(np.float32)


def unmasked(array_PGT: np.ndarray) -> np.ndarray:
    """What masked positions hold must not matter."""
    return np.where(MASK_PGT, array_PGT, np.nan)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.2, 0.5, 0.83, 1.0])
def test_tokens_above_the_quantile_of_the_batch_are_chosen(quantile: float, jitted: bool) -> None:
    choose = jax.jit(top_entropy_mask) if jitted else top_entropy_mask
    chosen_PGT = np.asarray(choose(unmasked(ENTROPY_PGT), MASK_PGT, quantile))
    threshold = np.quantile(ENTROPY_PGT[MASK_PGT], 1 - quantile)
    near_PGT = np.isclose(ENTROPY_PGT, threshold, rtol=1e-5)
    np.testing.assert_array_equal(chosen_PGT[~near_PGT], (MASK_PGT & (threshold <= ENTROPY_PGT))[~near_PGT])
    assert abs(chosen_PGT.sum() - max(1, quantile * MASK_PGT.sum())) <= 1


def test_equal_entropies_are_chosen_together() -> None:
    for entropy in (0.0, 0.1, 1 / 3, 2.7):
        equal_PGT = np.full(MASK_PGT.shape, entropy, np.float32)
        np.testing.assert_array_equal(top_entropy_mask(equal_PGT, MASK_PGT, 0.3), MASK_PGT)
    assert not np.any(top_entropy_mask(ENTROPY_PGT, np.zeros_like(MASK_PGT), 0.3)), "of no token none"


def test_the_bonus_is_the_mean_and_its_parts_add_up() -> None:
    expected = ENTROPY_PGT[MASK_PGT].mean()
    assert float(entropy_bonus(unmasked(ENTROPY_PGT), MASK_PGT)) == pytest.approx(expected, rel=1e-6)
    parts = [entropy_bonus(e, m, MASK_PGT.sum()) for e, m in zip(ENTROPY_PGT, MASK_PGT, strict=True)]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-6)
    assert float(entropy_bonus(ENTROPY_PGT, np.zeros_like(MASK_PGT))) == 0


@pytest.mark.parametrize("chunk", [1, 3, T])
def test_the_bonus_has_the_gradient_of_dense_entropies(chunk: int) -> None:
    """Through the chunked log-probabilities, in hidden states and in the output embedding."""
    hidden = RNG.normal(size=(P, G, T, D)).astype(np.float32)
    unembed, tokens = RNG.normal(size=(V, D)).astype(np.float32), RNG.integers(0, V, (P, G, T))

    def chunked(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        pair = token_logprobs(hidden, unembed, tokens, chunk=chunk, temperature=0.7, with_entropy=True)
        return entropy_bonus(pair[1], jnp.asarray(MASK_PGT))

    def dense(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(jnp.einsum("pgtd,vd->pgtv", hidden, unembed) / 0.7)
        return -(jnp.exp(logs) * logs).sum(-1)[MASK_PGT].mean()

    found, expected = (jax.value_and_grad(f, argnums=(0, 1))(hidden, unembed) for f in (chunked, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in found[1])


def covariances() -> np.ndarray:
    return np.asarray(token_covariances(unmasked(LOGPROBS_PGT), ADVANTAGES_PG, MASK_PGT))


def test_the_mean_of_the_covariances_is_the_covariance() -> None:
    advantages_PGT = np.broadcast_to(ADVANTAGES_PG[..., None], MASK_PGT.shape)
    pairs = np.stack([LOGPROBS_PGT[MASK_PGT], advantages_PGT[MASK_PGT]])
    found_PGT = covariances()
    assert found_PGT[MASK_PGT].mean() == pytest.approx(np.cov(pairs, ddof=0)[0, 1], rel=1e-4)
    assert not found_PGT[~MASK_PGT].any()
    np.testing.assert_allclose(token_covariances(LOGPROBS_PGT, advantages_PGT, MASK_PGT), found_PGT, rtol=1e-5)


def test_clip_cov_chooses_so_many_at_random_between_the_bounds() -> None:
    covariance_PGT, bounds = covariances(), {"low": 0.5, "high": 4.0}
    candidates_PGT = MASK_PGT & (covariance_PGT > 0.5) & (covariance_PGT < 4.0)
    assert candidates_PGT.sum() >= 6
    counts_PGT = np.zeros(MASK_PGT.shape, int)
    for seed in range(60):
        chosen_PGT = np.asarray(clip_cov(covariance_PGT, MASK_PGT, jax.random.key(seed), ratio=0.08, **bounds))
        assert chosen_PGT.sum() == int(0.08 * MASK_PGT.sum()) and not chosen_PGT[~candidates_PGT].any()
        counts_PGT += chosen_PGT
    assert (counts_PGT[candidates_PGT] > 0).all()
    key = jax.random.key(0)
    assert np.sum(clip_cov(covariance_PGT, MASK_PGT, key, ratio=1e-6, **bounds)) == 1, "at least one"
    np.testing.assert_array_equal(clip_cov(covariance_PGT, MASK_PGT, key, ratio=1.0, **bounds), candidates_PGT)
    assert not np.any(clip_cov(covariance_PGT, MASK_PGT, key, ratio=1.0, low=1e6, high=1e7))


@pytest.mark.parametrize("ratio", [1e-6, 0.1, 0.5, 1.0])
def test_kl_cov_chooses_the_highest(ratio: float) -> None:
    covariance_PGT = covariances()
    chosen_PGT = np.asarray(kl_cov(covariance_PGT, MASK_PGT, ratio=ratio))
    assert chosen_PGT.sum() == max(int(ratio * MASK_PGT.sum()), 1) and not chosen_PGT[~MASK_PGT].any()
    left_PGT = MASK_PGT & ~chosen_PGT
    assert covariance_PGT[chosen_PGT].min() >= covariance_PGT[left_PGT].max(initial=-np.inf)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant", "token_per_microbatch"])
def test_a_penalty_is_aggregated_like_the_loss(aggregate: Any) -> None:
    """As the KL penalty is, with a gradient; a masked one is nothing."""
    old_PGT = LOGPROBS_PGT + RNG.normal(0, 0.3, LOGPROBS_PGT.shape).astype(np.float32)

    def loss(logprobs: jax.Array, **options: Any) -> jax.Array:
        return policy_loss(logprobs, old_PGT, ADVANTAGES_PG, MASK_PGT, aggregate=aggregate, **options)[0]

    def with_penalty(logprobs: jax.Array) -> jax.Array:
        return loss(logprobs, penalties=jnp.where(MASK_PGT, 0.3 * (logprobs - old_PGT), jnp.nan))

    def with_kl(logprobs: jax.Array) -> jax.Array:
        return loss(logprobs, kl="k1", beta=0.3, ref_logprobs=old_PGT)

    found, expected = (jax.value_and_grad(f)(LOGPROBS_PGT) for f in (with_penalty, with_kl))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.parametrize("function", [top_entropy_mask, entropy_bonus, token_covariances, clip_cov, kl_cov])
def test_shapes_that_do_not_fit_are_refused(function: Any) -> None:
    middle = {top_entropy_mask: (0.2,), clip_cov: (jax.random.key(0),)}.get(function, ())
    arguments = (LOGPROBS_PGT, ADVANTAGES_PG) if function is token_covariances else (ENTROPY_PGT,)
    with pytest.raises(ValueError, match="mask: expected the shape of"):
        function(*arguments, MASK_PGT[..., 1:], *middle)
    if function is token_covariances:
        with pytest.raises(ValueError, match="advantages: expected one per completion"):
            function(LOGPROBS_PGT, ADVANTAGES_PG.T, MASK_PGT)
