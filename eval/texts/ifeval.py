"""`python -m eval ifeval`: shares of prompts and of instructions that responses follow, strictly and loosely.

  prompt_strict = mean over responses of [all of the prompt's instructions are followed]
  instruction_strict = instructions followed / instructions, over all responses together; *_loose in the same way

Loose checks also accept a response whose variant without "*", without its first line or without its last line follows.
Several responses to a prompt are averaged.
Standard errors are over prompts, for a ratio of sums: with y_p of n_p instructions followed on prompt p,
s.e. = sqrt(P / (P - 1) * sum_p (y_p - accuracy n_p)^2) / sum_p n_p.

References:
  Zhou et al., Instruction-Following Evaluation for Large Language Models, https://arxiv.org/abs/2311.07911.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.sheets import Sheet, number
from eval.texts.rows import (
    map_rows,
    prompt_text,
    response_text,
    rows_by_temperature,
    squeeze_blanks,
    write_json,
)
from train.console import console
from train.data.rows import Row, load_rows
from train.parse import parse
from train.rewards.ifeval import Arguments, check_instructions, load_verifiers, outcomes
from train.run.files import check_out
from train.running import setup_errors

PROMPTS = Path(__file__).parents[2] / "data" / "ifeval" / "input_data.jsonl.gz"
ACCURACIES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")


@dataclass(frozen=True, kw_only=True)
class IfevalConfig:
    """How well instructions are followed, strictly and loosely."""

    responses: str  # JSONL (.gz too): prompt (text or chat messages) and response, or completion; null: empty
    out: str  # the JSON file to write
    data: str | None = None  # google/IFEval's columns; default: its 541 prompts. Rows with instructions keep their own


class InstructedPrompt(NamedTuple):
    """A prompt with its instructions: `names` and their keyword `arguments`."""

    key: Any
    prompt: str
    names: Sequence[str]
    arguments: Arguments


class CheckedResponse(NamedTuple):
    key: Any
    names: Sequence[str]
    strict: list[bool]
    loose: list[bool]


def parse_ifeval(arguments: list[str]) -> IfevalConfig:
    return parse(IfevalConfig, arguments, "python -m eval ifeval")


def measure_ifeval(config: IfevalConfig) -> dict[str, Any]:
    """Writes the accuracies and each row's outcomes to `config.out`, and returns them.

    Raises:
      SetupError: unreadable responses, or responses to prompts without known instructions.
    """
    with setup_errors():
        check_out(config.out, config.responses, *([config.data] if config.data else []))
        load_verifiers()
        rows = load_rows(config.responses)
        data = InstructionData(config.data or str(PROMPTS))
        texts: list[str] = map_rows(rows, config.responses, response_text)
        asked = data.instructions(rows, config.responses)
        answers = map_rows(list(zip(asked, texts, strict=True)), config.responses, check_response)
    result = {
        "responses": config.responses,
        **accuracies(answers),
        "empty": sum(not text.strip() for text in texts),
        "unanswered": data.unanswered(asked),
        "types": dict(sorted(by_type(answers).items())),
        "temperatures": {
            name: accuracies([answers[i] for i in part]) for name, part in rows_by_temperature(rows).items()
        },
        "rows": [{"key": answer.key, "strict": answer.strict, "loose": answer.loose} for answer in answers],
    }
    write_json(config.out, result)
    print_ifeval(result, config.out)
    return result


def check_response(prompt_and_response: tuple[InstructedPrompt, str]) -> CheckedResponse:
    prompt, response = prompt_and_response
    return CheckedResponse(prompt.key, prompt.names, *outcomes(prompt.prompt, response, prompt.names, prompt.arguments))


class InstructionData:
    """The prompts of IFEval with their instructions, looked up by text."""

    def __init__(self, source: str) -> None:
        self.source = source
        rows = load_rows(source)
        names = ("key", "prompt", "instruction_id_list", "kwargs")
        missing = [(i, name) for i, row in enumerate(rows, 1) for name in names if row.get(name) is None]
        if missing:
            raise ValueError(f"{source}: row {missing[0][0]} has no {missing[0][1]!r}; expected {', '.join(names)}")
        texts = map_rows(rows, source, prompt_text)
        map_rows(rows, source, lambda row: check_instructions(row["instruction_id_list"], row["kwargs"]))
        lists = (
            (row["key"], text, row["instruction_id_list"], row["kwargs"]) for row, text in zip(rows, texts, strict=True)
        )
        self.asked = [InstructedPrompt(*given) for given in lists]
        self._exact = {one.prompt: one for one in self.asked}
        self._squeezed = {squeeze_blanks(one.prompt): one for one in self.asked}

    def find(self, prompt: str) -> InstructedPrompt | None:
        """Looks up a prompt by its exact text, else by its text up to white space."""
        return self._exact.get(prompt) or self._squeezed.get(squeeze_blanks(prompt))

    def instructions(self, rows: Sequence[Row], source: str) -> list[InstructedPrompt]:
        """The instructions of each row: from its own columns, else by its prompt's text.

        Raises:
          ValueError: unknown prompts, or invalid instructions in a row's own columns.
        """
        prompts: list[str] = map_rows(rows, source, prompt_text)
        own: list[InstructedPrompt | None] = map_rows(rows, source, self._own)
        prompts_of_rows = [row_prompt or self.find(text) for row_prompt, text in zip(own, prompts, strict=True)]
        unknown = [i for i, prompt in enumerate(prompts_of_rows) if prompt is None]
        if unknown:
            raise ValueError(
                f"{source}: {len(unknown)} of {len(rows)} prompts are not in {self.source}, the first in row "
                f"{unknown[0] + 1}: {prompts[unknown[0]][:80]!r}; expected prompts of IFEval, or rows with their own "
                f"instruction_id_list and kwargs, or --data FILE with them"
            )
        return [prompt for prompt in prompts_of_rows if prompt is not None]

    @staticmethod
    def _own(row: Row) -> InstructedPrompt | None:
        names, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not names or arguments is None:
            return None
        check_instructions(names, arguments)
        key = next((row[name] for name in ("key", "prompt_id") if row.get(name) is not None), None)
        return InstructedPrompt(key, prompt_text(row), names, arguments)

    def unanswered(self, asked: Sequence[InstructedPrompt]) -> int | None:
        """Number of prompts without a response; None if a response is to another prompt."""
        prompts = [self.find(prompt.prompt) for prompt in asked]
        if any(prompt is None for prompt in prompts):
            return None
        return len(self.asked) - len({prompt.prompt for prompt in prompts if prompt is not None})


def accuracies(answers: Sequence[CheckedResponse]) -> dict[str, Any]:
    """The four accuracies, their standard errors, and counts."""
    outcomes = [(answer.strict, answer.loose) for answer in answers]
    keys = [str(answer.key) for answer in answers]
    counts = [len(answer.names) for answer in answers]
    followed: dict[str, tuple[list[int], list[int]]] = {}
    for j, kind in enumerate(("strict", "loose")):
        followed[f"prompt_{kind}"] = [int(all(pair[j])) for pair in outcomes], [1] * len(answers)
        followed[f"instruction_{kind}"] = [sum(pair[j]) for pair in outcomes], counts
    return {
        **{name: sum(followed[name][0]) / sum(followed[name][1]) for name in ACCURACIES},
        "standard_errors": {name: ratio_error(*followed[name], keys) for name in ACCURACIES},
        "count": len(answers),
        "prompts": len(set(keys)),
        "instructions": sum(counts),
    }


def ratio_error(parts: Sequence[int], wholes: Sequence[int], keys: Sequence[str]) -> float | None:
    """Standard error of sum(parts) / sum(wholes) over clusters of equal keys; None for a single cluster."""
    _, cluster = np.unique(keys, return_inverse=True)
    y_P, n_P = np.bincount(cluster, parts), np.bincount(cluster, wholes)
    if len(y_P) < 2:
        return None
    residual_P = y_P - y_P.sum() / n_P.sum() * n_P
    return math.sqrt(len(y_P) / (len(y_P) - 1) * (residual_P**2).sum()) / float(n_P.sum())


def by_type(answers: Sequence[CheckedResponse]) -> dict[str, dict[str, float]]:
    """Share of each instruction type that is followed, and of each family (the name before the colon)."""

    def outcomes_by_type() -> Iterator[tuple[str, bool, bool]]:
        for answer in answers:
            for name, strict, loose in zip(answer.names, answer.strict, answer.loose, strict=True):
                yield name, strict, loose
                yield name.partition(":")[0], strict, loose

    counts: dict[str, list[int]] = {}
    for name, strict, loose in outcomes_by_type():
        entry = counts.setdefault(name, [0, 0, 0])
        for i, value in enumerate((True, strict, loose)):
            entry[i] += value
    return {name: {"count": n, "strict": s / n, "loose": x / n} for name, (n, s, x) in counts.items()}


def print_ifeval(result: Mapping[str, Any], out: str) -> None:
    def cells(part: Mapping[str, Any]) -> tuple[str, ...]:
        errors = part["standard_errors"]
        return tuple(f"{number(part[name])} ± {number(errors[name])}" for name in ACCURACIES)

    rows = [("all", *cells(result))]
    parts = result["temperatures"] if len(result["temperatures"]) > 1 else {}
    rows += [(f"temperature {name}", *cells(part)) for name, part in parts.items()]
    families = {name: part for name, part in result["types"].items() if ":" not in name}
    title = f"IFEval of {result['responses']}"
    console.print(Sheet(title, ("responses", *(name.replace("_", " ") for name in ACCURACIES)), rows).rich())
    kinds = [(name, str(f["count"]), number(f["strict"]), number(f["loose"])) for name, f in families.items()]
    console.print(Sheet("By kind of instruction", ("kind", "instructions", "strict", "loose"), kinds).rich())
    unanswered = result["unanswered"]
    unanswered_text = "" if unanswered is None else f"{unanswered} prompts unanswered, not counted; "
    console.print(
        f"{out}: {result['count']} responses ({result['empty']} of them empty) to {result['prompts']} prompts with "
        f"{result['instructions']} instructions; {unanswered_text}"
        f"± standard error over prompts",
        markup=False,
    )
