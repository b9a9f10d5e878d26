"""When a run saves: every so many steps, every so many minutes, and as a signal ends it."""

import time

from train.config import CheckpointConfig
from train.run.signals import decide_to_stop


class SaveSchedule:
    """Decides after each step, for all processes alike, whether to save and whether to go on.

    Args:
      config: the run's.
      max_steps: its last step, which is always saved.
    """

    def __init__(self, config: CheckpointConfig, max_steps: int) -> None:
        self._config, self._max_steps = config, max_steps
        self._saved, self._signal = 0, 0  # the newest step that was saved; the signal's number, 0: none
        self.restart_clock()

    def restart_clock(self) -> None:
        """Counts the minutes from now."""
        self._since = time.monotonic()

    def is_planned(self, step: int) -> bool:
        """Whether a step is saved however fast the run is."""
        return step % self._config.every == 0 or step == self._max_steps

    def is_due(self, step: int) -> bool:
        """Whether to save after this step; to be asked once a step, by every process."""
        self._signal, is_late = decide_to_stop(self._is_late)  # the first process's clock counts
        return self.is_planned(step) or is_late or bool(self._signal)

    def _is_late(self) -> bool:
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._since >= 60 * minutes

    def saved(self, step: int) -> None:
        """Notes that the save of a step has begun."""
        self._saved = step
        self.restart_clock()

    def interruption(self, step: int) -> int:
        """Returns the number of the signal that ends the run after this step, which is saved then; 0 to go on."""
        if self._saved != step or step == self._max_steps:
            return 0
        self._signal = self._signal or decide_to_stop()[0]  # it may have come during the save
        return self._signal
