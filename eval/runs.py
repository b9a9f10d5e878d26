"""Reads runs of `python -m train policy` for judging: config, metrics, validation completions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats import prompt_means
from models.names import split_commit, split_step
from train.data.rows import Row, load_rows
from train.run.directory import COMPLETIONS, CONFIG
from train.run.metrics_file import read_metrics
from train.strict_yaml import load_yaml


@dataclass(frozen=True)
class PolicyRun:
    """A run of `train policy` that has validated at least once."""

    path: Path
    name: str

    @classmethod
    def open(cls, path: str, name: str | None = None) -> "PolicyRun":
        """Opens a run's directory.

        Raises:
          FileNotFoundError: not a run, or a run without validation completions.
        """
        run = cls(Path(path), name or Path(path).resolve().name)
        if not (run.path / CONFIG).is_file():
            raise FileNotFoundError(f"{path}: not a run; expected a directory with a {CONFIG} in it")
        if not run.steps:
            raise FileNotFoundError(
                f"{path}: no {COMPLETIONS}/validation_*.jsonl in it; expected a run of `train policy` that has "
                f"validated at least once"
            )
        return run

    @cached_property
    def config(self) -> dict[str, Any]:
        return load_yaml((self.path / CONFIG).read_text(encoding="utf-8"), str(self.path / CONFIG)) or {}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        return read_metrics(self.path)

    @cached_property
    def steps(self) -> list[int]:
        """The steps with validation completions."""
        files = (self.path / COMPLETIONS).glob("validation_*.jsonl")
        return sorted(int(match[1]) for file in files if (match := re.fullmatch(r"validation_(\d+)\.jsonl", file.name)))

    def file(self, step: int) -> Path:
        return self.path / COMPLETIONS / f"validation_{step:06d}.jsonl"

    def completions(self, step: int) -> "CompletionTable":
        return CompletionTable.read(self.file(step))

    def reward_models(self) -> list[str]:
        """The reward models this policy was trained against."""
        return [spec["model"] for spec in self.config.get("rewards") or [] if spec.get("model")]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric, at the steps that logged it."""
        points = [(row["step"], row[key]) for row in self.metrics if key in row]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, float), np.array(values, float)


@dataclass(frozen=True)
class CompletionTable:
    """The rows of one completions file, grouped by prompt."""

    rows: list[Row]
    groups: list[list[int]]  # row indices of each prompt, in the order of prompt_id

    @classmethod
    def read(cls, file: Path) -> "CompletionTable":
        return cls.from_rows(load_rows(str(file)), str(file))

    @classmethod
    def from_rows(cls, rows: list[Row], source: str) -> "CompletionTable":
        groups = by_prompt(rows, source)
        return cls(rows, sorted(groups, key=lambda group: rows[group[0]]["prompt_id"]))

    @property
    def prompts(self) -> dict[int, Any]:
        return {self.rows[group[0]]["prompt_id"]: self.rows[group[0]]["prompt"] for group in self.groups}

    @property
    def texts(self) -> list[list[str]]:
        return [[self.rows[i]["completion"] for i in group] for group in self.groups]

    def column(self, name: str) -> list[list[Any]]:
        return self.grouped([row.get(name) for row in self.rows])

    def grouped(self, values: Sequence[Any]) -> list[list[Any]]:
        """Groups values of the rows by prompt."""
        return [[values[i] for i in group] for group in self.groups]

    def means(self, name: str) -> np.ndarray:
        """Mean of a column for each prompt, [P]."""
        return prompt_means(self.column(name))

    def distinct(self) -> float:
        """Share of distinct texts among all completions."""
        return len({row["completion"] for row in self.rows}) / len(self.rows)


def by_prompt(rows: Sequence[Row], source: str) -> list[list[int]]:
    """Row indices of each prompt, in the order of first appearance.

    Raises:
      ValueError: a row without one of the columns, or two prompts under one prompt_id.
    """
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        for column in ("prompt_id", "prompt", "completion"):
            if row.get(column) is None:
                raise ValueError(f"{source}: row {i + 1} has no {column!r}; its columns are {', '.join(row)}")
        group = groups.setdefault(row["prompt_id"], [])
        if group and rows[group[0]]["prompt"] != row["prompt"]:
            raise ValueError(f"{source}: row {i + 1}: prompt_id {row['prompt_id']} stands for two prompts")
        group.append(i)
    return list(groups.values())


def same_model(one: str, other: str) -> bool:
    """Whether two paths or Hub names mean the same model; an @STEP or @COMMIT is ignored."""
    paths = [Path(split_commit(split_step(name)[0])[0]).resolve() for name in (one, other)]
    return paths[0] == paths[1]


def config_differences(runs: Sequence[PolicyRun]) -> dict[str, list[Any]]:
    """Settings in which the runs differ, by dotted key; output_dir is not compared."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    values = {key: [config.get(key) for config in flat] for key in keys if key != "output_dir"}
    return {key: settings for key, settings in values.items() if any(setting != settings[0] for setting in settings)}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [(prefix + key, value)]
    return pairs
