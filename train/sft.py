"""Supervised fine-tuning: the mean negative log-likelihood of the completion's tokens.

A row is {"text": ...}, all of which is learned, or {"prompt": ..., "completion": ...}, of which the completion is;
prompt and completion may be chat messages, which are rendered as the config's `chat` says. A completion may also be a
whole conversation (`data.columns: {completion: messages}`), of which the last message is learned. The end-of-text token
is learned too.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax.losses import Metrics
from models.tokenizer import Tokenizer, pad
from train.config import ChatConfig, SupervisedConfig
from train.prompts import Row, asked_and_answered, require_columns
from train.supervised import Batch, Task, train_supervised

LOGPROB_CHUNK = 4096  # tokens whose logits exist at a time on each device
Example = tuple[list[int], int]  # token ids, how many of them are prompt


def train_sft(config: SupervisedConfig) -> None:
    train_supervised(config, Task(encode, lambda example: len(example[0]), collate, objective, lambda _: {}))


def encode(rows: Sequence[Row], tokenizer: Tokenizer, source: str, chat: ChatConfig) -> list[Example]:
    if "text" in rows[0]:
        require_columns(rows, source, "text")
        if chat.system_prompt is not None or chat.text_as_chat:
            raise ValueError(
                f"{source}: chat.system_prompt and chat.text_as_chat are for rows with prompt and completion; the "
                f"column 'text' is learned as it is"
            )
        prompts: list[list[int]] = [[] for _ in rows]
        completions = tokenizer.encode([row["text"] for row in rows])
    else:
        require_columns(rows, source, "completion")
        # a conversation needs no prompt of its own
        require_columns(
            [row if isinstance(row["completion"], str) else {"prompt": "-"} for row in rows], source, "prompt"
        )
        asked, answers = asked_and_answered(rows, source, "completion", chat)
        prompts, completions = tokenizer.prompt_ids(asked), tokenizer.encode_literally(answers)
    return [(p + c + [tokenizer.eos_ids[0]], len(p)) for p, c in zip(prompts, completions, strict=True)]


def collate(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> Batch:
    tokens_BS, lengths_B = pad([ids for ids, _ in examples], tokenizer.pad_id, max_length)
    position_S = np.arange(tokens_BS.shape[1])
    prompt_B = np.array([n for _, n in examples])
    learned_BS = (position_S < lengths_B[:, None]) & (position_S >= prompt_B[:, None])
    return {"tokens_BS": tokens_BS, "learned_BS": learned_BS}


def objective(params: Any, batch: dict[str, jax.Array], *, graphdef: Any) -> tuple[jax.Array, Metrics]:
    """-sum log p(token) / learned tokens; the first token of a row has nothing to be predicted from."""
    model = nnx.merge(graphdef, params)
    hidden_BSD = model.hidden(batch["tokens_BS"])[:, :-1]
    logprobs_BS = model.logprobs(hidden_BSD, batch["tokens_BS"][:, 1:], chunk_tokens=LOGPROB_CHUNK)
    mask_BS = batch["learned_BS"][:, 1:] & batch["real_B"][:, None]
    count = mask_BS.sum(dtype=jnp.float32)
    total = -jnp.where(mask_BS, logprobs_BS, 0).sum()
    return total / jnp.maximum(count, 1), {"nll": (jax.lax.stop_gradient(total), count)}
