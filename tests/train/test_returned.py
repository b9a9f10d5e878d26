"""What a reward function gets is its own, and what it may return is one number or None per completion."""

import copy
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from train.rewards.functions import function_scorer
from train.rewards.returned import RewardError, read_returned
from train.running import SetupError


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, None],
        (True, np.float32(0.5), math.nan),
        [np.bool_(True), Fraction(1, 2), np.float64("nan")],
        [Decimal(1), jnp.float32(0.5), None],
        [np.array(1), jnp.bfloat16(0.5), None],
        np.array([1, 0.5, np.nan]),
        np.array([1, 0.5, None], object),
        jnp.array([1, 0.5, jnp.nan], jnp.bfloat16),
    ],
    ids=str,
)
def test_numbers_none_and_arrays_are_read(returned: Any) -> None:
    rewards = read_returned("f", returned, 3)
    assert rewards.dtype == np.float64
    np.testing.assert_array_equal(rewards, [1, 0.5, np.nan])


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "got None"),
        (1.0, "got float '1.0'"),
        (np.float64(1.0), r"got a float64 of shape \(\)"),
        ("12", "got str '12'"),
        (b"12", "got bytes"),
        ({0: 1.0, 1: 2.0}, "got dict '{0: 1.0, 1: 2.0}'"),
        ({1.0, 2.0}, "got set"),
        ({0: 1.0, 1: 2.0}.values(), "got dict_values"),
        ((1.0 for _ in range(2)), "got generator"),
        (map(float, range(2)), "got map"),
        (np.ones((2, 1)), r"got a ndarray of shape \(2, 1\)"),
        (jnp.ones((1, 2)), r"of shape \(1, 2\)"),
        (["0.5", "0.5"], "got str '0.5' for completion 0"),
        (np.array(["0.5", "1"]), "got str '0.5' for completion 0"),
        ([1.0, [1.0]], "got list '.1.0.' for completion 1"),
        ([1.0, np.ones(1)], "got ndarray '.1..' for completion 1"),
        ([(1.0, "why"), (0.0, "why")], "got tuple"),
        ([1.0, {"score": 1}], "got dict"),
        ([1.0, 1j], "got complex"),
        ([1.0, math.inf], "expected finite rewards, or None .* got an infinite one: inf for completion 1"),
        ([1.0, 10**400], "an infinite one"),
        ([1.0, -1e39], r"an infinite one: -1e\+39 for completion 1 \(the largest is 3.4e\+38\)"),
        ([1.0], "f: expected 2 rewards, one per completion, got 1"),
        (np.ones(3), "f: expected 2 rewards, one per completion, got 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_refused_by_name(returned: Any, words: str) -> None:
    with pytest.raises(RewardError, match=f"^f: .*{words}" if not words.startswith("f:") else words) as caught:
        read_returned("f", returned, 2)
    assert isinstance(caught.value, SetupError), "the user sees one line"


def test_a_coroutine_is_refused_and_closed() -> None:
    async def score() -> list[float]:
        return [1.0]

    with pytest.raises(RewardError, match="got a coroutine; write async def, so that it is awaited"):
        read_returned("f", score(), 1)


def yields(completions: list[str]) -> Any:
    yield from completions


async def yields_later(completions: list[str]) -> Any:
    for text in completions:
        yield text


def positional(completions: list[str], /) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (yields, "is a generator function"),
        (yields_later, "is a generator function"),
        (positional, "its parameter 'completions' stands before a /"),
    ],
    ids=["generator", "async generator", "positional"],
)
def test_functions_whose_call_gives_no_list_are_refused_at_set_up(
    function: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.rewards.functions.load_function", lambda name: function)
    with pytest.raises(ValueError, match=f"rewards.function: a.b: {words}"):
        function_scorer("a.b")


def test_what_a_function_changes_is_its_own_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spoil(prompts: Any, completions: Any, completion_ids: Any, *, words: list[str], **columns: Any) -> list[float]:
        seen.append(copy.deepcopy((prompts, completions, completion_ids, words, columns)))
        for prompt, ids, nested, box in zip(prompts, completion_ids, columns["nested"], columns["array"], strict=True):
            prompt.append({"role": "assistant", "content": "x"})
            prompt[0]["content"] = ids[:] = "spoilt"
            nested["a"].append(1)
            box += 1
        for values in (prompts, completions, completion_ids, words, *columns.values()):
            values.clear()
        return [0.0] * 4

    monkeypatch.setattr("train.rewards.functions.load_function", lambda name: spoil)
    options = {"words": ["w"]}
    given: Any = (
        [[{"role": "user", "content": str(p)}] for p in range(2)],
        [["a", "b"], ["c", "d"]],
        {"nested": [{"a": [p]} for p in range(2)], "array": [np.zeros(2)] * 2},
        [[[1], [2]], [[3], [4]]],
    )
    before = copy.deepcopy((given, options))
    score: Callable[..., np.ndarray] = function_scorer("a.spoil", options)
    for _ in range(2):
        score(*given)
    np.testing.assert_equal((given, options), before)
    np.testing.assert_equal(seen[0], seen[1])
    assert [prompt[0]["content"] for prompt in seen[0][0]] == ["0", "0", "1", "1"], "each completion has its own"
