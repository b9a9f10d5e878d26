"""Stop strings: the automaton finds what the decoded text holds, whatever tokens the string is made of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import decoders

from models.stop_strings import StopStrings, byte_automaton, check_stop_strings, read_token, token_bytes
from models.tokenizer import Tokenizer

# With overlaps, prefixes and suffixes of each other, and characters of several bytes.
STRINGS = ["the", "he ", "e t", "aab", "ab", "é", "日本", "\n\n"]
TEXT = "the other aab é日本ab\n\n the"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


def random_tokens(tokenizer: Tokenizer, rows: int, length: int) -> np.ndarray:
    """Tokens of the text in random order, some special and some half characters among them."""
    known = tokenizer.encode([TEXT])[0] + list(range(2)) + tokenizer.encode(["ü"])[0][:1]
    return np.random.default_rng(0).choice(known, (rows, length)).astype(np.int32)


def test_tokens_are_the_bytes_of_the_decoded_text(tokenizer: Tokenizer) -> None:
    tokens_BT, bytes_V = random_tokens(tokenizer, 50, 30), token_bytes(tokenizer)
    for tokens_T in tokens_BT.tolist():
        text = tokenizer.hf.decode(tokens_T, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert b"".join(bytes_V[token] for token in tokens_T).decode(errors="replace") == text
    assert len({token for token in bytes_V if token}) >= 256 and not any(bytes_V[:2])


@pytest.mark.parametrize("strings", [STRINGS[:1], STRINGS[3:5], STRINGS], ids=len)
def test_a_string_ends_in_a_token_where_the_text_comes_to_hold_one_more(
    strings: list[str], tokenizer: Tokenizer
) -> None:
    stops, tokens_BT = StopStrings(strings, tokenizer), random_tokens(tokenizer, 40, 60)
    state_B, found = np.zeros(len(tokens_BT), np.int32), 0
    for t in range(tokens_BT.shape[1]):
        state_B, ends_B = map(np.asarray, read_token(stops.table, state_B, tokens_BT[:, t]))
        for b, ends in enumerate(ends_B):
            texts = (tokenizer.decode(tokens_BT[None, b : b + 1], np.array([[n]]))[0][0] for n in (t, t + 1))
            before, after = (sum(text[i:].startswith(s) for s in strings for i in range(len(text))) for text in texts)
            assert ends == (after > before)
            found += ends
    assert found > 20


def test_the_automaton_is_in_the_longest_beginning_that_the_text_ends_with() -> None:
    strings = [b"abab", b"bab", b"abc"]
    next_M256, accepts_M = byte_automaton(strings)
    beginnings = {b""} | {s[:n] for s in strings for n in range(1, len(s) + 1)}
    assert len(accepts_M) == len(beginnings)
    text, state, at = b"", 0, {b"": 0}
    for byte in np.random.default_rng(0).choice(list(b"abc"), 2000).tolist():
        text, state = text + bytes([byte]), int(next_M256[state, byte])
        longest = max((b for b in beginnings if text.endswith(b)), key=len)
        assert at.setdefault(longest, state) == state
        assert accepts_M[state] == any(text.endswith(s) for s in strings)
    assert len(set(at.values())) == len(beginnings)


def test_which_string_ended_a_completion(tokenizer: Tokenizer) -> None:
    """The one that ends first in the last token, of these the longest; none if an end-of-text token did."""
    stops = StopStrings(["ab", "aab", "\n"], tokenizer)
    texts = ["x aab", "x\nab", "aab\n", "ab"]
    ids = [tokenizer.encode([text])[0] for text in texts] + [[*tokenizer.encode(["ab"])[0], tokenizer.eos_ids[0]]]
    tokens_PGT = np.zeros((1, len(ids), max(map(len, ids))), np.int32)
    for row, tokens in zip(tokens_PGT[0], ids, strict=True):
        row[: len(tokens)] = tokens
    lengths_PG, finished_PG = np.array([list(map(len, ids))]), np.array([[True] * 3 + [False, True]])
    assert stops.endings(tokens_PGT, lengths_PG, finished_PG) == [["aab", "ab", "\n", None, None]]


@pytest.mark.parametrize(
    ("string", "decoder", "message"),
    [
        ("<|im_end|>\n", decoders.ByteLevel(), "is a special token, which is in no completion's text; expected text"),
        ("a\ufffd", decoders.ByteLevel(), "U.FFFD stands for bytes that are no text; expected text without it"),
        ("end", decoders.Metaspace(), "needs a byte-level tokenizer, such as Qwen's, .*; somewhere has another kind"),
    ],
    ids=["special", "no text", "other tokenizer"],
)
def test_strings_that_cannot_be_found_are_refused(string: str, decoder: Any, message: str) -> None:
    hf = SimpleNamespace(backend_tokenizer=SimpleNamespace(decoder=decoder))
    tokenizer: Any = SimpleNamespace(hf=hf, special_tokens={"<|im_end|>": 0}, path="somewhere")
    with pytest.raises(ValueError, match=f"^stop: .*{message}"):
        check_stop_strings([string], tokenizer)
    check_stop_strings([], tokenizer)
