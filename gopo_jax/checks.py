"""Shape and value checks at the public door. They read static facts only, so they cost nothing under jit."""

from collections.abc import Collection

import jax
import jax.numpy as jnp


def as_float(name: str, value: jax.typing.ArrayLike) -> jax.Array:
    """`value` as an array of at least float32; complex and boolean arrays are refused.

    Integers and 16-bit floats become float32 (both exactly); float32 and float64 stay what they are.
    """
    array = jnp.asarray(value)
    if array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}; convert it to a float first")
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def group_axis(name: str, array: jax.Array) -> None:
    """Refuse an array whose last axis cannot be a group of at least two completions."""
    if array.ndim < 1:
        raise ValueError(f"{name}: expected [..., G] with the group as the last axis, got a scalar")
    if array.shape[-1] < 2:
        raise ValueError(
            f"{name}: expected at least 2 completions per prompt (num_generations >= 2) on the last axis, "
            f"got shape {array.shape}"
        )


def same_shape(name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    if array.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {other.shape}, got {array.shape}")


def one_of(name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
