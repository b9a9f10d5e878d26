"""Best of n: a baseline that needs no training, only the reward model and more samples.

Selects from a prompt's n completions (at one temperature) the one with the highest reward; ties go to the first. The
mean reward of the best of k <= n is estimated over all subsets of size k: with r_(1) <= ... <= r_(n),
  sum_i r_(i) C(i - 1, k - 1) / C(n, k),
which is unbiased. The KL divergence of the best of k from the policy is at most log k - (k - 1) / k.

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
    """Mean over all subsets of k rewards of the largest reward.

    Raises:
      ValueError: fewer than k rewards, or k < 1.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected a number from 1 to {n}, that of the rewards, got {k}")
    weights = (math.comb(i, k - 1) / math.comb(n, k) for i in range(n))
    return math.fsum(reward * weight for reward, weight in zip(sorted(rewards), weights, strict=True))


def kl_bound(k: int) -> float:
    """Upper bound on KL(best of k || policy): log k - (k - 1) / k, in nats."""
    return math.log(k) - (k - 1) / k


def _prompt_groups(rows: Sequence[Row]) -> list[list[int]]:
    """Row indices of each prompt at each temperature."""
    return groups_of((row["prompt_id"], temperature_of(row)) for row in rows)


def best_rows(scored: Sequence[Row]) -> list[Row]:
    """The best row of each group, in the order of the groups' first rows; a group without rewards has none.

    `best_of` is the number of completions compared, `best_sample` the sample number of the best one. `sample` becomes
    0, because the row is now the only one of its prompt and temperature.
    """
    best = []
    for group in _prompt_groups(scored):
        valid = [i for i in group if scored[i]["reward"] is not None]
        if valid:
            row = scored[max(valid, key=lambda i: scored[i]["reward"])]
            best.append(row | {"sample": 0, "best_of": len(valid), "best_sample": row.get("sample")})
    return best


def best_of_by_temperature(scored: Sequence[Row]) -> dict[float | None, list[dict[str, Any]]]:
    """For each temperature and k: mean reward over prompts of the best of k, its standard error, and the KL bound.

    Prompts with fewer than k rewards are left out; `prompts` counts the others.
    """
    rewards: dict[float | None, list[list[float]]] = {}
    for group in _prompt_groups(scored):
        valid = [scored[i]["reward"] for i in group if scored[i]["reward"] is not None]
        rewards.setdefault(temperature_of(scored[group[0]]), []).append(valid)
    return {
        temperature: [
            {"k": k, **mean_and_error(np.array([expected_best(r, k) for r in valid if len(r) >= k])), "kl": kl_bound(k)}
            for k in range(1, max(map(len, valid)) + 1)
        ]
        for temperature, valid in rewards.items()
    }


def best_of_sheet(by_temperature: Mapping[float | None, Sequence[Mapping[str, Any]]]) -> Sheet:
    """A row for every k up to 16, then for powers of two and the largest k."""

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
        for temperature, estimates in by_temperature.items()
        for e in estimates
        if shown(e["k"], len(estimates))
    ]
    return Sheet("Best of k", ("temperature", "k", "reward", "prompts", "KL at most"), rows)
