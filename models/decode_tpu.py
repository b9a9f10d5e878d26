"""The kernel of `decode_attention` for TPUs (Pallas, Mosaic).

One call for each prompt and some of its key/value heads:

1. Normalises and rotates the group's queries and new keys, [Q G, E] and [G, E] of each head. The new position alone is
   the first state of an online softmax.
2. Reads the prompt's keys and values once for the group, a block of positions after another: block i + 1 is on its way
   from main memory while block i is multiplied.
3. Reads the filled positions of completions that go on, in the same way. The keys of all G completions in a block are
   one matrix, [G B, E], so that a head's scores are one product, [Q G, G B]; those of another completion are masked.
4. Writes the aligned slab of positions that the new one lies in, in place.

The rows of G completions fill up whole registers. A group whose scores do not fit is cut into parts.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.flops import KernelWork

LANES, SUBLANES = 128, 8  # of a TPU's registers
SLAB = 16  # positions that are written together: what main memory holds of bfloat16 in one tile
BLOCK_BYTES = 2**20  # of keys that are read at a time from the cache, and of a head's scores
PAST_BLOCK, PREFIX_BLOCK = 128, 512  # positions that are read at a time
_MASKED = -1e30


def div(a: Any, b: int) -> jax.Array:
    """a // b of numbers from 0 on: `//` asks JAX's own device, which need not be the one that is compiled for."""
    return jax.lax.div(jnp.asarray(a, jnp.int32), jnp.int32(b))


def rem(a: Any, b: int) -> jax.Array:
    return jax.lax.rem(jnp.asarray(a, jnp.int32), jnp.int32(b))


class Sizes(NamedTuple):
    """How the kernel cuts its arrays."""

    heads: int  # key/value heads of one call
    past: int  # positions of a block of the cache
    prefix: int  # of the prompt


def has_tpu_kernel(head_dim: int) -> bool:
    """Returns whether a TPU's kernel can have heads of this width: they fill its lanes."""
    return head_dim % LANES == 0


