"""The decoder's laws: the group axis is a way to compute, not another model."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models.attention
from gopo_jax import token_logprobs
from models.attention import Past
from models.config import Qwen3Config
from models.hf_weights import split
from models.qwen3 import REMAT, Qwen3
from models.reward_model import Qwen3RewardModel

P, G, S, T, V = 3, 2, 7, 5, 61
CONFIG = Qwen3Config(V, 32, 48, 3, 4, 2, 16, initializer_range=0.2)
VARIANTS = {
    "plain": CONFIG,
    "tied": Qwen3Config(V, 32, 48, 2, 4, 4, 8, tie_word_embeddings=True, initializer_range=0.2),
    "bias": Qwen3Config(V, 32, 48, 2, 4, 1, 16, attention_bias=True, initializer_range=0.2, rope_theta=5e6),
}
LENGTHS_P = np.array([3, 7, 1])


def tokens(seed: int, *shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, V)


def joined(prompt_PS: jax.Array, tokens_PGT: jax.Array, p: int) -> jax.Array:
    """Each completion of prompt p behind its prompt, as whole sequences."""
    prompt_GS = jnp.broadcast_to(prompt_PS[p, : LENGTHS_P[p]], (G, LENGTHS_P[p]))
    return jnp.concatenate([prompt_GS, tokens_PGT[p]], axis=1)


OTHERS = [pytest.param(VARIANTS[name], id=name, marks=pytest.mark.slow) for name in VARIANTS if name != "plain"]


@pytest.fixture(params=[pytest.param(VARIANTS["plain"], id="plain"), *OTHERS])
def model(request: pytest.FixtureRequest) -> Qwen3:
    model = Qwen3(request.param, nnx.Rngs(0))
    if request.param.attention_bias:  # they start at 0, which would test nothing
        for name in ("query_bias_LHE", "key_bias_LKE", "value_bias_LKE", "output_bias_LD"):
            parameter = getattr(model.layers, name)
            parameter[...] = jax.random.normal(jax.random.key(1), parameter[...].shape)
    return model


def test_shared_prefix_equals_whole_sequences(model: Qwen3) -> None:
    prompt_PS, tokens_PGT = tokens(0, P, S), tokens(1, P, G, T)
    graphdef, params = split(model)
    weight_PGT = jax.random.normal(jax.random.key(2), (P, G, T))

    def shared(params: dict) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        hidden_PGTD = model.predict(prompt_PS, LENGTHS_P, tokens_PGT)
        return (token_logprobs(hidden_PGTD, model.head_VD, tokens_PGT, chunk=2) * weight_PGT).sum(), hidden_PGTD

    def whole(params: dict) -> tuple[jax.Array, list[jax.Array]]:
        model = nnx.merge(graphdef, params)
        hidden = [model.hidden(joined(prompt_PS, tokens_PGT, p))[:, LENGTHS_P[p] - 1 : -1] for p in range(P)]
        logprobs = [token_logprobs(h, model.head_VD, t, chunk=T) for h, t in zip(hidden, tokens_PGT, strict=True)]
        return sum((x * w).sum() for x, w in zip(logprobs, weight_PGT, strict=True)), hidden

    (value, hidden_PGTD), gradient = jax.jit(jax.value_and_grad(shared, has_aux=True))(params)
    (expected, hidden), expected_gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    np.testing.assert_allclose(hidden_PGTD, jnp.stack(hidden), atol=1e-5)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient, expected_gradient)


@pytest.mark.parametrize("chunk", [64, 3])  # of one piece; of pieces that do not divide the length
def test_one_token_at_a_time_equals_all_at_once(model: Qwen3, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.attention, "CACHE_CHUNK", chunk)
    prompt_PS, tokens_PGT = tokens(0, P, S), tokens(1, P, G, T)
    _, prefix = model.prefill(prompt_PS, LENGTHS_P)
    expected_PGTD, _ = model.extend(tokens_PGT, prefix)
    empty = Past.empty(prefix.kv, G, T)
    # what is not filled yet must not be seen
    past = Past(jnp.full_like(empty.keys_LPKGET, 3), jnp.full_like(empty.values_LPKGTE, 7), empty.length)
    step = jax.jit(lambda t, past: model.extend(t, prefix, past=past))
    for t in range(T):
        hidden_PG1D, own = step(tokens_PGT[..., t : t + 1], past)
        np.testing.assert_allclose(hidden_PG1D[:, :, 0], expected_PGTD[:, :, t], atol=1e-5)
        past = past.append(own)


@pytest.mark.slow
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    graphdef, params = split(Qwen3(CONFIG, nnx.Rngs(0)))
    weight_PGTD = jax.random.normal(jax.random.key(5), (P, G, T, CONFIG.hidden_size))

    def value(params: Any) -> jax.Array:
        return jnp.vdot(
            nnx.merge(graphdef, params).predict(tokens(0, P, S), LENGTHS_P, tokens(1, P, G, T)), weight_PGTD
        )

    expected = jax.value_and_grad(value)(params)
    monkeypatch.setattr(models.attention, "MIN_QUERY_BLOCK", 1)
    monkeypatch.setattr(models.attention, "QUERY_BLOCKS", 3)
    blocks = jax.value_and_grad(value)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), blocks, expected)


def test_completions_in_one_row_do_not_see_each_other(model: Qwen3) -> None:
    prompt_PS, tokens_PGT = tokens(0, P, S), tokens(1, P, G, T)
    expected_PGTD = model.predict(prompt_PS, LENGTHS_P, tokens_PGT)
    packed_P1T = tokens_PGT.reshape(P, 1, G * T)
    offset_P1T = jnp.tile(jnp.arange(T), (P, 1, G))
    hidden_P1TD = model.predict(prompt_PS, LENGTHS_P, packed_P1T, offset_P1T)
    np.testing.assert_allclose(hidden_P1TD.reshape(expected_PGTD.shape), expected_PGTD, atol=1e-5)


def test_padding_is_invisible(model: Qwen3) -> None:
    prompt_PS, tokens_PGT = tokens(0, P, S), tokens(1, P, G, T)
    expected = model.predict(prompt_PS, LENGTHS_P, tokens_PGT)
    prompt_padded = jnp.concatenate([prompt_PS, tokens(5, P, 4)], axis=1)
    for p in range(P):  # other garbage behind each prompt's end
        prompt_padded = prompt_padded.at[p, LENGTHS_P[p] :].set(tokens(6 + p, S + 4)[LENGTHS_P[p] :])
    tokens_padded = jnp.concatenate([tokens_PGT, tokens(9, P, G, 3)], axis=-1)
    padded = model.predict(prompt_padded, LENGTHS_P, tokens_padded)[:, :, :T]
    np.testing.assert_allclose(padded, expected, atol=1e-5)


def test_plain_call_reads_right_padded_rows(model: Qwen3) -> None:
    tokens_BS = tokens(0, 2, S)
    logits_BSV = model(tokens_BS, jnp.array([4, S]))
    assert logits_BSV.dtype == jnp.float32 and logits_BSV.shape == (2, S, V)
    alone = model(tokens_BS[:1, :4], jnp.array([4]))
    np.testing.assert_allclose(logits_BSV[:1, :4], alone, atol=1e-5)


def test_a_token_sees_nothing_behind_it() -> None:
    model = Qwen3(CONFIG, nnx.Rngs(0))
    tokens_BS = tokens(0, 1, S)
    changed = model.hidden(tokens_BS.at[0, -1].add(1))
    np.testing.assert_array_equal(changed[:, :-1], model.hidden(tokens_BS)[:, :-1])
    assert not np.allclose(changed[:, -1], model.hidden(tokens_BS)[:, -1])


@functools.cache
def gradient_of_squares(remat: str) -> Any:
    graphdef, params = split(Qwen3(CONFIG, nnx.Rngs(0), remat=remat))
    prompt_PS, tokens_PGT = tokens(0, P, S), tokens(1, P, G, T)

    def loss(params: dict) -> jax.Array:
        return jnp.square(nnx.merge(graphdef, params).predict(prompt_PS, LENGTHS_P, tokens_PGT)).mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", REMAT)
def test_recomputation_changes_no_gradient(remat: str) -> None:
    gradients = gradient_of_squares(remat), gradient_of_squares("full")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), *gradients)


def test_compiled_size_does_not_grow_with_depth() -> None:
    def equations(layers: int) -> int:
        config = Qwen3Config(V, 32, 48, layers, 4, 2, 16)
        return str(jax.make_jaxpr(Qwen3(config, nnx.Rngs(0)).hidden)(tokens(0, 2, S))).count("=")

    assert equations(2) == equations(9)


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32() -> None:
    model = Qwen3(CONFIG, nnx.Rngs(0), dtype=jnp.bfloat16)
    exact = Qwen3(CONFIG, nnx.Rngs(0))
    tokens_BS = tokens(0, 2, S)
    assert model.hidden(tokens_BS).dtype == jnp.bfloat16
    logits = model(tokens_BS, jnp.array([S, S]))
    assert logits.dtype == jnp.float32
    scale = float(jnp.abs(exact(tokens_BS, jnp.array([S, S]))).max())
    # bfloat16 keeps 8 bits: 2^-8 per rounding, a few dozen of them in a row
    np.testing.assert_allclose(logits, exact(tokens_BS, jnp.array([S, S])), atol=scale * 2**-8 * 12)


@pytest.mark.slow
def test_reward_of_a_group_equals_rewards_of_its_texts() -> None:
    config = Qwen3Config(V, 32, 48, 2, 4, 2, 16, initializer_range=0.2, architecture="Qwen3ForSequenceClassification")
    model = Qwen3RewardModel(config, nnx.Rngs(0))
    prefix_PS, suffix_PGT = tokens(0, P, S), tokens(1, P, G, T)
    suffix_lengths_PG = jnp.array([[1, 5], [3, 2], [5, 5]])
    rewards_PG = model.score_group(prefix_PS, LENGTHS_P, suffix_PGT, suffix_lengths_PG)
    assert rewards_PG.dtype == jnp.float32
    for p in range(P):
        for g in range(G):
            text = jnp.concatenate([prefix_PS[p, : LENGTHS_P[p]], suffix_PGT[p, g, : suffix_lengths_PG[p, g]]])
            alone = model(text[None], jnp.array([len(text)]))
            np.testing.assert_allclose(rewards_PG[p, g], alone[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_tables_add_up_in_float32(tied: bool) -> None:
    """2,048 times the same token, in bfloat16: summed in bfloat16 its gradient would stand still at 256 summands."""
    config = replace(CONFIG, tie_word_embeddings=tied)
    prompt_PS, lengths_P = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    tokens_PGT = jnp.full((1, 32, 64), 7)

    def gradient(dtype: str) -> dict[str, jax.Array]:
        graphdef, params = split(Qwen3(config, nnx.Rngs(0), dtype=dtype, param_dtype=jnp.float32))

        def loss(params: dict) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden_PGTD = model.predict(prompt_PS, lengths_P, tokens_PGT)
            return model.logprobs(hidden_PGTD, tokens_PGT, chunk_tokens=64).sum() + hidden_PGTD.astype("float32").sum()

        return jax.jit(jax.grad(loss))(params)

    exact, rounded = gradient("float32"), gradient("bfloat16")
    for name in ("embed_VD",) if tied else ("embed_VD", "unembed_VD"):
        error = jnp.linalg.norm(rounded[name] - exact[name]) / jnp.linalg.norm(exact[name])
        assert rounded[name].dtype == jnp.float32 and error < 0.02, (name, error)
