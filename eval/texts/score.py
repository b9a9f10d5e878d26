"""`python -m eval reward`: scores completions with a reward model, from JSONL to JSONL, and selects the best of n.

Rows of one prompt_id are one group; group sizes may differ. Best of n: see `eval.texts.best_of`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from eval.runs import by_prompt
from eval.stats import mean_and_error, prompt_means
from eval.texts.best_of import best_of_by_temperature, best_of_sheet, best_rows
from train.build import make_layout_for
from train.config import MeshConfig
from train.console import console
from train.data.rows import Row, load_rows
from train.parse import parse
from train.processes import is_first, share
from train.rewards.model import RewardModelScorer
from train.run.files import check_out, write_jsonl
from train.running import setup_errors


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Completions scored by a reward model."""

    responses: str  # JSONL with prompt_id, prompt, completion, as `python -m eval generate` writes it
    reward_model: str  # a run of `train reward`, RUN@STEP, a Hugging Face directory or Hub name
    out: str  # the JSONL file to write: the same rows with "reward", null where unscorable
    best_of: str | None = None  # a JSONL file for the best row of each prompt at each temperature
    max_length: int = 4096  # of prompt and completion together, in the reward model's tokens
    batch_prompts: int = 32  # prompts scored at a time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    mesh: MeshConfig = field(default_factory=MeshConfig)  # how arrays are split over devices, e.g. data=8,fsdp=1

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


def parse_reward(arguments: list[str]) -> RewardConfig:
    return parse(RewardConfig, arguments, "python -m eval reward")


def reward(config: RewardConfig) -> list[Row]:
    """Writes the scored rows to `config.out`, and returns them.

    Raises:
      SetupError: invalid settings or data, before anything is scored.
    """
    with setup_errors():
        check_out(config.out, config.responses, several=True, rows=True)
        if config.best_of is not None:
            check_out(config.best_of, config.responses, config.out, several=True, rows=True)
        rows = load_rows(config.responses)
        groups = by_prompt(rows, config.responses)
        layout = make_layout_for(config.mesh, config.batch_prompts)
        scorer = RewardModelScorer(
            config.reward_model,
            layout=layout,
            dtype=config.dtype,
            max_length=config.max_length,
            batch_prompts=config.batch_prompts,
        )
    scores = score_rows(scorer, rows, groups)
    scored = [row | {"reward": score} for row, score in zip(rows, scores, strict=True)]
    if is_first():
        write_jsonl(Path(config.out), scored)
    estimate = mean_and_error(prompt_means([[scores[i] for i in group] for group in groups]))
    console.print(
        f"{config.out}: reward {estimate['mean']:.4f} ± {estimate['standard_error']:.4f} (standard error over "
        f"{estimate['prompts']} prompts), {len(rows)} completions, {scores.count(None)} unscorable"
    )
    if config.best_of is not None:
        write_best(scored, config.best_of)
    return scored


def write_best(scored: Sequence[Row], file: str) -> None:
    """Writes the best rows, and prints the expected best of every smaller k."""
    best = best_rows(scored)
    if is_first():
        write_jsonl(Path(file), best)
    console.print(best_of_sheet(best_of_by_temperature(scored)).rich())
    unscorable = sum(row["reward"] is None for row in scored)
    console.print(
        f"{file}: {len(best)} completions, each the best of its prompt's at a temperature; {unscorable} unscorable "
        f"ones left out",
        markup=False,
    )


def score_rows(scorer: RewardModelScorer, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> list[float | None]:
    """One score per row, None where unscorable; groups of equal size are scored together.

    Each process tokenizes its share; every process gets all scores.
    """
    scores: list[float | None] = [None] * len(rows)
    for size in sorted({len(group) for group in groups}):
        same = [group for group in groups if len(group) == size]
        padded = same + same[-1:] * (jax.process_count() - len(same))  # padded: at least one group for each process
        own_groups = padded[share(len(padded))]
        prompts = [rows[group[0]]["prompt"] for group in own_groups]
        rewards_PG = scorer(prompts, [[rows[i]["completion"] for i in group] for group in own_groups])[: len(same)]
        for i, value in zip(np.ravel(same), np.ravel(rewards_PG), strict=True):
            scores[i] = None if math.isnan(value) else float(value)
    return scores
