"""The report: its words follow its numbers, and its page stands alone."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml

from eval.__main__ import main
from eval.report.page import Commands, Content, Files, Sample, SampleAnswer, Section, markdown, page
from eval.report.plots import pick_groups, smoothed
from eval.report.reliability import reliability_pictures
from eval.report.report import reward_model_row
from eval.report.story import direction, headline, hints, what_happened
from eval.runs import PolicyRun
from eval.sheets import Sheet, markdown_text
from eval.stats import mean_and_error, paired_gain
from train.run.files import write_jsonl
from train.supervised.calibration import reliability_bins

STEPS, P = (0, 5, 10), 40
PROMPTS = [f"prompt <{i}> & co" for i in range(P)]


def make_run(directory: Path, gain: float, seed: int, G: int = 2, length: int = 8) -> Path:
    """A run of `train policy` whose validation reward rises by `gain`; step 0 is the same for every seed."""
    directory.mkdir(parents=True)
    about = {"output_dir": str(directory), "advantage": directory.name, "loss": {"beta": 0.04}}
    about |= {"rewards": [{"model": str(directory.parent / "reward")}]}
    (directory / "config.yaml").write_text(yaml.safe_dump(about))
    rows: list[dict[str, Any]] = [{"step": 0, "validation/reward": 0.0}]
    rows += [{"step": s, "reward": 0.1 * s, "kl": 0.01 * s, "completions/mean_length": 9.0} for s in range(1, 11)]
    write_jsonl(directory / "metrics.jsonl", rows)
    for step in STEPS:
        rng = np.random.default_rng([step, seed if step else 0])
        table = [
            {
                "prompt_id": i,
                "prompt": prompt,
                "completion": f" <b>{rng.integers(10**6)}</b>",
                "reward": float(rng.normal() + gain * step / 10),
                "length": length if step else 8,
                "stop_reason": "stop",
            }
            for i, prompt in enumerate(PROMPTS)
            for _ in range(G)
        ]
        write_jsonl(directory / "completions" / f"validation_{step:06d}.jsonl", table)
    return directory


class Lookup:
    """A judge that gives each text a score made of it, so that no network is needed."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, prompts: list[str], completions_PG: list[list[str]]) -> np.ndarray:
        return np.array([[int(re.sub(r"\D", "", text)) / 10**6 for text in group] for group in completions_PG])


