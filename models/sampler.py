"""Sampling: one jitted loop; the prompt is computed once per group, and all its completions read its keys.

Each row (one completion) draws from its own key, so its tokens do not depend on the other rows, on how the batch is
split, or on the sharding. A token costs one uniform number and a two-level inverse CDF.
Completions that have ended are not computed: as they end, the others move into half as many rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import Past
from models.decoding import Decoder, ScannedDecoder
from models.history import NO_HISTORY, History, Tracked, prompt_history, with_token
from models.qwen3 import Prefix, Qwen3
from models.sharding import Layout, total_shards
from models.stop_strings import StopTable

MIN_ROWS = 8  # fewer active rows cost hardly less time
MIN_SHRINKING_LENGTH = 128  # tokens; below it, compiling loops for fewer rows takes longer than they save


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


class Rollout(NamedTuple):
    """Sampled completions, right-padded."""

    tokens_PGT: jax.Array  # pad_id behind the end
    # float32, of the tempered distribution before the repetition penalty, top-k, top-p and min-p; 0 behind the end
    logprobs_PGT: jax.Array
    lengths_PG: jax.Array  # tokens, with the end-of-text token, or the token in which a stop string ends
    finished_PG: jax.Array  # True = ended by an end-of-text token or a stop string, False = truncated at T


def sample(
    model: Qwen3 | Decoder,
    prompt_PS: jax.Array,
    lengths_P: jax.Array,
    rows_P: jax.Array,
    key: jax.Array,
    params: SamplingParams,
    *,
    num_generations: int,
    max_completion_length: int,
    pad_id: int = 0,
    drawing: Drawing | None = None,
) -> Rollout:
    """Draws G completions of up to T tokens for each prompt.

    Args:
      model: the policy, or how to run it (`models.decoding`).
      prompt_PS, lengths_P: right-padded prompts of at least one token.
      rows_P: [P] the prompts' numbers in the whole batch; completion g of prompt p draws from the key
        fold_in(key, rows_P[p] * G + g), its token t from the t-th uniform number of that key. Or [P, G], the
        number that each completion's key folds in; its tokens then do not depend on G either.
      key: the key of this run, stream and step.
      params: sampling settings.
      num_generations, max_completion_length: G and T.
      pad_id: the token behind a completion's end.
      drawing: what `params` asks for, if that is known; None = the program decides, and has both in it.
    """
    decoder = as_decoder(model)
    with jax.named_scope("prefill"):
        prefix, past = decoder.start(prompt_PS, lengths_P, num_generations, max_completion_length)
    history = decoder_history(decoder, prefix, params.tracked, prompt_PS, lengths_P, num_generations)
    rows = first_rows(prefix, rows_P, key, num_generations, max_completion_length, pad_id, history)
    return decode_to_end(decoder, prefix, DecodeState(rows, past), params, pad_id, drawing)[0]


def as_decoder(model: Any) -> Decoder:
    """Returns how to run a model: itself, if it is a decoder."""
    return model if hasattr(model, "start") else ScannedDecoder(model)


class ActiveRows(NamedTuple):
    """The completions still being computed: P prompts and G completions of each, fewer as completions end."""

    completion_PG: jax.Array  # index among the prompt's completions
    done_PG: jax.Array  # ended; the row only fills the array
    hidden_PGD: jax.Array  # predicts the next token
    uniforms_PGT: jax.Array
    rollout: Rollout
    history: History = NO_HISTORY


class DecodeState(NamedTuple):
    """State of the decoding loop."""

    rows: ActiveRows
    past: Any  # the decoder's cache, of as many positions for all prompts or for each; to shrink, a `Past`


def decoder_history(
    decoder: Decoder, prefix: Any, tracked: Tracked, prompt_PS: jax.Array, lengths_P: jax.Array, G: int
) -> History:
    """Returns what is tracked of completions that have no token yet."""
    V = jax.eval_shape(decoder.logits, prefix.last_PD).shape[-1] if tracked.seen else 0
    return prompt_history(tracked, prompt_PS, lengths_P, G, V, decoder.layout)


def first_rows(
    prefix: Any, rows_P: jax.Array, key: jax.Array, G: int, T: int, pad_id: int, history: History = NO_HISTORY
) -> ActiveRows:
    """Returns completions that have no token yet, with the numbers that they draw from (`rows_P`: see `sample`)."""
    P = len(rows_P)
    rows_PG = rows_P if rows_P.ndim == 2 else rows_P[:, None] * G + jnp.arange(G)
    keys_PG = jax.vmap(jax.vmap(lambda row: jax.random.fold_in(key, row)))(rows_PG)
    uniforms_PGT = jax.vmap(jax.vmap(lambda k: jax.random.uniform(k, (T,))))(keys_PG)
    empty = Rollout(
        jnp.full((P, G, T), pad_id, jnp.int32),
        jnp.zeros((P, G, T), jnp.float32),
        jnp.zeros((P, G), jnp.int32),
        jnp.zeros((P, G), bool),
    )
    hidden_PGD = jnp.broadcast_to(prefix.last_PD[:, None], (P, G, prefix.last_PD.shape[-1]))
    completion_PG = jnp.tile(jnp.arange(G), (P, 1))
    return ActiveRows(completion_PG, jnp.zeros((P, G), bool), hidden_PGD, uniforms_PGT, empty, history)


@jax.named_scope("token")
def decode_step(
    decoder: Decoder, prefix: Any, params: SamplingParams, pad_id: int, drawing: Drawing | None, state: DecodeState
) -> DecodeState:
    """Draws one more token of every completion that continues, and computes what predicts the next one."""
    rows, t = state.rows, state.past.length
    logits_PGV = decoder.logits(rows.hidden_PGD)
    uniform_PG = at_position(rows.uniforms_PGT, t)
    is_eos_V = jnp.zeros(logits_PGV.shape[-1], bool).at[jnp.asarray(params.eos_ids)].set(True)
    too_early = t < params.min_tokens if t.ndim == 0 else (t < params.min_tokens)[:, None, None]
    banned = is_eos_V & too_early
    if params.absent_V is not None:
        banned |= params.absent_V
    token_PG, logprob_PG = draw(logits_PGV, uniform_PG, banned, params, drawing, rows.history.seen_PGV)

    live_PG, rollout = ~rows.done_PG, rows.rollout
    token_PG = jnp.where(live_PG, token_PG, pad_id)
    history, stopped_PG = with_token(rows.history, token_PG, params.stop)
    ended_PG = live_PG & (token_PG[..., None] == jnp.asarray(params.eos_ids)).any(-1)
    if stopped_PG is not None:
        ended_PG |= live_PG & stopped_PG & ~(too_early if t.ndim == 0 else too_early[..., 0])
    rollout = Rollout(
        set_position(rollout.tokens_PGT, token_PG, t, live_PG),
        set_position(rollout.logprobs_PGT, jnp.where(live_PG, logprob_PG, 0), t, live_PG),
        rollout.lengths_PG + live_PG,
        rollout.finished_PG | ended_PG,
    )
    done_PG = rows.done_PG | ended_PG
    if t.ndim:
        done_PG |= (t + 1 == rows.uniforms_PGT.shape[-1])[:, None]
    hidden_PGD, past = decoder.step(token_PG, prefix, state.past, ~done_PG)
    if t.ndim:  # prompts that have ended stay at the beginning of the cache: they write behind no end, and read nothing
        past = past._replace(length=jnp.where(done_PG.all(1), 0, past.length))
    return DecodeState(rows._replace(done_PG=done_PG, hidden_PGD=hidden_PGD, rollout=rollout, history=history), past)


def at_position(array_PGT: jax.Array, t: jax.Array) -> jax.Array:
    """Returns array_PGT[:, :, t], for one t or one of each prompt."""
    if t.ndim == 0:
        return jax.lax.dynamic_index_in_dim(array_PGT, t, axis=2, keepdims=False)
    return jnp.take_along_axis(array_PGT, t[:, None, None], axis=2)[..., 0]


def set_position(array_PGT: jax.Array, values_PG: jax.Array, t: jax.Array, live_PG: jax.Array) -> jax.Array:
    """Sets array_PGT[:, :, t], for one t or, of rows that continue, for one of each prompt."""
    if t.ndim == 0:
        return array_PGT.at[:, :, t].set(values_PG)
    is_next_PGT = (jnp.arange(array_PGT.shape[-1]) == t[:, None, None]) & live_PG[..., None]
    return jnp.where(is_next_PGT, values_PG[..., None], array_PGT)  # no scatter: these arrays are small


def decode_to_end(
    decoder: Decoder,
    prefix: Any,
    state: DecodeState,
    params: SamplingParams,
    pad_id: int,
    drawing: Drawing | None = None,
) -> tuple[Rollout, DecodeState]:
    """Decodes until all completions have ended, in fewer rows as they do where the decoder gains by it.

    Returns:
      The completions, and the state before its rows were first reduced, whose buffers can be those of the argument.
    """
    (P, G), T = state.rows.done_PG.shape, state.rows.uniforms_PGT.shape[-1]
    prompt_P, rollout, unreduced = jnp.arange(P), state.rows.rollout, None
    sizes = row_sizes(decoder, P, G, T)
    for size, smaller in zip(sizes, [*sizes[1:], None], strict=True):

        def should_continue(state: DecodeState, smaller: tuple[int, int] | None = smaller) -> jax.Array:
            done_PG = state.rows.done_PG
            return (state.past.length < T).all() & ~done_PG.all() & ~fits_in(done_PG, smaller)

        step = partial(decode_step, decoder, prefix, params, pad_id, drawing)
        state = jax.lax.while_loop(should_continue, step, state)
        unreduced = state if unreduced is None else unreduced
        index = (prompt_P[:, None], state.rows.completion_PG)
        rollout = jax.tree.map(lambda all, some, index=index: all.at[index].set(some), rollout, state.rows.rollout)
        if smaller is not None and smaller[1] < size[1]:
            state = shrink_completions(state, smaller[1])
        elif smaller is not None:
            prompt_P, prefix, state = shrink_prompts(prompt_P, prefix, state, smaller[0])
    assert unreduced is not None
    return rollout, unreduced


def row_sizes(decoder: Decoder, P: int, G: int, T: int) -> list[tuple[int, int]]:
    """Returns the sizes (prompts, completions of each) that a decoder's rows shrink through, (P, G) the first."""
    shrinks = decoder.shrinks and T >= MIN_SHRINKING_LENGTH
    return shrink_schedule(P, G, decoder.layout) if shrinks else [(P, G)]


