"""Laws of the judge: pairs, tasks, outcomes of both orders, and the judges that run here: a policy, a reward model."""

import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.__main__ import main
from eval.judges.command import JudgeConfig, parse_judge
from eval.judges.likelihood import INSTRUCTION, LikelihoodJudge
from eval.judges.pairs import LONGEST_WRITTEN, CompletionPair, Judgement, PairKey, read_pairs
from eval.judges.results import accuracy, outcome_of, read_judgements, results, row_of, step_of
from eval.judges.task import TASKS, JudgeTask, load_task, read_task, readable
from eval.stats import cohen_kappa
from models.checkpoint import load_model
from models.sharding import make_layout
from models.tokenizer import Tokenizer
from train.rewards.model import RewardModelScorer

Row = dict[str, Any]
SHORT = {
    "answer": "choice",
    "system": "Judge.",
    "user": "{prompt}\n1 {first}\n2 {second}",
    "reply": "A or B?",
    "labels": ["A", "B"],
}


def write(file: Path, rows: list[Row]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def completions(side: str, prompts: int = 4, **columns: Any) -> list[Row]:
    return [{"prompt_id": p, "prompt": f"q{p}", "completion": f"{side}{p}"} | columns for p in range(prompts)]


@pytest.fixture
def pairs_of(tmp_path: Path) -> Callable[..., list[CompletionPair]]:
    def read(a: list[Row], b: list[Row], **options: Any) -> list[CompletionPair]:
        return read_pairs(write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b), **options)

    return read


# Tasks


@pytest.mark.parametrize("name", sorted(file.stem for file in TASKS.glob("*.yaml")))
def test_every_shipped_task_is_asked_whole(name: str) -> None:
    """No placeholder stays, and what is put in stays as it is."""
    task = load_task(name)
    values = {key: f"<{key} {{first}} {{answer}} {{}} {{prompt}}>" for key in ("prompt", "first", "second", "answer")}
    values |= {key: f"<{key} {{second}}>" for key in (*task.before, "explanation_first", "explanation_second")}
    for question in (task.question, *task.before.values(), *([task.reconsider] if task.reconsider else [])):
        asked = question.messages(values)
        text = asked[-1]["content"]
        for key in question.placeholders:
            assert text.count(values[key]) == 1, key
            text = text.replace(values[key], "")
        assert "{" not in text and [message["role"] for message in asked][-1:] == ["user"]


def test_other_braces_of_a_template_stay() -> None:
    task = read_task("t", SHORT | {"reply": '{"overall": "A"} or {}, {Prompt}, {{prompt}}'})
    text = task.question.messages({"prompt": "p", "first": "{", "second": "}"})[-1]["content"]
    assert text == 'p\n1 {\n2 }\n\n{"overall": "A"} or {}, {Prompt}, {p}'


def test_messages_are_readable() -> None:
    assert readable("q") == readable([{"role": "user", "content": "q"}]) == "q"
    talk = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    assert readable(talk) == "[system]\ns\n\n[user]\nu\n\n[assistant]\na\n\n[user]\nu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "prose"}, "answer: expected one of json, choice"),
        ({"labels": ["A"]}, "labels: expected two names"),
        ({"labels": ["A", "a"]}, "differ"),
        ({"labels": ["A", "tie"]}, "differ"),
        ({"labels": ["A", "AB"]}, "part of the other"),
        ({"labels": ["?", "!"]}, "a letter or a digit"),
        ({"user": None}, "user: expected the text"),
        ({"user": "{prompt} {first}"}, "{second} is missing"),
        ({"user": "{prompt} {first} {second} {third}"}, "unknown placeholder {third}"),
        ({"usr": "x"}, "unknown key usr"),
        ({"aspects": ["overall"]}, "only with answer: json"),
        ({"answer": "json", "aspects": ["wit", "overall"]}, "'wit' is asked for nowhere"),
        ({"answer": "json", "aspects": ["wit"]}, "'overall' among them"),
        ({"answer": "score", "user": "{prompt} {answer}", "range": [5, 1]}, "range: expected"),
        ({"answer": "score"}, "{answer} is missing"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"before": {"hints": {"user": "{prompt}"}}}, "{hints} is missing"),
        ({"before": {"hints": "x"}}, "hints.user"),
        ({"reconsider": {"answer": "json", "user": "x"}}, "reconsider.answer"),
        ({"reconsider": {"user": "{prompt} {first} {second}"}}, "{explanation_first} is missing"),
        ({"closing": "It is so."}, "closing"),
        ({"closing": 5}, "closing: expected a sentence"),
        ({"closing": None}, "closing: expected a sentence"),
        ({"ties": "maybe"}, "ties: expected true or false"),
        ({"reconsider": True}, "reconsider: expected a question"),
        ({"before": [1]}, "before: expected 'name: question'"),
        ({"before": {"first": {"user": "{prompt}"}}}, "before: expected a name of a-z and _ other than prompt, first"),
        ({"before": {"Ref2": {"user": "{prompt}"}}}, "before: expected a name of a-z and _"),
    ],
)
def test_a_task_that_is_none_is_refused(change: Row, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(SHORT | change))
    with pytest.raises(ValueError, match="task.yaml: ") as error:
        load_task(str(tmp_path / "task.yaml"))
    assert message in str(error.value)


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="chat, llmbar_cot"):
        load_task("chatt")


