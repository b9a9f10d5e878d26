"""Laws of supervised fine-tuning: formats, and packed = not packed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.config import Qwen3Config
from models.hf_weights import split
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer
from train.config import ChatConfig, DataConfig, EarlyStoppingConfig, ModelConfig, SftConfig
from train.plan.show import show_rows
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


TOOL = {"type": "function", "function": {"name": "warm", "parameters": {"type": "object"}}}
CALL = {"function": {"name": "warm", "arguments": {"city": "Oslo"}}}


@pytest.fixture
def calling(chatty: Tokenizer) -> Tokenizer:
    """A tokenizer whose template has a place for tools, tool calls and thoughts."""
    chatty.hf.chat_template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    chatty.enable_thinking = True
    return chatty


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON"])
@pytest.mark.parametrize("form", ["messages", "completion", "prompt and completion"])
def test_tools_are_read_and_calls_are_learned(calling: Tokenizer, form: str, tools: Any) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row: dict[str, Any] = {"messages": [USER, called]} if form == "messages" else {"completion": [USER, called]}
    row = {"prompt": [USER], "completion": [called]} if form == "prompt and completion" else row
    ((ids, learned_from),) = encode_examples([row | {"tools": tools}], calling, "file.jsonl", ChatConfig())
    assert calling.hf.decode(ids[:learned_from]) == f"{json.dumps(TOOL)}user:Q<|im_end|>assistant:"
    assert calling.hf.decode(ids[learned_from:]) == f"{json.dumps(CALL['function'])}<|im_end|>"


def test_nulls_that_arrow_fills_in_are_not_learned(calling: Tokenizer) -> None:
    """Its schema has all keys of all rows; in JSONL a null is what its author wrote."""
    filled = {"function": {"name": "warm", "arguments": {"city": "Oslo", "day": None}}}
    row = {
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [filled]}],
        "tools": [TOOL | {"x": None}],
    }
    ((parquet, _),) = encode_examples([row], calling, "file.parquet", ChatConfig())
    ((jsonl, _),) = encode_examples([row], calling, "file.jsonl", ChatConfig())
    assert "null" not in calling.hf.decode(parquet) and calling.hf.decode(jsonl).count("null") == 2


@pytest.mark.parametrize("tools", ["a tool", ["warm"], {"name": "warm"}])
def test_a_column_of_tools_that_are_none_is_refused(calling: Tokenizer, tools: Any) -> None:
    with pytest.raises(ValueError, match="file: row 2: 'tools': expected a list of JSON schemas"):
        row = {"messages": [USER, ANSWER]}
        encode_examples([row, row | {"tools": tools}], calling, "file", ChatConfig())


def test_thoughts_are_learned_where_thinking_is_on_and_it_is_said(
    calling: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    calling.enable_thinking = False
    rows = [{"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}]
    ((ids, learned_from),) = encode_examples(rows, calling, "file", ChatConfig())
    assert calling.hf.decode(ids[learned_from:]) == "<think>Hm.</think>A<|im_end|>"
    assert "file: 1 of 1 answers have thoughts, and are learned behind a prompt that leaves thinking on" in (
        " ".join(capsys.readouterr().out.split())
    )


def test_a_row_with_an_answer_that_cannot_be_learned_is_named(chatty: Tokenizer) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER | {"reasoning_content": "Hm."}]}]
    with pytest.raises(ValueError, match="file: row 2: the chat template of .* leaves the answer's thoughts out"):
        encode_examples(rows, chatty, "file", ChatConfig())
    plain = [{"prompt": "Q", "completion": "A"}, {"prompt": "Q", "completion": "A<|im_end|>B"}]
    with pytest.raises(ValueError, match=r"file: row 2: <\|im_end\|> ends the completion, but 'B' stands behind it"):
        encode_examples(plain, chatty, "file", ChatConfig())


@pytest.mark.parametrize("row", [{"messages": [USER, ANSWER]}, {"text": "Good food."}], ids=["chat", "text"])
def test_what_is_shown_as_learned_is_learned(
    chatty: Tokenizer, row: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    model = ModelConfig(tokenizer=chatty.path, architecture={"vocab_size": 300})
    show_rows(config(model=model, data=DataConfig(train=str(tmp_path / "rows.jsonl"))), 1)
    shown = capsys.readouterr().out.splitlines()
    ((ids, prompt),) = encode_examples([row], chatty, "file", ChatConfig())
    learned = collate_examples([(ids, prompt)], chatty, 64)["learned_BS"][0]
    for name, part in (("read", ~learned[: len(ids)]), ("learned", learned[: len(ids)])):
        tokens = [f"{i} {chatty.token_text(i)}" for i in np.array(ids)[part].tolist()]
        assert f"{name}: {'  '.join(tokens)}" in shown


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


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (
            {"text": [USER, ANSWER]},
            "file: row 2: 'text': expected text, got .*name a column of chat messages 'messages'",
        ),
        (
            {"prompt": 5, "completion": [USER, ANSWER]},
            "file: row 2: 'prompt': expected text or a list of chat messages",
        ),
        ({"prompt": [0.5], "completion": [ANSWER]}, "file: row 2: 'prompt': expected text or a list of chat messages"),
    ],
)
def test_a_column_of_another_kind_is_refused(chatty: Tokenizer, row: dict[str, Any], named: str) -> None:
    first = {"text": "A"} if "text" in row else {"prompt": [USER], "completion": [ANSWER]}
    with pytest.raises(ValueError, match=named):
        encode_examples([first, row], chatty, "file", ChatConfig())
