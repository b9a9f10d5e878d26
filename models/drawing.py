"""Draws the next token of each row from its logits, by the settings of sampling.

A token costs one uniform number and a two-level inverse CDF; nothing sorts the vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.history import Tracked
from models.stop_strings import StopTable


class SamplingParams(NamedTuple):
    """Sampling settings; every field is traced, so new values need no new compilation, but for None and a value."""

    temperature: jax.typing.ArrayLike  # 0 = greedy
    top_k: jax.typing.ArrayLike  # 0 = off
    top_p: jax.typing.ArrayLike  # 1 = off
    min_tokens: jax.typing.ArrayLike  # no end-of-text token before this many tokens
    eos_ids: jax.typing.ArrayLike  # [n] ids of the tokens that end a completion
    # [V] True = no token has this id (the rows of a padded embedding), so it is never drawn; None = all ids are tokens
    absent_V: jax.typing.ArrayLike | None = None
    # None = off, and nothing of it is in the program
    min_p: jax.typing.ArrayLike | None = None  # no token of less than this share of the likeliest one's probability
    repetition_penalty: jax.typing.ArrayLike | None = None  # see `penalize`
    stop: StopTable | None = None  # a completion ends with the token in which one of these strings ends

    @property
    def tracked(self) -> Tracked:
        """What the settings need of the tokens so far."""
        return Tracked(self.repetition_penalty is not None, self.stop is not None)


class Drawing(NamedTuple):
    """What sampling settings ask for, known before the program is compiled: it then has no branch to wait for."""

    truncates: bool  # by top-k or top-p
    greedy: bool

    @classmethod
    def of(cls, params: SamplingParams) -> "Drawing":
        """Reads settings that are numbers."""
        temperature, top_k, top_p = (float(setting) for setting in params[:3])  # type: ignore[arg-type]
        return cls(top_k > 0 or top_p < 1, temperature <= 0)


def draw(
    logits: jax.Array,
    uniform: jax.Array,
    banned_V: jax.Array,
    params: SamplingParams,
    drawing: Drawing | None = None,
    seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each row; returns it and its log-probability.

    The settings apply in this order: repetition penalty, temperature, top-k, top-p (of what top-k leaves), min-p.
    The log-probability is that of softmax(logits / temperature), before `banned_V` and all but the temperature: a
    trainer computes the same from the same hidden state. At temperature 0 (greedy) it is that of softmax(logits). The
    softmax is over all V rows, ids without a token included: training lowers these too, for samplers that do not ban
    them.

    Args:
      logits: [..., V] float32 logits.
      uniform: [...] numbers in [0, 1).
      banned_V: [V] booleans, the tokens that must not be drawn; or of every row.
      params: sampling settings.
      drawing: see `sample`.
      seen: [..., V] booleans, the tokens that the repetition penalty is for; None = no penalty.
    """
    temperature = jnp.asarray(params.temperature, logits.dtype)
    logits = logits / jnp.where(temperature > 0, temperature, 1)
    top = logits.max(-1, keepdims=True)
    normalizer = top + jnp.log(jnp.exp(logits - top).sum(-1, keepdims=True))
    penalty = params.repetition_penalty
    penalized = logits if seen is None or penalty is None else penalize(logits, seen, penalty)
    allowed = jnp.where(banned_V, -jnp.inf, penalized)
    weights = jnp.exp(allowed - allowed.max(-1, keepdims=True))
    greedy = lambda weights, _: weights.argmax(-1)  # noqa: E731
    if drawing is not None:
        with jax.named_scope("truncate"):
            weights = _truncate(weights, params) if drawing.truncates else weights
        weights = _without_unlikely(weights, params.min_p)
        with jax.named_scope("draw"):
            token = (greedy if drawing.greedy else inverse_cdf)(weights, uniform)
    else:
        truncates = (jnp.asarray(params.top_k) > 0) | (jnp.asarray(params.top_p) < 1)
        with jax.named_scope("truncate"):  # `train plan` knows by these names which branch a run takes
            weights = jax.lax.cond(truncates, lambda w: _truncate(w, params), lambda w: w, weights)
        weights = _without_unlikely(weights, params.min_p)
        with jax.named_scope("draw"):
            token = jax.lax.cond(temperature > 0, inverse_cdf, greedy, weights, uniform)
    token = token.astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    return token, (chosen - normalizer)[..., 0]


