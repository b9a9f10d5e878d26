"""Rollouts in parts: whatever the slots and the decoder, the tokens are those of all prompts at once."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from models import sampler
from models.config import Qwen3Config
from models.decoding import DecodeWeights, UnrolledDecoder
from models.generate import SamplingCopy, known_drawing, sampling_program
from models.hf_weights import split
from models.qwen3 import Backbone
from models.sampler import Rollout, SamplingParams
from models.sharding import make_layout
from models.slots import (
    REFILL_SHARE,
    Batch,
    Part,
    SlotPrograms,
    SlotRollouts,
    Slots,
    has_finish,
    join_parts,
    refill_size,
    slot_programs,
)
from models.stop_strings import make_stop_table

P, S, G, T, V = 9, 6, 3, 24, 61
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, V, (P, S)).astype(np.int32), RNG.integers(1, S + 1, P).astype(np.int32), jax.random.key(3)
)
SAMPLING = SamplingParams(1.0, 0, 1.0, 2, np.arange(0, V, 9, dtype=np.int32))


@pytest.fixture(scope="module", params=["scanned", "unrolled"])
def policy(request: pytest.FixtureRequest, make_model: Callable[..., Backbone], tiny_config: Qwen3Config) -> Any:
    """(graphdef, weights, layout, the completions of all prompts at once)."""
    layout = make_layout(devices=jax.devices()[:1])
    graphdef, params = split(make_model(replace(tiny_config, vocab_size=V)))
    weights = SamplingCopy(graphdef, jax.device_put(params, layout.sharding(())), layout, request.param)(params)
    program, drawing = sampling_program(graphdef, T, 7), known_drawing(weights, SAMPLING)
    prompts = (BATCH.prompt_PS, BATCH.lengths_P, np.arange(P, dtype=np.int32), BATCH.key)
    whole = program(weights, *prompts, SAMPLING, num_generations=G, drawing=drawing)
    return graphdef, weights, layout, jax.tree.map(np.asarray, whole)


def draw_in_slots(policy: Any, slots: int, sampling: SamplingParams = SAMPLING) -> list[Part]:
    graphdef, weights, layout, _ = policy
    programs = slot_programs(graphdef, T, 7, layout, sampling.tracked)
    options: dict[str, Any] = {"drawing": known_drawing(weights, sampling), "layout": layout}
    options["finishes"] = has_finish(weights, graphdef, slots, G, T)
    parts = list(SlotRollouts(programs, weights, BATCH, sampling, slots=slots, num_generations=G, **options))
    sizes = [program._cache_size() for program in programs]
    assert sizes == [1, 1, 1, int(options["finishes"])], "each is compiled once"
    return parts


def assert_same(parts: list[Part], whole: Rollout) -> None:
    found = join_parts(parts)
    assert sorted(np.concatenate([part.prompts_P for part in parts])) == list(range(P))
    for name in ("tokens_PGT", "lengths_PG", "finished_PG"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    np.testing.assert_allclose(found.logprobs_PGT, whole.logprobs_PGT, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_slots_change_no_token(policy: Any, slots: int) -> None:
    whole = policy[-1]
    assert whole.lengths_PG.max(1).min() < T == whole.lengths_PG.max(), "some groups end early"
    parts = draw_in_slots(policy, slots)
    assert len(parts) > 1
    assert_same(parts, whole)


def test_rows_move_together_once_no_prompt_waits(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MIN_SHRINKING_LENGTH", 1)
    monkeypatch.setattr(sampler, "MIN_ROWS", 2)
    graphdef, weights, *_ = policy
    assert has_finish(weights, graphdef, 8, G, T) == (not isinstance(weights, DecodeWeights))
    assert_same(draw_in_slots(policy, 8), policy[-1])


def test_slots_keep_what_settings_need_of_the_tokens_so_far(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that a penalty is for, and the beginnings of stop strings, also where rows move together."""
    monkeypatch.setattr(sampler, "MIN_SHRINKING_LENGTH", 1)
    monkeypatch.setattr(sampler, "MIN_ROWS", 2)
    graphdef, weights, *_, plain = policy
    table = make_stop_table([b"abc", b"ca"], [bytes([97 + v % 5]) for v in range(V)])
    sampling = SAMPLING._replace(repetition_penalty=1.5, stop=table, eos_ids=np.array([60], np.int32))
    prompts = (BATCH.prompt_PS, BATCH.lengths_P, np.arange(P, dtype=np.int32), BATCH.key)
    options: dict[str, Any] = {"num_generations": G, "drawing": known_drawing(weights, sampling)}
    whole = jax.tree.map(np.asarray, sampling_program(graphdef, T, 7)(weights, *prompts, sampling, **options))
    assert whole.lengths_PG.max(1).min() < T and (whole.tokens_PGT != plain.tokens_PGT).any()
    assert_same(draw_in_slots(policy, 4, sampling), whole)


