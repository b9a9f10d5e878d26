"""What Orbax leaves behind when a save has failed is no line of its own beside the one that says so."""

import sys
import warnings

import pytest

from models.checkpoint_failures import silence_orbax


def test_write_of_a_failed_save_that_nobody_waits_for_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_orbax.__wrapped__()
        for name in ("async_serialize_from_host.<locals>.write_fragment", "rewards"):
            warnings.warn(f"coroutine '{name}' was never awaited", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["coroutine 'rewards' was never awaited"]