# Pairs


def test_the_kth_completion_meets_the_kth(pairs_of: Callable[..., list[CompletionPair]]) -> None:
    """By prompt and temperature, whatever the order of the files; `sample` says which is the k-th."""
    a = [
        {"prompt_id": p, "prompt": f"q{p}", "completion": f"a{p}{t}{k}", "temperature": t, "sample": k}
        for p in range(3)
        for t in (0.1, 0.9)
        for k in range(2)
    ]
    b = [row | {"completion": "b" + row["completion"][1:]} for row in a]
    pairs = pairs_of(a[::-1], b)
    assert [pair.a[1:] for pair in pairs] == [pair.b[1:] for pair in pairs] == [row["completion"][1:] for row in a]
    assert pairs[0].key == PairKey(0, 0.1, 0) and len(pairs_of(a, b, limit=2)) == 8


def test_response_is_a_completion(pairs_of: Callable[..., list[CompletionPair]]) -> None:
    a = [{"prompt_id": 0, "prompt": "q", "response": "x"}]
    assert pairs_of(a, completions("b", 1, prompt="q"))[0].a == "x"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            completions("a"),
            completions("b", 3),
            "1 of the 4 prompts of .*a.jsonl are missing, the first with prompt_id 3",
        ),
        (completions("a", 3), completions("b"), "a.jsonl: 1 of the 4 prompts of .*b.jsonl are missing"),
        (completions("a", 1), completions("b", 1, prompt="other"), "prompt_id 0 stands for one prompt in"),
        (completions("a") + completions("a", 1), completions("b"), "prompt_id 0: 2 completions in .*, 1 in"),
        (completions("a", 1, temperature=0.5), completions("b", 1), "prompt_id 0: 0 completions in .*, 1 in"),
        (completions("a", 1) + completions("a", 1, prompt="o"), completions("b", 1), "stands for two prompts"),
        ([{"prompt_id": 0, "prompt": "q"}], completions("b"), "row 1 has no 'completion'"),
        ([{"prompt": "q", "completion": "q"}], completions("b"), "row 1 has no 'prompt_id'"),
        (completions("a", 1, prompt_id=7), completions("b"), "no prompt_id in common"),
        (completions("a", 1, completion=["x"]), completions("b"), "a completion that is text"),
        (completions("a", 1, completion="\ud800"), completions("b"), "row 1: .* surrogate"),
        (completions("a", 1, temperature="hot"), completions("b", 1), "row 1: expected a temperature that is a number"),
        (completions("a", 1, temperature=[1]), completions("b", 1), "row 1: expected a temperature that is a number"),
        (completions("a", 1, temperature=math.nan), completions("b", 1), "a temperature that is a number"),
        (completions("a", 1, sample=0) * 2, completions("b", 1) * 2, "a.jsonl: prompt_id 0: two .* are sample 0"),
        (completions("a", 1, sample=0) + completions("a", 1), completions("b", 1) * 2, "'sample' of every row"),
        (completions("a", 1, sample="x"), completions("b", 1), "a whole number in 'sample'"),
        (completions("a", 1, prompt=[]), completions("b", 1, prompt={"x": 1}), "a prompt that is text"),
    ],
)
def test_what_cannot_be_paired_is_refused(
    a: list[Row], b: list[Row], message: str, pairs_of: Callable[..., list[CompletionPair]]
) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(a, b)


