"""GPT-4's raw judgements, recorded by others, replayed: our prompts, their replies, the same winners and accuracies.

The records are LLMBar's (Zeng et al. 2023, https://arxiv.org/abs/2310.07641). A local server answers what is asked with
the recorded reply for the same instruction and the same outputs in the same order. Every DATA__PROTOCOL.result.json.gz
in the folder (or in the one that JUDGE_RECORDS names) is replayed.

Of the recorded statistics two are not reproduced: kappa_False and kappa_True compare labels "1" and "2" with winners
from which "2" was dropped, so they do not measure an agreement. kappa_agreement, between the two orders, is reproduced.
"""

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.__main__ import main
from eval.judges.task import TASKS, JudgeTask, load_task, read_task
from eval.judges.verdict import FIRST, SECOND, verdict
from eval.stats import cohen_kappa

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("JUDGE_RECORDS") or ROOT.parent / "shared" / "data" / "judge")
FILES = sorted(FOLDER.glob("*.result.json.gz"))
NONE_THERE = "no recorded judgements: they are not shipped; JUDGE_RECORDS names their folder"
ORDERS = {"ab": "swap = False", "ba": "swap = True"}
# The parts of a protocol's name, and the task that is asked in its place. NoRules leaves out what counts: as wording,
# it changes no form of answer.
BASES = {"Vanilla": "vanilla", "CoT": "cot", "Swap": "swap", "Swap_CoT": "swap_cot", "Rating": "rating"}

there = pytest.mark.skipif(not FILES, reason=NONE_THERE)
each_file = pytest.mark.parametrize("file", FILES or [Path("none")], ids=lambda file: file.name.partition(".")[0])


