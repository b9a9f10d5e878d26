"""A trace of some steps of a run, by jax.profiler: written into the run's directory by each process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from train.config import ProfileConfig
from train.console import console

PROFILE = "profile"  # the folder in a run's directory

_open: list[Path] = []  # the folder of the trace that this process writes, if it does


class Profile:
    """Traces the steps that the config names.

    Args:
      config: None = no steps.
      run: the run's directory.
      done: steps that are done when the run goes on.
    """

    def __init__(self, config: ProfileConfig | None, run: Path, done: int) -> None:
        self._first, self._last = (config.start, config.last) if config is not None else (0, 0)
        self._folder = run / PROFILE / f"process_{jax.process_index()}"
        if self._first and done >= self._first:
            console.print(
                f"{run}: no profile: step {self._first}, where it starts, is done already; set log.profile.start above "
                f"{done}"
            )

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Names a step in the trace, which begins with the first of its steps."""
        if number == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would bury the rest
            jax.profiler.start_trace(self._folder, profiler_options=options)
            _open.append(self._folder)
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def logged(self, number: int) -> None:
        """Ends the trace if this was the last of its steps; the step's update has ended."""
        if number == self._last:
            finish_trace()


def finish_trace() -> None:
    """Writes the trace that is open, if there is one."""
    if _open:
        folder = _open.pop()
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # a full disk, for one; XLA raises its own error
            console.print(f"warning: {folder}: the profile could not be written ({error}); the run goes on without it")
            return
        console.print(f"{folder}: profile written; open it with xprof, TensorBoard or Perfetto (docs/metrics.md)")
