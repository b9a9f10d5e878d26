"""A program of the command line, from its start to its exit code."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator

from train.console import console


class SetupError(ValueError):
    """A user's mistake, found before anything is computed. The message is the whole story."""


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """Turn what the checks of a run's set-up raise into one clear error; the operating system's with its file."""
    try:
        yield
    except OSError as error:
        raise SetupError(str(error) if error.filename is None else f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise SetupError(str(error)) from error


def exit_code(program: Callable[[], object], *, own_devices: bool = False, several: bool = True) -> int:
    """Run it; a user's mistake is one line on the standard error.

    Args:
      own_devices: it makes its own, so nothing is set up for it.
      several: it may be one of several processes, which then find each other first and end together.

    Returns:
      0; 2 for a mistake; 1 for numbers that are none, and, of several processes, for a failure.
    """
    from models.compile_cache import enable_compile_cache
    from train import processes

    try:
        if not own_devices:
            enable_compile_cache()
        if several and not own_devices:
            processes.connect()
            console.quiet = not processes.is_first()
        program()
    except (SetupError, processes.JoinError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, FloatingPointError) else 2
    except (Exception, KeyboardInterrupt):
        if not processes.is_distributed():
            raise
        traceback.print_exc()
        code = 1
    else:
        return 0
    if processes.is_distributed():
        processes.abort(code)
    return code
