"""glibc's heaps are limited to one for each core, unless the user has a limit of their own."""

import ctypes
import os
import platform

import pytest

from train.heaps import limit_heaps


class Library:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return library


def test_one_heap_for_each_core(library: Library) -> None:
    limit_heaps()
    assert library.calls == [(-8, 12)]  # M_ARENA_MAX of malloc.h


@pytest.mark.parametrize("name, value", [("MALLOC_ARENA_MAX", "1"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")])
def test_users_limit_stays(library: Library, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    limit_heaps()
    assert not library.calls


def test_other_libc_has_no_such_limit(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    limit_heaps()
    assert not library.calls
