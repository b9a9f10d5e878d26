"""The objective of a batch: advantages from rewards, log-probabilities of the sampled tokens, the policy's loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax import kl_penalty, policy_loss, sampler_correction, token_broadcast
from gopo_jax.losses import Metrics
from models.lora import join
from train.config import PolicyConfig
from train.packing import unpack
from train.rewards import combine
from train.run.metrics import sampling_metrics


def make_advantages(config: PolicyConfig) -> Callable[..., np.ndarray]:
    """(rewards_PGR, penalty_PG) -> advantages_PG, jitted; a penalty is taken off the combined reward."""
    weights_R = np.array([spec.weight for spec in config.rewards], np.float32)
    apart = config.takes_every_reward
    options = config.advantage_options | ({"weights_R": weights_R} if apart else {})
    function = jax.jit(partial(config.advantage_function, **options))

    def advantages(rewards_PGR: np.ndarray, penalty_PG: Any = 0.0) -> np.ndarray:
        if apart:
            return np.asarray(function(rewards_PGR))
        return np.asarray(function(combine(rewards_PGR, weights_R, config.reward_combination) - penalty_PG))

    shape = (config.prompts_per_step, config.num_generations)
    found = advantages(np.zeros((*shape, len(weights_R)), np.float32))
    if found.shape != shape:
        raise ValueError(f"advantage: {config.advantage}: expected advantages of shape {shape}, got {found.shape}")
    return advantages


def logprobs_of(graphdef: Any, config: PolicyConfig, params: Any, batch: dict[str, jax.Array], **options: Any) -> Any:
    """Tempered log-probabilities of the sampled tokens, [P, G, T]; with_entropy: entropies too."""
    model, tokens_PBT = nnx.merge(graphdef, params), batch["tokens_PBT"]
    hidden_PBTD = model.predict(batch["prompt_PS"], batch["lengths_P"], tokens_PBT, batch["offset_PBT"])
    options |= {"chunk_tokens": config.loss.logprob_chunk, "temperature": config.temperature}
    found_PBT = model.logprobs(hidden_PBTD, tokens_PBT, **options)
    return jax.tree.map(lambda array_PBT: unpack(array_PBT, batch["slot_PGT"]), found_PBT)


def policy_objective(
    params: Any,
    ref_params: Any,
    frozen: Any,
    batch: dict[str, jax.Array],
    denominator: jax.Array,
    *,
    graphdef: Any,
    config: PolicyConfig,
) -> tuple[jax.Array, Metrics]:
    """The loss of some whole groups, divided by the count of the whole batch, and its metrics."""
    settings, mask_PGT, sampled_PGT = config.loss, batch["mask_PGT"], batch["sampled_PGT"]
    logprobs_PGT, entropy_PGT = logprobs_of(graphdef, config, join(params, frozen), batch, with_entropy=True)
    now_PGT = jax.lax.stop_gradient(logprobs_PGT)
    old_PGT, ref_PGT = batch.get("old_PGT", now_PGT), batch.get("ref_PGT")
    if settings.beta and ref_PGT is None:
        ref_PGT = jax.lax.stop_gradient(logprobs_of(graphdef, config, join(ref_params, frozen), batch))
    penalized = settings.beta > 0 and settings.kl_in == "loss"
    weights_PGT = None
    if settings.importance_sampling_mode is not None:
        bounds = {"clip_max": settings.importance_sampling_clip_max, "clip_min": settings.importance_sampling_clip_min}
        mode = settings.importance_sampling_mode
        weights_PGT = sampler_correction(old_PGT, sampled_PGT, mask_PGT, mode=mode, **bounds)
    loss, metrics = policy_loss(
        logprobs_PGT,
        old_PGT,
        token_broadcast(batch["advantages_PG"], mask_PGT.shape[-1], settings.token_broadcast),
        mask_PGT,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        ratio=settings.ratio,
        surrogate=settings.surrogate,
        surrogate_options=settings.surrogate_options,
        weights=weights_PGT,
        aggregate=settings.aggregate,
        denominator=denominator,
        max_length=config.max_completion_length,
        kl=settings.kl if penalized else None,
        ref_logprobs=ref_PGT if penalized else None,
        beta=settings.beta if penalized else 0.0,
    )
    count = mask_PGT.sum(dtype=jnp.float32)
    metrics["entropy"] = (jnp.where(mask_PGT, entropy_PGT, 0).sum(), count)
    if ref_PGT is not None and not penalized:  # it is in the reward, and worth seeing
        kl_PGT = kl_penalty(jnp.where(mask_PGT, now_PGT, 0), jnp.where(mask_PGT, ref_PGT, 0), settings.kl)
        metrics["kl"] = (kl_PGT.sum(), count)
    metrics |= sampling_metrics(old_PGT, sampled_PGT, mask_PGT, weights_PGT)
    return loss, jax.lax.stop_gradient(metrics)
