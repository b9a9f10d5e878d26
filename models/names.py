"""Splits the names of models: RUN@STEP and RUN@best of a run, ORGANISATION/MODEL@COMMIT of the Hub."""

import re
from pathlib import Path

_STEP = re.compile(r"(?P<run>.*[^/]/*)@(?P<step>[0-9]{1,18}|best)/*", re.DOTALL)
_COMMIT = re.compile(r"(?P<name>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})")


def split_step(checkpoint: str | Path) -> tuple[str, str]:
    """Splits "RUN@STEP" into ("RUN", "STEP"); other names give (name, "").

    An @ separates a step only behind the last path separator and in front of digits or "best", so that a directory may
    have an @ in its name. A directory that exists under the whole name is meant by it.
    """
    name = str(checkpoint)
    match = _STEP.fullmatch(name)
    return (name, "") if match is None or Path(name).is_dir() else (match["run"], match["step"])


def split_commit(name: str | Path) -> tuple[str, str | None]:
    """Splits "ORGANISATION/MODEL@COMMIT", a state of a model on the Hub; other names give (name, None)."""
    match = _COMMIT.fullmatch(str(name))
    return (str(name), None) if match is None or Path(name).is_dir() else (match["name"], match["commit"])
