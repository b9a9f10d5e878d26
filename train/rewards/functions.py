"""Python functions as rewards: imports them by name and calls them with the arguments that their signature asks for.

A function gets copies: what it changes in them changes nothing else (`train.rewards.call`). What it may return:
`train.rewards.returned`. It cannot end the run without a word, and where it hangs is said: `train.user_code`. Where it
is called: `train.rewards.runners`.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.tokenizer import Prompt
from train.config import RewardSpec
from train.dotted import check_options, import_function, option_names
from train.rewards.call import PROVIDED, Call, CallFailed, Outcome, RewardFunction, merged
from train.rewards.failures import Failures, Moment
from train.rewards.pool import WorkerPool
from train.rewards.returned import check_kind, is_async
from train.rewards.runners import Here, InLoop, InThreads, InWorkers, Runner

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
    "remote": "train.rewards.remote.remote",
}
REMOTE_REQUESTS, REMOTE_SECONDS, REMOTE_RETRIES = 8, 60.0, 3  # of remote: at a time; of each; again
ROW_CHECKS = {  # functions that refuse rows of the data which a reward cannot score
    "train.rewards.ifeval.strict": "train.rewards.ifeval.check_columns",
    "train.rewards.ifeval.loose": "train.rewards.ifeval.check_columns",
}
MACHINE_DEPENDENT = ("judge", "ifeval", "remote")  # they need a key, a server, or downloaded data


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


class RewardSignature:
    """The arguments that a reward function takes.

    Attributes:
      options: parameters that are settings, never columns: those given in the config, and keyword-only ones with a
        default.
      accepted: all other named parameters.
      columns: parameters without a default that only a column of the data can fill.
      provided: those of `PROVIDED` that it has a parameter for, unless its options give them.
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
        self.given_options = dict(options)
        self.provided = [p.name for p in named if p.name in PROVIDED and p.name not in options]
        self.options = options.keys() | {p.name for p in named if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        self.accepted = {p.name for p in named} - self.options
        self.columns = [
            p.name
            for p in named
            if p.default is p.empty and p.name not in {*self.options, *STANDARD_ARGUMENTS, *self.provided}
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


class Scored(NamedTuple):
    """The rewards of a function, and what it has logged for each completion."""

    rewards_PG: np.ndarray
    columns_PG: dict[str, list[list[Any]]]


class FunctionScorer:
    """Calls a reward function f(prompts, completions, **columns) -> list[float | None], by TRL's signature.

    The function gets one entry per completion: a prompt and its columns are copied G times. It gets the columns that it
    has parameters for, with ** all columns; see `RewardSignature`.

    Attributes:
      failures: the calls that gave no rewards.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: RewardSignature,
        spec: RewardSpec,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.name, self._signature, self._spec, self._report = str(spec.function), signature, spec, report
        self.failures = Failures(spec.label, self.name, stops=spec.on_error == "stop")
        self._sums: dict[str, list[float]] = {}  # of log_metric: sum over completions, and their number
        dotted = BUILT_IN.get(self.name, self.name)
        is_ours, retries = dotted.startswith("train.rewards."), spec.retries or 0
        reward = RewardFunction(self.name, function, is_ours=is_ours)
        self._runner: Runner
        if self.name == "remote":
            retries = REMOTE_RETRIES if spec.retries is None else spec.retries
            seconds = REMOTE_SECONDS if spec.timeout_s is None else spec.timeout_s
            self._runner = InThreads(reward, self._calls_at_once, seconds, retries)
        elif spec.workers:
            setup = {"name": self.name, "dotted": dotted, "is_ours": is_ours}
            self._runner = InWorkers(WorkerPool(setup, spec.workers, seconds=spec.timeout_s, retries=retries))
        elif is_async(function):
            self._runner = InLoop(reward, spec.timeout_s, retries)
        else:
            self._runner = Here(reward, retries)

    @property
    def _calls_at_once(self) -> int:
        """0: one call for all completions, in the run's own process."""
        return self._spec.workers or (REMOTE_REQUESTS if self.name == "remote" else 0)

    @property
    def is_in_background(self) -> bool:
        """Whether the calls go on by themselves, while other rewards are computed."""
        return not isinstance(self._runner, Here)

    @property
    def counts_failures(self) -> bool:
        """Whether failed calls are counted, and do not end the run."""
        return self._spec.on_error == "unscorable"

    @property
    def logs(self) -> bool:
        """Whether there may be metrics or columns of this function, or failures to count."""
        return bool(self._signature.provided) or self.counts_failures

    def prepare(self) -> None:
        """Starts the worker processes, so that they import the function while the models are read."""
        if isinstance(self._runner, InWorkers):
            self._runner.pool.start()

    def close(self) -> None:
        """Ends the worker processes."""
        if isinstance(self._runner, InWorkers):
            self._runner.pool.close()

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        """Returns float64 rewards_PG; NaN = unscorable."""
        return self.start(prompts, completions_PG, columns, completion_ids_PG)().rewards_PG

    def start(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
        moment: Moment = Moment(),  # noqa: B008  a tuple
    ) -> Callable[[], Scored]:
        """Begins the calls; returns a function that waits for their end. A function of the run's own process is done.

        Raises (or the returned function does):
          RewardError: the rewards are not what was agreed, or late.
          Exception: what the function raised, unless its failures are counted.
        """
        P, G = len(prompts), len(completions_PG[0])
        at_once = self._calls_at_once
        size = min(self._spec.batch_prompts, -(-P // at_once)) if at_once else P
        parts = [slice(start, min(start + size, P)) for start in range(0, P, size)]
        per_prompt = dict.fromkeys(self._signature.columns, [None] * P) | columns | {"prompts": prompts}
        per_completion: dict[str, Any] = {"completions": completions_PG}
        per_completion |= {} if completion_ids_PG is None else {"completion_ids": completion_ids_PG}
        calls = [self._call(part, per_prompt, per_completion, moment) for part in parts]
        waits = self._runner.start(calls)

        def finish() -> Scored:
            outcomes: list[Outcome | None] = []
            for wait, call, part in zip(waits, calls, parts, strict=True):
                outcome = failure = None
                try:
                    outcome = wait()
                    self._add(outcome, call.size)
                except CallFailed as error:
                    failure = error
                if failure is not None:  # outside of the handler: what is raised has the function's traceback alone
                    rows = failed_rows(prompts[part], completions_PG[part], call.values)
                    self.failures.handle(failure, rows, moment)
                outcomes.append(outcome)
                why = failure.line if failure is not None else outcome and outcome.why
                if why and self._report is not None:
                    self._report(why)
            rewards, logged = merged(outcomes, [call.size for call in calls])
            columns_PG = {
                name: [values[start : start + G] for start in range(0, P * G, G)] for name, values in logged.items()
            }
            return Scored(rewards.reshape(P, G), columns_PG)

        if self.is_in_background:
            return finish
        scored = finish()
        return lambda: scored

    def _call(
        self, part: slice, per_prompt: Mapping[str, Any], per_completion: Mapping[str, Any], moment: Moment
    ) -> Call:
        """Returns the call for some of the prompts."""
        completions_PG = per_completion["completions"][part]
        G = len(completions_PG[0])
        chosen = self._signature.select_kwargs(per_prompt)
        values = {name: [value for value in column[part] for _ in range(G)] for name, column in chosen.items()}
        for name, column_PG in self._signature.select_kwargs(per_completion).items():
            values[name] = [value for group in column_PG[part] for value in group]
        provided = [name for name in self._signature.provided if name not in values]  # a column of the data comes first
        return Call(values, self._signature.given_options, provided, moment.state, G * len(completions_PG))

    def _add(self, outcome: Outcome, count: int) -> None:
        for name, value in outcome.metrics:
            sums = self._sums.setdefault(name, [0.0, 0])
            sums[0] += value * count
            sums[1] += count

    def take_sums(self) -> dict[str, list[float]]:
        """Returns of each metric that was logged its sum over completions and their number, and forgets them."""
        sums, self._sums = self._sums, {}
        return sums


def failed_rows(
    prompts: Sequence[Prompt], completions_PG: Sequence[Sequence[str]], values: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Returns prompt, completion and columns of every completion of a call, to be written."""
    texts = [text for group in completions_PG for text in group]
    repeated = [prompt for prompt, group in zip(prompts, completions_PG, strict=True) for _ in group]
    columns = {name: column for name, column in values.items() if name not in STANDARD_ARGUMENTS}
    return [
        {"prompt": repeated[i], "completion": text} | {name: column[i] for name, column in columns.items()}
        for i, text in enumerate(texts)
    ]


def function_scorer(
    name: str,
    options: Mapping[str, Any] | None = None,
    data_columns: Collection[str] | None = None,
    *,
    runs_here: bool = True,
    report: Callable[[str], None] | None = None,
    spec: RewardSpec | None = None,
) -> FunctionScorer:
    """Returns the scorer of a reward function.

    Args:
      name: name of a built-in reward, or a dotted path.
      data_columns: names of the data's columns; None: not known.
      runs_here: whether the function will run on this machine, so that those in `MACHINE_DEPENDENT` are tried too.
      report: is told why completions have no reward, each time that some have none.
      spec: workers, time limit and the like; default: none of them.

    Raises:
      ValueError: no such function or option, a function of a kind that cannot be called, a parameter without a value,
        or a time limit that cannot be kept.
    """
    function, options = load_function(name), dict(options or {})
    spec = RewardSpec(function=name) if spec is None else spec
    check_kind(name, function)
    if spec.timeout_s is not None and not (spec.workers or is_async(function) or name == "remote"):
        raise ValueError(
            f"rewards.timeout_s: {name} runs in the run's own process, where nothing can end it; set workers: 1 or "
            f"more, or write async def"
        )
    signature = RewardSignature(name, function, options)
    if data_columns is not None:
        signature.check_columns(data_columns)
        if name in BUILT_IN and (runs_here or name not in MACHINE_DEPENDENT):
            # A call without completions finds a missing package, a missing key or a bad option.
            no_rows: dict[str, list[Any]] = {column: [] for column in [*data_columns, *STANDARD_ARGUMENTS]}
            try:
                function(**signature.select_kwargs(no_rows), **options)
            except ImportError as error:
                raise ValueError(f"rewards.function: {name}: {error}; pip install -e '.[eval]'") from error
    return FunctionScorer(function, signature, spec, report)
