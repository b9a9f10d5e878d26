"""`python -m eval report`: a page of tables, pictures, samples and findings in plain words about some policies.

Reads the runs' metrics and validation completions, the reward models' metrics, a comparison, and results of `eval
judge`, `eval ifeval` and `eval summaries`; computes no other numbers. Writes OUT/report.html, a self-contained file
with the raw numbers to download, OUT/report.md and OUT/figures/.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.report import compare_plots, judged_tables, story
from eval.report.compare import COMPARE_JSON, JUDGE_SCORE, SCORES, describe_policy, read_scores
from eval.report.judged import JUDGE_RESULT, read_ifeval, read_judged, read_result, read_summaries
from eval.report.page import (
    Block,
    Commands,
    Content,
    Downloads,
    Files,
    Gallery,
    Sample,
    SampleAnswer,
    Section,
    markdown,
    page,
)
from eval.report.plots import advantage_pictures, pick_groups, training_pictures
from eval.report.reliability import reliability_pictures
from eval.report.tables import by_step, final_win_rate, policies, reward_models, rewards_by_step, steps_to_reach
from eval.runs import CompletionTable, PolicyRun, config_differences, same_model
from eval.sheets import Sheet
from eval.stats import without_nan
from models.checkpoint import best_step, is_run
from models.names import split_step
from train.console import console
from train.parse import parse
from train.run.files import check_out_directory, write_whole
from train.run.metrics_file import METRICS, read_metrics
from train.running import setup_errors

SAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Tables, pictures and samples of some policies, on one page."""

    runs: list[str]  # runs of `train policy`; the compared ones among them
    reward_models: list[str]  # runs of `train reward`
    compare: str  # what `eval compare` wrote to --out
    out: str  # the directory to write
    judged: tuple[str, ...] = ()  # what `eval judge` wrote to --out about texts of these runs, to be shown too
    ifeval: tuple[str, ...] = ()  # what `eval ifeval` wrote to --out, to be shown too
    summaries: tuple[str, ...] = ()  # what `eval summaries` wrote to --out, to be shown too
    title: str | None = None  # of the page; default: the runs' names


def parse_report(arguments: list[str]) -> ReportConfig:
    return parse(ReportConfig, arguments, "python -m eval report", positional=("runs",))


def report(config: ReportConfig) -> Content:
    """Writes the report to `config.out`, and returns its content.

    Raises:
      SetupError: an invalid path, or a comparison of other runs.
    """
    with setup_errors():
        check_out_directory(config.out, "report.html", "report.md", "figures/x.png")
        result = read_comparison(config.compare)
        runs = open_runs(config.runs, result)
        described = {run.name: result["runs"].get(run.name) or describe_unjudged(run) for run in runs}
        models = [reward_model_row(path, result, runs) for path in config.reward_models]
        result |= {"judged": all_judged(config, runs, result)}
        followed = read_ifeval(config.ifeval, runs)
        summarized = read_summaries(config.summaries, runs)
        samples = pick_samples(config.compare, runs, result)
    warn_if_old(config, runs, result)
    out = Path(config.out)
    drawn = out / "figures"
    curves = compare_plots.comparison_pictures(drawn, result, described) + training_pictures(drawn, runs)
    results = [reward_models(models), policies(described), final_win_rate(result)]
    results += [steps_to_reach(result)]
    sections = [
        Section("The result", [*results, Gallery(reliability_pictures(drawn, config.reward_models))]),
        Section("What happened", story.what_happened(result, described, runs)),
        Section("Over the training", [Gallery(curves), by_step(result), rewards_by_step(described)]),
        Section("By other judges", other_judges(drawn, result)),
        Section("Instructions followed", instructions(drawn, followed, runs)),
        Section("Summaries", [judged_tables.summaries(summarized)] if summarized else []),
        Section("The same rewards as ranks and as z-scores", ranks_and_scores(drawn, runs)),
        Section("Samples", [ABOUT_SAMPLES, *samples]),
        Section("Where the numbers come from", [difference_sheet(runs), *raw_numbers(config, runs, result)]),
    ]
    content = Content(
        title=config.title or f"{story.listing([run.name for run in runs])}, trained and judged",
        subtitle=f"{result['prompts']} validation prompts; the judge is {result['judge']}",
        headline=story.headline(result, described),
        sections=[section for section in sections if section.blocks],
    )
    write_whole(out / "report.html", page(content))
    write_whole(out / "report.md", markdown(content))
    console.print(*(sheet.rich() for sheet in results), content.headline, f"{out / 'report.html'}", sep="\n")
    return content


ABOUT_ADVANTAGES = (
    "Real groups of 8 completions of one prompt, by their rewards from left to right, and the advantage that each "
    "would get. A z-score keeps the distances: one outlier takes most of the learning signal and the others are "
    "squeezed together. Ranks spread the signal evenly, whatever the distances. Shown are, of all validation prompts, "
    "the groups whose rewards are most skewed down, least skewed, and most skewed up; completions are taken from the "
    "last validation of each run, and from the one before where that is not enough for 8."
)
ABOUT_SAMPLES = f"{SAMPLES} prompts at equal distances through the validation set, of each the first completion."


