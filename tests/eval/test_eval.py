"""The statistics of a comparison as formulas; generate, reward and compare end to end on networks made here."""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flax import nnx

from eval.__main__ import main
from eval.report.compare import JUDGE_SCORE, CompareConfig, read_scores
from eval.stats import mean_and_error, paired_gain, prompt_means, same_text_same_score, win_rate_interval, win_rates
from models.config import POLICY, REWARD_MODEL, Qwen3Config
from models.hf_weights import save_pretrained
from models.qwen3 import Qwen3
from models.reward_model import Qwen3RewardModel
from models.tokenizer import train_bpe
from train.rewards.model import RewardModelScorer
from train.run.files import write_jsonl

WORDS = ["the", "food", "was", "good", "bad", "service", "slow", "nice", "place", "very", "never", "phone", "works"]
PROMPTS = [f"{a} {b}" for a in WORDS[:3] for b in WORDS[3:7]]


loaded_once = functools.cache(RewardModelScorer)


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started here must not change this process's settings, nor compile the same network again."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR", "unused"))
    monkeypatch.setattr("eval.report.compare.RewardModelScorer", loaded_once)
    monkeypatch.setattr("eval.texts.score.RewardModelScorer", loaded_once)
    monkeypatch.setattr(
        "eval.report.compare_plots.comparison_pictures", lambda *_: []
    )  # test_compare_figures.py has them


def make_model(directory: Path, architecture: str, seed: int = 0) -> Path:
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        architecture=architecture,
    )
    network = Qwen3RewardModel if architecture == REWARD_MODEL else Qwen3
    save_pretrained(network(config, nnx.Rngs(seed)), directory)
    train_bpe([" ".join(WORDS)] * 3, directory, 300)
    return directory


def make_run(directory: Path, reward_model: Path, seed: int, steps: tuple[int, ...] = (0, 2, 4), G: int = 2) -> Path:
    """What `train policy` leaves behind, with rewards that rise; step 0 is the same for every seed."""
    directory.mkdir(parents=True)
    about = {"output_dir": str(directory), "advantage": directory.name, "seed": 0}
    about |= {"rewards": [{"model": str(reward_model), "weight": 1.0}]}
    (directory / "config.yaml").write_text(yaml.safe_dump(about))
    rows: list[dict[str, Any]] = [{"step": 0, "validation/reward": 0.0}]
    rng = np.random.default_rng(seed)
    for step in range(1, max(steps) + 1):
        row = {"step": step, "reward": 0.3 * step + rng.normal(), "kl": 0.01 * step, "grad_norm": 1.0}
        rows.append(row | {"completions/mean_length": 10.0 + step})
    write_jsonl(directory / "metrics.jsonl", rows)
    for step in steps:
        rng = np.random.default_rng([step, seed if step else 0])
        table = [
            {
                "prompt_id": i,
                "prompt": prompt,
                "completion": " " + " ".join(rng.choice(WORDS, 3 + step)),
                "reward": None if (i, g) == (0, 1) else float(rng.normal() + step),
                "length": 4 + step,
                "stop_reason": "stop",
            }
            for i, prompt in enumerate(PROMPTS)
            for g in range(G)
        ]
        write_jsonl(directory / "completions" / f"validation_{step:06d}.jsonl", table)
    return directory


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "judge", REWARD_MODEL, seed=1)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "policy", POLICY)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    trained_on = tmp_path / "reward"
    return make_run(tmp_path / "gopo", trained_on, 1), make_run(tmp_path / "grpo", trained_on, 2)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one error line of a command that is refused."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


# statistics


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([2.0], [1.0], 1.0),
        ([1.0], [2.0], 0.0),
        ([1.0], [1.0], 0.5),
        ([1.0, 3.0], [2.0], 0.5),
        ([1.0, 2.0], [2.0, 0.0, 2.0], (1 + 1 + 2 * 0.5) / 6),
        ([None, 3.0], [2.0, math.nan], 1.0),
        ([None], [2.0], math.nan),
    ],
)
def test_win_rate_is_the_mean_over_pairs_with_ties_half(a: list[Any], b: list[Any], expected: float) -> None:
    np.testing.assert_allclose(win_rates([a], [b]), [expected])


