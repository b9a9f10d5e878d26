"""The metrics of a step, by TRL's names: of rollouts, sampler and clock."""

import contextlib
import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gopo_jax.losses import Metrics, add_metrics
from models.config import Qwen3Config
from models.flops import forward_flops, peak_flops, step_flops
from train.batch import Groups
from train.config import PolicyConfig

Item = TypeVar("Item")


class Timer:
    """Cuts the time of a run into phases without gaps: each goes from the end of the one before to its own."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Ends a phase of this name with the block; a profile shows the block under the name."""
        with jax.profiler.TraceAnnotation(name):
            yield
        self.lap(name)

    def lap(self, name: str) -> None:
        """Ends a phase now."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._began
        self._began = now

    def restart(self) -> None:
        """Begins the next phase now: the time since the last one counts for none."""
        self._began = time.perf_counter()

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase as "timing_s/NAME" and their sum as "timing_s/step"; forgets them."""
        seconds, self._seconds = self._seconds, {}
        return {f"timing_s/{name}": spent for name, spent in seconds.items()} | {"timing_s/step": sum(seconds.values())}

    def each(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items, and measures how long each is waited for."""
        iterator = iter(items)
        while True:
            with self(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item


class UpdateMetrics(NamedTuple):
    """The (sum, count) pairs of an optimizer step, which may still be computed on the devices."""

    of_update: Metrics
    of_parts: list[Metrics]  # of every micro-batch


def fetch_metrics(updates: Sequence[UpdateMetrics]) -> dict[str, float]:
    """Waits for the updates of a step, and returns their metrics as means over all micro-batches of all of them."""
    fetched = jax.device_get(list(updates))
    return mean_metrics(add_metrics(*(of_update | add_metrics(*of_parts) for of_update, of_parts in fetched)))


def mean_metrics(metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    """Divides (sum, count) pairs into means; NaN where the count is 0."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(metrics)).items()}
    return {name: total / count if count else math.nan for name, (total, count) in pairs.items()}


def nonfinite_metric(metrics: Mapping[str, float], without_value: Collection[str] = ()) -> str | None:
    """Returns which of loss and grad_norm is not finite, the first; None if both are."""
    names = [name for name in ("loss", "grad_norm") if name not in without_value]
    return next((name for name in names if not math.isfinite(metrics[name])), None)


def require_finite(
    step: int,
    metrics: Mapping[str, float],
    without_value: Collection[str] = (),
    suspects: str = "the rewards of this step",
) -> None:
    """Stops a run that has diverged: whatever it wrote from here on would mean nothing.

    Args:
      step: the number of the step, from 1.
      metrics: of the step, "loss" and "grad_norm" among them.
      without_value: metrics that are NaN because nothing was counted, such as the loss of a batch of ties.
      suspects: what the user is to look at.

    Raises:
      FloatingPointError: the loss or the gradient's norm is not finite.
    """
    if name := nonfinite_metric(metrics, without_value):
        raise FloatingPointError(
            f"step {step}: {name} is {metrics[name]}: the run has diverged; the checkpoints are as they were; go on "
            f"from an earlier one with a lower optimizer.learning_rate, or look at {suspects}"
        )


@jax.named_scope("loss")
def sampling_metrics(
    old_PGT: jax.Array, sampled_PGT: jax.Array, mask_PGT: jax.Array, weights_PGT: jax.Array | None
) -> Metrics:
    """Returns TRL's sampling/*: |log-probability of trainer - of sampler| per token, and the importance weights."""
    count, any_token = mask_PGT.sum(dtype=jnp.float32), mask_PGT.any().astype(jnp.float32)
    drift_PGT = jnp.where(mask_PGT, jnp.abs(old_PGT - sampled_PGT), 0)
    metrics: Metrics = {
        "sampling/sampling_logp_difference/mean": (drift_PGT.sum(), count),
        "sampling/sampling_logp_difference/max": (drift_PGT.max(), any_token),
    }
    if weights_PGT is not None:
        name = "sampling/importance_sampling_ratio"
        metrics[f"{name}/mean"] = (weights_PGT.sum(), count)  # weights are 0 where the mask is
        metrics[f"{name}/min"] = (jnp.where(mask_PGT, weights_PGT, jnp.inf).min(), any_token)
        metrics[f"{name}/max"] = (weights_PGT.max(), any_token)
    return metrics


def throughput(config: PolicyConfig, network: Qwen3Config, drawn: Sequence[Groups], seconds: float) -> dict[str, float]:
    """Returns perf/tokens_per_s, of completion tokens, and perf/mfu on devices in `models.flops.PEAK_FLOPS`.

    MFU is the least arithmetic that sampling, the passes over the batch and a reference policy need (every prompt once
    per group, remat not counted) over what the devices could have computed in `seconds`, the step's without validation.
    Reward models and waiting take time and add no arithmetic.
    """
    tokens = sum(int(groups.rollout.lengths_PG.sum()) for groups in drawn)
    metrics = {"perf/tokens_per_s": tokens / seconds}
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        forward = [forward_flops(network, g.lengths_P.tolist(), g.rollout.lengths_PG.tolist()) for g in drawn]
        per_batch = sum(forward) / len(forward)  # a batch has as many prompts as one attempt
        flops = step_flops(per_batch, reference=config.loss.beta > 0, iterations=config.num_iterations)
        metrics["perf/mfu"] = (sum(forward) + flops["update"]) / (seconds * peak * jax.device_count())
    return metrics


def rollout_metrics(rewards_PG: np.ndarray, lengths_PG: np.ndarray, finished_PG: np.ndarray) -> dict[str, float]:
    """Returns TRL's reward* and completions/*, and rank/*: how far the rewards order a group's completions.

    rank/tie_frac is the share of pairs within a group with equal rewards, rank/all_tied_frac the share of groups whose
    rewards are all equal, rank/length_corr the mean Spearman correlation of reward and length within a group.
    """
    valid_PG = ~np.isnan(rewards_PG)
    usable = [r[v] for r, v in zip(rewards_PG, valid_PG, strict=True) if v.sum() >= 2]
    ties = [(_tied_pairs(r) / (len(r) * (len(r) - 1) / 2)) for r in usable]
    flat = [float(np.ptp(r) == 0) for r in usable]
    correlation_P = rank_correlations(rewards_PG, np.where(valid_PG, lengths_PG, math.nan))
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan  # noqa: E731
    return {
        "reward": mean(rewards_PG[valid_PG]),
        "reward_std": mean([np.std(r, ddof=1) for r in usable]),
        "frac_reward_zero_std": mean(flat),
        "frac_reward_unscorable": 1 - mean(valid_PG),
        "rank/tie_frac": mean(ties),
        "rank/all_tied_frac": mean(flat),
        "rank/length_corr": mean(correlation_P[~np.isnan(correlation_P)]),
        "completions/mean_length": mean(lengths_PG),
        "completions/min_length": float(lengths_PG.min()),
        "completions/max_length": float(lengths_PG.max()),
        "completions/mean_terminated_length": mean(lengths_PG[finished_PG]),
        "completions/clipped_ratio": 1 - mean(finished_PG),
    }


def _tied_pairs(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * (counts - 1) / 2).sum())


def rank_correlations(a_PG: np.ndarray, b_PG: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a and b in each group: Pearson's of their ranks, ties with their mean rank.

    Args:
      a_PG, b_PG: values; NaN, at the same places in both = left out.

    Returns:
      [P] float64; NaN for a group in which a or b is constant.
    """
    from scipy.stats import rankdata  # slow to import; scipy.stats.spearmanr takes one group at a time: 25 ms for 128

    count_P1 = np.sum(~np.isnan(a_PG), -1, keepdims=True)
    a_PG, b_PG = (rankdata(x, axis=-1, nan_policy="omit") - (count_P1 + 1) / 2 for x in (a_PG, b_PG))
    norm_P = np.sqrt(np.nansum(a_PG**2, -1) * np.nansum(b_PG**2, -1))
    return np.divide(np.nansum(a_PG * b_PG, -1), norm_P, out=np.full(len(norm_P), math.nan), where=norm_P > 0)
