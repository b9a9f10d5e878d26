"""Chat messages, their thoughts, tool calls and tools: what a template would render wrongly or drop is refused."""

from collections.abc import Callable
from typing import Any

from models.marks import all_strings

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]  # role and content; of an assistant's also reasoning_content and tool_calls
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of an assistant's thoughts
Tools = list[dict[str, Any]]  # JSON schemas of the functions that may be called


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
        if isinstance(message, dict) and message.get("role") == "assistant":
            cleaned = without_empty_fields(message)
            if cleaned.get("tool_calls"):  # a call needs no content
                check_tool_calls(cleaned["tool_calls"])
                message = cleaned
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"expected text or a list of chat messages with role and content, got the message {str(message)[:60]!r}"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"expected a message's role to be one of {', '.join(ROLES)}, got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise ValueError(f"expected a message's content to be text, got {str(message['content'])[:60]!r}")
        for text in all_strings(message):
            check_text(text)


def check_tool_calls(calls: Any) -> None:
    """Checks that every tool call has the name and the arguments that a chat template reads.

    Raises:
      ValueError: one has not.
    """
    for call in calls if isinstance(calls, list) else [calls]:
        function = (call.get("function") or call) if isinstance(call, dict) else {}
        name, arguments = (function.get(key) if isinstance(function, dict) else None for key in ("name", "arguments"))
        if not (isinstance(calls, list) and name and isinstance(name, str) and isinstance(arguments, dict | str)):
            raise ValueError(
                f"expected tool_calls to be a list of {{'function': {{'name': ..., 'arguments': ...}}}}, arguments an "
                f"object or its JSON, got {str(call)[:60]!r}"
            )


def without_empty_fields(message: Message) -> Message:
    """Returns the message without fields that say nothing, and an assistant's thoughts as reasoning_content.

    A template takes an empty reasoning_content for thoughts. `thinking` and `reasoning` are other names of it.

    Raises:
      ValueError: different thoughts under two names, or thoughts that are no text.
    """
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value not in (None, "")}
    if message["role"] == "assistant" and (names := [name for name in THOUGHTS if name in rest]):
        thoughts = [rest.pop(name) for name in names]
        if not isinstance(thoughts[0], str) or any(other != thoughts[0] for other in thoughts):
            raise ValueError(
                f"expected an assistant's thoughts to be one text, in reasoning_content, got {' and '.join(names)}: "
                f"{str(thoughts)[:60]}"
            )
        rest["reasoning_content"] = thoughts[0]
    return {"role": message["role"], "content": "" if content is None else content, **rest}


def check_tools_are_rendered(
    messages: list[Message], tools: Tools | None, text: str, render: Callable[[list[Message], Tools | None], str]
) -> None:
    """Checks that the rendered text would be another one without the tools, the tool calls or the tools' replies.

    Args:
      text: render(messages, tools).

    Raises:
      ValueError: the template ignores one of them.
    """
    without_calls = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
    replies = [m | {"content": m["content"] + "."} if m["role"] == "tool" else m for m in messages]
    for name, changed_messages, changed_tools in (
        ("the column 'tools'", messages, None),
        ("'tool_calls'", without_calls, tools),
        ("messages of the role 'tool'", replies, tools),
    ):
        is_given = changed_messages != messages or (changed_tools is not tools)
        if is_given and render(changed_messages, changed_tools) == text:
            raise ValueError(
                f"the chat template has no place for {name}, so the model would not see them; use a tokenizer whose "
                f"template has one, or leave them out of the data"
            )
