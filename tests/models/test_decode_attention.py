"""Attention of one token: XLA's path is softmax attention, and the kernels are XLA's path."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from models.decode_attention import (
    HeadNorms,
    LayerKeyValues,
    Token,
    decode_attention,
    has_kernel,
    kernel_work,
)
from models.decode_tpu import choose_sizes, group_parts, has_tpu_kernel, tpu_kernel_work
from models.qwen3 import rms_norm, rotate

# How a TPU's kernel runs on a CPU: memory that nothing has written is NaN, and copies arrive when they are awaited.
INTERPRET: dict[str, Any] = {"gpu": True, "tpu": pltpu.InterpretParams()}

# P, G, K, Q, E, S, T, filled positions, window
SHAPES = {
    "nothing filled": (2, 4, 2, 2, 16, 37, 50, 0, None),
    "all filled, heads 1:1": (2, 16, 3, 1, 16, 64, 40, 39, None),
    "heads 8:1, one block and a part": (1, 2, 1, 8, 32, 130, 70, 33, None),
    "five queries a head, three completions": (3, 3, 2, 5, 16, 65, 33, 32, None),
    "window inside the completion": (2, 3, 2, 2, 16, 37, 50, 20, 9),
    "window into the prompt": (2, 2, 1, 4, 16, 80, 40, 11, 30),
    "window of one": (2, 2, 1, 2, 16, 20, 40, 7, 1),
}


def arguments(shape: tuple[Any, ...], dtype: str = "float32") -> tuple[Any, ...]:
    P, G, K, Q, E, S, T, filled, _ = shape
    rng = np.random.default_rng(sum(n or 0 for n in shape))

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=sizes), dtype)

    angle = jnp.asarray(rng.normal(size=(P, G, E // 2)), jnp.float32)
    live = rng.random((P, G)) < 0.7
    live[0] = False  # a group that has ended
    live[-1, 0] = True
    lengths = jnp.asarray(rng.integers(1, S + 1, P), jnp.int32)
    token = Token(jnp.cos(angle), jnp.sin(angle), lengths, jnp.int32(filled), jnp.asarray(live))
    caches = LayerKeyValues(normal(P, K, S, E), normal(P, K, S, E)), LayerKeyValues(*normal(2, P, K, G, T, E))
    return normal(P, G, K, Q + 2, E), HeadNorms(normal(E), normal(E), 1e-6), token, *caches


@partial(jax.jit, static_argnames=("window", "kernel"))
def attend(given: tuple[Any, ...], window: int | None, kernel: str | None = None) -> tuple[jax.Array, LayerKeyValues]:
    """`decode_attention` as one program."""
    qkv, (query_norm, key_norm, _), *rest = given
    interpret = INTERPRET.get(kernel or "", False)
    norms = HeadNorms(query_norm, key_norm, 1e-6)
    return decode_attention(qkv, norms, *rest, window=window, kernel=kernel, interpret=interpret)


@partial(jax.jit, static_argnames="window")
def by_xla(given: tuple[Any, ...], window: int | None) -> tuple[jax.Array, LayerKeyValues]:
    """XLA's path of one prompt after the other, each with as many filled positions as it has."""
    qkv, (query_norm, key_norm, _), token, *caches = given

    def of_prompt(qkv: jax.Array, token: Token, *caches: LayerKeyValues) -> Any:
        one = jax.tree.map(lambda leaf: leaf[None], (qkv, token, *caches))
        norms = HeadNorms(query_norm, key_norm, 1e-6)
        out, cache = decode_attention(one[0], norms, one[1]._replace(filled=token.filled), *one[2:], window=window)
        return out[0], jax.tree.map(lambda leaf: leaf[0], cache)

    filled = jnp.broadcast_to(token.filled, token.lengths_P.shape)
    return jax.vmap(of_prompt)(qkv, token._replace(filled=filled), *caches)


def assert_kernel_is_xlas_path(kernel: str, given: tuple[Any, ...], window: int | None, tolerance: float) -> None:
    """Of completions that go on; what has ended may be anything finite. The cache grows by the same position."""
    expected, expected_cache = by_xla(given, window)
    found, found_cache = attend(given, window, kernel)
    live, scale = np.asarray(given[2].live_PG), float(jnp.abs(expected.astype(jnp.float32)).max())
    difference = np.abs(np.asarray(found, np.float32) - np.asarray(expected, np.float32))
    assert difference[live].max() <= tolerance * max(scale, 1) and np.isfinite(difference).all()
    for one, other in zip(found_cache, expected_cache, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=tolerance * 4)


@pytest.mark.parametrize("kernel", [None, "gpu", "tpu"], ids=["xla", "gpu", "tpu"])
@pytest.mark.parametrize("window", [None, 9])
def test_prompts_may_be_at_positions_of_their_own(kernel: str | None, window: int | None) -> None:
    """Each as if all were at its position, whatever the others' are."""
    shape = (3, 2, 2, 2, 16, 37, 50, 0, window)
    qkv, norms, token, *key_values = arguments(shape)
    positions = [33, 0, 49]

    def attend_at(filled: Any) -> Any:
        at = token._replace(filled=jnp.asarray(filled, jnp.int32), live_PG=jnp.ones((3, 2), bool))
        return attend((qkv, norms, at, *key_values), window, kernel)

    found = attend_at(positions)
    for p, filled in enumerate(positions):
        jax.tree.map(lambda a, b, p=p: np.testing.assert_allclose(a[p], b[p], atol=2e-5), found, attend_at(filled))


