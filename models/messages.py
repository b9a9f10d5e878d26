"""Thoughts, tool calls and tools in chat messages: what a chat template would render wrongly or drop is refused."""

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]  # role and content; of an assistant's also reasoning_content and tool_calls
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of an assistant's thoughts
Tools = list[dict[str, Any]]  # JSON schemas of the functions that may be called


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
