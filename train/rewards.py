"""Rewards: a reward model or a Python function scores completions; several are weighed and added.

NaN means unscorable. With one reward such a completion leaves the ranks and the loss; with several, a missing one
leaves only its own part of the sum, and a completion that misses all is NaN.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.checkpoint import load_model
from models.hf_weights import split
from models.reward_model import Qwen3RewardModel
from models.sharding import Layout, fetch, to_device, to_host
from models.tokenizer import Prompt, Tokenizer, bucket, tokenizer_path
from train import dotted
from train.config import RewardSpec
from train.processes import gather, gather_lists

Scorer = Callable[..., np.ndarray]  # (prompts, completions_PG, columns) of a process' share -> rewards_PG of all


class Rewards:
    """The rewards of a run, by name."""

    def __init__(self, specs: Sequence[RewardSpec], layout: Layout | None, dtype: str) -> None:
        self.weights_R = np.array([spec.weight for spec in specs], np.float32)
        self.scorers: dict[str, Scorer] = {
            spec.label: function_scorer(spec.function)
            if spec.function is not None
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

    def check(self, prompt: Prompt) -> None:
        """Refuse, before anything is drawn, reward models that cannot read such a prompt.

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

    def score(
        self, prompts: Sequence[Prompt], completions_PG: Sequence[Sequence[str]], columns: dict[str, list[Any]]
    ) -> np.ndarray:
        """float32 `rewards_PGR`, every reward apart; NaN = unscorable.

        Where there are several processes each gives its share of the prompts, and all get the rewards of the whole.
        """
        return np.stack([score(prompts, completions_PG, columns) for score in self.scorers.values()], -1)

    def combine(self, rewards_PGR: np.ndarray) -> np.ndarray:
        """float32 `rewards_PG`: the weighted sum of those that are there, NaN where none is."""
        weighted_PGR = rewards_PGR * self.weights_R
        return np.where(np.isnan(weighted_PGR).all(-1), np.nan, np.nansum(weighted_PGR, -1)).astype(np.float32)

    def metrics(self, rewards_PGR: np.ndarray) -> dict[str, float]:
        """rewards/NAME/mean, rewards/NAME/std and rewards/NAME/unscorable, a count."""
        metrics = {}
        for r, name in enumerate(self.scorers):
            scored = rewards_PGR[..., r][~np.isnan(rewards_PGR[..., r])]
            metrics[f"rewards/{name}/mean"] = float(scored.mean()) if scored.size else math.nan
            metrics[f"rewards/{name}/std"] = float(scored.std(ddof=1)) if scored.size > 1 else math.nan
            metrics[f"rewards/{name}/unscorable"] = float(rewards_PGR[..., r].size - scored.size)
        return metrics


