"""Trains reward models with the Bradley-Terry or Plackett-Luce loss on comparisons of answers to one prompt.

A row is a pair, {"chosen": ..., "rejected": ...} with an optional "prompt" that both answers share and an optional
"margin"; or a group, {"prompt": ..., "completions": [...], "scores": [...]}, in which the higher score is the better
answer and equal scores are not compared. Prompts and answers are text or chat messages (TRL's explicit and implicit
prompts). A pair is a group of two. The longest common prefix of a group's tokens is computed once. Accuracy is always
logged beside the accuracy of "the longer answer is better".
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax import listwise_loss, preference_loss
from models.config import REWARD_MODEL
from models.reward_model import Qwen3RewardModel
from models.tokenizer import Tokenizer, bucket, pad
from models.turns import render_comparison
from train.config import ChatConfig, RewardModelConfig
from train.console import print_plain
from train.data.chats import Exchange, named_row, read_exchanges
from train.data.rows import Row, is_number, require_columns
from train.rewards.model import common_prefix_length
from train.supervised.comparisons import Comparison, count_answers
from train.supervised.program import LossAux, SupervisedTask, TokenBatch, train_supervised

LARGEST_MARGIN = float(np.finfo(np.float32).max)
PREFIX_WORTHWHILE = 0.75  # share of the unsplit slots above which the prefix is not split off


def train_reward_model(config: RewardModelConfig, *, previous: bool = False) -> None:
    """Starts or resumes a run of `train reward`; see `train_supervised`."""
    train_supervised(config, reward_model_task(config), previous=previous)


def reward_model_task(config: RewardModelConfig) -> SupervisedTask:
    """Returns the task that `train_supervised` runs."""

    def loss(params: Any, batch: dict[str, jax.Array], *, graphdef: Any) -> tuple[jax.Array, LossAux]:
        return comparison_objective(params, batch, graphdef=graphdef, config=config)

    def encode(*arguments: Any) -> list[Comparison]:
        examples, (rows, _, source, _) = encode_comparisons(*arguments), arguments
        counts = count_answers(rows, examples)
        if any(counts[1:]):
            print_plain(f"{source}: {counts}")
        if config.loss == "plackett_luce" and any(example.margin for example in examples):
            raise ValueError(f"{source}: the column 'margin' is for loss: bradley_terry; leave one of the two out")
        return examples

    return SupervisedTask(
        encode,
        lambda e: max(map(len, e.rows)),
        collate_comparisons,
        loss,
        length_baseline,
        REWARD_MODEL,
        require_comparisons,
    )


def require_comparisons(examples: list[Comparison], source: str) -> list[Comparison]:
    """Returns the examples; refuses them if none has a comparison."""
    if not any(example.pairs() for example in examples):
        raise ValueError(f"{source}: nothing is compared: in every row all 'scores' are equal")
    return examples


def encode_comparisons(rows: Sequence[Row], tokenizer: Tokenizer, source: str, chat: ChatConfig) -> list[Comparison]:
    """Tokenizes rows, pairs or groups."""
    check_comparison_rows(rows, source)
    if "completions" in rows[0]:
        return encode_groups(rows, tokenizer, source, chat)
    sides = [
        encode_answers(read_exchanges(rows, source, side, chat), tokenizer, side) for side in ("chosen", "rejected")
    ]
    margins = [float(row.get("margin") or 0.0) for row in rows]
    return [Comparison([c, r], [1.0, 0.0], m) for c, r, m in zip(*sides, margins, strict=True)]


def check_comparison_rows(rows: Sequence[Row], source: str) -> None:
    """Refuses rows that are neither pairs nor groups; the answer to a prompt may be empty."""
    require_columns([{"prompt": row.get("prompt") or "-"} for row in rows], source, "prompt")  # optional
    if "completions" in rows[0]:
        check_groups(rows, source)
        return
    require_columns([fill_empty(row, "chosen", "rejected") for row in rows], source, "chosen", "rejected")
    check_margins(rows, source)


def fill_empty(row: Row, *columns: str) -> Row:
    """Returns a row for `require_columns`, which takes an empty answer to a prompt for none."""
    return row | {column: "-" for column in columns if row.get("prompt") and row.get(column) == ""}


def check_margins(rows: Sequence[Row], source: str) -> None:
    """Refuses margins that are not numbers; a row may have none."""
    for number, row in enumerate(rows, 1):
        margin = row.get("margin")
        if margin is not None and not isinstance(margin, bool) and not is_number(margin, LARGEST_MARGIN):
            raise ValueError(f"{source}: row {number}: 'margin': expected a number, got {margin!r}")


def check_groups(rows: Sequence[Row], source: str) -> None:
    """Refuses rows whose completions and scores are not lists of one length, or whose scores are not numbers."""
    for number, row in enumerate(rows, 1):
        completions, scores = row.get("completions"), row.get("scores")
        sizes = [len(x) if isinstance(x, list) else None for x in (completions, scores)]
        if sizes[0] != sizes[1] or (sizes[0] or 0) < 2:
            raise ValueError(
                f"{source}: row {number}: expected 'completions', a list of at least 2 answers, and as many 'scores', "
                f"got {sizes[0] or 'no list'} and {sizes[1] or 'no list'}"
            )
        assert isinstance(scores, list)
        if not all(isinstance(x, bool) or is_number(x) for x in scores):
            raise ValueError(f"{source}: row {number}: 'scores': expected numbers, got {scores}")


def encode_groups(rows: Sequence[Row], tokenizer: Tokenizer, source: str, chat: ChatConfig) -> list[Comparison]:
    """Tokenizes groups, all answers of all rows in one call of the tokenizer."""
    exchanges: list[Exchange] = []
    for number, row in enumerate(rows, 1):
        shared = {"prompt": row.get("prompt"), "tools": row.get("tools")}
        group, place = [shared | {"answer": c} for c in row["completions"]], f"{source}: row {number}: 'completions'"
        require_columns([fill_empty(r, "answer") for r in group], place, "answer")
        exchanges += read_exchanges(group, source, "answer", chat, place)
    ids = iter(encode_answers(exchanges, tokenizer))
    return [Comparison([next(ids) for _ in row["scores"]], list(map(float, row["scores"]))) for row in rows]


def encode_answers(exchanges: Sequence[Exchange], tokenizer: Tokenizer, column: str = "") -> list[list[int]]:
    """Tokenizes every prompt with its answer as one text."""
    rendered = []
    for prompt, answer, tools, where in exchanges:
        with named_row(f"{where}: {column!r}" if column else where):
            rendered.append(render_comparison(tokenizer, prompt, answer, tools))
    return tokenizer.encode_rendered(rendered)


def collate_comparisons(examples: Sequence[Comparison], tokenizer: Tokenizer, max_length: int) -> TokenBatch:
    """Returns the arrays of a batch of groups of one size, which `mask_PG` fills up.

    The common prefix is split off where that saves a quarter of the slots or more (`PREFIX_WORTHWHILE`).
    """
    G = 1 << (max(len(example.rows) for example in examples) - 1).bit_length()  # a power of two: few shapes
    filler = [[tokenizer.pad_id]]
    shared_P = [common_prefix_length(example.rows) for example in examples]

    def grid(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(examples), G, *array.shape[1:])

    def answers(first_P: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns padded answers, each group's from its token number first_P on, and their lengths."""
        groups = [[row[n:] for row in e.rows] for e, n in zip(examples, first_P, strict=True)]
        rows = [row for group in groups for row in group + filler * (G - len(group))]
        return pad(rows, tokenizer.pad_id, max_length)

    def filled(values: Sequence[float], fill: float) -> list[float]:
        return [*values, *[fill] * (G - len(values))]

    def ranks(scores: Sequence[float]) -> list[float]:
        """Returns ranks, 0 for the worst; scores that differ could be equal in float32, ranks cannot."""
        return np.unique(scores, return_inverse=True)[1].tolist()

    whole, lengths = answers([0] * len(examples))
    batch = {
        "tokens_PGT": grid(whole),
        "lengths_PG": grid(lengths),
        "rank_PG": np.array([filled(ranks(e.scores), 0) for e in examples], np.float32),
        "mask_PG": np.array([filled([1] * len(e.rows), 0) for e in examples], bool),
        "margin_P": np.array([e.margin for e in examples], np.float32),
    }
    S = bucket(max(1, *shared_P), max_length)
    rest, rest_lengths = answers(shared_P)
    if S + G * rest.shape[1] > PREFIX_WORTHWHILE * G * whole.shape[1]:
        return batch
    prefix_PS = np.full((len(examples), S), tokenizer.pad_id, np.int32)
    for p, (example, n) in enumerate(zip(examples, shared_P, strict=True)):
        prefix_PS[p, :n] = example.rows[0][:n]
    prefix = {"prefix_PS": prefix_PS, "prefix_lengths_P": np.array(shared_P, np.int32)}
    return batch | prefix | {"tokens_PGT": grid(rest), "lengths_PG": grid(rest_lengths)}


