"""Laws of token_logprobs, and above all: no array has the T and the V axis together."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from gopo_jax import token_logprobs

T, V, D = 23, 37, 5  # primes: a product of other axes does not look like one of them


compiled = jax.jit(token_logprobs, static_argnames=("chunk", "with_entropy"))


def example(lead: tuple[int, ...] = (2,), dtype: Any = np.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    hidden, unembed = rng.normal(size=(*lead, T, D)), rng.normal(size=(V, D))
    return jnp.asarray(hidden, dtype), jnp.asarray(unembed, dtype), jnp.asarray(rng.integers(0, V, (*lead, T)))


@jax.jit
def unchunked(
    hidden: jax.Array, unembed: jax.Array, tokens: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The formula with all logits at once, in float32."""
    logits = hidden.astype(jnp.float32) @ unembed.astype(jnp.float32).T / temperature
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[..., None], -1)[..., 0]
    return chosen, -(jnp.exp(logprobs) * logprobs).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_chunk_size_gives_the_log_softmax(chunk: int, temperature: float) -> None:
    arrays = example()
    pair = compiled(*arrays, chunk=chunk, temperature=temperature, with_entropy=True)
    for value, expected in zip(pair, unchunked(*arrays, temperature), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=["T", "PGT"])
def test_leading_axes_are_left_alone(lead: tuple[int, ...]) -> None:
    arrays = example(lead)
    logprobs = compiled(*arrays, chunk=4)
    assert logprobs.shape == (*lead, T)
    np.testing.assert_allclose(logprobs, unchunked(*arrays)[0], atol=1e-5)


def test_compiled_is_eager() -> None:
    arrays = example()
    eager = token_logprobs(*arrays, chunk=4, temperature=0.7, with_entropy=True)
    pair = compiled(*arrays, chunk=4, temperature=0.7, with_entropy=True)  # the temperature is traced here
    np.testing.assert_allclose(pair, eager, atol=1e-5)


def test_bfloat16_inputs_give_float32_logits() -> None:
    arrays = example(dtype=jnp.bfloat16)
    for value, expected in zip(compiled(*arrays, chunk=4, with_entropy=True), unchunked(*arrays), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 23])
