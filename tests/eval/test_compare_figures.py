"""Steps to reach, judgements shown beside a comparison, LaTeX, and the page in a real browser."""

import csv
import html
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import yaml

from eval.__main__ import main
from eval.report.judged import mirrored, owner, read_judged
from eval.report.judged_tables import labels
from eval.report.page import Content, Section, page
from eval.report.steps import first_crossing, steps_to_target
from eval.report.story import sooner, winner
from eval.runs import PolicyRun
from eval.sheets import Sheet, tex
from eval.stats import position_bias, summary
from train.run.files import write_jsonl

P, STEPS = 40, (0, 5, 10)


def make_run(directory: Path, gain: float, seed: int, rewards: str = "runs/reward") -> Path:
    """A run of `train policy` whose validation reward rises by `gain`."""
    directory.mkdir(parents=True)
    about = {"output_dir": str(directory), "advantage": directory.name, "rewards": [{"model": rewards}]}
    (directory / "config.yaml").write_text(yaml.safe_dump(about))
    write_jsonl(directory / "metrics.jsonl", [{"step": s, "reward": 0.1 * s, "kl": 0.01 * s} for s in range(11)])
    for step in STEPS:
        rng = np.random.default_rng([step, seed if step else 0])
        rows = [
            {"prompt_id": i, "prompt": f"prompt {i}", "completion": f" {rng.integers(10**6)}", "length": 8}
            | {"reward": float(rng.normal(scale=0.2) + gain * step / 10)}
            for i in range(P)
        ]
        write_jsonl(directory / "completions" / f"validation_{step:06d}.jsonl", rows)
    return directory


