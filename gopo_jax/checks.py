"""Checks of shapes and values at the public functions. They read static facts only and cost nothing under jit."""

from collections.abc import Collection

import jax
import jax.numpy as jnp


def as_float(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """Returns `value` as an array of at least float32.

    Integers and 16-bit floats become float32 (16 bits fit exactly); float32 and, with
    `jax_enable_x64`, float64 keep their dtype.

    Raises:
      TypeError: a complex or boolean array.
    """
    array = jnp.asarray(value)
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}; convert it to a float first")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def group_axis(name: str, array: jax.Array) -> None:
    """Raises ValueError unless the last axis can be a group of at least two completions."""
    if array.ndim < 1:
        raise ValueError(f"{name}: expected [..., G] with the group as the last axis, got a scalar")
    if array.shape[-1] < 2:
        raise ValueError(
            f"{name}: expected at least 2 completions per prompt (num_generations >= 2) on the last axis, "
            f"got shape {array.shape}"
        )


def same_shape(name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    """Raises ValueError unless both arrays have the same shape."""
    if array.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {other.shape}, got {array.shape}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raises ValueError unless `value` is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def per_token(advantages: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Returns advantages that broadcast to the tokens.

    Raises:
      ValueError: neither one per completion nor one per token.
    """
    if advantages.shape == logprobs.shape[:-1]:
        return advantages[..., None]
    if advantages.shape != logprobs.shape:
        raise ValueError(
            f"advantages: expected one per completion, {logprobs.shape[:-1]}, or per token, {logprobs.shape}, "
            f"got {advantages.shape}"
        )
    return advantages
