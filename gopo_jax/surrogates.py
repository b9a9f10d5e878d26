"""The parts of a token's loss: importance ratios, surrogates, sampler corrections, weights by position.

`policy_loss` combines them; each is a function of arrays that can be used alone.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from gopo_jax import checks

RATIOS = ("token", "sequence", "sequence_token", "trajectory")
BROADCASTS = ("uniform", "log_decay", "poly_decay", "loglog_decay")
CISPO_CLIP_MAX = 5.0
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def importance_ratio(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    mask: jax.Array,
    kind: Literal["token", "sequence", "sequence_token", "trajectory"] = "token",
) -> jax.Array:
    """Importance ratio rho between the trained policy and the old one, which drew the tokens.

        d_t = logprob_t - old_logprob_t
        token            rho_t = exp(d_t)                                     GRPO, PPO
        sequence         rho_t = exp(mean over the completion of d)           GSPO
        sequence_token   rho_t = exp(mean of d) exp(d_t) / sg(exp(d_t))       GSPO-token: GSPO's value, token's gradient
        trajectory       rho_t = exp(sum over the completion of d)            TIC-GRPO; the sum is clipped to +-20

    Args:
      logprobs: [..., T] log-probabilities of the sampled tokens under the trained policy.
      old_logprobs: [..., T] log-probabilities under the old policy; no gradient.
      mask: [..., T] booleans, the tokens that count.
      kind: the ratio.

    Returns:
      [..., T] ratios, the same for every token of a completion except with "token"; 1 where the mask is False.

    Raises:
      ValueError: shapes that differ, or an unknown kind.

    References:
      PPO, https://arxiv.org/abs/1707.06347; GSPO, https://arxiv.org/abs/2507.18071, sections 4.1 and 4.3;
      TIC-GRPO, https://arxiv.org/abs/2508.02833.
    """
    checks.one_of("ratio", kind, RATIOS)
    checks.same_shape("old_logprobs", old_logprobs, "logprobs", logprobs)
    checks.same_shape("mask", mask, "logprobs", logprobs)
    # masked before any exp: 0 * inf would be NaN in the gradient
    token_PGT = jnp.where(mask, logprobs, 0) - jax.lax.stop_gradient(jnp.where(mask, old_logprobs, 0))
    if kind == "token":
        return jnp.exp(token_PGT)
    log_ratio = token_PGT.sum(-1, keepdims=True)
    if kind == "trajectory":
        # the exp of a sum over thousands of tokens would overflow, and its gradient be NaN
        log_ratio = jnp.clip(log_ratio, -20, 20)
    else:
        log_ratio = log_ratio / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    if kind == "sequence_token":
        log_ratio = jax.lax.stop_gradient(log_ratio) + token_PGT - jax.lax.stop_gradient(token_PGT)
    return jnp.where(mask, jnp.exp(jnp.broadcast_to(log_ratio, mask.shape)), 1)


def clip_surrogate(
    ratio: jax.Array,
    logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """PPO's clipped surrogate, the objective of a token (to be maximized).

        J = min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
        with dual_clip c:  J = max(J, c A)  where A < 0

    clip_high above clip_low is DAPO's "clip-higher"; clip_low = 1 clips from above only (TIC-GRPO). The dual clip
    bounds the weight of an unlikely token of a bad completion.

    Args:
      ratio: [..., T] importance ratios rho.
      logprobs: unused; all surrogates have the same arguments.
      advantages: [..., T] advantages A.
      clip_low, clip_high: distances from 1.
      dual_clip: c above 1, or None.

    Returns:
      [..., T] objectives J.

    Raises:
      ValueError: a dual_clip that is not above 1.

    References:
      PPO, https://arxiv.org/abs/1707.06347, equation 7; DAPO, https://arxiv.org/abs/2503.14476, section 3.1;
      dual clip: Ye et al., https://arxiv.org/abs/1912.09729.
    """
    unclipped_PGT, clipped_PGT = ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages
    # where both are equal, the gradient is that of rho A
    objective_PGT = jnp.where(unclipped_PGT <= clipped_PGT, unclipped_PGT, clipped_PGT)
    if dual_clip is None:
        return objective_PGT
    if not dual_clip > 1:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    return jnp.where(advantages < 0, jnp.maximum(objective_PGT, dual_clip * advantages), objective_PGT)


def cispo_surrogate(
    ratio: jax.Array, logprobs: jax.Array, advantages: jax.Array, *, clip_max: float = CISPO_CLIP_MAX
) -> jax.Array:
    """CISPO: the clipped ratio is a constant weight of REINFORCE's objective, so no token loses its gradient.

        J = sg(min(rho, clip_max)) A logprob

    Args:
      ratio: [..., T] importance ratios rho.
      logprobs: [..., T] log-probabilities; the gradient flows into them.
      advantages: [..., T] advantages A.
      clip_max: the largest weight (TRL's `epsilon_high` for this loss, verl's and slime's 1 + eps).

    Returns:
      [..., T] objectives J.

    References:
      MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5; the default is ScaleRL's,
      https://arxiv.org/abs/2510.13786.
    """
    return jax.lax.stop_gradient(jnp.minimum(ratio, clip_max)) * advantages * logprobs


def sapo_surrogate(
    ratio: jax.Array,
    logprobs: jax.Array,
    advantages: jax.Array,
    *,
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
) -> jax.Array:
    """SAPO: a soft gate in place of the clip.

        J = 4 / tau sigmoid(tau (rho - 1)) A,   tau = temperature_pos where A > 0, else temperature_neg

    On policy (rho = 1) its gradient is that of rho A.

    Args:
      ratio: [..., T] importance ratios rho.
      logprobs: unused; all surrogates have the same arguments.
      advantages: [..., T] advantages A.
      temperature_pos, temperature_neg: tau; the larger, the faster the gradient falls off with |rho - 1|.

    Returns:
      [..., T] objectives J.

    References:
      SAPO, https://arxiv.org/abs/2511.20347.
    """
    temperature_PGT = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    return 4 / temperature_PGT * jax.nn.sigmoid(temperature_PGT * (ratio - 1)) * advantages


SURROGATES: dict[str, Callable[..., jax.Array]] = {
    "clip": clip_surrogate,
    "cispo": cispo_surrogate,
    "sapo": sapo_surrogate,
}


def sampler_correction(
    old_logprobs: jax.Array,
    sampled_logprobs: jax.Array,
    mask: jax.Array,
    *,
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate",
    clip_max: float = 2.0,
    clip_min: float = 0.0,
) -> jax.Array:
    """Truncated importance sampling: weights that correct for sampler and trainer disagreeing on log-probabilities.

        u_t = exp(old_logprob_t - sampled_logprob_t), for "sequence_*" the product of u over the completion
        *_truncate   clip(u, clip_min, clip_max)
        *_mask       u where clip_min <= u <= clip_max, else 0

    Args:
      old_logprobs: [..., T] log-probabilities under the trainer's policy at the time of sampling.
      sampled_logprobs: [..., T] log-probabilities that the sampler reported.
      mask: [..., T] booleans, the tokens that count.
      mode: one of the four; TRL's `vllm_importance_sampling_mode`.
      clip_max, clip_min: bounds of the weight (C of the source is clip_max).

    Returns:
      [..., T] weights without a gradient, factors of each token's surrogate; 0 where the mask is False.

    Raises:
      ValueError: shapes that differ, or an unknown mode.

    References:
      Yao et al., Your efficient RL framework secretly brings you off-policy RL training, 2025 (TIS);
      masking: IcePop, in Ring-1T, https://arxiv.org/abs/2510.18855.
    """
    checks.one_of("mode", mode, CORRECTIONS)
    checks.same_shape("sampled_logprobs", sampled_logprobs, "old_logprobs", old_logprobs)
    checks.same_shape("mask", mask, "old_logprobs", old_logprobs)
    difference_PGT = jnp.where(mask, old_logprobs, 0) - jnp.where(mask, sampled_logprobs, 0)
    if mode.startswith("sequence"):
        difference_PGT = jnp.broadcast_to(difference_PGT.sum(-1, keepdims=True), mask.shape)
    weights_PGT = jnp.exp(difference_PGT)
    if mode.endswith("truncate"):
        weights_PGT = jnp.clip(weights_PGT, clip_min, clip_max)
    else:
        weights_PGT = jnp.where((weights_PGT >= clip_min) & (weights_PGT <= clip_max), weights_PGT, 0)
    return jax.lax.stop_gradient(jnp.where(mask, weights_PGT, 0))


def token_broadcast(
    advantages: jax.Array,
    length: int,
    kind: Literal["uniform", "log_decay", "poly_decay", "loglog_decay"] = "uniform",
) -> jax.Array:
    """Spreads a completion's advantage over its tokens, t = 1 ... T.

        uniform        A_t = A
        log_decay      A_t = A / log(1 + t)
        poly_decay     A_t = A / sqrt(t)
        loglog_decay   A_t = A / log(log(t + 5))

    Args:
      advantages: [...] one per completion.
      length: T.
      kind: the weights by position.

    Returns:
      [..., T] advantages.

    Raises:
      ValueError: an unknown kind.

    References:
      The weights of GOPO's published recipes (https://arxiv.org/abs/2602.03876), there called token_broadcast.
    """
    checks.one_of("token_broadcast", kind, BROADCASTS)
    t_T = jnp.arange(1, length + 1, dtype=jnp.float32)
    weights_T = {
        "uniform": jnp.ones_like(t_T),
        "log_decay": 1 / jnp.log1p(t_T),
        "poly_decay": 1 / jnp.sqrt(t_T),
        "loglog_decay": 1 / jnp.log(jnp.log(t_T + 5)),
    }[kind]
    return advantages[..., None] * weights_T
