"""Keeps the order and the differences of rewards: float64 on the host, and float32 only where that loses neither.

Rewards are Python's numbers, float64. In float32, 16777216 and 16777217 are one number, and ranks would tie them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, localcontext

import jax
import numpy as np

ROUNDING = 1e-3  # of the spread of a group: more of it than that would bend the differences of rewards
SUM_DIGITS = 60  # of the sums of weighted rewards: two factors of float64 have 34 together
COMBINATIONS: dict[str, Callable[[Sequence[Decimal]], Decimal]] = {
    "sum": lambda terms: sum(terms, Decimal(0)),
    "mean": lambda terms: sum(terms, Decimal(0)) / len(terms),
    "minimum": min,
}


def combine(rewards_PGR: np.ndarray, weights_R: np.ndarray, combination: str) -> np.ndarray:
    """Returns `rewards_PG`: the sum, mean or minimum over R of the weighted rewards that are not NaN.

    Several rewards are combined as the decimal numbers that they print as and rounded once, so that 0.1 + 0.2 ties with
    0.3: a rank must not come from the rounding of a sum.

    Returns:
      float32, or float64 where float32 loses an order or a difference (`narrow`). A completion whose rewards are all
      NaN is NaN.
    """
    if rewards_PGR.shape[-1] == 1:
        return narrow(rewards_PGR[..., 0] * np.asarray(weights_R, rewards_PGR.dtype))
    join, weights = COMBINATIONS[combination], [Decimal(str(weight)) for weight in weights_R]

    def combined(rewards: Sequence[float]) -> float:
        pairs = zip(weights, rewards, strict=True)
        terms = [weight * Decimal(repr(reward)) for weight, reward in pairs if reward == reward]
        return float(join(terms)) if terms else np.nan

    with localcontext(prec=SUM_DIGITS):
        rows = [combined(row) for row in rewards_PGR.reshape(-1, len(weights)).tolist()]
    return narrow(np.array(rows, np.float64).reshape(rewards_PGR.shape[:-1]))


def narrow(rewards: np.ndarray) -> np.ndarray:
    """Returns rewards as float32, unless that makes different rewards of a group equal or bends their differences.

    Args:
      rewards: [P, G, ...] rewards, the group in the second axis. NaN = unscorable.
    """
    if rewards.dtype == np.float32:
        return rewards
    with np.errstate(over="ignore", under="ignore"):
        short = rewards.astype(np.float32)
    ordered, ordered_short = np.sort(rewards, axis=1), np.sort(short, axis=1)
    merged = (ordered[:, 1:] != ordered[:, :-1]) & (ordered_short[:, 1:] == ordered_short[:, :-1])
    error = np.abs(rewards - short)
    spread_P1, spread = (
        np.fmax.reduce(rewards, axis=axes, keepdims=True) - np.fmin.reduce(rewards, axis=axes, keepdims=True)
        for axes in (1, (0, 1))
    )
    bent = ((spread_P1 > 0) & (error > ROUNDING * spread_P1)) | ((spread > 0) & (error > ROUNDING * spread))
    return rewards if merged.any() or bent.any() else short


@contextlib.contextmanager
def precision_of(rewards: np.ndarray) -> Iterator[None]:
    """Lets JAX compute in float64, on the host, if the rewards are float64; else changes nothing."""
    if rewards.dtype != np.float64:
        yield
        return
    try:
        host = jax.local_devices(backend="cpu")[0]  # a TPU has no float64
    except RuntimeError:  # JAX was told not to use the host
        host = None
    with jax.default_device(host), jax.enable_x64(True):
        yield
