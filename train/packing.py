"""Micro-batches of whole groups without the padding: the completions of a group lie one behind the other in few rows.

    tokens_PGT    a group of G completions, each followed by padding up to T
    tokens_PBT    the same tokens in B <= G rows of slots; offset_PBT is a slot's position in its completion
    slot_PGT      the slot of each token among those of its prompt, which brings log-probabilities back to [P, G, T]
    prompt_PS     cut to the longest prompt of the micro-batch, in few widths

A completion never crosses the end of a row, and does not see its neighbours (`models.attention.group_attention`).
A row has T slots, on accelerators a few more if then tiles divide it (`row_width`). Shapes differ in B and S alone: few
shapes, and so few compilations.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.sharding import Layout, platform_of
from models.tokenizer import bucket
from train.batch import Batch

AXES = {
    "PS": ("prompt", None),
    "P": ("prompt",),
    "PG": ("prompt", "group"),
    "PGT": ("prompt", "group", None),
    "PBT": ("prompt", "group", None),
}

CPU_WIDTH, TILE_WIDTH = 8, 128  # tokens of the narrowest prompts; accelerators multiply tiles of 128


class MicroBatch(NamedTuple):
    """Packed groups, as the gradient's program reads them from the devices. Fields as in `Batch` but for three."""

    prompt_PS: Any
    lengths_P: Any
    tokens_PBT: Any  # int32 tokens of the completions, packed into rows
    offset_PBT: Any  # int32, position of each slot in its completion; None: every row is one completion
    slot_PGT: Any  # int32, the slot of each token among those of its prompt
    sampled_PGT: Any
    mask_PGT: Any
    advantages_PG: Any = None
    old_PGT: Any = None
    ref_PGT: Any = None
    top_entropy_PGT: Any = None
    clip_cov_PGT: Any = None
    kl_cov_PGT: Any = None


def microbatches(
    batch: Batch, prompts: int, layout: Layout, *, in_order: bool = False
) -> Iterator[tuple[np.ndarray, MicroBatch]]:
    """Yields the batch in packed parts of `prompts` prompts on the devices, each with its prompts' indices in `batch`.

    Prompts whose completions need as many rows come together, and of these prompts of like length, unless the parts
    are to be `in_order`. Tokens outside `mask_PGT` are in no row.
    """
    _, G, T = batch.mask_PGT.shape
    width = row_width(T, layout)
    row_PG, start_PG = assign_rows(batch.mask_PGT, width)
    rows_P = np.array([round_up(int(row) + 1, G, layout.shard_count("group")) for row in row_PG.max(-1)])
    order_P = np.arange(len(rows_P)) if in_order else np.lexsort((batch.lengths_P, rows_P))
    least = CPU_WIDTH if platform_of(layout) == "cpu" else TILE_WIDTH
    for indices in order_P.reshape(-1, prompts):
        part, rows = batch.take(indices), int(rows_P[indices].max())
        S = prompt_width(int(part.lengths_P.max()), part.prompt_PS.shape[1], rows * width, least)
        part = part._replace(prompt_PS=part.prompt_PS[:, :S])
        micro = pack(part, row_PG[indices], start_PG[indices], rows, width)
        arrays = zip(micro._fields, micro, strict=True)
        placed = (None if array is None else layout.put(array, axes_of(name)) for name, array in arrays)
        yield indices, MicroBatch(*placed)


def axes_of(name: str) -> tuple[str | None, ...]:
    """The logical axes of an array, by the letters behind the last underscore of its name."""
    return AXES[name.rpartition("_")[2]]