def read_comparison(folder: str) -> dict[str, Any]:
    keys = ("a", "b", "judge", "prompts", "seed", "interval", "win_rate", "runs", "steps_to_reach", "judged")
    return read_result(Path(folder) / COMPARE_JSON, "--compare", keys, "compare")


def open_runs(paths: Sequence[str], result: dict[str, Any]) -> list[PolicyRun]:
    """Opens the runs under their names in the comparison."""
    names = {name: run["path"] for name, run in result["runs"].items()}
    run_names = [next((name for name, compared in names.items() if same_model(compared, path)), None) for path in paths]
    for name, path in names.items():
        if name not in run_names:
            raise ValueError(f"the comparison is of {path}, which is not among the runs given; add it, or compare anew")
    runs = [PolicyRun.open(path, name) for path, name in zip(paths, run_names, strict=True)]
    open_names = [run.name for run in runs]
    if len(set(open_names)) < len(open_names):
        raise ValueError(f"the runs' names must differ, got {', '.join(open_names)}")
    return runs


def describe_unjudged(run: PolicyRun) -> dict[str, Any]:
    """The entry that compare.json would have for a run that the judge has not scored."""
    completions = {step: run.completions(step) for step in run.steps}
    unscored: dict[int, list[float | None]] = {step: [None] * len(table.rows) for step, table in completions.items()}
    return without_nan(describe_policy(run, completions, unscored))


def reward_model_row(path: str, result: dict[str, Any], runs: Sequence[PolicyRun]) -> dict[str, Any]:
    """A reward model's role, accuracy, calibration error and length baseline, at its best step or else its last."""
    directory, _ = split_step(path)
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"--reward_models {path}: no such directory")
    best = best_step(directory)
    rows = [row for row in read_metrics(directory) if "validation/accuracy" in row]
    rows = [row for row in rows if best is None or row["step"] == best]
    last = rows[-1] if rows else {}
    trained = [run.name for run in runs if any(same_model(path, model) for model in run.reward_models())]
    roles = ["trained against" + ("" if len(trained) == len(runs) else f" ({', '.join(trained)})")] if trained else []
    roles += ["judge"] if same_model(path, result["judge"]) else []
    return {
        "path": path,
        "role": ", ".join(roles) or "not used here",
        "accuracy": last.get("validation/accuracy"),
        "length_baseline": last.get("validation/length_baseline_accuracy"),
        "ece": last.get("validation/ece"),
        "step": last.get("step"),
    }


def warn_if_old(config: ReportConfig, runs: Sequence[PolicyRun], result: dict[str, Any]) -> None:
    written = (Path(config.compare) / COMPARE_JSON).stat().st_mtime
    for run in runs:
        newer = [step for step in run.steps if run.file(step).stat().st_mtime > written]
        if run.name in result["runs"] and newer:
            console.print(f"warning: {run.path} has validated since {config.compare} was written; compare anew")