@pytest.fixture
def made(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, their reward model, a judge and a comparison, under relative paths; a copy for each test."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    monkeypatch.setattr("eval.report.compare.RewardModelScorer", Lookup)
    return tmp_path


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
        patch.setattr("eval.report.compare.RewardModelScorer", Lookup)
        make_all()
    return directory


def make_all() -> None:
    make_run(Path("runs/gopo"), 2.0, 1)
    make_run(Path("runs/grpo"), 0.0, 2)
    for name, accuracy in (("reward", 0.8125), ("judge", 0.7321)):
        row = {"validation/accuracy": accuracy, "validation/length_baseline_accuracy": 0.4567, "validation/ece": 0.0375}
        Path("runs", name).mkdir()
        bins = reliability_bins(np.random.default_rng(0).normal(1, 2, size=90))
        sets = {"validation": bins} | ({"validation/other": bins[::2]} if name == "judge" else {})
        Path("runs", name, "calibration.json").write_text(json.dumps({"step": 20, "sets": sets}))
        write_jsonl(Path("runs", name, "metrics.jsonl"), [{"step": 0} | row, {"step": 20} | row, {"step": 21}])
    assert main(["compare", "runs/gopo", "runs/grpo", "--judge", "runs/judge", "--out", "out/compare"]) == 0


REPORT = (
    "report",
    "runs/gopo",
    "runs/grpo",
    "--reward_models",
    "runs/reward",
    "runs/judge",
    "--compare",
    "out/compare",
)


class Page(HTMLParser):
    """What a page asks for from elsewhere, its ids, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_whole(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main([*REPORT, "--out", "out", "--title", "Reviews & ranks"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(Path("out/compare/compare.json").read_text())
    html, text = Path("out/report.html").read_text(), Path("out/report.md").read_text()

    # it shows the numbers of the raw files, in the terminal, in Markdown and on the page
    last, gain = result["win_rate"][-1], result["runs"]["gopo"]["gain"]
    numbers = [
        f"{last['mean']:.3f}",
        f"{last['low']:.3f}",
        f"{last['high']:.3f}",
        "81.2 %",
        "73.2 %",
        "45.7 %",
        "3.8 %",
    ]
    numbers += [f"{gain[score]['mean']:+.3f} ± {gain[score]['standard_error']:.3f}" for score in ("reward", "judge")]
    for shown in (re.sub(r"[\s│┃]+", " ", printed), text, html):
        assert [number for number in numbers if number not in shown] == []

    # it needs nothing from elsewhere; what it links to is there
    page = Page(html)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert not re.search(r"https?:|//|url\((?!#)|@import|<script", html.replace("<!doctype", ""))
    inside = [link for link in page.references if link.startswith("#")]
    assert set(link[1:] for link in inside) <= set(page.ids)
    raw = [link for link in page.references if not link.startswith(("#", "data:"))]
    assert {"compare/compare.json", "../runs/gopo/metrics.jsonl", "../runs/judge/metrics.jsonl"} <= set(raw)
    assert all((made / "out" / link).exists() for link in raw)

    # foreign text is text
    assert "<b>" not in re.sub(r"<div><b>", "", html) and "Reviews &amp; ranks" in html

    shown = re.findall(r"!\[.*?\]\((figures/.*?)\.png\)", text)
    assert {
        f"figures/{name}" for name in ("reliability", "training_reward", "validation_reward", "kl", "win_rate")
    } <= set(shown)
    assert all((made / "out" / f"{name}.{kind}").stat().st_size > 1000 for name in shown for kind in ("png", "svg"))
    assert html.count("<svg") == len(shown)
    assert "figures/grad_norm" not in shown  # never logged here
    assert text.count("before training:") == 6


def test_reliability_of_some_reward_models(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reliability", "runs/reward", "runs/judge"]) == 0
    for name, sets in (("reward", ["validation"]), ("judge", ["validation", "other"])):
        svg = Path("runs", name, "reliability.svg").read_text()
        assert Path("runs", name, "reliability.png").stat().st_size > 1000
        assert all(f"<!-- {text} -->" in svg for text in sets)
    shutil.copytree("runs/judge", "runs/other/judge")
    Path("runs/judge/reliability.svg").unlink()
    assert main(["reliability", "runs/judge@20"]) == 0 and Path("runs/judge/reliability.svg").exists()
    reliability_pictures(made / "both", ["runs/judge", "runs/other/judge", "runs/reward"])
    svg = (made / "both" / "reliability.svg").read_text()
    names = ["runs/judge, validation", "runs/other/judge, other", "reward, validation"]
    assert all(f"<!-- {name} -->" in svg for name in names), "each has a name of its own"
    assert main(["reliability", "runs/gopo"]) == 2
    assert "runs/gopo: no calibration.json in it; expected a run of `train reward`" in capsys.readouterr().err


def test_a_reward_model_that_stopped_early_is_its_best_step(made: Path) -> None:
    rows = [{"step": i, "validation/accuracy": a} for i, a in ((5, 0.9125), (10, 0.6))]
    write_jsonl(Path("runs", "reward", "metrics.jsonl"), rows)
    Path("runs", "reward", "stopped.json").write_text('{"step": 10, "best_step": 5}')
    found = reward_model_row("runs/reward", {"judge": "runs/judge"}, [])
    assert (found["step"], found["accuracy"]) == (5, 0.9125)


def test_a_third_run_that_was_not_compared(made: Path) -> None:
    make_run(Path("runs/rloo"), 1.0, 3)
    assert main([REPORT[0], "runs/rloo", *REPORT[1:], "--out", "out"]) == 0
    text = Path("out/report.md").read_text()
    assert re.search(r"\| rloo, judge +\| +0 to 10 \| +– \| +– \| +– \| +– \|", text)
    assert "The judge has not scored this run." in text


def test_report_refuses(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["report", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    models, rest = ("--reward_models", "runs/reward"), ("--compare", "out/compare", "--out", "out")
    assert "--reward_models" in refused("runs/gopo", "runs/grpo", *rest)
    assert "run `python -m eval compare` first" in refused(
        "runs/gopo", "runs/grpo", *models, "--compare", "out", "--out", "out"
    )
    assert "runs/grpo, which is not among" in refused("runs/gopo", *models, *rest)
    assert "not a run" in refused("runs/gopo", "runs/grpo", "runs/no", *models, *rest)
    assert "no such directory" in refused("runs/gopo", "runs/grpo", "--reward_models", "runs/no", *rest)
    assert not Path("out/report.html").exists()


def described(reward: float, judge: float, **last: Any) -> dict[str, Any]:
    """A run whose gains are so many standard errors."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=100)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * 10  # a standard error of exactly 1
    start = {"step": 0, "mean_length": 10.0, "distinct_completions": 1.0}
    start |= {score: mean_and_error(np.zeros(100)) for score in ("reward", "judge")}
    end = start | {"step": 10} | last
    gain = {}
    for score, mean in (("reward", reward), ("judge", judge)):
        end[score] = end.get(score) if score in last else mean_and_error(noise + mean)
        gain[score] = paired_gain(np.zeros(100), noise + mean)
    return {"steps": [start, end], "gain": {"from_step": 0, "to_step": 10} | gain}


def versus(low: float, high: float) -> dict[str, Any]:
    rate = {"step": 10, "mean": (low + high) / 2, "low": low, "high": high, "prompts": 100}
    return {"a": "gopo", "b": "grpo", "win_rate": [rate | {"step": 0, "low": 0.4, "high": 0.6}, rate]}


@pytest.mark.parametrize(("mean", "expected"), [(3.1, 1), (2.9, 0), (0.0, 0), (-2.9, 0), (-3.1, -1)])
def test_a_change_is_one_beyond_three_standard_errors(mean: float, expected: int) -> None:
    assert direction(described(mean, 0)["gain"]["reward"]) == expected


@pytest.mark.parametrize(
    ("gopo", "grpo", "low", "high", "says"),
    [
        (
            (9, 9),
            (9, 9),
            0.45,
            0.55,
            ["gopo and grpo raised", "the independent judge agrees", "no difference that 100"],
        ),
        ((9, 9), (9, 0), 0.55, 0.65, ["confirms it for gopo alone", "gopo is ahead"]),
        ((9, 0), (9, -9), 0.35, 0.45, ["confirms it for none", "grpo is ahead"]),
        ((9, 9), (2, 2), 0.55, 0.65, ["Only gopo raised"]),
        ((2, 2), (-9, 9), 0.45, 0.55, ["No policy raised"]),
    ],
)
def test_the_headline_says_what_the_numbers_say(
    gopo: tuple[float, float], grpo: tuple[float, float], low: float, high: float, says: list[str]
) -> None:
    text = headline(versus(low, high), {"gopo": described(*gopo), "grpo": described(*grpo)})
    assert [part for part in says if part not in text] == []


@pytest.mark.parametrize(
    ("reward", "judge", "says"),
    [
        (9, 9, ["reward rose", "judge agrees"]),
        (9, 1, ["reward rose", "does not confirm it"]),
        (9, -9, ["reward rose", "contradicts it"]),
        (1, 9, ["shows no change", "saw it rise"]),
        (-9, -9, ["reward fell", "fell too"]),
    ],
)
def test_what_happened_to_a_run(made: Path, reward: float, judge: float, says: list[str]) -> None:
    runs = {"gopo": described(reward, judge), "grpo": described(9, 9)}
    opened = [PolicyRun.open(f"runs/{name}") for name in runs]
    paragraphs = what_happened(versus(0.55, 0.65), runs, opened)
    assert [part for part in says if part not in paragraphs[0]] == []
    assert "excludes 0.5, gopo is ahead at the end" in paragraphs[2]
    assert "no difference that 100 prompts can show" in what_happened(versus(0.4, 0.6), runs, opened)[2]


@pytest.mark.parametrize(
    ("last", "judge", "says"),
    [
        ({}, 9, "None of this hints"),
        ({"mean_length": 14.0}, 9, "longer by 40 %"),
        ({"mean_length": 5.0}, 9, "shorter by 50 %"),
        ({"distinct_completions": 0.3}, 9, "repeats itself"),
        ({}, 0, "the judge's score did not"),
    ],
)
def test_signs_of_reward_hacking(made: Path, last: dict[str, Any], judge: float, says: str) -> None:
    text = hints(PolicyRun.open("runs/gopo"), described(9, judge, **last))
    assert says in text and "KL to the start 0.055" in text


def test_groups_for_the_picture_are_real_and_chosen_by_skewness(made: Path) -> None:
    runs = [PolicyRun.open("runs/gopo"), PolicyRun.open("runs/grpo")]
    low, even, high = pick_groups(runs, size=8)
    real = {i: [v for run in runs for s in (10, 5) for v in run.completions(s).column("reward")[i]] for i in range(P)}
    for group in (low, even, high):
        assert sorted(group.rewards) == sorted(real[PROMPTS.index(group.prompt)])
    skews = scipy.stats.skew(list(real.values()), axis=1)
    np.testing.assert_allclose([low.skewness, high.skewness], [min(skews), max(skews)])
    np.testing.assert_allclose(abs(even.skewness), min(abs(s) for s in skews))


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(smoothed(values, 3), [1.5, 3, 11 / 3, 4.5])
    np.testing.assert_allclose(smoothed(values, 1), values)
    np.testing.assert_allclose(smoothed(values, 99), 3)


def test_a_table_says_the_same_everywhere() -> None:
    sheet = Sheet("T", ("a", "b<"), [("x|y", "1"), ("long", "1.50")], "n")
    expected = ["| a    |   b\\< |", "|:-----|------:|", "| x\\|y |     1 |", "| long |  1.50 |", "", "n"]
    assert sheet.markdown().splitlines() == expected
    whole = page(Content("", "", "", [Section("", [sheet])]))
    assert '<th scope="row" data-label="a">x|y</th><td data-label="b&lt;">1</td>' in whole


def test_only_pictures_are_html_on_the_page_and_in_markdown() -> None:
    foreign = "<i>&'\"</i>"
    blocks = [foreign, Sheet(foreign, (foreign, "b"), [(foreign, foreign)], foreign, "t"), Files([(foreign, foreign)])]
    blocks += [Sample(0, foreign, [SampleAnswer(foreign, foreign, None, None)]), Commands([foreign])]
    content = Content(foreign, foreign, foreign, [Section(foreign, blocks)])
    shown = 4 + 1 + 5 + 3 + 3 + 1  # titles and headline, then block by block
    assert "<i>" not in page(content) and page(content).count("&lt;i&gt;&amp;&#39;&#34;&lt;/i&gt;") >= shown
    assert Page(page(content)).open == []
    text = markdown(content)  # of a file the second is its address, and commands stand in a fence
    assert text.count(markdown_text(foreign)) == shown - 2 and "&lt;" not in text
    assert text.count(foreign) == 1 and text.count("(%3Ci%3E%26%27%22%3C/i%3E)") == 1
