"""Laws of the sampler: which distribution it draws from, what it reports, where it ends, what a row depends on."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare

from gopo_jax import token_logprobs
from models.attention import KeyValues, PrefixKeyValues
from models.config import Qwen3Config
from models.generate import Completions, Generator
from models.hf_weights import split
from models.qwen3 import Backbone, Prefix
from models.sampler import Rollout, SamplingParams, draw, inverse_cdf, penalize, sample
from models.sharding import make_layout
from models.stop_strings import make_stop_table
from models.tokenizer import Tokenizer
from train.state import EVALUATION, TRAIN, VALIDATION, stream_key

P, S, G, T, V = 4, 8, 4, 12, 97  # V is prime, so not a square
PAD = 7  # also a word like any other: what is real is said by lengths, not by token values
LENGTHS_P = np.array([8, 3, 5, 1], np.int32)
ROWS_P = np.arange(P, dtype=np.int32)
KEY = stream_key(0, TRAIN, 0)
NOTHING, EVERYTHING = (V,), tuple(range(V))  # as end-of-text ids: there is no token V


def settings(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_tokens: int = 0, eos: Any = NOTHING
) -> SamplingParams:
    """V ids whatever `eos` holds (repeated), so that all of these are one shape."""
    eos_ids = np.resize(np.array(eos, np.int32), V)
    return SamplingParams(np.float32(temperature), np.int32(top_k), np.float32(top_p), np.int32(min_tokens), eos_ids)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def truncated_softmax(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """On the sorted vector: temperature, the top_k best, then the smallest set that holds top_p of what is left."""
    probabilities_V = softmax(logits_V / temperature)
    best_first = np.argsort(-probabilities_V)
    kept = best_first[: top_k or None]
    shares = probabilities_V[kept] / probabilities_V[kept].sum()
    before = np.concatenate([[0], np.cumsum(shares)[:-1]])
    kept = kept[before < top_p]
    out = np.zeros_like(probabilities_V)
    out[kept] = probabilities_V[kept] / probabilities_V[kept].sum()
    return out


def p_value(tokens: np.ndarray, probabilities_V: np.ndarray) -> float:
    """Of the chi-square test, rare tokens pooled; 0 if an impossible one was drawn."""
    counts_V = np.bincount(tokens.reshape(-1), minlength=len(probabilities_V))
    if counts_V[probabilities_V == 0].any():
        return 0.0
    expected_V = probabilities_V * tokens.size
    often_V = expected_V >= 5
    observed, expected = ([*x[often_V], x[~often_V].sum()] for x in (counts_V, expected_V))
    keep = 0 if expected[-1] == 0 else 1
    size = len(expected) - (1 - keep)
    return float(chisquare(observed[:size], expected[:size]).pvalue) if size > 1 else 1.0


class Net(NamedTuple):
    """A policy with its few compiled calls."""

    graphdef: Any
    params: Any
    sample: Callable[..., Rollout]
    logprobs: Callable[..., jax.Array]  # as the trainer computes them
    logits: Callable[[Any, np.ndarray], jax.Array]  # of whole sequences, computed anew

    def __call__(self, params: SamplingParams, *, key: jax.Array = KEY, **changes: Any) -> Rollout:
        arrays = {"prompt_PS": PROMPT_PS, "lengths_P": LENGTHS_P, "rows_P": ROWS_P} | changes
        return jax.tree.map(np.asarray, self.sample(self.params, *arrays.values(), key, params))


def random_prompts(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (P, S)).astype(np.int32)


PROMPT_PS = random_prompts(0)


@pytest.fixture(scope="module")
def net(tiny_config: Qwen3Config, make_model: Callable[..., Backbone]) -> Net:
    graphdef, params = split(make_model(replace(tiny_config, vocab_size=V)))

    @jax.jit
    def draw_rollouts(params: Any, *arguments: Any) -> Rollout:
        model = nnx.merge(graphdef, params)
        return sample(model, *arguments, num_generations=G, max_completion_length=T, pad_id=PAD)

    @jax.jit
    def logprobs(params: Any, prompt_PS: Any, lengths_P: Any, tokens_PGT: Any, temperature: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden_PGTD = model.predict(prompt_PS, lengths_P, tokens_PGT)
        return token_logprobs(hidden_PGTD, model.head_VD, tokens_PGT, chunk=5, temperature=temperature)

    @jax.jit
    def logits(params: Any, tokens_BS: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.logits(model.hidden(tokens_BS))

    return Net(graphdef, params, draw_rollouts, logprobs, logits)


def assert_same(a: Rollout, b: Rollout) -> None:
    for name in ("tokens_PGT", "lengths_PG", "finished_PG"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.logprobs_PGT, b.logprobs_PGT, atol=1e-5)


# Log-probabilities


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5, "top_p": 0.8, "min_tokens": 3}], ids=["plain", "truncated"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.0])
def test_logprobs_are_the_trainers(net: Net, temperature: float, truncation: dict[str, Any]) -> None:
    """Tempered and never truncated; untempered when greedy."""
    out = net(settings(temperature, eos=range(0, V, 9), **truncation))
    expected = net.logprobs(net.params, PROMPT_PS, LENGTHS_P, out.tokens_PGT, np.float32(temperature or 1))
    real_PGT = np.arange(T) < out.lengths_PG[..., None]
    np.testing.assert_allclose(out.logprobs_PGT[real_PGT], np.asarray(expected)[real_PGT], atol=1e-4)


ABSENT_V = np.arange(V) % 3 == 1  # scattered: a tokenizer may have gaps, and its last id may be below V - 1


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5, "top_p": 0.8, "min_tokens": 3}], ids=["plain", "truncated"])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_ids_without_a_token_are_never_drawn(net: Net, temperature: float, truncation: dict[str, Any]) -> None:
    """Log-probabilities stay those of the trainer, whose softmax is over all rows of the head."""
    options = settings(temperature, eos=range(0, V, 9), **truncation)
    assert ABSENT_V[net(options).tokens_PGT].any(), "they would be drawn"
    out = net(options._replace(absent_V=ABSENT_V))
    real_PGT = np.arange(T) < out.lengths_PG[..., None]
    assert not ABSENT_V[out.tokens_PGT[real_PGT]].any()
    expected = net.logprobs(net.params, PROMPT_PS, LENGTHS_P, out.tokens_PGT, np.float32(temperature or 1))
    np.testing.assert_allclose(out.logprobs_PGT[real_PGT], np.asarray(expected)[real_PGT], atol=1e-4)


def test_where_every_id_is_a_token_nothing_changes(net: Net) -> None:
    options = settings(0.7, top_k=9)
    jax.tree.map(np.testing.assert_array_equal, net(options._replace(absent_V=np.zeros(V, bool))), net(options))


# Keys


def test_one_step_twice_is_the_same_and_every_other_key_is_not(net: Net) -> None:
    first = net(settings())
    assert_same(net(settings(), key=stream_key(0, TRAIN, 0)), first)
    others = [(0, TRAIN, 1), (0, TRAIN, 2), (1, TRAIN, 0), (0, VALIDATION, 0), (0, EVALUATION, 0), (0, TRAIN, 0, 1)]
    drawn = [first.tokens_PGT] + [net(settings(), key=stream_key(*parts)).tokens_PGT for parts in others]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert (a != b).any(-1).all(), "every completion differs somewhere"


def test_completions_of_a_prompt_differ(net: Net) -> None:
    rows_PG = net(settings()).tokens_PGT
    assert all(len(np.unique(rows_GT, axis=0)) == G for rows_GT in rows_PG)


def test_a_row_does_not_depend_on_the_other_rows(net: Net) -> None:
    options = settings(top_p=0.95, eos=range(0, V, 9))
    whole = net(options)

    order = np.array([2, 0, 3, 1])
    moved = net(options, prompt_PS=PROMPT_PS[order], lengths_P=LENGTHS_P[order], rows_P=ROWS_P[order])
    assert_same(moved, jax.tree.map(lambda x: x[order], whole))

    others = np.where(np.arange(P)[:, None] == 1, PROMPT_PS, random_prompts(1))
    alone = net(options, prompt_PS=others, lengths_P=np.where(np.arange(P) == 1, LENGTHS_P, 6).astype(np.int32))
    assert_same(*(jax.tree.map(lambda x: x[1], out) for out in (alone, whole)))
    assert (alone.tokens_PGT[[0, 2, 3]] != whole.tokens_PGT[[0, 2, 3]]).any(-1).all()

    # fewer prompts, padded to another length with other values behind their ends
    few = np.array([1, 3])
    wider = np.where(np.arange(2 * S) < LENGTHS_P[few, None], np.pad(PROMPT_PS[few], ((0, 0), (0, S))), V - 1)
    fewer = net(options, prompt_PS=wider.astype(np.int32), lengths_P=LENGTHS_P[few], rows_P=ROWS_P[few])
    assert_same(fewer, jax.tree.map(lambda x: x[few], whole))


def test_the_row_number_chooses_what_is_drawn(net: Net) -> None:
    same = np.repeat(PROMPT_PS[:1], P, 0)
    lengths_P = np.repeat(LENGTHS_P[:1], P)
    out = net(settings(), prompt_PS=same, lengths_P=lengths_P, rows_P=np.array([5, 6, 5, 9], np.int32))
    np.testing.assert_array_equal(out.tokens_PGT[0], out.tokens_PGT[2])
    assert (out.tokens_PGT[0] != out.tokens_PGT[1]).any(-1).all()


# The end


def test_every_end_of_text_id_ends_a_completion_and_is_its_last_token(net: Net) -> None:
    endless = net(settings())
    assert (endless.lengths_PG == T).all() and not endless.finished_PG.any()
    eos = [int(endless.tokens_PGT[0, 0, 2]), int(endless.tokens_PGT[1, 1, 5]), int(endless.tokens_PGT[2, 2, T - 1])]
    out = net(settings(eos=eos))
    for index in np.ndindex(P, G):
        drawn = endless.tokens_PGT[index]
        ends = np.flatnonzero(np.isin(drawn, eos))
        length = ends[0] + 1 if ends.size else T  # the end-of-text token is counted
        assert out.lengths_PG[index] == length
        assert out.finished_PG[index] == bool(ends.size)
        np.testing.assert_array_equal(out.tokens_PGT[index], np.where(np.arange(T) < length, drawn, PAD))
        np.testing.assert_array_equal(out.logprobs_PGT[index][length:], 0)
        np.testing.assert_allclose(out.logprobs_PGT[index][:length], endless.logprobs_PGT[index][:length], atol=1e-5)
    last_PG = np.take_along_axis(out.tokens_PGT, out.lengths_PG[..., None] - 1, -1)[..., 0]
    assert set(eos) <= set(last_PG[out.finished_PG]), "each of the ids has ended one"
    assert not out.finished_PG.all()


def test_nothing_that_may_change_between_calls_compiles_anew(net: Net) -> None:
    first = net(settings())
    before = net.sample._cache_size()  # type: ignore[attr-defined]
    drawn = int(first.tokens_PGT[0, 0, 0])
    assert net(settings(eos=[drawn])).lengths_PG[0, 0] == 1
    assert net(settings(eos=[(drawn + 1) % V])).tokens_PGT[0, 0, 0] == drawn
    for changed in ({"temperature": 0.0}, {"temperature": 0.3}, {"top_k": 1}, {"top_p": 0.01}, {"min_tokens": 4}):
        net(settings(**changed))
    assert net.sample._cache_size() == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_the_end_until_then(net: Net, temperature: float) -> None:
    half, least = range(0, V, 2), 5
    free = net(settings(temperature, eos=half))
    out = net(settings(temperature, min_tokens=least, eos=half))
    assert free.lengths_PG.min() <= least
    assert not np.isin(out.tokens_PGT[..., :least], half).any()
    assert out.lengths_PG.min() == least + 1, "the first token after them may be the end"


class Chain:
    """A Markov chain behind the model's calls; `extend` is counted at run time."""

    layout = None

    def __init__(self, logits_VV: np.ndarray) -> None:
        self.logits_VV, self.steps, self.rows = jnp.asarray(logits_VV), 0, 0

    def _one_hot(self, tokens: jax.Array) -> jax.Array:
        return jax.nn.one_hot(tokens, len(self.logits_VV))

    def prefill(self, prompt_PS: jax.Array, lengths_P: jax.Array) -> tuple[jax.Array, Prefix]:
        last_P = jnp.take_along_axis(prompt_PS, lengths_P[:, None] - 1, 1)[:, 0]
        P, S = prompt_PS.shape
        nothing = PrefixKeyValues(jnp.zeros((1, P, 1, 1, S)), jnp.zeros((1, P, 1, S, 1)))
        return self._one_hot(prompt_PS), Prefix(nothing, lengths_P, self._one_hot(last_P))

    def extend(self, tokens_PGT: jax.Array, prefix: Prefix, **_: Any) -> tuple[jax.Array, KeyValues]:
        P, G, T = tokens_PGT.shape
        jax.debug.callback(functools.partial(self._count, P * G))
        nothing = jnp.zeros((1, P, 1, G, T, 1))
        return self._one_hot(tokens_PGT), KeyValues(nothing, nothing)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.logits_VV

    def _count(self, rows: int) -> None:
        self.steps += 1
        self.rows += rows


