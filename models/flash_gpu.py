"""Kernels of `models.flash_attention` for GPUs (Pallas, Triton): no score is ever in the device's memory.

A query sees two intervals of keys: of its group's prompt, [prompt_first, length), and of its own row, [first, t].
Blocks of keys outside of both are not read. Four kernels:

    flash_forward    a block of queries of one head over its keys
    flash_queries    their gradient, and delta = sum(out * d out), which the other two read
    flash_keys       the gradient of a block of a row's keys and values, over the queries behind it
    flash_prompt     the gradient of a block of a prompt's keys and values, over all queries of its group
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.attention import KeyValues
from models.flops import KernelWork

# Sizes of blocks, as large as an H200's registers allow with heads of 128: a compiler says where they do not suffice.
QUERIES, KEYS = 128, 64  # forward pass
QUERIES_BACK, KEYS_BACK = 64, 64  # gradient of queries; of keys, over so many queries at a time:
QUERY_STEP = 32
MULTIPLE = 128  # of the lengths that kernels take; every block divides it
HEADS = (16, 32, 64, 128)  # their widths: a block's axes are powers of 2, and registers hold no wider ones
_MASKED = -1e30


def forward(inputs: Any, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Returns out_PGTHE in the queries' dtype and the log of the softmax's sum, float32 [P, G, H, T]."""
    from jax.experimental import pallas as pl

    query_PGTHE, (P, G, T, H, _) = inputs.query_PGTHE, inputs.query_PGTHE.shape
    specs = _Specs(inputs)
    queries, numbers = specs.queries_of_a_head(QUERIES), specs.numbers_of_a_head(QUERIES)
    kernel = partial(_forward_kernel, has_prompt=inputs.prompt is not None)
    keys = [specs.row_of_a_query] * 2 + [specs.prompt_of_a_query] * (2 if inputs.prompt is not None else 0)
    return pl.pallas_call(
        kernel,
        grid=(P, G, H, T // QUERIES),
        in_specs=[*specs.intervals(QUERIES), queries, *keys],
        out_specs=[queries, numbers],
        out_shape=[
            jax.ShapeDtypeStruct(query_PGTHE.shape, query_PGTHE.dtype),
            jax.ShapeDtypeStruct((P, G, H, T), jnp.float32),
        ],
        name=_name("flash_forward", inputs.prompt is not None),
        **_options(interpret, warps=8, stages=2),
    )(*inputs.intervals, query_PGTHE, *inputs.row, *(inputs.prompt or ()))


def backward(
    inputs: Any, out_PGTHE: jax.Array, normalizer_PGHT: jax.Array, gradient_PGTHE: jax.Array, interpret: bool
) -> tuple[jax.Array, KeyValues, KeyValues | None]:
    """Returns the gradients of queries, of rows and, in float32, of prompts."""
    from jax.experimental import pallas as pl

    query_PGTHE, (P, G, T, H, E) = inputs.query_PGTHE, inputs.query_PGTHE.shape
    K, has_prompt, specs = inputs.row.keys.shape[3], inputs.prompt is not None, _Specs(inputs)
    like = lambda array, dtype=None: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype)  # noqa: E731
    options = _options(interpret, warps=4, stages=2)
    queries, numbers = specs.queries_of_a_head(QUERIES_BACK), specs.numbers_of_a_head(QUERIES_BACK)
    keys = [specs.row_of_a_query] * 2 + [specs.prompt_of_a_query] * (2 if has_prompt else 0)
    d_query_PGTHE, delta_PGHT = pl.pallas_call(
        partial(_queries_kernel, has_prompt=has_prompt),
        grid=(P, G, H, T // QUERIES_BACK),
        in_specs=[*specs.intervals(QUERIES_BACK), queries, queries, queries, numbers, *keys],
        out_specs=[queries, numbers],
        out_shape=[like(query_PGTHE), like(normalizer_PGHT)],
        name=_name("flash_queries", inputs.prompt is not None),
        **options,
    )(
        *inputs.intervals,
        *(query_PGTHE, out_PGTHE, gradient_PGTHE, normalizer_PGHT),
        *inputs.row,
        *(inputs.prompt or ()),
    )
    first_PGT = inputs.intervals[1]
    of_queries = (query_PGTHE, gradient_PGTHE, normalizer_PGHT, delta_PGHT)
    block_of_row = pl.BlockSpec((None, None, KEYS_BACK, None, E), lambda p, g, k, j: (p, g, j, k, 0))
    d_row = pl.pallas_call(
        partial(_keys_kernel, queries_per_head=H // K),
        grid=(P, G, K, T // KEYS_BACK),
        in_specs=[
            pl.BlockSpec((None, None, T), lambda p, g, k, j: (p, g, 0)),
            pl.BlockSpec((None, None, None), lambda p, g, k, j: (p, g, j)),
            *specs.queries_of_a_row(lambda p, g, k, j: (p, g, k)),
            *[block_of_row] * 2,
        ],
        out_specs=[block_of_row] * 2,
        out_shape=[like(part) for part in inputs.row],
        name=_name("flash_keys", inputs.prompt is not None),
        **options,
    )(first_PGT, _last_blocks(first_PGT), *of_queries, *inputs.row)
    if not has_prompt:
        return d_query_PGTHE, KeyValues(*d_row), None
    lengths_P, _, prompt_first_PGT = inputs.intervals
    block_of_prompt = pl.BlockSpec((None, KEYS_BACK, None, E), lambda p, k, j: (p, j, k, 0))
    d_prompt = pl.pallas_call(
        partial(_prompt_kernel, queries_per_head=H // K),
        grid=(P, K, inputs.prompt.keys.shape[1] // KEYS_BACK),
        in_specs=[
            pl.BlockSpec((1,), lambda p, k, j: (p,)),
            pl.BlockSpec((None, G, T), lambda p, k, j: (p, 0, 0)),
            *specs.queries_of_a_group(),
            *[block_of_prompt] * 2,
        ],
        out_specs=[block_of_prompt] * 2,
        out_shape=[like(part, jnp.float32) for part in inputs.prompt],
        name="flash_prompt",
        **options,
    )(lengths_P, prompt_first_PGT, *of_queries, *inputs.prompt)
    return d_query_PGTHE, KeyValues(*d_row), KeyValues(*d_prompt)


def _name(kernel: str, has_prompt: bool) -> str:
    return kernel if has_prompt else f"{kernel}_alone"  # `flash_work` tells these rows from those with a prompt


def flash_work(
    P: int,
    G: int,
    T: int,
    H: int,
    K: int,
    E: int,
    S: int,
    itemsize: int,
    *,
    blocks: tuple[int, int, int] = (QUERIES, QUERIES_BACK, KEYS_BACK),
    has_delta: bool = True,
) -> dict[str, KernelWork]:
    """Returns what each kernel does in a call on one device, if no block is masked but those behind a row's queries.

    With pairs = P G H (T S + T (T + block) / 2), of which a row's own keys are the second part:

        flash_forward   4 E pairs FLOPs: scores, values
        flash_queries   6 E pairs: scores, their gradient, that of the queries
        flash_keys      8 E pairs of the own: scores, their gradient, that of the keys, that of the values
        flash_prompt    8 E pairs of the prompt

    and every array is read and written once. S = 0: rows without a prompt, whose kernels' names end in _alone.

    Args:
      P, G, T, H, K, E, S: sizes of the axes on the device; T and S are filled up to whole blocks.
      itemsize: bytes of a number.
      blocks: positions of a block in flash_forward, flash_queries and flash_keys; default: those of a GPU.
      has_delta: whether flash_queries reads the output for its sum with the output's gradient.
    """
    T, S = (-(-n // MULTIPLE) * MULTIPLE for n in (T, S))
    rows = float(P * G * H * T)
    queries, numbers = rows * E * itemsize, 4 * rows
    own, prompt = 2.0 * P * G * T * K * E * itemsize, 2.0 * P * S * K * E * itemsize
    forward_pairs, query_pairs, key_pairs = (rows * (T + block) / 2 for block in blocks)
    of_queries = (4 if has_delta else 3) * queries + 2 * numbers
    work = {
        "flash_forward": KernelWork(4 * E * (rows * S + forward_pairs), 2 * queries + numbers + own + prompt),
        "flash_queries": KernelWork(6 * E * (rows * S + query_pairs), of_queries + own + prompt),
        "flash_keys": KernelWork(8 * E * key_pairs, 2 * queries + 2 * numbers + 2 * own),
    }
    if not S:
        return {_name(kernel, False): cost for kernel, cost in work.items()}
    of_prompt = KernelWork(8 * E * rows * S, 2 * queries + 2 * numbers + prompt * (1 + 4 / itemsize))
    return {**work, "flash_prompt": of_prompt}


def _last_blocks(first_PGT: jax.Array) -> jax.Array:
    """Returns for each block of keys the number of the block behind the last queries that see it.

    `first` never falls along a row, so the queries that see a key lie together.
    """
    P, G, T = first_PGT.shape
    starts_PGI = first_PGT.reshape(P, G, T // QUERY_STEP, QUERY_STEP)[..., 0]
    last_key_J1 = (jnp.arange(T // KEYS_BACK)[:, None] + 1) * KEYS_BACK - 1
    return (starts_PGI[:, :, None] <= last_key_J1).sum(-1).astype(jnp.int32)


def _options(interpret: bool, warps: int, stages: int) -> dict[str, Any]:
    from jax.experimental.pallas import triton as gpu

    params = {} if interpret else {"compiler_params": gpu.CompilerParams(num_warps=warps, num_stages=stages)}
    return {"interpret": interpret, **params}


class _Specs:
    """What of each array a kernel's program has at hand."""

    def __init__(self, inputs: Any) -> None:
        from jax.experimental import pallas as pl

        self._spec = pl.BlockSpec
        _, self.G, self.T, self.H, self.E = inputs.query_PGTHE.shape
        self.Q = Q = self.H // inputs.row.keys.shape[3]
        self.row_of_a_query = pl.BlockSpec((None, None, self.T, None, self.E), lambda p, g, h, i: (p, g, 0, h // Q, 0))
        self.prompt_of_a_query: Any = None
        if inputs.prompt is not None:
            shape = (None, inputs.prompt.keys.shape[1], None, self.E)
            self.prompt_of_a_query = pl.BlockSpec(shape, lambda p, g, h, i: (p, 0, h // Q, 0))

    def intervals(self, block: int) -> list[Any]:
        of_queries = self._spec((None, None, block), lambda p, g, h, i: (p, g, i))
        return [self._spec((1,), lambda p, g, h, i: (p,)), of_queries, of_queries]

    def queries_of_a_head(self, block: int) -> Any:
        return self._spec((None, None, block, None, self.E), lambda p, g, h, i: (p, g, i, h, 0))

    def numbers_of_a_head(self, block: int) -> Any:
        return self._spec((None, None, None, block), lambda p, g, h, i: (p, g, h, i))

    def queries_of_a_row(self, index: Any) -> list[Any]:
        """Queries, their output's gradient, normalizers and deltas of the heads that read one key/value head."""

        def of_queries(*program: Any) -> tuple[Any, ...]:
            p, g, k = index(*program)
            return (p, g, 0, k, 0)

        def of_numbers(*program: Any) -> tuple[Any, ...]:
            return (*index(*program), 0)

        queries = self._spec((None, None, self.T, self.Q, self.E), of_queries)
        numbers = self._spec((None, None, self.Q, self.T), of_numbers)
        return [queries, queries, numbers, numbers]

    def queries_of_a_group(self) -> list[Any]:
        """The same of all rows of a prompt."""
        queries = self._spec((None, self.G, self.T, self.Q, self.E), lambda p, k, j: (p, 0, 0, k, 0))
        numbers = self._spec((None, self.G, self.Q, self.T), lambda p, k, j: (p, 0, k, 0))
        return [queries, queries, numbers, numbers]


def _product(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
    """Multiplies two blocks; float32 ones as exactly as float32 is."""
    from jax.experimental.pallas import triton as gpu

    return gpu.dot(a, b, allow_tf32=False, **transposed)


def _forward_kernel(
    length_ref: Any,
    first_ref: Any,
    prompt_first_ref: Any,
    query_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *refs: Any,
    has_prompt: bool,
) -> None:
    from jax.experimental import pallas as pl

    *prompt_refs, out_ref, normalizer_ref = refs
    block, E = query_ref.shape
    query, scale = query_ref[...], E**-0.5
    t = pl.program_id(3) * block + jnp.arange(block)

    def attend(keys_ref: Any, values_ref: Any, first: jax.Array, end: jax.Array) -> Any:
        """Folds one block of keys into the running softmax; a query sees the keys in [first, end)."""

        def body(j: jax.Array, running: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = running
            at = pl.ds(j * KEYS, KEYS)
            key = (j * KEYS + jnp.arange(KEYS))[None]
            scores = _product(query, keys_ref[at, :], trans_b=True) * scale
            seen = (key >= first[:, None]) & (key < end[:, None])
            new_top = jnp.maximum(top, jnp.where(seen, scores, _MASKED).max(1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[:, None]), 0.0)
            shrink = jnp.exp(top - new_top)
            values = values_ref[at, :]
            out = out * shrink[:, None] + _product(weights.astype(values.dtype), values)
            return out, new_top, total * shrink + weights.sum(1)

        return body

    running: Any = (
        jnp.zeros((block, E), jnp.float32),
        jnp.full((block,), _MASKED, jnp.float32),
        jnp.zeros((block,), jnp.float32),
    )
    if has_prompt:
        first, length = prompt_first_ref[...], length_ref[0]
        prompt_keys_ref, prompt_values_ref = prompt_refs
        body = attend(prompt_keys_ref, prompt_values_ref, first, jnp.full((block,), length))
        running = jax.lax.fori_loop(jnp.min(first) // KEYS, (length + KEYS - 1) // KEYS, body, running)
    first = first_ref[...]
    body = attend(keys_ref, values_ref, first, t + 1)
    out, top, total = jax.lax.fori_loop(jnp.min(first) // KEYS, _blocks_to(t, KEYS), body, running)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    normalizer_ref[...] = top + jnp.log(total)


def _blocks_to(t: jax.Array, keys: int) -> jax.Array:
    """Returns the number of blocks of keys up to the last of these queries."""
    return (jnp.max(t) + keys) // keys


def _queries_kernel(
    length_ref: Any,
    first_ref: Any,
    prompt_first_ref: Any,
    query_ref: Any,
    out_ref: Any,
    gradient_ref: Any,
    normalizer_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *refs: Any,
    has_prompt: bool,
) -> None:
    from jax.experimental import pallas as pl

    *prompt_refs, d_query_ref, delta_ref = refs
    block, E = query_ref.shape
    query, gradient, normalizer, scale = query_ref[...], gradient_ref[...], normalizer_ref[...], E**-0.5
    t = pl.program_id(3) * block + jnp.arange(block)
    delta = (out_ref[...].astype(jnp.float32) * gradient.astype(jnp.float32)).sum(1)

    def attend(keys_ref: Any, values_ref: Any, first: jax.Array, end: jax.Array) -> Any:
        def body(j: jax.Array, d_query: jax.Array) -> jax.Array:
            at = pl.ds(j * KEYS_BACK, KEYS_BACK)
            key = (j * KEYS_BACK + jnp.arange(KEYS_BACK))[None]
            keys = keys_ref[at, :]
            scores = _product(query, keys, trans_b=True) * scale
            seen = (key >= first[:, None]) & (key < end[:, None])
            weights = jnp.where(seen, jnp.exp(scores - normalizer[:, None]), 0.0)
            d_scores = weights * (_product(gradient, values_ref[at, :], trans_b=True) - delta[:, None])
            return d_query + _product(d_scores.astype(keys.dtype), keys)

        return body

    d_query = jnp.zeros((block, E), jnp.float32)
    if has_prompt:
        first, length = prompt_first_ref[...], length_ref[0]
        prompt_keys_ref, prompt_values_ref = prompt_refs
        body = attend(prompt_keys_ref, prompt_values_ref, first, jnp.full((block,), length))
        d_query = jax.lax.fori_loop(jnp.min(first) // KEYS_BACK, (length + KEYS_BACK - 1) // KEYS_BACK, body, d_query)
    first = first_ref[...]
    body = attend(keys_ref, values_ref, first, t + 1)
    d_query = jax.lax.fori_loop(jnp.min(first) // KEYS_BACK, _blocks_to(t, KEYS_BACK), body, d_query)
    d_query_ref[...] = (d_query * scale).astype(d_query_ref.dtype)
    delta_ref[...] = delta


def _add_gradients(
    keys: jax.Array, values: jax.Array, of_queries: tuple[jax.Array, ...], seen: jax.Array, sums: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Adds the gradients of a block of keys and values that come from a block of queries; `seen` is [keys, queries]."""
    query, gradient, normalizer, delta = of_queries
    scale = query.shape[1] ** -0.5
    scores = _product(keys, query, trans_b=True) * scale
    weights = jnp.where(seen, jnp.exp(scores - normalizer[None]), 0.0)
    d_scores = weights * (_product(values, gradient, trans_b=True) - delta[None])
    d_keys, d_values = sums
    d_values += _product(weights.astype(gradient.dtype), gradient)
    return d_keys + _product(d_scores.astype(query.dtype), query) * scale, d_values


def _keys_kernel(
    first_ref: Any,
    last_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    normalizer_ref: Any,
    delta_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    d_keys_ref: Any,
    d_values_ref: Any,
    *,
    queries_per_head: int,
) -> None:
    from jax.experimental import pallas as pl

    keys, values = keys_ref[...], values_ref[...]
    start = pl.program_id(3) * KEYS_BACK
    key = (start + jnp.arange(KEYS_BACK))[:, None]
    sums: Any = (jnp.zeros(keys.shape, jnp.float32),) * 2
    first_step, heads = start // QUERY_STEP, jnp.int32(queries_per_head)

    def body(n: jax.Array, sums: Any) -> Any:
        i, q = first_step + jax.lax.div(n, heads), jax.lax.rem(n, heads)
        at, t = pl.ds(i * QUERY_STEP, QUERY_STEP), (i * QUERY_STEP + jnp.arange(QUERY_STEP))[None]
        of_queries = (query_ref[at, q], gradient_ref[at, q], normalizer_ref[q, at], delta_ref[q, at])
        return _add_gradients(keys, values, of_queries, (key >= first_ref[at][None]) & (key <= t), sums)

    sums = jax.lax.fori_loop(0, (last_ref[...] - first_step) * heads, body, sums)
    d_keys_ref[...], d_values_ref[...] = (total.astype(d_keys_ref.dtype) for total in sums)


def _prompt_kernel(
    length_ref: Any,
    first_ref: Any,
    query_ref: Any,
    gradient_ref: Any,
    normalizer_ref: Any,
    delta_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    d_keys_ref: Any,
    d_values_ref: Any,
    *,
    queries_per_head: int,
) -> None:
    from jax.experimental import pallas as pl

    keys, values, (G, T) = keys_ref[...], values_ref[...], first_ref.shape
    start, length, steps = pl.program_id(2) * KEYS_BACK, length_ref[0], jnp.int32(T // QUERY_STEP)
    key = (start + jnp.arange(KEYS_BACK))[:, None]
    sums: Any = (jnp.zeros(keys.shape, jnp.float32),) * 2
    heads = jnp.int32(queries_per_head)

    def body(n: jax.Array, sums: Any) -> Any:
        step, q = jax.lax.div(n, heads), jax.lax.rem(n, heads)
        g, at = jax.lax.div(step, steps), pl.ds(jax.lax.rem(step, steps) * QUERY_STEP, QUERY_STEP)
        of_queries = (query_ref[g, at, q], gradient_ref[g, at, q], normalizer_ref[g, q, at], delta_ref[g, q, at])
        return _add_gradients(keys, values, of_queries, (key >= first_ref[g, at][None]) & (key < length), sums)

    sums = jax.lax.fori_loop(0, jnp.where(start < length, G * steps * heads, 0), body, sums)
    d_keys_ref[...], d_values_ref[...] = sums
