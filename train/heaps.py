"""The heaps of a long run: glibc gives a thread a heap of its own, and what a save leaves in each is holes."""

import ctypes
import os
import platform

_M_ARENA_MAX = -8  # of mallopt(3)


def limit_heaps() -> None:
    """Limits glibc's heaps (its arenas) to one for each core; glibc's own limit is eight.

    A save allocates in some threads and frees in others. What is free in one heap serves no other, so each grows to
    its own highest need: after 500 saves of a tiny network 76 MB of 128 were free, with one heap a core 13 MB of 59. A
    limit of the user's (MALLOC_ARENA_MAX, or `arena_max` in GLIBC_TUNABLES) stays as it is, and so does another libc.

    To be called in a program's first lines: a process with threads that compiled for TPUs (libtpu 0.0.42) crashed
    after a call.
    """
    chosen = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if not chosen and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, os.cpu_count() or 2))