def test_other_samples_are_paired_and_said(
    pairs_of: Callable[..., list[CompletionPair]], capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(side: str, *samples: int) -> list[Row]:
        return [row | {"completion": f"{side}{k}"} for k in samples for row in completions(side, 1, sample=k)]

    assert [(pair.a, pair.b) for pair in pairs_of(rows("a", 0, 1), rows("b", 7, 5))] == [("a0", "b5"), ("a1", "b7")]
    assert "2 of 2 pairs have different numbers in 'sample' (first: 0 and 5)" in capsys.readouterr().out
    pairs_of(rows("a", 0, 1), rows("b", 1, 0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outcome": "win"}, "row 2: expected an outcome from 0 to 1"),
        ({"outcome": 2}, "row 2: expected an outcome from 0 to 1"),
        ({"prompt_id": [1]}, "row 2: expected numbers or texts in prompt_id"),
    ],
)
def test_earlier_judgements_that_are_none(change: Row, message: str, tmp_path: Path) -> None:
    row = row_of(made_up(0)[0][0], None)
    write(tmp_path / "judgements.jsonl", [row, row | change])
    with pytest.raises(ValueError, match=f"judgements.jsonl: {message}"):
        read_judgements(str(tmp_path))


def test_equal_and_empty_answers_are_counted_and_said(
    pairs_of: Callable[..., list[CompletionPair]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = completions("a"), completions("b")
    pairs_of(a, b)
    assert capsys.readouterr().out == ""
    a[0]["completion"] = b[0]["completion"] = a[1]["completion"] = " \n"
    a[2]["completion"] = b[2]["completion"]
    pairs_of(a, b)
    words = f"2 answers of {tmp_path}/a.jsonl and 1 of {tmp_path}/b.jsonl are empty"
    assert capsys.readouterr().out == f"of 4 pairs 2 have equal answers; {words}\n"


def test_common_prompts_alone(
    pairs_of: Callable[..., list[CompletionPair]], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_of(completions("a", 4)[1:], completions("b", 3), common=True)
    assert [pair.key.prompt_id for pair in pairs] == [1, 2]
    assert capsys.readouterr().out.count("1 of 3 prompts left out") == 2


# Outcomes


def order(shown: str, winner: str | None, kind: str = "strict", **aspects: str) -> Row:
    return {
        "shown": shown,
        "winner": winner,
        "kind": kind,
        "aspects": aspects | ({"overall": winner} if winner else {}),
    }


@pytest.mark.parametrize(
    ("winners", "expected"),
    [
        (("a", "a"), 1),
        (("b", "b"), 0),
        (("a", "b"), 0.5),
        (("b", "a"), 0.5),
        (("tie", "tie"), 0.5),
        (("a", "tie"), 0.75),
        (("b", "tie"), 0.25),
        (("a", None), None),
        ((None, "b"), None),
        ((None, None), None),
    ],
)
def test_an_outcome_is_the_mean_of_both_orders(winners: tuple[Any, Any], expected: float | None) -> None:
    judged = Judgement([order("ab", winners[0]), order("ba", winners[1])])
    assert outcome_of(judged)[1] == expected


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("strict", "unparsable"), "unparsable"),
        (("unparsable", "failed"), "failed"),
        (("too_long", "unparsable"), "too_long"),
        (("too_long", "failed"), "failed"),
    ],
)
def test_why_there_is_no_outcome(kinds: tuple[str, str], expected: str) -> None:
    judged = Judgement([order(o, "a" if k == "strict" else None, k) for o, k in zip(("ab", "ba"), kinds, strict=True)])
    assert outcome_of(judged) == (expected, None)


def made_up(seed: int, prompts: int = 30) -> list[tuple[CompletionPair, Judgement | None]]:
    """Judgements of 2 samples a prompt, of which some are identical, some missing."""
    rng = np.random.default_rng(seed)
    found: list[tuple[CompletionPair, Judgement | None]] = []
    for p in range(prompts):
        for k in range(2):
            a, b = "a" * int(rng.integers(1, 9)), "b" * int(rng.integers(1, 9))
            winners = rng.choice(["a", "b", "tie", ""], 2, p=[0.45, 0.35, 0.1, 0.1]).tolist()
            judged = Judgement(
                [
                    order(o, w or None, "strict" if w else "unparsable")
                    for o, w in zip(("ab", "ba"), winners, strict=True)
                ]
            )
            if rng.random() < 0.1:
                b, judged = a, None  # type: ignore[assignment]
            found.append(
                (CompletionPair(PairKey(p, float(k), 0), f"q{p}", a, b, {"length": len(a)}, {"length": len(b)}), judged)
            )
    return found


def exchange(pair: CompletionPair, judged: Judgement | None) -> tuple[CompletionPair, Judgement | None]:
    other = {"a": "b", "b": "a", "tie": "tie", None: None}
    mirror = CompletionPair(pair.key, pair.prompt, pair.b, pair.a, pair.row_b, pair.row_a)
    if judged is None:
        return mirror, None
    orders = [order(o["shown"][::-1], other[o["winner"]], o["kind"]) for o in judged.orders]
    return mirror, Judgement(orders[::-1])


@pytest.mark.parametrize("seed", range(3))
def test_exchanging_the_sides_mirrors_everything(seed: int) -> None:
    found = made_up(seed)
    one = results([row_of(*item) for item in found], 7)
    other = results([row_of(*exchange(*item)) for item in found], 7)
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    summaries = [(one[key], other[key]) for key in ("win_rate", "length_controlled")]
    summaries += [(one[key][name], other[key][name]) for key in ("aspects", "temperatures") for name in one[key]]
    assert len(summaries) == 5
    for mine, theirs in summaries:
        assert (mine["mean"], mine["low"], mine["high"]) == (1 - theirs["mean"], 1 - theirs["high"], 1 - theirs["low"])
    for key in ("position_bias", "consistent", "judged", "identical", "unparsable", "prompts", "pairs"):
        assert one[key] == other[key]
    assert one["judged"] + one["identical"] + one["unparsable"] == one["pairs"] == 60
    assert min(one["judged"], one["identical"], one["unparsable"]) > 0


def test_a_judge_that_looks_at_the_place_alone_finds_no_difference() -> None:
    pairs = [pair for pair, _ in made_up(0) if pair.a != pair.b]
    result = results([row_of(pair, Judgement([order("ab", "a"), order("ba", "b")])) for pair in pairs], 0)
    assert result["win_rate"]["mean"] == 0.5 and result["ties"] == len(pairs)
    assert result["consistent"] == 0 and result["position_bias"]["share"] == 1


def test_a_missing_pair_is_left_out_not_counted_as_a_tie() -> None:
    """masked = deleted"""
    found = made_up(1)
    whole = results([row_of(*item) for item in found], 0)
    valid = results([row for row in (row_of(*item) for item in found) if row["outcome"] is not None], 0)
    assert whole["win_rate"] == valid["win_rate"] and whole["length_controlled"] == valid["length_controlled"]
    assert whole["position_bias"] == valid["position_bias"] and whole["consistent"] == valid["consistent"]


def test_no_outcome_at_all() -> None:
    row = row_of(made_up(0)[0][0], Judgement([order("ab", None, "failed"), order("ba", None, "failed")]))
    result = results([row], 0, ["a"])
    assert math.isnan(result["win_rate"]["mean"]) and result["failed"] == 1
    assert result["position_bias"] is result["consistent"] is result["length_controlled"] is result["accuracy"] is None


def test_accuracy() -> None:
    """ab right 3 of 4, ba 2 of 4 and a tie; both right twice."""
    winners = [("a", "a"), ("a", "b"), ("b", "b"), ("b", "tie")]
    pairs = [CompletionPair(PairKey(p, None, 0), "q", "x", "y", {}, {}) for p in range(4)]
    rows = [
        row_of(pair, Judgement([order("ab", one), order("ba", other)]))
        for pair, (one, other) in zip(pairs, winners, strict=True)
    ]
    found = accuracy(rows, ["a", "a", "b", "a"])
    kappa = cohen_kappa(*zip(*winners, strict=True))
    assert found == {"pairs": 4, "ab": 0.75, "ba": 0.625, "mean": 0.6875, "both": 0.5, "equal": 0.5, "kappa": kappa}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("ann@1/run@20", "ann@1/other@20", 20),
        ("ann@1/run@20", "ann@1/other@9", None),
        ("ann@20/run", "ann@20/run", None),
        ("run@20", None, None),
    ],
)
def test_the_step_of_both_files_is_behind_the_last_separator(
    pairs_of: Callable[..., list[CompletionPair]], a: str, b: str | None, expected: int | None
) -> None:
    pairs = pairs_of(completions("a", checkpoint=a), completions("b", checkpoint=b))
    assert step_of("a.jsonl", "b.jsonl", pairs) == expected


