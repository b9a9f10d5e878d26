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
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from models.begun import PROBE, is_begun, render_begun, with_completion
from models.config import read_json
from models.marks import Rendered, all_strings, insert_marks, token_start_pattern, unused_mark
from models.messages import (
    ROLES,
    Message,
    Tools,
    check_messages,
    check_text,
    check_tools_are_rendered,
    without_empty_fields,
)
from models.names import split_commit, split_step
from models.tokenizer_copy import TOKENIZER, check_tokenizer_copy
from models.weight_files import could_be_on_hub, describe_local, find_directory

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before its import; silences "PyTorch was not found"
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # silences the report of every retry

__all__ = [
    "ROLES",
    "Prompt",
    "Tokenizer",
    "bucket",
    "check_messages",
    "check_text",
    "pad",
    "portable_config",
    "tokenizer_path",
    "train_bpe",
]
Prompt = str | list[Message]
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)


class Tokenizer:
    """A Hugging Face tokenizer with the calls that training and evaluation need."""

    def __init__(self, path: str | Path, enable_thinking: bool = False, continue_final_message: bool = False) -> None:
        """
        Args:
          enable_thinking: passed to the chat template.
          continue_final_message: a prompt that ends with the beginning of the assistant's answer is continued (see
            `models.begun`); else another answer is asked for behind it.
        """
        if not Path(path).is_dir() and not could_be_on_hub(path):
            raise FileNotFoundError(
                f"{path}: no such directory; expected a Hugging Face tokenizer directory{describe_local(path)}"
            )
        if Path(path).is_dir() and could_be_on_hub(path):  # transformers would read the empty directory
            path = find_directory(path, weights=False)
        self.path = str(path)
        try:
            self.hf = _load_hf(self.path)
            self.hf(["."], add_special_tokens=False)  # some settings do harm only where they are used
        except Exception as error:  # a damaged file raises anything
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")  # some have many lines
            raise FileNotFoundError(f"{path}: no Hugging Face tokenizer could be read there ({reason})") from error
        if len(self.hf) <= len(self.hf.added_tokens_decoder):  # transformers' result for a config.json alone
            raise FileNotFoundError(
                f"{path}: has no tokenizer (expected tokenizer.json, or vocab.json with merges.txt); copy the model's "
                f"tokenizer files there"
            )
        self.enable_thinking, self.continue_final_message = enable_thinking, continue_final_message
        file = Path(self.path) / "generation_config.json"
        self.generation: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.turn_end, self.turn_tail = self._turn_end()
        self.eos_ids = self._eos_ids()
        if not self.eos_ids:
            raise ValueError(
                f"{path}: the tokenizer has no end-of-text token, so no completion could ever end; expected eos_token, "
                f"or eos_token_id in generation_config.json"
            )
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_ids[0]
        check_tokenizer_copy(Path(self.path))

    @cached_property
    def ids(self) -> np.ndarray:
        """The ids of all tokens, ascending; there may be gaps."""
        return np.unique(list(self.hf.get_vocab().values()))

    @property
    def size(self) -> int:
        """The last id + 1; a model's vocab_size must not be smaller."""
        return int(self.ids[-1]) + 1

    def absent_ids(self, vocab_size: int) -> np.ndarray | None:
        """Returns booleans for the rows of a model's vocabulary, True where no token has the id; None if all have."""
        absent = np.ones(vocab_size, bool)
        absent[self.ids] = False
        return absent if absent.any() else None

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
        parts += ["continue_final_message"] if self.continue_final_message else []
        parts.append(json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str))  # templates may use them
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def eos(self) -> str:
        """The text of the token that ends a sequence."""
        return self.hf.convert_ids_to_tokens(self.eos_ids[0])

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens' texts, with their ids."""
        return {token.content: number for number, token in self.hf.added_tokens_decoder.items() if token.special}

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
        ids += [self.turn_end] if self.turn_end is not None else []
        return tuple(dict.fromkeys(ids))

    def _turn_end(self) -> tuple[int | None, str]:
        """Returns the token by which the chat template ends an assistant's turn, and all it writes behind an answer.

        A base model's tokenizer has another token for the end of a text. None: the template writes no token there.
        """
        turn = [{"role": "user", "content": "."}, {"role": "assistant", "content": PROBE}]
        try:
            tail = self.render_messages(turn, add_generation_prompt=False).text.rpartition(PROBE)[2]
        except ValueError:  # no template, or one for other roles; what it says matters where it is used
            return None, ""
        special = self.special_tokens.values()
        return next((token for token in self.encode([tail])[0] if token in special), None), tail

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
        return self.encode_rendered([self._render_continuation("", text) for text in texts])

    def prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Returns token ids of each rendered prompt."""
        return self.encode_rendered([self._render_prompt(prompt) for prompt in prompts])

    def conversation_ids(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """Returns token ids of each prompt with its completion, rendered as one text."""
        pairs = zip(prompts, completions, strict=True)
        return self.encode_rendered([self._render_conversation(prompt, completion) for prompt, completion in pairs])

    def _render_prompt(self, prompt: Prompt) -> Rendered:
        if isinstance(prompt, str):
            return Rendered(prompt)
        if self.continue_final_message and is_begun(prompt):
            return render_begun(prompt, self.render_messages)
        return self.render_messages(prompt, add_generation_prompt=True)

    def _render_conversation(self, prompt: Prompt, completion: str) -> Rendered:
        if isinstance(prompt, str):  # a completion without a prompt is already rendered
            return self._render_continuation(prompt, completion) if prompt else Rendered(completion)
        if is_begun(prompt):  # one answer, whoever wrote its beginning
            return self.render_messages(with_completion(prompt, completion), add_generation_prompt=False)
        return self.render_messages(
            [*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False
        )

    def render_messages(
        self,
        messages: list[Message],
        tools: Tools | None = None,
        *,
        add_generation_prompt: bool,
        enable_thinking: bool | None = None,
    ) -> Rendered:
        """Renders messages by the chat template, with marks that keep a message's text from becoming special tokens.

        Args:
          tools: JSON schemas of the functions that may be called.
          enable_thinking: None: as the tokenizer was made.

        Raises:
          ValueError: no template, or messages that it refuses or of which it would drop a part.
        """
        check_messages(messages)
        if not self.hf.chat_template:
            raise ValueError(f"{self.path}: this tokenizer has no chat template; give prompts as plain text")
        settings = {
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": self.enable_thinking if enable_thinking is None else enable_thinking,
        }

        def render(messages: list[Message], tools: Tools | None = None) -> str:
            try:
                return self.hf.apply_chat_template(messages, tools=tools, tokenize=False, **settings)
            except Exception as error:  # a template is a program
                reason = f"{error}" if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
                raise ValueError(f"{self.path}: the chat template refuses these messages: {reason}") from error

        messages = [without_empty_fields(message) for message in messages]
        text = render(messages, tools)
        try:
            check_tools_are_rendered(messages, tools, text, render)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        return self._with_marks(messages, tools, text, render)

    def _with_marks(
        self, messages: list[Message], tools: Tools | None, text: str, render: Callable[..., str]
    ) -> Rendered:
        """Renders messages with marks where their own text would become special tokens; `text` is without them."""
        added, special = self._token_starts
        contents = all_strings([value for message in messages for key, value in message.items() if key != "role"])
        contents += all_strings(tools)
        if not any(added.search(content) for content in contents):
            return Rendered(text)
        mark = unused_mark(contents)

        def marked(message: Message, pattern: re.Pattern[str]) -> Message:
            return {
                key: value if key == "role" else insert_marks(value, pattern, mark) for key, value in message.items()
            }

        # An assistant's added tokens that are not special (<think>) are for the template to read. In other messages
        # they are marked too, unless the template looks for their text (Qwen3's for <tool_response>): second try.
        for pattern in (added, special):
            patterns = [special if message["role"] == "assistant" else pattern for message in messages]
            marked_tools = insert_marks(tools, pattern, mark)
            rendered = Rendered(render([*map(marked, messages, patterns)], marked_tools), mark)
            if rendered.text == text:
                return rendered if mark in rendered.marked else Rendered(text)
        raise ValueError(
            f"{self.path}: the chat template looks for special tokens inside of messages, so {text[:200]!r} cannot be "
            f"rendered with them as text; remove them from the message"
        )

    def _render_continuation(self, prompt: str, completion: str) -> Rendered:
        """Renders prompt + completion, with marks in special tokens' texts that end in the completion."""
        mark, (_, special) = unused_mark([prompt, completion]), self._token_starts
        text, start = prompt + completion, len(prompt)
        marked = special.sub(lambda match: match[0] + mark if match.start() + len(match[1]) > start else match[0], text)
        return Rendered(marked, mark) if mark in marked else Rendered(text)

    @cached_property
    def _token_starts(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """`_token_start_pattern` of all added tokens, and of the special ones among them."""
        added = (token.content for token in self.hf.added_tokens_decoder.values())
        return token_start_pattern(added), token_start_pattern(self.special_tokens)

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

    def encode_rendered(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """Returns token ids of each text; what a message says is text, also where it looks like a special token."""
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
        """Writes the tokenizer's own files, and generation_config.json with all ids that end a completion.

        transformers writes what the original lacks, e.g. tokenizer.json beside a vocab.json. Its other files are
        replaced by the original's: it would name its own class, drop fields, and other programs could not load them.
        """
        originals = {name: file.read_bytes() for name, file in self._original_files().items()}
        self.hf.save_pretrained(str(directory))
        for name, content in originals.items():
            (Path(directory) / name).write_bytes(content)
        file = Path(directory) / TOKENIZER_CONFIG
        if (portable := portable_config(config := read_json(file))) != config:
            file.write_text(json.dumps(portable, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        generation = self.generation | {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (Path(directory) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")

    def _original_files(self) -> dict[str, Path]:
        """Returns the files that the tokenizer was read from, by name; those of a Hub name lie in the Hub's cache."""
        if Path(self.path).is_dir():
            files: dict[str, Any] = {name: Path(self.path) / name for name in TOKENIZER_FILES}
        else:
            from huggingface_hub import try_to_load_from_cache

            files = {name: try_to_load_from_cache(self.path, name) for name in TOKENIZER_FILES}
        return {
            name: Path(file) for name, file in files.items() if isinstance(file, str | Path) and Path(file).is_file()
        }


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer_config.json with what only transformers 5 reads in words that transformers 4 reads too.

    A class of the original is kept; only the name of transformers 5 for "whatever tokenizer.json says" is translated.
    """
    portable = dict(config)
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra := portable.get("extra_special_tokens"), list):  # transformers 4 wants names: {name: token}
        del portable["extra_special_tokens"]
        more = [token for token in extra if token not in portable.get("additional_special_tokens", [])]
        portable["additional_special_tokens"] = [*portable.get("additional_special_tokens", []), *more]
    return portable


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
    file = Path(directory) / TOKENIZER_CONFIG
    file.write_text(json.dumps(portable_config(read_json(file)), indent=2) + "\n")


def tokenizer_path(model: str | Path) -> str:
    """Returns the tokenizer's directory: RUN/tokenizer for RUN or RUN@STEP, else the model's directory."""
    directory = Path(split_step(model)[0])
    return str(directory / TOKENIZER) if (directory / TOKENIZER).is_dir() else str(directory)


def bucket(length: int, limit: int, least: int = 8) -> int:
    """Returns the length to pad to: a power of two from `least`, at most `limit`; few shapes are few compilations."""
    return min(max(least, 1 << (length - 1).bit_length()), limit)


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
