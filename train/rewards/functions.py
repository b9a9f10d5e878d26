"""Python functions as rewards: imports them by name and calls them with the arguments that their signature asks for.

A function gets copies: what it changes in them changes nothing else. What it may return: `train.rewards.returned`. It
cannot end the run without a word, and where it hangs is said: `train.user_code`.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from models.tokenizer import Prompt
from train.dotted import check_options, import_function, option_names
from train.rewards.returned import RewardError, Scores, check_kind, read_returned
from train.user_code import HangWatch, contained

# (prompts, completions_PG, columns, completion_ids_PG) -> rewards_PG. A reward model, given this process' share of the
# prompts, returns the rewards of all processes.
Scorer = Callable[..., np.ndarray]
TokenIds = Sequence[Sequence[list[int]]]  # [P, G] lists of a completion's tokens
STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids")  # known for any data
# Dotted paths by the names that a config may use. They are strings, so that a reward's packages are imported on use.
BUILT_IN = {
    "length": "train.rewards.builtin.length",
    "format_match": "train.rewards.builtin.format_match",
    "repetition_penalty": "train.rewards.builtin.repetition_penalty",
    "soft_overlong_punishment": "train.rewards.builtin.soft_overlong_punishment",
    "rouge": "train.rewards.builtin.rouge",
    "judge": "train.rewards.judge.judge",
    "ifeval": "train.rewards.ifeval.strict",
}
ROW_CHECKS = {  # functions that refuse rows of the data which a reward cannot score
    "train.rewards.ifeval.strict": "train.rewards.ifeval.check_columns",
    "train.rewards.ifeval.loose": "train.rewards.ifeval.check_columns",
}
MACHINE_DEPENDENT = ("judge", "ifeval")  # they need a key in the environment, or downloaded data


def completion_ids(tokens_PGT: np.ndarray, lengths_PG: np.ndarray) -> list[list[list[int]]]:
    """Returns the tokens of each completion as lists, the end-of-text token included."""
    return [
        [row[:length].tolist() for row, length in zip(*group, strict=True)]
        for group in zip(np.asarray(tokens_PGT), np.asarray(lengths_PG), strict=True)
    ]


def load_function(name: str) -> Callable[..., Any]:
    """Returns a built-in reward, or the function at a dotted path.

    Raises:
      ValueError: no such module or function.
    """
    if name not in BUILT_IN and "." not in name:
        raise ValueError(
            f"rewards.function: {name}: cannot be imported; expected a dotted path, or one of {', '.join(BUILT_IN)}"
        )
    return import_function(BUILT_IN.get(name, name), "rewards.function")


def check_rows(name: str, columns: dict[str, list[Any]]) -> None:
    """Refuses rows of the data that the function `name` cannot score, where it has a check of them.

    Raises:
      ValueError: the first such row.
    """
    check = ROW_CHECKS.get(BUILT_IN.get(name, name))
    if check is not None:
        import_function(check, "rewards.function")(**columns)


def copied(value: Any) -> Any:
    """Returns a deep copy; rows of JSON are copied without `copy.deepcopy`, which takes ten times as long."""
    if isinstance(value, str | int | float | None):
        return value
    if type(value) is list:
        return [copied(item) for item in value]
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    return copy.deepcopy(value)


class RewardSignature:
    """The arguments that a reward function takes.

    Attributes:
      options: parameters that are settings, never columns: those given in the config, and keyword-only ones with a
        default.
      accepted: all other named parameters.
      columns: parameters without a default that only a column of the data can fill.
      takes_all: whether the function has **, and so gets every column but those named like an option.
    """

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """
        Raises:
          ValueError: an option that the function does not have.
        """
        self.name, parameters = name, inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        check_options(options, option_names(function), "rewards.options", name)
        self.options = options.keys() | {p.name for p in named if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        self.accepted = {p.name for p in named} - self.options
        self.columns = [
            p.name for p in named if p.default is p.empty and p.name not in {*self.options, *STANDARD_ARGUMENTS}
        ]

    def check_columns(self, data_columns: Collection[str]) -> None:
        """Refuses data without a column that the function needs."""
        for column in self.columns:
            if column not in data_columns:
                raise ValueError(
                    f"rewards.function: {self.name} needs {column!r}, which is neither a column of the data "
                    f"({', '.join(data_columns) or 'it has none beside the prompt'}) nor among its options"
                )

    def select_kwargs(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those columns, standard arguments among them, that the function takes."""
        return {
            name: values
            for name, values in columns.items()
            if name in self.accepted or (self.takes_all and name not in self.options)
        }


def function_scorer(
    name: str,
    options: Mapping[str, Any] | None = None,
    data_columns: Collection[str] | None = None,
    *,
    runs_here: bool = True,
    report: Callable[[str], None] | None = None,
) -> Scorer:
    """Returns a scorer that calls a reward function f(prompts, completions, **columns) -> list[float | None].

    This is TRL's signature. The function gets one entry per completion: a prompt and its columns are copied G times.
    It gets the columns that it has parameters for, with ** all columns; see `RewardSignature`.

    Args:
      name: name of a built-in reward, or a dotted path.
      data_columns: names of the data's columns; None: not known.
      runs_here: whether the function will run on this machine, so that those in `MACHINE_DEPENDENT` are tried too.
      report: is told why completions have no reward, each time that some have none.

    Raises:
      ValueError: no such function or option, a function of a kind that cannot be called, or a parameter without a
        value.
    """
    function, options = load_function(name), dict(options or {})
    check_kind(name, function)
    signature = RewardSignature(name, function, options)
    watch = HangWatch(f"rewards: {name}", __file__)
    if data_columns is not None:
        signature.check_columns(data_columns)
        if name in BUILT_IN and (runs_here or name not in MACHINE_DEPENDENT):
            # A call without completions finds a missing package, a missing key or a bad option.
            no_rows: dict[str, list[Any]] = {column: [] for column in [*data_columns, *STANDARD_ARGUMENTS]}
            try:
                function(**signature.select_kwargs(no_rows), **options)
            except ImportError as error:
                raise ValueError(f"rewards.function: {name}: {error}; pip install -e '.[eval]'") from error

    def score(
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        P, G = len(prompts), len(completions_PG[0])
        per_prompt = dict.fromkeys(signature.columns, [None] * P) | columns | {"prompts": prompts}
        values = {
            key: [copied(value) for value in column for _ in range(G)]
            for key, column in signature.select_kwargs(per_prompt).items()
        }
        per_completion = {"completions": completions_PG} | (
            {} if completion_ids_PG is None else {"completion_ids": completion_ids_PG}
        )
        for key, column_PG in signature.select_kwargs(per_completion).items():
            values[key] = [copied(value) for group in column_PG for value in group]
        try:
            with contained(f"rewards.function: {name}"), watch():
                returned = function(**values, **copied(options))
                rewards = read_returned(name, returned, P * G)  # calls methods of an object of theirs
        except ValueError as error:
            if BUILT_IN.get(name, name).startswith("train.rewards."):
                raise RewardError(str(error)) from error  # its message says it all; a traceback of yours is for you
            raise
        if report is not None and np.isnan(rewards).any():
            report(returned.why if isinstance(returned, Scores) and returned.why else "it returned None or NaN")
        return rewards.reshape(P, G)

    return score
