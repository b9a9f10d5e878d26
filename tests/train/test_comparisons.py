"""Comparisons that teach little are counted: equal answers, empty ones, the same ones the other way round."""

from typing import Any

import pytest

from train.config import ChatConfig, DataConfig, ModelConfig, RewardModelConfig
from train.supervised.comparisons import AnswerCounts, Comparison, comparison_key, count_answers, count_turned, is_empty
from train.supervised.reward_model import check_comparison_rows, encode_comparisons, reward_model_task

USER = {"role": "user", "content": "Q"}


def said(text: str) -> list[dict[str, str]]:
    return [USER, {"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], (1, 0, 0, 0)),
        ([{"prompt": "Q", "chosen": "A", "rejected": "A"}], (1, 1, 0, 0)),
        (
            [{"prompt": "Q", "chosen": "", "rejected": "B"}, {"prompt": "Q", "chosen": "A", "rejected": " \n"}],
            (2, 0, 1, 1),
        ),
        ([{"chosen": said("A"), "rejected": said("")}, {"chosen": said(""), "rejected": said("")}], (2, 1, 1, 2)),
        ([{"chosen": "Q A", "rejected": "Q A"}], (1, 1, 0, 0)),
        ([{"prompt": "Q", "completions": ["A", "", "A", "B"], "scores": [3, 2, 1, 1]}], (5, 1, 2, 1)),
        ([{"prompt": "Q", "completions": ["A", "A"], "scores": [1, 1]}], (0, 0, 0, 0)),
    ],
)
def test_each_comparison_counts_as_a_pair_of_its_own_would(
    chatty: Any, rows: list[dict[str, Any]], expected: tuple[int, ...]
) -> None:
    assert count_answers(rows, encode_comparisons(rows, chatty, "file", ChatConfig())) == AnswerCounts(*expected)


def test_a_run_says_what_it_learns_little_from(chatty: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it starts, for each part of its data; nothing is said where there is nothing."""
    config = RewardModelConfig(output_dir="x", model=ModelConfig(path="x"), data=DataConfig(train="x"), max_steps=1)
    encode, rows = reward_model_task(config).encode, [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
    encode(rows, chatty, "file", ChatConfig())
    assert capsys.readouterr().out == ""
    encode([*rows, {"prompt": "Q", "chosen": "A", "rejected": "A"}], chatty, "file", ChatConfig())
    words = "of 2 comparisons 1 have equal answers, 0 an empty better answer, 0 an empty worse one"
    assert capsys.readouterr().out == f"file: {words}\n"


@pytest.mark.parametrize("row", [{"chosen": "", "rejected": "B"}, {"prompt": "", "chosen": "A", "rejected": ""}])
def test_neither_prompt_nor_answer_is_nothing(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="file: row 1 has no '(chosen|rejected)'"):
        check_comparison_rows([row], "file")


def test_what_is_empty() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert is_empty("") and is_empty(" \n") and is_empty(said("\t"))
    assert not is_empty("x") and not is_empty(said("x")) and not is_empty([USER, call])


def test_rows_that_are_the_same_or_contradict() -> None:
    one, turned = Comparison([[1, 2], [1, 3]], [1.0, 0.0]), Comparison([[1, 3], [1, 2]], [1.0, 0.0])
    assert count_turned([one, one, turned, turned, one]) == 3 and count_turned([one, one]) == 0
    assert count_turned([Comparison([[1], [1]], [1.0, 0.0])] * 2) == 0, "equal answers have no other way round"
    assert comparison_key(one) == comparison_key(Comparison([[1, 3], [1, 2]], [0.0, 1.0])) != comparison_key(turned)
    assert comparison_key(one) != comparison_key(one._replace(margin=1.0))
