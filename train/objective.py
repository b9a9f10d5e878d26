"""What a step optimizes: advantages from rewards, log-probabilities of the sampled tokens, the policy's loss.

`train.update` differentiates `policy_objective`; `train.loop` calls the function that `make_advantages` returns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax import entropy_bonus, kl_penalty, policy_loss, sampler_correction, token_broadcast
from gopo_jax.losses import Metrics
from models.lora import merge_trainable
from train.config import LossConfig, PolicyConfig
from train.packing import MicroBatch, unpack
from train.rewards.precision import combine, fill_missing, missing_masks, narrow, precision_of
from train.run.metrics import sampling_metrics


def make_advantages(config: PolicyConfig) -> Callable[..., np.ndarray]:
    """Returns the function (rewards_PGR, penalty_PG) -> float32 advantages_PG that `config.advantage` names, jitted.

    A penalty is taken off the combined reward; advantages that rank every reward by itself take none. It computes in
    float64 where float32 would lose the order or the differences of the rewards.

    Raises:
      ValueError: advantages of another shape than [prompts_per_step, num_generations].
    """
    weights_R = np.array([spec.weight for spec in config.rewards], np.float64)
    takes_every_reward = config.takes_every_reward
    options = config.advantage_options | ({"weights_R": weights_R.astype(np.float32)} if takes_every_reward else {})
    function = jax.jit(partial(config.advantage_function, **options))

    def advantages(rewards_PGR: np.ndarray, penalty_PG: Any = 0.0) -> np.ndarray:
        if takes_every_reward:
            rewards = rewards_PGR
        else:
            rewards = combine(rewards_PGR, weights_R, config.reward_combination, config.missing_rules)
        if not takes_every_reward and np.any(penalty_PG):
            rewards = rewards.astype(np.float64) - np.asarray(penalty_PG, np.float64)
            rewards = fill_missing(rewards, *missing_masks(rewards_PGR, weights_R, config.missing_rules))
        rewards = narrow(rewards)
        with precision_of(rewards):
            return np.asarray(function(rewards)).astype(np.float32)

    shape = (config.prompts_per_step, config.num_generations)
    trial_PG = advantages(np.zeros((*shape, len(weights_R)), np.float32))
    if trial_PG.shape != shape:
        raise ValueError(f"advantage: {config.advantage}: expected advantages of shape {shape}, got {trial_PG.shape}")
    return advantages


def completion_logprobs(
    graphdef: Any, config: PolicyConfig, params: Any, batch: MicroBatch, *, with_entropy: bool = False
) -> Any:
    """Tempered log-probabilities of the sampled tokens, float32 [P, G, T]; `with_entropy`: (those, the entropies)."""
    model = nnx.merge(graphdef, params)
    hidden_PBTD = model.predict(batch.prompt_PS, batch.lengths_P, batch.tokens_PBT, batch.offset_PBT)
    options = {"chunk_tokens": config.loss.logprob_chunk, "temperature": config.temperature}
    packed = model.logprobs(hidden_PBTD, batch.tokens_PBT, with_entropy=with_entropy, **options)
    return jax.tree.map(lambda array_PBT: unpack(array_PBT, batch.slot_PGT), packed)


class Denominators(NamedTuple):
    """The counts of the whole batch, where the loss has an entropy bonus."""

    loss: Any  # see `gopo_jax.loss_count`
    bonus: Any  # tokens of `bonus_mask`


def bonus_mask(batch: Any) -> Any:
    """The tokens whose entropy is in the bonus, [P, G, T]: those whose surrogate counts by their entropy."""
    return batch.mask_PGT if batch.top_entropy_PGT is None else batch.mask_PGT & batch.top_entropy_PGT


def policy_objective(
    params: Any,
    ref_params: Any,
    frozen: Any,
    batch: MicroBatch,
    denominator: jax.Array | Denominators,
    *,
    graphdef: Any,
    config: PolicyConfig,
) -> tuple[jax.Array, Metrics]:
    """The loss of a micro-batch and its metrics, as (sum, count) pairs.

    Args:
      params: what is trained: all parameters, or the adapters.
      ref_params: the same of the reference policy; not read if `batch` has its log-probabilities, or beta is 0.
      frozen: the base of adapters, else empty.
      denominator: the loss count of the whole batch (`gopo_jax.loss_count`), so that micro-batches add up to it;
        with an entropy bonus, its count too.
    """
    settings, mask_PGT = config.loss, batch.mask_PGT
    counts = denominator if isinstance(denominator, Denominators) else Denominators(denominator, 1.0)
    logprobs_PGT, entropy_PGT = completion_logprobs(
        graphdef, config, merge_trainable(params, frozen), batch, with_entropy=True
    )
    current_PGT = jax.lax.stop_gradient(logprobs_PGT)
    old_PGT = current_PGT if batch.old_PGT is None else batch.old_PGT
    ref_PGT = batch.ref_PGT
    if settings.beta and ref_PGT is None:
        with jax.named_scope("reference"):
            ref_PGT = completion_logprobs(graphdef, config, merge_trainable(ref_params, frozen), batch)
        ref_PGT = jax.lax.stop_gradient(ref_PGT)
    weights_PGT = sampler_weights(settings, old_PGT, batch)
    kl_cov_PGT = None
    if batch.kl_cov_PGT is not None:
        kl_cov_PGT = jnp.where(mask_PGT & batch.kl_cov_PGT, jnp.abs(logprobs_PGT - old_PGT), 0)
    penalized = settings.beta > 0 and settings.kl_in == "loss"
    loss, metrics = policy_loss(
        logprobs_PGT,
        old_PGT,
        token_broadcast(batch.advantages_PG, mask_PGT.shape[-1], settings.token_broadcast),
        mask_PGT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        ratio=settings.ratio,
        surrogate=settings.surrogate,
        surrogate_options=settings.surrogate_options,
        weights=surrogate_weights(weights_PGT, batch),
        penalties=None if kl_cov_PGT is None else settings.ppo_kl_coef * kl_cov_PGT,
        aggregate=settings.aggregate,
        denominator=counts.loss,
        max_length=config.max_completion_length,
        kl=settings.kl if penalized else None,
        ref_logprobs=ref_PGT if penalized else None,
        beta=settings.beta if penalized else 0.0,
    )
    count = mask_PGT.sum(dtype=jnp.float32)
    metrics["entropy"] = (jnp.where(mask_PGT, entropy_PGT, 0).sum(), count)
    if ref_PGT is not None and not penalized:  # the penalty is in the reward; its size is still worth a curve
        kl_PGT = kl_penalty(jnp.where(mask_PGT, current_PGT, 0), jnp.where(mask_PGT, ref_PGT, 0), settings.kl)
        metrics["kl"] = (kl_PGT.sum(), count)
    metrics |= sampling_metrics(old_PGT, batch.sampled_PGT, mask_PGT, weights_PGT)
    metrics |= choice_metrics(batch, kl_cov_PGT)
    if settings.entropy_coef:
        metrics["policy_loss"] = (loss, jnp.ones(()) / (config.update_prompts // config.microbatch_prompts))
        loss = loss - settings.entropy_coef * entropy_bonus(entropy_PGT, bonus_mask(batch), counts.bonus)
    return loss, jax.lax.stop_gradient(metrics)


@jax.named_scope("loss")
def surrogate_weights(weights_PGT: jax.Array | None, batch: MicroBatch) -> jax.Array | None:
    """Factors of each token's surrogate: the importance weights, 0 for tokens that were not chosen; None: all 1."""
    for chosen_PGT in (batch.top_entropy_PGT, None if batch.clip_cov_PGT is None else ~batch.clip_cov_PGT):
        if chosen_PGT is not None:
            weights_PGT = jnp.where(chosen_PGT, 1.0 if weights_PGT is None else weights_PGT, 0)
    return weights_PGT


