"""Python functions as rewards: found by name, given what they have parameters for."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from models.tokenizer import Prompt
from train import dotted
from train.processes import gather

# (prompts, completions_PG, columns, completion_ids_PG) of a process' share -> rewards_PG of all
Scorer = Callable[..., np.ndarray]
TokenIds = Sequence[Sequence[list[int]]]  # of each completion, [P, G]
STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")  # what every reward function may ask for
# Names without a dot. They are texts, so that a reward's packages are imported only where it is used.
BUILT_IN = {
    "length": "train.rewards.builtin.length",
    "format_match": "train.rewards.builtin.format_match",
    "repetition_penalty": "train.rewards.builtin.repetition_penalty",
    "soft_overlong_punishment": "train.rewards.builtin.soft_overlong_punishment",
    "rouge": "train.rewards.builtin.rouge",
    "judge": "train.rewards.judge.judge",
    "ifeval": "train.rewards.ifeval.strict",
}
MACHINE_DEPENDENT = ("judge", "ifeval")  # need a key in the environment, or data that are downloaded


def completion_ids(tokens_PGT: np.ndarray, lengths_PG: np.ndarray) -> list[list[list[int]]]:
    """The tokens of each completion, the end-of-text token included, as lists."""
    return [
        [row[:length].tolist() for row, length in zip(*group, strict=True)]
        for group in zip(np.asarray(tokens_PGT), np.asarray(lengths_PG), strict=True)
    ]


def load_function(name: str) -> Callable[..., Any]:
    """A built-in reward, or the function at a dotted path.

    Raises:
      ValueError: no such module or function.
    """
    if name not in BUILT_IN and "." not in name:
        raise ValueError(
            f"rewards.function: {name}: cannot be imported; expected a dotted path, or one of {', '.join(BUILT_IN)}"
        )
    return dotted.import_function(BUILT_IN.get(name, name), "rewards.function")


class RewardSignature:
    """What a reward function has parameters for."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Refuses options that the function does not have."""
        self.name, parameters = name, inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        dotted.check_options(options, dotted.option_names(function), "rewards.options", name)
        self.options = options.keys() | {p.name for p in named if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        self.accepted = {p.name for p in named} - self.options
        self.columns = [
            p.name for p in named if p.default is p.empty and p.name not in {*self.options, *STANDARD_ARGUMENTS}
        ]

    def check_columns(self, data_columns: Collection[str]) -> None:
        for column in self.columns:
            if column not in data_columns:
                raise ValueError(
                    f"rewards.function: {self.name} needs {column!r}, which is neither a column of the data "
                    f"({', '.join(data_columns) or 'it has none beside the prompt'}) nor among its options"
                )

    def select_kwargs(self, known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """What it gets of all that is known."""
        return {
            key: values
            for key, values in known.items()
            if key in self.accepted or (self.takes_all and key not in self.options)
        }


def function_scorer(
    name: str,
    options: Mapping[str, Any] | None = None,
    data_columns: Collection[str] | None = None,
    *,
    runs_here: bool = True,
) -> Scorer:
    """A reward function f(prompts, completions, **columns) -> list[float | None] (TRL's signature).

    It is called with one entry per completion: a prompt and its columns are repeated G times. It gets what it has
    parameters for; with ** all columns. Keyword-only parameters are its options, those with a default never columns.

    Args:
      name: of a built-in reward, or a dotted path.
      data_columns: names that the data has; None: not known.
      runs_here: whether it is to run on this machine, which then must have what `OF_MACHINE` need.

    Raises:
      ValueError: no such function or option, or a parameter without a value.
    """
    function, options = load_function(name), dict(options or {})
    signature = RewardSignature(name, function, options)
    if data_columns is not None:
        signature.check_columns(data_columns)
        if name in BUILT_IN and (
            runs_here or name not in MACHINE_DEPENDENT
        ):  # without completions it says what it lacks: a package, a key, a sensible option
            nothing: dict[str, list[Any]] = {column: [] for column in [*data_columns, *STANDARD_ARGUMENTS]}
            try:
                function(**signature.select_kwargs(nothing), **options)
            except ImportError as error:
                raise ValueError(f"rewards.function: {name}: {error}; pip install -e '.[eval]'") from error

    def score(
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        P, G = len(prompts), len(completions_PG[0])
        of_prompts = dict.fromkeys(signature.columns, [None] * P) | columns | {"prompts": prompts}
        known = {key: [value for value in values for _ in range(G)] for key, values in of_prompts.items()}
        known["completions"] = [text for group in completions_PG for text in group]
        if completion_ids_PG is not None:
            known["completion_ids"] = [ids for group in completion_ids_PG for ids in group]
        values = function(**signature.select_kwargs(known), **options)
        if len(values) != P * G:
            raise ValueError(f"{name}: expected {P * G} rewards, one per completion, got {len(values)}")
        rewards = np.array([np.nan if value is None else value for value in values], np.float32)
        if np.isinf(rewards).any():
            raise ValueError(f"{name}: expected finite rewards, or None for what cannot be scored, got an infinite one")
        return gather(rewards.reshape(P, G))

    return score
