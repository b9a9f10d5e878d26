"""float32 products are float32 on every device: TPUs would round their inputs to bfloat16, and GPUs to TF32."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp


def products_in(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which products of float32 arrays are float32; for other dtypes JAX's settings stay.

    What is traced in it keeps its precision in the backward pass, and in whatever program it becomes part of.
    """
    return jax.default_matmul_precision("float32") if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext()
