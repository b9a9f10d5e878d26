"""Watches whether anything is scored: says so when nothing is, and ends a run in which that goes on."""

from collections.abc import Sequence

import numpy as np

from train.console import print_plain
from train.rewards.returned import RewardError

MAX_SILENT = 3  # steps in a row


class ScoreWatch:
    """Counts the steps in a row in which nothing was scored, by all rewards together and by each.

    Attributes:
      silent_steps: steps in a row without a single scored completion.
    """

    def __init__(self, run: str, names: Sequence[str]) -> None:
        self.run, self.silent_steps = run, 0
        self._silent_steps_of = dict.fromkeys(names, 0)

    def look(self, when: str, rewards_PGR: np.ndarray, *, counts: bool = True) -> None:
        """Prints one line if nothing was scored, or if one of several rewards has scored nothing for some time.

        Args:
          when: e.g. "step 3".
          counts: whether this is a step, which the next ones may follow in a row.
        """
        missing_R = np.isnan(rewards_PGR).all((0, 1))
        count = rewards_PGR[..., 0].size
        if missing_R.all():
            names = ", ".join(self._silent_steps_of)
            print_plain(
                f"{self.run}: {when}: no reward for any of {count} completions ({names}: all unscorable); nothing is "
                f"learned from them"
            )
        if not counts:
            return
        self.silent_steps = self.silent_steps + 1 if missing_R.all() else 0
        for name, missing in zip(self._silent_steps_of, missing_R, strict=True):
            self._silent_steps_of[name] = self._silent_steps_of[name] + 1 if missing else 0
            if self._silent_steps_of[name] == MAX_SILENT and not self.silent_steps:
                print_plain(
                    f"{self.run}: {when}: {name} has scored no completion of {MAX_SILENT} steps in a row; only the "
                    f"other rewards are learned from"
                )

    @property
    def is_hopeless(self) -> bool:
        """Whether the run should end: nothing was scored in `MAX_SILENT` steps in a row."""
        return self.silent_steps >= MAX_SILENT

    def error(self, step: int) -> RewardError:
        """Returns the error that ends such a run."""
        return RewardError(
            f"{self.run}: step {step}: no reward for any completion of {self.silent_steps} steps in a row "
            f"({', '.join(self._silent_steps_of)}: all unscorable), so nothing is learned; everything is saved; "
            f"mend the rewards or the data, and start again to go on"
        )
