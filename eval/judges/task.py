"""A judging task: one readable YAML file with the question and the form of the reply.

    answer: json                 # json, choice, closing or score: see below
    labels: [A, B]               # names in a reply for the answer shown first and the one shown second
    aspects: [helpfulness, ...]  # json only: its keys; `overall` must be among them and decides
    ties: true                   # whether "tie" may be a verdict; default: for json only
    range: [0, 9]                # score only: the lowest and the highest score
    max_tokens: 1024             # limit of a reply; null: the server's limit
    system: ...                  # the system message; optional
    user: ...                    # the question, with {prompt}, {first} and {second}; for score {prompt} and {answer}
    reply: ...                   # how to reply: appended to the question; the likelihood back end omits it
    before: {NAME: {system: ..., user: ...}}   # questions about the prompt only; their replies replace {NAME};
                                 # a NAME consists of a-z and _
    reconsider: {answer: closing, system: ..., user: ..., reply: ...}   # asked in both orders where the two verdicts
                                 # contradict each other; {explanation_first}, {explanation_second}: the replies in
                                 # favour of the answer that is now shown first, and of the one shown second

answer:
  json     a JSON object with a label, or "tie", for every aspect
  choice   only a label
  closing  reasoning that ends with `closing`, by default "Therefore, {label} is better."
  score    an integer; each answer is scored alone, and the higher score wins

Substituted values are not searched for placeholders: a completion may contain {second} or any other braces.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train.strict_yaml import load_yaml

TASKS = Path(__file__).parent / "tasks"
FORMS = ("json", "choice", "closing", "score")
OVERALL, TIE = "overall", "tie"
RESERVED = (
    "prompt",
    "first",
    "second",
    "answer",
    "explanation_first",
    "explanation_second",
)  # placeholders with a value
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
KEYS = {
    *("answer", "labels", "aspects", "ties", "range", "max_tokens", "closing"),
    *("system", "user", "reply", "before", "reconsider"),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question for the judge, and the form of its answer."""

    user: str
    system: str = ""
    reply: str = ""  # how to reply; appended to the question
    answer: Literal["json", "choice", "closing", "score", "text"] = "text"
    max_tokens: int | None = 1024

    def messages(self, values: Mapping[str, str], reply: str | None = None) -> list[dict[str, str]]:
        """Chat messages with the placeholders filled in; `reply` replaces the question's own instruction."""
        how = self.reply if reply is None else reply
        user = "\n\n".join(
            part for part in (fill_placeholders(self.user, values), fill_placeholders(how, values)) if part
        )
        system = [{"role": "system", "content": fill_placeholders(self.system, values)}] if self.system else []
        return [*system, {"role": "user", "content": user}]

    @property
    def placeholders(self) -> set[str]:
        return {name for text in (self.system, self.user, self.reply) for name in PLACEHOLDER.findall(text)}


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """A validated task file."""

    name: str
    question: Question
    labels: tuple[str, str] = ("A", "B")
    aspects: tuple[str, ...] = (OVERALL,)
    ties: bool = False
    lowest: int = 0
    highest: int = 9
    closing: str = "Therefore, {label} is better."
    before: dict[str, Question] = field(default_factory=dict)
    reconsider: Question | None = None

    @property
    def answer(self) -> str:
        return self.question.answer

    def of_reconsidering(self) -> "JudgeTask":
        """The task that reads the replies to `reconsider`."""
        if self.reconsider is None:
            raise ValueError(f"{self.name}: this task has no second question")
        return JudgeTask(name=self.name, question=self.reconsider, labels=self.labels, closing=self.closing)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of a reply."""
        values = [*self.labels, *([TIE] if self.ties else [])]
        return {
            "type": "object",
            "properties": {aspect: {"type": "string", "enum": values} for aspect in self.aspects},
            "required": list(self.aspects),
            "additionalProperties": False,
        }

    def exchanged(self, text: str) -> str:
        """Swaps the two labels in a text, which turns a reply into one about the other order."""
        first, second = self.labels
        other = {first: second, second: first}
        return re.sub("|".join(re.escape(label) for label in self.labels), lambda match: other[match[0]], text)


def fill_placeholders(template: str, values: Mapping[str, str]) -> str:
    """Replaces {name} by its value, in one pass; other braces stay unchanged."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def readable(prompt: Any) -> str:
    """Returns a prompt as text; several chat messages are marked with their roles.

    Raises:
      ValueError: neither text nor chat messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
        for message in prompt
    ):
        raise ValueError(f"expected a prompt that is text or a list of chat messages, got {str(prompt)[:60]!r}")
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def load_task(name: str) -> JudgeTask:
    """Loads a built-in task by name, or a task from a YAML file.

    Raises:
      FileNotFoundError: no such task.
      ValueError: a file that is not a task; the message says why.
    """
    known = sorted(file.stem for file in TASKS.glob("*.yaml"))
    file = TASKS / f"{name}.yaml" if name in known else Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"--task {name}: no such file; expected a YAML file, or one of {', '.join(known)}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    values = load_yaml(text, str(file))
    try:
        return read_task(file.stem, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def read_task(name: str, values: Any) -> JudgeTask:
    """Builds and validates a task from the values of a YAML file.

    Raises:
      ValueError: see `load_task`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected 'key: value' lines, got {type(values).__name__}")
    _refuse_unknown(values, KEYS)
    form = values.get("answer", "json")
    if form not in FORMS:
        raise ValueError(f"answer: expected one of {', '.join(FORMS)}, got {form!r}")
    limit = values.get("max_tokens", 1024)
    question = _question(values, form, limit)
    before = {key: _question(value, "text", limit, key) for key, value in _before(values.get("before")).items()}
    again = values.get("reconsider")
    if again is not None and not isinstance(again, dict):
        raise ValueError(f"reconsider: expected a question with user: and so on, got {again!r}")
    second = _question(again, again.get("answer", form), limit, "reconsider") if again is not None else None
    optional = {"closing": values["closing"]} if "closing" in values else {}
    if not isinstance(values.get("closing", ""), str):
        raise ValueError(f"closing: expected a sentence with {{label}} in it, got {values['closing']!r}")
    ties = values.get("ties", form in ("json", "score"))
    if type(ties) is not bool:
        raise ValueError(f"ties: expected true or false, got {ties!r}")
    lowest, highest = _range(values.get("range", [0, 9]))
    task = JudgeTask(
        name=name,
        question=question,
        labels=_labels(values.get("labels", ["A", "B"])),
        aspects=_aspects(values, form, question),
        ties=ties,
        lowest=lowest,
        highest=highest,
        before=before,
        reconsider=second,
        **optional,
    )
    _check_placeholders(task)
    return task