def test_gradients_are_those_of_the_formula(chunk: int) -> None:
    hidden, unembed, tokens = example()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, *tokens.shape)), jnp.float32)

    def loss(function: Callable[..., Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
        return lambda hidden, unembed: (weights * jnp.stack(function(hidden, unembed, tokens))).sum()

    def chunked(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return token_logprobs(*arrays, chunk=chunk, temperature=0.8, with_entropy=True)

    gradients = jax.jit(jax.grad(loss(chunked), argnums=(0, 1)))(hidden, unembed)
    expected = jax.jit(jax.grad(loss(lambda *arrays: unchunked(*arrays, 0.8)), argnums=(0, 1)))(hidden, unembed)
    for value, formula in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(value, formula, atol=1e-5)


def test_entropy_lies_between_zero_and_that_of_the_uniform_distribution() -> None:
    hidden, unembed, tokens = example()
    logprobs, entropy = compiled(0 * hidden, unembed, tokens, chunk=4, with_entropy=True)
    np.testing.assert_allclose(entropy, math.log(V), rtol=1e-6)
    np.testing.assert_allclose(logprobs, -math.log(V), rtol=1e-6)
    _, entropy = compiled(1e4 * hidden, unembed, tokens, chunk=4, with_entropy=True)
    np.testing.assert_allclose(entropy, 0, atol=1e-2)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_positions_give_an_empty_array(with_entropy: bool) -> None:
    hidden, unembed, tokens = jnp.zeros((2, 3, 0, D)), jnp.zeros((V, D)), jnp.zeros((2, 3, 0), int)
    for value in jax.tree.leaves(token_logprobs(hidden, unembed, tokens, chunk=4, with_entropy=with_entropy)):
        assert value.shape == (2, 3, 0) and value.dtype == jnp.float32


# The law of memory


def shapes_in(jaxpr: Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of everything computed in a program, inside its scans and recomputations too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
        for sub in inner:
            if isinstance(sub, Jaxpr | ClosedJaxpr):
                yield from shapes_in(sub.jaxpr if isinstance(sub, ClosedJaxpr) else sub)


def all_logits(loss: Callable[[jax.Array, jax.Array], jax.Array], chunk: int) -> list[tuple[int, ...]]:
    """Shapes, forward and backward, with both T (or T padded to whole chunks) and V, or as large as all logits."""
    hidden, unembed, _ = example()
    program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembed)
    lengths = {T, -(-T // chunk) * chunk}
    size = hidden.shape[0] * T * V
    shapes = set(shapes_in(program.jaxpr))
    assert any(V in shape for shape in shapes)
    return [shape for shape in shapes if (V in shape and lengths & set(shape)) or math.prod(shape) >= size]


@pytest.mark.parametrize("chunk", [1, 4, 7])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_no_array_has_all_logits(chunk: int, with_entropy: bool, wrap: Callable[..., Any]) -> None:
    tokens = example()[2]

    def loss(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        values = token_logprobs(hidden, unembed, tokens, chunk=chunk, with_entropy=with_entropy)
        return sum(value.sum() for value in jax.tree.leaves(values))

    assert all_logits(wrap(loss), chunk) == []


def naive(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    return unchunked(hidden, unembed, example()[2])[0].sum()


def scan_without_recomputation(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    """Chunked forward, but the chunks' logits are all kept for the backward pass."""
    chunks = jnp.pad(hidden, ((0, 0), (0, 1), (0, 0))).reshape(-1, 6, 4, D).swapaxes(0, 1)
    _, values = jax.lax.scan(lambda _, x: (None, jax.nn.logsumexp(x @ unembed.T, -1)), None, chunks)
    return values.sum()


def one_chunk(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
    return token_logprobs(hidden, unembed, example()[2], chunk=T).sum()


@pytest.mark.parametrize("loss", [naive, jax.jit(naive), jax.checkpoint(naive), scan_without_recomputation, one_chunk])
def test_the_law_can_fail(loss: Callable[..., jax.Array]) -> None:
    assert all_logits(loss, 4) != []


def test_compiled_memory_grows_with_neither_length_times_vocabulary() -> None:
    def scratch(length: int, vocabulary: int) -> int:
        """Bytes that the gradient needs beside its inputs and outputs."""
        hidden, unembed = jnp.zeros((2, length, D)), jnp.zeros((vocabulary, D))
        tokens = jnp.zeros((2, length), jnp.int32)
        loss = jax.grad(lambda h, u: token_logprobs(h, u, tokens, chunk=8).sum(), argnums=(0, 1))
        memory = jax.jit(loss).lower(hidden, unembed).compile().memory_analysis()
        return int(memory.temp_size_in_bytes)

    vocabulary = 4096
    short, long = scratch(32, vocabulary), scratch(512, vocabulary)
    assert long - short < 0.05 * 4 * 2 * (512 - 32) * vocabulary  # all logits would be this much more
    wide = scratch(512, 2 * vocabulary)
    assert wide - long < 0.2 * 4 * 2 * 512 * vocabulary


# Errors


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 5), (7, 5), (4,)), {}, r"hidden, tokens: expected .* got \(3, 5\) and \(4,\)"),
        (((5,), (7, 5), ()), {}, r"hidden, tokens: expected \[..., T, D\]"),
        (((3, 5), (5, 7), (3,)), {}, r"unembed: expected \[V, D\] with D = 5, got \(5, 7\)"),
        (((3, 5), (5,), (3,)), {}, r"unembed: expected \[V, D\] with D = 5, got \(5,\)"),
        (((3, 5), (7, 5), (3,)), {"chunk": 0}, "chunk: expected at least 1 position, got 0"),
        (((3, 5), (7, 5), (3,)), {"temperature": 0}, "temperature: expected a number above 0, got 0"),
        (((3, 5), (7, 5), (3,)), {"temperature": -1.0}, "temperature: expected a number above 0, got -1.0"),
    ],
)
def test_errors_say_what_was_expected(shapes: Any, options: dict[str, Any], message: str) -> None:
    hidden, unembed, tokens = shapes
    with pytest.raises(ValueError, match=message):
        token_logprobs(jnp.ones(hidden), jnp.ones(unembed), jnp.ones(tokens, int), **({"chunk": 2} | options))