def penalize(logits: jax.Array, seen: jax.Array, penalty: jax.typing.ArrayLike) -> jax.Array:
    """Returns logits with a penalty on repeated tokens: of a seen token l / penalty where l > 0, else l penalty.

    Args:
      logits: [..., V], tempered or not: the penalty commutes with a temperature.
      seen: [..., V] booleans, the tokens of the prompt and the completion so far.
      penalty: above 0; above 1 makes repetitions rarer, 1 changes nothing, below 1 makes them more frequent.

    References:
      Keskar et al., CTRL, https://arxiv.org/abs/1909.05858, section 4.1; for logits below 0, where a division would
      make repetitions likelier, as transformers' and vLLM's `repetition_penalty`.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _without_unlikely(weights: jax.Array, min_p: jax.typing.ArrayLike | None) -> jax.Array:
    """Zeroes the weights below min_p times the largest, which is 1.

    References:
      Nguyen et al., Turning up the heat: min-p sampling, https://arxiv.org/abs/2407.01082, section 3.
    """
    return weights if min_p is None else jnp.where(weights >= min_p, weights, 0)


def inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first index whose cumulative weight exceeds uniform * total; its weight is never 0.

    Two levels: the cumulative sum over about sqrt(V) blocks chooses the block, the one inside of it the entry.

    Args:
      weights: [..., V] numbers of at least 0, not all 0.
      uniform: [...] numbers in [0, 1).
    """
    size = weights.shape[-1]
    width = max(1, round(size**0.5))
    blocks = -(-size // width)
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, blocks * width - size)])
    grid = padded.reshape(*weights.shape[:-1], blocks, width)

    def first_above(values: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        cumulative = jnp.cumsum(values, axis=-1)
        above = (cumulative > target[..., None]) & (values > 0)  # > 0: rounding must not pick a weight of 0
        last = values.shape[-1] - 1 - (values[..., ::-1] > 0).argmax(-1)  # rounding at the end: the last one
        index = jnp.where(above.any(-1), above.argmax(-1), last)
        before = jnp.take_along_axis(cumulative - values, index[..., None], axis=-1)[..., 0]
        return index, target - before

    sums = grid.sum(-1)
    block, rest = first_above(sums, uniform * sums.sum(-1))
    entries = jnp.take_along_axis(grid, block[..., None, None], axis=-2)[..., 0, :]
    entry, _ = first_above(entries, rest)
    return block * width + entry


def _truncate(weights: jax.Array, params: SamplingParams) -> jax.Array:
    """Zeroes the weights outside the top k, then those outside the smallest set that holds top_p of the rest.

    Both sets are given by thresholds, found by bisection on the bits of the (non-negative) floats: exact, without
    sorting the vocabulary. Equal weights at the threshold are all in the set.
    """
    size, top_k, top_p = weights.shape[-1], jnp.asarray(params.top_k), jnp.asarray(params.top_p)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)
    weights = jnp.where(weights >= _threshold(weights, lambda mask: mask.sum(-1) >= k), weights, 0)
    mass = top_p * weights.sum(-1)
    threshold = _threshold(weights, lambda mask: jnp.where(mask, weights, 0).sum(-1) >= mass)
    return jnp.where(top_p < 1, jnp.where(weights >= threshold, weights, 0), weights)


def _threshold(weights: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns [..., 1], the largest value v with holds(weights >= v); holds must be true for v = 0."""
    low = jnp.zeros(weights.shape[:-1], jnp.int32)

    def set_bit(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (1 << (30 - i))  # non-negative floats are in the order of their bits
        value = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        return jnp.where(holds(weights >= value[..., None]), candidate, low)

    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, set_bit, low), jnp.float32)[..., None]
