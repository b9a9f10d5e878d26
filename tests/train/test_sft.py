"""Laws of supervised fine-tuning: formats, and packed = not packed."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from models.config import Qwen3Config
from models.hf_weights import split
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer
from train.config import ChatConfig, DataConfig, EarlyStoppingConfig, ModelConfig, SftConfig
from train.supervised.program import fill_batch
from train.supervised.sft import (
    Example,
    collate_examples,
    collate_packed,
    encode_examples,
    pack_examples,
    padding_share,
    sft_objective,
)


def config(**settings: Any) -> SftConfig:
    needed = {"output_dir": "x", "model": ModelConfig(path="x"), "data": DataConfig(train="x"), "max_steps": 1}
    return SftConfig(**needed | {"max_length": 32, "batch_size": 4} | settings)


USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "prompt", "learned"),
    [
        pytest.param({"text": "Good food."}, "", "Good food.", id="text"),
        pytest.param({"prompt": "Good ", "completion": "food."}, "Good ", "food.", id="prompt and completion"),
        pytest.param(
            {"prompt": [USER], "completion": [ANSWER]}, "user:Q<|im_end|>assistant:", "A", id="conversational"
        ),
        pytest.param({"messages": [USER, ANSWER]}, "user:Q<|im_end|>assistant:", "A", id="messages"),
        pytest.param(
            {"messages": [USER, ANSWER, USER, ANSWER]},
            "user:Q<|im_end|>assistant:A<|im_end|>user:Q<|im_end|>assistant:",
            "A",
            id="of several turns the last",
        ),
    ],
)
def test_formats(chatty: Tokenizer, row: dict[str, Any], prompt: str, learned: str) -> None:
    ((ids, learned_from),) = encode_examples([row], chatty, "file", ChatConfig())
    assert chatty.hf.decode(ids[:learned_from]) == prompt
    assert chatty.hf.decode(ids[learned_from:]) == learned + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([ANSWER], "row 1: 'messages': expected a list of at least 2 chat messages"),
        ("text", "row 1: 'messages': expected a list of at least 2"),
        ([USER, ANSWER, USER], "expected messages that end with the assistant's, got 'user'"),
    ],
)
def test_messages_that_are_refused(chatty: Tokenizer, messages: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        encode_examples([{"messages": messages}], chatty, "file", ChatConfig())


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, count)
    return [(rng.integers(2, 290, n).tolist(), int(rng.integers(0, n))) for n in lengths]


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_row_and_the_same_every_time(seed: int) -> None:
    given, settings = examples(50, seed), config(packing=True)
    rows = pack_examples(given, "file", config=settings)
    assert rows == pack_examples(given, "file", config=settings)
    flat = [example for row in rows for example in row]
    assert sorted(flat) == sorted(given)
    used = [sum(len(ids) for ids, _ in row) for row in rows]
    assert max(used) <= 32
    total = sum(used)
    # a row is begun only where no other has room: there are no two that would fit into one
    assert sorted(used)[0] + sorted(used)[1] > 32 and len(rows) <= 2 * -(-total // 32)
    assert 1 - total / (32 * len(rows)) < padding_share([len(ids) for ids, _ in given], settings)


def test_packed_is_not_packed(
    make_model: Callable[..., Backbone], tiny_config: Qwen3Config, tiny_tokenizer_dir: Any
) -> None:
    """Loss and gradient of all parameters; an example's first token is never learned, whatever stands before it."""
    tokenizer, given = Tokenizer(tiny_tokenizer_dir), examples(9)
    rows = pack_examples(given, "file", config=config(packing=True))
    assert len(rows) <= 4 and max(map(len, rows)) >= 3
    graphdef, params = split(make_model(tiny_config))
    program = jax.jit(jax.value_and_grad(lambda p, b: sft_objective(p, b, graphdef=graphdef), has_aux=True))
    packed = fill_batch(collate_packed(rows, tokenizer, 32), 5)
    (found, outcome), gradient = program(params, packed)
    (expected, other), expected_gradient = program(params, fill_batch(collate_examples(given, tokenizer, 32), 9))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)
    assert outcome.metrics["nll"][1] == other.metrics["nll"][1] == sum(len(ids) - max(n, 1) for ids, n in given)
    total = sum(len(ids) for ids, _ in given)
    assert outcome.metrics["padding_frac"] == (32 * len(rows) - total, 32 * len(rows)), "rows that fill up do not count"
    assert packed["tokens_BS"].shape == (5, 32)


def test_the_accuracy_of_reward_models_is_not_watched() -> None:
    with pytest.raises(ValueError, match="early_stopping.metric: accuracy is for reward models"):
        config(early_stopping=EarlyStoppingConfig(metric="accuracy"))
