"""The assistant's turn in a conversation as the model is asked for it, and as it is to write it.

A conversation is rendered whole by the model's chat template. What the model reads is the same prompt that it is
sampled with; what it is to write is everything behind that, to the token that ends its turn: thoughts, text and tool
calls as the template writes them. Plain text is rendered already: special tokens in it are tokens.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from models.marks import Rendered, all_strings
from models.messages import Message, Tools, without_empty_fields
from models.tokenizer import Prompt, Tokenizer

Answer = str | Message
ONE_THOUGHT = re.compile(r"\s*(<think>)?((?!</?think>).)*</think>((?!</?think>).)*", re.DOTALL)
OTHER_FIELDS = ("function_call", "refusal", "audio")  # content that some data sets have


class Turn(NamedTuple):
    """A prompt as the model reads it, and what it is to write."""

    prompt: Rendered
    written: Rendered
    thinking: bool  # whether the prompt is the one that leaves thinking on
    is_chat: bool = True


def render_turn(tokenizer: Tokenizer, prompt: Prompt, answer: Answer, tools: Tools | None = None) -> Turn:
    """Renders a prompt and what the model is to write after it.

    An answer with thoughts stands behind the prompt that leaves thinking on, also where the tokenizer turns it off.

    Raises:
      ValueError: an answer that the template would not render whole, or not behind its own prompt.
    """
    if isinstance(prompt, str):
        return Turn(Rendered(prompt), Rendered(plain_text(answer, tools)), tokenizer.enable_thinking, is_chat=False)
    message = answer_message(tokenizer, answer)
    for thinking in dict.fromkeys((tokenizer.enable_thinking, tokenizer.enable_thinking or has_thoughts(message))):
        asked = tokenizer.render_messages(prompt, tools, add_generation_prompt=True, enable_thinking=thinking)
        whole = render_answered(tokenizer, prompt, message, tools, thinking)
        if whole.text.startswith(asked.text):
            written = whole.after(len(asked.text))
            tail = tokenizer.turn_tail
            if tail.isspace() and written.marked.endswith(tail):  # the template's separator, not the model's
                written = written._replace(marked=written.marked.removesuffix(tail))
            return Turn(asked, written, thinking)
    raise ValueError(
        f"the chat template of {tokenizer.path} ends the prompt with {asked.text[-60:]!r}, but renders its answer "
        f"as {whole.text[-120:]!r}, so the model would learn something else than it is asked; give "
        f"prompt and completion as plain text, rendered already"
    )


def render_comparison(tokenizer: Tokenizer, prompt: Prompt, answer: Answer, tools: Tools | None = None) -> Rendered:
    """Renders a prompt with one of its answers as one text, for a reward model that learns from it.

    Raises:
      ValueError: an answer that the template would not render whole.
    """
    if isinstance(prompt, str):
        return Rendered(prompt + plain_text(answer, tools))
    return render_answered(tokenizer, prompt, answer_message(tokenizer, answer), tools)


def encode_turn(tokenizer: Tokenizer, turn: Turn, prompt_ids: Sequence[int], written_ids: Sequence[int]) -> list[int]:
    """Returns the ids that the model is to write: to the token that ends the turn, which is there once.

    Where the text has none, it is the template's behind a prompt that the template rendered, else the tokenizer's.

    Raises:
      ValueError: text behind the end, which the model never writes.
    """
    first = next((i for i, token in enumerate(written_ids) if token in tokenizer.eos_ids), None)
    if first is None:
        return [*written_ids, end_for(tokenizer, prompt_ids)]
    rest = [token for token in written_ids[first + 1 :] if token not in tokenizer.eos_ids]
    if not turn.is_chat and (behind := tokenizer.hf.decode(rest)).strip():
        raise ValueError(
            f"{tokenizer.token_text(written_ids[first])} ends the completion, but {behind[:60]!r} stands behind it, "
            f"which the model never writes; expected one turn, with the end of turn last or left out"
        )
    return [*written_ids[: first + 1]]


def encode_whole_text(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns the ids of a text with the token that ends it; white space behind an end that it has is left out."""
    last = next((i for i in reversed(range(len(ids))) if ids[i] in tokenizer.eos_ids), None)
    if last is not None and not tokenizer.hf.decode(ids[last + 1 :]).strip():
        return [*ids[: last + 1]]
    return [*ids, end_for(tokenizer, ids)]


