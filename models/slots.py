"""Rollouts in parts: fewer slots than prompts; a slot whose G completions have all ended is given to a waiting prompt.

Four programs, and the host between them:

    empty    slots without prompts
    refill   prefills C waiting prompts, and puts them into slots that have ended
    decode   draws tokens in all slots until enough of them have ended
    finish   the same until all have ended, in fewer rows as they do (where the decoder gains by it)

Each slot has a position of its own. Completions draw from the keys of their prompt's number in the whole batch, so
their tokens are those of all prompts at once, up to rounding. What happens next follows from which slots have ended;
every process knows that, so several stay in step. A device keeps its slots, so no keys and values are sent.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.decoding import Decoder, make_decoder
from models.history import UNTRACKED, Tracked
from models.qwen3 import Prefix
from models.sampler import (
    DecodeState,
    Drawing,
    Rollout,
    SamplingParams,
    decode_step,
    decode_to_end,
    decoder_history,
    first_rows,
    row_sizes,
)
from models.sharding import Layout, constrain, fetch, total_shards

REFILL_SHARE = 8  # slots are refilled when an eighth of them has ended: more often, prefills are small; else slots idle


class Part(NamedTuple):
    """Groups whose completions have all ended, on the host."""

    prompts_P: np.ndarray  # their prompts' numbers in the batch
    rollout: Any  # a Rollout of NumPy arrays


def join_parts(parts: list[Part]) -> Rollout:
    """Returns the completions of all parts, in the order of their prompts."""
    order = np.argsort(np.concatenate([part.prompts_P for part in parts]))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[order], *[part.rollout for part in parts])


class Slots(NamedTuple):
    """Prompts that are decoded together, P of them, each at its own position."""

    prefix: Any  # the decoder's
    state: DecodeState


def slot_axes(slots: Slots) -> Slots:
    """Returns the logical axes of every array."""
    stacked = ("layers",) if isinstance(slots.prefix, Prefix) else ()
    keys, cache = (*stacked, "prompt", "kv_heads", None, None), (*stacked, "prompt", "kv_heads", "group", None, None)
    prefix = jax.tree.map(lambda a: keys if a.ndim == len(keys) else ("prompt", "width")[: a.ndim], slots.prefix)
    rows = jax.tree.map(lambda a: ("prompt", "group", None)[: a.ndim], slots.state.rows)
    past = jax.tree.map(lambda a: cache if a.ndim == len(cache) else ("prompt",), slots.state.past)
    return Slots(prefix, DecodeState(rows._replace(hidden_PGD=("prompt", "group", "width")), past))


def placed(layout: Layout | None, slots: Slots) -> Slots:
    """Constrains every array, so that each program returns slots where the next one expects them."""
    return jax.tree.map(lambda array, axes: constrain(layout, array, *axes), slots, slot_axes(slots))


def empty_slots(decoder: Decoder, P: int, S: int, G: int, T: int, pad_id: int, tracked: Tracked = UNTRACKED) -> Slots:
    """Returns P slots, all of which have ended, for prompts of S tokens."""

    def filled() -> Slots:
        prompts = jnp.zeros((P, S), jnp.int32), jnp.ones(P, jnp.int32)
        prefix, past = decoder.start(*prompts, G, T)
        history = decoder_history(decoder, prefix, tracked, *prompts, G)
        rows = first_rows(prefix, jnp.arange(P), jax.random.key(0), G, T, pad_id, history)
        return Slots(prefix, DecodeState(rows, past._replace(length=jnp.zeros(P, jnp.int32))))

    slots = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(filled))
    rows = slots.state.rows._replace(done_PG=jnp.ones((P, G), bool))
    return placed(decoder.layout, slots._replace(state=slots.state._replace(rows=rows)))


def refill_slots(
    decoder: Decoder,
    slots: Slots,
    prompt_CS: jax.Array,
    lengths_C: jax.Array,
    rows_C: jax.Array,
    key: jax.Array,
    source_P: jax.Array,
    *,
    pad_id: int,
    tracked: Tracked = UNTRACKED,
) -> tuple[Slots, Rollout]:
    """Puts new prompts into slots that have ended.

    Args:
      prompt_CS, lengths_C, rows_C, key: as for `models.sampler.sample`.
      source_P: which of its device's new prompts a slot gets; -1: it stays as it is.
      tracked: what the sampling settings need of the tokens so far.

    Returns:
      The slots, and the completions that they held before, on every device.
    """
    (_, G), T, layout = slots.state.rows.done_PG.shape, slots.state.rows.uniforms_PGT.shape[-1], decoder.layout
    with jax.named_scope("prefill"):
        prefix, _ = decoder.start(prompt_CS, lengths_C, G, T)
    history = decoder_history(decoder, prefix, tracked, prompt_CS, lengths_C, G)
    new_rows = first_rows(prefix, rows_C, key, G, T, pad_id, history)
    axes = slot_axes(slots)

    def insert(axes: Any, old: jax.Array, new: jax.Array) -> jax.Array:
        axis = axes.index("prompt")

        def insert_here(old: jax.Array, new: jax.Array, source_P: jax.Array) -> jax.Array:
            taken = jnp.take(new, source_P, axis=axis, mode="clip")
            return jnp.where((source_P >= 0).reshape(-1, *[1] * (old.ndim - 1 - axis)), taken, old)

        if layout is None or layout.mesh.size == 1:
            return insert_here(old, new, source_P)
        spec = layout.spec(axes)
        specs = (spec, spec, layout.spec(("prompt",)))
        here = jax.shard_map(insert_here, mesh=layout.mesh, in_specs=specs, out_specs=spec, check_vma=False)
        return here(old, new, source_P)

    old_rows, whole = slots.state.rows, partial(jax.tree.map, lambda old, axes, new: insert(axes, old, new))
    rows = whole(old_rows, axes.state.rows, new_rows)  # the cache stays: nothing of it is filled at position 0
    filled = Slots(whole(slots.prefix, axes.prefix, prefix), slots.state._replace(rows=rows))
    return placed(layout, filled), jax.tree.map(partial(_on_every_device, layout), old_rows.rollout)


def decode_slots(
    decoder: Decoder,
    prefix: Any,
    state: DecodeState,
    params: SamplingParams,
    enough: jax.Array,
    *,
    pad_id: int,
    drawing: Drawing | None,
) -> tuple[DecodeState, jax.Array]:
    """Draws tokens until so many slots have ended; returns the state, and [P] whether each slot has."""

    def should_continue(state: DecodeState) -> jax.Array:
        ended_P = state.rows.done_PG.all(1)
        return (ended_P.sum() < enough) & ~ended_P.all()

    step = partial(decode_step, decoder, prefix, params, pad_id, drawing)
    state = jax.lax.while_loop(should_continue, step, state)
    _, state = placed(decoder.layout, Slots(prefix, state))
    return state, _on_every_device(decoder.layout, state.rows.done_PG.all(1))


def _on_every_device(layout: Layout | None, array: jax.Array) -> jax.Array:
    return constrain(layout, array, *[None] * array.ndim)


class SlotPrograms(NamedTuple):
    """The jitted programs; what is donated is updated in place."""

    empty: Any  # (weights, *, P, S, G) -> Slots
    refill: Any  # (weights, Slots, prompt_CS, lengths_C, rows_C, key, source_P) -> Slots, Rollout
    decode: Any  # (weights, prefix, state, sampling, enough, *, drawing) -> state, ended_P
    finish: Any  # (weights, prefix, rows, rollout, past, sampling, *, drawing) -> Rollout, past


def slot_programs(graphdef: Any, T: int, pad_id: int, layout: Layout, tracked: Tracked = UNTRACKED) -> SlotPrograms:
    """Returns the programs of a policy, for completions of T tokens; `tracked` is that of the sampling settings."""
    # On one device `placed` constrains nothing, and JAX would name the same place in several ways: compiled for each.
    place: dict[str, Any] = {"out_shardings": layout.sharding(())} if layout.mesh.size == 1 else {}

    def empty(weights: Any, *, P: int, S: int, G: int) -> Slots:
        return empty_slots(make_decoder(weights, graphdef), P, S, G, T, pad_id, tracked)

    def refill(weights: Any, slots: Slots, *arguments: jax.Array) -> tuple[Slots, Rollout]:
        return refill_slots(make_decoder(weights, graphdef), slots, *arguments, pad_id=pad_id, tracked=tracked)

    def decode(weights: Any, *arguments: Any, drawing: Drawing | None) -> tuple[DecodeState, jax.Array]:
        return decode_slots(make_decoder(weights, graphdef), *arguments, pad_id=pad_id, drawing=drawing)

    def finish(
        weights: Any, prefix: Any, rows: Any, rollout: Rollout, past: Any, sampling: Any, *, drawing: Drawing | None
    ) -> tuple[Rollout, Any]:
        state, decoder = DecodeState(rows._replace(rollout=rollout), past), make_decoder(weights, graphdef)
        rollout, unreduced = decode_to_end(decoder, prefix, state, sampling, pad_id, drawing)
        _, unreduced = placed(decoder.layout, Slots(prefix, unreduced))
        rollout = jax.tree.map(lambda a: constrain(decoder.layout, a, *("prompt", "group", None)[: a.ndim]), rollout)
        return rollout, unreduced.past

    return SlotPrograms(
        jax.jit(empty, static_argnames=("P", "S", "G"), **place),
        jax.jit(refill, donate_argnums=1, **place),
        jax.jit(decode, donate_argnums=2, static_argnames="drawing", **place),
        jax.jit(finish, donate_argnums=(3, 4), static_argnames="drawing", **place),
    )


def finish_arguments(slots: Slots, sampling: SamplingParams) -> tuple[Any, ...]:
    """Returns what `finish` takes behind the weights: what is donated stands apart."""
    rows: Any = slots.state.rows
    return slots.prefix, rows._replace(rollout=None), rows.rollout, slots.state.past, sampling


def refill_size(slots: int, layout: Layout | None) -> int:
    """Returns how many prompts are prefilled at a time, as many on each device: an eighth of the slots."""
    shards = total_shards(layout, "prompt")
    return shards * max(1, slots // shards // REFILL_SHARE)


def has_finish(weights: Any, graphdef: Any, P: int, G: int, T: int) -> bool:
    """Returns whether the last prompts are decoded by `finish`; if not, by `decode`."""
    return len(row_sizes(make_decoder(weights, graphdef), P, G, T)) > 1


class Batch(NamedTuple):
    """The prompts of a batch, on the host, and what their completions draw from."""

    prompt_PS: np.ndarray
    lengths_P: np.ndarray
    key: jax.Array


class SlotRollouts:
    """Iterates over the groups of a batch as they end. What can be computed before the first has ended is dispatched.

    While the caller works on a part, the devices decode the next one.

    Args:
      slots: prompts that are decoded at a time, fewer than there are.
      finishes: see `has_finish`.
    """

    def __init__(
        self,
        programs: SlotPrograms,
        weights: Any,
        batch: Batch,
        sampling: SamplingParams,
        *,
        slots: int,
        num_generations: int,
        layout: Layout,
        drawing: Drawing | None,
        finishes: bool,
    ) -> None:
        self._programs, self._weights, self._batch, self._sampling = programs, weights, batch, sampling
        self._layout, self._drawing, self._finishes = layout, drawing, finishes
        self._waiting = list(range(len(batch.prompt_PS)))
        self._prompt_of = np.full(slots, -1)  # each slot's prompt; -1: none that is not yielded yet
        self._slots: Slots = programs.empty(weights, P=slots, S=batch.prompt_PS.shape[1], G=num_generations)
        self._refill(np.ones(slots, bool))
        self._ended_P = self._decode()

    def __iter__(self) -> Iterator[Part]:
        while self._ended_P is not None:
            ended_P = fetch(self._ended_P)  # waits for the devices
            if not self._waiting:
                break
            prompts_P, rollout = self._prompt_of[ended_P], self._refill(ended_P)
            self._ended_P = self._decode()
            yield self._part(prompts_P, ended_P, rollout)
        last_P = self._prompt_of >= 0
        yield self._part(self._prompt_of[last_P], last_P, self._slots.state.rows.rollout)

    def _part(self, prompts_P: np.ndarray, slots_P: np.ndarray, rollout: Rollout) -> Part:
        return Part(prompts_P, jax.tree.map(lambda array: fetch(array)[slots_P], rollout))

    def _refill(self, ended_P: np.ndarray) -> Rollout:
        """Puts waiting prompts into slots that have ended, as many as there are; returns what the slots held before."""
        slots, shards = len(ended_P), self._layout.shard_count("prompt")
        at_a_time = refill_size(slots, self._layout) // shards
        free, held = [list(np.flatnonzero(part)) for part in np.split(ended_P, shards)], None
        self._prompt_of[ended_P] = -1
        while self._waiting and any(free):
            source_P, chosen = np.full(slots, -1, np.int32), np.full((shards, at_a_time), self._waiting[0])
            for i in range(at_a_time):
                for shard in range(shards):  # in turn, so that every device gets some of the last prompts
                    if free[shard] and self._waiting:
                        slot = shard * (slots // shards) + free[shard].pop(0)
                        chosen[shard, i], source_P[slot] = self._waiting.pop(0), i
                        self._prompt_of[slot] = chosen[shard, i]
            rows, put = chosen.reshape(-1), self._layout.put
            prompts = put(self._batch.prompt_PS[rows], ("prompt", None)), put(self._batch.lengths_P[rows], ("prompt",))
            arguments = (*prompts, put(rows.astype(np.int32), ("prompt",)), self._batch.key, put(source_P, ("prompt",)))
            self._slots, before = self._programs.refill(self._weights, self._slots, *arguments)
            held = before if held is None else held
        assert held is not None
        return held

    def _decode(self) -> jax.Array | None:
        """Decodes until enough slots have ended for the waiting prompts; returns which have. None: all will have."""
        prefix, state = self._slots
        slots, options = len(self._prompt_of), {"drawing": self._drawing}
        if not self._waiting and self._finishes:
            arguments = finish_arguments(self._slots, self._sampling)
            rollout, past = self._programs.finish(self._weights, *arguments, **options)
            self._slots = Slots(prefix, DecodeState(state.rows._replace(rollout=rollout), past))
            return None
        enough = min(refill_size(slots, self._layout), len(self._waiting)) or slots
        state, ended_P = self._programs.decode(
            self._weights, prefix, state, self._sampling, np.int32(enough), **options
        )
        self._slots = Slots(prefix, state)
        return ended_P