def test_the_loop_stops_when_all_completions_have_ended() -> None:
    size, limit = 5, 50
    chain = Chain(np.random.default_rng(0).normal(size=(size, size)).astype(np.float32))
    call = jax.jit(
        lambda params: sample(
            chain,  # type: ignore[arg-type]
            jnp.zeros((2, 1), jnp.int32),
            jnp.ones(2, jnp.int32),
            jnp.arange(2),
            KEY,
            params,
            num_generations=2,
            max_completion_length=limit,
        )
    )
    for eos, longest in ((range(size), 1), ([3] * size, None), ([size] * size, limit)):
        chain.steps = 0
        options = SamplingParams(np.float32(1), np.int32(0), np.float32(1), np.int32(0), np.array(eos, np.int32))
        out = jax.tree.map(np.asarray, call(options))
        jax.effects_barrier()
        assert chain.steps == out.lengths_PG.max()
        assert chain.steps == longest if longest else 1 < chain.steps < limit
        np.testing.assert_array_equal(out.finished_PG, eos[0] != size)


@pytest.mark.parametrize("fewest", [1, 2, 4])
def test_what_has_ended_is_not_computed_and_nothing_else_changes(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, log-probabilities and lengths as with all rows kept; rows computed follow those that go on."""
    size, limit, P, G = 12, 60, 4, 8
    logits_VV = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    options = SamplingParams(np.float32(1), np.int32(0), np.float32(1), np.int32(0), np.array([3], np.int32))

    def draw_all(fewest: int) -> tuple[Rollout, int]:
        monkeypatch.setattr("models.sampler.MIN_ROWS", fewest)
        monkeypatch.setattr("models.sampler.MIN_SHRINKING_LENGTH", 1)
        chain = Chain(logits_VV)
        call = jax.jit(
            lambda params: sample(
                chain,  # type: ignore[arg-type]
                jnp.arange(P)[:, None],
                jnp.ones(P, jnp.int32),
                jnp.arange(P),
                KEY,
                params,
                num_generations=G,
                max_completion_length=limit,
            )
        )
        out = jax.tree.map(np.asarray, call(options))
        jax.effects_barrier()
        return out, chain.rows

    kept, all_rows = draw_all(10**6)
    out, rows = draw_all(fewest)
    jax.tree.map(np.testing.assert_array_equal, out, kept)
    assert all_rows == P * G * out.lengths_PG.max()
    live = (np.arange(limit)[:, None, None] < out.lengths_PG).sum((1, 2))
    assert len(set(out.lengths_PG.reshape(-1))) > 8 and live.sum() <= rows
    # at each token at most P x (the largest number of completions of one prompt that go on, rounded up to 2^n),
    # once those are 1 each fewer prompts
    widest = (np.arange(limit)[:, None, None] < out.lengths_PG).sum(2).max(1)
    bound = sum(max(P * 2 ** math.ceil(math.log2(n)), fewest) for n in widest if n)
    assert rows <= bound < all_rows


# The distribution


def test_temperature_0_is_greedy(net: Net) -> None:
    """As step-by-step argmax with everything computed anew; so are top_k = 1 and a tiny top_p."""
    tokens = np.zeros((P, S + T), np.int32)
    tokens[:, :S] = PROMPT_PS
    rows_P = np.arange(P)
    for t in range(T):
        logits_PSV = np.asarray(net.logits(net.params, tokens))
        tokens[rows_P, LENGTHS_P + t] = logits_PSV[rows_P, LENGTHS_P + t - 1].argmax(-1)
    expected_PT = np.stack([row[n : n + T] for row, n in zip(tokens, LENGTHS_P, strict=True)])
    for options in (settings(0.0), settings(0.0, top_k=7, top_p=0.5), settings(2.0, top_k=1), settings(top_p=1e-6)):
        out = net(options)
        np.testing.assert_array_equal(out.tokens_PGT, np.repeat(expected_PT[:, None], G, 1))


def test_first_tokens_are_drawn_from_the_models_softmax(net: Net) -> None:
    temperature, steps = 0.8, 250
    out = [net(settings(temperature, eos=EVERYTHING), key=stream_key(0, TRAIN, step)) for step in range(steps)]
    tokens_PB = np.concatenate([rollout.tokens_PGT[:, :, 0] for rollout in out], axis=1)
    logits_PSV = np.asarray(net.logits(net.params, np.pad(PROMPT_PS, ((0, 0), (0, T)))))
    logits_PV = logits_PSV[np.arange(P), LENGTHS_P - 1]
    for p in range(P):
        assert p_value(tokens_PB[p], softmax(logits_PV[p] / temperature)) > 1e-4
        assert p_value(tokens_PB[p], softmax(logits_PV[p])) < 1e-4, "the test sees a temperature of 1"
        assert p_value(tokens_PB[p], softmax(logits_PV[p - 1] / temperature)) < 1e-4, "and another prompt"


DRAWS, SMALL = 20_000, 13


@functools.cache
def small_vocabulary() -> tuple[np.ndarray, np.ndarray, Callable[..., Any]]:
    rng = np.random.default_rng(0)
    logits_V = rng.normal(size=SMALL).astype(np.float32)
    uniform_B = rng.random(DRAWS, np.float32)
    drawing = jax.jit(lambda banned_V, params: draw(jnp.tile(logits_V, (DRAWS, 1)), uniform_B, banned_V, params))
    return logits_V, uniform_B, drawing


@pytest.mark.parametrize("truncation", [(0, 1.0), (5, 1.0), (0, 0.7), (8, 0.8)], ids=["all", "k", "p", "k and p"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_truncated_softmax(temperature: float, truncation: tuple[int, float]) -> None:
    logits_V, _, drawing = small_vocabulary()
    tokens_B, logprobs_B = drawing(np.zeros(SMALL, bool), settings(temperature, *truncation))
    expected_V = truncated_softmax(logits_V, temperature, *truncation)
    assert (expected_V == 0).any() == (truncation != (0, 1.0))
    tokens_B = np.asarray(tokens_B)
    np.testing.assert_array_equal(np.unique(tokens_B), np.flatnonzero(expected_V))
    assert p_value(tokens_B, expected_V) > 1e-4
    np.testing.assert_allclose(logprobs_B, np.log(softmax(logits_V / temperature))[tokens_B], atol=1e-5)
    near = truncated_softmax(logits_V, temperature * 1.2, *truncation)
    assert p_value(tokens_B, near) < 1e-4, "the test sees a temperature that is 20 % higher"


@pytest.mark.parametrize("truncation", [{}, {"top_k": 8, "top_p": 0.8}], ids=["all", "truncated"])
@pytest.mark.parametrize("min_p", [0.0, 0.3, 1.0])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(min_p: float, truncation: dict[str, Any]) -> None:
    """The tokens with p >= min_p p_max, of those that top-k and top-p leave; log-probabilities are of all tokens."""
    logits_V, _, drawing = small_vocabulary()
    temperature = 0.7
    options = settings(temperature, **truncation)._replace(min_p=np.float32(min_p))
    tokens_B, logprobs_B = (np.asarray(x) for x in drawing(np.zeros(SMALL, bool), options))
    probabilities_V = softmax(logits_V / temperature)
    left_V = truncated_softmax(logits_V, temperature, truncation.get("top_k", 0), truncation.get("top_p", 1.0))
    left_V *= probabilities_V >= min_p * probabilities_V.max()
    np.testing.assert_array_equal(np.unique(tokens_B), np.flatnonzero(left_V))
    assert p_value(tokens_B, left_V / left_V.sum()) > 1e-4
    np.testing.assert_allclose(logprobs_B, np.log(probabilities_V)[tokens_B], atol=1e-5)


def test_the_penalty_divides_what_is_likely_and_multiplies_what_is_not() -> None:
    """By hand; and a temperature before the penalty is one behind it."""
    logits_V, seen_V = np.array([2.0, 2.0, -3.0, -3.0, 0.0]), np.array([True, False, True, False, True])
    np.testing.assert_allclose(penalize(logits_V, seen_V, 1.5), [2 / 1.5, 2, -3 * 1.5, -3, 0], rtol=1e-6)
    np.testing.assert_allclose(penalize(logits_V, seen_V, 0.5), [4, 2, -1.5, -3, 0])
    np.testing.assert_allclose(penalize(logits_V / 0.7, seen_V, 1.5), penalize(logits_V, seen_V, 1.5) / 0.7, rtol=1e-6)


def test_tokens_of_the_prompt_and_the_completion_are_penalized(net: Net) -> None:
    """Greedy, as step by step with everything computed anew; log-probabilities are the trainer's, without a penalty."""
    penalty, tokens, rows_P = 1.7, np.zeros((P, S + T), np.int32), np.arange(P)
    tokens[:, :S] = PROMPT_PS
    for t in range(T):
        logits_PV = np.asarray(net.logits(net.params, tokens))[rows_P, LENGTHS_P + t - 1]
        for p, (row_V, length) in enumerate(zip(logits_PV, LENGTHS_P + t, strict=True)):
            seen = np.unique(tokens[p, :length])
            row_V[seen] = np.where(row_V[seen] > 0, row_V[seen] / penalty, row_V[seen] * penalty)
            tokens[p, length] = row_V.argmax()
    expected_PT = np.stack([row[n : n + T] for row, n in zip(tokens, LENGTHS_P, strict=True)])
    out = net(settings(0.0)._replace(repetition_penalty=np.float32(penalty)))
    np.testing.assert_array_equal(out.tokens_PGT, np.repeat(expected_PT[:, None], G, 1))
    assert (out.tokens_PGT != net(settings(0.0)).tokens_PGT).any((1, 2)).all()
    trained = net.logprobs(net.params, PROMPT_PS, LENGTHS_P, out.tokens_PGT, np.float32(1))
    np.testing.assert_allclose(out.logprobs_PGT, trained, atol=1e-4)


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_a_stop_string_cuts_the_same_tokens_where_it_first_ends(net: Net, min_tokens: int) -> None:
    """Behind min_tokens tokens; the token in which it ends is the last one."""
    words = [bytes([97 + v % 7, 97 + v % 11]) for v in range(V)]  # two letters of each token
    stops = [b"bd", b"cac"]
    options = settings(min_tokens=min_tokens)
    free, out = net(options), net(options._replace(stop=make_stop_table(stops, words)))
    for index in np.ndindex(P, G):
        texts = [b"".join(words[token] for token in free.tokens_PGT[index][:n]) for n in range(T + 1)]
        ends = [n for n in range(min_tokens + 1, T + 1) if count(texts[n], stops) > count(texts[n - 1], stops)]
        length = ends[0] if ends else T
        assert (out.lengths_PG[index], out.finished_PG[index]) == (length, bool(ends))
        np.testing.assert_array_equal(
            out.tokens_PGT[index], np.where(np.arange(T) < length, free.tokens_PGT[index], PAD)
        )
        np.testing.assert_array_equal(out.logprobs_PGT[index][length:], 0)
    assert 0 < out.finished_PG.sum() < P * G and out.lengths_PG.min() < T


def count(text: bytes, strings: list[bytes]) -> int:
    return sum(text[i:].startswith(string) for string in strings for i in range(len(text)))


def test_top_k_and_top_p_are_in_that_order() -> None:
    """top_p is a share of what top_k leaves: the two orders keep different sets here."""
    logits_V, _, drawing = small_vocabulary()
    top_k, top_p = 6, 0.75
    expected_V = truncated_softmax(logits_V, 1.0, top_k, top_p)
    other_way_V = truncated_softmax(logits_V, 1.0, 0, top_p) > 0
    other_way_V &= truncated_softmax(logits_V, 1.0, top_k, 1.0) > 0
    assert (other_way_V != (expected_V > 0)).any()
    tokens_B, _ = drawing(np.zeros(SMALL, bool), settings(1.0, top_k, top_p))
    np.testing.assert_array_equal(np.unique(tokens_B), np.flatnonzero(expected_V))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_as_if_absent_but_logprobs_are_of_all(temperature: float) -> None:
    logits_V, _, drawing = small_vocabulary()
    banned_V = logits_V >= np.sort(logits_V)[-2]  # the two best
    tokens_B, logprobs_B = (np.asarray(x) for x in drawing(banned_V, settings(temperature, top_k=4)))
    allowed_V = np.where(banned_V, -np.inf, logits_V)
    if temperature:
        assert p_value(tokens_B, truncated_softmax(allowed_V, 1.0, 4, 1.0)) > 1e-4
    else:
        assert (tokens_B == allowed_V.argmax()).all()
    np.testing.assert_allclose(logprobs_B, np.log(softmax(logits_V))[tokens_B], atol=1e-5)


@functools.cache
def compiled_inverse_cdf() -> Callable[..., jax.Array]:
    return jax.jit(inverse_cdf)


def sparse_weights(size: int) -> Iterator[np.ndarray]:
    """Rows of weights over many orders of magnitude, most of them 0, at least one not."""
    rng = np.random.default_rng(size)
    for density in (0.05, 0.5, 1.0):
        weights = 10 ** rng.uniform(-35, 0, (40, size)) * (rng.random((40, size)) < density)
        weights[np.arange(40), rng.integers(0, size, 40)] += 10 ** rng.uniform(-3, 0, 40)
        yield weights.astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 3, 16, SMALL, V, 150])
