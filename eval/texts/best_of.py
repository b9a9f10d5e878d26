"""Best of n: a baseline that needs no training, only the reward model and more samples.

Of a prompt's n completions (at one temperature) the one with the highest reward, the first of equals. The mean reward
of the best of k <= n is estimated from all subsets of k of the n at once: with r_(1) <= ... <= r_(n),
  sum_i r_(i) C(i - 1, k - 1) / C(n, k),
which is unbiased. How far the best of k is from the policy: KL <= log k - (k - 1) / k.

References:
  Beirami et al., Theoretical guarantees on the best-of-n alignment policy, https://arxiv.org/abs/2401.01879.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.sheets import Sheet, count, number, plus_minus
from eval.stats import mean_and_error
from eval.texts.rows import groups_of, temperature_of
from train.data.rows import Row


def expected_best(rewards: Sequence[float], k: int) -> float:
    """The mean over all subsets of k of the rewards of their largest.

    Raises:
      ValueError: fewer than k rewards, or k < 1.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a number from 1 to {n}, that of the rewards, got {k}")
    weights = (math.comb(i, k - 1) / math.comb(n, k) for i in range(n))
    return math.fsum(reward * weight for reward, weight in zip(sorted(rewards), weights, strict=True))


def kl_bound(k: int) -> float:
    """log k - (k - 1) / k, in nats."""
    return math.log(k) - (k - 1) / k


def _prompt_groups(rows: Sequence[Row]) -> list[list[int]]:
    """The numbers of the rows of one prompt at one temperature."""
    return groups_of((row["prompt_id"], temperature_of(row)) for row in rows)


def best_rows(scored: Sequence[Row]) -> list[Row]:
    """The best row of each group, in the order of the groups' first rows; of a group without a reward none.

    It has `best_of`, the number of completions it is the best of, and `best_sample`, which of them it is; it is the
    only one of its prompt and temperature now, so its `sample` is 0.
    """
    best = []
    for group in _prompt_groups(scored):
        valid = [i for i in group if scored[i]["reward"] is not None]
        if valid:
            row = scored[max(valid, key=lambda i: scored[i]["reward"])]
            best.append(row | {"sample": 0, "best_of": len(valid), "best_sample": row.get("sample")})
    return best


def best_of_by_temperature(scored: Sequence[Row]) -> dict[float | None, list[dict[str, Any]]]:
    """For each temperature and k: the mean reward of the best of k over prompts with its standard error, and the bound.

    Prompts with fewer than k rewards have no best of k; those with that many are in `prompts`.
    """
    rewards: dict[float | None, list[list[float]]] = {}
    for group in _prompt_groups(scored):
        valid = [scored[i]["reward"] for i in group if scored[i]["reward"] is not None]
        rewards.setdefault(temperature_of(scored[group[0]]), []).append(valid)
    return {
        temperature: [
            {"k": k, **mean_and_error(np.array([expected_best(r, k) for r in given if len(r) >= k])), "kl": kl_bound(k)}
            for k in range(1, max(map(len, given)) + 1)
        ]
        for temperature, given in rewards.items()
    }


def best_of_sheet(found: Mapping[float | None, Sequence[Mapping[str, Any]]]) -> Sheet:
    """Every k up to 16, then the powers of two and the last one."""

    def shown(k: int, last: int) -> bool:
        return k <= 16 or k == last or k & (k - 1) == 0

    rows = [
        (
            ("" if temperature is None else f"{temperature:g}"),
            count(e["k"]),
            plus_minus(e),
            count(e["prompts"]),
            number(e["kl"]),
        )
        for temperature, estimates in found.items()
        for e in estimates
        if shown(e["k"], len(estimates))
    ]
    return Sheet("Best of k", ("temperature", "k", "reward", "prompts", "KL at most"), rows)
