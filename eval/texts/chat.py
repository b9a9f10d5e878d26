"""`python -m eval chat`: talk to a policy in the terminal, or by lines on standard input.

Each line is a user message; the model's chat template renders the whole conversation, and the complete answer is
printed. A model without a chat template continues each line as plain text. A line that begins with "/" is a command;
see HELP. The same seed and the same lines give the same answers.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from eval.texts.generate import load_policy, trained_chat
from models.checkpoint import check_loadable, resolve_step
from models.generate import Generator
from models.stop_strings import check_stop_strings
from models.tokenizer import Prompt, Tokenizer, tokenizer_path
from train.build import make_layout_for
from train.config import ChatConfig, MeshConfig, check_sampling, check_seed
from train.console import console
from train.parse import parse
from train.running import setup_errors
from train.state import EVALUATION, stream_key

HELP = """/reset            forget what was said
/system TEXT      a system prompt for a new conversation; without TEXT none
/temperature X    0: greedy
/seed N           of the answers from here on
/quit             end; so does the end of the input"""


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """A conversation with a policy, on the terminal."""

    checkpoint: str  # a run, RUN@STEP, a Hugging Face directory or Hub name
    temperature: float = 1.0  # of sampling; 0: greedy
    top_p: float = 1.0  # sample from the likeliest tokens that have this probability together; 1: off
    top_k: int = 0  # sample from so many likeliest tokens; 0: off
    min_p: float = 0.0  # sample from tokens of at least this share of the likeliest one's probability; 0: off
    # logits of tokens in the conversation so far are divided by this, or multiplied where they are below 0; 1: off
    repetition_penalty: float = 1.0
    # texts that end an answer, with the token in which the first of them ends, e.g. '["</answer>", "\n\n"]'
    stop: list[str] = field(default_factory=list)
    max_prompt_length: int = 4096  # tokens of the whole conversation
    max_completion_length: int = 512  # tokens of an answer; longer ones are cut
    seed: int = 0  # of sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    chat: ChatConfig | None = None  # how prompts become tokens; default: the run's own; for a model directory, as below
    # each line is plain text to be continued; default: true for a model without a chat template
    plain: bool | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)  # how arrays are split over devices, e.g. tensor=8

    def __post_init__(self) -> None:
        least = {"max_prompt_length": 1, "max_completion_length": 1, "temperature": 0, "top_k": 0}
        check_seed(self.seed)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        check_sampling(self)


def parse_chat(arguments: list[str]) -> TalkConfig:
    return parse(TalkConfig, arguments, "python -m eval chat")


def chat(config: TalkConfig) -> None:
    """Answers lines until the input ends."""
    with setup_errors():
        check_loadable(config.checkpoint)
        layout = make_layout_for(config.mesh)
        settings = config.chat or trained_chat(config.checkpoint)
        tokenizer = Tokenizer(tokenizer_path(config.checkpoint), settings.enable_thinking)
        check_stop_strings(config.stop, tokenizer)
        generator, params = load_policy(config, tokenizer, layout)
    generator.sampling = generator.sampling._replace(temperature=config.temperature)
    talk = Conversation(config, settings, generator, params)
    how = "goes on with each line as plain text" if talk.plain else "answers"
    console.print(f"{resolve_step(config.checkpoint)} {how}; /help lists the commands", markup=False)
    for line in input_lines():
        if line.strip() == "/quit":
            return
        if line.strip():
            console.print(talk.hear(line), markup=False, highlight=False)


def input_lines() -> Iterator[str]:
    """Yields lines from the terminal, with a prompt, or from standard input."""
    if not sys.stdin.isatty():
        stdin: Iterable[str] = sys.stdin
        yield from (line.rstrip("\n") for line in stdin)
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return


class Conversation:
    """A conversation with a policy, and its commands."""

    def __init__(self, config: TalkConfig, chat: ChatConfig, generator: Generator, params: Any) -> None:
        self.config, self.generator, self.params = config, generator, params
        self.plain = config.plain if config.plain is not None else not generator.tokenizer.hf.chat_template
        self.system, self.seed = chat.system_prompt, config.seed
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.turn = 0  # number of answers since the reset; each has its own key

    def hear(self, line: str) -> str:
        """Answers a line, or obeys it as a command; returns the text to print."""
        return self.obey(line) if line.startswith("/") else self.answer(line)

    def answer(self, line: str) -> str:
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        user = {"role": "user", "content": line}
        prompt: Prompt = line if self.plain else [*system, *self.messages, user]
        longest = self.config.max_prompt_length
        try:
            length = len(self.generator.tokenizer.prompt_ids([prompt])[0])
        except ValueError as error:  # from the chat template
            return f"error: {error}"
        if length > longest:
            return (
                f"error: {length} tokens with this line, more than max_prompt_length = {longest}; /reset forgets them"
            )
        key: jax.Array = stream_key(self.seed, EVALUATION, self.turn)
        rollout = self.generator.complete(self.params, [prompt], key, 1, 1)
        text, self.turn = rollout.texts_PG[0][0], self.turn + 1
        self.messages += [user, {"role": "assistant", "content": text}]
        return text if rollout.finished_PG[0, 0] else f"{text} [cut: {self.config.max_completion_length} tokens]"

    def obey(self, line: str) -> str:
        command, _, value = line.strip().partition(" ")
        if command == "/reset":
            self.reset()
            return "a new conversation"
        if command == "/system":
            self.system = value.strip() or None
            self.reset()
            return f"a new conversation, system prompt: {self.system}"
        if command in ("/temperature", "/seed"):
            return self.set(command[1:], value.strip())
        return HELP if command == "/help" else f"error: there is no {command}\n{HELP}"

    def set(self, name: str, text: str) -> str:
        try:
            value = float(text) if name == "temperature" else int(text)
        except ValueError:
            value = -1
        if not 0 <= value < (math.inf if name == "temperature" else 2**32):
            return f"error: /{name}: expected a number from 0, got {text!r}"
        if name == "temperature":
            self.generator.sampling = self.generator.sampling._replace(temperature=value)
        else:
            self.seed, self.turn = int(value), 0
        return f"{name} {value:g}"