def shrink_schedule(P: int, G: int, layout: Layout | None) -> list[tuple[int, int]]:
    """Returns the sizes (prompts, completions of each) that the active rows shrink through, by halves to MIN_ROWS.

    Completions are halved first, since each prompt stays on its device; then prompts, unless they are sharded.
    """
    sizes = [(P, G)]
    while P * G >= 2 * MIN_ROWS:
        if G % 2 == 0 and (G // 2) % total_shards(layout, "group") == 0:
            G //= 2
        elif P % 2 == 0 and total_shards(layout, "prompt") == 1:
            P //= 2
        else:
            break
        sizes.append((P, G))
    return sizes


def fits_in(done_PG: jax.Array, size: tuple[int, int] | None) -> jax.Array:
    """Whether the completions that continue fit into this size (prompts, completions of each)."""
    if size is None:
        return jnp.zeros((), bool)
    live_PG = ~done_PG
    return (live_PG.any(1).sum() <= size[0]) & (live_PG.sum(1).max() <= size[1])


@jax.named_scope("shrink")
def shrink_completions(state: DecodeState, G: int) -> DecodeState:
    """Reduces the rows to G of each prompt: all that continue, filled up with ended ones."""
    index_PG = jnp.argsort(state.rows.done_PG, axis=1, stable=True)[:, :G]

    def take(array_PG: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array_PG, jnp.expand_dims(index_PG, range(2, array_PG.ndim)), axis=1)

    index_1P1G11 = index_PG[None, :, None, :, None, None]
    keys_LPKGET = jnp.take_along_axis(state.past.keys_LPKGET, index_1P1G11, axis=3)
    values_LPKGTE = jnp.take_along_axis(state.past.values_LPKGTE, index_1P1G11, axis=3)
    return DecodeState(jax.tree.map(take, state.rows), Past(keys_LPKGET, values_LPKGTE, state.past.length))


@jax.named_scope("shrink")
def shrink_prompts(
    prompt_P: jax.Array, prefix: Prefix, state: DecodeState, P: int
) -> tuple[jax.Array, Prefix, DecodeState]:
    """Reduces the rows to P prompts: all with a completion that continues, filled up with others."""
    index_P = jnp.argsort(state.rows.done_PG.all(1), stable=True)[:P]
    take_prompts = partial(jnp.take, indices=index_P, axis=1)
    prefix = Prefix(jax.tree.map(take_prompts, prefix.kv), prefix.lengths_P[index_P], prefix.last_PD[index_P])
    rows = jax.tree.map(lambda array: array[index_P], state.rows)
    length = state.past.length if state.past.length.ndim == 0 else state.past.length[index_P]
    past = Past(take_prompts(state.past.keys_LPKGET), take_prompts(state.past.values_LPKGTE), length)
    return prompt_P[index_P], prefix, DecodeState(rows, past)


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
