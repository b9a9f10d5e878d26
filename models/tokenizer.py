"""The tokenizer door: text in, right-padded token arrays out. The only place that imports transformers.

A prompt is a string, taken as it is, or a list of chat messages, rendered by the tokenizer's chat template with
thinking off unless asked for.
"""

import json
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at its import; "PyTorch was not found" is known

Prompt = str | list[dict[str, str]]


class Tokenizer:
    """A Hugging Face tokenizer with the few calls that training and evaluation need."""

    def __init__(self, path: str | Path, enable_thinking: bool = False) -> None:
        from transformers import AutoTokenizer

        if not Path(path).is_dir() and str(path).count("/") != 1:
            raise FileNotFoundError(f"{path}: no such directory; expected a Hugging Face tokenizer directory")
        self.path = str(path)
        try:
            self.hf = AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            why = textwrap.shorten(str(error), 200, placeholder=" ...")  # some have many lines
            raise FileNotFoundError(f"{path}: no Hugging Face tokenizer could be read there ({why})") from error
        self.enable_thinking = enable_thinking
        self.eos_ids = self._eos_ids()
        if not self.eos_ids:
            raise ValueError(f"{path}: the tokenizer has no end-of-text token, so no completion could ever end")
        self.pad_id: int = self.hf.pad_token_id if self.hf.pad_token_id is not None else self.eos_ids[0]

    @property
    def size(self) -> int:
        """How many ids there are; a model's vocab_size must not be smaller."""
        return len(self.hf)

    @property
    def eos(self) -> str:
        """The text of the token that ends a sequence."""
        return self.hf.convert_ids_to_tokens(self.eos_ids[0])

    def _eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion: end of turn, end of text, and those of generation_config.json."""
        ids = [self.hf.eos_token_id] if self.hf.eos_token_id is not None else []
        file = Path(self.path) / "generation_config.json"
        if file.is_file():
            more = json.loads(file.read_text()).get("eos_token_id") or []
            ids += [more] if isinstance(more, int) else more
        vocabulary = self.hf.get_vocab()
        ids += [vocabulary[token] for token in ("<|im_end|>", "<|endoftext|>") if token in vocabulary]
        return tuple(dict.fromkeys(ids))

    def check_fits(self, vocab_size: int, model: str) -> None:
        """Refuse a model whose embedding has no row for some of this tokenizer's ids."""
        if self.size > vocab_size:
            raise ValueError(
                f"{model}: vocab_size is {vocab_size}, but the tokenizer {self.path} has {self.size} ids; "
                f"use the tokenizer that the model was made with"
            )

    def render(self, prompt: Prompt) -> str:
        """The text the model sees before it begins to write."""
        if isinstance(prompt, str):
            return prompt
        return self._template(prompt, add_generation_prompt=True)

    def render_conversation(self, prompt: Prompt, completion: str) -> str:
        """Prompt and answer as one text, as a reward model reads it."""
        if isinstance(prompt, str):
            return prompt + completion
        return self._template([*prompt, {"role": "assistant", "content": completion}], add_generation_prompt=False)

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if not self.hf.chat_template:
            raise ValueError(f"{self.path}: this tokenizer has no chat template; give prompts as plain text")
        return self.hf.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.enable_thinking,
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        return self.hf(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def encode_prompts(self, prompts: Sequence[Prompt], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rendered, right-padded `prompt_PS` and `lengths_P`; S is a bucket, see `bucket`."""
        return pad(self.encode([self.render(prompt) for prompt in prompts]), self.pad_id, max_length)

    def decode(self, tokens_PGT: np.ndarray, lengths_PG: np.ndarray) -> list[list[str]]:
        """The text of each completion, special tokens left out."""
        P, G, T = tokens_PGT.shape
        rows = [row[:n].tolist() for row, n in zip(tokens_PGT.reshape(-1, T), lengths_PG.reshape(-1), strict=True)]
        texts = self.hf.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [texts[p * G : (p + 1) * G] for p in range(P)]

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, and with generation_config.json what ends a completion."""
        self.hf.save_pretrained(str(directory))
        generation: dict[str, Any] = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id}
        (Path(directory) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def train_bpe(texts: Sequence[str], directory: str | Path, vocab_size: int) -> None:
    """Train a byte-level BPE (Qwen3's kind, without its 151,643 entries) and save it in Hugging Face form."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
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


def pad(rows: Sequence[Sequence[int]], pad_id: int, max_length: int) -> tuple[np.ndarray, np.ndarray]:
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