def batch_rewards(model: Qwen3RewardModel, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the model's float32 rewards [P, G]."""
    tokens_PGT, lengths_PG = batch["tokens_PGT"], batch["lengths_PG"]
    if "prefix_PS" in batch:
        return model.score_group(batch["prefix_PS"], batch["prefix_lengths_P"], tokens_PGT, lengths_PG)
    P, G, T = tokens_PGT.shape
    return model(tokens_PGT.reshape(P * G, T), lengths_PG.reshape(P * G)).reshape(P, G)


def comparison_objective(
    params: Any, batch: dict[str, jax.Array], *, graphdef: Any, config: RewardModelConfig
) -> tuple[jax.Array, LossAux]:
    """Returns the loss of the model's rewards, see `comparison_loss`."""
    return comparison_loss(batch_rewards(nnx.merge(graphdef, params), batch), batch, config)


def comparison_loss(
    rewards_PG: jax.Array, batch: dict[str, jax.Array], config: RewardModelConfig
) -> tuple[jax.Array, LossAux]:
    """Returns the mean loss over the real comparisons of a batch: pairs (Bradley-Terry) or groups (Plackett-Luce).

    All pairs of a group with different scores are compared, so a group counts as its pairs would in rows of their own.
    """
    rank_PG, mask_PG = batch["rank_PG"], batch["mask_PG"] & batch["real_B"][:, None]
    pairs_PGG = mask_PG[:, :, None] & mask_PG[:, None, :] & (rank_PG[:, :, None] > rank_PG[:, None, :])
    better_PGG, worse_PGG, margin_PGG = (
        jnp.broadcast_to(x, pairs_PGG.shape)
        for x in (rewards_PG[:, :, None], rewards_PG[:, None, :], batch["margin_P"][:, None, None])
    )
    center = config.center_rewards_coefficient
    loss, metrics = preference_loss(better_PGG, worse_PGG, margin=margin_PGG, center=center, mask=pairs_PGG)
    count = metrics["accuracy"][1]
    if config.loss == "plackett_luce":
        loss, listwise_metrics = listwise_loss(rewards_PG, rank_PG, mask_PG)
        count = listwise_metrics["top_accuracy"][1]
        metrics |= listwise_metrics
    metrics["loss"] = (jax.lax.stop_gradient(loss) * count, count)
    return loss, LossAux(metrics, jnp.where(pairs_PGG, better_PGG - worse_PGG, jnp.nan))


def length_baseline(examples: Sequence[Comparison]) -> dict[str, float]:
    """Returns the accuracy of "the longer answer is better", in tokens; equal lengths count one half."""
    wins = []
    for example in examples:
        lengths = [len(row) for row in example.rows]
        wins += [0.5 * (1 + np.sign(lengths[i] - lengths[j])) for i, j in example.pairs()]
    return {"length_baseline_accuracy": float(np.mean(wins))} if wins else {}
