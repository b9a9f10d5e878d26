"""What a step has drawn, and the arrays that the update reads: no model, no devices."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.packing import Batch
from train.prompts import Row


class Groups(NamedTuple):
    """Some prompts with their completions and rewards."""

    rows: list[Row]
    prompt_PS: np.ndarray
    lengths_P: np.ndarray
    rollout: Any  # a Rollout of NumPy arrays
    rewards_PGR: np.ndarray  # every reward apart; NaN = unscorable

    @property
    def differs_P(self) -> np.ndarray:
        """Whether some reward of a group differs from another's: what teaches under every advantage."""
        highest_PR = np.fmax.reduce(self.rewards_PGR, 1, initial=-np.inf)  # fmax and fmin pass over NaN
        lowest_PR = np.fmin.reduce(self.rewards_PGR, 1, initial=np.inf)
        return (highest_PR > lowest_PR).any(-1)


def choose(drawn: Sequence[Groups], count: int) -> Groups:
    """`count` groups of several attempts, those that differ first, in the order they came.

    Dynamic sampling, DAPO, https://arxiv.org/abs/2503.14476, section 3.2; where too few differ, others fill up.
    """
    if len(drawn) == 1:
        return drawn[0]
    S = max(groups.prompt_PS.shape[1] for groups in drawn)
    prompts_PS = [np.pad(groups.prompt_PS, ((0, 0), (0, S - groups.prompt_PS.shape[1]))) for groups in drawn]
    whole = Groups(
        [row for groups in drawn for row in groups.rows],
        np.concatenate(prompts_PS),
        np.concatenate([groups.lengths_P for groups in drawn]),
        jax.tree.map(lambda *arrays: np.concatenate(arrays), *(groups.rollout for groups in drawn)),
        np.concatenate([groups.rewards_PGR for groups in drawn]),
    )
    these = np.argsort(~whole.differs_P, kind="stable")[:count]
    rollout = jax.tree.map(lambda array: array[these], whole.rollout)
    rows = [whole.rows[i] for i in these]
    return Groups(rows, whole.prompt_PS[these], whole.lengths_P[these], rollout, whole.rewards_PGR[these])


def make_batch(groups: Groups, mask_truncated: bool) -> Batch:
    """What the loss needs, [P, ...], but for the advantages.

    Tokens behind the end are masked out, and unscorable completions; those that were cut at T if that is wanted.
    """
    tokens_PGT, sampled_PGT, lengths_PG, finished_PG = map(np.asarray, groups.rollout)
    counts_PG = ~np.isnan(groups.rewards_PGR).all(-1)
    if mask_truncated:
        counts_PG = counts_PG & finished_PG
    return {
        "prompt_PS": groups.prompt_PS,
        "lengths_P": groups.lengths_P,
        "tokens_PGT": tokens_PGT,
        "sampled_PGT": sampled_PGT,
        "mask_PGT": (np.arange(tokens_PGT.shape[-1]) < lengths_PG[..., None]) & counts_PG[..., None],
    }


def minibatches(batch: Batch, prompts: int, iterations: int, seed: int, step: int) -> Iterator[Batch]:
    """The batch of each update: in every iteration all prompts once, in an order of its own if it is cut."""
    P = len(batch["lengths_P"])
    for iteration in range(iterations):
        order = np.random.default_rng([seed, step, iteration]).permutation(P) if prompts < P else np.arange(P)
        for start in range(0, P, prompts):
            these = order[start : start + prompts]
            yield {name: array[these] for name, array in batch.items()}


def completion_table(
    prompts: Sequence[Any],
    texts_PG: Sequence[Sequence[str]],
    groups: Groups,
    names: Sequence[str],
    advantages_PG: np.ndarray,
) -> dict[str, list[Any]]:
    """Columns of TRL's table of completions: prompt, completion, every reward by name, advantage; length, finished."""
    G = len(texts_PG[0])
    table: dict[str, list[Any]] = {
        "prompt": [str(prompt) for prompt in prompts for _ in range(G)],
        "completion": [text for group in texts_PG for text in group],
    }
    table |= {name: groups.rewards_PGR[..., r].reshape(-1).tolist() for r, name in enumerate(names)}
    table["advantage"] = np.asarray(advantages_PG, np.float32).reshape(-1).tolist()
    table["length"] = np.asarray(groups.rollout.lengths_PG).reshape(-1).tolist()
    table["finished"] = np.asarray(groups.rollout.finished_PG).reshape(-1).tolist()
    return table
