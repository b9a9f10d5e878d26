"""Names of models in results: the same model at any step, whatever its path has an @ for."""

from pathlib import Path

import pytest

from eval.report.judged import owner
from eval.runs import PolicyRun, same_model


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("ann@lab/rm", "ann@lab/rm@20", True),
        ("ann@lab/rm@best", "./ann@lab/rm@20", True),
        ("ann@lab/rm", "ann@lab/other", False),
        ("ann@1/rm", "ann@2/rm", False),
        ("org/rm", "org/rm@" + "0123456789" * 4, True),
    ],
)
def test_a_step_is_ignored_and_a_directory_is_not(one: str, other: str, expected: bool) -> None:
    assert same_model(one, other) == expected


def test_the_run_that_wrote_texts_is_found_below_a_path_with_an_at_sign(tmp_path: Path) -> None:
    run = PolicyRun(tmp_path / "ann@lab" / "run", "run")
    file = tmp_path / "texts.jsonl"
    file.write_text(f'{{"checkpoint": "{run.path}@20"}}\n')
    assert owner(str(file), [PolicyRun(tmp_path / "ann", "ann"), run]) == run