def choice_metrics(batch: MicroBatch, kl_cov_PGT: jax.Array | None) -> Metrics:
    """Returns the shares of tokens that were chosen, and KL-Cov's mean penalty of the tokens that have it."""
    count, metrics = batch.mask_PGT.sum(dtype=jnp.float32), Metrics()
    for name in ("top_entropy", "clip_cov", "kl_cov"):
        chosen_PGT = getattr(batch, f"{name}_PGT")
        if chosen_PGT is not None:
            metrics[f"{name}/frac"] = ((batch.mask_PGT & chosen_PGT).sum(dtype=jnp.float32), count)
    if kl_cov_PGT is not None:
        metrics["kl_cov/penalty"] = (kl_cov_PGT.sum(), metrics["kl_cov/frac"][0])
    return metrics


@jax.named_scope("loss")
def sampler_weights(settings: LossConfig, old_PGT: jax.Array, batch: MicroBatch) -> jax.Array | None:
    """Truncated importance weights of trainer over sampler, [P, G, T]; None unless the config asks for them."""
    if settings.importance_sampling_mode is None:
        return None
    return sampler_correction(
        old_PGT,
        batch.sampled_PGT,
        batch.mask_PGT,
        mode=settings.importance_sampling_mode,
        clip_max=settings.importance_sampling_clip_max,
        clip_min=settings.importance_sampling_clip_min,
    )