def random_scores(seed: int, P: int = 30) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 4, size=rng.integers(1, 5)).astype(float).tolist() for _ in range(P)]


def test_win_rates_of_both_sides_add_up_to_one() -> None:
    a, b = random_scores(0), random_scores(1)
    np.testing.assert_allclose(win_rates(a, b) + win_rates(b, a), 1)
    assert np.all(win_rates(a, a) == 0.5)


def test_win_rate_depends_on_the_order_of_scores_alone() -> None:
    a, b = random_scores(0), random_scores(1)
    warp = [[[math.exp(3 * x) for x in group] for group in scores] for scores in (a, b)]
    np.testing.assert_array_equal(win_rates(*warp), win_rates(a, b))


def test_equal_texts_tie_though_their_scores_were_rounded_apart() -> None:
    texts = [["x", "y"]], [["x", "z"]]
    a, b = same_text_same_score(*texts, [[1.0, 5.0]], [[1.0 + 1e-7, None]])
    assert a[0][0] == b[0][0] and a[0][1] == 5.0 and b[0][1] is None


def test_the_interval_contains_the_estimate_and_repeats_by_seed() -> None:
    rates_P = win_rates(random_scores(0), random_scores(1))
    low, high, method = win_rate_interval(rates_P, seed=3)
    assert low < rates_P.mean() < high
    assert win_rate_interval(rates_P, seed=3) == (low, high, method)
    assert win_rate_interval(rates_P, seed=4) != (low, high, method)
    width = 2 * 1.96 * mean_and_error(rates_P)["standard_error"]
    assert abs((high - low) / width - 1) < 0.15


def test_paired_gain_is_the_mean_difference_over_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=20), rng.normal(size=20) + 1
    before[3] = math.nan  # leaves the pair out
    difference = np.delete(after - before, 3)
    gain = paired_gain(before, after)
    error = difference.std(ddof=1) / math.sqrt(19)
    assert gain["prompts"] == 19
    np.testing.assert_allclose([gain["mean"], gain["standard_error"]], [difference.mean(), error])
    np.testing.assert_allclose(gain["in_standard_errors"], difference.mean() / error)
    shifted = paired_gain(before, before + 7)
    np.testing.assert_allclose(shifted["mean"], 7)


def test_completions_are_averaged_before_prompts() -> None:
    means_P = prompt_means([[1.0, 3.0], [5.0], [None, 7.0], [None]])
    np.testing.assert_array_equal(means_P, [2, 5, 7, math.nan])
    assert mean_and_error(means_P)["prompts"] == 3


# generate


