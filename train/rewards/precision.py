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


def combine(
    rewards_PGR: np.ndarray, weights_R: np.ndarray, combination: str, missing_R: Sequence[str] | None = None
) -> np.ndarray:
    """Returns `rewards_PG`: the sum, mean or minimum over R of the weighted rewards that are not NaN.

    Several rewards are combined as the decimal numbers that they print as and rounded once, so that 0.1 + 0.2 ties with
    0.3: a rank must not come from the rounding of a sum.

    Args:
      missing_R: what becomes of a completion that lacks a reward, see `missing_masks`; None: ignore, for all.

    Returns:
      float32, or float64 where float32 loses an order or a difference (`narrow`). A completion whose rewards are all
      NaN is NaN.
    """
    rewards_PG = _combine_present(rewards_PGR, weights_R, combination)
    if missing_R is None:
        return rewards_PG
    return fill_missing(rewards_PG, *missing_masks(rewards_PGR, weights_R, missing_R))


def missing_masks(
    rewards_PGR: np.ndarray, weights_R: np.ndarray, missing_R: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns [P, G] masks of the completions that have no combined reward, and of those that have their group's least.

    Neither lets a missing reward improve a rank. A reward of weight 0 is missed by nobody.

    Args:
      missing_R: of each reward: "leave_out", "group_min" (left out too where the group has no other reward), or
        "ignore": only a completion that lacks all of its rewards is left out.
    """
    rules_R, lacks_PGR = np.array(missing_R), np.isnan(rewards_PGR)
    counts_PGR = lacks_PGR & (np.asarray(weights_R) != 0)
    left_out_PG = counts_PGR[..., rules_R == "leave_out"].any(-1)
    worst_PG = counts_PGR[..., rules_R == "group_min"].any(-1) & ~left_out_PG
    left_out_PG |= (lacks_PGR | (np.asarray(weights_R) == 0)).all(-1) & ~worst_PG
    has_least_P1 = ~(left_out_PG | worst_PG).all(-1, keepdims=True)
    return left_out_PG | (worst_PG & ~has_least_P1), worst_PG & has_least_P1


def fill_missing(rewards_PG: np.ndarray, left_out_PG: np.ndarray, worst_PG: np.ndarray) -> np.ndarray:
    """Returns rewards with NaN where left out, and the least of the group's others where a completion is its worst."""
    whole_PG = np.where(left_out_PG | worst_PG, np.inf, rewards_PG)
    filled_PG = np.where(worst_PG, whole_PG.min(-1, keepdims=True), rewards_PG)
    return np.where(left_out_PG, np.nan, filled_PG).astype(rewards_PG.dtype)


def _combine_present(rewards_PGR: np.ndarray, weights_R: np.ndarray, combination: str) -> np.ndarray:
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
