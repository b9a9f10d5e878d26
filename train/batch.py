"""What a step has drawn, and the arrays that the update reads: no model, no devices."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.config import PolicyConfig
from train.data.rows import Row
from train.packing import Batch


class Groups(NamedTuple):
    """Some prompts with their completions and rewards."""

    rows: list[Row]
    prompt_PS: np.ndarray
    lengths_P: np.ndarray
    rollout: Any  # a Rollout of NumPy arrays
    rewards_PGR: np.ndarray  # every reward apart; NaN = unscorable


Advantages = Callable[..., np.ndarray]  # rewards_PGR -> advantages_PG, see `train.objective.make_advantages`


def counting(groups: Groups, config: PolicyConfig) -> np.ndarray:
    """Which completions are learned from, [P, G]: those with a reward, and not those cut at T if these are masked."""
    scored_PG = ~np.all(np.isnan(groups.rewards_PGR), axis=-1)
    return scored_PG & groups.rollout.finished_PG if config.loss.mask_truncated_completions else scored_PG


def teaches(groups: Groups, advantages: Advantages, config: PolicyConfig) -> np.ndarray:
    """Of each group, whether an advantage of it is not zero; those normalised over a batch are so up to rounding."""
    advantages_PG = advantages(groups.rewards_PGR)
    return ((np.abs(advantages_PG) > 1e-6) & counting(groups, config)).any(-1)


def is_enough(drawn: Sequence[Groups], advantages: Advantages, config: PolicyConfig) -> bool:
    """Whether a step's groups, all of which teach, can be chosen from what was drawn; or no more may be drawn."""
    if len(drawn) == config.dynamic_sampling_attempts:
        return True
    return sum(int(teaches(groups, advantages, config).sum()) for groups in drawn) >= config.prompts_per_step


def choose(drawn: Sequence[Groups], advantages: Advantages, config: PolicyConfig) -> Groups:
    """A step's groups from several attempts, those that teach first, in the order they came.

    Dynamic sampling, DAPO, https://arxiv.org/abs/2503.14476, section 3.2; where too few teach, others fill up. Attempts
    are drawn apart, so a prompt may be there twice.
    """
    if len(drawn) == 1:
        return drawn[0]
    S = max(groups.prompt_PS.shape[1] for groups in drawn)
    teaches_P = np.concatenate([teaches(groups, advantages, config) for groups in drawn])
    these = np.argsort(~teaches_P, kind="stable")[: config.prompts_per_step]
    rows = [row for groups in drawn for row in groups.rows]
    prompts_PS = [np.pad(groups.prompt_PS, ((0, 0), (0, S - groups.prompt_PS.shape[1]))) for groups in drawn]
    return Groups(
        [rows[i] for i in these],
        np.concatenate(prompts_PS)[these],
        np.concatenate([groups.lengths_P for groups in drawn])[these],
        jax.tree.map(lambda *parts: np.concatenate(parts)[these], *(groups.rollout for groups in drawn)),
        np.concatenate([groups.rewards_PGR for groups in drawn])[these],
    )


def make_batch(groups: Groups, config: PolicyConfig) -> Batch:
    """What the loss needs, [P, ...], but for the advantages.

    Tokens behind the end are masked out, and unscorable completions; those that were cut at T if that is wanted.
    """
    tokens_PGT, sampled_PGT, lengths_PG, _ = map(np.asarray, groups.rollout)
    return {
        "prompt_PS": groups.prompt_PS,
        "lengths_P": groups.lengths_P,
        "tokens_PGT": tokens_PGT,
        "sampled_PGT": sampled_PGT,
        "mask_PGT": (np.arange(tokens_PGT.shape[-1]) < lengths_PG[..., None]) & counting(groups, config)[..., None],
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
    """The columns prompt, completion, rewards/NAME of every reward, advantage, length (tokens) and stop_reason."""
    G = len(texts_PG[0])
    table: dict[str, list[Any]] = {
        "prompt": [str(prompt) for prompt in prompts for _ in range(G)],
        "completion": [text for group in texts_PG for text in group],
    }
    table |= {f"rewards/{name}": groups.rewards_PGR[..., r].reshape(-1).tolist() for r, name in enumerate(names)}
    table["advantage"] = np.asarray(advantages_PG, np.float32).reshape(-1).tolist()
    table["length"] = np.asarray(groups.rollout.lengths_PG).reshape(-1).tolist()
    finished = np.asarray(groups.rollout.finished_PG).reshape(-1)
    table["stop_reason"] = ["stop" if ended else "length" for ended in finished]
    return table
