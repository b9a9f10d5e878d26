"""Losses: the clipped policy loss and its KL penalty, Bradley-Terry for comparisons, Plackett-Luce for whole orders.

Every loss is a sum divided by a count, and the caller may give the count: with several micro-batches or devices,
sum the counts first (`loss_count`), pass the total to each part as `denominator`, and add up the parts' losses.
The result then does not depend on how the batch was split.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks
from gopo_jax.surrogates import CISPO_CLIP_MAX, SURROGATES, importance_ratio

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, count); combine by `add_metrics`, then divide once

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATES = ("token", "sequence", "constant", "token_per_microbatch")


def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, kind: Literal["k1", "k2", "k3"] = "k3") -> jax.Array:
    """Estimates KL(policy || reference) per token from tokens drawn from the policy.

        d  = logprobs - ref_logprobs
        k1 = d                     unbiased, high variance, can be negative
        k2 = d^2 / 2               biased; its gradient is that of the KL, on-policy
        k3 = exp(-d) - 1 + d       unbiased, never negative

    Args:
      logprobs: [..., T] log-probabilities under the policy.
      ref_logprobs: [..., T] log-probabilities under the reference.
      kind: the estimator.

    Returns:
      [..., T] estimates in nats.

    Raises:
      ValueError: an unknown kind, or shapes that differ.

    References:
      Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html.
    """
    checks.one_of("kind", kind, KL_ESTIMATORS)
    checks.same_shape("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    difference_PGT = logprobs - ref_logprobs
    if kind == "k1":
        return difference_PGT
    if kind == "k2":
        return jnp.square(difference_PGT) / 2
    return jnp.expm1(-difference_PGT) + difference_PGT


def loss_count(mask: jax.Array, aggregate: str = "token", *, max_length: int | None = None) -> jax.Array:
    """Returns the batch's count under an aggregation mode: the denominator of `policy_loss`.

    Args:
      mask: [..., T] booleans, the completion tokens that count.
      aggregate: as in `policy_loss`.
      max_length: for "constant", the length that every completion counts with; None = T.

    Returns:
      A float32 scalar: tokens ("token"), completions with at least one token ("sequence"), completions x
      max_length ("constant"), or 1 ("token_per_microbatch").
    """
    checks.one_of("aggregate", aggregate, AGGREGATES)
    if aggregate == "token":
        return mask.sum(dtype=jnp.float32)
    if aggregate == "token_per_microbatch":
        return jnp.ones((), jnp.float32)
    completions = mask.any(-1).sum(dtype=jnp.float32)
    return completions if aggregate == "sequence" else completions * (max_length or mask.shape[-1])


@jax.named_scope("loss")
def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: Literal["token", "sequence", "sequence_token", "trajectory"] = "token",
    surrogate: str | Callable[..., jax.Array] = "clip",
    surrogate_options: Mapping[str, Any] | None = None,
    weights: jax.Array | None = None,
    penalties: jax.Array | None = None,
    aggregate: Literal["token", "sequence", "constant", "token_per_microbatch"] = "token",
    denominator: jax.typing.ArrayLike | None = None,
    max_length: int | None = None,
    kl: Literal["k1", "k2", "k3"] | None = None,
    ref_logprobs: jax.Array | None = None,
    beta: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """Surrogate loss of a policy with an optional KL penalty.

        rho_t = importance_ratio(...)                exp(logprob_t - old_logprob_t), or one ratio per completion
        J_t = min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A)    surrogate "clip"; or "cispo", "sapo"
        l_t = -weights_t J_t + beta KL_t + penalties_t
        loss = sum over the mask of (a_t l_t) / denominator

    with a_t = 1, or 1 / (tokens of the completion) for "sequence", or 1 / (tokens of this call) for
    "token_per_microbatch". A masked position contributes nothing, whatever its values, NaN included.

    Args:
      logprobs: [..., T] log-probabilities of the sampled tokens under the policy being trained.
      old_logprobs: [..., T] log-probabilities under the policy that sampled the tokens; no gradient.
      advantages: [...] one per completion, or [..., T] one per token (see `token_broadcast`).
      mask: [..., T] booleans (or 0/1), the completion tokens that count.
      clip_low, clip_high: bounds of the surrogate "clip", which clips ratios to [1 - clip_low, 1 + clip_high].
      ratio: see `importance_ratio`.
      surrogate: a name in `SURROGATES`, or a function (ratio, logprobs, advantages) -> objective, all [..., T].
      surrogate_options: more keyword arguments of that function, e.g. {"dual_clip": 3.0}.
      weights: [..., T] factors of each token's surrogate (see `sampler_correction`), not of its penalty; None = 1.
      penalties: [..., T] more loss of each token, with a gradient (see `kl_cov`); None = 0.
      aggregate: "token" is the mean over all tokens (DAPO), "sequence" the mean over completions of their
        mean over tokens (GRPO), "constant" the sum over completions x max_length (Dr. GRPO),
        "token_per_microbatch" the token mean of this call alone (pass the number of micro-batches as denominator
        for their mean; it depends on how the batch is split and exists to replicate code that does so).
      denominator: the count of the *global* batch (see `loss_count`); None = the count of this call.
      max_length: for aggregate "constant"; None = T.
      kl: estimator of the penalty, or None for no penalty.
      ref_logprobs: [..., T] log-probabilities under the reference policy; needed with kl.
      beta: weight of the penalty.

    Returns:
      The scalar loss, and metrics as (sum, count) pairs, to be combined by `add_metrics`: "ratio", "kl" (nats per
      token), and the share of clipped tokens: "clip_ratio/low_mean", "/high_mean", "/region_mean", with its
      extremes over completions "/low_min" and "/high_max"; with CISPO "cispo_clip_ratio".

    Raises:
      ValueError: shapes that do not fit together, an unknown option, kl without ref_logprobs, beta without kl.

    References:
      GRPO, https://arxiv.org/abs/2402.03300, equation 3; DAPO, https://arxiv.org/abs/2503.14476, equation 8;
      Dr. GRPO, https://arxiv.org/abs/2503.20783; ratios and surrogates name theirs.
    """
    checks.one_of("aggregate", aggregate, AGGREGATES)
    checks.same_shape("mask", mask, "logprobs", logprobs)
    advantages = checks.per_token(advantages, logprobs)
    if (kl is None) != (ref_logprobs is None):
        raise ValueError("kl, ref_logprobs: expected both (a KL penalty) or neither (none), got one of the two")
    if kl is None and beta:
        raise ValueError(f"beta: {beta} needs kl='k1'|'k2'|'k3' and ref_logprobs; use beta=0 for no penalty")
    mask_PGT = mask.astype(bool)
    count = loss_count(mask_PGT, aggregate, max_length=max_length) if denominator is None else jnp.asarray(denominator)

    def masked(array: jax.Array) -> jax.Array:
        return jnp.where(mask_PGT, array, 0)  # before any exp: 0 * inf would be NaN in the gradient

    def total(array: jax.Array) -> jax.Array:
        return masked(array).sum(dtype=jnp.float32)

    logprobs_PGT = masked(logprobs)
    advantages_PGT = jax.lax.stop_gradient(masked(jnp.broadcast_to(advantages, mask.shape)))
    ratio_PGT = importance_ratio(logprobs_PGT, old_logprobs, mask_PGT, ratio)
    options = dict(surrogate_options or {})
    if surrogate == "clip":
        options |= {"clip_low": clip_low, "clip_high": clip_high}
    loss_PGT = -_surrogate_function(surrogate)(ratio_PGT, logprobs_PGT, advantages_PGT, **options)
    if weights is not None:
        checks.same_shape("weights", weights, "logprobs", logprobs)
        loss_PGT = masked(weights) * loss_PGT
    if penalties is not None:
        checks.same_shape("penalties", penalties, "logprobs", logprobs)
        loss_PGT = loss_PGT + masked(penalties)

    tokens_PG1, tokens = mask_PGT.sum(-1, keepdims=True), mask_PGT.sum(dtype=jnp.float32)
    metrics: Metrics = {"ratio": (total(ratio_PGT), tokens)}
    if surrogate == "clip":
        metrics |= _clip_metrics(ratio_PGT, advantages_PGT, mask_PGT, clip_low, clip_high)
    if surrogate == "cispo":
        clipped_PGT = (ratio_PGT > options.get("clip_max", CISPO_CLIP_MAX)) & (advantages_PGT > 0)
        metrics["cispo_clip_ratio"] = (total(clipped_PGT), tokens)
    if kl is not None and ref_logprobs is not None:
        checks.same_shape("ref_logprobs", ref_logprobs, "mask", mask)
        kl_PGT = kl_penalty(logprobs_PGT, jax.lax.stop_gradient(masked(ref_logprobs)), kl)
        loss_PGT = loss_PGT + beta * kl_PGT
        metrics["kl"] = (total(kl_PGT), tokens)

    if aggregate == "sequence":
        loss_PGT = loss_PGT / jnp.maximum(tokens_PG1, 1)
    elif aggregate == "token_per_microbatch":
        loss_PGT = loss_PGT / jnp.maximum(tokens, 1)
    loss = total(loss_PGT) / jnp.maximum(count, 1e-9)
    return loss, jax.lax.stop_gradient(metrics)


def _surrogate_function(name: str | Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    if callable(name):
        return name
    checks.one_of("surrogate", name, SURROGATES)
    return SURROGATES[name]


def _clip_metrics(
    ratio_PGT: jax.Array, advantages_PGT: jax.Array, mask_PGT: jax.Array, clip_low: float, clip_high: float
) -> Metrics:
    """Returns the share of tokens that the clip below, above and either changes, and its extremes over completions."""
    low_PGT = (ratio_PGT < 1 - clip_low) & (advantages_PGT < 0) & mask_PGT
    high_PGT = (ratio_PGT > 1 + clip_high) & (advantages_PGT > 0) & mask_PGT
    tokens, tokens_PG = mask_PGT.sum(dtype=jnp.float32), mask_PGT.sum(-1)
    has_tokens = mask_PGT.any().astype(jnp.float32)

    def share_PG(clipped_PGT: jax.Array, if_empty: float) -> jax.Array:
        return jnp.where(tokens_PG > 0, clipped_PGT.sum(-1) / jnp.maximum(tokens_PG, 1), if_empty)

    clipped = {"low_mean": low_PGT, "high_mean": high_PGT, "region_mean": low_PGT | high_PGT}
    metrics = {f"clip_ratio/{name}": (array.sum(dtype=jnp.float32), tokens) for name, array in clipped.items()}
    metrics["clip_ratio/low_min"] = (share_PG(low_PGT, 1.0).min(initial=1.0), has_tokens)
    metrics["clip_ratio/high_max"] = (share_PG(high_PGT, 0.0).max(initial=0.0), has_tokens)
    return metrics


def add_metrics(*parts: Metrics) -> Metrics:
    """Combines the metrics of several parts of a batch: adds up their sums and their counts.

    A name that ends in min or max is an extreme: (value, 1 if the part has tokens). The smallest or largest value of
    the parts with tokens is returned.
    """

    def combine(name: str) -> tuple[jax.Array, jax.Array]:
        values, counts = zip(*(part[name] for part in parts), strict=True)
        if not name.endswith(("min", "max")):
            return sum(values), sum(counts)
        extreme = min if name.endswith("min") else max
        counted = [value for value, count in zip(values, counts, strict=True) if count]
        return (extreme(counted), max(counts)) if counted else (values[0], counts[0])

    return {name: combine(name) for name in parts[0]}


@jax.named_scope("loss")
def preference_loss(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    *,
    margin: jax.Array | None = None,
    center: float = 0.0,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """Bradley-Terry negative log-likelihood of human (or other) comparisons.

        loss = mean( -log sigmoid(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2 )

    Args:
      chosen_rewards: [...] scores of the preferred answers.
      rejected_rewards: [...] scores of the rejected answers, the same shape.
      margin: [...] how much better the chosen one should be, or None for 0.
      center: weight of the term that keeps the scores' sum near zero (the likelihood leaves it free).
      mask: [...] booleans, False leaves a comparison out; None = all count.

    Returns:
      The scalar loss, and metrics as (sum, count) pairs: "accuracy" (ties count one half), "margin" (the
      mean difference of the scores), "mean_reward".

    Raises:
      ValueError: shapes that differ.

    References:
      Bradley and Terry 1952; Ouyang et al., https://arxiv.org/abs/2203.02155, equation 1;
      centring: Eisenstein et al., https://arxiv.org/abs/2312.09244.
    """
    checks.same_shape("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)
    if margin is not None:
        checks.same_shape("margin", margin, "chosen_rewards", chosen_rewards)
    if mask is None:
        mask = jnp.ones(chosen_rewards.shape, bool)
    checks.same_shape("mask", mask, "chosen_rewards", chosen_rewards)
    chosen, rejected = (jnp.where(mask, x, 0).astype(jnp.float32) for x in (chosen_rewards, rejected_rewards))
    difference = chosen - rejected
    loss = -jax.nn.log_sigmoid(difference - (0.0 if margin is None else jnp.where(mask, margin, 0)))
    loss = loss + center * jnp.square(chosen + rejected)
    n = mask.sum(dtype=jnp.float32)
    won = jnp.where(difference == 0, 0.5, difference > 0)

    def total(array: jax.Array) -> jax.Array:
        return jnp.where(mask, array, 0).sum(dtype=jnp.float32)

    metrics: Metrics = {
        "accuracy": (total(won), n),
        "margin": (total(difference), n),
        "mean_reward": (total(chosen + rejected) / 2, n),
    }
    return total(loss) / jnp.maximum(n, 1), jax.lax.stop_gradient(metrics)


@jax.named_scope("loss")
def listwise_loss(
    scores_PG: jax.Array, targets_PG: jax.Array, mask_PG: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Plackett-Luce negative log-likelihood of an order of the answers to one prompt.

        loss of a group = sum_i -log( exp(s_i) / (exp(s_i) + sum_{j worse than i} exp(s_j)) )

    The best answer is chosen from all, the next from the remaining ones, and so on. j is worse than i where its
    target is lower. Answers with equal targets are not compared: neither enters the other's sum. Without ties this
    is the likelihood of the order; for two answers it is Bradley-Terry, -log sigmoid(s_better - s_worse).

    Args:
      scores_PG: [..., G] the model's scores; the last axis is the group.
      targets_PG: [..., G] numbers in the target order, the higher the better; only their order counts.
      mask_PG: [..., G] booleans, False leaves an answer out; None = all count.

    Returns:
      The scalar loss, the mean over groups with at least one comparison, and metrics as (sum, count) pairs:
      "top_accuracy", how often the highest score is on one of the best answers (equal scores share the hit).

    Raises:
      ValueError: G < 2, or shapes that differ.

    References:
      Luce 1959; Plackett 1975; as a loss: Xia et al., Listwise Approach to Learning to Rank (ListMLE), ICML 2008.
    """
    scores_PG = checks.as_float("scores_PG", scores_PG)
    checks.group_axis("scores_PG", scores_PG)
    checks.same_shape("targets_PG", targets_PG, "scores_PG", scores_PG)
    if mask_PG is None:
        mask_PG = jnp.ones(scores_PG.shape, bool)
    checks.same_shape("mask_PG", mask_PG, "scores_PG", scores_PG)
    mask_PG = mask_PG.astype(bool)
    scores_PG = jnp.where(mask_PG, scores_PG, 0)  # before any exp: 0 * inf would be NaN in the gradient

    pair_PGG = mask_PG[..., :, None] & mask_PG[..., None, :]
    worse_PGG = pair_PGG & (targets_PG[..., None, :] < targets_PG[..., :, None])
    choice_PGG = worse_PGG | jnp.eye(scores_PG.shape[-1], dtype=bool)
    normalizer_PG = jax.nn.logsumexp(jnp.where(choice_PGG, scores_PG[..., None, :], -jnp.inf), axis=-1)
    compared_P = worse_PGG.any((-2, -1))
    groups = compared_P.sum(dtype=jnp.float32)

    best_PG = mask_PG & ~worse_PGG.any(-2)
    top_P1 = jnp.max(scores_PG, -1, keepdims=True, where=mask_PG, initial=-jnp.inf)
    top_PG = mask_PG & (scores_PG == top_P1)
    hit_P = (top_PG & best_PG).sum(-1) / jnp.maximum(top_PG.sum(-1), 1)
    metrics: Metrics = {"top_accuracy": (jnp.where(compared_P, hit_P, 0).sum(), groups)}
    total = jnp.where(mask_PG, normalizer_PG - scores_PG, 0).sum(dtype=jnp.float32)
    return total / jnp.maximum(groups, 1), jax.lax.stop_gradient(metrics)
