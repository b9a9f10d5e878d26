"""Two policies on the same prompts, judged by a reward model that neither was trained against.

At every validation step that both runs have: the win rate of A over B with its interval over prompts, and each
policy's judge score and trained-against reward. Over the steps: each policy's paired gain, last minus first, and the
step at which it reaches the other one's end. Beside it, verdicts of `eval judge` on texts of the two.
Writes OUT/compare.json, OUT/compare.md, OUT/tables/*.tex, OUT/figures/*.png and *.svg, and the judge's scores to
OUT/scores/NAME/, from which a repeated call takes what is not older than the completions and the judge.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.report import judged_tables
from eval.report.judged import read_judged
from eval.report.steps import both_ways
from eval.report.tables import by_step, policies, rewards_by_step, steps_to_reach
from eval.runs import Arguments, Completions, PolicyRun, same_model
from eval.sheets import Sheet
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
from train.build import make_layout_for
from train.config import MeshConfig
from train.console import console
from train.data.rows import Row, load_rows
from train.rewards.model import RewardModelScorer
from train.run.files import write_jsonl, write_whole
from train.running import setup_errors

RESULT, SCORES, JUDGE_SCORE = "compare.json", "scores", "judge_score"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    run_a: str
    run_b: str
    judge: str
    out: str
    name_a: str | None = None
    name_b: str | None = None
    judged: tuple[str, ...] = ()
    seed: int = 0
    max_length: int = 4096
    batch_prompts: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"


def parse_compare(arguments: list[str]) -> CompareConfig:
    parser = Arguments("compare", "Two policies on the same prompts, judged by a reward model.")
    parser.add_argument("run_a", metavar="RUN_A", help="a run of `train policy`")
    parser.add_argument("run_b", metavar="RUN_B", help="another one with the same validation prompts")
    parser.add_argument("--judge", required=True, help="a reward model that neither was trained against")
    parser.add_argument("--out", required=True, help="the directory to write")
    parser.add_argument("--name_a", help="in tables and pictures; default: the run's directory")
    parser.add_argument("--name_b")
    judged_help = "what `eval judge` wrote to its --out about texts of these two runs, to be shown too"
    parser.add_argument("--judged", metavar="DIR", nargs="+", default=(), help=judged_help)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--max_length", type=int, default=4096, help="of prompt and completion, in the judge's tokens")
    parser.add_argument("--batch_prompts", type=int, default=32, help="prompts judged at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the judge")
    return CompareConfig(**vars(parser.parse_args(arguments)))


def compare(config: CompareConfig) -> dict[str, Any]:
    """Write the comparison to `config.out`; returns what compare.json holds.

    Raises:
      SetupError: runs that cannot be compared, or a judge that cannot judge them.
    """
    with setup_errors():
        runs = (PolicyRun.open(config.run_a, config.name_a), PolicyRun.open(config.run_b, config.name_b))
        check_names(runs)
        check_judge(config.judge, runs)
        steps = common_steps(runs)
        tables = {run.name: {step: run.completions(step) for step in steps} for run in runs}
        check_prompts(runs, tables)
        judged = [read_judged(folder, runs) for folder in config.judged]
        judge = Judge(config, runs)
        scores = {run.name: {step: judge.scores(run, step, tables[run.name][step]) for step in steps} for run in runs}
    result: dict[str, Any] = {
        "a": runs[0].name,
        "b": runs[1].name,
        "judge": config.judge,
        "prompts": len(tables[runs[0].name][steps[0]].groups),
        "seed": config.seed,
        "interval": f"bootstrap over prompts, BCa, {100 * CONFIDENCE:.0f} %, {RESAMPLES} resamples; Wilson's score "
        f"interval where all prompts agree, or there are fewer than {MIN_PROMPTS}",
        "win_rate": [win_rate(config.seed, step, runs, tables, scores) for step in steps],
        "runs": {run.name: describe(run, tables[run.name], scores[run.name]) for run in runs},
        "steps_to_reach": reaching(config.seed, runs, tables, scores),
        "judged": judged,
    }
    result = without_nan(result)
    write(result, Path(config.out))
    return result


def write(result: dict[str, Any], out: Path) -> None:
    """compare.json, compare.md, tables/ and figures/; the main tables to the terminal."""
    from eval.report.compare_plots import comparison_pictures, judged_pictures  # matplotlib: after what may be refused

    write_whole(out / RESULT, json.dumps(result, indent=2, allow_nan=False) + "\n")
    main = [policies(result["runs"]), by_step(result), steps_to_reach(result)]
    judged = judged_tables.all_of(result)
    sheets = [*main, rewards_by_step(result["runs"]), *judged]
    pictures = comparison_pictures(out / "figures", result, result["runs"])
    pictures += judged_pictures(out / "figures", result, result["judged"])
    write_tables(out / "tables", sheets)
    title = f"# {result['a']} against {result['b']}, judged by {result['judge']}\n\n"
    text = "\n".join(f"## {sheet.title}\n\n{sheet.markdown()}" for sheet in sheets)
    drawn = "".join(f"\n## {p.title}\n\n![{p.title}](figures/{p.name}.png)\n\n{p.caption}\n" for p in pictures)
    write_whole(out / "compare.md", title + text + drawn)
    shown = [*main, *(sheet.first(4) for sheet in judged[:1])]  # what a terminal has room for
    console.print(*(sheet.rich() for sheet in shown), f"{out / RESULT}", sep="\n")


def write_tables(folder: Path, sheets: Sequence[Sheet]) -> None:
    """FOLDER/NAME.tex of each table."""
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


def check_prompts(runs: Sequence[PolicyRun], tables: dict[str, dict[int, Completions]]) -> None:
    """Every file must hold the same prompts under the same ids."""
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


class Judge:
    """The judge's scores of completions, kept in OUT/scores; loaded when the first of them is missing."""

    def __init__(self, config: CompareConfig, runs: Sequence[PolicyRun]) -> None:
        self.config, self.folder = config, Path(config.out) / SCORES
        if config.batch_prompts < 1 or config.max_length < 1:
            raise ValueError("batch_prompts, max_length: expected at least 1")
        self.layout = make_layout_for(MeshConfig(), config.batch_prompts)
        self.changed = last_change(config.judge)
        self.scorer: RewardModelScorer | None = None
        self._forget_others(runs)

    def _forget_others(self, runs: Sequence[PolicyRun]) -> None:
        """Scores by another judge, or of other runs under the same names, are no scores of these."""
        about = {
            "judge": self.config.judge,
            "dtype": self.config.dtype,
            "max_length": self.config.max_length,
            "runs": {run.name: str(run.path) for run in runs},
        }
        file = self.folder / "about.json"
        if _noted(file) != about:
            self.scorer = self._load()  # before anything is thrown away: it may be no judge at all
            for old in self.folder.glob("*/validation_*.jsonl"):
                old.unlink()
            self.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def scores(self, run: PolicyRun, step: int, table: Completions) -> list[float | None]:
        """One score per row of the run's completions at a step."""
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