def test_a_long_reply_is_cut_where_it_is_written_alone() -> None:
    assert len(row_of(made_up(0)[0][0], Judgement([order("ab", "a") | {"text": "x" * 10**6}] * 2))["orders"][0]) == 4
    from eval.judges.pairs import shortened

    assert shortened("x" * LONGEST_WRITTEN) == "x" * LONGEST_WRITTEN
    assert (
        shortened("x" * 10**6).startswith("x" * LONGEST_WRITTEN + " [... cut: 1000000")
        and len(shortened("x" * 10**6)) < LONGEST_WRITTEN + 50
    )


# The command


BACKENDS = {"likelihood": "tiny_policy_dir", "reward_model": "tiny_reward_dir"}


@pytest.fixture
def files(tmp_path: Path, sentences: list[str]) -> list[str]:
    """Six prompts at two temperatures; of one the answers are equal."""
    names = []
    for side, start in (("a", 0), ("b", 12)):
        rows = [
            {
                "prompt_id": p,
                "prompt": sentences[p][:10],
                "completion": "equal" if p == 5 else sentences[start + 6 * t + p][: 8 + 2 * p],
                "length": 8 + 2 * p,
                "temperature": (0.1, 0.9)[t],
                "truth": "ab"[p % 2],
                "checkpoint": f"runs/{side}@40",
            }
            for t in (0, 1)
            for p in range(6)
        ]
        names.append(write(tmp_path / f"{side}.jsonl", rows))
    return names