def records(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as text:
        return json.load(text)


def protocol(file: Path) -> str:
    return file.name.partition(".")[0].rpartition("__")[2]


def task_values(name: str) -> dict[str, Any]:
    """The task of a protocol: that of its base, with the questions about the prompt that its name lists."""
    parts = [part for part in name.split("_") if part != "NoRules"]
    before = [part.lower() for part in parts if part in ("Metrics", "Reference")]
    base = "_".join(part for part in parts if part.lower() not in before) or "Vanilla"
    if base not in BASES:
        pytest.skip(f"{name}: a protocol for which there is no task")
    values = yaml.safe_load((TASKS / f"llmbar_{BASES[base]}.yaml").read_text())
    if before:
        questions = yaml.safe_load((TASKS / "llmbar_metrics_reference.yaml").read_text())["before"]
        values["before"] = {part: questions[part] for part in before}
        values["user"] += "".join(f"\n\n{{{part}}}" for part in before)
    return values


def rounds(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The recorded verdicts, the last of which decides; before them there may be replies about the instruction."""
    return [result for result in record["results"] if isinstance(result, dict)]


class Recorded:
    """Answers a request by what it contains."""

    def __init__(self, found: list[dict[str, Any]], task: JudgeTask) -> None:
        self.task, self.asked = task, {"pairs": 0, "again": 0, "before": 0}
        self.by_text: dict[str, dict[str, Any]] = {}
        self.again: list[tuple[dict[str, Any], str]] = []
        self.before: dict[str, str] = {}
        for record in found:
            self._learn(record)

    def _learn(self, record: dict[str, Any]) -> None:
        told = [result[0] for result in record["results"] if not isinstance(result, dict)]
        values = {"prompt": record["input"]}
        for (name, question), text in zip(self.task.before.items(), told, strict=True):
            # the first one counts where several pairs have one instruction: it is asked about once
            values[name] = self.before.setdefault(question.messages(values)[-1]["content"], text)
        first = rounds(record)[0]
        if self.task.answer == "score":
            for which in ("1", "2"):
                text = self._text(values | {"answer": record[f"output_{which}"]})
                parts = (record["input"], record[f"output_{which}"])
                self.by_text.setdefault(text, as_reply(first[f"score_{which}"], parts))
            return
        for order in ORDERS.values():
            one, two = shown(record, order)
            text = self._text(values | {"first": one, "second": two})
            self.by_text[text] = as_reply(first[order]["completion"], (record["input"], one, two))
            if len(rounds(record)) > 1:
                self.again.append((record, order))

    def _text(self, values: dict[str, str]) -> str:
        return self.task.question.messages(values)[-1]["content"]

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        if text in self.by_text:
            self.asked["pairs"] += 1
            said = self.by_text[text]
            assert in_order(text, said["parts"])
            return said
        if text in self.before:
            self.asked["before"] += 1
            return {"text": self.before[text]}
        self.asked["again"] += 1
        fitting = [(record, order) for record, order in self.again if is_about(text, record, order)]
        assert len(fitting) == 1, f"{len(fitting)} recorded second questions are like {text!r}"
        record, order = fitting[0]
        return as_reply(rounds(record)[-1][order]["completion"])


def as_reply(recorded: list[str], parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """`parts`: what the question is to contain, in this order."""
    return {"text": recorded[0], "finish_reason": recorded[1], "parts": parts}


def in_order(text: str, parts: tuple[str, ...]) -> bool:
    start = 0
    for part in parts:
        start = text.find(part.strip(), start)
        if start < 0:
            return False
        start += len(part.strip())
    return True


def shown(record: dict[str, Any], order: str) -> tuple[str, str]:
    outputs = (record["output_1"], record["output_2"])
    return outputs if order == ORDERS["ab"] else outputs[::-1]


def is_about(text: str, record: dict[str, Any], order: str) -> bool:
    """Whether a second question has instruction, outputs and both explanations in the order of the recorded prompt."""
    debate = rounds(record)[-1][order]["prompt"].partition("# Debate between")[2].split("\n\n# Decision")[0]
    explanations = re.split(
        r"\n## Evaluation given by Assistant \([ab]\), who thinks Output \([ab]\) is better:\n", debate
    )[1:]
    assert len(explanations) == 2
    return in_order(text, (record["input"], *shown(record, order), *explanations))


def write_files(found: list[dict[str, Any]], folder: Path) -> list[str]:
    """A.jsonl with output_1, B.jsonl with output_2; the column `gold` of A says which is really better."""
    names = []
    for side, which in (("a", "1"), ("b", "2")):
        rows = [
            {
                "prompt_id": number,
                "prompt": record["input"],
                "completion": record[f"output_{which}"],
                "gold": "a" if str(record["label"]) == "1" else "b",
            }
            for number, record in enumerate(found)
        ]
        names.append(str(folder / f"{side}.jsonl"))
        Path(names[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


def recorded_winner(record: dict[str, Any], order: str) -> str | None:
    return {"1": "a", "2": "b"}.get(str(rounds(record)[-1][ORDERS[order]].get("winner")))


@there
@each_file
def test_every_recorded_winner_and_accuracy(file: Path, tmp_path: Path, chat_server: Callable[..., Any]) -> None:
    replay(file, tmp_path, chat_server)


def replay(file: Path, tmp_path: Path, chat_server: Callable[..., Any]) -> None:
    found, values = records(file), task_values(protocol(file))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    task = read_task("task", values)
    answers = Recorded(found, task)
    server = chat_server(answers)
    command = ["judge", *write_files(found, tmp_path), "--out", str(tmp_path / "out"), "--backend", "server"]
    command += ["--model", "gpt-4", "--base_url", server.url, "--task", str(tmp_path / "task.yaml"), "--gold", "gold"]
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "judge.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    recorded = file.parent / file.name.replace(".result.json.gz", ".statistics.json")
    statistics = json.loads(recorded.read_text()) if recorded.exists() else None
    assert result["pairs"] == len(found) == len(rows)
    if task.answer == "score":
        check_scores(found, rows)
        winners = [[as_recorded(row, order) for row in rows] for order in ("ab", "ba")]
    else:
        winners = [[row["orders"][i]["winner"] for row in rows] for i in (0, 1)]
    for i, order in enumerate(("ab", "ba")):
        assert winners[i] == [recorded_winner(record, order) for record in found], order
    if statistics is not None:
        check_statistics(winners, ["a" if str(record["label"]) == "1" else "b" for record in found], statistics)
        check_result(result, statistics, all(winner in ("a", "b") for both in winners for winner in both))
    assert answers.asked["before"] == len(answers.before)
    assert answers.asked["again"] == 2 * sum(len(rounds(record)) > 1 for record in found)
    # and all of it again from the cache: nothing is asked
    asked = dict(answers.asked)
    assert main(command) == 0
    again = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert answers.asked == asked and again["requests"] == 0
    assert {**again, "requests": 0, "cached": 0} == {**result, "requests": 0, "cached": 0}


def check_scores(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """The recorded scores; where they are equal ours is a tie."""
    for record, row in zip(found, rows, strict=True):
        scores = [int(rounds(record)[0][f"score_{which}"][0]) for which in ("1", "2")]
        assert row["scores"] == scores
        assert row["outcome"] == (scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1])


def as_recorded(row: dict[str, Any], order: str) -> str:
    """Equal scores are recorded as a win of whichever output stands second."""
    return {1.0: "a", 0.5: order[1], 0.0: "b"}[row["outcome"]]


def check_statistics(winners: list[list[str | None]], gold: list[str], statistics: dict[str, Any]) -> None:
    """The recorded statistics follow from the winners."""
    right = [[winner == truth for winner, truth in zip(both, gold, strict=True)] for both in winners]
    N = len(gold)
    assert percent(statistics["correct_False"]) == pytest.approx(100 * sum(right[0]) / N)
    assert percent(statistics["correct_True"]) == pytest.approx(100 * sum(right[1]) / N)
    assert percent(statistics["correct_average"]) == pytest.approx(100 * sum(right[0] + right[1]) / (2 * N))
    assert percent(statistics["correct_both"]) == pytest.approx(100 * sum(map(all, zip(*right, strict=True))) / N)
    assert percent(statistics["equal"]) == pytest.approx(
        100 * sum(one == other for one, other in zip(*winners, strict=True)) / N
    )
    assert cohen_kappa(*winners) == pytest.approx(statistics["kappa_agreement"], nan_ok=True)


def check_result(result: dict[str, Any], statistics: dict[str, Any], decided: bool) -> None:
    """What the program itself says of the judge is what is recorded; of equal scores, what a tie makes of it."""
    if not decided:
        return
    accuracy = result["accuracy"]
    assert percent(statistics["correct_average"]) == pytest.approx(100 * accuracy["mean"])
    assert percent(statistics["correct_both"]) == pytest.approx(100 * accuracy["both"])
    if result["position_bias"] is None:
        assert accuracy["ab"] == accuracy["ba"]  # one verdict, a tie where the records say a and b
        return
    for order, key in (("ab", "correct_False"), ("ba", "correct_True"), ("equal", "equal")):
        assert percent(statistics[key]) == pytest.approx(100 * accuracy[order])
    assert accuracy["kappa"] == pytest.approx(statistics["kappa_agreement"])
    assert result["consistent"] == accuracy["equal"]


def percent(text: str) -> float:
    """95.0 of "95 / 100 = 95.0%"; the share itself is exact where it is there."""
    if match := re.match(r"(\d+) / (\d+) =", text):
        return 100 * int(match[1]) / int(match[2])
    return float(text.rstrip("%"))


@there
@each_file
def test_the_default_task_reads_every_recorded_reply(file: Path) -> None:
    """Replies in LLMBar's forms, under the labels A and B of the task `chat`: never the wrong one."""
    chat, unread = load_task("chat"), []
    for record in records(file):
        for result in rounds(record):
            for order, key in ORDERS.items():
                if "completion" in result[key] and (winner := str(result[key]["winner"])) in ("1", "2"):
                    text = result[key]["completion"][0]
                    found = verdict(text, chat).overall
                    place = FIRST if {"1": "a", "2": "b"}[winner] == order[0] else SECOND
                    assert found in (place, None), text
                    unread += [] if found else [text]
    assert len(unread) <= (0 if file.name.startswith("Natural__") else 0.02 * 2 * len(records(file))), unread


# Records of the same form, made up: protocols of which none may be there


FAMILY = ["Vanilla_NoRules", "Metrics", "Reference", "Metrics_Reference", "Swap", "Swap_CoT", "CoT", "Rating"]
FAMILY += ["Rating_NoRules", "Rating_Metrics_Reference", "CoT_Metrics"]


def made_up(name: str) -> list[dict[str, Any]]:
    """Six records: the verdicts of both orders agree, or contradict each other."""
    found = []
    for number, (one, two) in enumerate([("1", "1"), ("2", "2"), ("1", "2"), ("2", "1"), ("1", "1"), ("2", "2")]):
        record: dict[str, Any] = {"input": f"Say {number}.", "output_1": f"{number} {{x}}", "output_2": f"{number} "}
        told = [[f"{part} {number}: {{first}}", "stop"] for part in name.split("_") if part in ("Metrics", "Reference")]
        if name.startswith("Rating"):
            scores = {"1": "7", "2": "3"} if one == "1" else {"1": "3", "2": "3" if one != two else "4"}
            one, two = ("1", "1") if one == "1" else (("2", "1") if one != two else ("2", "2"))
            said: list[dict[str, Any]] = [{f"score_{which}": [score, "stop"] for which, score in scores.items()}]
            said[0] |= {"swap = False": {"winner": one}, "swap = True": {"winner": two}}
        else:
            said = [one_round(record, name, {"swap = False": one, "swap = True": two})]
            if name.startswith("Swap") and one != two:
                said.append(one_round(record, name, {"swap = False": "1", "swap = True": "1"}, said[0]))
        found.append(record | {"label": "1", "results": [*told, *said]})
    return found


def one_round(
    record: dict[str, Any], name: str, winners: dict[str, str], first: dict[str, Any] | None = None
) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for order, winner in winners.items():
        label = f"Output ({'a' if (winner == '1') == (order == 'swap = False') else 'b'})"
        reasons = "CoT" in name or ("Swap" in name and first is None)
        text = f"Output (a) and {order}. Therefore, {label} is better." if reasons else label
        said[order] = {"completion": [text, "stop"], "winner": winner}
        if first is not None:
            said[order]["prompt"] = debate(first, order)
    return said


def debate(first: dict[str, Any], order: str) -> str:
    """As recorded: the explanation in favour of Output (a) first, that of the other order with its labels exchanged."""
    other = "swap = True" if order == "swap = False" else "swap = False"
    own, theirs = first[order]["completion"][0], first[other]["completion"][0]
    theirs = theirs.replace("(a)", "(x)").replace("(b)", "(a)").replace("(x)", "(b)")
    both = sorted((own, theirs), key=lambda text: text[-len("(a) is better.") :])
    named = [
        f"## Evaluation given by Assistant ({x}), who thinks Output ({x}) is better:\n{text}"
        for x, text in zip("ab", both, strict=True)
    ]
    return "\n".join(["# Debate between both", *named]) + "\n\n# Decision"


@pytest.mark.parametrize("name", FAMILY)
def test_made_up_records_of_every_protocol(name: str, tmp_path: Path, chat_server: Callable[..., Any]) -> None:
    found = made_up(name)
    file = tmp_path / f"Made__{name}.result.json.gz"
    with gzip.open(file, "wt", encoding="utf-8") as text:
        json.dump(found, text)
    winners = [[recorded_winner(record, order) for record in found] for order in ORDERS]
    right = [[winner == "a" for winner in both] for both in winners]
    statistics = {
        "correct_False": f"{sum(right[0])} / 6 = ",
        "correct_True": f"{sum(right[1])} / 6 = ",
        "correct_average": f"{100 * sum(right[0] + right[1]) / 12}%",
        "correct_both": f"{sum(map(all, zip(*right, strict=True)))} / 6 = ",
        "equal": f"{sum(one == other for one, other in zip(*winners, strict=True))} / 6 = ",
        "kappa_agreement": cohen_kappa(*winners),
    }
    (tmp_path / f"Made__{name}.statistics.json").write_text(json.dumps(statistics))
    replay(file, tmp_path, chat_server)