def test_inverse_cdf_is_the_inverse_and_never_an_entry_of_weight_0(size: int) -> None:
    rng = np.random.default_rng(0)
    weights_BV = np.concatenate(list(sparse_weights(size)))
    cumulative_BV = np.cumsum(weights_BV.astype(np.float64), -1)
    for uniform in (0.0, 1 - 2.0**-24, None, None, None):
        uniform_B = rng.random(len(weights_BV), np.float32)
        if uniform is not None:
            uniform_B = np.full(len(weights_BV), uniform, np.float32)
        token_B = np.asarray(compiled_inverse_cdf()(weights_BV, uniform_B))[:, None]
        assert token_B.min() >= 0 and token_B.max() < size
        chosen_B, up_to_B = (np.take_along_axis(x, token_B, 1)[:, 0] for x in (weights_BV, cumulative_BV))
        assert (chosen_B > 0).all()
        target_B, slack_B = uniform_B * cumulative_BV[:, -1], 1e-5 * cumulative_BV[:, -1]
        assert (up_to_B - chosen_B - slack_B <= target_B).all() and (target_B <= up_to_B + slack_B).all()


@pytest.mark.parametrize("size", [SMALL, 16, V])
def test_inverse_cdf_frequencies(size: int) -> None:
    weights_V = np.random.default_rng(0).exponential(size=size).astype(np.float32) * (np.arange(size) % 3 > 0)
    expected_V = weights_V.astype(np.float64) / weights_V.sum(dtype=np.float64)
    rows = functools.partial(np.broadcast_to, weights_V, (DRAWS, size))
    drawn_B = np.asarray(compiled_inverse_cdf()(rows(), np.random.default_rng(1).random(DRAWS, np.float32)))
    assert p_value(drawn_B, expected_V) > 1e-4
    assert p_value(drawn_B, np.roll(expected_V, 1)) < 1e-4
    # a grid of uniforms gives every entry its share, to within one draw at either end
    grid_B = np.asarray(compiled_inverse_cdf()(rows(), (np.arange(DRAWS, dtype=np.float32) + 0.5) / DRAWS))
    assert np.abs(np.bincount(grid_B, minlength=size) - DRAWS * expected_V).max() <= 2
    assert (np.diff(grid_B) >= 0).all()