@pytest.fixture
def run(tmp_path: Path, files: list[str], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """run(backend, *more, out="out", files=files) -> judge.json, judgements.jsonl"""
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(SHORT))

    def judge(backend: str, *more: str, out: str = "out", exchanged: bool = False) -> tuple[Row, list[Row]]:
        model = str(request.getfixturevalue(BACKENDS[backend]))
        sides = files[::-1] if exchanged else files
        command = ["judge", *sides, "--out", str(tmp_path / out), "--backend", backend, "--model", model]
        assert main([*command, "--task", str(tmp_path / "short.yaml"), "--max_length", "128", *more]) == 0
        rows = [json.loads(line) for line in (tmp_path / out / "judgements.jsonl").read_text().splitlines()]
        return json.loads((tmp_path / out / "judge.json").read_text()), rows

    return judge


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs started here must not compile the same network again."""
    monkeypatch.setattr("eval.judges.reward_model.RewardModelScorer", functools.cache(RewardModelScorer))


CONTRACT = (  # noqa: SIM905
    "a b name_a name_b backend model task seed step prompts pairs judged identical unparsable failed too_long wins "
    "ties losses win_rate length_controlled position_bias consistent aspects temperatures requests cached tokens cost "
    "agreement accuracy"
).split()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_local_judge(backend: str, run: Callable[..., Any], tmp_path: Path, loaded_once: None) -> None:
    result, rows = run(backend, "--gold", "truth", "--name_a", "mine")
    assert set(CONTRACT) <= result.keys()
    assert (result["pairs"], result["judged"], result["identical"], result["prompts"]) == (12, 10, 2, 6)
    assert (result["name_a"], result["name_b"], result["step"]) == ("mine", "b", 40)
    assert set(result["temperatures"]) == {"0.1", "0.9"} and result["tokens"] == {"prompt": 0, "completion": 0}
    assert result["wins"] + result["ties"] + result["losses"] == 12 and result["accuracy"]["pairs"] == 10
    assert {row["outcome"] for row in rows if row["kind"] == "identical"} == {0.5}
    mirror, mirrored = run(backend, "--agree_with", str(tmp_path / "out"), out="mirror", exchanged=True)
    assert [row["outcome"] for row in mirrored] == [1 - row["outcome"] for row in rows]
    assert [row["scores"] and row["scores"][::-1] for row in mirrored] == [row["scores"] for row in rows]
    for key in ("win_rate", "length_controlled"):
        assert mirror[key]["mean"] == 1 - result[key]["mean"] and mirror[key]["low"] == 1 - result[key]["high"]
    assert mirror["agreement"] == [{"with": str(tmp_path / "out"), "kappa": 1.0, "pairs": 10}]


def test_regression_that_does_not_converge_is_one_line(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class ByOrder:
        def judge(self, pairs: list[CompletionPair]) -> list[Judgement]:
            return [Judgement([order("ab", "a"), order("ba", "ab"[len(pair.b) % 2])]) for pair in pairs]

    monkeypatch.setattr("eval.judges.command.local_judge", lambda *_: ByOrder())
    monkeypatch.setattr("eval.stats.NEWTON_STEPS", 1)
    command = ["judge", *files, "--out", str(tmp_path / "out"), "--backend", "likelihood", "--model", "m"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: length_controlled: the regression did not converge in 1 steps; please report")
    assert error.count("\n") == 1 and len((tmp_path / "out" / "judgements.jsonl").read_text().splitlines()) == 12


def test_likelihood_rows(run: Callable[..., Any]) -> None:
    """p is the mean over both orders of A's probability; the bias is of who won in each."""
    result, rows = run("likelihood")
    judged = [row for row in rows if row["kind"] == "judged"]
    for row in judged:
        ab, ba = row["orders"]
        assert row["p"] == pytest.approx((ab["p_first"] + 1 - ba["p_first"]) / 2)
        assert row["outcome"] == (row["p"] > 0.5) + 0.5 * (row["p"] == 0.5)
        assert [o["winner"] for o in (ab, ba)] == ["ab"[ab["p_first"] < 0.5], "ba"[ba["p_first"] < 0.5]]
    first = [o["p_first"] > 0.5 for row in judged for o in row["orders"]]
    assert result["position_bias"]["share"] == pytest.approx(np.mean(first))