class Lookup:
    """A judge that gives each text the number that it is."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, prompts: list[str], completions_PG: list[list[str]]) -> np.ndarray:
        return np.array([[int(text) / 10**6 for text in group] for group in completions_PG])


def judge_result(folder: Path, a: str, b: str, mean: float = 0.6, **more: Any) -> Path:
    """What `eval judge` writes."""
    rng = np.random.default_rng(int(100 * mean))

    def rate(shift: float = 0.0) -> dict[str, Any]:
        return summary(rng.binomial(4, mean + shift, size=P) / 4, seed=0)

    result = {
        "a": a, "b": b, "name_a": "one", "name_b": "other", "backend": "openai",
        "model": "some/judge-8b", "task": "helpfulness", "seed": 0, "step": 10, "prompts": P, "pairs": 2 * P,
        "judged": 2 * P - 3, "identical": 1, "unparsable": 2, "failed": 0, "too_long": 0, "wins": 40, "ties": 10,
        "losses": 27, "win_rate": rate(), "length_controlled": rate(-0.02), "consistent": 0.8125,
        "position_bias": position_bias(rng.integers(0, 2, 50)), "aspects": {"coherence": rate(), "verbosity": rate()},
        "temperatures": {"0.1": rate(), "0.5": rate(0.1), "0.9": rate(-0.1)}, "requests": 160, "cached": 3,
        "tokens": {"prompt": 9000, "completion": 800}, "cost": 0.25,
        "agreement": [{"with": "another judge", "kappa": 0.4375, "pairs": 70}], "accuracy": None,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "judge.json").write_text(json.dumps(result | more))
    return folder


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setattr("eval.report.compare.RewardModelScorer", Lookup)
    make_run(Path("runs/gopo"), 2.0, 1)
    make_run(Path("runs/grpo"), 1.0, 2)
    return tmp_path


TEXTS = "runs/{}/completions/validation_000010.jsonl"
COMPARE = ("compare", "runs/gopo", "runs/grpo", "--judge", "runs/judge", "--out", "out")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# steps to reach


def test_the_first_crossing_is_on_the_line_between_two_validations() -> None:
    steps = np.array([0.0, 10.0, 30.0])
    means = np.array([[0.0, 1.0, 3.0], [0.0, 1.0, 3.0], [2.0, 0.0, 3.0], [0.0, 1.0, 1.5], [0.0, 2.0, 1.0]])
    targets = np.array([0.5, 2.0, 1.0, 2.0, 1.0])
    np.testing.assert_allclose(first_crossing(steps, means, targets), [5, 20, 0, math.inf, 5])


def lines(slope: float, seed: int, noise: float = 0.0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {step: slope * step + noise * rng.normal(size=P) for step in STEPS}


def test_twice_the_slope_is_twice_as_fast() -> None:
    found = steps_to_target(lines(2.0, 0), lines(1.0, 1), seed=0)
    assert found is not None
    np.testing.assert_allclose([found[k] for k in ("target", "step", "low", "high")], [10, 5, 5, 5])
    assert (found["times_as_fast"], found["final_step"], found["reached"]) == (2.0, 10, 1.0)
    never = steps_to_target(lines(1.0, 1), lines(2.0, 0), seed=0)
    assert never is not None and never["reached"] == 0.0
    assert [never[k] for k in ("step", "low", "high", "times_as_fast")] == [None] * 4
    itself = steps_to_target(lines(1.0, 1), lines(1.0, 1), seed=0)
    assert itself is not None and (itself["step"], itself["times_as_fast"]) == (10, 1.0)


def test_the_interval_of_steps_covers_the_true_crossing() -> None:
    inside = 0
    for seed in range(40):
        found = steps_to_target(lines(2.0, 2 * seed, 2.0), lines(1.0, 2 * seed + 1, 2.0), seed)
        assert found is not None and found["low"] < found["step"] < found["high"]
        inside += found["low"] <= 5 <= found["high"]
    assert inside >= 34
    missing = {step: np.where(np.arange(P) == 3, math.nan, values) for step, values in lines(2.0, 0, 1.0).items()}
    assert steps_to_target(missing, lines(1.0, 1, 1.0), 0) is not None
    assert steps_to_target({step: np.full(P, math.nan) for step in STEPS}, lines(1.0, 1), 0) is None


@pytest.mark.parametrize(("high", "claimed"), [(8.0, True), (10.0, False), (None, False)])
def test_no_speed_is_claimed_that_chance_may_have_made(high: float | None, claimed: bool) -> None:
    found = {"run": "a", "reaches": "b", "score": "reward", "target": 1.0, "final_step": 10, "step": 5.0, "low": 4.0}
    text = sooner({"steps_to_reach": [found | {"high": high, "times_as_fast": 2.0}]})
    assert text == "" if not claimed else "a had b's final validation reward sooner" in text


# compare


def test_compare_alone_writes_tables_and_pictures(made: Path) -> None:
    assert main([*COMPARE]) == 0
    result = json.loads(Path("out/compare.json").read_text())
    first = result["steps_to_reach"][0]
    assert (first["run"], first["reaches"], first["score"]) == ("gopo", "grpo", "reward")
    assert 4 < first["low"] < first["step"] < first["high"] < 6 and 1.6 < first["times_as_fast"] < 2.4
    reward = {s["step"]: s["reward"]["mean"] for s in result["runs"]["gopo"]["steps"]}
    between = 0 if first["step"] < 5 else 5
    share = (first["target"] - reward[between]) / (reward[between + 5] - reward[between])
    np.testing.assert_allclose(first["step"], between + 5 * share)
    assert result["steps_to_reach"][1]["step"] is None

    names = {"policies", "steps_to_reach", "validation_reward", "win_rate_by_step"}
    assert {file.stem for file in Path("out/tables").glob("*.tex")} == names
    assert "not reached" in Path("out/tables/steps_to_reach.tex").read_text()
    for name in ("validation_reward", "judge", "win_rate", "steps_to_reach_reward"):
        assert all(Path("out/figures", f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    shown = re.findall(r"\]\((figures/.*?)\)", Path("out/compare.md").read_text())
    assert len(shown) >= 4 and all(Path("out", file).exists() for file in shown)


def test_rewards_that_differ_are_not_compared(made: Path) -> None:
    shutil.rmtree("runs/grpo")
    make_run(Path("runs/grpo"), 1.0, 2, rewards="runs/another")
    assert main([*COMPARE]) == 0
    assert {f["score"] for f in json.loads(Path("out/compare.json").read_text())["steps_to_reach"]} == {"judge"}
    assert "trained on different rewards" in Path("out/compare.md").read_text()


@pytest.mark.slow
def test_judgements_are_shown_and_those_the_other_way_round_are_mirrored(made: Path) -> None:
    judge_result(Path("one"), TEXTS.format("gopo"), TEXTS.format("grpo"))
    judge_result(Path("two"), TEXTS.format("grpo"), TEXTS.format("gopo"))
    assert main([*COMPARE, "--judged", "one", "two", "--name_a", "ranks"]) == 0
    one, two = json.loads(Path("out/compare.json").read_text())["judged"]
    assert (one["mirrored"], two["mirrored"]) == (False, True)
    assert {(found["name_a"], found["name_b"]) for found in (one, two)} == {("ranks", "grpo")}
    raw = json.loads(Path("one/judge.json").read_text())
    assert one["win_rate"] == raw["win_rate"] and (two["wins"], two["losses"]) == (raw["losses"], raw["wins"])
    for key in ("win_rate", "length_controlled"):
        assert (two[key]["low"], two[key]["mean"]) == (1 - raw[key]["high"], 1 - raw[key]["mean"])
    assert two["temperatures"]["0.5"]["high"] == 1 - raw["temperatures"]["0.5"]["low"]
    assert two["aspects"]["verbosity"]["standard_error"] == raw["aspects"]["verbosity"]["standard_error"]
    unmoved = ("position_bias", "consistent", "agreement", "unparsable", "cost")
    assert [two[key] for key in unmoved] == [raw[key] for key in unmoved]
    text = Path("out/compare.md").read_text()
    tables = {"judges", "aspects", "temperatures", "judging", "agreement"}
    assert {file.stem for file in Path("out/tables").glob("*.tex")} >= tables
    assert all(f"figures/{name}.png" in text for name in ("judges", "temperatures"))
    assert f"{raw['win_rate']['mean']:.3f} [{raw['win_rate']['low']:.3f}" in text


def test_mirroring_twice_is_nothing() -> None:
    rate = {"mean": 0.25, "low": 0.125, "high": 0.5}
    result = {"a": 1, "b": 2, "name_a": 3, "name_b": 4, "wins": 5, "ties": 6, "losses": 7, "win_rate": rate}
    result |= {"length_controlled": None, "aspects": {"x": rate}, "temperatures": {}, "source": "s"}
    assert mirrored(mirrored(result)) == result


def test_judgements_of_other_texts_are_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run `python -m eval judge` first" in refused(capsys, *COMPARE, "--judged", "nowhere")
    judge_result(Path("other"), "texts/a.jsonl", TEXTS.format("grpo"))
    assert "texts/a.jsonl is not of runs/gopo or runs/grpo" in refused(capsys, *COMPARE, "--judged", "other")
    judge_result(Path("same"), TEXTS.format("grpo"), "runs/grpo/completions/validation_000005.jsonl")
    assert "both sides are of runs/grpo" in refused(capsys, *COMPARE, "--judged", "same")
    Path("same/judge.json").write_text('{"a": 1}')
    assert "it has no 'b'" in refused(capsys, *COMPARE, "--judged", "same")
    Path("same/judge.json").write_text("{")
    assert "not JSON" in refused(capsys, *COMPARE, "--judged", "same")
    assert not Path("out/compare.json").exists()


def test_generated_texts_belong_to_the_run_that_their_checkpoint_names(made: Path) -> None:
    runs = [PolicyRun.open("runs/gopo"), PolicyRun.open("runs/grpo")]
    for name in ("gopo", "grpo"):
        row = {"prompt_id": 0, "prompt": "x", "completion": "y", "checkpoint": f"runs/{name}@10"}
        write_jsonl(Path(f"drawn_{name}.jsonl"), [row])
        assert owner(f"drawn_{name}.jsonl", runs) is runs[name == "grpo"]
    write_jsonl(Path("foreign.jsonl"), [{"prompt_id": 0, "checkpoint": "runs/gopo2@10"}])
    assert owner("foreign.jsonl", runs) is None and owner("nowhere.jsonl", runs) is None
    found = read_judged(str(judge_result(Path("j"), "drawn_gopo.jsonl", "drawn_grpo.jsonl")), runs)
    assert not found["mirrored"]


def test_two_judgements_never_have_one_label() -> None:
    one = {"model": "m", "task": "t", "step": 5, "name_a": "a", "name_b": "b", "source": "x"}
    assert labels([one]) == ["m, t, validation texts"]
    assert labels([one, one | {"temperatures": {"0.1": {}, "1": {}}}])[1] == "m, t, texts at 0.1, 1"
    assert labels([one, one | {"step": 10}])[1] == "m, t, validation texts, step 10"
    assert len(set(labels([one, one | {"source": "y"}]))) == 2


# tables


def untex(text: str) -> str:
    """What LaTeX would print, of the little that is written."""
    for code, sign in ((r"\textbackslash{}", "\0"), (r"\textasciitilde{}", "~"), (r"\textasciicircum{}", "^")):
        text = text.replace(code, sign)
    for code, sign in ((r"\textless{}", "<"), (r"\textgreater{}", ">"), (r"\textbar{}", "|"), (r"$\pm$", "±")):
        text = text.replace(code, sign)
    text = re.sub(r"\{([\[\]*])\}", r"\1", text)
    return re.sub(r"\\([&%$#_{}])", r"\1", text).replace("\0", "\\")


def test_latex_prints_the_cells_and_no_sign_of_theirs_is_a_command() -> None:
    cells = ("a_b & 50 % #1 {x} $y$", r"C:\new ~ ^ <|im_end|> [0.1, 0.2]*", "1.0 ± 0.5")
    sheet = Sheet("T % of\nit", ("one", "two", "three"), [cells, ("[first]", "*", "")], "note")
    text = sheet.latex()
    assert text.splitlines()[:2] == ["% T % of", r"\begin{tabular}{lrr}"]
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) == 3
    for line, row in zip(body, (sheet.columns, *sheet.rows), strict=True):
        assert tuple(untex(cell.strip()) for cell in re.split(r"(?<!\\)&", line[:-3])) == row
        assert not re.match(r"\s*[\[*]", line)  # \\ would take it for its argument
    plain = re.sub(r"\\(?:[&%$#_{}]|text\w+\{\}|pm)", "", " ".join(body).replace(r" \\", " ").replace("$$", ""))
    assert not re.search(r"[&%#_^~\\<>]", plain.replace(" & ", " ").replace(" & ", " "))
    assert tex("a\nb") == "a b"
    assert r"\usepackage" not in text and "toprule" not in text


def test_csv_has_the_same_cells() -> None:
    sheet = Sheet("T", ("a", "b"), [("x, y", 'say "z"')], name="t")
    assert list(csv.reader(io.StringIO(sheet.csv()))) == [["a", "b"], ["x, y", 'say "z"']]
    whole = page(Content("", "", "", [Section("", [sheet])]))
    link = re.search(r'<a download="t.csv" href="data:text/csv;charset=utf-8,([^"]*)">CSV</a>', whole)
    assert link and unquote(link[1]) == sheet.csv()


# the report


REPORT = ("report", "runs/gopo", "runs/grpo", "--reward_models", "runs/reward", "--compare", "out", "--out", "page")


@pytest.fixture
def results(made: Path) -> None:
    """Everything that a report can show."""
    Path("runs/reward").mkdir()
    write_jsonl(Path("runs/reward/metrics.jsonl"), [{"step": 20, "validation/accuracy": 0.8125}])
    judge_result(Path("one"), TEXTS.format("grpo"), TEXTS.format("gopo"), note="https://example.org/<b>")
    for name, share in (("gopo", 0.5), ("grpo", 0.25)):
        accuracies = {key: share for key in ("prompt_strict", "prompt_loose", "instruction_strict")}
        told = accuracies | {"instruction_loose": 0.875, "responses": TEXTS.format(name), "count": 4}
        told |= {"rows": [{"key": 1, "strict": [True], "loose": [True]}]}
        Path(f"ifeval_{name}.json").write_text(json.dumps(told))
        rouge = {"mean": share, "standard_error": 0.0312, "prompts": P, "low": 0.1, "high": 0.9, "method": "t"}
        told = {"responses": TEXTS.format(name), "rouge1": rouge, "rouge2": None, "rougeL": rouge, "rows": []}
        told |= {"length": {"words": rouge, "tokens": None}, "novelty": {"1": rouge}, "temperatures": {}}
        Path(f"summaries_{name}.json").write_text(json.dumps(told))
    assert main([*COMPARE]) == 0


@pytest.fixture
def reported(results: None) -> str:
    """The page with everything on it."""
    found = [*REPORT, "--judged", "one", "--ifeval", "ifeval_gopo.json", "ifeval_grpo.json"]
    assert main([*found, "--summaries", "summaries_gopo.json", "summaries_grpo.json"]) == 0
    return Path("page/report.html").read_text()


def test_the_page_holds_all_results_and_their_raw_numbers_and_can_be_heard(reported: str) -> None:
    text = Path("page/report.md").read_text()
    raw = json.loads(Path("one/judge.json").read_text())
    shown = [
        f"{1 - raw['win_rate']['mean']:.3f} [{1 - raw['win_rate']['high']:.3f}",
        "81.2 %",
        "another judge",
        "0.438",
    ]
    shown += ["50.0 %", "25.0 %", "87.5 %", "0.250 ± 0.031", "2 unparsable", "Speed: gopo had grpo"]
    for report in (text, reported):
        assert [part for part in shown if part not in report] == []
    assert [name for name in ("judges", "temperatures", "ifeval") if f"figures/{name}.png" not in text] == []

    links = dict(re.findall(r'<a download="([^"]*)" href="data:[^,"]*,([^"]*)"', reported))
    files = {"compare.json": "out/compare.json", "judge.json": "one/judge.json", "ifeval_gopo.json": "ifeval_gopo.json"}
    for name, file in (files | {"summaries_grpo.json": "summaries_grpo.json"}).items():
        assert unquote(links[name]) == Path(file).read_text()
    assert {"policies.csv", "judges.csv", "ifeval.csv", "summaries.csv", "policies.tex"} <= set(links)
    assert "https:" not in reported and "<script" not in reported

    # headings are in order, and pictures have a text
    levels = [int(level) for level in re.findall(r"<h(\d)>", reported)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in itertools.pairwise(levels))
    pictures = re.findall(r"<svg[^>]*>", reported)
    assert len(pictures) >= 8
    assert all(re.search(r'role="img" aria-label="[^"]{20,}"', picture) for picture in pictures)


def test_report_refuses_what_is_no_result(results: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run `python -m eval ifeval` first" in refused(capsys, *REPORT, "--ifeval", "no.json")
    assert "not a result of `python -m eval ifeval`" in refused(capsys, *REPORT, "--ifeval", "summaries_gopo.json")
    assert "not a result of `python -m eval summaries`" in refused(capsys, *REPORT, "--summaries", "one/judge.json")
    old = json.loads(Path("out/compare.json").read_text())
    del old["steps_to_reach"]
    Path("out/compare.json").write_text(json.dumps(old))
    assert "it has no 'steps_to_reach'; run that command again" in refused(capsys, *REPORT)
    Path("out/compare.json").write_text("{")
    assert "out/compare.json: not JSON" in refused(capsys, *REPORT)


def test_report_refuses_a_comparison_without_its_scores(results: None, capsys: pytest.CaptureFixture[str]) -> None:
    next(Path("out/scores").rglob("validation_*10.jsonl")).unlink()
    assert "validation_000010.jsonl: no such file" in refused(capsys, *REPORT)
    assert not Path("page").exists()


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ((0.2, 0.3), (0.6, 0.7), "Not so where texts are drawn otherwise: GRPO is ahead at temperature 0.1 (0.250)."),
        ((0.4, 0.6), (0.6, 0.7), "GOPO is ahead on the validation texts, by the judge."),
    ],
)
def test_the_headline_hides_no_temperature_at_which_the_other_one_wins(
    low: tuple[float, float], high: tuple[float, float], words: str
) -> None:
    def rate(ends: tuple[float, float]) -> dict[str, Any]:
        return {"mean": sum(ends) / 2, "low": ends[0], "high": ends[1], "prompts": 100}

    judged = {"model": "j", "task": None, "name_a": "GOPO", "name_b": "GRPO"}
    judged |= {"temperatures": {"0.1": rate(low), "0.9": rate(high)}}
    result = {"a": "GOPO", "b": "GRPO", "judge": "j", "win_rate": [rate((0.6, 0.7))], "judged": [judged]}
    assert winner(result).endswith(words)


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_in_a_browser(reported: str, width: int, tmp_path: Path) -> None:
    """Nothing is wider than the window, and no request goes anywhere: the policy would report it."""
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on the path")
    # Windows have a least width; a frame has any. Its page may load nothing and tells what it was asked for.
    script = """<script>
      const wrong = []; document.addEventListener("securitypolicyviolation", e => wrong.push(e.blockedURI));
      addEventListener("load", () => setTimeout(() => parent.postMessage([
        document.documentElement.scrollWidth, innerWidth, wrong.join(" "),
        performance.getEntriesByType("resource").length], "*"), 300));</script>"""
    rules = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    guarded = reported.replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{rules}">{script}')
    frame = f'<iframe style="border:0" width="{width}" height="800" srcdoc="{html.escape(guarded)}"></iframe>'
    tell = '<p id="told"></p><script>onmessage = e => told.textContent = JSON.stringify(e.data)</script>'
    (tmp_path / "wrapper.html").write_text(f"<!doctype html><body>{tell}{frame}")
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "wrapper.html").as_uri()]
    done = subprocess.run([browser, *arguments], capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'<p id="told">(.*?)</p>', done.stdout)
    assert told and told[1], done.stderr[-2000:]
    scroll, inner, blocked, resources = json.loads(html.unescape(told[1]))
    assert inner == width and scroll <= inner and blocked == "" and resources == 0