def _question(values: Any, form: Any, limit: int | None, key: str = "") -> Question:
    at = f"{key}." if key else ""
    if not isinstance(values, dict) or not isinstance(values.get("user"), str):
        raise ValueError(f"{at}user: expected the text of a question, got {values if key else values.get('user')!r}")
    if key:
        _refuse_unknown(values, {"system", "user", "reply", "answer", "max_tokens"}, at)
    if key == "reconsider" and form not in ("choice", "closing"):
        raise ValueError(f"reconsider.answer: expected choice or closing, got {form!r}")
    limit = values.get("max_tokens", limit)
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"{at}max_tokens: expected a whole number from 1 on, or null, got {limit!r}")
    texts = {part: values.get(part) or "" for part in ("system", "reply")}
    for part, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{at}{part}: expected text, got {text!r}")
    stripped = {part: text.strip("\n") for part, text in (texts | {"user": values["user"]}).items()}
    return Question(**stripped, answer=form, max_tokens=limit)


def _before(values: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"before: expected 'name: question' lines, got {values!r}")
    for name in values:
        if not isinstance(name, str) or not re.fullmatch("[a-z_]+", name) or name in RESERVED:
            raise ValueError(f"before: expected a name of a-z and _ other than {', '.join(RESERVED)}, got {name!r}")
    return values


def _refuse_unknown(values: Mapping[Any, Any], known: set[str], at: str = "") -> None:
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"unknown key {at}{unknown[0]}; expected some of {', '.join(sorted(known))}")


def _labels(labels: Any) -> tuple[str, str]:
    fine = isinstance(labels, list) and len(labels) == 2 and all(isinstance(label, str) for label in labels)
    if not fine or not all(re.search(r"[0-9A-Za-z]", label) for label in labels):
        raise ValueError(f"labels: expected two names with a letter or a digit, got {labels!r}")
    if labels[0].lower() == labels[1].lower() or TIE in (label.lower() for label in labels):
        raise ValueError(f"labels: expected two names that differ from each other and from {TIE!r}, got {labels!r}")
    if any(one in other for one, other in (labels, labels[::-1])):
        raise ValueError(f"labels: expected two names of which none is a part of the other, got {labels!r}")
    return labels[0], labels[1]


def _aspects(values: Mapping[str, Any], form: str, question: Question) -> tuple[str, ...]:
    if form != "json":
        if "aspects" in values:
            raise ValueError(f"aspects: only with answer: json, got answer: {form}")
        return (OVERALL,)
    aspects = values.get("aspects", [OVERALL])
    if not isinstance(aspects, list) or not all(isinstance(aspect, str) for aspect in aspects):
        raise ValueError(f"aspects: expected names, got {aspects!r}")
    if OVERALL not in aspects or len(set(aspects)) < len(aspects):
        raise ValueError(f"aspects: expected different names with {OVERALL!r} among them, got {aspects!r}")
    for aspect in aspects:
        if not any(aspect in text for text in (question.system, question.user, question.reply)):
            raise ValueError(f"aspects: {aspect!r} is asked for nowhere in system, user or reply")
    return tuple(aspects)


def _range(limits: Any) -> tuple[int, int]:
    fine = isinstance(limits, list) and len(limits) == 2 and all(type(limit) is int for limit in limits)
    if not fine or not 0 <= limits[0] < limits[1]:
        raise ValueError(f"range: expected the least and the best score, such as [0, 9], got {limits!r}")
    return limits[0], limits[1]


def _check_placeholders(task: JudgeTask) -> None:
    """Refuses missing and unknown placeholders."""
    shown = {"answer"} if task.answer == "score" else {"first", "second"}
    inserted = {*task.before}
    parts = [("user", task.question, {"prompt", *shown, *inserted}, set[str]())]
    parts += [(f"before.{name}", question, {"prompt"}, set[str]()) for name, question in task.before.items()]
    if task.reconsider:
        if task.answer not in ("closing", "choice"):
            raise ValueError(f"reconsider: only with answer: closing or choice, got {task.answer}")
        given = {"prompt", *shown, "explanation_first", "explanation_second"}
        parts.append(("reconsider", task.reconsider, given, inserted))
    for name, question, needed, possible in parts:
        if missing := sorted(needed - question.placeholders):
            raise ValueError(f"{name}: {{{missing[0]}}} is missing")
        if unknown := sorted(question.placeholders - needed - possible):
            raise ValueError(
                f"{name}: unknown placeholder {{{unknown[0]}}}; expected {', '.join(sorted(needed | possible))}"
            )
    if "{label}" not in task.closing:
        raise ValueError(f"closing: expected a sentence with {{label}} in it, got {task.closing!r}")