def padded_positions(count: int) -> int:
    """Returns the positions that a cache or a prompt needs for the kernel, which reads whole slabs."""
    return -(-count // SLAB) * SLAB


@functools.partial(jax.jit, static_argnames=("epsilon", "window", "interpret"))  # all layers: traced once
def attend_on_tpu(
    qkv_PGKWE: jax.Array,
    query_norm_E: jax.Array,
    key_norm_E: jax.Array,
    cos_PGC: jax.Array,
    sin_PGC: jax.Array,
    lengths_P: jax.Array,
    filled_P: jax.Array,
    live_PG: jax.Array,
    prefix_PKSE: tuple[jax.Array, jax.Array],
    cache_PKGTE: tuple[jax.Array, jax.Array],
    *,
    epsilon: float,
    window: int | None,
    interpret: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns [P, G, K, Q, E] and the caches with the new position; arguments as those of `decode_attention`.

    Args:
      filled_P: filled positions of each prompt's completions.
      interpret: as of `pallas_call`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    P, whole, K, W, E = qkv_PGKWE.shape
    Q, T, dtype = W - 2, cache_PKGTE[0].shape[3], qkv_PGKWE.dtype
    parts = group_parts(whole, Q)
    N, G = P * parts, whole // parts  # parts of groups
    rows = _filled_up(G)
    prefix, cache = (
        tuple(_pad_positions(array, axis) for array in pair) for pair, axis in ((prefix_PKSE, 2), (cache_PKGTE, 3))
    )
    S = prefix[0].shape[2]
    work = tpu_kernel_work(P, whole, K, Q, E, S, (T - 1) / 2, dtype.itemsize)["token_attention"]
    sizes = choose_sizes(K, G, S, cache[0].shape[3], E, dtype.itemsize)

    def filled_up(array_PG: jax.Array) -> jax.Array:
        array_NG = array_PG.reshape(N, G, *array_PG.shape[2:])
        return jnp.pad(array_NG, [(0, 0), (0, rows - G)] + [(0, 0)] * (array_PG.ndim - 2))

    numbers = [jnp.repeat(number_P.astype(jnp.int32), parts) for number_P in (lengths_P, filled_P)]
    qkv_KWNGE = jnp.einsum("ngkwe->kwnge", filled_up(qkv_PGKWE))
    cos_NGE = filled_up(jnp.concatenate([cos_PGC, cos_PGC], axis=-1))
    sin_NGE = filled_up(jnp.concatenate([-sin_PGC, sin_PGC], axis=-1))
    heads = pl.BlockSpec((sizes.heads, W, None, rows, E), lambda n, k: (k, 0, n, 0, 0))
    angles = pl.BlockSpec((None, rows, E), lambda n, k: (n, 0, 0))
    scales = pl.BlockSpec((1, E), lambda n, k: (0, 0))
    scalars, memory = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    shape = jax.ShapeDtypeStruct
    out_KQNGE, *grown = pl.pallas_call(
        lambda *refs: _Call(Refs(*refs), parts, epsilon, window).run(),
        grid=(N, K // sizes.heads),
        in_specs=[scalars, scalars, scalars, heads, angles, angles, scales, scales, *[memory] * 4],
        out_specs=[pl.BlockSpec((sizes.heads, Q, None, rows, E), lambda n, k: (k, 0, n, 0, 0)), memory, memory],
        out_shape=[shape((K, Q, N, rows, E), dtype), *(shape(array.shape, array.dtype) for array in cache)],
        scratch_shapes=scratch_shapes(sizes, G, Q, E, dtype),
        input_output_aliases={10: 1, 11: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=round(work.flops), bytes_accessed=round(work.bytes), transcendentals=round(work.flops / (4 * E))
        ),
        name="token_attention",
        interpret=interpret,
    )(
        *(*numbers, live_PG.reshape(N, G).astype(jnp.int32), qkv_KWNGE, cos_NGE, sin_NGE),
        *(query_norm_E[None], key_norm_E[None], *prefix, *cache),
    )
    keys, values = (array[:, :, :, :T] for array in grown)
    out_NGKQE = jnp.einsum("kqnge->ngkqe", out_KQNGE[:, :, :, :G])
    return out_NGKQE.reshape(P, whole, K, Q, E), (keys, values)


def _pad_positions(array: jax.Array, axis: int) -> jax.Array:
    """Fills up whole slabs; the decoder's arrays have them already, and are not copied."""
    missing = padded_positions(array.shape[axis]) - array.shape[axis]
    if not missing:
        return array
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])


def tpu_kernel_work(
    P: int, G: int, K: int, Q: int, E: int, S: int, filled: float, itemsize: int
) -> dict[str, KernelWork]:
    """Returns what the kernel does in a call on one device; arguments as those of `decode_attention.kernel_work`.

    token_attention: 4 P G K Q (S + filled + 1) E FLOPs; keys and values of the prompt once (for each part of a large
    group) and of what is filled, the slab of the new ones read and written, the group's projections, the output
    """
    heads = P * G * K
    cached = 2.0 * (P * K * S * group_parts(G, Q) + heads * (filled + 2 * SLAB)) * E * itemsize
    flops = 4.0 * heads * Q * (S + filled + 1) * E
    return {"token_attention": KernelWork(flops, cached + heads * (2 * Q + 2) * E * itemsize)}


def group_parts(G: int, Q: int) -> int:
    """Returns how many parts a group is cut into, so that a head's scores of a part fit; the prompt is read by each."""
    fitting = (n for n in range(G, 0, -1) if G % n == 0 and 4 * Q * _filled_up(n) * n * PAST_BLOCK <= BLOCK_BYTES)
    return G // next(fitting, 1)


def choose_sizes(K: int, G: int, S: int, T: int, E: int, itemsize: int) -> Sizes:
    """Cuts heads and positions so that blocks fit a TPU's vector memory; two calls a prompt at least: two cores."""
    past = min(PAST_BLOCK, T)
    fitting = max(BLOCK_BYTES // (G * past * E * itemsize), 1)
    heads = max(n for n in range(1, K + 1) if K % n == 0 and n <= min(fitting, max(K // 2, 1)))
    return Sizes(heads, past, min(PREFIX_BLOCK, S))


def _filled_up(G: int) -> int:
    """Returns the rows of whole registers that G completions take."""
    return -(-G // SUBLANES) * SUBLANES


class Refs(NamedTuple):
    """What the kernel reads, writes and works with: U positions of a block, R = Q G rows, N key/value heads."""

    lengths: Any  # of each part of a group
    filled: Any
    live: Any  # and of each of its completions
    qkv_NWGE: Any
    cos_GE: Any
    sin_GE: Any
    query_norm_1E: Any
    key_norm_1E: Any
    prefix_keys_PKSE: Any  # in main memory, as are the other three
    prefix_values_PKSE: Any
    keys_PKGTE: Any
    values_PKGTE: Any
    out_NQGE: Any
    new_keys_PKGTE: Any  # the cache's own memory
    new_values_PKGTE: Any
    query_NRE: Any
    numerator_NRE: Any
    max_NR1: Any  # as often as there are lanes
    denominator_NR1: Any
    new_2NGE: Any  # [2, N, G, E] float32: keys and values of the new position
    prefix_blocks: Any  # [2, 2, N, U, E]: of even and odd blocks, keys and values
    past_blocks: Any  # [2, 2, N, G, U, E]
    slabs: Any  # [2, N, G, SLAB, E]
    prefix_arrived: Any
    past_arrived: Any
    slab_done: Any


def scratch_shapes(sizes: Sizes, G: int, Q: int, E: int, dtype: Any) -> list[Any]:
    """Returns the scratch memory of one call, the last eleven of `Refs`."""
    from jax.experimental.pallas import tpu as pltpu

    N, rows = sizes.heads, _filled_up(G)
    R = Q * rows
    return [
        pltpu.VMEM((N, R, E), dtype),
        pltpu.VMEM((N, R, E), jnp.float32),
        *[pltpu.VMEM((N, R, LANES), jnp.float32)] * 2,
        pltpu.VMEM((2, N, rows, E), jnp.float32),
        pltpu.VMEM((2, 2, N, sizes.prefix, E), dtype),
        pltpu.VMEM((2, 2, N, G, sizes.past, E), dtype),
        pltpu.VMEM((2, N, G, SLAB, E), dtype),
        *[pltpu.SemaphoreType.DMA((2, 2))] * 2,
        pltpu.SemaphoreType.DMA((2,)),
    ]


class _Call:
    """One call of the kernel: a prompt with (a part of) its group, and some of the key/value heads."""

    def __init__(self, refs: Refs, parts: int, epsilon: float, window: int | None) -> None:
        from jax.experimental import pallas as pl

        self.refs, self.epsilon, self.window = refs, epsilon, window
        self.N, W, self.rows, self.E = refs.qkv_NWGE.shape
        self.Q, self.dtype = W - 2, refs.qkv_NWGE.dtype
        self.G = refs.slabs.shape[2]
        self.prefix_block, self.past_block = refs.prefix_blocks.shape[-2], refs.past_blocks.shape[-2]
        self.part = pl.program_id(0)
        self.prompt, self.first = div(self.part, parts), rem(self.part, parts) * self.G
        self.heads = pl.ds(pl.program_id(1) * self.N, self.N)
        self.length = refs.lengths[self.part]
        # A group that ended at the cache's end writes there again, as an update of XLA's would.
        self.filled = jnp.minimum(refs.filled[self.part], refs.keys_PKGTE.shape[3] - 1)
        self.any_live = functools.reduce(operator.or_, (self.is_live(g) for g in range(self.G)))

    def is_live(self, g: Any) -> Any:
        return self.refs.live[self.part, g] > 0

    def run(self) -> None:
        self.for_slabs(lambda copy: copy.start())
        prefix = self.blocks(self.length, self.length + self.filled, self.prefix_block)
        past = self.blocks(self.filled, self.filled, self.past_block)
        self.start_first(prefix, self.for_prefix_copies)
        self.start_first(past, self.for_past_copies)
        self.clear_unread()
        for n in range(self.N):
            self.prepare(n)
        self.for_blocks(prefix, self.for_prefix_copies, self.add_prefix_block)
        self.for_blocks(past, self.for_past_copies, self.add_past_block)
        for n in range(self.N):
            out_RE = self.refs.numerator_NRE[n] / self.refs.denominator_NR1[n][:, :1]
            self.refs.out_NQGE[n] = out_RE.reshape(self.Q, self.rows, self.E).astype(self.dtype)
        self.write_new()

    # Which blocks are read, and when

    def blocks(self, positions: Any, newest: Any, size: int) -> tuple[Any, Any]:
        """Returns the first block and the one behind the last, of those that hold a position that is seen."""
        first = 0 if self.window is None else div(jnp.maximum(newest - self.window + 1, 0), size)
        return first, jnp.where(self.any_live, div(positions + size - 1, size), first)

    def start_first(self, blocks: tuple[Any, Any], for_copies: Any) -> None:
        from jax.experimental import pallas as pl

        @pl.when(blocks[0] < blocks[1])
        def start() -> None:
            for_copies(blocks[0], lambda copy: copy.start())

    def for_blocks(self, blocks: tuple[Any, Any], for_copies: Any, add: Any) -> None:
        """Adds a block to the softmax while the next one is copied."""
        from jax.experimental import pallas as pl

        def step(i: Any, _: None) -> None:
            @pl.when(i + 1 < blocks[1])
            def start_next() -> None:
                for_copies(i + 1, lambda copy: copy.start())

            for_copies(i, lambda copy: copy.wait())
            add(i)

        jax.lax.fori_loop(*blocks, step, None)

    def place(self, i: Any, size: int, count: int) -> Any:
        """Returns the first position of block i as it is read: a last block that would not fit starts earlier."""
        from jax.experimental import pallas as pl

        return pl.multiple_of(jnp.minimum(i * size, count - size), SLAB)

    def for_prefix_copies(self, i: Any, do: Any) -> None:
        """Starts or awaits the copies of a block of the prompt."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        refs, slot = self.refs, rem(i, 2)
        for which, source in enumerate((refs.prefix_keys_PKSE, refs.prefix_values_PKSE)):
            place = pl.ds(self.place(i, self.prefix_block, source.shape[2]), self.prefix_block)
            block = source.at[self.prompt, self.heads, place]
            do(pltpu.make_async_copy(block, refs.prefix_blocks.at[slot, which], refs.prefix_arrived.at[slot, which]))

    def for_past_copies(self, i: Any, do: Any) -> None:
        """Starts or awaits the copies of a block of the cache, of each completion that goes on."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        refs, slot = self.refs, rem(i, 2)
        place = pl.ds(self.place(i, self.past_block, refs.keys_PKGTE.shape[3]), self.past_block)

        def of_completion(g: Any, _: None) -> None:
            @pl.when(self.is_live(g))
            def copy_both() -> None:
                for which, source in enumerate((refs.keys_PKGTE, refs.values_PKGTE)):
                    block = source.at[self.prompt, self.heads, self.first + g, place]
                    target = refs.past_blocks.at[slot, which, :, g]
                    do(pltpu.make_async_copy(block, target, refs.past_arrived.at[slot, which]))

        jax.lax.fori_loop(0, self.G, of_completion, None)

    def clear_unread(self) -> None:
        """Zeroes the blocks of ended completions, which are multiplied by 0 and must be finite."""
        from jax.experimental import pallas as pl

        def of_completion(g: Any, _: None) -> None:
            @pl.when(~self.is_live(g))
            def clear() -> None:
                self.refs.past_blocks[:, :, :, g] = jnp.zeros((2, 2, self.N, self.past_block, self.E), self.dtype)

        jax.lax.fori_loop(0, self.G, of_completion, None)

    # Arithmetic

    def prepare(self, n: int) -> None:
        """Normalises and rotates a head's queries and new keys; the new position is the softmax's first state."""
        refs, scale = self.refs, jnp.asarray(self.E**-0.5, self.dtype)
        rotated = [self.rotate(refs.qkv_NWGE[n, q], refs.query_norm_1E) * scale for q in range(self.Q)]
        query_RE = jnp.concatenate(rotated)
        key_GE = self.rotate(refs.qkv_NWGE[n, self.Q], refs.key_norm_1E).astype(jnp.float32)
        value_GE = refs.qkv_NWGE[n, self.Q + 1].astype(jnp.float32)
        score_R1 = (query_RE.astype(jnp.float32) * jnp.concatenate([key_GE] * self.Q)).sum(-1, keepdims=True)
        refs.query_NRE[n], refs.new_2NGE[0, n], refs.new_2NGE[1, n] = query_RE, key_GE, value_GE
        refs.numerator_NRE[n] = jnp.concatenate([value_GE] * self.Q)
        refs.max_NR1[n] = jnp.broadcast_to(score_R1, refs.max_NR1.shape[1:])
        refs.denominator_NR1[n] = jnp.ones(refs.denominator_NR1.shape[1:], jnp.float32)

    def rotate(self, projection_GE: jax.Array, scale_1E: Any) -> jax.Array:
        """`rotate(rms_norm(x))` of models.qwen3, rounded where those round."""
        from jax.experimental.pallas import tpu as pltpu

        x = projection_GE.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = (x.astype(self.dtype) * scale_1E[...].astype(self.dtype)).astype(jnp.float32)
        return (x * self.refs.cos_GE[...] + pltpu.roll(x, self.E // 2, 1) * self.refs.sin_GE[...]).astype(self.dtype)

    def in_window(self, distance: Any, seen: jax.Array) -> jax.Array:
        return seen if self.window is None else seen & (distance < self.window)

    def add_prefix_block(self, i: Any) -> None:
        R, U = self.Q * self.rows, self.prefix_block
        start = self.place(i, U, self.refs.prefix_keys_PKSE.shape[2])
        position_RU = start + jax.lax.broadcasted_iota(jnp.int32, (R, U), 1)
        seen_RU = (position_RU >= i * U) & (position_RU < self.length)
        seen_RU = self.in_window(self.length + self.filled - position_RU, seen_RU)
        for n in range(self.N):
            keys_UE, values_UE = (self.refs.prefix_blocks[rem(i, 2), which, n] for which in (0, 1))
            self.add(n, keys_UE, values_UE, seen_RU)

    def add_past_block(self, i: Any) -> None:
        """All completions' positions are columns of one product; each row sees those of its own completion."""
        U = self.past_block
        shape = (self.Q * self.rows, self.G * U)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        position = self.place(i, U, self.refs.keys_PKGTE.shape[3]) + rem(column, U)
        seen = (rem(row, self.rows) == div(column, U)) & (position >= i * U) & (position < self.filled)
        seen = self.in_window(self.filled - position, seen)
        for n in range(self.N):
            keys, values = (self.refs.past_blocks[rem(i, 2), which, n].reshape(-1, self.E) for which in (0, 1))
            self.add(n, keys, values, seen)

    def add(self, n: int, keys_UE: jax.Array, values_UE: jax.Array, seen_RU: jax.Array) -> None:
        """Adds positions to the running softmax of a head."""
        refs = self.refs
        scores_RU = jnp.where(seen_RU, self.product(refs.query_NRE[n], keys_UE, 1), _MASKED)
        max_R1 = refs.max_NR1[n]
        new_max_R1 = jnp.maximum(max_R1, scores_RU.max(-1, keepdims=True))
        weights_RU = jnp.where(seen_RU, jnp.exp(scores_RU - new_max_R1[:, :1]), 0.0)
        rescale_R1 = jnp.exp(max_R1 - new_max_R1)
        refs.max_NR1[n] = new_max_R1
        refs.denominator_NR1[n] = refs.denominator_NR1[n] * rescale_R1 + weights_RU.sum(-1, keepdims=True)
        weighted_RE = self.product(weights_RU.astype(self.dtype), values_UE, 0)
        refs.numerator_NRE[n] = refs.numerator_NRE[n] * rescale_R1[:, :1] + weighted_RE

    def product(self, a: jax.Array, b: jax.Array, contracted: int) -> jax.Array:
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        axes = (((1,), (contracted,)), ((), ()))
        return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)

    # The new position

    def for_slabs(self, do: Any, back: bool = False) -> None:
        """Copies the slabs that the new keys and values lie in from main memory, or back to it."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        refs = self.refs
        place = pl.ds(pl.multiple_of(self.filled - rem(self.filled, SLAB), SLAB), SLAB)
        for which, cache in enumerate((refs.new_keys_PKGTE, refs.new_values_PKGTE)):
            group = pl.ds(self.first, self.G)
            ends = cache.at[self.prompt, self.heads, group, place], refs.slabs.at[which]
            do(pltpu.make_async_copy(*(ends[::-1] if back else ends), refs.slab_done.at[which]))

    def write_new(self) -> None:
        """Writes the new keys and values into their slabs, and these to main memory."""
        from jax.experimental import pallas as pl

        refs = self.refs
        is_new = jax.lax.broadcasted_iota(jnp.int32, (SLAB, self.E), 0) == rem(self.filled, SLAB)

        def insert(g: Any, _: None) -> None:
            for which, n in np.ndindex(2, self.N):
                slab, new_1E = refs.slabs[which, n, g].astype(jnp.float32), refs.new_2NGE[which, n, pl.ds(g, 1)]
                refs.slabs[which, n, g] = jnp.where(is_new, new_1E, slab).astype(self.dtype)

        self.for_slabs(lambda copy: copy.wait())
        jax.lax.fori_loop(0, self.G, insert, None)
        self.for_slabs(lambda copy: copy.start(), back=True)
        self.for_slabs(lambda copy: copy.wait(), back=True)
