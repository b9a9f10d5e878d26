"""Reward model training: Bradley-Terry on comparisons.

A row is {"chosen": ..., "rejected": ...} with an optional "prompt" that both answers share and an optional "margin";
prompts and answers are text or chat messages (TRL's explicit and implicit prompts). Accuracy is always printed beside
what the longer answer alone would get.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from gopo_jax import preference_loss
from gopo_jax.losses import Metrics
from models.config import REWARD_MODEL
from models.tokenizer import Tokenizer, pad
from train.config import ChatConfig, RewardModelConfig
from train.prompts import Row, asked_and_answered, require_columns
from train.supervised import Batch, Task, train_supervised

Example = tuple[list[int], list[int], float]  # chosen, rejected, margin


def train_reward_model(config: RewardModelConfig) -> None:
    def loss(params: Any, batch: dict[str, jax.Array], *, graphdef: Any) -> tuple[jax.Array, Metrics]:
        return objective(params, batch, graphdef=graphdef, center=config.center_rewards_coefficient)

    task = Task(encode, lambda e: max(len(e[0]), len(e[1])), collate, loss, length_baseline, REWARD_MODEL)
    train_supervised(config, task)


def encode(rows: Sequence[Row], tokenizer: Tokenizer, source: str, chat: ChatConfig) -> list[Example]:
    require_columns(rows, source, "chosen", "rejected")
    require_columns([{"prompt": row.get("prompt") or "-"} for row in rows], source, "prompt")  # it may be missing
    sides = [
        tokenizer.conversation_ids(*asked_and_answered(rows, source, side, chat)) for side in ("chosen", "rejected")
    ]
    margins = [float(row.get("margin") or 0.0) for row in rows]
    return list(zip(*sides, margins, strict=True))


def collate(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Batch:
    chosen, rejected, margins = zip(*examples, strict=True)
    tokens_BS, lengths_B = pad([*chosen, *rejected], tokenizer.pad_id, max_length)
    return {
        "tokens_B2S": np.stack(np.split(tokens_BS, 2), 1),
        "lengths_B2": np.stack(np.split(lengths_B, 2), 1),
        "margin_B": np.array(margins, np.float32),
    }


def objective(params: Any, batch: dict[str, jax.Array], *, graphdef: Any, center: float) -> tuple[jax.Array, Metrics]:
    """Mean Bradley-Terry loss over the real comparisons of a batch."""
    tokens_B2S, real_B = batch["tokens_B2S"], batch["real_B"]
    rewards = nnx.merge(graphdef, params)(tokens_B2S.reshape(-1, tokens_B2S.shape[-1]), batch["lengths_B2"].reshape(-1))
    rewards_B2 = rewards.reshape(-1, 2)
    return preference_loss(rewards_B2[:, 0], rewards_B2[:, 1], margin=batch["margin_B"], center=center, mask=real_B)


def length_baseline(examples: Sequence[Example]) -> dict[str, float]:
    """The accuracy of "the longer answer is better", in tokens; ties count one half."""
    if not examples:
        return {}
    won = [0.5 if len(c) == len(r) else float(len(c) > len(r)) for c, r, _ in examples]
    return {"length_baseline_accuracy": float(np.mean(won))}