class RewardModelScorer:
    """A reward model with its own tokenizer; what the texts of a group have in common is computed once."""

    def __init__(
        self,
        path: str,
        *,
        layout: Layout | None = None,
        dtype: str = "float32",
        max_length: int = 4096,
        batch_prompts: int = 32,
        offload: bool = False,
    ) -> None:
        model = load_model(path, mesh=layout, dtype=dtype)
        if not isinstance(model, Qwen3RewardModel):
            raise ValueError(f"{path}: expected a reward model ({Qwen3RewardModel.__name__}), got a policy")
        self.tokenizer = Tokenizer(tokenizer_path(path))
        self.tokenizer.check_fits(model.config.vocab_size, path)
        self.layout, self.max_length, self.batch_prompts = layout, max_length, batch_prompts
        graphdef, params = split(model)
        self.params = to_host(params) if offload else params
        self._score = scoring_program(graphdef)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]] | None = None,
    ) -> np.ndarray:
        """float32 rewards [P, G]; NaN for a text longer than max_length, which is neither cut nor given a value."""
        G = len(completions_PG[0])
        repeated = [prompt for prompt in prompts for _ in range(G)]
        rows = self.tokenizer.conversation_ids(repeated, [text for group in completions_PG for text in group])
        rows = gather_lists(rows)
        groups = [rows[start : start + G] for start in range(0, len(rows), G)]
        batches = range(0, len(groups), self.batch_prompts)
        params = to_device(self.params)
        return np.concatenate([self._score_batch(params, groups[i : i + self.batch_prompts]) for i in batches])

    def _score_batch(self, params: Any, groups: Sequence[Sequence[list[int]]]) -> np.ndarray:
        P, G = len(groups), len(groups[0])
        too_long_PG = np.array([[not 0 < len(row) <= self.max_length for row in group] for group in groups])
        groups = [[row[: self.max_length] or [self.tokenizer.pad_id] for row in group] for group in groups]
        shared_P = [common_prefix(group) for group in groups]
        prefix = [group[0][:n] for group, n in zip(groups, shared_P, strict=True)]
        suffix = [row[n:] for group, n in zip(groups, shared_P, strict=True) for row in group]
        # whole batches, always: fewer prompts are filled up, so that their number compiles nothing new
        filler = self.batch_prompts - P
        prefix_PS, prefix_lengths_P = self._pad(prefix + prefix[-1:] * filler)
        suffix_BT, suffix_lengths_B = self._pad(suffix + suffix[-G:] * filler)
        suffix_PGT, suffix_lengths_PG = suffix_BT.reshape(-1, G, suffix_BT.shape[-1]), suffix_lengths_B.reshape(-1, G)
        arrays = (prefix_PS, prefix_lengths_P, suffix_PGT, suffix_lengths_PG)
        placed = [
            self.layout.put(array, axes) if self.layout else array
            for axes, array in zip(SCORED_AXES, arrays, strict=True)
        ]
        rewards_PG = fetch(self._score(params, *placed))[:P]
        return np.where(too_long_PG, np.nan, rewards_PG)

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), bucket(max(1, int(lengths.max())), self.max_length)), self.tokenizer.pad_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return tokens.astype(np.int32), lengths


SCORED_AXES = (("prompt", None), ("prompt",), ("prompt", "group", None), ("prompt", "group"))


def scoring_program(graphdef: Any) -> Any:
    """The jitted (params, prefix_PS, prefix_lengths_P, suffix_PGT, suffix_lengths_PG) -> rewards_PG."""
    return jax.jit(partial(_score_group, graphdef))


def _score_group(graphdef: Any, params: Any, *arrays: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).score_group(*arrays)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share, leaving each row at least one token of its own.

    Texts, not tokens, are joined (a template may strip a completion's leading newlines, a tokenizer may merge
    across the seam), so what a group shares is found out, not assumed.
    """
    shortest = min(len(row) for row in rows)
    for i in range(shortest - 1):
        if any(row[i] != rows[0][i] for row in rows[1:]):
            return i
    return max(shortest - 1, 0)


def function_scorer(path: str) -> Scorer:
    """The function at a dotted path, f(prompts, completions, **columns) -> list[float | None] (TRL's signature).

    It is called with one entry per completion: a prompt and its columns are repeated G times.

    Raises:
      ValueError: no such module or function.
    """
    function = dotted.load(path, "rewards.function")
    takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    accepted = inspect.signature(function).parameters

    def score(
        prompts: Sequence[Prompt], completions_PG: Sequence[Sequence[str]], columns: dict[str, list[Any]]
    ) -> np.ndarray:
        G = len(completions_PG[0])
        chosen = {
            k: [v for v in values for _ in range(G)] for k, values in columns.items() if takes_all or k in accepted
        }
        flat = [text for group in completions_PG for text in group]
        values = function(prompts=[p for p in prompts for _ in range(G)], completions=flat, **chosen)
        if len(values) != len(flat):
            raise ValueError(f"{path}: expected {len(flat)} rewards, one per completion, got {len(values)}")
        rewards = np.array([np.nan if value is None else value for value in values], np.float32)
        return gather(rewards.reshape(len(prompts), G))

    return score
