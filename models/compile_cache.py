"""JAX's persistent compilation cache: a program that was compiled once on this machine starts warm."""

import os
from pathlib import Path

import jax


def enable_compile_cache() -> None:
    """Stores compiled programs in JAX_COMPILATION_CACHE_DIR, or in the user's cache directory."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "gopo_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
