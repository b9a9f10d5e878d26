"""Reads what a reward function returned: one number or None per completion, and nothing else."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from train.running import SetupError

LARGEST = float(np.finfo(np.float32).max)  # beyond it, means and squares of rewards would overflow
GENERATORS = (inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class RewardError(SetupError):
    """A reward is not what was agreed, or cannot be had. The user sees the message alone."""


class Scores(list[float | None]):
    """A list of rewards that also says why some of them are None."""

    def __init__(self, scores: Iterable[float | None], why: str | None) -> None:
        super().__init__(scores)
        self.why = why


def check_kind(name: str, function: Callable[..., Any]) -> None:
    """Refuses functions whose call gives no list, and those that cannot be called by keywords.

    Raises:
      ValueError: a generator function, or positional-only parameters.
    """
    if any(_is_kind(function, test) for test in GENERATORS):
        raise ValueError(f"rewards.function: {name}: is a generator function (yield); return a list")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"rewards.function: {name}: its parameter {parameter.name!r} stands before a /; columns are passed by "
                f"name, so leave the / out"
            )


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is an `async def`, or an object that is called like one."""
    return _is_kind(function, inspect.iscoroutinefunction)


def _is_kind(function: Callable[..., Any], test: Callable[[object], bool]) -> bool:
    return test(function) or test(type(function).__call__)  # of an object that is called like a function


def read_returned(name: str, returned: Any, count: int) -> np.ndarray:
    """Returns [count] float64 rewards; None and NaN, which mean unscorable, are NaN.

    Args:
      returned: a list, tuple or another sequence, or a one-dimensional array (NumPy, JAX, PyTorch, pandas), of numbers,
        booleans (1 and 0), scalars of such arrays, None or NaN.

    Raises:
      RewardError: anything else, another number of rewards than `count`, or an infinite one.
    """
    expected = f"{name}: expected a list of {count} rewards, a number or None for each completion, got"
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # else Python warns that it was never awaited
        raise RewardError(f"{expected} a {type(returned).__name__}; write async def, so that it is awaited")
    shape = getattr(returned, "shape", None)
    if shape is not None and hasattr(returned, "tolist"):
        if len(shape) != 1:
            raise RewardError(f"{expected} a {type(returned).__name__} of shape {tuple(shape)}")
        returned = returned.tolist()
    if isinstance(returned, str | bytes | bytearray | memoryview) or not isinstance(returned, Sequence):
        what = "None" if returned is None else f"{type(returned).__name__} {str(returned)[:60]!r}"
        raise RewardError(f"{expected} {what}")
    if len(returned) != count:
        raise RewardError(f"{name}: expected {count} rewards, one per completion, got {len(returned)}")
    return np.array([_number(expected, i, reward) for i, reward in enumerate(returned)], np.float64)


def _number(expected: str, index: int, reward: Any) -> float:
    if getattr(reward, "shape", None) == () and hasattr(reward, "item"):
        reward = reward.item()  # a scalar of an array
    if reward is None:
        return math.nan
    if not isinstance(reward, numbers.Real | Decimal):
        raise RewardError(f"{expected} {type(reward).__name__} {str(reward)[:60]!r} for completion {index}")
    try:
        number = float(reward)
    except OverflowError:
        number = math.inf
    if abs(number) > LARGEST:
        raise RewardError(
            f"{expected.partition(':')[0]}: expected finite rewards, or None for what cannot be scored, got an "
            f"infinite one: {number:g} for completion {index} (the largest is {LARGEST:.3g})"
        )
    return number
