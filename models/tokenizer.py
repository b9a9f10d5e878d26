"""The tokenizer door: text in, right-padded token arrays out. The only place that imports transformers.

A prompt is a string, taken as it is, special tokens too; or a list of chat messages, rendered by the tokenizer's chat
template with thinking off unless asked for. What stands in a message is text: a user who writes <|im_end|> ends no
turn, the model sees the characters. transformers would see the token.
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
from models.weight_files import could_be_on_hub

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at its import; "PyTorch was not found" is known
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else every one of its retries is reported

Prompt = str | list[dict[str, str]]
ROLES = ("system", "user", "assistant", "tool")


class Rendered(NamedTuple):
    """A text for the model; where a message says what looks like a special token, `mark` stands inside of it."""

    marked: str
    mark: str = ""

    @property
    def text(self) -> str:
        return self.marked.replace(self.mark, "") if self.mark else self.marked


def check_text(text: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer reads.

    Raises:
      ValueError: see above.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"expected text, got the half of a surrogate pair at character {error.start}") from error


def check_messages(messages: Any) -> None:
    """Refuse what a chat template would drop in silence.

    Raises:
      ValueError: no messages, a role that is not known, or a content that is not text.
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
    """A Hugging Face tokenizer with the few calls that training and evaluation need."""

    def __init__(self, path: str | Path, enable_thinking: bool = False) -> None:
        if not Path(path).is_dir() and not could_be_on_hub(path):
            raise FileNotFoundError(f"{path}: no such directory; expected a Hugging Face tokenizer directory")
        self.path = str(path)
        try:
            self.hf = _load_hf(self.path)
        except Exception as error:  # a damaged file: whatever its reader stumbles over
            why = textwrap.shorten(str(error), 200, placeholder=" ...")  # some have many lines
            raise FileNotFoundError(f"{path}: no Hugging Face tokenizer could be read there ({why})") from error
        if len(self.hf) <= len(self.hf.added_tokens_decoder):  # what transformers makes of a config.json alone
            raise FileNotFoundError(
                f"{path}: has no tokenizer (expected tokenizer.json, or vocab.json with merges.txt); copy the model's "
                f"tokenizer files there"
            )
        self.enable_thinking = enable_thinking
        file = Path(self.path) / "generation_config.json"
        self.generation: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.eos_ids = self._eos_ids()
        if not self.eos_ids:
            raise ValueError(f"{path}: the tokenizer has no end-of-text token, so no completion could ever end")
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_ids[0]

    @property
    def size(self) -> int:
        """How many ids there are; a model's vocab_size must not be smaller."""
        return len(self.hf)

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of all that decides which ids a prompt becomes; None where that cannot be told, or changes daily."""
        if "strftime_now" in str(self.hf.chat_template):
            return None
        try:
            parts = [self.hf.backend_tokenizer.to_str()]
        except AttributeError:
            return None  # a slow tokenizer keeps its tables in code
        parts += [str(self.hf.chat_template), str(self.enable_thinking), importlib.metadata.version("transformers")]
        parts.append(json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str))  # a template may name them
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def eos(self) -> str:
        """The text of the token that ends a sequence."""
        return self.hf.convert_ids_to_tokens(self.eos_ids[0])

    def token_text(self, token: int) -> str:
        """The text of one token, spaces and line breaks made visible."""
        text = self.hf.decode([token], clean_up_tokenization_spaces=False)
        return text if token in self.hf.added_tokens_decoder else repr(text)

    def _eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion: end of turn, end of text, and those of generation_config.json."""
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
        """Refuse a model whose embedding has no row for some of this tokenizer's ids."""
        if self.size > vocab_size:
            raise ValueError(
                f"{model}: vocab_size is {vocab_size}, but the tokenizer {self.path} has {self.size} ids; "
                f"use the tokenizer that the model was made with"
            )

    def render(self, prompt: Prompt) -> str:
        """The text the model sees before it begins to write."""
        return self._render_prompt(prompt).text

    def render_conversation(self, prompt: Prompt, completion: str) -> str:
        """Prompt and answer as one text, as a reward model reads it."""
        return self._render_conversation(prompt, completion).text

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added; a special token's text is that token."""
        return self.hf(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_literally(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; what looks like a special token is text as well."""
        return self._encode([self._render_continuation("", text) for text in texts])

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each rendered prompt."""
        return self._encode([self._render_prompt(prompt) for prompt in prompts])

    def conversation_ids(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt with its answer, rendered as one."""
        pairs = zip(prompts, completions, strict=True)
        return self._encode([self._render_conversation(prompt, completion) for prompt, completion in pairs])

    def _render_prompt(self, prompt: Prompt) -> Rendered:
        if isinstance(prompt, str):
            return Rendered(prompt)
        return self._render_messages(prompt, add_generation_prompt=True)

    def _render_conversation(self, prompt: Prompt, completion: str) -> Rendered:
        if isinstance(prompt, str):  # an answer without a prompt is a whole text, rendered elsewhere
            return self._render_continuation(prompt, completion) if prompt else Rendered(completion)
        return self._render_messages(
            [*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False
        )

    def _render_messages(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> Rendered:
        """The chat template's text, marked so that it becomes the same text without a special token from a message.

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

        text, every, special = render(messages), self._token_start_patterns[0], self._token_start_patterns[1]
        said = [value for message in messages for role, value in message.items() if role != "role"]
        if not any(every.search(value) for value in _all_strings(said)):
            return Rendered(text)
        mark = _unused_mark(_all_strings(said))
        # An assistant may think: <think> in its message is the template's business, <|im_end|> is not. Second try:
        # for templates that look for such text themselves (Qwen3's: for <tool_response>) it stays what it was.
        for users in (every, special):
            marked = [
                {
                    key: value
                    if key == "role"
                    else _insert_marks(value, special if m["role"] == "assistant" else users, mark)
                    for key, value in m.items()
                }
                for m in messages
            ]
            rendered = Rendered(render(marked), mark)
            if rendered.text == text:
                return rendered if mark in rendered.marked else Rendered(text)
        raise ValueError(
            f"{self.path}: the chat template looks for special tokens inside of messages, so {text[:200]!r} cannot be "
            f"rendered with them as text; remove them from the message"
        )

    def _render_continuation(self, prompt: str, completion: str) -> Rendered:
        """Prompt and completion; what looks special in the second, or across the seam, is marked."""
        mark, special = _unused_mark([prompt, completion]), self._token_start_patterns[1]
        text, tail = prompt + completion, len(prompt)
        marked = special.sub(lambda match: match[0] + mark if match.start() + len(match[1]) > tail else match[0], text)
        return Rendered(marked, mark) if mark in marked else Rendered(text)

    @cached_property
    def _token_start_patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """The first character of an added token's text, the whole of which is group 1; of any, of a special one."""
        added = self.hf.added_tokens_decoder.values()
        return _token_start_pattern(token.content for token in added), _token_start_pattern(
            t.content for t in added if t.special
        )

    @cached_property
    def _without_added_tokens(self) -> Any:
        """The same tokenizer without its added tokens: what no special token's text turns into a special token."""
        from tokenizers import Tokenizer as Fast

        try:
            parts = json.loads(self.hf.backend_tokenizer.to_str())
        except AttributeError as error:
            raise ValueError(
                f"{self.path}: a text has what looks like a special token, and only a fast tokenizer "
                f"(tokenizer.json) can read it as text; remove it or convert the tokenizer"
            ) from error
        return Fast.from_str(json.dumps(parts | {"added_tokens": [], "post_processor": None}))

    def _encode(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        marked = [i for i, item in enumerate(rendered) if item.mark]
        ids = self.encode([item.text for item in rendered])
        for i in marked:
            ids[i] = self._encode_marked(rendered[i])
        return ids

    def _encode_marked(self, rendered: Rendered) -> list[int]:
        """The template's tokens are tokens, all between them is text."""
        added = {token.content: number for number, token in self.hf.added_tokens_decoder.items()}
        longest_first = sorted(added, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", rendered.marked):
            text = part.replace(rendered.mark, "")
            ids += (
                [added[part]]
                if part in added
                else self._without_added_tokens.encode(text, add_special_tokens=False).ids
            )
        return ids

    def encode_prompts(self, prompts: Sequence[Prompt], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rendered, right-padded `prompt_PS` and `lengths_P`; S is a bucket, see `bucket`."""
        return pad(self.prompt_ids(prompts), self.pad_id, max_length)

    def decode(self, tokens_PGT: np.ndarray, lengths_PG: np.ndarray) -> list[list[str]]:
        """The text of each completion, special tokens left out."""
        P, G, T = tokens_PGT.shape
        rows = [row[:n].tolist() for row, n in zip(tokens_PGT.reshape(-1, T), lengths_PG.reshape(-1), strict=True)]
        texts = self.hf.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [texts[p * G : (p + 1) * G] for p in range(P)]

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, and generation_config.json: what it was, and all that ends a completion."""
        self.hf.save_pretrained(str(directory))
        generation = self.generation | {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (Path(directory) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _load_hf(path: str) -> Any:
    """tokenizer.json holds all there is to know; only what has none needs the class that its config names.

    That class would be found among all models' code, which takes seconds to import where torch is installed.
    """
    if (Path(path) / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _token_start_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if len(token) > 1}, key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first)) or '(?!)'})).", re.DOTALL)


def _all_strings(value: Any) -> list[str]:
    """All texts in nested lists and dictionaries."""
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _all_strings(item)]


def _insert_marks(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """The value with a mark after the first character of each token's text in it."""
    if isinstance(value, str):
        return starts.sub(lambda match: match[0] + mark, value)
    if isinstance(value, dict):
        return {_insert_marks(key, starts, mark): _insert_marks(item, starts, mark) for key, item in value.items()}
    return [_insert_marks(item, starts, mark) for item in value] if isinstance(value, list) else value


def _unused_mark(texts: Sequence[str]) -> str:
    """A character that is in none of the texts, of those that Unicode keeps for a program's own use."""
    free = (chr(code) for code in range(0xFDD0, 0xFDF0))
    mark = next((mark for mark in free if not any(mark in text for text in texts)), None)
    if mark is None:
        raise ValueError("a text has all 32 noncharacters U+FDD0 to U+FDEF; expected text")
    return mark


def train_bpe(
    texts: Sequence[str], directory: str | Path, vocab_size: int, more_special_tokens: Sequence[str] = ()
) -> None:
    """Train a byte-level BPE (Qwen3's kind, without its 151,643 entries) and save it in Hugging Face form."""
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
    """Where the tokenizer of a model is: beside a run's (or RUN@STEP's) checkpoints, or in the model directory."""
    directory = Path(str(model).partition("@")[0])
    return str(directory / "tokenizer") if (directory / "tokenizer").is_dir() else str(directory)


def bucket(length: int, limit: int) -> int:
    """The length to pad to: the next power of two from 8 on, at most `limit`. Few shapes mean few compilations."""
    return min(max(8, 1 << (length - 1).bit_length()), limit)


def pad(rows: Sequence[Sequence[int] | np.ndarray], pad_id: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded [B, S] ids and lengths [B] of ragged rows.

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
