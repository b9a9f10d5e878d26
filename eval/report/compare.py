"""`python -m eval compare`: two policies on the same prompts, judged by a reward model that trained neither.

At every common validation step: the win rate of A over B with its interval over prompts, and each policy's mean judge
score and training reward. Over the steps: each policy's paired gain, last minus first, and the step at which it reaches
the other's final score. Also shown: results of `eval judge` on texts of the two.
Writes OUT/compare.json, OUT/compare.md, OUT/tables/*.tex, OUT/figures/*.png and *.svg, and the judge's scores to
OUT/scores/NAME/; a repeated call reuses scores that are not older than the completions and the judge.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.report import judged_tables
from eval.report.judged import read_judged
from eval.report.steps import steps_to_each_end
from eval.report.tables import by_step, policies, rewards_by_step, steps_to_reach
from eval.runs import CompletionTable, PolicyRun, same_model
from eval.sheets import Sheet, markdown_text
from eval.stats import (
    CONFIDENCE,
    MIN_PROMPTS,
    RESAMPLES,
    mean_and_error,
    paired_gain,
    prompt_means,
    same_text_same_score,
    summary,
    win_rates,
    without_nan,
)
from eval.texts.score import score_rows
from models.checkpoint import checkpoints_folder, find_step, is_run
from models.names import split_step
from train.build import make_layout_for
from train.config import MeshConfig
from train.console import console
from train.data.rows import Row, load_rows
from train.parse import parse
from train.rewards.model import RewardModelScorer
from train.run.files import check_out_directory, write_jsonl, write_whole
from train.running import setup_errors

COMPARE_JSON, SCORES, JUDGE_SCORE = "compare.json", "scores", "judge_score"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Two policies on the same prompts, judged by a reward model that neither was trained against."""

    run_a: str  # a run of `train policy`
    run_b: str  # another one with the same validation prompts
    judge: str  # a reward model that neither was trained against: a run, a Hugging Face directory or Hub name
    out: str  # the directory to write
    name_a: str | None = None  # in tables and pictures; default: the run's directory
    name_b: str | None = None  # in tables and pictures; default: the run's directory
    judged: tuple[str, ...] = ()  # what `eval judge` wrote to --out about texts of these two runs, to be shown too
    seed: int = 0  # of the bootstrap
    max_length: int = 4096  # of prompt and completion together, in the judge's tokens
    batch_prompts: int = 32  # prompts judged at a time
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the judge's computation

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("max_length", 1), ("batch_prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def parse_compare(arguments: list[str]) -> CompareConfig:
    return parse(CompareConfig, arguments, "python -m eval compare", positional=("run_a", "run_b"))


def compare(config: CompareConfig) -> dict[str, Any]:
    """Writes the comparison to `config.out`; returns the content of compare.json.

    Raises:
      SetupError: the runs cannot be compared, or the judge is no reward model or a policy was trained against it.
    """
    with setup_errors():
        check_out_directory(config.out, COMPARE_JSON, "compare.md", "tables/x.tex", "figures/x.png", f"{SCORES}/x")
        runs = (PolicyRun.open(config.run_a, config.name_a), PolicyRun.open(config.run_b, config.name_b))
        check_names(runs)
        check_judge(config.judge, runs)
        steps = common_steps(runs)
        tables = {run.name: {step: run.completions(step) for step in steps} for run in runs}
        check_prompts(runs, tables)
        judged = [read_judged(folder, runs) for folder in config.judged]
        judge = JudgeScores(config, runs)
        scores = {run.name: {step: judge.scores(run, step, tables[run.name][step]) for step in steps} for run in runs}
    result: dict[str, Any] = {
        "a": runs[0].name,
        "b": runs[1].name,
        "judge": config.judge,
        "prompts": len(tables[runs[0].name][steps[0]].groups),
        "seed": config.seed,
        "interval": f"bootstrap over prompts, BCa, {100 * CONFIDENCE:.0f} %, {RESAMPLES} resamples; Wilson's score "
        f"interval where all prompts agree, or there are fewer than {MIN_PROMPTS}",
        "win_rate": [win_rate_at_step(config.seed, step, runs, tables, scores) for step in steps],
        "runs": {run.name: describe_policy(run, tables[run.name], scores[run.name]) for run in runs},
        "steps_to_reach": mutual_reach(config.seed, runs, tables, scores),
        "judged": judged,
    }
    result = without_nan(result)
    write_comparison(result, Path(config.out))
    return result


def write_comparison(result: dict[str, Any], out: Path) -> None:
    """Writes compare.json, compare.md, tables/ and figures/; prints the main tables."""
    from eval.report.compare_plots import comparison_pictures, judged_pictures  # slow (matplotlib): after all checks

    write_whole(out / COMPARE_JSON, json.dumps(result, indent=2, allow_nan=False) + "\n")
    main_sheets = [policies(result["runs"]), by_step(result), steps_to_reach(result)]
    judged = judged_tables.all_of(result)
    sheets = [*main_sheets, rewards_by_step(result["runs"]), *judged]
    pictures = comparison_pictures(out / "figures", result, result["runs"])
    pictures += judged_pictures(out / "figures", result, result["judged"])
    write_tables(out / "tables", sheets)
    headline = markdown_text(f"{result['a']} against {result['b']}, judged by {result['judge']}")
    text = "\n".join(f"## {markdown_text(sheet.title)}\n\n{sheet.markdown()}" for sheet in sheets)
    drawn = "".join(
        f"\n## {title}\n\n![{title}](figures/{p.name}.png)\n\n{markdown_text(p.caption)}\n"
        for p in pictures
        for title in [markdown_text(p.title)]
    )
    write_whole(out / "compare.md", f"# {headline}\n\n{text}{drawn}")
    printed = [*main_sheets, *(sheet.first(4) for sheet in judged[:1])]  # as wide as a terminal
    console.print(*(sheet.rich() for sheet in printed), f"{out / COMPARE_JSON}", sep="\n")


def write_tables(folder: Path, sheets: Sequence[Sheet]) -> None:
    """Writes FOLDER/NAME.tex of each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for sheet in sheets:
        write_whole(folder / f"{sheet.name}.tex", sheet.latex())


def check_names(runs: Sequence[PolicyRun]) -> None:
    if runs[0].name == runs[1].name:
        raise ValueError(f"both runs are called {runs[0].name!r}; tell them apart with --name_a and --name_b")
    for run in runs:
        if not run.name or "/" in run.name or run.name.startswith("."):
            raise ValueError(f"name {run.name!r}: expected one that can be a directory's name")


def check_judge(judge: str, runs: Sequence[PolicyRun]) -> None:
    for run in runs:
        for model in run.reward_models():
            if same_model(judge, model):
                raise ValueError(
                    f"--judge {judge}: {run.path} was trained against this reward model, so its score says nothing "
                    f"about whether the policy got better; give a reward model that no policy was trained against"
                )


def common_steps(runs: Sequence[PolicyRun]) -> list[int]:
    steps = sorted(set(runs[0].steps) & set(runs[1].steps))
    if not steps:
        raise ValueError(
            f"{runs[0].path} and {runs[1].path} have no validation step in common: "
            f"{', '.join(map(str, runs[0].steps))} and {', '.join(map(str, runs[1].steps))}; "
            f"give both the same validation.every"
        )
    return steps


def check_prompts(runs: Sequence[PolicyRun], tables: dict[str, dict[int, CompletionTable]]) -> None:
    """Refuses files with different prompts under the same ids."""
    files = [(run.file(step), table.prompts) for run in runs for step, table in tables[run.name].items()]
    first, expected = files[0]
    for file, prompts in files[1:]:
        differing = [i for i in {**expected, **prompts} if expected.get(i) != prompts.get(i)]
        if differing:
            i = min(differing)
            raise ValueError(
                f"{first} and {file}: {len(differing)} prompts differ, e.g. prompt_id {i}: {expected.get(i)!r} and "
                f"{prompts.get(i)!r}; compare runs that validated on the same prompts"
            )


class JudgeScores:
    """The judge's scores of completions, stored in OUT/scores; loads the judge at the first missing score."""

    def __init__(self, config: CompareConfig, runs: Sequence[PolicyRun]) -> None:
        self.config, self.folder = config, Path(config.out) / SCORES
        if config.batch_prompts < 1 or config.max_length < 1:
            raise ValueError("batch_prompts, max_length: expected at least 1")
        self.layout = make_layout_for(MeshConfig(), config.batch_prompts)
        self.changed = last_change(config.judge)
        self.scorer: RewardModelScorer | None = None
        self._forget_others(runs)

    def _forget_others(self, runs: Sequence[PolicyRun]) -> None:
        """Deletes stored scores of another judge, other settings, or other runs under the same names."""
        about = {
            "judge": self.config.judge,
            "dtype": self.config.dtype,
            "max_length": self.config.max_length,
            "runs": {run.name: str(run.path) for run in runs},
        }
        file = self.folder / "about.json"
        if _read_note(file) != about:
            self.scorer = self._load()  # before deleting: loading fails if it is not a reward model
            for old in self.folder.glob("*/validation_*.jsonl"):
                old.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def scores(self, run: PolicyRun, step: int, table: CompletionTable) -> list[float | None]:
        """One score per row of a run's completions at a step."""
        source = run.file(step)
        file = self.folder / run.name / source.name
        if not file.is_file() or file.stat().st_mtime < max(source.stat().st_mtime, self.changed):
            scorer = self.scorer = self.scorer or self._load()
            scored = score_rows(scorer, table.rows, table.groups)
            write_jsonl(file, [{**row, JUDGE_SCORE: s} for row, s in zip(table.rows, scored, strict=True)])
        return [row[JUDGE_SCORE] for row in read_scores(self.config.out, run.name, step)]

    def _load(self) -> RewardModelScorer:
        return RewardModelScorer(
            self.config.judge,
            layout=self.layout,
            dtype=self.config.dtype,
            max_length=self.config.max_length,
            batch_prompts=self.config.batch_prompts,
        )


def _read_note(file: Path) -> Any:
    """Reads about.json; None if it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def read_scores(out: str | Path, name: str, step: int) -> list[Row]:
    """Loads a run's completions at a step with their judge scores."""
    return load_rows(str(Path(out) / SCORES / name / f"validation_{step:06d}.jsonl"))


def last_change(model: str) -> float:
    """Time of the last change to a model's weights; 0 for a name on the Hub."""
    directory = Path(split_step(model)[0])
    if is_run(model):
        run, step = find_step(model)
        return (checkpoints_folder(run) / str(step)).stat().mtime
    return max((file.stat().st_mtime for file in directory.glob("*.safetensors")), default=0.0)


def win_rate_at_step(
    seed: int,
    step: int,
    runs: Sequence[PolicyRun],
    tables: dict[str, dict[int, CompletionTable]],
    scores: dict[str, dict[int, list[float | None]]],
) -> dict[str, Any]:
    """Win rate of A over B at one step."""
    table_a, table_b = (tables[run.name][step] for run in runs)
    judged = (table.grouped(scores[run.name][step]) for run, table in zip(runs, (table_a, table_b), strict=True))
    return {"step": step, **summary(win_rates(*same_text_same_score(table_a.texts, table_b.texts, *judged)), seed)}


def mutual_reach(
    seed: int,
    runs: Sequence[PolicyRun],
    tables: dict[str, dict[int, CompletionTable]],
    scores: dict[str, dict[int, list[float | None]]],
) -> list[dict[str, Any]]:
    """The steps at which each run reaches the other's final score: by the judge, and by the reward if both share it."""
    judge = {
        run.name: {step: prompt_means(table.grouped(scores[run.name][step])) for step, table in by_step.items()}
        for run, by_step in ((run, tables[run.name]) for run in runs)
    }
    reward = {run.name: {step: table.means("reward") for step, table in tables[run.name].items()} for run in runs}
    same = runs[0].config.get("rewards") == runs[1].config.get("rewards")
    return steps_to_each_end(({"reward": reward} if same else {}) | {"judge": judge}, seed)


def describe_policy(
    run: PolicyRun, tables: dict[int, CompletionTable], scores: dict[int, list[float | None]]
) -> dict[str, Any]:
    """A policy's scores at its steps, and its paired gains from the first to the last."""
    reward_P = {step: table.means("reward") for step, table in tables.items()}
    judge_P = {step: prompt_means(table.grouped(scores[step])) for step, table in tables.items()}
    first, last = min(tables), max(tables)
    return {
        "path": str(run.path),
        "advantage": run.config.get("advantage"),
        "reward_models": run.reward_models(),
        "steps": [
            {
                "step": step,
                "reward": mean_and_error(reward_P[step]),
                "judge": mean_and_error(judge_P[step]),
                "mean_length": float(table.means("length").mean()),
                "distinct_completions": table.distinct(),
            }
            for step, table in tables.items()
        ],
        "gain": {
            "from_step": first,
            "to_step": last,
            "reward": paired_gain(reward_P[first], reward_P[last]),
            "judge": paired_gain(judge_P[first], judge_P[last]),
        },
    }
