"""Splits rows into the prompt that is asked and the answer, and applies the config's chat settings."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from models.begun import is_begun
from models.messages import Message, Tools, without_empty_fields
from models.tokenizer import Prompt
from models.turns import Answer
from train.config import ChatConfig
from train.console import print_plain
from train.data.files import fills_with_nulls
from train.data.rows import Row, require_columns


class Exchange(NamedTuple):
    """What is asked and what is answered, in one row of the data."""

    prompt: Prompt
    answer: Answer
    tools: Tools | None
    where: str  # the row, for an error


def prompt_and_answer(row: Row, column: str, where: str) -> tuple[Prompt, Answer]:
    """Returns the prompt that precedes the answer in `column`, and the answer.

    An answer in chat messages is the last message, which must be the assistant's: its text, or the message if it has
    thoughts or tool calls beside the text. Some data sets have the prompt twice, as a column and as the beginning of
    the answer's messages; it is taken once. System messages are moved to the front.

    Raises:
      ValueError: the last message is not the assistant's.
    """
    prompt, answer = row.get("prompt") or "", row[column]
    if isinstance(answer, str):
        return prompt, answer
    if answer[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: {column!r}: expected messages that end with the assistant's, got {answer[-1]['role']!r}"
        )
    system, asked = _split_system(
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
    )
    answer_system, turns = _split_system(answer[:-1])
    is_repeated = [*map(_role_and_text, turns[: len(asked)])] == [*map(_role_and_text, asked)]
    new_system = [message for message in answer_system if _role_and_text(message) not in map(_role_and_text, system)]
    last = without_empty_fields(answer[-1])
    only_text = last.keys() == {"role", "content"}
    return [*system, *new_system, *([] if is_repeated else asked), *turns], last["content"] if only_text else last


def _split_system(messages: Prompt) -> tuple[list[Message], list[Message]]:
    """Returns the leading system messages, and all others."""
    turns: list[Message] = list(messages) if isinstance(messages, list) else []
    count = next((i for i, message in enumerate(turns) if message["role"] != "system"), len(turns))
    return turns[:count], turns[count:]


def _role_and_text(message: Message) -> tuple[Any, ...]:
    message = without_empty_fields(message)
    return message["role"], message["content"].strip(), message.get("tool_calls") or []


def read_tools(row: Row, where: str, *, has_nulls: bool = False) -> Tools | None:
    """Returns the functions that may be called, from the column 'tools': a list of JSON schemas, or its JSON.

    Args:
      has_nulls: the data is Arrow's, which fills every schema up with the others' keys.

    Raises:
      ValueError: something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        with contextlib.suppress(ValueError, RecursionError):  # ValueError: also of numbers with too many digits
            tools = json.loads(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise ValueError(
            f"{where}: 'tools': expected a list of JSON schemas of functions, or its JSON, got {str(tools)[:60]!r}; "
            f"a column of something else can be named otherwise (data.columns: {{unused: tools}})"
        )
    return without_nulls(tools) if has_nulls else tools


def without_nulls(value: Any) -> Any:
    """Returns nested lists and dictionaries without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_chat(prompt: Prompt, chat: ChatConfig, where: str) -> Prompt:
    """Applies the chat settings to a prompt: text becomes a user's message, the system prompt goes before it.

    Raises:
      ValueError: a system prompt for plain text, or for messages that have one of their own.
    """
    if isinstance(prompt, str) and chat.text_as_chat:
        if not prompt:
            raise ValueError(f"{where}: chat.text_as_chat is set, but there is no prompt; expected a column 'prompt'")
        prompt = [{"role": "user", "content": prompt}]
    if chat.system_prompt is None:
        return prompt
    if isinstance(prompt, str):
        raise ValueError(
            f"{where}: chat.system_prompt is set, but this is plain text; expected chat messages, or "
            f"chat.text_as_chat: true"
        )
    if any(message["role"] == "system" for message in prompt):
        raise ValueError(
            f"{where}: chat.system_prompt is set, but the messages have a system message of their own; expected one "
            f"of them; set chat.system_prompt: null or take it out of the data"
        )
    return [{"role": "system", "content": chat.system_prompt}, *prompt]


def read_exchanges(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig, place: str | None = None
) -> list[Exchange]:
    """Returns each row's prompt, with the chat settings applied, its answer in `column` and its tools.

    Args:
      place: where the rows stand, for an error; default: source.
    """
    has_nulls = fills_with_nulls(source)
    exchanges = []
    for number, row in enumerate(rows, 1):
        where = f"{place or source}: row {number}"
        prompt, answer = prompt_and_answer(without_nulls(row) if has_nulls else row, column, where)
        tools = read_tools(row, where, has_nulls=has_nulls)
        exchanges.append(Exchange(as_chat(prompt, chat, where), answer, tools, where))
    return exchanges


@contextlib.contextmanager
def named_row(where: str) -> Iterator[None]:
    """Puts the row's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def normalize_prompts(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig, setting: str = "the config"
) -> list[Row]:
    """Returns the rows with the prompts in `column` checked, cut before a final answer, and the chat settings applied.

    With `chat.continue_final_message` a final message of the assistant's is where the answer begins, and stays. See
    `require_columns`, `without_answer`, `as_beginning` and `as_chat`.
    """
    require_columns(rows, source, column, setting=setting)
    places = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    if any(isinstance(row.get("tools"), list) and isinstance(row[column], list) and row["tools"] for row in rows):
        print_plain(f"{source}: the column 'tools' goes to reward functions alone: prompts are rendered without tools")
    cut = as_beginning if chat.continue_final_message else without_answer
    cut_rows = [row | {column: cut(row[column], where)} for row, where in zip(rows, places, strict=True)]
    count = sum(cut_row[column] is not row[column] for cut_row, row in zip(cut_rows, rows, strict=True))
    if count and not chat.continue_final_message:
        print_plain(
            f"{source}: {count} of {len(rows)} prompts end with the assistant's message and are asked without it; "
            f"chat.continue_final_message: true continues it"
        )
    return [row | {column: as_chat(row[column], chat, where)} for row, where in zip(cut_rows, places, strict=True)]


def as_beginning(prompt: Prompt, where: str) -> Prompt:
    """Returns a prompt whose final message of the assistant's, if it has one, is to be continued.

    Raises:
      ValueError: there is no message before it, or it has something else than text and thoughts.
    """
    before = without_answer(prompt, where)
    if before is prompt or is_begun(prompt):
        return prompt
    fields = without_empty_fields(prompt[-1]).keys() - {"role", "content"}  # type: ignore[arg-type]
    if fields:
        raise ValueError(
            f"{where}: chat.continue_final_message is set, but the assistant's last message has "
            f"{', '.join(sorted(fields))}; expected the beginning of an answer, which is text alone"
        )
    return before  # an empty message begins nothing


def without_answer(prompt: Prompt, where: str) -> Prompt:
    """Drops a final message of the assistant's: it is the answer, and the prompt is the messages before it.

    Raises:
      ValueError: there is no message before it.
    """
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt
    if len(prompt) == 1:
        raise ValueError(f"{where}: expected messages that ask something, got the assistant's alone")
    return prompt[:-1]
