"""Stop strings: a completion ends with the token in which its text comes to hold one of them.

A byte-level tokenizer (Qwen's) writes each token as fixed bytes, and no character of UTF-8 begins inside of another. So
the decoded text holds a string exactly where the tokens' bytes do, however the string is split into tokens. The
sampler reads these bytes with an automaton, whose state is one number per completion; a token takes it from state to
state by two look-ups. Special tokens have no text: the automaton stays where it is.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.tokenizer import Tokenizer


class StopTable(NamedTuple):
    """The automaton of some stop strings over a tokenizer's tokens."""

    class_V: jax.typing.ArrayLike  # int32; tokens of one class do the same to every state
    next_MC: jax.typing.ArrayLike  # int32, the state behind a token of each class; ~state if a string ends in the token


def read_token(table: StopTable, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the states behind one more token of each completion, and whether a stop string ends in that token."""
    entry = jnp.asarray(table.next_MC)[state, jnp.asarray(table.class_V)[token]]
    return jnp.where(entry < 0, ~entry, entry), entry < 0


class StopStrings:
    """The strings that end a completion, with what the sampler reads of them.

    Raises:
      ValueError: a tokenizer whose tokens are no fixed bytes, or a string with the text of a special token.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer) -> None:
        check_stop_strings(strings, tokenizer)
        self._strings, self._tokens = [string.encode() for string in strings], token_bytes(tokenizer)
        self.table = make_stop_table(self._strings, self._tokens)

    def endings(self, tokens_PGT: Any, lengths_PG: Any, finished_PG: Any) -> list[list[str | None]]:
        """Returns the string that ended each completion; None where an end-of-text token did, or nothing."""
        groups = zip(np.asarray(tokens_PGT), np.asarray(lengths_PG), np.asarray(finished_PG), strict=True)
        return [
            [self._ending(row[:length]) if finished else None for row, length, finished in zip(*group, strict=True)]
            for group in groups
        ]

    def _ending(self, tokens: np.ndarray) -> str | None:
        """Returns the string that ends in the last token: of several the one that ends first, of these the longest."""
        *before, last = [self._tokens[token] for token in tokens.tolist()]
        text, start = b"".join(before) + last, sum(map(len, before))
        places = [(text.find(string, max(0, start - len(string) + 1)), string) for string in self._strings]
        ends = [(place + len(string), -len(string), string) for place, string in places if place >= 0]
        return min(ends)[-1].decode() if ends else None


def check_stop_strings(strings: Sequence[str], tokenizer: Tokenizer) -> None:
    """Checks that stop strings can be found in what a tokenizer's tokens say.

    Raises:
      ValueError: see `StopStrings`.
    """
    from tokenizers import decoders

    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if strings and not isinstance(getattr(backend, "decoder", None), decoders.ByteLevel):
        raise ValueError(
            f"stop: needs a byte-level tokenizer, such as Qwen's, whose tokens are the same bytes in every text; "
            f"{tokenizer.path} has another kind; leave stop out"
        )
    for string in strings:
        if "\ufffd" in string:
            raise ValueError(f"stop: {string!r}: U+FFFD stands for bytes that are no text; expected text without it")
        special = next((token for token in tokenizer.special_tokens if token in string), None)
        if special is not None:
            raise ValueError(
                f"stop: {string!r}: {special} is a special token, which is in no completion's text; expected text, or "
                f"its id in eos_token_id of the model's generation_config.json, so that it ends a completion"
            )


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Returns the bytes that each id of a byte-level tokenizer stands for in a text; none for special tokens."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    special, tokens = set(tokenizer.special_tokens), [b""] * tokenizer.size
    for token, number in tokenizer.hf.get_vocab().items():
        if token not in special:  # an added token may have characters that stand for no byte: it is text as it is
            is_bytes = all(character in byte_of for character in token)
            tokens[number] = bytes(byte_of[character] for character in token) if is_bytes else token.encode()
    return tokens


def byte_characters() -> list[str]:
    """Returns the characters by which byte-level tokens write bytes: a byte's own if visible, else one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def make_stop_table(strings: Sequence[bytes], tokens: Sequence[bytes]) -> StopTable:
    """Returns the automaton's steps by whole tokens, the tokens in classes that do the same."""
    next_M256, accepts_M = byte_automaton(strings)
    others = bytes(byte if next_M256[:, byte].any() else 0xFF for byte in range(256))  # UTF-8 has no byte 0xFF
    alike = [re.sub(b"\xff+", b"\xff", token.translate(others)) for token in tokens]
    kinds = {kind: i for i, kind in enumerate(dict.fromkeys(alike))}
    lengths_C, M = np.array([len(kind) for kind in kinds]), len(accepts_M)
    starts_C, text = np.cumsum(lengths_C) - lengths_C, np.frombuffer(b"".join(kinds), np.uint8)
    state_MC = np.repeat(np.arange(M, dtype=np.int32)[:, None], len(kinds), axis=1)
    ends_MC = np.zeros(state_MC.shape, bool)
    for i in range(int(lengths_C.max(initial=0))):
        longer = np.flatnonzero(lengths_C > i)
        state_MC[:, longer] = next_M256[state_MC[:, longer], text[starts_C[longer] + i]]
        ends_MC[:, longer] |= accepts_M[state_MC[:, longer]]
    steps_MC, class_of_kind = np.unique(np.where(ends_MC, ~state_MC, state_MC), axis=1, return_inverse=True)
    class_V = class_of_kind.reshape(-1)[[kinds[kind] for kind in alike]]
    return StopTable(class_V.astype(np.int32), steps_MC)


def byte_automaton(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The automaton that finds strings in a stream of bytes.

    Returns:
      next_M256, the state behind each byte; accepts_M, True where a string ends. State 0: nothing of any string.

    References:
      Aho and Corasick, Efficient string matching: an aid to bibliographic search, CACM 18 (6), 1975.
    """
    children: list[dict[int, int]] = [{}]
    accepts = [False]
    for string in strings:
        state = 0
        for byte in string:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
                accepts.append(False)
            state = children[state][byte]
        accepts[state] = True
    next_M256 = np.zeros((len(children), 256), np.int32)
    fallback, queue = [0] * len(children), [0]
    while queue:
        state = queue.pop(0)
        accepts[state] |= accepts[fallback[state]]
        if state:
            next_M256[state] = next_M256[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(next_M256[state, byte]) if state else 0
            next_M256[state, byte] = child
            queue.append(child)
    return next_M256, np.array(accepts)