# The generator


@pytest.mark.slow
def test_generator_batches_change_no_text_and_its_end_of_text_ids_are_honoured(
    tiny_config: Qwen3Config, tiny_tokenizer_dir: Path, make_model: Callable[..., Backbone], sentences: list[str]
) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    graphdef, params = split(make_model(tiny_config))
    generator = Generator(graphdef, tokenizer, make_layout(), max_prompt_length=8, max_completion_length=10)
    prompts = [sentence[:length] for sentence, length in zip(sentences, (8, 2, 5, 8, 1), strict=False)]

    complete = functools.partial(generator.complete, params, prompts, KEY, 2)
    whole, parts = complete(5), complete(3)  # 3 + 2: the second batch is filled up
    assert whole.texts_PG == parts.texts_PG
    np.testing.assert_array_equal(whole.lengths_PG, parts.lengths_PG)
    assert len({text for texts in whole.texts_PG for text in texts}) == 10

    prompt_PS, lengths_P = tokenizer.encode_prompts(prompts, 8)
    compiled = generator._sample._cache_size()
    free = generator.rollout(params, prompt_PS, lengths_P, KEY, 2)
    generator.sampling = generator.sampling._replace(eos_ids=np.asarray(free.tokens_PGT[:2, 0, 0]))
    ended = generator.rollout(params, prompt_PS, lengths_P, KEY, 2)
    assert generator._sample._cache_size() == compiled
    assert set(tokenizer.eos_ids).isdisjoint(np.asarray(free.tokens_PGT[:2, 0, 0]).tolist())
    np.testing.assert_array_equal(ended.lengths_PG[:2, 0], 1)
    np.testing.assert_array_equal(ended.finished_PG[:2, 0], True)


