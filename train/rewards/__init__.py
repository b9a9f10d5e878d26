"""Scores completions with one or more rewards, each a reward model or a Python function, and combines them by weight.

NaN means unscorable. A completion without any reward is NaN and leaves the ranks and the loss. Where only some of its
rewards are NaN, `rewards[i].missing` says whether it is left out, the worst of its group, or scored by the others.
Order and differences are those of float64 (`train.rewards.precision`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.sharding import Layout
from models.tokenizer import Prompt
from train.config import RewardSpec
from train.data.prompts import Prompts
from train.processes import gather
from train.rewards.failures import Clock, Moment
from train.rewards.functions import Scored, Scorer, TokenIds, check_rows, completion_ids, function_scorer
from train.rewards.logged import Columns, gather_columns, logged_columns, summed_metrics
from train.rewards.model import RewardModelScorer
from train.rewards.precision import combine, missing_masks, narrow

__all__ = ["RewardModelScorer", "Rewards", "combine", "completion_ids", "function_scorer"]


class Rewards:
    """The rewards of a run, by name."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        layout: Layout | None,
        dtype: str,
        combination: str = "sum",
        columns: Collection[str] | None = None,
        missing: Sequence[str] | None = None,
    ) -> None:
        """
        Args:
          dtype: of the reward models' weights and computation.
          missing: what becomes of a completion that lacks a reward, by reward; default: by the specs.
          columns: columns of the data, which functions may ask for; None: not known yet, so not checked.
        """
        self.weights_R = np.array([spec.weight for spec in specs], np.float64)
        self.combination, self.specs = combination, specs
        self._reasons: dict[str, str] = {}
        self.missing = [spec.missing_rule for spec in specs] if missing is None else missing
        functions = {  # first: a mistake in one is reported before any weight is read
            spec.label: function_scorer(
                spec.function,
                spec.options,
                columns,
                report=partial(self._reasons.__setitem__, spec.label),
                spec=spec,
            )
            for spec in specs
            if spec.function is not None
        }
        for function in functions.values():
            function.prepare()
        self.functions, self._clock, self._moment = functions, Clock(), Moment()
        self._columns_PG: Columns = {}  # of the last `score`
        self.scorers: dict[str, Scorer] = {
            spec.label: functions[spec.label]
            if spec.label in functions
            else RewardModelScorer(
                str(spec.model),
                layout=layout,
                dtype=dtype,
                max_length=spec.max_length,
                batch_prompts=spec.batch_prompts,
                offload=spec.offload,
            )
            for spec in specs
        }

    def why_unscorable(self, name: str) -> str | None:
        """Returns why this process had no reward `name` for a completion, the last time; None if it had them all."""
        scorer = self.scorers[name]
        return scorer.why_unscorable if isinstance(scorer, RewardModelScorer) else self._reasons.get(name)

    def check_data(self, *parts: Prompts) -> None:
        """Refuses what could not be scored: prompts of the first part by `check`, rows of all by `check_rows`."""
        for prompt in parts[0].one_of_each_kind():
            self.check(prompt)
        for part in parts:
            self.check_rows(part.columns(part.rows))

    def check(self, prompt: Prompt) -> None:
        """Refuses reward models that cannot read such a prompt, before anything is sampled.

        Raises:
          ValueError: no chat template for chat messages, or no room for a single token of a completion.
        """
        for name, scorer in self.scorers.items():
            if isinstance(scorer, RewardModelScorer):
                length = len(scorer.tokenizer.conversation_ids([prompt], ["."])[0])
                if length > scorer.max_length:
                    raise ValueError(
                        f"rewards: {name}: a prompt and the completion '.' are {length} tokens of its tokenizer, more "
                        f"than its max_length = {scorer.max_length}, so nothing could be scored; raise it"
                    )

    def check_rows(self, columns: dict[str, list[Any]]) -> None:
        """Refuses rows of the data that a built-in function cannot score, before anything is sampled.

        Args:
          columns: the columns of all rows, without the prompts.

        Raises:
          ValueError: the first such row.
        """
        for spec in self.specs:
            if spec.function is not None:
                check_rows(spec.function, columns)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        """Returns `rewards_PGR`, every reward apart, float64 if one is a function's, else float32; NaN = unscorable.

        Where there are several processes, each passes its share of the prompts and gets the rewards of all prompts.
        """
        pending, self._columns_PG = self.start(prompts, completions_PG, columns, completion_ids_PG), {}

        def finish() -> dict[str, np.ndarray]:
            scored = {name: wait() for name, wait in pending.items()}
            self._columns_PG = logged_columns(scored)
            return {name: each.rewards_PG for name, each in scored.items()}

        rewards_PGR = self.with_models(finish, prompts, completions_PG)
        self._columns_PG = self.gather_columns(self._columns_PG, len(prompts), rewards_PGR.shape[1])
        return rewards_PGR

    def start(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> dict[str, Callable[[], Scored]]:
        """Begins to score these prompts alone by every function; no process waits for another.

        Those with workers, async ones and servers go on by themselves; the run's own process has called the others.

        Returns:
          Of each function, what waits for its rewards.
        """
        arguments = (prompts, completions_PG, columns, completion_ids_PG, self._moment)
        in_background = sorted(self.functions.items(), key=lambda item: not item[1].is_in_background)
        started = {name: function.start(*arguments) for name, function in in_background}
        return {name: started[name] for name in self.functions}

    def score_by_functions(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the rewards [P, G] of these prompts alone by every function."""
        pending = self.start(prompts, completions_PG, columns, completion_ids_PG)
        return {name: wait().rewards_PG for name, wait in pending.items()}

    def with_models(
        self,
        scores_PG: Mapping[str, np.ndarray] | Callable[[], Mapping[str, np.ndarray]],
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
    ) -> np.ndarray:
        """Returns `rewards_PGR` of all processes, given the functions' rewards of this one's share of the prompts.

        Args:
          scores_PG: those rewards, or what waits for them, while the models score.
        """
        models = {name: score for name, score in self.scorers.items() if isinstance(score, RewardModelScorer)}
        rewards = {name: score(prompts, completions_PG) for name, score in models.items()}
        found = scores_PG() if callable(scores_PG) else scores_PG
        rewards |= {name: gather(found[name]) for name in self.scorers if name not in models}
        return np.stack([rewards[name] for name in self.scorers], -1)

    def belong_to(self, directory: str | Path, max_steps: int, steps_per_epoch: float) -> None:
        """Names the run, for functions that ask where it is, and for the texts of failed calls."""
        self._clock = Clock(Path(directory), max_steps, steps_per_epoch)

    def at(self, step: int, when: str) -> None:
        """Says after how many steps the next calls of functions come, and for what, such as "step 3"."""
        self._moment = self._clock.moment(step, when)

    def take_columns(self) -> Columns:
        """Returns logged/NAME/COLUMN [P][G], of all processes, of the last `score`."""
        columns_PG, self._columns_PG = self._columns_PG, {}
        return columns_PG

    def gather_columns(self, columns_PG: Columns, own_prompts: int, completions: int) -> Columns:
        """Returns the columns [P][G] of all processes, given those of this one's share of the prompts."""
        if not any(function.logs for function in self.functions.values()):
            return {}
        return gather_columns(columns_PG, own_prompts, completions)

    def close(self) -> None:
        """Ends worker processes."""
        for function in self.functions.values():
            function.close()

    def combine(self, rewards_PGR: np.ndarray) -> np.ndarray:
        """Returns `rewards_PG`: see the function `combine`."""
        return combine(rewards_PGR, self.weights_R, self.combination, self.missing)

    def left_out(self, rewards_PGR: np.ndarray) -> np.ndarray:
        """Returns [P, G] True where a completion has no combined reward, and nothing is learned from it."""
        return missing_masks(rewards_PGR, self.weights_R, self.missing)[0]

    def metrics(self, rewards_PGR: np.ndarray) -> dict[str, float]:
        """Returns the metrics of every reward.

        These are rewards/NAME/mean, rewards/NAME/std and rewards/NAME/unscorable (a count), and rm/truncated_frac: the
        share of completions, over all reward models, longer than a model's max_length. They are unscorable, not cut.
        Since the last call: rewards/NAME/failed, completions of failed calls where these do not end the run, and
        logged/NAME/METRIC, means over completions of what functions have logged.
        """
        metrics = {}
        is_model_R = [isinstance(scorer, RewardModelScorer) for scorer in self.scorers.values()]
        if any(is_model_R):
            metrics["rm/truncated_frac"] = float(np.isnan(rewards_PGR[..., is_model_R]).mean())
        for r, name in enumerate(self.scorers):
            rewards_PG = narrow(rewards_PGR[..., r])
            scored = rewards_PG[~np.isnan(rewards_PG)]
            metrics[f"rewards/{name}/mean"] = float(scored.mean()) if scored.size else math.nan
            metrics[f"rewards/{name}/std"] = float(scored.std(ddof=1)) if scored.size > 1 else math.nan
            metrics[f"rewards/{name}/unscorable"] = float(rewards_PG.size - scored.size)
        return metrics | self._take_logged()

    def _take_logged(self) -> dict[str, float]:
        """Returns the metrics that functions have logged, and the counts of their failures, over all processes."""
        logging = {name: function for name, function in self.functions.items() if function.logs}
        sums = {
            f"logged/{name}/{metric}": pair
            for name, function in logging.items()
            for metric, pair in function.take_sums().items()
        }
        counts = {
            f"rewards/{name}/failed": float(function.failures.take())
            for name, function in logging.items()
            if function.counts_failures
        }
        return summed_metrics(sums, counts) if logging else {}