def test_a_reward_model_has_no_order(run: Callable[..., Any], tiny_reward_dir: Path, loaded_once: None) -> None:
    result, rows = run("reward_model")
    assert result["position_bias"] is None and result["consistent"] is None
    scorer = RewardModelScorer(str(tiny_reward_dir), max_length=128)
    for row in rows[:3]:
        expected = scorer([row["prompt"]], [[row["a"], row["b"]]])[0]
        np.testing.assert_allclose(row["scores"], expected, atol=1e-4)
        assert row["outcome"] == float(expected[0] > expected[1])


def test_too_long_for_a_local_judge(run: Callable[..., Any]) -> None:
    result, rows = run("likelihood", "--max_length", "100")
    assert 0 < result["too_long"] < 10 and result["too_long"] + result["judged"] == 10
    assert {row["outcome"] for row in rows if row["kind"] == "too_long"} == {None}


# Likelihood against a plain call of the model


@pytest.fixture
def short_task() -> JudgeTask:
    return read_task("short", SHORT)


def likelihood(path: Path, task: JudgeTask, batch_prompts: int = 4, max_length: int = 256) -> LikelihoodJudge:
    options: Row = {"dtype": "float32", "max_length": max_length, "batch_prompts": batch_prompts}
    return LikelihoodJudge(str(path), task, layout=make_layout(data=1), **options)


def local_pairs(sentences: list[str], count: int = 5) -> list[CompletionPair]:
    return [
        CompletionPair(
            PairKey(i, None, 0), sentences[i][:10], sentences[i + 1][: 4 + 3 * i], sentences[i + 2][:9], {}, {}
        )
        for i in range(count)
    ]


