"""Laws of packing: every token that counts is in one slot, what is computed there is what it is without packing."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gopo_jax import token_logprobs
from models.config import Qwen3Config
from models.hf_weights import split
from models.qwen3 import Qwen3
from train.batch import Batch
from train.build import make_layout_for
from train.config import MeshConfig
from train.packing import CPU_WIDTH, TILE_WIDTH, MicroBatch, microbatches, prompt_width, round_up, row_width, unpack

P, G, S, T, V = 8, 6, 5, 16, 61


def make_batch(lengths_PG: Iterable[Iterable[int]]) -> Batch:
    rng, lengths = np.random.default_rng(0), np.array(lengths_PG)
    tokens_PGT = rng.integers(1, V, (*lengths.shape, T)).astype(np.int32)
    return Batch(
        prompt_PS=rng.integers(1, V, (len(lengths), S)).astype(np.int32),
        lengths_P=1 + np.arange(len(lengths), dtype=np.int32) % S,
        tokens_PGT=tokens_PGT,
        sampled_PGT=rng.normal(size=tokens_PGT.shape).astype(np.float32),
        mask_PGT=np.arange(T) < lengths[..., None],
        advantages_PG=rng.normal(size=lengths.shape).astype(np.float32),
    )


def parts_of(batch: Batch, prompts: int) -> list[tuple[np.ndarray, MicroBatch]]:
    parts = microbatches(batch, prompts, make_layout_for(MeshConfig(), P))
    return [(indices, jax.device_get(micro)) for indices, micro in parts]


@pytest.mark.parametrize("seed", range(5))
def test_every_token_that_counts_has_a_slot_of_its_own(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, width = np.random.default_rng(seed), T + 3 * (seed % 2)  # rows are wider where tiles want it
    monkeypatch.setattr("train.packing.row_width", lambda T, layout: width)
    batch = make_batch(rng.integers(0, rng.integers(2, T + 2), (P, G)))
    parts = parts_of(batch, 2)
    assert sorted(np.concatenate([indices for indices, _ in parts])) == list(range(P))
    for indices, part in parts:
        for name in ("prompt_PS", "lengths_P", "sampled_PGT", "mask_PGT", "advantages_PG"):
            np.testing.assert_array_equal(getattr(part, name), getattr(batch, name)[indices])
        mask_PGT, slot_PGT = part.mask_PGT, part.slot_PGT
        B = part.tokens_PBT.shape[1]
        assert part.tokens_PBT.shape == part.offset_PBT.shape == (2, B, width) and B <= G
        for p in range(2):
            used = slot_PGT[p][mask_PGT[p]]
            assert len(set(used)) == len(used) and used.max(initial=0) < B * width
        back = np.asarray(unpack(part.tokens_PBT, slot_PGT))
        np.testing.assert_array_equal(back[mask_PGT], batch.tokens_PGT[indices][mask_PGT])
        offsets = np.asarray(unpack(part.offset_PBT, slot_PGT))
        np.testing.assert_array_equal(offsets[mask_PGT], np.broadcast_to(np.arange(T), mask_PGT.shape)[mask_PGT])
        for g in np.ndindex(2, G):  # a completion stays in one row
            assert len(set(slot_PGT[g][mask_PGT[g]] // width)) <= 1


def test_short_completions_share_a_row_and_groups_of_like_size_a_micro_batch() -> None:
    short, long = [2] * G, [T] * G
    parts = parts_of(make_batch([long, short, long, short, short, short, short, short]), 2)
    assert [part.tokens_PBT.shape[1] for _, part in parts] == [1, 1, 1, G]
    assert set(parts[-1][0]) == {0, 2}


def test_there_are_few_shapes() -> None:
    assert sorted({round_up(rows, 16, 1) for rows in range(1, 17)}) == [1, 2, 4, 8, 16]
    assert sorted({round_up(rows, 16, 4) for rows in range(1, 17)}) == [4, 8, 16]
    for G in (2, 5, 8, 24):
        assert all(rows <= round_up(rows, G, 1) <= min(G, 2 * rows - 1) for rows in range(1, G + 1))


def test_rows_are_of_whole_tiles_on_accelerators_where_that_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout_for(MeshConfig(), P)
    lengths = (64, 100, 120, 128, 130, 500, 512, 2000)
    assert [row_width(length, layout) for length in lengths] == [*lengths]
    monkeypatch.setattr("train.packing.platform_of", lambda layout: "tpu")
    assert [row_width(length, layout) for length in lengths] == [64, 100, 128, 128, 130, 512, 512, 2048]


@pytest.mark.parametrize("least", [CPU_WIDTH, TILE_WIDTH])
def test_there_are_few_widths_of_prompts_and_each_is_worth_its_program(least: int) -> None:
    for S, slots in ((1024, 0), (1000, 0), (512, 512), (1024, 16 * 2048), (100, 64)):
        width_of = {longest: prompt_width(longest, S, slots, least) for longest in range(1, S + 1)}
        assert all(longest <= width <= S for longest, width in width_of.items())
        widths = set(width_of.values())
        assert len(widths) <= 1 + max(0, np.ceil(np.log2(S / least)))
        assert all(width % least == 0 and 8 * (S - width) >= S + slots for width in widths - {S})


def test_prompts_of_like_length_meet_and_are_cut_to_the_longest() -> None:
    lengths_P = np.array([60, 3, 64, 7, 30, 5, 8, 33], np.int32)
    batch = make_batch([[2] * G] * P)._replace(
        prompt_PS=np.where(np.arange(64) < lengths_P[:, None], 1 + np.arange(64), 0).astype(np.int32),
        lengths_P=lengths_P,
    )
    parts = parts_of(batch, 2)
    assert [part.prompt_PS.shape[1] for _, part in parts] == [8, 8, 64, 64]
    for indices, part in parts:
        assert part.prompt_PS.sum() == batch.prompt_PS[indices].sum()  # what is cut is padding


@pytest.mark.slow
def test_packed_equals_padded() -> None:
    """Log-probabilities and gradients; one of the layers sees only so far back."""
    sliding = {"sliding_window": 3, "layer_types": ("full_attention", "sliding_attention")}
    config = Qwen3Config(V, 32, 48, 2, 4, 2, 16, initializer_range=0.2, **sliding)
    graphdef, params = split(Qwen3(config, nnx.Rngs(0)))
    batch = make_batch(np.random.default_rng(1).integers(1, 8, (2, G)))
    ((order, part),) = parts_of(batch, 2)
    assert part.tokens_PBT.shape[1] < G
    mask_PGT = part.mask_PGT
    weight_PGT = jnp.where(mask_PGT, jax.random.normal(jax.random.key(2), mask_PGT.shape), 0)

    def packed(params: Any) -> tuple[jax.Array, jax.Array]:
        model, tokens = nnx.merge(graphdef, params), part.tokens_PBT
        hidden = model.predict(part.prompt_PS, part.lengths_P, tokens, part.offset_PBT)
        logprobs = unpack(token_logprobs(hidden, model.head_VD, tokens, chunk=7), part.slot_PGT)
        return jnp.vdot(logprobs, weight_PGT), jnp.where(mask_PGT, logprobs, 0)

    def padded(params: Any) -> tuple[jax.Array, jax.Array]:
        model, tokens = nnx.merge(graphdef, params), batch.tokens_PGT[order]
        hidden = model.predict(part.prompt_PS, part.lengths_P, tokens)
        logprobs = token_logprobs(hidden, model.head_VD, tokens, chunk=7)
        return jnp.vdot(logprobs, weight_PGT), jnp.where(mask_PGT, logprobs, 0)

    (_, found), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(padded, has_aux=True))(params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient, expected_gradient)
