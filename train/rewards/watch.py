"""Watches whether anything is scored: says so when nothing is, and ends a run in which that goes on."""

from collections.abc import Callable, Sequence

import numpy as np

from train.console import print_plain
from train.rewards.returned import RewardError

MAX_SILENT = 3  # steps in a row


class ScoreWatch:
    """Counts the steps in a row in which nothing was scored, by all rewards together and by each.

    Args:
      names: the rewards.
      weights_R: their weights; what one of weight 0 scores teaches nothing. None: all count.
      why: returns why a reward, by its name, has scored nothing, if that is known.

    Attributes:
      silent_steps: steps in a row without a single scored completion.
    """

    def __init__(
        self,
        run: str,
        names: Sequence[str],
        weights_R: np.ndarray | None = None,
        why: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self.run, self.silent_steps, self._why = run, 0, why
        self._silent_steps_of = dict.fromkeys(names, 0)
        weights = [1.0] * len(names) if weights_R is None else weights_R
        self._learned = [name for name, weight in zip(names, weights, strict=True) if weight]
        self._silent = self._learned  # those without any reward when there was none to learn from

    def look(
        self, when: str, rewards_PGR: np.ndarray, combined_PG: np.ndarray | None = None, *, counts: bool = True
    ) -> None:
        """Prints one line if nothing was scored, or if one of several rewards has scored nothing for some time.

        Args:
          when: e.g. "step 3".
          combined_PG: what is learned from; default: whatever any of the rewards has scored.
          counts: whether this is a step, which the next ones may follow in a row.
        """
        missing = dict(zip(self._silent_steps_of, np.isnan(rewards_PGR).all((0, 1)), strict=True))
        count = rewards_PGR[..., 0].size
        nothing = all(missing[name] for name in self._learned)
        nothing |= combined_PG is not None and bool(np.isnan(combined_PG).all())
        if nothing:
            self._silent = [name for name in self._learned if missing[name]] or self._learned
            names = ", ".join(self._silent)
            print_plain(
                f"{self.run}: {when}: no reward for any of {count} completions ({names}: all unscorable); nothing is "
                f"learned from them{self._reasons(self._silent)}"
            )
        if not counts:
            return
        self.silent_steps = self.silent_steps + 1 if nothing else 0
        for name, is_missing in missing.items():
            self._silent_steps_of[name] = self._silent_steps_of[name] + 1 if is_missing else 0
            if self._silent_steps_of[name] == MAX_SILENT and not self.silent_steps:
                print_plain(
                    f"{self.run}: {when}: {name} has scored no completion of {MAX_SILENT} steps in a row; only the "
                    f"other rewards are learned from{self._reasons([name])}"
                )

    def _reasons(self, names: Sequence[str]) -> str:
        """Returns "; NAME: REASON" of each of these rewards whose reason is known."""
        return "".join(f"; {name}: {why}" for name in names if (why := self._why(name)))

    @property
    def is_hopeless(self) -> bool:
        """Whether the run should end: nothing was scored in `MAX_SILENT` steps in a row."""
        return self.silent_steps >= MAX_SILENT

    def error(self, step: int) -> RewardError:
        """Returns the error that ends such a run."""
        return RewardError(
            f"{self.run}: step {step}: no reward for any completion of {self.silent_steps} steps in a row "
            f"({', '.join(self._silent)}: all unscorable), so nothing is learned; everything is saved; "
            f"mend the rewards or the data, and start again to go on{self._reasons(self._silent)}"
        )