def test_likelihood_is_that_of_the_next_token(
    tiny_policy_dir: Path, short_task: JudgeTask, sentences: list[str]
) -> None:
    """Each question alone and unpadded through the plain call; and the batch changes nothing beyond rounding."""
    pairs = local_pairs(sentences, 3)
    tokenizer, model = Tokenizer(tiny_policy_dir), load_model(tiny_policy_dir)
    label_a, label_b = (row[0] for row in tokenizer.encode(["A", "B"]))
    found = {size: likelihood(tiny_policy_dir, short_task, size).judge(pairs) for size in (1, 4)}
    for i, pair in enumerate(pairs[1:2], 1):
        for k, (first, second) in enumerate(((pair.a, pair.b), (pair.b, pair.a))):
            text = f"Judge.\n\n{pair.prompt}\n1 {first}\n2 {second}\n\n{INSTRUCTION.format('A', 'B')}\n\nAnswer:\n"
            tokens = np.array(tokenizer.encode_literally([text]))
            logits_V = np.asarray(model(tokens, np.array([tokens.size])))[0, -1].astype(np.float64)
            chances = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
            for judged in found.values():
                order = judged[i].orders[k]
                assert order["p_first"] == pytest.approx(
                    chances[label_a] / (chances[label_a] + chances[label_b]), abs=1e-5
                )
                assert order["label_mass"] == pytest.approx(chances[label_a] + chances[label_b], rel=1e-4)
    for one, other in zip(*found.values(), strict=True):
        assert one.p == pytest.approx(other.p, abs=1e-6)
    shares = [o["p_first"] for judged in found[1] for o in judged.orders]
    assert np.ptp(shares) > 0.01, "different questions have different answers"


def test_a_chat_template_is_used_with_thinking_off(
    chatty: Tokenizer, tiny_policy_dir: Path, short_task: JudgeTask, tmp_path: Path, sentences: list[str]
) -> None:
    for file in tiny_policy_dir.iterdir():
        if file.suffix == ".safetensors" or file.name == "config.json":
            (Path(chatty.path) / file.name).write_bytes(file.read_bytes())
    judge = likelihood(Path(chatty.path), short_task)
    question = judge.question("q", "x", "y")
    assert judge.tokenizer.render(question) == (
        f"system:Judge.<|im_end|>user:q\n1 x\n2 y\n\n{INSTRUCTION.format('A', 'B')}<|im_end|>assistant:"
    )
    assert len(judge.judge(local_pairs(sentences, 1))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["Output (a)", "Output (b)"]}, "labels of one token each; 'Output .a.' is"),
        ({"answer": "score", "user": "{prompt} {answer}"}, "one question about two answers"),
    ],
)
def test_a_task_that_likelihood_cannot_do(change: Row, message: str, tiny_policy_dir: Path) -> None:
    with pytest.raises(ValueError, match=message):
        likelihood(tiny_policy_dir, read_task("t", SHORT | change))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "oracle"], "backend: expected server|likelihood|reward_model, got oracle"),
        (["--concurrency", "0"], "concurrency: expected at least 1"),
        (["--timeout", "0"], "timeout"),
        (["--limit", "0"], "limit"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--temperature", ".nan"], "temperature: expected a number from 0 on, or null"),
        (["--temperature", "warm"], "temperature: expected number|null, got warm"),
        (["--temperature", "-1"], "temperature: expected a number from 0 on, or null"),
        (["--price_prompt", "1"], "--price_completion"),
        (["--base_url", "http://x/v1", "--backend", "likelihood"], "--base_url"),
        (["--tempurature", "1"], "unknown key 'tempurature'; did you mean 'temperature'"),
        (["--common", "maybe"], "common: expected true|false, got maybe"),
        (["--mesh", "rows=2"], "--mesh"),
    ],
)
def test_a_command_line_that_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_judge(["a", "b", "--out", "o", "--backend", "server", "--model", "m", *arguments])


def test_a_command_line_that_is_right() -> None:
    config = parse_judge(["a", "b", "--out", "o", "--backend", "likelihood", "--model", "m", "--mesh", "data=1,fsdp=2"])
    assert isinstance(config, JudgeConfig) and (config.mesh.data, config.mesh.fsdp) == (1, 2)


def test_mistakes_in_files_are_one_line(
    files: list[str], tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*more: object, model: Path = tiny_policy_dir, backend: str = "likelihood") -> str:
        command = ["judge", *files, "--out", tmp_path / "no", "--backend", backend, "--model", model, *more]
        assert main(list(map(str, command))) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "no such file" in refused("--task", tmp_path / "no.yaml")
    assert "'a' or 'b'" in refused("--gold", "prompt").replace('"', "'")
    assert "judgements.jsonl: no such file" in refused("--agree_with", tmp_path)
    assert "expected a policy, got a reward model" in refused(model=tiny_reward_dir)
    assert "expected a reward model" in refused(backend="reward_model")
    assert not (tmp_path / "no").exists()
