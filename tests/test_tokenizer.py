"""The tokenizer door: token ids and chat renderings as transformers has them, right padding, every way to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.tokenizer import Tokenizer, bucket, pad, train_bpe

QWEN3 = Path(__file__).parents[2] / "shared" / "data" / "tokenizer_qwen3"
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="the Qwen3 vocabulary (4 MB) is not shipped")


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    return Tokenizer(QWEN3)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["the food was good", "the phone was bad, très bad"] * 4, directory, 300)
    return Tokenizer(directory)


@needs_qwen3
def test_ids_equal_transformers(qwen3: Tokenizer) -> None:
    golden = json.loads((QWEN3 / "golden_hf.json").read_text())["tokenize"]
    assert len(golden) > 5
    assert qwen3.encode([case["text"] for case in golden]) == [case["ids"] for case in golden]


@needs_qwen3
def test_chats_equal_transformers() -> None:
    golden = json.loads((QWEN3 / "golden_hf.json").read_text())["chat"]
    checked = 0
    for thinking in (True, False):
        tokenizer = Tokenizer(QWEN3, enable_thinking=thinking)
        for case in golden:
            if case["enable_thinking"] is thinking and case["add_generation_prompt"]:
                assert tokenizer.render(case["messages"]) == case["text"]
                assert tokenizer.encode([case["text"]]) == [case["ids"]]
                checked += 1
    assert checked >= 4


@needs_qwen3
def test_end_of_turn_and_end_of_text_both_end(qwen3: Tokenizer) -> None:
    assert set(qwen3.eos_ids) == {151645, 151643}
    assert qwen3.pad_id == 151643


def test_generation_config_adds_ends_and_survives_saving(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 9]}))
    again = Tokenizer(tmp_path)
    assert set(again.eos_ids) == {*small.eos_ids, 7, 9}
    again.save(tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy").eos_ids == again.eos_ids


def test_decode_inverts_encode_up_to_lengths(small: Tokenizer) -> None:
    texts = ["the food", "très good — 日本", " bad"]
    tokens_BT, lengths_B = pad(small.encode(texts), small.pad_id, 64)
    assert small.decode(tokens_BT[None], lengths_B[None]) == [texts]
    ended = [[*ids, small.eos_ids[0]] for ids in small.encode(texts)]
    tokens_BT, lengths_B = pad(ended, small.pad_id, 64)
    assert small.decode(tokens_BT[None], lengths_B[None]) == [texts]


def test_prompts_are_right_padded(small: Tokenizer) -> None:
    prompt_PS, lengths_P = small.encode_prompts(["the food was", "the"], 32)
    for row, n, ids in zip(prompt_PS, lengths_P, small.encode(["the food was", "the"]), strict=True):
        assert row[:n].tolist() == ids and set(row[n:].tolist()) <= {small.pad_id}


@pytest.mark.parametrize("limit", [8, 20, 100])
def test_buckets_are_few_and_hold_every_length(limit: int) -> None:
    sizes = {bucket(n, limit) for n in range(1, limit + 1)}
    assert all(n <= bucket(n, limit) <= limit for n in range(1, limit + 1))
    assert len(sizes) <= np.log2(limit) + 1


def test_what_cannot_be_padded_is_refused(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="1 to 3 tokens, got one of 4"):
        pad([[1], [1, 2, 3, 4]], 0, 3)
    with pytest.raises(ValueError, match="got one of 0"):
        pad([[1], []], 0, 3)
    with pytest.raises(ValueError, match="no chat template"):
        small.render([{"role": "user", "content": "hi"}])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Tokenizer("nowhere")
    with pytest.raises(ValueError, match=f"vocab_size is 10, but the tokenizer .* has {small.size} ids"):
        small.check_fits(10, "model")