def all_judged(config: ReportConfig, runs: Sequence[PolicyRun], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge results of the comparison and of this report, each folder once, the compared runs in their order."""
    ordered = sorted(runs, key=lambda run: (run.name != result["a"], run.name != result["b"]))
    compared = {Path(entry["source"]).resolve() for entry in result["judged"]}
    return result["judged"] + [read_judged(f, ordered) for f in config.judged if Path(f).resolve() not in compared]


def other_judges(folder: Path, result: dict[str, Any]) -> list[Block]:
    if not result["judged"]:
        return []
    pictures = compare_plots.judged_pictures(folder, result, result["judged"])
    return [*story.verdicts(result["judged"]), Gallery(pictures), *judged_tables.all_of(result)]


def instructions(folder: Path, followed: Sequence[dict[str, Any]], runs: Sequence[PolicyRun]) -> list[Block]:
    if not followed:
        return []
    picture = compare_plots.ifeval_picture(folder, followed, [run.name for run in runs])
    return [judged_tables.ifeval(followed), Gallery([picture])]


def ranks_and_scores(folder: Path, runs: Sequence[PolicyRun]) -> list[Block]:
    pictures = advantage_pictures(folder, runs, pick_groups(runs))
    return [ABOUT_ADVANTAGES, Gallery(pictures, narrow=True)] if pictures else []


def pick_samples(folder: str, runs: Sequence[PolicyRun], result: dict[str, Any]) -> list[Sample]:
    """Completions of the same prompts before and after training, side by side."""
    scored = {run.name: [scored_completions(folder, run, i, result) for i in (0, -1)] for run in runs}
    befores = [first for first, _ in scored.values()]
    alike = all(table.texts == befores[0].texts for table in befores)
    columns = [("before training", befores[0])] if alike else []
    for name, (first, last) in scored.items():
        columns += [] if alike else [(f"{name}, before training", first)]
        columns += [(f"{name}, after training", last)]
    common = [i for i in columns[0][1].prompts if all(i in table.prompts for _, table in columns)]
    chosen = np.unique(np.linspace(0, len(common) - 1, min(SAMPLES, len(common))).round().astype(int))
    return [
        Sample(
            common[i],
            columns[0][1].prompts[common[i]],
            [sample_answer(label, table, common[i]) for label, table in columns],
        )
        for i in chosen
    ]


def scored_completions(folder: str, run: PolicyRun, which: int, result: dict[str, Any]) -> CompletionTable:
    """A run's first (0) or last (-1) completions, with the judge's scores if the run was judged."""
    if run.name not in result["runs"]:
        return run.completions(run.steps[which])
    step = result["runs"][run.name]["steps"][which]["step"]
    return CompletionTable.from_rows(read_scores(folder, run.name, step), str(Path(folder) / SCORES / run.name))


def sample_answer(label: str, table: CompletionTable, prompt_id: int) -> SampleAnswer:
    row = next(row for row in table.rows if row["prompt_id"] == prompt_id)
    return SampleAnswer(label, row["completion"], row.get("reward"), row.get(JUDGE_SCORE))


def difference_sheet(runs: Sequence[PolicyRun]) -> Sheet:
    rows = [(key, *map(str, values)) for key, values in config_differences(runs).items()]
    note = "" if rows else "Every setting but the directory is the same."
    columns = ("setting", *(run.name for run in runs))
    return Sheet("Settings in which the runs differ", columns, rows, note, "differences")


def raw_numbers(config: ReportConfig, runs: Sequence[PolicyRun], result: dict[str, Any]) -> list[Block]:
    """The raw numbers: downloads inside the page, files beside it, and the commands that reproduce them."""
    texts_held = [("win rates, gains, steps", Path(config.compare) / COMPARE_JSON, COMPARE_JSON)]
    texts_held += [("verdicts of a judge", Path(f["source"]) / JUDGE_RESULT, JUDGE_RESULT) for f in result["judged"]]
    texts_held += [("IFEval, every outcome", Path(file), Path(file).name) for file in config.ifeval]
    texts_held += [("summaries, every measure", Path(file), Path(file).name) for file in config.summaries]
    names = [name for *_, name in texts_held]
    texts = [
        (f"{what} ({file})", name if names.count(name) == 1 else f"{i}_{name}", file.read_text(encoding="utf-8"))
        for i, (what, file, name) in enumerate(texts_held, 1)
        if file.is_file()
    ]
    return [Downloads(texts), Files(raw_files(config, runs)), Commands(rerun_commands(config, runs, result))]


def raw_files(config: ReportConfig, runs: Sequence[PolicyRun]) -> list[tuple[str, str]]:
    """Descriptions and paths, relative to the report, of the raw files."""
    files = [("win rates, judge scores, gains", Path(config.compare) / COMPARE_JSON)]
    files += [("the judge's score of every completion", Path(config.compare) / SCORES)]
    for run in runs:
        files += [
            (f"{run.name}: training metrics of every step", run.path / METRICS),
            (f"{run.name}: all settings", run.path / "config.yaml"),
            (f"{run.name}: validation completions with their rewards", run.path / "completions"),
        ]
    files += [
        (f"{path}: accuracy and length baseline", Path(split_step(path)[0]) / METRICS) for path in config.reward_models
    ]
    return [(what, Path(os.path.relpath(path, config.out)).as_posix()) for what, path in files if path.exists()]


def rerun_commands(config: ReportConfig, runs: Sequence[PolicyRun], result: dict[str, Any]) -> list[str]:
    """The commands that reproduce every number."""
    models = [split_step(p)[0] for p in config.reward_models if is_run(p)]
    lines = [f"python -m train reward --config {shlex.quote(model)}/config.yaml" for model in models]
    lines += [f"python -m train policy --config {shlex.quote(str(run.path))}/config.yaml" for run in runs]
    a, b = (result["runs"][result[side]]["path"] for side in "ab")
    compare_again = ["python", "-m", "eval", "compare", a, b, "--judge", result["judge"], "--out", config.compare]
    for option, side, path in (("--name_a", "a", a), ("--name_b", "b", b)):
        compare_again += [option, result[side]] if Path(path).name != result[side] else []
    compare_again += ["--seed", str(result["seed"])] if result["seed"] else []
    judged = [entry["source"] for entry in result["judged"] if entry["source"] not in config.judged]
    compare_again += ["--judged", *judged] if judged else []
    report_again = ["python", "-m", "eval", "report", *config.runs, "--reward_models", *config.reward_models]
    report_again += ["--compare", config.compare, "--out", config.out]
    for option in ("judged", "ifeval", "summaries"):
        report_again += [f"--{option}", *getattr(config, option)] if getattr(config, option) else []
    report_again += ["--title", config.title] if config.title else []
    return [*lines, shlex.join(compare_again), shlex.join(report_again)]
