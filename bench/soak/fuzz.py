"""Inputs that are almost valid, by hypothesis: each is taken or refused in one line of ours, and no number is absurd.

    python -m bench.soak fuzz [--short] [--seed N] [--only NAME ...] [--count N]

What is tried, and what a case may come to, is in `bench.soak.targets`. A fault is an exception that our code does not
raise itself, a message of several lines, or a value that was taken and should not have been. Faults are told apart by
where they come from; the shortest case of each is printed.
"""

import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from bench.soak.tiny import ROOT, environment, write_materials

PACKAGES = tuple(str(ROOT / name) for name in ("gopo_jax", "models", "train", "eval"))
USERS_MISTAKES = (ValueError, TypeError, ImportError, OSError)  # what train.running.setup_errors shows as one line
LONGEST_MESSAGE = 20_000  # characters; names in it may be long
CASES, SHORT_CASES = 1000, 50


class Fault(AssertionError):
    """A value that was taken and should not have been."""


def fault(text: str) -> NoReturn:
    """Says what should not have been taken."""
    raise Fault(text)


class Finding(NamedTuple):
    """A kind of fault, with the shortest case of it."""

    where: str
    message: str
    case: str
    cases: int = 1


def problem(error: BaseException) -> tuple[str, str] | None:
    """Returns (where, what) if an exception is none that a user can read in one line, else None."""
    frames = traceback.extract_tb(error.__traceback__)
    last, own = frames[-1], [frame for frame in frames if frame.filename.startswith(PACKAGES)]
    where = f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else f"{last.filename}:{last.lineno}"
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Fault):
        return str(error).partition(":")[0], str(error)
    if not isinstance(error, USERS_MISTAKES):
        return where, text
    if isinstance(error, OSError) and error.filename is not None:
        return None
    if not own or last is not own[-1] or "raise" not in _statement(last):
        return where, f"not raised by us: {text}"
    if len(str(error)) > LONGEST_MESSAGE:
        return where, f"{len(str(error))} characters: {text}"
    return None


def _statement(frame: traceback.FrameSummary) -> str:
    """Returns the source of the lines that a frame is in, and of those before it that begin the statement."""
    lines = Path(frame.filename).read_text(encoding="utf-8").splitlines()
    first = frame.lineno or 1
    return "\n".join(lines[first - 1 : frame.end_lineno or first])


def explore(
    target: Callable[[Any], None], strategy: Any, count: int, seed_number: int
) -> tuple[list[Finding], dict[str, int]]:
    """Tries so many cases; returns the kinds of faults, and how many cases were taken and refused."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found, outcomes = dict[str, Finding](), {"taken": 0, "refused": 0}

    @seed(seed_number)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(strategy)
    def one(case: Any) -> None:
        try:
            target(case)
        except Exception as error:
            outcomes["refused"] += 1
            if (what := problem(error)) is not None:
                where, message = what
                before = found.get(where)
                shown = f"{case!r}"
                if before is not None and len(before.case) <= len(shown):
                    message, shown = before.message, before.case
                found[where] = Finding(where, message, shown, 1 + (before.cases if before else 0))
        else:
            outcomes["taken"] += 1

    one()
    return list(found.values()), outcomes


def run(*, count: int, seed: int, only: Sequence[str] = ()) -> int:
    """Tries every target; prints a table and every kind of fault; returns the exit code: 1 with any fault."""
    os.environ.update(environment())
    from bench.soak.targets import TARGETS

    print(f"fuzz: seed {seed}, {count} cases each", flush=True)
    print(f"{'input':<14}{'cases':>8}{'taken':>8}{'refused':>9}{'faults':>8}{'seconds':>9}")
    faults, place = list[Finding](), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="soak-fuzz-") as folder:
        write_materials(Path(folder) / "materials")
        os.chdir(folder)  # whatever a relative name may make
        try:
            for name, make in TARGETS.items():
                if only and name not in only:
                    continue
                began = time.monotonic()
                found, outcomes = explore(*make(Path(folder) / "materials", Path(folder) / name), count, seed)
                taken, refused = outcomes["taken"], outcomes["refused"]
                line = f"{name:<14}{taken + refused:>8}{taken:>8}{refused:>9}{len(found):>8}"
                print(f"{line}{time.monotonic() - began:>9.0f}", flush=True)
                faults += found
        finally:
            os.chdir(place)
    for fault in faults:
        print(f"\n{fault.where} ({fault.cases} times)\n  {ascii(fault.message)[:600]}\n  case: {fault.case[:900]}")
    print(f"fuzz: {len(faults)} kinds of faults", flush=True)
    return 1 if faults else 0


def main(arguments: Sequence[str]) -> int:
    """Runs `python -m bench.soak fuzz`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m bench.soak fuzz")
    parser.add_argument("--short", action="store_true", help=f"{SHORT_CASES} cases of each input, not {CASES}")
    parser.add_argument("--count", type=int, help="so many cases of each input")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the cases")
    parser.add_argument("--only", nargs="+", default=(), help="names of inputs")
    options = parser.parse_args(arguments)
    count = options.count or (SHORT_CASES if options.short else CASES)
    return run(count=count, seed=options.seed, only=options.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
