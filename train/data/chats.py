"""Rows as conversations: what is asked, and what is answered."""

from collections.abc import Mapping, Sequence

from models.tokenizer import Prompt
from train.config import ChatConfig
from train.data.rows import Row, require_columns


def prompt_and_answer(row: Row, column: str, where: str) -> tuple[Prompt, str]:
    """What precedes the answer in `column`, and its text; an answer in chat messages ends with the assistant's.

    Some data sets have the prompt twice, as a column and as the beginning of the answer's messages; it is asked once.
    System messages come first, wherever they stood.

    Raises:
      ValueError: it ends with another's message.
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
    more, before = _split_system(answer[:-1])
    twice = [_role_and_text(message) for message in before[: len(asked)]] == [
        _role_and_text(message) for message in asked
    ]
    new = [message for message in more if _role_and_text(message) not in map(_role_and_text, system)]
    return [*system, *new, *([] if twice else asked), *before], answer[-1]["content"]


def _split_system(messages: Prompt) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The system messages at the beginning, and the others."""
    listed: list[dict[str, str]] = list(messages) if isinstance(messages, list) else []
    count = next((i for i, message in enumerate(listed) if message["role"] != "system"), len(listed))
    return listed[:count], listed[count:]


def _role_and_text(message: Mapping[str, str]) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def as_chat(prompt: Prompt, chat: ChatConfig, where: str) -> Prompt:
    """The prompt as it is asked: text in a user's message if that is wanted, the system prompt before it.

    Raises:
      ValueError: a system prompt for plain text, or for messages that have one.
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
    """What precedes each row's answer, as it is asked, and the answers in `column`."""
    wheres = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    pairs = [prompt_and_answer(row, column, where) for row, where in zip(rows, wheres, strict=True)]
    prompts = [as_chat(prompt, chat, where) for (prompt, _), where in zip(pairs, wheres, strict=True)]
    return prompts, [answer for _, answer in pairs]


def normalize_prompts(
    rows: Sequence[Row], source: str, column: str, chat: ChatConfig, setting: str = "the config"
) -> list[Row]:
    """The rows with the column's prompts as they are asked: see `as_chat`, `without_answer`, `require_columns`."""
    require_columns(rows, source, column, setting=setting)
    wheres = [f"{source}: row {number}" for number in range(1, len(rows) + 1)]
    return [
        row | {column: as_chat(without_answer(row[column], where), chat, where)}
        for row, where in zip(rows, wheres, strict=True)
    ]


def without_answer(prompt: Prompt, where: str) -> Prompt:
    """Messages that end with the assistant's are a conversation with its answer: the prompt is what precedes that."""
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return prompt
    if len(prompt) == 1:
        raise ValueError(f"{where}: expected messages that ask something, got the assistant's alone")
    return prompt[:-1]
