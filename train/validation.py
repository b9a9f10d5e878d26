"""Validation of a policy: completions of held-out prompts, drawn and scored by settings of their own."""

import math
from typing import Any

import numpy as np

from models.generate import Generator
from train.config import PolicyConfig
from train.data.prompts import Prompts
from train.processes import share
from train.rewards import Rewards
from train.rewards.functions import completion_ids
from train.rewards.watch import ScoreWatch
from train.run.directory import Run
from train.run.metrics import rollout_metrics
from train.state import VALIDATION, TrainState, stream_key


class Validation:
    """Samples the first validation prompts, scores and writes the completions.

    Args:
      run: the completions are written there.
      config: the run's.
      prompts: the validation's.
      rewards: those that the policy is trained for.
      own_rewards: those that it is not trained for, `config.validation.rewards`.
      generator: draws with the settings of the validation.
      watch: says so if nothing is scored.
    """

    def __init__(
        self,
        run: Run,
        config: PolicyConfig,
        prompts: Prompts,
        rewards: Rewards,
        own_rewards: Rewards,
        generator: Generator,
        watch: ScoreWatch,
    ) -> None:
        self._run, self._config, self._prompts, self._generator, self._watch = run, config, prompts, generator, watch
        self._rewards, self._own_rewards = rewards, own_rewards

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Validates the policy after a step; returns metrics under validation/."""
        settings = self._config.validation
        rows = self._prompts.rows[: settings.prompts]
        prompts, G = self._prompts.prompts(rows), settings.num_generations
        key = stream_key(self._config.seed, VALIDATION, step)
        completions = self._generator.complete(state.all_params, prompts, key, G, settings.batch_prompts)
        texts_PG, lengths_PG, finished_PG, tokens_PGT = completions
        own = share(len(rows))
        columns, ids_PG = self._prompts.columns(rows, own), completion_ids(tokens_PGT[own], lengths_PG[own])
        for rewards in (self._rewards, self._own_rewards):
            rewards.at(step, f"validation at step {step}")
        rewards_PGR = self._rewards.score(prompts[own], texts_PG[own], columns, ids_PG)
        logged_PG = self._rewards.take_columns()
        rewards_PG, metrics = self._rewards.combine(rewards_PGR), self._rewards.metrics(rewards_PGR)
        self._watch.look(f"validation at step {step}", rewards_PGR, rewards_PG, counts=False)
        scores_PGR = None
        if self._own_rewards.scorers:
            scores_PGR = self._own_rewards.score(prompts[own], texts_PG[own], columns, ids_PG)
            found = self._own_rewards.metrics(scores_PGR)
            metrics |= {name: value for name, value in found.items() if name.startswith(("rewards/", "logged/"))}
            logged_PG |= self._own_rewards.take_columns()
        table, endings_PG = list[dict[str, Any]](), self._generator.endings(completions)
        for p in range(len(rows)):
            for g in range(G):
                row: dict[str, Any] = {"prompt_id": p, "prompt": prompts[p], "completion": texts_PG[p][g]}
                row |= {"reward": _or_none(rewards_PG[p, g]), "length": int(lengths_PG[p, g])}
                row |= {"stop_reason": "stop" if finished_PG[p, g] else "length"}
                row |= {"stop_string": endings_PG[p][g]} if endings_PG else {}
                if scores_PGR is not None:
                    scores = zip(self._own_rewards.scorers, scores_PGR[p, g], strict=True)
                    row |= {f"rewards/{name}": _or_none(score) for name, score in scores}
                table.append(row | {name: values_PG[p][g] for name, values_PG in logged_PG.items()})
        self._run.write_completions(f"validation_{step:06d}", table)
        metrics |= rollout_metrics(rewards_PG, lengths_PG, finished_PG)
        return {f"validation/{name}": value for name, value in metrics.items()}


def check_best(config: PolicyConfig) -> None:
    """Refuses a `checkpoint.best` that no validation will have; what functions log is not known before.

    Raises:
      ValueError: see above.
    """
    best = config.checkpoint.best
    if best is None or best.startswith("validation/logged/"):
        return
    names = [*rollout_metrics(np.array([[0.0, 1.0]]), np.array([[1, 2]]), np.array([[True, True]]))]
    names += ["rm/truncated_frac"] * any(spec.model is not None for spec in config.rewards)
    kinds = ("mean", "std", "unscorable", "failed")
    names += [f"rewards/{spec.label}/{kind}" for spec in config.all_rewards for kind in kinds]
    if best not in (known := sorted(f"validation/{name}" for name in names)):
        raise ValueError(
            f"checkpoint.best: expected a metric of the validation, one of {', '.join(known)}; got {best!r}"
        )


def _or_none(reward: float) -> float | None:
    return None if math.isnan(reward) else float(reward)
