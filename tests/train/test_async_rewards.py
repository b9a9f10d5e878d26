"""Async rewards are awaited together, in their time; failures end the run or are counted; what is logged arrives."""

import asyncio
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from models.sampler import Rollout
from train.batch import Groups, choose, completion_table
from train.config import LogConfig, PolicyConfig, RewardSpec, ValidationConfig, resolved
from train.loop import train_policy
from train.rewards import Rewards
from train.rewards.functions import function_scorer
from train.rewards.logged import gather_columns, summed_metrics
from train.rewards.returned import RewardError
from train.run.directory import check_output_dir, read_metrics
from train.running import exit_code

PROMPTS, TEXTS = ["p", "q"], [["a", "bb"], ["ccc", ""]]
LENGTHS = [[1.0, 2.0], [3.0, 0.0]]


@pytest.fixture
def define(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """define(function) makes it importable; returns its dotted path."""
    module = types.ModuleType("async_rewards")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def put(function: Any, name: str = "f") -> str:
        setattr(module, name, function)
        return f"{module.__name__}.{name}"

    return put


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.rewards.call.PAUSE", 0.0)


def score(*specs: RewardSpec, directory: Path | None = None) -> tuple[np.ndarray, Rewards]:
    rewards = Rewards(specs, None, "float32")
    if directory is not None:
        rewards.belong_to(directory, 10, 2.0)
        rewards.at(4, "step 5")
    return rewards.score(PROMPTS, TEXTS, {"answer": [1, 2]}), rewards


async def counts(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]


class Counting:
    async def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return await counts([], completions)


@pytest.mark.parametrize("function", [counts, Counting()], ids=["function", "object"])
def test_an_async_reward_is_awaited(function: Any, define: Callable[..., str]) -> None:
    scorer = function_scorer(define(function))
    for _ in range(2):  # in one event loop: what a module keeps belongs to it
        np.testing.assert_array_equal(scorer(PROMPTS, TEXTS, {}), LENGTHS)


def test_async_rewards_wait_together_and_beside_the_others(define: Callable[..., str]) -> None:
    order: list[str] = []
    met = asyncio.Event()

    async def first(completions: list[str]) -> list[float]:
        order.append("began")
        await asyncio.wait_for(met.wait(), 10)  # until the second one runs
        order.append("ended")
        return [0.0] * 4

    async def second(completions: list[str]) -> list[float]:
        met.set()
        return [0.0] * 4

    def plain(completions: list[str]) -> list[float]:
        order.append("plain")
        return [0.0] * 4

    specs = [RewardSpec(function=define(f, f.__name__)) for f in (plain, first, second)]
    score(*specs)
    assert set(order) == {"began", "plain", "ended"}


def test_an_async_reward_that_is_late_is_cancelled(define: Callable[..., str], tmp_path: Path) -> None:
    ends: list[str] = []

    async def late(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ends.append("cancelled")
        return []

    words = (
        r"^rewards.function: async_rewards.f: no rewards within 0.05 s, for 4 completions \(2 attempts\); they are in "
    )
    with pytest.raises(RewardError, match=words):
        score(RewardSpec(function=define(late), timeout_s=0.05, retries=1), directory=tmp_path)
    assert ends == ["cancelled"] * 2
    (file,) = (tmp_path / "completions").iterdir()
    assert [json.loads(line)["completion"] for line in file.read_text().splitlines()] == ["a", "bb", "ccc", ""]


def test_one_that_blocks_the_event_loop_is_left_behind(
    define: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.rewards.runners.GRACE", 0.05)
    monkeypatch.setattr("train.rewards.runners.POLL_SECONDS", 0.02)

    async def blocks(completions: list[str]) -> list[float]:
        time.sleep(0.5)
        return [0.0] * 4

    with pytest.raises(RewardError, match="no rewards within 0.05 s .it blocks its event loop and goes on in a thread"):
        score(RewardSpec(function=define(blocks), timeout_s=0.05, retries=3))
    np.testing.assert_array_equal(score(RewardSpec(function=define(counts)))[0][..., 0], LENGTHS)  # in a new one


def test_a_function_of_the_runs_own_process_has_no_time_limit(define: Callable[..., str]) -> None:
    spec = RewardSpec(function=define(lambda completions: []), timeout_s=1.0)
    with pytest.raises(ValueError, match="rewards.timeout_s: async_rewards.f runs in the run's own process, where"):
        Rewards([spec], None, "float32")


@pytest.mark.parametrize("setting", [{"workers": 1}, {"timeout_s": 1.0}, {"retries": 1}, {"on_error": "unscorable"}])
def test_a_reward_model_is_not_called_so(setting: Any) -> None:
    with pytest.raises(ValueError, match="rewards.workers, timeout_s, retries, on_error: are"):
        RewardSpec(model="m", **setting)
    RewardSpec(function="length", **setting)


async def leaves(completions: list[str]) -> list[float]:
    sys.exit(0)


async def goes(completions: list[str]) -> list[float]:
    os._exit(0)


async def cancels(completions: list[str]) -> list[float]:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("function", "deed"),
    [(leaves, r"raised SystemExit\(0\)"), (goes, r"called os._exit\(0\)"), (cancels, r"raised CancelledError\(\)")],
)
def test_an_async_reward_cannot_end_the_run_in_silence(function: Any, deed: str, define: Callable[..., str]) -> None:
    with pytest.raises(RewardError, match=f"^rewards.function: async_rewards.f: {deed}, which would have ended") as end:
        try:
            score(RewardSpec(function=define(function)))
        except ValueError as error:
            raise RewardError(str(error)) from error
    assert "\n" not in str(end.value)
    np.testing.assert_array_equal(score(RewardSpec(function=define(counts)))[0][..., 0], LENGTHS)


def test_the_run_stays_in_its_directory(define: Callable[..., str], tmp_path: Path) -> None:
    before = Path.cwd()

    async def roams(completions: list[str]) -> list[float]:
        os.chdir(tmp_path)
        return [0.0] * 4

    score(RewardSpec(function=define(roams)))
    assert Path.cwd() == before


# Failures


def test_an_exception_is_the_functions_own_and_its_texts_are_kept(define: Callable[..., str], tmp_path: Path) -> None:
    def fails(completions: list[str]) -> list[float]:
        raise ZeroDivisionError("x")

    async def fails_later(completions: list[str]) -> list[float]:
        raise ZeroDivisionError("x")

    for function in (fails, fails_later):
        with pytest.raises(ZeroDivisionError) as caught:
            score(RewardSpec(function=define(function, function.__name__)), directory=tmp_path)
        assert caught.value.__context__ is None, "its traceback alone"
        assert (tmp_path / "completions" / f"failed_step_000005_{function.__name__}.jsonl").is_file()


def test_a_call_is_made_again(define: Callable[..., str]) -> None:
    calls: list[list[str]] = []

    def third(completions: list[str]) -> list[float]:
        calls.append(list(completions))
        completions.clear()
        if len(calls) < 3:
            raise OSError("away")
        return [0.0] * 4

    async def third_later(completions: list[str]) -> list[float]:
        return third(completions)

    for function in (third, third_later):
        calls.clear()
        score(RewardSpec(function=define(function), retries=2))
        assert calls == [["a", "bb", "ccc", ""]] * 3, "each attempt has its own copies"
        calls.clear()
        with pytest.raises(OSError, match="away"):
            score(RewardSpec(function=define(function), retries=1))


def test_failures_are_counted_and_the_first_is_shown(
    define: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(completions: list[str]) -> list[float]:
        raise ZeroDivisionError("x")

    fine = RewardSpec(function=define(counts, "counts"))
    rewards_PGR, rewards = score(
        fine, RewardSpec(function=define(fails), on_error="unscorable", missing="ignore"), directory=tmp_path
    )
    rewards.score(PROMPTS, TEXTS, {})
    np.testing.assert_array_equal(rewards_PGR[..., 0], LENGTHS)
    np.testing.assert_array_equal(rewards.combine(rewards_PGR), LENGTHS)
    assert np.isnan(rewards_PGR[..., 1]).all()
    assert rewards.metrics(rewards_PGR)["rewards/f/failed"] == 8
    said = capsys.readouterr().out
    assert said.count("rewards: f: step 5: ZeroDivisionError: x (1 attempt); 4 completions are unscorable") == 1
    assert said.count('raise ZeroDivisionError("x")') == 1


def test_a_run_goes_on_with_another_time_limit(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    spec, shown = RewardSpec(function="length"), ValidationConfig(rewards=[RewardSpec(function="length", name="v")])
    config = policy_config(tmp_path, rewards=[spec], validation=shown)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved(config)))))
    patient = {"workers": 2, "timeout_s": 9.0, "retries": 1, "on_error": "unscorable", "batch_prompts": 1}
    shown = replace(shown, rewards=[replace(shown.rewards[0], **patient)])
    check_output_dir(replace(config, rewards=[replace(spec, **patient)], validation=shown))
    with pytest.raises(ValueError, match="another config"):
        check_output_dir(replace(config, rewards=[replace(spec, missing="group_min")]))


