"""Kernels of `models.flash_attention` for TPUs (Pallas, Mosaic): no score is ever in the device's main memory.

What `models.flash_gpu` does, with the same names, in the order of a TPU: a grid goes over blocks of keys (or of
queries), and sums stay in vector memory until the last of them. A block holds the queries of all heads that read one
key/value head, so keys are fetched once for them. Scores lie as [keys, queries]: numbers of queries are a row of lanes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.attention import KeyValues
from models.flash_gpu import flash_work

BLOCKS = (512, 256, 128)  # positions of a block: the first of them that divides a length
LARGEST_QUERIES = 256  # of one head, in a block of queries; smaller, for a row's last block of keys is half masked
MULTIPLE = 128  # of the lengths that kernels take
HEADS = (16, 32, 64, 128, 256)  # their widths
_MASKED = -1e30
_OVER_WIDTH, _OVER_ROWS = ((1,), (1,)), ((0,), (0,))  # contracted axes of two matrices: a b^T, a^T b


def forward(inputs: Any, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns out_PGTHE in the queries' dtype and the log of the softmax's sum, float32 [P, G, H, T]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    P, G, T, H, E = inputs.query_PGTHE.shape
    query, row, prompt = _heads_first(inputs)
    plan = _Queries(inputs)
    rows = plan.Q * plan.block
    out, normalizer = pl.pallas_call(
        partial(_forward_kernel, prompt_blocks=plan.prompt_blocks),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=plan.grid,
            in_specs=[plan.interval, plan.interval, plan.queries, *plan.keys],
            out_specs=[plan.queries, plan.numbers],
            scratch_shapes=[tpu.VMEM((E, rows), jnp.float32), *[tpu.VMEM((1, rows), jnp.float32)] * 2],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((P, G, plan.K, plan.Q, 1, T), jnp.float32),
        ],
        **_options("flash_forward", inputs, interpret, 1),
    )(inputs.intervals[0], *_lanes(inputs), query, *prompt, *row)
    return _positions_first(out), normalizer.reshape(P, G, H, T)


def backward(
    inputs: Any, out_PGTHE: jax.Array, normalizer_PGHT: jax.Array, gradient_PGTHE: jax.Array, interpret: bool
) -> tuple[jax.Array, KeyValues, KeyValues | None]:
    """Returns the gradients of queries, of rows and, in float32, of prompts."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    P, G, T, _, E = inputs.query_PGTHE.shape
    query, row, prompt = _heads_first(inputs)
    plan = _Queries(inputs)
    gradient = _split_heads(gradient_PGTHE, plan.K)
    delta = (gradient.astype(jnp.float32) * _split_heads(out_PGTHE, plan.K).astype(jnp.float32)).sum(-1)
    numbers = (P, G, plan.K, plan.Q, 1, T)
    of_queries = (query, gradient, normalizer_PGHT.reshape(numbers), delta.reshape(numbers))
    lengths_P, (first, prompt_first) = inputs.intervals[0], _lanes(inputs)
    d_query = pl.pallas_call(
        partial(_queries_kernel, prompt_blocks=plan.prompt_blocks),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=plan.grid,
            in_specs=[plan.interval, plan.interval, *[plan.queries] * 2, *[plan.numbers] * 2, *plan.keys],
            out_specs=plan.queries,
            scratch_shapes=[tpu.VMEM((E, plan.Q * plan.block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        **_options("flash_queries", inputs, interpret, 1),
    )(lengths_P, first, prompt_first, *of_queries, *prompt, *row)

    def of_keys(name: str, keys: tuple[jax.Array, ...], first: jax.Array, grid: tuple[int, ...], specs: Any) -> Any:
        """The gradients of keys and values, a block of which is the same over the grid's last axes."""
        of_row = name == "flash_keys"
        dtype = keys[0].dtype if of_row else jnp.float32  # a prompt's gradients are summed over devices yet
        block = specs[-1].block_shape[-2]
        return pl.pallas_call(
            partial(_keys_kernel, of_row=of_row, block=block),
            grid_spec=tpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=specs,
                out_specs=specs[-2:],
                scratch_shapes=[tpu.VMEM((block, E), jnp.float32)] * 2,
            ),
            out_shape=[jax.ShapeDtypeStruct(array.shape, dtype) for array in keys],
            **_options(name, inputs, interpret, 1 if of_row else 2),
        )(lengths_P, first, *of_queries, *keys)

    block, keys_block = plan.block, _block(T)

    def queries_from(p: Any, g: Any, k: Any, j: Any, i: Any, lengths: Any) -> Any:
        """The block of queries: none before the first that sees this block of keys is fetched."""
        del lengths
        return p, g, k, jnp.maximum(i, jax.lax.div(j * keys_block, jnp.int32(block)))

    d_row = of_keys(
        "flash_keys",
        row,
        first,
        (P, G, plan.K, T // keys_block, T // block),
        [
            *plan.of_queries(queries_from),
            *[pl.BlockSpec((None, None, None, keys_block, E), lambda p, g, k, j, i, lengths: (p, g, k, j, 0))] * 2,
        ],
    )
    d_query, d_row = _positions_first(d_query), KeyValues(*(jnp.einsum("pgkte->pgtke", part) for part in d_row))
    if not prompt:
        return d_query, d_row, None
    S = inputs.prompt.keys.shape[1]
    d_prompt = of_keys(
        "flash_prompt",
        prompt,
        prompt_first,
        (P, plan.K, S // _block(S), G, T // block),
        [
            *plan.of_queries(lambda p, k, j, g, i, lengths: (p, g, k, i)),
            *[pl.BlockSpec((None, None, _block(S), E), lambda p, k, j, g, i, lengths: (p, k, j, 0))] * 2,
        ],
    )
    return d_query, d_row, KeyValues(*(jnp.einsum("pkse->pske", part) for part in d_prompt))


def _options(name: str, inputs: Any, interpret: bool, sums: int) -> dict[str, Any]:
    """Name, cost and compiler's parameters of a kernel that sums over the last `sums` axes of its grid of five."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    P, G, T, H, E = inputs.query_PGTHE.shape
    K, dtype = inputs.row.keys.shape[3], inputs.query_PGTHE.dtype
    S = 0 if inputs.prompt is None else inputs.prompt.keys.shape[1]
    name = name if S else f"{name}_alone"
    blocks = (_block(T),) * 3  # larger than a GPU's; delta is XLA's
    work = flash_work(P, G, T, H, K, E, S, dtype.itemsize, blocks=blocks, has_delta=False)[name]
    exponentials = int(work.flops / (4 * E))
    cost = pl.CostEstimate(flops=int(work.flops), bytes_accessed=int(work.bytes), transcendentals=exponentials)
    options: dict[str, Any] = {"name": name, "cost_estimate": cost, "interpret": interpret}
    if not interpret:
        kinds: Any = ("parallel",) * (5 - sums) + ("arbitrary",) * sums
        options["compiler_params"] = tpu.CompilerParams(dimension_semantics=kinds)
    return options


def _block(length: int, largest: int = BLOCKS[0]) -> int:
    return next(block for block in BLOCKS if block <= largest and length % block == 0)


def _split_heads(array_PGTHE: jax.Array, K: int) -> jax.Array:
    """[P, G, T, H, E] to [P, G, K, Q, T, E]."""
    P, G, T, _, E = array_PGTHE.shape
    return jnp.einsum("pgtkqe->pgkqte", array_PGTHE.reshape(P, G, T, K, -1, E))


def _positions_first(array: jax.Array) -> jax.Array:
    """[P, G, K, Q, T, E] to [P, G, T, H, E]."""
    P, G, _, _, T, E = array.shape
    return jnp.einsum("pgkqte->pgtkqe", array).reshape(P, G, T, -1, E)


def _heads_first(inputs: Any) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Queries [P, G, K, Q, T, E], keys and values of rows [P, G, K, T, E], and of prompts [P, K, S, E]."""
    row = tuple(jnp.einsum("pgtke->pgkte", part) for part in inputs.row)
    prompt = tuple(jnp.einsum("pske->pkse", part) for part in inputs.prompt or ())
    return _split_heads(inputs.query_PGTHE, inputs.row.keys.shape[3]), row, prompt


def _lanes(inputs: Any) -> list[jax.Array]:
    """The first keys that queries see, of rows and of prompts, [P, G, 1, T]."""
    return [first_PGT[:, :, None] for first_PGT in inputs.intervals[1:]]


class _Queries:
    """The grid of kernels that have a block of queries and go over its keys, and what they fetch."""

    def __init__(self, inputs: Any) -> None:
        from jax.experimental import pallas as pl

        P, G, T, H, self.E = inputs.query_PGTHE.shape
        self.K = K = inputs.row.keys.shape[3]
        self.Q, self.block, of_row = H // K, _block(T, LARGEST_QUERIES), _block(T)
        S = 0 if inputs.prompt is None else inputs.prompt.keys.shape[1]
        of_prompt = _block(S) if S else 0
        self.prompt_blocks = blocks = S // of_prompt if S else 0
        self.grid = (P, G, K, T // self.block, blocks + T // of_row)

        def prompt_block(p: Any, g: Any, k: Any, i: Any, j: Any, lengths: Any) -> tuple[Any, ...]:
            """Blocks behind the prompt's end, and those of the row, fetch nothing new."""
            last = jax.lax.div(jnp.maximum(lengths[p] - 1, 0), jnp.int32(of_prompt))
            return p, k, jnp.minimum(j, last), 0

        def row_block(p: Any, g: Any, k: Any, i: Any, j: Any, lengths: Any) -> tuple[Any, ...]:
            last = jax.lax.div((i + 1) * self.block - 1, jnp.int32(of_row))  # that one of these queries sees
            return p, g, k, jnp.clip(j - blocks, 0, last), 0

        index = lambda p, g, k, i, j, lengths: (p, g, k, i)  # noqa: E731
        self.interval, self.queries, _, self.numbers, _ = self.of_queries(index)
        self.keys = [pl.BlockSpec((None, None, None, of_row, self.E), row_block)] * 2
        if S:
            self.keys = [pl.BlockSpec((None, None, of_prompt, self.E), prompt_block)] * 2 + self.keys

    def of_queries(self, index: Callable[..., tuple[Any, ...]]) -> list[Any]:
        """What is fetched of a block of queries (p, g, k, i): first keys, queries, gradients, normalizers, deltas."""
        from jax.experimental import pallas as pl

        def interval(*program: Any) -> tuple[Any, ...]:
            p, g, _, i = index(*program)
            return p, g, 0, i

        def queries(*program: Any) -> tuple[Any, ...]:
            p, g, k, i = index(*program)
            return p, g, k, 0, i, 0

        def numbers(*program: Any) -> tuple[Any, ...]:
            p, g, k, i = index(*program)
            return p, g, k, 0, 0, i

        of_queries = pl.BlockSpec((None, None, None, self.Q, self.block, self.E), queries)
        of_numbers = pl.BlockSpec((None, None, None, self.Q, 1, self.block), numbers)
        return [
            pl.BlockSpec((None, None, 1, self.block), interval),
            *[of_queries] * 2,
            *[of_numbers] * 2,
        ]


def _product(a: jax.Array, b: jax.Array, axes: Any = ((1,), (0,))) -> jax.Array:
    """Multiplies two blocks; float32 ones as exactly as float32 is."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _rows(ref: Any) -> jax.Array:
    """Queries [Q, block, E] as one axis."""
    return ref[...].reshape(-1, ref.shape[-1])


def _numbers(ref: Any) -> jax.Array:
    """Numbers of queries [Q, 1, block], or [1, block] of all heads alike, as one row of lanes."""
    return jnp.concatenate([ref[q] for q in range(ref.shape[0])], axis=1)


def _seen(first: jax.Array, end: jax.Array, start: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which keys [start, ...) the queries see: those in [first, end)."""
    key = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (key >= first) & (key < end)


def _positions(i: Any, block: int, heads: int) -> jax.Array:
    """The positions of a block of queries, once for every head."""
    position = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
    return jnp.concatenate([position] * heads, axis=1)


def _over_keys(
    lengths_ref: Any, first_ref: Any, prompt_first_ref: Any, refs: Any, heads: int, prompt_blocks: int, add: Any
) -> None:
    """Calls `add(keys_ref, values_ref, seen)` if the block of keys whose turn it is holds some that the queries see."""
    from jax.experimental import pallas as pl

    p, i, j = pl.program_id(0), pl.program_id(3), pl.program_id(4)
    *prompt_refs, keys_ref, values_ref = refs
    block = first_ref.shape[-1]

    def attend(keys_ref: Any, values_ref: Any, first_ref: Any, start: Any, end: Any, last: Any) -> None:
        @pl.when((start < last) & (start + keys_ref.shape[0] > jnp.min(first_ref[...])))
        def _() -> None:
            first = jnp.concatenate([first_ref[...]] * heads, axis=1)
            add(keys_ref, values_ref, _seen(first, end, start, (keys_ref.shape[0], heads * block)))

    if prompt_blocks:

        @pl.when(j < prompt_blocks)
        def attend_to_prompt() -> None:
            length, (keys_ref, values_ref) = lengths_ref[p], prompt_refs
            attend(keys_ref, values_ref, prompt_first_ref, j * keys_ref.shape[0], length, length)

    @pl.when(j >= prompt_blocks)
    def attend_to_row() -> None:
        start, last = (j - prompt_blocks) * keys_ref.shape[0], (i + 1) * block
        attend(keys_ref, values_ref, first_ref, start, _positions(i, block, heads) + 1, last)


def _forward_kernel(
    lengths_ref: Any,
    first_ref: Any,
    prompt_first_ref: Any,
    query_ref: Any,
    *refs: Any,
    prompt_blocks: int,
) -> None:
    from jax.experimental import pallas as pl

    *keys_refs, out_ref, normalizer_ref, sum_ref, top_ref, total_ref = refs
    heads, block, E = query_ref.shape
    j, last = pl.program_id(4), pl.num_programs(4) - 1

    @pl.when(j == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        top_ref[...] = jnp.full_like(top_ref, _MASKED)
        total_ref[...] = jnp.zeros_like(total_ref)

    def add(keys_ref: Any, values_ref: Any, seen: jax.Array) -> None:
        scores = _product(keys_ref[...], _rows(query_ref), _OVER_WIDTH) * E**-0.5
        top = jnp.maximum(top_ref[...], jnp.where(seen, scores, _MASKED).max(0, keepdims=True))
        weights, shrink = jnp.where(seen, jnp.exp(scores - top), 0.0), jnp.exp(top_ref[...] - top)
        values = values_ref[...]
        sum_ref[...] = sum_ref[...] * shrink + _product(values, weights.astype(values.dtype), _OVER_ROWS)
        total_ref[...] = total_ref[...] * shrink + weights.sum(0, keepdims=True)
        top_ref[...] = top

    _over_keys(lengths_ref, first_ref, prompt_first_ref, keys_refs, heads, prompt_blocks, add)

    @pl.when(j == last)
    def _() -> None:
        out_ref[...] = (sum_ref[...] / total_ref[...]).T.reshape(heads, block, E).astype(out_ref.dtype)
        normalizer = top_ref[...] + jnp.log(total_ref[...])
        for q in range(heads):
            normalizer_ref[q] = normalizer[:, q * block : (q + 1) * block]


def _queries_kernel(
    lengths_ref: Any,
    first_ref: Any,
    prompt_first_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    normalizer_ref: Any,
    delta_ref: Any,
    *refs: Any,
    prompt_blocks: int,
) -> None:
    from jax.experimental import pallas as pl

    *keys_refs, d_query_ref, sum_ref = refs
    heads, block, E = query_ref.shape
    j, last = pl.program_id(4), pl.num_programs(4) - 1

    @pl.when(j == 0)
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(keys_ref: Any, values_ref: Any, seen: jax.Array) -> None:
        of_queries = (_rows(query_ref), _rows(gradient_ref), _numbers(normalizer_ref), _numbers(delta_ref))
        keys = keys_ref[...]
        _, d_scores = _weights_and_gradient(keys, values_ref[...], of_queries, seen)
        sum_ref[...] += _product(keys, d_scores.astype(keys.dtype), _OVER_ROWS)

    _over_keys(lengths_ref, first_ref, prompt_first_ref, keys_refs, heads, prompt_blocks, add)

    @pl.when(j == last)
    def _() -> None:
        d_query_ref[...] = (sum_ref[...] * E**-0.5).T.reshape(heads, block, E).astype(d_query_ref.dtype)


def _weights_and_gradient(
    keys: jax.Array, values: jax.Array, of_queries: tuple[jax.Array, ...], seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the softmax's weights [keys, queries], and the gradient of the scores over sqrt(E)."""
    query, gradient, normalizer, delta = of_queries
    scores = _product(keys, query, _OVER_WIDTH) * query.shape[1] ** -0.5
    weights = jnp.where(seen, jnp.exp(scores - normalizer), 0.0)
    return weights, weights * (_product(values, gradient, _OVER_WIDTH) - delta)


def _keys_kernel(
    lengths_ref: Any,
    first_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    normalizer_ref: Any,
    delta_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    d_keys_ref: Any,
    d_values_ref: Any,
    d_keys_sum_ref: Any,
    d_values_sum_ref: Any,
    *,
    of_row: bool,
    block: int,
) -> None:
    """Adds what a block of queries gives to the gradients of a block of keys and values, of a row or of a prompt."""
    from jax.experimental import pallas as pl

    heads, queries, E = query_ref.shape
    p, i = pl.program_id(0), pl.program_id(4)
    start = pl.program_id(3 if of_row else 2) * block
    is_first, is_last = i == 0, i == pl.num_programs(4) - 1
    if of_row:
        end: Any = _positions(i, queries, heads) + 1
        needed = (i + 1) * queries > start
    else:
        is_first &= pl.program_id(3) == 0
        is_last &= pl.program_id(3) == pl.num_programs(3) - 1
        end = lengths_ref[p]
        needed = start < end

    @pl.when(is_first)
    def _() -> None:
        d_keys_sum_ref[...] = jnp.zeros_like(d_keys_sum_ref)
        d_values_sum_ref[...] = jnp.zeros_like(d_values_sum_ref)

    @pl.when(needed & (start + block > jnp.min(first_ref[...])))
    def _() -> None:
        query, gradient = _rows(query_ref), _rows(gradient_ref)
        of_queries = (query, gradient, _numbers(normalizer_ref), _numbers(delta_ref))
        seen = _seen(jnp.concatenate([first_ref[...]] * heads, axis=1), end, start, (block, heads * queries))
        weights, d_scores = _weights_and_gradient(keys_ref[...], values_ref[...], of_queries, seen)
        d_keys_sum_ref[...] += _product(d_scores.astype(query.dtype), query)
        d_values_sum_ref[...] += _product(weights.astype(gradient.dtype), gradient)

    @pl.when(is_last)
    def _() -> None:
        d_keys_ref[...] = (d_keys_sum_ref[...] * E**-0.5).astype(d_keys_ref.dtype)
        d_values_ref[...] = d_values_sum_ref[...].astype(d_values_ref.dtype)
