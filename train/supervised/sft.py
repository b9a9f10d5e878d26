"""Supervised fine-tuning: the mean negative log-likelihood of the completion's tokens.

A row is {"text": ...}: the whole text is learned; {"prompt": ..., "completion": ...}: the completion is learned; or
{"messages": [...]}: the last message, the assistant's, is learned. Prompt and completion may be chat messages, which
are rendered as the config's `chat` says, with the functions of a column "tools". The token that ends the turn or the
text is learned too (`models.turns`).

With `packing`, examples follow one another in rows of max_length tokens, packed once for the whole data set. No example
attends to another and each begins at position 0, so that loss and gradient are those of the examples in rows of their
own (`models.attention.group_attention`, `offset_PGT`).
"""

import bisect
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax.losses import Metrics
from models.tokenizer import Tokenizer, bucket, pad
from models.turns import encode_turn, encode_whole_text, render_turn
from train.config import ChatConfig, SftConfig
from train.console import console, print_plain
from train.data.chats import named_row, read_exchanges
from train.data.rows import Row, batch_indices, require_columns
from train.supervised.program import LossAux, SupervisedTask, TokenBatch, train_supervised

LOGPROB_CHUNK = 4096  # tokens whose logits are in memory at a time, on each device
Example = tuple[list[int], int]  # token ids, number of prompt tokens


def train_sft(config: SftConfig, *, previous: bool = False) -> None:
    """Starts or resumes a run of `train sft`; see `train_supervised`."""
    train_supervised(config, sft_task(config), previous=previous)


def sft_task(config: SftConfig) -> SupervisedTask:
    """Returns the task that `train_supervised` runs, with or without packing."""

    def length(example: Example) -> int:
        return len(example[0])

    if config.packing:
        return SupervisedTask(
            encode_examples,
            length,
            collate_packed,
            sft_objective,
            lambda _: {},
            pack=partial(pack_examples, config=config),
        )
    return SupervisedTask(encode_examples, length, collate_examples, sft_objective, lambda _: {})


def encode_examples(rows: Sequence[Row], tokenizer: Tokenizer, source: str, chat: ChatConfig) -> list[Example]:
    """Tokenizes rows into what the model is asked and what it is to write, to the token that ends it."""
    rows = check_sft_rows(rows, source, chat)
    if "text" in rows[0]:
        return [(encode_whole_text(tokenizer, ids), 0) for ids in tokenizer.encode([row["text"] for row in rows])]
    exchanges, turns = read_exchanges(rows, source, "completion", chat), []
    for prompt, answer, tools, where in exchanges:
        with named_row(where):
            turns.append(render_turn(tokenizer, prompt, answer, tools))
    asked = tokenizer.encode_rendered([turn.prompt for turn in turns])
    written = tokenizer.encode_rendered([turn.written for turn in turns])
    examples = []
    for turn, prompt_ids, ids, exchange in zip(turns, asked, written, exchanges, strict=True):
        with named_row(exchange.where):
            examples.append((prompt_ids + encode_turn(tokenizer, turn, prompt_ids, ids), len(prompt_ids)))
    if count := sum(turn.thinking != tokenizer.enable_thinking for turn in turns):
        print_plain(
            f"{source}: {count} of {len(turns)} answers have thoughts, and are learned behind a prompt that leaves "
            f"thinking on; with chat.enable_thinking: false the model is not asked so later"
        )
    return examples


def check_sft_rows(rows: Sequence[Row], source: str, chat: ChatConfig) -> Sequence[Row]:
    """Refuses rows that cannot be learned from; returns the others, a column 'messages' renamed to 'completion'."""
    if "text" in rows[0]:
        require_columns(rows, source, "text")
        for number, row in enumerate(rows, 1):
            if not isinstance(row["text"], str):
                raise ValueError(
                    f"{source}: row {number}: 'text': expected text, got {str(row['text'])[:60]!r}; name a column of "
                    f"chat messages 'messages'"
                )
        if chat.system_prompt is not None or chat.text_as_chat:
            raise ValueError(
                f"{source}: chat.system_prompt and chat.text_as_chat are for rows with prompt and completion; the "
                f"column 'text' is learned as it is"
            )
        return rows
    if "completion" not in rows[0] and "messages" in rows[0]:
        rows = [messages_as_completion(row, f"{source}: row {number}") for number, row in enumerate(rows, 1)]
    require_columns(rows, source, "completion")
    # chat messages as the completion need no prompt of their own
    optional = [row if isinstance(row["completion"], str) else {"prompt": row.get("prompt") or "-"} for row in rows]
    require_columns(optional, source, "prompt")
    return rows


