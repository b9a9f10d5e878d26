"""Rewards: a reward model or a Python function scores completions; several are weighed and combined.

NaN means unscorable. With one reward such a completion leaves the ranks and the loss; with several, a missing one
leaves only its own part, and a completion that misses all is NaN.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.checkpoint import load_model
from models.hf_weights import split
from models.reward_model import Qwen3RewardModel
from models.sharding import Layout, fetch, to_device, to_host
from models.tokenizer import Prompt, Tokenizer, bucket, tokenizer_path
from train import dotted
from train.config import RewardSpec
from train.processes import gather, gather_lists

# (prompts, completions_PG, columns, completion_ids_PG) of a process' share -> rewards_PG of all
Scorer = Callable[..., np.ndarray]
TokenIds = Sequence[Sequence[list[int]]]  # of each completion, [P, G]
COMBINATIONS: dict[str, Callable[..., np.ndarray]] = {"sum": np.nansum, "mean": np.nanmean, "minimum": np.nanmin}
GIVEN = ("prompts", "completions", "completion_ids")  # what every reward function may ask for
# Names without a dot. They are texts because nothing here may import what is above train.
BUILT_IN = {
    "length": "train.reward_functions.length",
    "format_match": "train.reward_functions.format_match",
    "repetition_penalty": "train.reward_functions.repetition_penalty",
    "soft_overlong_punishment": "train.reward_functions.soft_overlong_punishment",
    "rouge": "train.reward_functions.rouge",
    "judge": "train.judge_reward.judge",
    "ifeval": "eval.ifeval.strict",
}
OF_MACHINE = ("judge", "ifeval")  # need a key in the environment, or data that are downloaded


class Rewards:
    """The rewards of a run, by name."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        layout: Layout | None,
        dtype: str,
        combination: str = "sum",
        columns: Collection[str] | None = None,
    ) -> None:
        """`columns`: those of the data, which functions may ask for; None: not known yet, and not checked."""
        self.weights_R = np.array([spec.weight for spec in specs], np.float32)
        self.combination = combination
        functions = {  # first: what is wrong with one is said before any weight is read
            spec.label: function_scorer(spec.function, spec.options, columns)
            for spec in specs
            if spec.function is not None
        }
        self.scorers: dict[str, Scorer] = {
            spec.label: functions[spec.label]
            if spec.label in functions
            else RewardModelScorer(
                str(spec.model),
                layout=layout,
                dtype=dtype,
                max_length=spec.max_length,
                batch_prompts=spec.batch_prompts,
                offload=spec.offload,
            )
            for spec in specs
        }

    def check(self, prompt: Prompt) -> None:
        """Refuse, before anything is drawn, reward models that cannot read such a prompt.

        Raises:
          ValueError: no chat template for chat messages, or no room for a single token of a completion.
        """
        for name, scorer in self.scorers.items():
            if isinstance(scorer, RewardModelScorer):
                length = len(scorer.tokenizer.conversation_ids([prompt], ["."])[0])
                if length > scorer.max_length:
                    raise ValueError(
                        f"rewards: {name}: a prompt and the completion '.' are {length} tokens of its tokenizer, more "
                        f"than its max_length = {scorer.max_length}, so nothing could be scored; raise it"
                    )

    def score(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        """float32 `rewards_PGR`, every reward apart; NaN = unscorable.

        Where there are several processes each gives its share of the prompts, and all get the rewards of the whole.
        """
        given = (prompts, completions_PG, columns, completion_ids_PG)
        return np.stack([score(*given) for score in self.scorers.values()], -1)

    def combine(self, rewards_PGR: np.ndarray) -> np.ndarray:
        """float32 `rewards_PG`: the weighted rewards that are there, combined; NaN where none is."""
        return combine(rewards_PGR, self.weights_R, self.combination)

    def metrics(self, rewards_PGR: np.ndarray) -> dict[str, float]:
        """rewards/NAME/mean, rewards/NAME/std and rewards/NAME/unscorable, a count; rm/truncated_frac, the share of
        completions, over all reward models, that were longer than a model's max_length: unscorable, not cut."""
        metrics = {}
        is_model_R = [isinstance(scorer, RewardModelScorer) for scorer in self.scorers.values()]
        if any(is_model_R):
            metrics["rm/truncated_frac"] = float(np.isnan(rewards_PGR[..., is_model_R]).mean())
        for r, name in enumerate(self.scorers):
            scored = rewards_PGR[..., r][~np.isnan(rewards_PGR[..., r])]
            metrics[f"rewards/{name}/mean"] = float(scored.mean()) if scored.size else math.nan
            metrics[f"rewards/{name}/std"] = float(scored.std(ddof=1)) if scored.size > 1 else math.nan
            metrics[f"rewards/{name}/unscorable"] = float(rewards_PGR[..., r].size - scored.size)
        return metrics


def combine(rewards_PGR: np.ndarray, weights_R: np.ndarray, combination: str) -> np.ndarray:
    """float32 `rewards_PG`: the weighted rewards that are there, combined; NaN where none is."""
    weighted_PGR = rewards_PGR * weights_R
    missing_PG = np.all(np.isnan(weighted_PGR), axis=-1)
    combined_PG = COMBINATIONS[combination](np.where(np.expand_dims(missing_PG, -1), 0, weighted_PGR), axis=-1)
    return np.where(missing_PG, np.nan, combined_PG).astype(np.float32)


class RewardModelScorer:
    """A reward model with its own tokenizer; what the texts of a group have in common is computed once."""

    def __init__(
        self,
        path: str,
        *,
        layout: Layout | None = None,
        dtype: str = "float32",
        max_length: int = 4096,
        batch_prompts: int = 32,
        offload: bool = False,
    ) -> None:
        model = load_model(path, mesh=layout, dtype=dtype)
        if not isinstance(model, Qwen3RewardModel):
            raise ValueError(f"{path}: expected a reward model ({Qwen3RewardModel.__name__}), got a policy")
        self.tokenizer = Tokenizer(tokenizer_path(path))
        self.tokenizer.check_fits(model.config.vocab_size, path)
        self.layout, self.max_length, self.batch_prompts = layout, max_length, batch_prompts
        graphdef, params = split(model)
        self.params = to_host(params) if offload else params
        self._score = scoring_program(graphdef)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]] | None = None,
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        """float32 rewards [P, G]; NaN for a text longer than max_length, which is neither cut nor given a value."""
        G = len(completions_PG[0])
        repeated = [prompt for prompt in prompts for _ in range(G)]
        rows = self.tokenizer.conversation_ids(repeated, [text for group in completions_PG for text in group])
        rows = gather_lists(rows)
        groups = [rows[start : start + G] for start in range(0, len(rows), G)]
        batches = range(0, len(groups), self.batch_prompts)
        params = to_device(self.params)
        return np.concatenate([self._score_batch(params, groups[i : i + self.batch_prompts]) for i in batches])

    def _score_batch(self, params: Any, groups: Sequence[Sequence[list[int]]]) -> np.ndarray:
        P, G = len(groups), len(groups[0])
        too_long_PG = np.array([[not 0 < len(row) <= self.max_length for row in group] for group in groups])
        groups = [[row[: self.max_length] or [self.tokenizer.pad_id] for row in group] for group in groups]
        shared_P = [common_prefix(group) for group in groups]
        prefix = [group[0][:n] for group, n in zip(groups, shared_P, strict=True)]
        suffix = [row[n:] for group, n in zip(groups, shared_P, strict=True) for row in group]
        # whole batches, always: fewer prompts are filled up, so that their number compiles nothing new
        filler = self.batch_prompts - P
        prefix_PS, prefix_lengths_P = self._pad(prefix + prefix[-1:] * filler)
        suffix_BT, suffix_lengths_B = self._pad(suffix + suffix[-G:] * filler)
        suffix_PGT, suffix_lengths_PG = suffix_BT.reshape(-1, G, suffix_BT.shape[-1]), suffix_lengths_B.reshape(-1, G)
        arrays = (prefix_PS, prefix_lengths_P, suffix_PGT, suffix_lengths_PG)
        placed = [
            self.layout.put(array, axes) if self.layout else array
            for axes, array in zip(SCORED_AXES, arrays, strict=True)
        ]
        rewards_PG = fetch(self._score(params, *placed))[:P]
        return np.where(too_long_PG, np.nan, rewards_PG)

    def _pad(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.full((len(rows), bucket(max(1, int(lengths.max())), self.max_length)), self.tokenizer.pad_id)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
        return tokens.astype(np.int32), lengths


SCORED_AXES = (("prompt", None), ("prompt",), ("prompt", "group", None), ("prompt", "group"))


def scoring_program(graphdef: Any) -> Any:
    """The jitted (params, prefix_PS, prefix_lengths_P, suffix_PGT, suffix_lengths_PG) -> rewards_PG."""
    return jax.jit(partial(_score_group, graphdef))


def _score_group(graphdef: Any, params: Any, *arrays: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).score_group(*arrays)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all rows share, leaving each row at least one token of its own.

    Texts, not tokens, are joined (a template may strip a completion's leading newlines, a tokenizer may merge
    across the seam), so what a group shares is found out, not assumed.
    """
    shortest = min(len(row) for row in rows)
    for i in range(shortest - 1):
        if any(row[i] != rows[0][i] for row in rows[1:]):
            return i
    return max(shortest - 1, 0)


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
    return dotted.load(BUILT_IN.get(name, name), "rewards.function")


class Wanted:
    """What a reward function has parameters for."""

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Refuses options that the function does not have."""
        self.name, parameters = name, inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        dotted.check_options(options, dotted.options(function), "rewards.options", name)
        self.options = options.keys() | {p.name for p in named if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        self.accepted = {p.name for p in named} - self.options
        self.columns = [p.name for p in named if p.default is p.empty and p.name not in {*self.options, *GIVEN}]

    def check_columns(self, data_columns: Collection[str]) -> None:
        for column in self.columns:
            if column not in data_columns:
                raise ValueError(
                    f"rewards.function: {self.name} needs {column!r}, which is neither a column of the data "
                    f"({', '.join(data_columns) or 'it has none beside the prompt'}) nor among its options"
                )

    def chosen(self, known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
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
    wanted = Wanted(name, function, options)
    if data_columns is not None:
        wanted.check_columns(data_columns)
        if name in BUILT_IN and (
            runs_here or name not in OF_MACHINE
        ):  # without completions it says what it lacks: a package, a key, a sensible option
            nothing: dict[str, list[Any]] = {column: [] for column in [*data_columns, *GIVEN]}
            try:
                function(**wanted.chosen(nothing), **options)
            except ImportError as error:
                raise ValueError(f"rewards.function: {name}: {error}; pip install -e '.[eval]'") from error

    def score(
        prompts: Sequence[Prompt],
        completions_PG: Sequence[Sequence[str]],
        columns: dict[str, list[Any]],
        completion_ids_PG: TokenIds | None = None,
    ) -> np.ndarray:
        P, G = len(prompts), len(completions_PG[0])
        of_prompts = dict.fromkeys(wanted.columns, [None] * P) | columns | {"prompts": prompts}
        known = {key: [value for value in values for _ in range(G)] for key, values in of_prompts.items()}
        known["completions"] = [text for group in completions_PG for text in group]
        if completion_ids_PG is not None:
            known["completion_ids"] = [ids for group in completion_ids_PG for ids in group]
        values = function(**wanted.chosen(known), **options)
        if len(values) != P * G:
            raise ValueError(f"{name}: expected {P * G} rewards, one per completion, got {len(values)}")
        rewards = np.array([np.nan if value is None else value for value in values], np.float32)
        if np.isinf(rewards).any():
            raise ValueError(f"{name}: expected finite rewards, or None for what cannot be scored, got an infinite one")
        return gather(rewards.reshape(P, G))

    return score
