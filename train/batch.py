"""From what a step has drawn to the arrays that its update reads: no model, no devices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from train.config import PolicyConfig
from train.data.rows import Row


class Groups(NamedTuple):
    """Prompts with their completions and rewards, as one attempt of a step draws them."""

    rows: list[Row]  # of the data, P of them
    prompt_PS: np.ndarray  # int32 tokens, right-padded
    lengths_P: np.ndarray  # int32, tokens of each prompt
    rollout: Any  # a models.sampler.Rollout of NumPy arrays
    rewards_PGR: np.ndarray  # float32 or float64, every reward by itself; NaN = unscorable
    left_out_PG: np.ndarray | None = None  # bool, True where no combined reward is learned from; None: by rewards_PGR
    logged_PG: Mapping[str, list[list[Any]]] | None = None  # columns that reward functions have logged, [P][G]


class Batch(NamedTuple):
    """The arrays of an update, on the host. Every field begins with the axis of prompts."""

    prompt_PS: np.ndarray  # int32 tokens, right-padded
    lengths_P: np.ndarray  # int32, tokens of each prompt
    tokens_PGT: np.ndarray  # int32 tokens of the completions, right-padded
    sampled_PGT: np.ndarray  # float32, the sampler's tempered log-probabilities of tokens_PGT
    mask_PGT: np.ndarray  # bool, True for the tokens that the loss counts
    advantages_PG: np.ndarray | None = None  # float32; None until the rewards are turned into advantages
    old_PGT: np.ndarray | None = None  # float32 log-probabilities before the first update; None: those of the gradient
    ref_PGT: np.ndarray | None = None  # float32 log-probabilities of the reference; None: the objective computes them
    entropy_PGT: np.ndarray | None = None  # float32 entropies before the first update, where tokens are chosen by them
    # bool, see `train.choices`: the tokens whose surrogate counts, those that lose it, those with KL-Cov's penalty
    top_entropy_PGT: np.ndarray | None = None
    clip_cov_PGT: np.ndarray | None = None
    kl_cov_PGT: np.ndarray | None = None

    def take(self, prompts: np.ndarray) -> "Batch":
        """The batch of the prompts with these indices, in this order."""
        return jax.tree.map(lambda array: array[prompts], self)


Advantages = Callable[..., np.ndarray]  # rewards_PGR -> advantages_PG, see `train.objective.make_advantages`


def learned_mask(groups: Groups, config: PolicyConfig) -> np.ndarray:
    """[P, G] True for the completions that are learned from.

    A completion without any reward is not, nor one that lacks a reward without which it is left out
    (`Rewards.left_out`), nor one that was cut at T if `loss.mask_truncated_completions` says so.
    """
    scored_PG = ~np.all(np.isnan(groups.rewards_PGR), axis=-1) if groups.left_out_PG is None else ~groups.left_out_PG
    return scored_PG & groups.rollout.finished_PG if config.loss.mask_truncated_completions else scored_PG


def has_signal(groups: Groups, advantages: Advantages, config: PolicyConfig) -> np.ndarray:
    """[P] True where some advantage is non-zero (abs > 1e-6: a batch's normalisation leaves rounding noise)."""
    advantages_PG = advantages(groups.rewards_PGR)
    return ((np.abs(advantages_PG) > 1e-6) & learned_mask(groups, config)).any(-1)


def is_enough(attempts: Sequence[Groups], advantages: Advantages, config: PolicyConfig) -> bool:
    """True if the attempts hold a whole step of groups with a signal, or no further attempt is allowed."""
    if len(attempts) == config.dynamic_sampling_attempts:
        return True
    return sum(int(has_signal(groups, advantages, config).sum()) for groups in attempts) >= config.prompts_per_step


def choose(attempts: Sequence[Groups], advantages: Advantages, config: PolicyConfig) -> Groups:
    """Selects a step's groups from several attempts: those with a signal first, in the order they were drawn.

    Dynamic sampling, DAPO, https://arxiv.org/abs/2503.14476, section 3.2; where too few groups have a signal, others
    fill up. Attempts are drawn independently, so a prompt may be selected twice.
    """
    if len(attempts) == 1:
        return attempts[0]
    S = max(groups.prompt_PS.shape[1] for groups in attempts)
    signal_P = np.concatenate([has_signal(groups, advantages, config) for groups in attempts])
    selected = np.argsort(~signal_P, kind="stable")[: config.prompts_per_step]
    rows = [row for groups in attempts for row in groups.rows]
    left_out = [groups.left_out_PG for groups in attempts if groups.left_out_PG is not None]
    prompts_PS = [np.pad(groups.prompt_PS, ((0, 0), (0, S - groups.prompt_PS.shape[1]))) for groups in attempts]
    return Groups(
        [rows[i] for i in selected],
        np.concatenate(prompts_PS)[selected],
        np.concatenate([groups.lengths_P for groups in attempts])[selected],
        jax.tree.map(lambda *parts: np.concatenate(parts)[selected], *(groups.rollout for groups in attempts)),
        np.concatenate([groups.rewards_PGR for groups in attempts])[selected],
        np.concatenate(left_out)[selected] if left_out else None,
        {name: [values_PG[i] for i in selected] for name, values_PG in joined_columns(attempts).items()},
    )


def joined_columns(attempts: Sequence[Groups]) -> dict[str, list[list[Any]]]:
    """Joins the logged columns of several attempts; one that an attempt has not logged is None there."""
    names = dict.fromkeys(name for groups in attempts for name in groups.logged_PG or {})
    absent = [[[None] * groups.rewards_PGR.shape[1]] * len(groups.rewards_PGR) for groups in attempts]
    return {
        name: [
            values_G
            for groups, absent_PG in zip(attempts, absent, strict=True)
            for values_G in (groups.logged_PG or {}).get(name, absent_PG)
        ]
        for name in names
    }


def make_batch(groups: Groups, config: PolicyConfig) -> Batch:
    """Builds the batch of a step, without advantages.

    The mask leaves out tokens behind a completion's end, and completions that are not learned from (`learned_mask`).
    """
    tokens_PGT, sampled_PGT, lengths_PG, _ = map(np.asarray, groups.rollout)
    real_PGT = np.arange(tokens_PGT.shape[-1]) < lengths_PG[..., None]
    mask_PGT = real_PGT & learned_mask(groups, config)[..., None]
    return Batch(groups.prompt_PS, groups.lengths_P, tokens_PGT, sampled_PGT, mask_PGT)


def minibatches(batch: Batch, prompts: int, iterations: int, seed: int, step: int) -> Iterator[Batch]:
    """Yields the batch of every update: each iteration goes over all prompts once, shuffled if it is several updates.

    Args:
      prompts: prompts per update.
      iterations: passes over the batch.
      seed, step: fix the order of the prompts in every iteration.
    """
    P = len(batch.lengths_P)
    for iteration in range(iterations):
        order = np.random.default_rng([seed, step, iteration]).permutation(P) if prompts < P else np.arange(P)
        for start in range(0, P, prompts):
            yield batch.take(order[start : start + prompts])


def completion_table(
    prompts: Sequence[Any],
    texts_PG: Sequence[Sequence[str]],
    groups: Groups,
    names: Sequence[str],
    advantages_PG: np.ndarray,
    endings_PG: Sequence[Sequence[str | None]] | None = None,
) -> dict[str, list[Any]]:
    """The columns prompt, completion, rewards/NAME of every reward, advantage, length (tokens), stop_reason, logged/...

    The last are what reward functions have logged. Where the run has stop strings, `endings_PG` says which one ended a
    completion: the column stop_string.
    """
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
    if endings_PG is not None:
        table["stop_string"] = [ending for group in endings_PG for ending in group]
    return table | table_columns(groups.logged_PG or {})


def table_columns(columns_PG: Mapping[str, list[list[Any]]]) -> dict[str, list[Any]]:
    """Returns columns [P * G] of one type each, as tables want them: numbers, booleans or texts; None where missing."""
    flat = {name: [value for values_G in values_PG for value in values_G] for name, values_PG in columns_PG.items()}
    return {name: _of_one_type(values) for name, values in flat.items()}


def _of_one_type(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds != {int}:
        return [None if value is None else float(value) for value in values]
    return values if len(kinds) <= 1 else [None if value is None else str(value) for value in values]
