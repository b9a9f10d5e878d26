"""The rollouts of a step and, with `rollout_ahead`, those of the next one, sampled while rewards are waited for.

    rollout_ahead: 0    sample step k with weights k, wait for its rewards, update to weights k + 1
    rollout_ahead: 1    sample step k + 1 with weights k; meanwhile wait for the rewards of step k, sampled with weights
                        k - 1 (the first step: with its own); update to weights k + 1

So the policy learns from samples that are one update old. `loss.importance_sampling_mode` weights their tokens by
(trainer's probability / sampler's), truncated. The rollouts of the next step are part of a checkpoint: they cannot be
drawn again, as the weights that drew them are gone.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.generate import Generator
from models.sampler import Rollout
from models.slots import Part
from train.config import PolicyConfig
from train.data.prompts import Prompts
from train.state import TRAIN, stream_key

_NONE = -1  # the step of no rollout


class Drawn(NamedTuple):
    """The prompts of a step, and its completions, which the devices may still be sampling."""

    rows: Any
    prompt_PS: np.ndarray
    lengths_P: np.ndarray
    parts: Iterable[Part]


class Rollouts:
    """Draws the rollouts of every step.

    Args:
      config: the run's.
      prompts: those to train on.
      generator: samples.
      saved: `ahead` of the checkpoint that the run goes on from; None: there is none.
    """

    def __init__(
        self, config: PolicyConfig, prompts: Prompts, generator: Generator, saved: Mapping[str, np.ndarray] | None
    ) -> None:
        self._config, self._prompts, self._generator = config, prompts, generator
        self._ahead: dict[int, Drawn] = {}
        if saved is not None and (step := int(saved["step"])) != _NONE:
            rollout: Any = Rollout._make(np.asarray(saved[name]) for name in Rollout._fields)
            part = Part(np.arange(config.prompts_per_step), rollout)
            self._ahead[step] = Drawn(*self._take(step, 0), [part])

    def draw(self, params: Any, step: int, attempt: int = 0) -> Drawn:
        """Returns a step's rollouts; the devices are at work on them, or on the next ones, when it does."""
        drawn = self._ahead.pop(step, None) or self._sample(params, step, attempt)
        if self._config.rollout_ahead and step + 1 < self._config.max_steps:
            self._ahead[step + 1] = self._sample(params, step + 1, 0)
        return drawn

    def _take(self, step: int, attempt: int) -> tuple[Any, np.ndarray, np.ndarray]:
        rows = self._prompts.batch(self._config.seed, step, self._config.prompts_per_step, attempt)
        return rows, *self._prompts.encode(rows)

    def _sample(self, params: Any, step: int, attempt: int) -> Drawn:
        rows, prompt_PS, lengths_P = self._take(step, attempt)
        key = stream_key(self._config.seed, TRAIN, step, attempt)
        parts = self._generator.rollouts(params, prompt_PS, lengths_P, key, self._config.num_generations)
        return Drawn(rows, prompt_PS, lengths_P, parts)

    def saved(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state: the next step's rollouts, which are waited for."""
        if not self._config.rollout_ahead:
            return {}
        arrays = empty_rollouts(self._config)
        for step, drawn in self._ahead.items():
            parts = list(drawn.parts)
            self._ahead[step] = drawn._replace(parts=parts)
            arrays |= {"step": np.array(step, np.int32), **parts[0].rollout._asdict()}
        return {"ahead": arrays}


def empty_rollouts(config: PolicyConfig) -> dict[str, np.ndarray]:
    """Returns the arrays, of fixed shapes, of which a checkpoint has those of the next step, where none is drawn."""
    shape_PG = (config.prompts_per_step, config.num_generations)
    shape_PGT = (*shape_PG, config.max_completion_length)
    return {
        "step": np.array(_NONE, np.int32),
        "tokens_PGT": np.zeros(shape_PGT, np.int32),
        "logprobs_PGT": np.zeros(shape_PGT, np.float32),
        "lengths_PG": np.zeros(shape_PG, np.int32),
        "finished_PG": np.zeros(shape_PG, bool),
    }
