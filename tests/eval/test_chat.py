"""`python -m eval chat` by lines on standard input; and best of n."""

import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.__main__ import main
from eval.texts.best_of import best_of_by_temperature, best_of_sheet, best_rows, expected_best, kl_bound


@pytest.fixture(scope="module")
def chatty_policy(tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path) -> Path:
    """The tiny policy, with a chat template."""
    import shutil

    directory = tmp_path_factory.mktemp("chat") / "policy"
    shutil.copytree(tiny_policy_dir, directory)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """said(policy, lines, *arguments): what is printed behind the greeting."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))

    def run(policy: Path, lines: list[str], *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        sizes = ("--max_completion_length", 4, "--max_prompt_length", 64)
        assert main(["chat", "--checkpoint", str(policy), *map(str, (*sizes, *arguments))]) == 0
        return capsys.readouterr().out.split("lists the commands\n")[1].splitlines()

    return run


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that the policy gets, in place of an answer that takes time."""
    prompts: list[Any] = []

    def complete(self: Any, params: Any, given: list[Any], key: Any, *_: Any) -> Any:
        from models.generate import Completions

        prompts.append(given[0])
        one = np.ones((1, 1), int)
        return Completions([[f"answer {len(prompts)}"]], one, one == 1, one[..., None])

    monkeypatch.setattr("models.generate.Generator.complete", complete)
    return prompts


def test_the_whole_conversation_is_asked(chatty_policy: Path, said: Callable[..., list[str]], heard: list[Any]) -> None:
    lines = ["one", "", "two", "/reset", "three", "/system be kind", "four", "/system", "five", "/quit", "six"]
    printed = said(chatty_policy, lines)
    assert [line for line in printed if line.startswith("answer")] == [f"answer {n}" for n in range(1, 6)]
    user, assistant = (lambda text: {"role": "user", "content": text}), {"role": "assistant", "content": "answer 1"}
    assert heard[0] == [user("one")] and heard[1] == [user("one"), assistant, user("two")]
    assert heard[2] == [user("three")] and heard[4] == [user("five")]
    assert heard[3] == [{"role": "system", "content": "be kind"}, user("four")]


def test_without_a_chat_template_each_line_stands_alone(
    tiny_policy_dir: Path, said: Callable[..., list[str]], heard: list[Any]
) -> None:
    said(tiny_policy_dir, ["one", "two"])
    assert heard == ["one", "two"]


def test_what_cannot_be_done_is_said_and_changes_nothing(
    chatty_policy: Path, said: Callable[..., list[str]], heard: list[Any]
) -> None:
    lines = ["one", "x" * 99, "/temperature warm", "/seed -1", "/tempreature 1", "two"]
    printed = "\n".join(said(chatty_policy, lines))
    assert "more than max_prompt_length = 64; /reset" in printed
    assert "/temperature: expected a number from 0, got 'warm'" in printed and "/seed: expected" in printed
    assert "there is no /tempreature" in printed
    assert [message["content"] for message in heard[1]] == ["one", "answer 1", "two"]


@pytest.mark.slow
def test_the_seed_makes_the_answers(tiny_policy_dir: Path, said: Callable[..., list[str]]) -> None:
    lines = ["one", "one", "/seed 0", "one", "/seed 5", "one", "/temperature 0", "one", "one"]
    answers = [line for line in said(tiny_policy_dir, lines) if not line.startswith(("seed", "temperature"))]
    assert len(answers) == 6 and answers[0] == answers[2] and len({*answers[:2], answers[3]}) == 3
    assert answers[4] == answers[5], "greedy"


def test_an_answer_ends_with_a_stop_string(tiny_policy_dir: Path, said: Callable[..., list[str]]) -> None:
    """All that can be said but for a few bytes: the first token ends it, which is then no cut."""
    letters = [chr(code) for code in range(33, 127)]
    (answer,) = said(tiny_policy_dir, ["one"], "--temperature", 0, "--min_p", 0.1, "--stop", *letters)
    assert any(letter in answer for letter in letters) == ("[cut" not in answer)


def test_chat_refuses_a_reward_model(tiny_reward_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--checkpoint", str(tiny_reward_dir)]) == 2
    assert "expected a policy, got a reward model" in capsys.readouterr().err


# best of n


@pytest.mark.parametrize("n", [1, 4, 6])
def test_the_best_of_k_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = np.random.default_rng(n).integers(0, 4, n).astype(float).tolist()  # with ties
    for k in range(1, n + 1):
        every = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert expected_best(rewards, k) == pytest.approx(np.mean(every))
    with pytest.raises(ValueError, match="k: expected a number from 1"):
        expected_best(rewards, n + 1)


def test_the_kl_of_the_best_of_a_continuous_reward_meets_the_bound() -> None:
    """Where no two rewards are equal it is the integral of log(k u^(k-1)) k u^(k-1) over u in [0, 1]."""
    u = (np.arange(200_000) + 0.5) / 200_000
    for k in (1, 2, 5):
        density = k * u ** (k - 1)
        assert kl_bound(k) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)


def scored() -> list[dict[str, Any]]:
    rewards = {(0, 0.5): [1.0, 3.0, 3.0], (0, 1.0): [None, -2.0], (1, 0.5): [0.5, None, 0.0], (2, 1.0): [None]}
    return [
        {"prompt_id": p, "prompt": f"p{p}", "completion": f"c{g}", "temperature": t, "sample": g, "reward": reward}
        for (p, t), group in rewards.items()
        for g, reward in enumerate(group)
    ]


def test_the_best_of_each_prompt_and_temperature() -> None:
    best = best_rows(scored())
    found = [(row["prompt_id"], row["temperature"], row["best_sample"], row["best_of"]) for row in best]
    assert found == [(0, 0.5, 1, 3), (0, 1.0, 1, 1), (1, 0.5, 0, 2)], "the first of equals; no unscorable one"
    assert {row["sample"] for row in best} == {0}
    table = best_of_by_temperature(scored())
    assert [e["mean"] for e in table[0.5]] == [pytest.approx((7 / 3 + 0.25) / 2), (3 + 0.5) / 2, 3]
    assert [e["prompts"] for e in table[0.5]] == [2, 2, 1] and [e["prompts"] for e in table[1.0]] == [1]


def test_a_temperature_that_is_no_number_is_none() -> None:
    rows = [row | {"temperature": "hot"} for row in scored()]
    assert (
        best_of_sheet(best_of_by_temperature(rows)).rows
        == best_of_sheet(best_of_by_temperature([row | {"temperature": None} for row in rows])).rows
    )


@pytest.mark.slow
def test_best_of_from_the_command(
    tiny_reward_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    rows = [{name: value for name, value in row.items() if name != "reward"} for row in scored()]
    rows[1]["completion"] = "x" * 99  # longer than max_length
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--responses", tmp_path / "r.jsonl", "--reward_model", tiny_reward_dir, "--out", tmp_path / "s.jsonl"]
    arguments += ["--best_of", tmp_path / "best.jsonl", "--max_length", 32, "--batch_prompts", 2]
    assert main(["reward", *map(str, arguments)]) == 0
    with_rewards = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    best = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert best == best_rows(with_rewards) and len(best) == 4
    printed = capsys.readouterr().out
    assert "Best of k" in printed and "1 unscorable ones left out" in printed
