"""Splits rows into the prompt that is asked and the answer, and applies the config's chat settings."""

from collections.abc import Mapping, Sequence

from models.tokenizer import Prompt
from train.config import ChatConfig
from train.data.rows import Row, require_columns


def prompt_and_answer(row: Row, column: str, where: str) -> tuple[Prompt, str]:
    """Returns the prompt that precedes the answer in `column`, and the answer's text.

    An answer in chat messages is the last message, which must be the assistant's. Some data sets have the prompt twice,
    as a column and as the beginning of the answer's messages; it is taken once. System messages are moved to the front.

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
    return [*system, *new_system, *([] if is_repeated else asked), *turns], answer[-1]["content"]


def _split_system(messages: Prompt) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the leading system messages, and all others."""
    turns: list[dict[str, str]] = list(messages) if isinstance(messages, list) else []
    count = next((i for i, message in enumerate(turns) if message["role"] != "system"), len(turns))
    return turns[:count], turns[count:]


def _role_and_text(message: Mapping[str, str]) -> tuple[str, str]:
    return message["role"], message["content"].strip()


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


def prompts_and_answers(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig
) -> tuple[list[Prompt], list[str]]:
    """Returns each row's prompt, with the chat settings applied, and each row's answer in `column`."""
    places = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    pairs = [prompt_and_answer(row, column, where) for row, where in zip(rows, places, strict=True)]
    prompts = [as_chat(prompt, chat, where) for (prompt, _), where in zip(pairs, places, strict=True)]
    return prompts, [answer for _, answer in pairs]


def normalize_prompts(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig, setting: str = "the config"
) -> list[Row]:
    """Returns the rows with the prompts in `column` checked, cut before a final answer, and the chat settings applied.

    See `require_columns`, `without_answer` and `as_chat`.
    """
    require_columns(rows, source, column, setting=setting)
    places = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    return [
        row | {column: as_chat(without_answer(row[column], where), chat, where)}
        for row, where in zip(rows, places, strict=True)
    ]


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