# What functions log


def logs(
    completions: list[str], answer: list[int], log_extra: Any = None, log_metric: Any = None, **kwargs: Any
) -> list[float]:
    if log_extra:
        log_extra("answer", answer)
    if log_metric:
        log_metric("share", np.mean([bool(text) for text in completions]))
        log_metric("nothing", float("nan"))
    return [float(len(text)) for text in completions]


def test_what_is_logged_reaches_metrics_and_columns(define: Callable[..., str]) -> None:
    rewards_PGR, rewards = score(RewardSpec(function=define(logs)))
    metrics = rewards.metrics(rewards_PGR)
    assert metrics["logged/f/share"] == 0.75 and "logged/f/nothing" not in metrics
    assert rewards.take_columns() == {"logged/f/answer": [[1, 1], [2, 2]]}
    assert "logged/f/share" not in rewards.metrics(rewards_PGR), "of a step alone"


def test_what_a_function_is_not_told_to_take_is_not_passed(define: Callable[..., str]) -> None:
    seen: list[set[str]] = []

    def all_columns(completions: list[str], *, log_metric: Any = None, **columns: Any) -> list[float]:
        assert callable(log_metric)
        seen.append(set(columns))
        return [0.0] * 4

    score(RewardSpec(function=define(all_columns)))
    assert seen == [{"prompts", "answer"}]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (lambda metric, columns: metric("m", "x"), "async_rewards.f: log_metric: m: expected a finite number, got 'x'"),
        (lambda metric, columns: metric("m", float("inf")), "expected a finite number, got 'inf'"),
        (lambda metric, columns: columns("c", [1]), "log_columns: c: expected 4 values, one per completion, got 1"),
    ],
    ids=["text", "infinite", "one value"],
)
def test_what_cannot_be_logged_is_named(log: Any, words: str, define: Callable[..., str]) -> None:
    def function(completions: list[str], log_metric: Any, log_columns: Any) -> list[float]:
        log(log_metric, log_columns)
        return [0.0] * 4

    with pytest.raises(RewardError, match=words):
        score(RewardSpec(function=define(function)))