def test_generate_refuses(policy: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "prompts.jsonl"
    write_jsonl(data, [{"prompt": "the food"}])
    rest = ("--data", data, "--out", tmp_path / "out.jsonl", "--batch_prompts", 8)
    assert "no such file" in refused(
        capsys,
        "generate",
        "--checkpoint",
        policy,
        "--data",
        tmp_path / "no.jsonl",
        "--out",
        "x.jsonl",
        "--batch_prompts",
        8,
    )
    assert "reward model" in refused(capsys, "generate", "--checkpoint", judge, *rest)
    assert "no such directory" in refused(capsys, "generate", "--checkpoint", tmp_path / "no", *rest)
    assert "did you mean 'temperatures'" in refused(
        capsys, "generate", "--checkpoint", policy, *rest, "--temperature", 1
    )
    assert "top_p" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--top_p", 0)
    assert "min_p" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--min_p", 2)
    assert "special token" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--stop", "a", "<|im_end|>")
    assert "no 'question'" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--prompt_column", "question")
    assert "none of the 1 prompts" in refused(
        capsys, "generate", "--checkpoint", policy, *rest, "--max_prompt_length", 1
    )
    assert "would be one and the same" in refused(
        capsys, "generate", "--checkpoint", policy, *rest, "--temperatures", "0,1", "--n", 2
    )
    assert "each once" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--temperatures", "1,1.0")
    assert "each once" in refused(capsys, "generate", "--checkpoint", policy, *rest, "--temperatures=-1")
    assert not list(tmp_path.glob("out.jsonl*"))


# reward


def test_groups_of_unequal_size_get_the_scores_they_get_alone(
    judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [3, 1, 2, 3]
    rows = [
        {"prompt_id": p, "prompt": PROMPTS[p], "completion": f" {WORDS[p + g]} {WORDS[g]}"}
        for g in range(3)
        for p in range(4)
        if g < sizes[p]
    ]
    rows[-1]["completion"] = " good" * 80  # longer than max_length
    write_jsonl(tmp_path / "r.jsonl", rows)
    common = ("--reward_model", judge, "--max_length", 64, "--batch_prompts", 8)
    assert (
        main([*map(str, ("reward", "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "s.jsonl", *common))]) == 0
    )
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "reward"} for row in scored] == rows
    rewards = [row["reward"] for row in scored]
    assert rewards[-1] is None and None not in rewards[:-1]

    write_jsonl(tmp_path / "r.jsonl", [row | {"prompt_id": i} for i, row in enumerate(rows)])
    assert (
        main([*map(str, ("reward", "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "s.jsonl", *common))]) == 0
    )
    alone = [json.loads(line)["reward"] for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(np.array(alone, float), np.array(rewards, float), atol=1e-4)

    by_prompt = [[r for r, row in zip(rewards, rows, strict=True) if row["prompt_id"] == p] for p in range(4)]
    found = mean_and_error(prompt_means(by_prompt))
    assert f"{found['mean']:.4f} ± {found['standard_error']:.4f}" in capsys.readouterr().out


def test_reward_refuses(policy: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.jsonl"
    arguments = ("reward", "--responses", file, "--out", tmp_path / "s.jsonl", "--reward_model")
    assert "no such file" in refused(capsys, *arguments, judge)
    write_jsonl(file, [{"prompt_id": 0, "prompt": "the"}])
    assert "no 'completion'" in refused(capsys, *arguments, judge)
    write_jsonl(file, [{"prompt_id": 0, "prompt": prompt, "completion": ""} for prompt in ("a", "b")])
    assert "two prompts" in refused(capsys, *arguments, judge)
    write_jsonl(file, [{"prompt_id": 0, "prompt": "the", "completion": ""}])
    assert "expected a reward model" in refused(capsys, *arguments, policy)
    before = file.read_bytes()
    for more in (("--out", file), ("--best_of", file), ("--best_of", tmp_path / "s.jsonl")):
        assert "is the same file as" in refused(capsys, *arguments, judge, *more)
    assert file.read_bytes() == before


# compare


def compared(runs: tuple[Path, Path], judge: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["compare", str(runs[0]), str(runs[1]), "--judge", str(judge), "--out", str(out), *more]) == 0
    return json.loads((out / "compare.json").read_text())


def test_compare(runs: tuple[Path, Path], judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = compared(runs, judge, tmp_path / "out")
    printed = capsys.readouterr().out
    assert [rate["step"] for rate in result["win_rate"]] == [0, 2, 4]
    start, last = result["win_rate"][0], result["win_rate"][-1]
    assert start["mean"] == 0.5 and start["low"] == 1 - start["high"] and start["method"] == "wilson"  # all tie
    assert f"{last['mean']:.3f}" in printed and f"{last['mean']:.3f}" in (tmp_path / "out" / "compare.md").read_text()

    # every number again, from the score files alone
    scores = {}
    for name in ("gopo", "grpo"):
        rows = {step: read_scores(tmp_path / "out", name, step) for step in (0, 4)}
        assert [row["prompt_id"] for row in rows[0]] == [i for i in range(len(PROMPTS)) for _ in range(2)]
        for key, score in (("reward", "reward"), ("judge", JUDGE_SCORE)):
            first, end = (np.array([row[score] for row in rows[step]], float).reshape(-1, 2) for step in (0, 4))
            gain = np.nanmean(end, 1) - np.nanmean(first, 1)
            told = result["runs"][name]["gain"][key]
            np.testing.assert_allclose(told["mean"], gain.mean())
            np.testing.assert_allclose(told["standard_error"], gain.std(ddof=1) / math.sqrt(len(gain)))
        scores[name] = [[row[JUDGE_SCORE] for row in rows[4]][2 * p : 2 * p + 2] for p in range(len(PROMPTS))]
    np.testing.assert_allclose(last["mean"], win_rates(scores["gopo"], scores["grpo"]).mean())

    other_way = compared((runs[1], runs[0]), judge, tmp_path / "other")
    for one, other in zip(result["win_rate"], other_way["win_rate"], strict=True):
        assert (one["mean"], one["low"], one["high"]) == (1 - other["mean"], 1 - other["high"], 1 - other["low"])


def test_compare_again_computes_what_is_missing_or_old(
    runs: tuple[Path, Path], judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = compared(runs, judge, out)
    written = {file: file.stat().st_mtime_ns for file in out.glob("scores/*/*.jsonl")}
    assert len(written) == 6
    gone, old = out / "scores/gopo/validation_000002.jsonl", out / "scores/grpo/validation_000004.jsonl"
    gone.unlink()
    os.utime(old, (1, 1))
    assert compared(runs, judge, out) == first
    changed = {file for file in written if file.stat().st_mtime_ns != written[file]}
    assert changed == {gone, old}

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the judge was loaded though nothing was missing")

    with monkeypatch.context() as patch:
        patch.setattr("eval.report.compare.RewardModelScorer", no_model)
        assert compared(runs, judge, out) == first
    policy_given = ["compare", *map(str, runs), "--judge", str(runs[0]), "--out", str(out)]
    assert main(policy_given) == 2  # a mistake throws no score away
    assert {file for file in written if file.is_file()} == written.keys()
    another = make_model(tmp_path / "another", REWARD_MODEL, seed=2)
    assert compared(runs, another, out)["win_rate"][-1] != first["win_rate"][-1]


def test_compare_names_and_common_steps(runs: tuple[Path, Path], judge: Path, tmp_path: Path) -> None:
    (runs[1] / "completions" / "validation_000002.jsonl").unlink()
    result = compared(runs, judge, tmp_path / "out", "--name_a", "ranks", "--name_b", "z-scores", "--seed", "5")
    assert (result["a"], result["b"], result["seed"]) == ("ranks", "z-scores", 5)
    assert [rate["step"] for rate in result["win_rate"]] == [0, 4]


def test_compare_refuses(
    runs: tuple[Path, Path], judge: Path, policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = runs
    rest = ("--judge", judge, "--out", tmp_path / "out")
    assert "--judge" in refused(capsys, "compare", a, b, "--out", tmp_path / "out")
    assert "did you mean 'judge'" in refused(capsys, "compare", a, b, *rest, "--jugde", "x")
    assert "not a run" in refused(capsys, "compare", a, tmp_path / "no", *rest)
    assert "--name_a" in refused(capsys, "compare", a, a, *rest)
    assert "directory's name" in refused(capsys, "compare", a, b, *rest, "--name_a", "../x")
    assert "expected a reward model" in refused(capsys, "compare", a, b, "--judge", policy, "--out", tmp_path / "out")
    assert "no such directory" in refused(
        capsys, "compare", a, b, "--judge", tmp_path / "no", "--out", tmp_path / "out"
    )
    # the reward model they were trained against, however its path is written
    trained_on = tmp_path / "gopo" / ".." / "reward"
    for judge_path in (trained_on, f"{trained_on}@40"):
        assert "trained against" in refused(capsys, "compare", a, b, "--judge", judge_path, "--out", tmp_path / "out")
    other_steps = make_run(tmp_path / "late", tmp_path / "reward", 3, steps=(1, 3))
    assert "no validation step in common: 0, 2, 4 and 1, 3" in refused(capsys, "compare", a, other_steps, *rest)
    file = b / "completions" / "validation_000004.jsonl"
    file.write_text(file.read_text().replace(PROMPTS[3], "something else"))
    assert "1 prompts differ, e.g. prompt_id 3" in refused(capsys, "compare", a, b, *rest)
    empty = tmp_path / "sft"
    empty.mkdir()
    (empty / "config.yaml").write_text("{}")
    assert "validated" in refused(capsys, "compare", a, empty, *rest)


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["gauge"]) == 2
    assert capsys.readouterr().err.count("usage: python -m eval") == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: python -m eval") == 1


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"batch_prompts": 0}, {"batch_prompts": -8}, {"max_length": 0}])
def test_numbers_that_would_compare_nothing_are_refused(wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"^{name}: expected at least .*, got {value}$"):
        CompareConfig(run_a="a", run_b="b", judge="c", out="d", **wrong)  # type: ignore[arg-type]