CASES = [(name, "float32", 2e-5) for name in SHAPES] + [
    (name, "bfloat16", 2e-2) for name in ("heads 8:1, one block and a part", "window into the prompt")
]


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES, ids=[f"{dtype}, {name}" for name, dtype, _ in CASES])
def test_kernels_are_xlas_path(name: str, dtype: str, tolerance: float, kernel: str) -> None:
    assert_kernel_is_xlas_path(kernel, arguments(SHAPES[name], dtype), SHAPES[name][-1], tolerance)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((3, 3, 2, 2, 16, 600, 160, 0, None), None), ((2, 5, 1, 2, 16, 600, 304, 0, None), 200)],
    ids=["no window", "window over blocks"],
)
def test_a_tpus_kernel_reads_what_each_prompt_has_filled(shape: tuple[Any, ...], window: int | None) -> None:
    """Over several blocks, of the prompt and of completions, from none filled to all; a group may have ended at T."""
    given = list(arguments(shape))
    filled = np.linspace(0, shape[6], shape[0]).astype(np.int32)[::-1]
    assert not given[2].live_PG[0].any()
    given[2] = given[2]._replace(filled=jnp.asarray(filled))
    assert_kernel_is_xlas_path("tpu", tuple(given), window, 2e-5)


def test_a_group_whose_scores_do_not_fit_is_cut_into_parts() -> None:
    assert [group_parts(G, Q) for G, Q in ((2, 1), (16, 8), (8, 2), (40, 4), (64, 8), (61, 8))] == [1, 1, 1, 2, 4, 61]
    shape = (2, 40, 1, 4, 16, 20, 40, 33, None)
    assert_kernel_is_xlas_path("tpu", arguments(shape), None, 2e-5)
    prompt = [
        tpu_kernel_work(P=1, G=G, K=1, Q=4, E=16, S=1024, filled=0, itemsize=2)["token_attention"] for G in (20, 40)
    ]
    assert prompt[1] == tuple(2 * part for part in prompt[0]), "each part reads the prompt"


def test_blocks_fit_a_tpus_memory_and_two_cores_have_work() -> None:
    for K, G, T, itemsize in np.ndindex(9, 17, 3, 2):
        sizes = choose_sizes(K + 1, G + 1, 512, 16 * (1 + 31 * T), 128, 2 + 2 * itemsize)
        assert (K + 1) % sizes.heads == 0 and (K == 0 or (K + 1) // sizes.heads >= 2)
        assert sizes.heads * (G + 1) * sizes.past * 128 * (2 + 2 * itemsize) <= 2 * 2**20


@pytest.mark.parametrize("name", SHAPES)
def test_xlas_path_is_softmax_attention(name: str) -> None:
    """Against one query at a time in NumPy, over the list of positions that it sees."""
    shape = SHAPES[name]
    (P, G, K, Q, E, *_, filled, window) = shape
    qkv, norms, token, prefix, cache = arguments(shape)
    out, grown = attend((qkv, norms, token, prefix, cache), window)
    cos, sin = token.cos_PGC[:, :, None, None], token.sin_PGC[:, :, None, None]

    @jax.jit
    def rotated(part: jax.Array, norm_E: jax.Array) -> jax.Array:
        return rotate(rms_norm(part, norm_E, 1e-6), (cos, sin))

    query = np.asarray(rotated(qkv[..., :Q, :], norms.query_E))
    key = np.asarray(rotated(qkv[..., Q : Q + 1, :], norms.key_E))
    prefix, cache, values_PGKTE = jax.tree.map(np.asarray, (prefix, cache, qkv[..., Q + 1 :, :]))
    for p, g, k in np.ndindex(P, G, K):
        n = int(token.lengths_P[p])
        keys = np.concatenate([prefix.keys[p, k, :n], cache.keys[p, k, g, :filled], key[p, g, k]])
        values = np.concatenate([prefix.values[p, k, :n], cache.values[p, k, g, :filled], values_PGKTE[p, g, k]])
        seen = slice(-window if window else None, None)
        scores = query[p, g, k] @ keys[seen].T / E**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ values[seen]
        np.testing.assert_allclose(out[p, g, k], expected, atol=1e-5)
        np.testing.assert_allclose(grown.keys[p, k, g, filled], key[p, g, k, 0], atol=1e-6)
    np.testing.assert_array_equal(grown.keys[..., :filled, :], cache.keys[..., :filled, :])


def test_work_is_read_once_for_a_group_and_once_for_each_completion() -> None:
    """Twice the completions: the prompt's keys and values are not read twice; twice the tokens: all of theirs are."""
    sizes = {"P": 2, "K": 8, "Q": 2, "E": 128, "S": 512, "itemsize": 2}
    one, two = (kernel_work(G=G, filled=100, **sizes) for G in (8, 16))
    prompt = 2 * 2 * 8 * 512 * 128 * 2
    assert two["prefix_attention"].flops == 2 * one["prefix_attention"].flops
    assert two["prefix_attention"].bytes - prompt == 2 * (one["prefix_attention"].bytes - prompt)
    assert two["past_attention"] == tuple(2 * part for part in one["past_attention"])
    longer = kernel_work(G=8, filled=201, **sizes)["past_attention"]
    assert longer.flops == 2 * one["past_attention"].flops
    assert longer.bytes - one["past_attention"].bytes == 2 * 2 * 8 * 8 * 101 * 128 * 2
    tpu, tpu_longer = (tpu_kernel_work(G=8, filled=filled, **sizes)["token_attention"] for filled in (100, 201))
    assert tpu.flops == sum(work.flops for work in one.values())
    assert tpu_longer.bytes - tpu.bytes == longer.bytes - one["past_attention"].bytes


def test_heads_that_kernels_can_have() -> None:
    assert [width for width in range(8, 300) if has_kernel(width)] == [32, 64, 128, 256]
    assert [width for width in range(8, 400) if has_tpu_kernel(width)] == [128, 256, 384]
