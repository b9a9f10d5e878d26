"""Micro-batches of whole groups, without the padding: a group's completions lie one behind the other in few rows.

    tokens_PGT    a group of G completions, each followed by padding up to T
    tokens_PBT    the same tokens in B <= G rows of T slots; offset_PBT says where in its completion a slot stands
    slot_PGT      the slot of each token among the B * T of its prompt, to bring log-probabilities back to [P, G, T]

A completion never crosses the end of a row, and does not see its neighbours (`models.attention.group_attention`).
T stays as it is, so that B alone makes shapes: few of them, and so few compilations.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from models.sharding import Layout

Batch = dict[str, np.ndarray]

AXES = {
    "PS": ("prompt", None),
    "P": ("prompt",),
    "PG": ("prompt", "group"),
    "PGT": ("prompt", "group", None),
    "PBT": ("prompt", "group", None),
}


def cut(batch: Batch, prompts: int, layout: Layout, *, in_order: bool = False) -> Iterator[dict[str, jax.Array]]:
    """The batch in parts of so many prompts, packed: those whose completions need the most rows together, or in order.

    `mask_PGT` says which tokens count; the others are in no row.
    """
    row_PG, start_PG = place(batch["mask_PGT"])
    needed_P = row_PG.max(-1) + 1
    _, G, _ = batch["mask_PGT"].shape
    order_P = np.arange(len(needed_P)) if in_order else np.argsort(needed_P, kind="stable")
    for these in order_P.reshape(-1, prompts):
        part = {name: array[these] for name, array in batch.items()}
        rows = round_up(int(needed_P[these].max()), G, layout.ways("group"))
        part = pack(part, row_PG[these], start_PG[these], rows)
        yield {name: layout.put(array, AXES[name.rpartition("_")[2]]) for name, array in part.items()}


def abstract_microbatch(prompts: int, S: int, G: int, T: int, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the largest part that `cut` gives: every completion has T tokens and so a row of its own."""
    sizes = {"P": prompts, "S": S, "G": G, "T": T, "B": G}
    names = {"prompt_PS": "int32", "lengths_P": "int32", "sampled_PGT": "float32", "mask_PGT": "bool"}
    names |= {"advantages_PG": "float32", "tokens_PBT": "int32", "offset_PBT": "int32", "slot_PGT": "int32"}
    found = {}
    for name, dtype in names.items():
        letters = name.rpartition("_")[2]
        shape, sharding = tuple(sizes[letter] for letter in letters), layout.sharding(AXES[letters])
        found[name] = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
    return found


def place(mask_PGT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each completion and its first slot there: the longest first, each into the first row with room."""
    P, G, T = mask_PGT.shape
    lengths_PG = mask_PGT.sum(-1)
    row_PG, start_PG = np.zeros((P, G), np.int64), np.zeros((P, G), np.int64)
    for p in range(P):
        filled_G = np.zeros(G, np.int64)
        for g in np.argsort(-lengths_PG[p], kind="stable"):
            row = np.argmax(filled_G + lengths_PG[p, g] <= T)
            row_PG[p, g], start_PG[p, g] = row, filled_G[row]
            filled_G[row] += lengths_PG[p, g]
    return row_PG, start_PG


def round_up(rows: int, G: int, ways: int) -> int:
    """Up to a power of two, in units of the devices that share the rows; at most G."""
    units = -(-rows // ways)
    return min((1 << (units - 1).bit_length()) * ways, G)


def pack(batch: Batch, row_PG: np.ndarray, start_PG: np.ndarray, rows: int) -> Batch:
    """`tokens_PGT` becomes `tokens_PBT` of so many rows, with `offset_PBT` and `slot_PGT`; the rest stays."""
    mask_PGT = batch["mask_PGT"]
    P, _, T = mask_PGT.shape
    slot_PGT = np.where(mask_PGT, (row_PG * T + start_PG)[..., None] + np.arange(T), 0).astype(np.int32)
    tokens_PBT, offset_PBT = np.zeros((P, rows * T), np.int32), np.zeros((P, rows * T), np.int32)
    p, g, t = np.nonzero(mask_PGT)
    tokens_PBT[p, slot_PGT[p, g, t]] = batch["tokens_PGT"][p, g, t]
    offset_PBT[p, slot_PGT[p, g, t]] = t
    packed = {"tokens_PBT": tokens_PBT.reshape(P, rows, T), "offset_PBT": offset_PBT.reshape(P, rows, T)}
    return {name: array for name, array in batch.items() if name != "tokens_PGT"} | packed | {"slot_PGT": slot_PGT}


def unpack(array_PBT: jax.Array, slot_PGT: jax.Array) -> jax.Array:
    """What was computed for each slot, for each token again, [P, G, T]; anything where there is no token."""
    P, G, T = slot_PGT.shape
    return jnp.take_along_axis(array_PBT.reshape(P, -1), slot_PGT.reshape(P, -1), axis=1).reshape(P, G, T)