def _noted(file: Path) -> Any:
    """What a note of ours says; None if there is none, or a broken one."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def read_scores(out: str | Path, name: str, step: int) -> list[Row]:
    """The rows of a run's completions at a step, with the judge's score of each."""
    return load_rows(str(Path(out) / SCORES / name / f"validation_{step:06d}.jsonl"))


def last_change(model: str) -> float:
    """When the weights of a model were last written; 0 for one that is on the Hub."""
    directory = Path(model.partition("@")[0])
    if is_run(directory):
        run, step = find_step(model)
        return (checkpoints_folder(run) / str(step)).stat().mtime
    return max((file.stat().st_mtime for file in directory.glob("*.safetensors")), default=0.0)


def win_rate(
    seed: int,
    step: int,
    runs: Sequence[PolicyRun],
    tables: dict[str, dict[int, Completions]],
    scores: dict[str, dict[int, list[float | None]]],
) -> dict[str, Any]:
    """A against B at one step."""
    table_a, table_b = (tables[run.name][step] for run in runs)
    judged = (table.grouped(scores[run.name][step]) for run, table in zip(runs, (table_a, table_b), strict=True))
    return {"step": step, **summary(win_rates(*same_text_same_score(table_a.texts, table_b.texts, *judged)), seed)}


def reaching(
    seed: int,
    runs: Sequence[PolicyRun],
    tables: dict[str, dict[int, Completions]],
    scores: dict[str, dict[int, list[float | None]]],
) -> list[dict[str, Any]]:
    """When each run reaches the other's end: by the judge's score, and by the reward if both have the same one."""
    judge = {
        run.name: {step: prompt_means(table.grouped(scores[run.name][step])) for step, table in found.items()}
        for run, found in ((run, tables[run.name]) for run in runs)
    }
    reward = {run.name: {step: table.means("reward") for step, table in tables[run.name].items()} for run in runs}
    same = runs[0].config.get("rewards") == runs[1].config.get("rewards")
    return both_ways(({"reward": reward} if same else {}) | {"judge": judge}, seed)


def describe(run: PolicyRun, tables: dict[int, Completions], scores: dict[int, list[float | None]]) -> dict[str, Any]:
    """A policy over its steps, and its paired gains from the first to the last."""
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