def end_for(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Returns the token that ends a text behind these ids: the template's if they have it, else the tokenizer's."""
    end = tokenizer.turn_end
    return end if end is not None and end in ids else tokenizer.eos_ids[0]


def plain_text(answer: Answer, tools: Tools | None) -> str:
    """Returns an answer to a plain text.

    Raises:
      ValueError: tools, which only a chat template renders.
    """
    if tools:
        raise ValueError(
            "the column 'tools' is for chat messages, but the prompt is plain text, so the model would not see the "
            "tools; set chat.text_as_chat: true, or, if the text has them already, name the column otherwise "
            "(data.columns: {unused: tools})"
        )
    if not isinstance(answer, str):
        raise ValueError("expected chat messages before an answer of chat messages, got plain text")
    return answer


def answer_message(tokenizer: Tokenizer, answer: Answer) -> Message:
    """Returns the assistant's message, without an end of turn in its text, which the template writes.

    Raises:
      ValueError: special tokens in it, or several blocks of thoughts.
    """
    message = {"role": "assistant", "content": answer} if isinstance(answer, str) else without_empty_fields(answer)
    message["content"] = without_end(tokenizer, message["content"])
    for text in all_strings([value for key, value in message.items() if key != "role"]):
        if found := next((token for token in tokenizer.special_tokens if token in text), None):
            raise ValueError(
                f"the answer has the special token {found!r} in its text, where it would be learned as characters; "
                f"the chat template writes these tokens: take it out, or give prompt and completion as plain text, "
                f"rendered already"
            )
    if "think>" in str(tokenizer.hf.chat_template):
        check_thoughts(message)
    return message


def without_end(tokenizer: Tokenizer, text: str) -> str:
    """Returns a text without the special tokens that end a turn at its end, and white space between and behind them."""
    ends = tuple(end for end, token in tokenizer.special_tokens.items() if token in tokenizer.eos_ids)
    while (stripped := text.rstrip()).endswith(ends):
        text = stripped.removesuffix(next(end for end in ends if stripped.endswith(end)))
    return text


def has_thoughts(message: Message) -> bool:
    """Returns whether an answer has thoughts, in a field or in its text."""
    return bool(message.get("reasoning_content")) or "</think>" in message["content"]


def check_thoughts(message: Message) -> None:
    """Checks that an answer has at most one block of thoughts, at its beginning.

    Raises:
      ValueError: it has another one, or one that does not end.
    """
    content = message["content"]
    if message.get("reasoning_content") and re.search("</?think>", content + message["reasoning_content"]):
        raise ValueError("the answer's thoughts stand in reasoning_content, and <think> again; expected one of the two")
    if re.search("</?think>", content) and not ONE_THOUGHT.fullmatch(content):
        raise ValueError(
            f"expected at most one block of thoughts, <think>...</think>, at the beginning of the answer, got "
            f"{content[:80]!r}"
        )


def render_answered(
    tokenizer: Tokenizer, prompt: list[Message], message: Message, tools: Tools | None, thinking: bool | None = None
) -> Rendered:
    """Renders a conversation with its answer.

    Raises:
      ValueError: the template drops the thoughts, another field, or a part of the text.
    """

    def render(message: Message) -> Rendered:
        messages = [*prompt, message]
        return tokenizer.render_messages(messages, tools, add_generation_prompt=False, enable_thinking=thinking)

    whole, content = render(message), message["content"]
    changed = {
        "reasoning_content": message | {"reasoning_content": message.get("reasoning_content", "") + "."},
        "content": message | {"content": content.replace("</think>", ".</think>", 1)},
    }
    if has_thoughts(message) and render(changed["content" if "</think>" in content else "reasoning_content"]) == whole:
        raise ValueError(
            f"the chat template of {tokenizer.path} leaves the answer's thoughts out; expected one that renders "
            f"reasoning_content; take the thoughts out, or give prompt and completion as plain text, rendered already"
        )
    for field in OTHER_FIELDS:
        if message.get(field) and render({key: value for key, value in message.items() if key != field}) == whole:
            raise ValueError(
                f"the chat template of {tokenizer.path} leaves the answer's {field!r} out; expected content, "
                f"reasoning_content and tool_calls; rename it, or take it out"
            )
    said = content.rpartition("</think>")[2].strip()
    if said not in whole.text:
        raise ValueError(
            f"the chat template of {tokenizer.path} does not render the whole answer {said[:80]!r}; give prompt and "
            f"completion as plain text, rendered already"
        )
    return whole
