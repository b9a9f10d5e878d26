"""JAX's persistent compilation cache: a program that was compiled once on this machine starts warm."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Returns JAX_COMPILATION_CACHE_DIR, or a folder of the user's cache directory."""
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(given)
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")) / "gopo_jax" / "xla"
    )


def enable_compile_cache() -> None:
    """Stores compiled programs in the `cache_folder`."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