def test_generator_draws_only_the_tokenizers_ids(
    tiny_config: Qwen3Config, tiny_tokenizer_dir: Path, make_model: Callable[..., Backbone], sentences: list[str]
) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    padded = replace(tiny_config, vocab_size=2 * tokenizer.size)
    graphdef, params = split(make_model(padded))
    generator = Generator(graphdef, tokenizer, make_layout(), max_prompt_length=8, max_completion_length=16)
    completions = generator.complete(params, [sentence[:8] for sentence in sentences[:2]], KEY, 4, 2)
    assert completions.tokens_PGT.max() < tokenizer.size


def test_generator_ends_texts_with_the_first_stop_string(
    tiny_config: Qwen3Config, tiny_tokenizer_dir: Path, make_model: Callable[..., Backbone], sentences: list[str]
) -> None:
    """The same tokens as without, up to the one in which the text comes to hold a stop string."""
    tokenizer, layout = Tokenizer(tiny_tokenizer_dir), make_layout(devices=jax.devices()[:1])
    graphdef, params = split(make_model(tiny_config))
    params, prompts = jax.device_put(params, layout.sharding(())), [sentence[:8] for sentence in sentences[:3]]

    def complete(*stop: str) -> tuple[Generator, Completions]:
        sizes: dict[str, Any] = {"max_prompt_length": 8, "max_completion_length": 16, "decoding": "unrolled"}
        generator = Generator(graphdef, tokenizer, layout, stop=stop, **sizes)
        return generator, generator.complete(params, prompts, KEY, 4, 3)

    _, free = complete()
    stop = [re.findall("[a-z ]{2}", "\0".join(texts_G))[-1] for texts_G in free.texts_PG[:2]]
    generator, out = complete(*stop)
    endings_PG = generator.endings(out)
    assert endings_PG is not None and {*stop} <= {ending for group in endings_PG for ending in group}
    for p, g in np.ndindex(3, 4):
        length, tokens_T = out.lengths_PG[p, g], out.tokens_PGT[p, g]
        np.testing.assert_array_equal(tokens_T[:length], free.tokens_PGT[p, g, :length])
        shorter = tokenizer.decode(out.tokens_PGT, np.maximum(out.lengths_PG - 1, 0))[p][g]
        assert not any(string in shorter for string in stop)
        ended = any(string in out.texts_PG[p][g] for string in stop)
        assert ended == (endings_PG[p][g] is not None) and (ended or length == free.lengths_PG[p, g])
        assert out.finished_PG[p, g] == (ended or free.finished_PG[p, g])
