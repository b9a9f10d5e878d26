"""A reward model as a reward: scores groups of completions, computing their common prefix once per group."""

from collections.abc import Sequence
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
from train.processes import gather_lists
from train.rewards.functions import TokenIds


class RewardModelScorer:
    """Scores completions with a reward model and the model's own tokenizer and chat template.

    Attributes:
      why_unscorable: why a completion had no reward, the last time that one had none.
    """

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
        self.tokenizer.check_vocab_size(model.config.vocab_size, path)
        self.layout, self.max_length, self.batch_prompts = layout, max_length, batch_prompts
        graphdef, params = split(model)
        self.params = to_host(params) if offload else params
        self._score = scoring_program(graphdef)
        self.why_unscorable: str | None = None

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]] | None = None,
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        """Returns float32 rewards [P, G].

        A text longer than max_length is not cut: its reward is NaN, as is one that is computed as NaN or infinite.
        """
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
        shared_P = [common_prefix_length(group) for group in groups]
        prefix = [group[0][:n] for group, n in zip(groups, shared_P, strict=True)]
        suffix = [row[n:] for group, n in zip(groups, shared_P, strict=True) for row in group]
        # The last batch is filled up, so that its number of prompts compiles nothing new.
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
        is_finite_PG = np.isfinite(rewards_PG)
        if too_long_PG.any():
            self.why_unscorable = f"longer than its max_length = {self.max_length} tokens"
        if not (is_finite_PG | too_long_PG).all():
            self.why_unscorable = "its scores are NaN or infinite"
        return np.where(too_long_PG | ~is_finite_PG, np.nan, rewards_PG)

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), bucket(max(1, int(lengths.max())), self.max_length)), self.tokenizer.pad_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return tokens.astype(np.int32), lengths


SCORED_AXES = (("prompt", None), ("prompt",), ("prompt", "group", None), ("prompt", "group"))


def scoring_program(graphdef: Any) -> Any:
    """Returns the jitted (params, prefix_PS, prefix_lengths_P, suffix_PGT, suffix_lengths_PG) -> rewards_PG."""
    return jax.jit(partial(_score_group, graphdef))


def _score_group(graphdef: Any, params: Any, *arrays: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).score_group(*arrays)


def common_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """Returns the number of leading tokens that all rows share, leaving each row at least one token of its own.

    The prefix is compared, not assumed to be the prompt: prompt and completion are joined as texts, so a template may
    strip a completion's leading newlines, and a tokenizer may merge tokens across the boundary.
    """
    shortest = min(len(row) for row in rows)
    for i in range(shortest - 1):
        if any(row[i] != rows[0][i] for row in rows[1:]):
            return i
    return max(shortest - 1, 0)
