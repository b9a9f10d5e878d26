"""Scores completions with one or more rewards, each a reward model or a Python function, and combines them by weight.

NaN means unscorable. A completion without any reward is NaN and leaves the ranks and the loss. Where only some of its
rewards are NaN, `rewards[i].missing` says whether it is left out, the worst of its group, or scored by the others.
Order and differences are those of float64 (`train.rewards.precision`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from models.sharding import Layout
from models.tokenizer import Prompt
from train.config import RewardSpec
from train.data.prompts import Prompts
from train.processes import gather
from train.rewards.functions import Scorer, TokenIds, check_rows, completion_ids, function_scorer
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
                spec.function, spec.options, columns, report=partial(self._reasons.__setitem__, spec.label)
            )
            for spec in specs
            if spec.function is not None
        }
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
        scores = self.score_by_functions(prompts, completions_PG, columns, completion_ids_PG)
        return self.with_models(scores, prompts, completions_PG)

    def score_by_functions(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the rewards [P, G] of these prompts alone by every function; no process waits for another."""
        arguments = (prompts, completions_PG, columns, completion_ids_PG)
        functions = {name: s for name, s in self.scorers.items() if not isinstance(s, RewardModelScorer)}
        return {name: score(*arguments) for name, score in functions.items()}

    def with_models(
        self,
        scores_PG: Mapping[str, np.ndarray],
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
    ) -> np.ndarray:
        """Returns `rewards_PGR` of all processes, given the functions' rewards of this one's share of the prompts."""
        rewards = [
            score(prompts, completions_PG) if isinstance(score, RewardModelScorer) else gather(scores_PG[name])
            for name, score in self.scorers.items()
        ]
        return np.stack(rewards, -1)

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
        return metrics
