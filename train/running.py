"""Runs a program of the command line: connects processes, prints a user's mistake in one line, returns an exit code."""

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from train.console import console, in_one_line


class SetupError(ValueError):
    """A user's mistake, found before anything is computed. The user sees the message alone."""


class RunInterrupted(SystemExit):
    """A signal has ended a run in good order. Where nothing catches it, Python exits with its code.

    Attributes:
      name: the signal's.
      exit_code: 128 + the signal's number, as shells have it.
      line: what came, at which step, what is saved and how to go on.
      is_agreed: whether all processes end after the same step; else this one ends alone.
    """

    def __init__(self, number: int, line: str, *, is_agreed: bool = False) -> None:
        self.name, self.exit_code = signal.Signals(number).name, 128 + number
        super().__init__(self.exit_code)
        self.line, self.is_agreed = line, is_agreed

    def __str__(self) -> str:
        return self.line


class WriteError(OSError):
    """A disk did not take what a program has to write. The user sees the line alone.

    Attributes:
      line: what could not be written, why, and what to do; a run adds what is saved.
    """

    def __init__(self, line: str) -> None:
        super().__init__(line)
        self.line = line

    def __str__(self) -> str:
        return self.line


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """Turns the exceptions of a run's set-up into SetupErrors; one of the operating system names its file.

    A WriteError stays one.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise SetupError(str(error) if error.filename is None else f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise SetupError(str(error)) from error


@contextlib.contextmanager
def naming(where: str | None) -> Iterator[None]:
    """Puts the setting that names a model in front of what is raised about the model; None: leaves it as it is."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        if where is None or text.startswith(f"{where}: "):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}: {text}") from error


def exit_code(program: Callable[[], object], *, own_devices: bool = False, several: bool = True) -> int:
    """Runs a program and returns its exit code; a user's mistake is printed as one line on the standard error.

    Args:
      own_devices: the program makes devices of its own, so that neither cache nor processes are set up.
      several: the program may run in several processes, which connect first and fail together.

    Returns:
      0 for success; 2 for a user's mistake; 1 for numbers that are not finite, for a disk that did not take what was
      written, and for any failure where there are several processes; 128 + its number for a signal: 143 for SIGTERM,
      130 for SIGINT, 129 for SIGHUP.
    """
    from models.compile_cache import enable_compile_cache
    from train import processes
    from train.accelerators import skip_absent_accelerators

    skip_absent_accelerators()
    is_told = False  # whether one line has told of it already, here or in another process
    try:
        if not own_devices:
            enable_compile_cache()
        if several and not own_devices:
            processes.connect()
            console.quiet = not processes.is_first()
        program()
    except (SetupError, processes.JoinError, FloatingPointError, WriteError) as error:
        code, is_told = 1 if isinstance(error, FloatingPointError | WriteError) else 2, isinstance(error, WriteError)
        other = processes.report_failure(code)
        if not (is_told and other):
            with contextlib.suppress(OSError):  # here and below: the output may be a file on a full disk too
                print(f"error: {in_one_line(str(error))}", file=sys.stderr)
    except RunInterrupted as end:
        code = end.exit_code
        if processes.is_first() or not end.is_agreed:
            with contextlib.suppress(OSError):
                print(end, file=sys.stderr)
        if end.is_agreed:
            return code
        is_told = True
        processes.report_failure(code)
    except KeyboardInterrupt:
        print("SIGINT: ended", file=sys.stderr)
        code = 128 + signal.SIGINT
    except Exception:
        if not processes.is_distributed():
            raise
        other = processes.report_failure(1)
        code, is_told = other or 1, bool(other)  # it is in the midst of an exchange with the one that has failed
        if not is_told:
            with contextlib.suppress(OSError):
                traceback.print_exc()
    else:
        return 0
    if processes.is_distributed():
        processes.abort(code, is_told=is_told)
    return code