def abstract_microbatch(prompts: int, S: int, G: int, T: int, layout: Layout) -> MicroBatch:
    """The shapes of the largest part of `microbatches`: every completion has T tokens and so a row of its own."""

    def of(dtype: Any, name: str, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(axes_of(name)))

    P, B = prompts, G
    return MicroBatch(
        prompt_PS=of(jnp.int32, "PS", P, S),
        lengths_P=of(jnp.int32, "P", P),
        tokens_PBT=of(jnp.int32, "PBT", P, B, row_width(T, layout)),
        offset_PBT=of(jnp.int32, "PBT", P, B, row_width(T, layout)),
        slot_PGT=of(jnp.int32, "PGT", P, G, T),
        sampled_PGT=of(jnp.float32, "PGT", P, G, T),
        mask_PGT=of(jnp.bool_, "PGT", P, G, T),
        advantages_PG=of(jnp.float32, "PG", P, G),
    )


def row_width(T: int, layout: Layout) -> int:
    """Returns the slots of a row: T, on accelerators the next multiple of 128 if that is an eighth more at most."""
    width = -(-T // TILE_WIDTH) * TILE_WIDTH
    return width if platform_of(layout) != "cpu" and 8 * (width - T) <= T else T


def assign_rows(mask_PGT: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs completions first-fit, the longest first; returns the row and the first slot there of each, [P, G]."""
    P, G, _ = mask_PGT.shape
    lengths_PG = mask_PGT.sum(-1)
    row_PG, start_PG = np.zeros((P, G), np.int64), np.zeros((P, G), np.int64)
    for p in range(P):
        filled_G = np.zeros(G, np.int64)
        for g in np.argsort(-lengths_PG[p], kind="stable"):
            row = np.argmax(filled_G + lengths_PG[p, g] <= width)
            row_PG[p, g], start_PG[p, g] = row, filled_G[row]
            filled_G[row] += lengths_PG[p, g]
    return row_PG, start_PG


def round_up(rows: int, G: int, ways: int) -> int:
    """Rounds a number of rows up to a power of two in units of the devices that share them; at most G."""
    units = -(-rows // ways)
    return min((1 << (units - 1).bit_length()) * ways, G)


def prompt_width(longest: int, S: int, completion_slots: int, least: int) -> int:
    """Rounds a prompt's length up to the width of its micro-batch: a power of two of at least `least`, at most S.

    It is S where a narrower one, which is a program more to compile, saves less than an eighth of the positions.
    """
    width = bucket(longest, S, least)
    return width if 8 * (S - width) >= S + completion_slots else S


def pack(batch: Batch, row_PG: np.ndarray, start_PG: np.ndarray, rows: int, width: int) -> MicroBatch:
    """Puts every masked token of `batch` into its slot of `rows` rows of `width` slots, on the host."""
    mask_PGT = batch.mask_PGT
    P, _, T = mask_PGT.shape
    slot_PGT = np.where(mask_PGT, (row_PG * width + start_PG)[..., None] + np.arange(T), 0).astype(np.int32)
    tokens_PBT, offset_PBT = np.zeros((P, rows * width), np.int32), np.zeros((P, rows * width), np.int32)
    p, g, t = np.nonzero(mask_PGT)
    tokens_PBT[p, slot_PGT[p, g, t]] = batch.tokens_PGT[p, g, t]
    offset_PBT[p, slot_PGT[p, g, t]] = t
    return MicroBatch(
        batch.prompt_PS,
        batch.lengths_P,
        tokens_PBT.reshape(P, rows, width),
        offset_PBT.reshape(P, rows, width),
        slot_PGT,
        batch.sampled_PGT,
        mask_PGT,
        batch.advantages_PG,
        batch.old_PGT,
        batch.ref_PGT,
        batch.top_entropy_PGT,
        batch.clip_cov_PGT,
        batch.kl_cov_PGT,
    )


@jax.named_scope("unpack")
def unpack(array_PBT: jax.Array, slot_PGT: jax.Array) -> jax.Array:
    """Gathers the values of the slots for each token, [P, G, T]; arbitrary values outside the mask."""
    P, G, T = slot_PGT.shape
    return jnp.take_along_axis(array_PBT.reshape(P, -1), slot_PGT.reshape(P, -1), axis=1).reshape(P, G, T)