@pytest.mark.parametrize("kernels", ["gpu", "tpu"])
@pytest.mark.parametrize("policy", ["scanned"], indirect=True)
def test_kernels_read_each_prompts_positions(kernels: str, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    graphdef, params, layout, whole = policy
    weights = replace(SamplingCopy(graphdef, params, layout, "unrolled")(params), kernels=kernels)
    monkeypatch.setattr("models.slots.make_decoder", lambda weights, _: UnrolledDecoder(weights, interpret=True))
    assert_same(draw_in_slots((graphdef, weights, layout, whole), 3), whole)


# The host's part, with programs that only count


class Simulation:
    """Slots that end after as many tokens as their prompt's number says, in `lengths_P`."""

    def __init__(self, lengths_P: np.ndarray, slots: int, shards: int) -> None:
        self.lengths_P, self.shards, self.tokens, self.refills = lengths_P, shards, 0, 0
        self.left_P, self.prompt_P = np.zeros(slots, int), np.full(slots, -1)
        self.layout: Any = SimpleNamespace(
            put=lambda array, _: array,
            rules=(("prompt", ("data",)),),
            shard_count=lambda axis: shards if axis == "prompt" else 1,
        )

    @property
    def programs(self) -> SlotPrograms:
        return SlotPrograms(lambda *_, **__: self.slots(), self.refill, self.decode, None)

    def slots(self) -> Slots:
        rows: Any = SimpleNamespace(rollout=Rollout(*[self.prompt_P.copy()] * 4))
        return Slots(None, SimpleNamespace(rows=rows))  # type: ignore[arg-type]

    def refill(self, _: Any, slots: Slots, __: Any, ___: Any, rows_C: np.ndarray, ____: Any, source_P: Any) -> Any:
        before, self.refills = Rollout(*[self.prompt_P.copy()] * 4), self.refills + 1
        for device, (sources, slots_here) in enumerate(
            zip(np.split(source_P, self.shards), np.split(np.arange(len(source_P)), self.shards), strict=True)
        ):
            new = np.split(rows_C, self.shards)[device]
            for slot, source in zip(slots_here, sources, strict=True):
                if source >= 0:
                    assert self.left_P[slot] == 0, "only slots that have ended"
                    self.prompt_P[slot], self.left_P[slot] = new[source], self.lengths_P[new[source]]
        return self.slots(), before

    def decode(self, _: Any, __: Any, ___: Any, ____: Any, enough: int, *, drawing: Any) -> Any:
        while (self.left_P == 0).sum() < enough:
            self.left_P, self.tokens = np.maximum(self.left_P - 1, 0), self.tokens + 1
        return self.slots().state, self.left_P == 0


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("slots", [4, 16, 28])
def test_every_prompt_once_and_slots_hardly_idle(slots: int, shards: int) -> None:
    """The tokens in a row are at most those of slots that wait until an eighth of them has ended, and then the longest.

    With several devices each has its own slots, which the others' prompts cannot take before they wait for one.
    """
    lengths_P = np.minimum(np.random.default_rng(slots).geometric(0.02, 61), 200)
    simulation = Simulation(lengths_P, slots, shards)
    options: dict[str, Any] = {"layout": simulation.layout, "drawing": None, "finishes": False, "num_generations": 1}
    batch = Batch(lengths_P[:, None], lengths_P, BATCH.key)
    rollouts = SlotRollouts(simulation.programs, None, batch, SAMPLING, slots=slots, **options)
    assert simulation.tokens > 0, "the devices are at work before anyone asks for a part"
    parts = list(rollouts)
    for part in parts:
        np.testing.assert_array_equal(part.rollout.lengths_PG, part.prompts_P)
    np.testing.assert_array_equal(join_parts(parts).lengths_PG, np.arange(61))
    size = refill_size(slots, simulation.layout)
    assert size == shards * max(1, slots // shards // REFILL_SHARE)
    busy = slots - size + 1
    assert simulation.tokens <= math.ceil(lengths_P.sum() / busy) + lengths_P.max()
    assert 61 / size <= simulation.refills <= 61
