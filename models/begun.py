"""A prompt that ends with the beginning of the assistant's answer: the model continues it, in the same turn."""

from collections.abc import Callable
from typing import Any

from models.marks import Rendered
from models.messages import Message, without_empty_fields

PROBE = "x\ufdd0x"  # a text that no template writes of its own accord
_TEXTS = {"role", "content", "reasoning_content"}


def is_begun(prompt: Any) -> bool:
    """Returns whether a prompt ends with a message of the assistant's that can be continued: of text or thoughts."""
    if isinstance(prompt, str) or not prompt or prompt[-1]["role"] != "assistant":
        return False
    last = without_empty_fields(prompt[-1])
    return last.keys() <= _TEXTS and bool(last["content"] or last.get("reasoning_content"))


def render_begun(prompt: list[Message], render: Callable[..., Rendered]) -> Rendered:
    """Renders a prompt up to where its last message ends: as the template writes an answer that begins so.

    Thoughts that the message begins and does not end stay open.

    Args:
      render: `Tokenizer.render_messages`.

    Raises:
      ValueError: the template does not render the message.
    """
    last = without_empty_fields(prompt[-1])
    text = last["content"]
    is_open = "<think>" in text and "</think>" not in text
    probed = last | {"content": text + PROBE + ("</think>" if is_open else "")}
    rendered = render([*prompt[:-1], probed], add_generation_prompt=False)
    begun, probe, _ = rendered.marked.rpartition(PROBE)
    if not probe:
        raise ValueError(
            f"the chat template does not render the assistant's last message {text[:60]!r}, so it cannot be continued; "
            f"set chat.continue_final_message: false, or give the prompt as plain text, rendered already"
        )
    return Rendered(begun, rendered.mark if rendered.mark and rendered.mark in begun else "")


def with_completion(prompt: list[Message], completion: str) -> list[Message]:
    """Returns the conversation in which the completion goes on with the prompt's last message."""
    last = without_empty_fields(prompt[-1])
    return [*prompt[:-1], last | {"content": last["content"] + completion}]
