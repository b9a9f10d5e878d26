"""bench/soak: what it does to runs and inputs, and what it takes for a fault."""

import copy
import json
import random
import signal
from pathlib import Path

import pytest

from bench.soak import kills
from bench.soak.kills import KINDS, SHORT, Progress, Result, Start, random_moments, table
from train.data.files import read_file
from train.run.metrics_file import rewind_metrics

pytest.importorskip("hypothesis")

from bench.soak.fuzz import explore, fault, problem
from bench.soak.mutations import TEXT_KINDS, TREE_KINDS, TextMutation, TreeMutation, change_text, change_tree, mutations

TREE = {"a": 1, "b": ["x", {"c": None}], "d": {}}


def test_all_moments_come_in_the_order_of_the_steps() -> None:
    assert sum(kind.kills for kind in KINDS) == 30 and sum(kind.terms for kind in KINDS) == 10
    assert {kind.name for kind in KINDS} > set(SHORT)
    for kind in KINDS:
        moments = random_moments(kind, random.Random(0), 40, 5.0)
        assert moments == random_moments(kind, random.Random(0), 40, 5.0)
        assert [moment.step for moment in moments] == sorted(moment.step for moment in moments)
        assert [moment.signal for moment in moments].count(signal.SIGTERM) == kind.terms
        assert all(moment.step < 36 and moment.victims for moment in moments)


def test_progress_is_that_of_a_start(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    progress = Progress(tmp_path)
    assert progress.step() == -1  # of the start before
    rewind_metrics(file, 1)
    assert progress.step() == 1
    with open(file, "a") as rows:
        rows.write('{"step": 2}\n{"st')
    assert progress.step() == 2


def test_one_difference_is_no_in_the_table(tmp_path: Path) -> None:
    moment = kills.Moment(signal.SIGTERM, "save", 3, 0.1, (0,))
    starts = [Start(None, False, False, 0, []), Start(moment, True, True, 2, ["2 steps lost"])]
    good, bad = (Result(KINDS[0], starts, differences) for differences in ([], ["x differs"]))
    assert bad.faults == ["2 steps lost", "x differs"]
    lines = table([good, bad]).splitlines()
    assert [line.split()[-1] for line in lines] == ["identical", "yes", "NO", "NO"]
    assert lines[1].split()[:7] == ["policy", "0", "0", "1", "2", "0", "2"]
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 1, "timing_s/step": run}) + "\n")
        (tmp_path / run / "calibration.json").write_text(run)
    found = list(kills.differences(tmp_path / "a", tmp_path / "b", "policy"))
    assert found == ["policy: calibration.json differs", "policy: the newest steps are [] and []"]


@pytest.mark.parametrize("kind", sorted({*TREE_KINDS}))
def test_changes_leave_what_they_change_alone(kind: str) -> None:
    before = copy.deepcopy(TREE)
    changed = [change_tree(TREE, [TreeMutation(kind, place, 7)]) for place in range(40)]
    assert before == TREE and any(tree != TREE for tree in changed)
    assert change_tree(TREE, []) == TREE and change_tree({}, [TreeMutation(kind, 0, 7)]) == {}


@pytest.mark.parametrize("kind", sorted({*TEXT_KINDS}))
def test_a_text_is_changed_somewhere(kind: str) -> None:
    text = json.dumps(TREE, indent=1)
    assert any(change_text(text, [TextMutation(kind, place, 2, "!")]) != text for place in range(40))
    assert isinstance(change_text("", [TextMutation(kind, 0, 2, "!")]), str)


def test_what_a_fault_is(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{")

    def found(call: object, *arguments: object) -> str | None:
        try:
            call(*arguments)  # type: ignore[operator]
        except Exception as error:
            what = problem(error)
            return what and what[1]
        return "taken"

    assert found(read_file, str(tmp_path / "x.jsonl")) is None  # our line
    assert found(open, tmp_path / "no") is None  # the system's line has the file's name
    assert found(int, "x") == "not raised by us: ValueError: invalid literal for int() with base 10: 'x'"
    assert found([].pop) == "IndexError: pop from empty list"
    assert found(fault, "step: -1 was taken") == "step: -1 was taken"


def test_exploring_counts_and_groups() -> None:
    def target(case: object) -> None:
        if len(str(case)) % 2:
            int("x")

    faults, outcomes = explore(target, mutations, 30, 3)
    assert sum(outcomes.values()) == 30 and len(faults) == 1 and faults[0].cases == outcomes["refused"]