def test_columns_move_with_their_groups_and_have_one_type() -> None:
    settings: Any = types.SimpleNamespace(
        prompts_per_step=2,
        dynamic_sampling_attempts=2,
        loss=types.SimpleNamespace(mask_truncated_completions=False),
    )
    rollout = Rollout(np.zeros((2, 2, 1), int), np.zeros((2, 2, 1)), np.ones((2, 2), int), np.ones((2, 2), bool))
    rewards_PGR = np.array([[[1.0], [1.0]], [[1.0], [2.0]]])
    parts = ([{}, {}], np.zeros((2, 1), int), np.ones(2, int), rollout, rewards_PGR, np.isnan(rewards_PGR[..., 0]))
    drawn = [Groups(*parts, {"logged/f/a": [[1, 2], [3, "x"]]}), Groups(*parts, {})]
    chosen = choose(
        drawn, lambda rewards_PGR: rewards_PGR[..., 0] - rewards_PGR[..., 0].mean(-1, keepdims=True), settings
    )
    assert chosen.logged_PG == {"logged/f/a": [[3, "x"], [None, None]]}
    table = completion_table(["p", "q"], TEXTS, chosen, ["f"], np.zeros((2, 2)))
    assert table["logged/f/a"] == ["3", "x", None, None]


def test_processes_put_together_what_each_has_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.rewards.logged.is_distributed", lambda: True)
    monkeypatch.setattr("train.rewards.logged.gather_lists", lambda rows: [*rows, *rows])
    assert summed_metrics({"a": [3.0, 2.0]}, {"n": 1.0}) == {"a": 1.5, "n": 2.0}
    assert gather_columns({"c": [["x", None]]}, 1, 2) == {"c": [["x", None]] * 2}
    assert gather_columns({}, 1, 2) == {}


@pytest.fixture
def run(define: Callable[..., str], policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> Iterator[Path]:
    def wanted_logs(
        completions: list[str], wanted: list[str], log_metric: Any, log_columns: Any, trainer_state: Any
    ) -> Any:
        log_metric("step", trainer_state.global_step)
        log_metric("epoch", trainer_state.epoch)
        log_columns("wanted", wanted)
        return [float(len(text)) for text in completions]

    settings = {
        "log": LogConfig(tensorboard=False, progress=False, completions_every=2),
        "validation": ValidationConfig(every=3, prompts=4, num_generations=4, batch_prompts=4),
        "rollout_prompts": 2,
    }
    spec = RewardSpec(function=define(wanted_logs), name="w")
    assert exit_code(lambda: train_policy(policy_config(tmp_path, rewards=[spec], **settings)), own_devices=True) == 0
    yield tmp_path / "run"


def test_a_run_writes_what_its_rewards_have_logged(run: Path) -> None:
    rows = read_metrics(run)
    assert [row.get("logged/w/step") for row in rows] == [None, 0, 1, 2]
    assert rows[2]["logged/w/epoch"] == pytest.approx(4 / 24)
    assert rows[3]["validation/logged/w/step"] == 3
    table = pyarrow.parquet.read_table(run / "completions" / "train_000002.parquet").to_pydict()
    prompts = [
        json.loads(line)
        for line in Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]).read_text().splitlines()
    ]
    wanted = {row["prompt"]: row["wanted"] for row in prompts}
    assert table["logged/w/wanted"] == [wanted[prompt] for prompt in table["prompt"]]
    lines = (run / "completions" / "validation_000003.jsonl").read_text().splitlines()
    assert all(row["logged/w/wanted"] == wanted[row["prompt"]] for row in map(json.loads, lines))


def test_a_hanging_await_says_where_it_is(
    define: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.user_code.HANG_SECONDS", 0.05)

    async def inner() -> None:
        await asyncio.sleep(0.3)

    async def outer(completions: list[str]) -> list[float]:
        await inner()
        return [0.0] * 4

    score(RewardSpec(function=define(outer)))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("rewards: async_rewards.f: has not returned for") and "it is at outer (" in line
    assert "> inner (" in line
