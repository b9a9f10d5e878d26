"""Sampling: one jitted loop; the prompt is computed once per group, and all its completions read its keys.

Each row (one completion) draws from its own key, so its tokens do not depend on the other rows, on how the batch is
split, or on the sharding (`models.drawing`).
Completions that have ended are not computed: as they end, the others move into half as many rows.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import Past
from models.decoding import Decoder, ScannedDecoder
from models.drawing import Drawing, SamplingParams, draw, inverse_cdf, penalize
from models.history import NO_HISTORY, History, Tracked, prompt_history, with_token
from models.qwen3 import Prefix, Qwen3
from models.sharding import Layout, total_shards

__all__ = ["Drawing", "Rollout", "SamplingParams", "draw", "inverse_cdf", "penalize", "sample"]
MIN_ROWS = 8  # fewer active rows cost hardly less time
MIN_SHRINKING_LENGTH = 128  # tokens; below it, compiling loops for fewer rows takes longer than they save


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
