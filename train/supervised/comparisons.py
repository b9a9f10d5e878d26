"""Comparisons of answers as tokens, and how many of them teach little or nothing.

Nothing is learned from two answers that are equal; an empty answer, or a row that stands in the data twice, may be
meant, but is worth knowing of.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from train.data.rows import Row


class Comparison(NamedTuple):
    """The answers to one prompt, and the scores that order them."""

    rows: list[list[int]]  # token ids of prompt and answer
    scores: list[float]  # higher is better; equal scores are not compared
    margin: float = 0.0  # of a pair: how much better the first answer is

    def pairs(self) -> list[tuple[int, int]]:
        """Returns (better, worse), the indices of the answers of every comparison."""
        numbers = range(len(self.scores))
        return [(i, j) for i in numbers for j in numbers if self.scores[i] > self.scores[j]]


class AnswerCounts(NamedTuple):
    """How many comparisons have answers that are equal or empty."""

    comparisons: int
    equal: int  # the same tokens: the gradient is zero, and no model orders them
    empty_better: int
    empty_worse: int

    def __str__(self) -> str:
        return (
            f"of {self.comparisons:,} comparisons {self.equal:,} have equal answers, {self.empty_better:,} an empty "
            f"better answer, {self.empty_worse:,} an empty worse one"
        )


def count_answers(rows: Sequence[Row], examples: Sequence[Comparison]) -> AnswerCounts:
    """Counts the comparisons of rows, given as they were read and as tokens."""
    equal = empty_better = empty_worse = total = 0
    for row, example in zip(rows, examples, strict=True):
        answers = row["completions"] if "completions" in row else [row["chosen"], row["rejected"]]
        empty, pairs = [is_empty(answer) for answer in answers], example.pairs()
        total += len(pairs)
        equal += sum(example.rows[better] == example.rows[worse] for better, worse in pairs)
        empty_better += sum(empty[better] for better, _ in pairs)
        empty_worse += sum(empty[worse] for _, worse in pairs)
    return AnswerCounts(total, equal, empty_better, empty_worse)


def is_empty(answer: Any) -> bool:
    """Whether an answer, text or messages that end with it, is white space alone."""
    if isinstance(answer, list):
        fields = [value for message in answer[-1:] for name, value in message.items() if name != "role"]
        return not any(value.strip() if isinstance(value, str) else value for value in fields)
    return isinstance(answer, str) and not answer.strip()


def comparison_key(example: Comparison) -> Hashable:
    """Returns what stands for a comparison in a set: answers with their scores, in any order, and the margin."""
    return frozenset(zip(map(tuple, example.rows), example.scores, strict=True)), example.margin


def count_turned(examples: Iterable[Comparison]) -> int:
    """Returns the number of pairs whose answers stand in an earlier pair the other way round."""
    turned, earlier = 0, set[Hashable]()
    for example in examples:
        if example.scores == [1, 0] and example.rows[0] != example.rows[1]:
            better, worse = map(tuple, example.rows)
            turned += (worse, better) in earlier
            earlier.add((better, worse))
    return turned