def messages_as_completion(row: Row, where: str) -> Row:
    """Returns a row whose completion is the whole conversation in the row's 'messages'.

    Raises:
      ValueError: no messages, or none before the last.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(
            f"{where}: 'messages': expected a list of at least 2 chat messages, the last of which is learned, got "
            f"{str(messages)[:60]!r}"
        )
    return {"completion": messages, "tools": row.get("tools")}  # without 'prompt', which repeats the first message


def collate_examples(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> TokenBatch:
    """Returns the arrays of a batch, one example in each row; `used_B` counts the tokens that are not padding."""
    tokens_BS, lengths_B = pad([ids for ids, _ in examples], tokenizer.pad_id, max_length)
    position_S = np.arange(tokens_BS.shape[1])
    prompt_B = np.array([n for _, n in examples])
    learned_BS = (position_S < lengths_B[:, None]) & (position_S >= np.maximum(prompt_B, 1)[:, None])
    return {"tokens_BS": tokens_BS, "learned_BS": learned_BS, "used_B": lengths_B}


def collate_packed(rows: Sequence[Sequence[Example]], tokenizer: Tokenizer, max_length: int) -> TokenBatch:
    """Returns the arrays of a batch of packed rows; `offset_BS` is a token's position in its example."""
    shape = (len(rows), max_length)
    tokens_BS, offset_BS = np.full(shape, tokenizer.pad_id, np.int32), np.zeros(shape, np.int32)
    learned_BS, used_B = np.zeros(shape, bool), np.zeros(len(rows), np.int32)
    for b, row in enumerate(rows):
        for ids, prompt in row:
            start, end = used_B[b], used_B[b] + len(ids)
            tokens_BS[b, start:end], offset_BS[b, start:end] = ids, np.arange(len(ids))
            learned_BS[b, start + max(prompt, 1) : end] = True
            used_B[b] = end
    return {"tokens_BS": tokens_BS, "offset_BS": offset_BS, "learned_BS": learned_BS, "used_B": used_B}


def pack_examples(examples: Sequence[Example], source: str, *, config: SftConfig) -> list[list[Example]]:
    """Packs examples into rows of at most max_length tokens: the longest first, each into the fullest row with room.

    The order depends on the lengths alone, so that rows and batches are functions of the data.
    """
    lengths = [len(ids) for ids, _ in examples]
    rows: list[list[Example]] = []
    rows_by_room: dict[int, list[int]] = {}  # tokens left -> rows
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for i in np.argsort(-np.array(lengths), kind="stable"):
        at = bisect.bisect_left(rooms, lengths[i])
        if at == len(rooms):
            row, room = len(rows), config.max_length
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(examples[i])
        left = room - lengths[i]
        if left not in rows_by_room:
            bisect.insort(rooms, left)
        rows_by_room.setdefault(left, []).append(row)
    before, after = padding_share(lengths, config), 1 - sum(lengths) / (len(rows) * config.max_length)
    console.print(
        f"{source}: packed into {len(rows)} rows of {config.max_length} tokens; {after:.1%} is padding, without "
        f"packing {before:.1%}"
    )
    return rows


def padding_share(lengths: Sequence[int], config: SftConfig) -> float:
    """Returns the share of padding in an epoch of batches that are not packed."""
    slots = used = 0
    for step in range(max(len(lengths) // config.batch_size, 1)):
        batch = [lengths[i] for i in batch_indices(len(lengths), config.batch_size, config.seed, step)]
        slots, used = slots + len(batch) * bucket(max(batch), config.max_length), used + sum(batch)
    return 1 - used / slots


def sft_objective(params: Any, batch: dict[str, jax.Array], *, graphdef: Any) -> tuple[jax.Array, LossAux]:
    """Returns the loss and its metrics: the mean of -log p(token) over learned tokens.

    The first token of an example is not learned: no token before it predicts it.
    """
    model = nnx.merge(graphdef, params)
    tokens_BS, real_B = batch["tokens_BS"], batch["real_B"]
    hidden_BSD = model.hidden(tokens_BS, batch.get("offset_BS"))[:, :-1]
    logprobs_BS = model.logprobs(hidden_BSD, tokens_BS[:, 1:], chunk_tokens=LOGPROB_CHUNK)
    mask_BS = batch["learned_BS"][:, 1:] & real_B[:, None]
    count = mask_BS.sum(dtype=jnp.float32)
    total = -jnp.where(mask_BS, logprobs_BS, 0).sum()
    nll = (jax.lax.stop_gradient(total), count)
    slots = real_B.sum(dtype=jnp.float32) * tokens_BS.shape[1]
    used = jnp.where(real_B, batch["used_B"], 0).sum(dtype=jnp.float32)
    metrics: Metrics = {"loss": nll, "nll": nll, "padding_frac": (slots - used, slots)}
    return total / jnp.maximum(count, 1), LossAux(metrics, jnp.zeros(0))
