"""The tokenizer: text in, right-padded token arrays out. The only file that imports transformers.

A prompt is a string, used unchanged with its special tokens, or a list of chat messages, rendered by the tokenizer's
chat template with thinking off by default. The content of a message is text: <|im_end|> typed by a user does not end
the turn, the model sees its characters. transformers would make it the token.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError

from models.config import read_json
from models.names import split_commit, split_step
from models.weight_files import could_be_on_hub

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before its import; silences "PyTorch was not found"
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # silences the report of every retry

Prompt = str | list[dict[str, str]]
ROLES = ("system", "user", "assistant", "tool")


class Rendered(NamedTuple):
    """A text for the model, with `mark` inside of everything in a message that looks like a special token."""

    marked: str
    mark: str = ""

    @property
    def text(self) -> str:
        """The text without marks."""
        return self.marked.replace(self.mark, "") if self.mark else self.marked


def check_text(text: str) -> None:
    """Checks that a text has no half of a surrogate pair, which no tokenizer reads.

    Raises:
      ValueError: the text has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text, got the half of a surrogate pair at character {error.start}") from error


def check_messages(messages: Any) -> None:
    """Checks chat messages for faults that a chat template would ignore.

    Raises:
      ValueError: no messages, an unknown role, or content that is not text.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected text or a list of chat messages with role and content, got {str(messages)[:60]!r}")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"expected text or a list of chat messages with role and content, got the message {str(message)[:60]!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"expected a message's role to be one of {', '.join(ROLES)}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"expected a message's content to be text, got {str(message['content'])[:60]!r}")
        check_text(message["content"])


class Tokenizer:
    """A Hugging Face tokenizer with the calls that training and evaluation need."""

    def __init__(self, path: str | Path, enable_thinking: bool = False) -> None:
        if not Path(path).is_dir() and not could_be_on_hub(path):
            raise FileNotFoundError(f"{path}: no such directory; expected a Hugging Face tokenizer directory")
        self.path = str(path)
        try:
            self.hf = _load_hf(self.path)
        except Exception as error:  # a damaged file raises anything
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")  # some have many lines
            raise FileNotFoundError(f"{path}: no Hugging Face tokenizer could be read there ({reason})") from error
        if len(self.hf) <= len(self.hf.added_tokens_decoder):  # transformers' result for a config.json alone
            raise FileNotFoundError(
                f"{path}: has no tokenizer (expected tokenizer.json, or vocab.json with merges.txt); copy the model's "
                f"tokenizer files there"
            )
        self.enable_thinking = enable_thinking
        file = Path(self.path) / "generation_config.json"
        self.generation: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.eos_ids = self._eos_ids()
        if not self.eos_ids:
            raise ValueError(
                f"{path}: the tokenizer has no end-of-text token, so no completion could ever end; expected eos_token, "
                f"or eos_token_id in generation_config.json"
            )
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_ids[0]

    @property
    def size(self) -> int:
        """The number of ids; a model's vocab_size must not be smaller."""
        return len(self.hf)

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of everything that determines a prompt's ids; None if that is unknown, or depends on the date."""
        if "strftime_now" in str(self.hf.chat_template):
            return None
        try:
            parts = [self.hf.backend_tokenizer.to_str()]
        except AttributeError:
            return None  # a slow tokenizer has its rules in code
        parts += [str(self.hf.chat_template), str(self.enable_thinking), importlib.metadata.version("transformers")]
        parts.append(json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str))  # templates may use them
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def eos(self) -> str:
        """The text of the token that ends a sequence."""
        return self.hf.convert_ids_to_tokens(self.eos_ids[0])

    def token_text(self, token: int) -> str:
        """Returns the text of one token, with visible spaces and line breaks."""
        text = self.hf.decode([token], clean_up_tokenization_spaces=False)
        return text if token in self.hf.added_tokens_decoder else repr(text)

    def _eos_ids(self) -> tuple[int, ...]:
        """Returns the ids that end a completion: end of turn, end of text, and those of generation_config.json."""
        ids = [self.hf.eos_token_id] if self.hf.eos_token_id is not None else []
        more = self.generation.get("eos_token_id")
        more = [more] if isinstance(more, int) else more or []
        if not isinstance(more, list) or not all(isinstance(token, int) for token in more):
            raise ValueError(f"{self.path}/generation_config.json: eos_token_id: expected ids, got {more!r}")
        ids += more
        vocabulary = self.hf.get_vocab()
        ids += [vocabulary[token] for token in ("<|im_end|>", "<|endoftext|>") if token in vocabulary]
        return tuple(dict.fromkeys(ids))

    def check_vocab_size(self, vocab_size: int, model: str) -> None:
        """Raises ValueError if a model's embedding has no row for some of this tokenizer's ids."""
        if self.size > vocab_size:
            raise ValueError(
                f"{model}: vocab_size is {vocab_size}, but the tokenizer {self.path} has {self.size} ids; "
                f"use the tokenizer that the model was made with"
            )

    def render(self, prompt: Prompt) -> str:
        """Returns the text of a prompt that the model continues."""
        return self._render_prompt(prompt).text

    def render_conversation(self, prompt: Prompt, completion: str) -> str:
        """Returns prompt and completion as one text, for a reward model."""
        return self._render_conversation(prompt, completion).text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids of each text, without added tokens; a special token's text becomes that token."""
        return self.hf(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_literally(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids of each text; a special token's text stays text."""
        return self._encode([self._render_continuation("", text) for text in texts])

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns token ids of each rendered prompt."""
        return self._encode([self._render_prompt(prompt) for prompt in prompts])

    def conversation_ids(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """Returns token ids of each prompt with its completion, rendered as one text."""
        pairs = zip(prompts, completions, strict=True)
        return self._encode([self._render_conversation(prompt, completion) for prompt, completion in pairs])

    def _render_prompt(self, prompt: Prompt) -> Rendered:
        if isinstance(prompt, str):
            return Rendered(prompt)
        return self._render_messages(prompt, add_generation_prompt=True)

    def _render_conversation(self, prompt: Prompt, completion: str) -> Rendered:
        if isinstance(prompt, str):  # a completion without a prompt is already rendered
            return self._render_continuation(prompt, completion) if prompt else Rendered(completion)
        return self._render_messages(
            [*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False
        )

    def _render_messages(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> Rendered:
        """Renders messages by the chat template, with marks that keep a message's text from becoming special tokens.

        Raises:
          ValueError: no template, or messages that it refuses.
        """
        check_messages(messages)
        if not self.hf.chat_template:
            raise ValueError(f"{self.path}: this tokenizer has no chat template; give prompts as plain text")

        def render(messages: list[dict[str, str]]) -> str:
            try:
                return self.hf.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    enable_thinking=self.enable_thinking,
                )
            except TemplateError as error:
                raise ValueError(f"{self.path}: the chat template refuses these messages: {error}") from error

        (added, special), text = self._token_starts, render(messages)
        contents = _all_strings([value for message in messages for key, value in message.items() if key != "role"])
        if not any(added.search(content) for content in contents):
            return Rendered(text)
        mark = _unused_mark(contents)

        def marked(message: dict[str, str], pattern: re.Pattern[str]) -> dict[str, str]:
            return {
                key: value if key == "role" else _insert_marks(value, pattern, mark) for key, value in message.items()
            }

        # An assistant's added tokens that are not special (<think>) are for the template to read. In other messages
        # they are marked too, unless the template looks for their text (Qwen3's for <tool_response>): second try.
        for pattern in (added, special):
            patterns = [special if message["role"] == "assistant" else pattern for message in messages]
            rendered = Rendered(render([*map(marked, messages, patterns)]), mark)
            if rendered.text == text:
                return rendered if mark in rendered.marked else Rendered(text)
        raise ValueError(
            f"{self.path}: the chat template looks for special tokens inside of messages, so {text[:200]!r} cannot be "
            f"rendered with them as text; remove them from the message"
        )

    def _render_continuation(self, prompt: str, completion: str) -> Rendered:
        """Renders prompt + completion, with marks in special tokens' texts that end in the completion."""
        mark, (_, special) = _unused_mark([prompt, completion]), self._token_starts
        text, start = prompt + completion, len(prompt)
        marked = special.sub(lambda match: match[0] + mark if match.start() + len(match[1]) > start else match[0], text)
        return Rendered(marked, mark) if mark in marked else Rendered(text)

    @cached_property
    def _token_starts(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """`_token_start_pattern` of all added tokens, and of the special ones among them."""
        tokens = self.hf.added_tokens_decoder.values()
        special = (token.content for token in tokens if token.special)
        return _token_start_pattern(token.content for token in tokens), _token_start_pattern(special)

    @cached_property
    def _without_added_tokens(self) -> Any:
        """The same tokenizer without its added tokens, for which a special token's text is text."""
        from tokenizers import Tokenizer as Fast

        try:
            parts = json.loads(self.hf.backend_tokenizer.to_str())
        except AttributeError as error:
            raise ValueError(
                f"{self.path}: a message contains a special token's text, which only a fast tokenizer "
                f"(tokenizer.json) can read as text; remove it or convert the tokenizer"
            ) from error
        return Fast.from_str(json.dumps(parts | {"added_tokens": [], "post_processor": None}))

    def _encode(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        marked = [i for i, item in enumerate(rendered) if item.mark]
        ids = self.encode([item.text for item in rendered])
        for i in marked:
            ids[i] = self._encode_marked(rendered[i])
        return ids

    def _encode_marked(self, rendered: Rendered) -> list[int]:
        """Encodes a marked text: added tokens of the template are tokens, everything between them is text."""
        added = {token.content: number for number, token in self.hf.added_tokens_decoder.items()}
        longest_first, plain = sorted(added, key=len, reverse=True), self._without_added_tokens
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", rendered.marked):
            text = part.replace(rendered.mark, "")
            ids += [added[part]] if part in added else plain.encode(text, add_special_tokens=False).ids
        return ids

    def encode_prompts(self, prompts: Sequence[Prompt], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns right-padded `prompt_PS` and `lengths_P` of rendered prompts; S is a `bucket`."""
        return pad(self.prompt_ids(prompts), self.pad_id, max_length)

    def decode(self, tokens_PGT: np.ndarray, lengths_PG: np.ndarray) -> list[list[str]]:
        """Returns the text of each completion, without special tokens."""
        P, G, T = tokens_PGT.shape
        rows = [row[:n].tolist() for row, n in zip(tokens_PGT.reshape(-1, T), lengths_PG.reshape(-1), strict=True)]
        texts = self.hf.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [texts[p * G : (p + 1) * G] for p in range(P)]

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer, and generation_config.json with all ids that end a completion."""
        self.hf.save_pretrained(str(directory))
        generation = self.generation | {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (Path(directory) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _load_hf(path: str) -> Any:
    """Loads a tokenizer from tokenizer.json, or by the class that its config names if there is no such file.

    Looking up that class imports the code of all models, which takes seconds where torch is installed.
    """
    if (Path(path) / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    name, commit = split_commit(path)
    return AutoTokenizer.from_pretrained(name, revision=commit or "main", trust_remote_code=False)


def _token_start_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Returns the pattern of the first character of a token's text; group 1 is the whole text."""
    longest_first = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first)) or '(?!)'})).", re.DOTALL)


def _all_strings(value: Any) -> list[str]:
    """Returns all strings in nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _all_strings(item)]


def _insert_marks(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """Inserts the mark behind the first character of each token's text in nested lists and dictionaries."""
    if isinstance(value, str):
        return starts.sub(lambda match: match[0] + mark, value)
    if isinstance(value, dict):
        return {_insert_marks(key, starts, mark): _insert_marks(item, starts, mark) for key, item in value.items()}
    return [_insert_marks(item, starts, mark) for item in value] if isinstance(value, list) else value


def _unused_mark(texts: Sequence[str]) -> str:
    """Returns a noncharacter (Unicode reserves them for internal use) that is in none of the texts."""
    free = (chr(code) for code in range(0xFDD0, 0xFDF0))
    mark = next((mark for mark in free if not any(mark in text for text in texts)), None)
    if mark is None:
        raise ValueError("a text has all 32 noncharacters U+FDD0 to U+FDEF; expected text, remove one of them")
    return mark


def train_bpe(
    texts: Sequence[str], directory: str | Path, vocab_size: int, more_special_tokens: Sequence[str] = ()
) -> None:
    """Trains a byte-level BPE, like Qwen3's but smaller, and saves it in Hugging Face's format."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>", *more_special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    hf.save_pretrained(str(directory))


def tokenizer_path(model: str | Path) -> str:
    """Returns the tokenizer's directory: RUN/tokenizer for RUN or RUN@STEP, else the model's directory."""
    directory = Path(split_step(model)[0])
    return str(directory / "tokenizer") if (directory / "tokenizer").is_dir() else str(directory)


def bucket(length: int, limit: int) -> int:
    """Returns the length to pad to, a power of two of at least 8, at most `limit`: few shapes, few compilations."""
    return min(max(8, 1 << (length - 1).bit_length()), limit)


def pad(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads ragged rows on the right; returns ids [B, S] and lengths [B].

    Raises:
      ValueError: a row that is empty or longer than max_length.
    """
    lengths = np.asarray([len(row) for row in rows], np.int32)
    if lengths.size and (lengths.min() < 1 or lengths.max() > max_length):
        raise ValueError(
            f"expected rows of 1 to {max_length} tokens, got one of "
            f"{lengths.min() if lengths.min() < 1 else lengths.max()}"
        )
    tokens = np.full((len(rows), bucket(int(lengths.max(initial=1)), max_length)), pad_id, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths
