"""What a machine can do at most: matrix products and copies measured on it."""

import statistics
import time

import jax
import jax.numpy as jnp


def copy_gbytes(repeats: int = 9) -> float:
    """Median rate of reading and writing 256 MiB, in 10^9 bytes per second."""
    array = jnp.ones(1 << 26, jnp.float32)
    add, seconds = jax.jit(lambda x: x + 1), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        add(array).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * array.nbytes / statistics.median(seconds[1:]) / 1e9


def matmul_gflops(dtype: str, repeats: int = 9) -> float:
    """Best median rate of a square matrix product, in 10^9 floating point operations per second."""
    sizes = (1024, 2048) if jax.default_backend() == "cpu" else (4096, 8192)
    multiply, rates = jax.jit(jnp.matmul), []
    for size in sizes:
        matrix = jnp.ones((size, size), dtype)
        multiply(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            multiply(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - began)
        rates.append(2 * size**3 / statistics.median(seconds) / 1e9)
    return max(rates)
