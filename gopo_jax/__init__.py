"""GOPO in JAX: rank-based advantages and the losses around them. Arrays in, arrays out.

Axis letters, used as a suffix on every array name in the whole project (`rewards_PG`):

    P  prompts                      D  model width           L  layers
    G  completions per prompt       F  feed-forward width    C  a chunk of another axis
    S  prompt tokens                H  query heads           R  reward functions
    T  completion tokens            K  key/value heads       N  seeds
    V  vocabulary                   E  head_dim              O  possible answers (theory)
    B  rows of sequences            A  rank of adapters      W  multisets of other answers (theory)
    U  positions of keys            I  points of a numerical method (theory)
    Q  query heads per key/value head
    M  evaluations of a run         Y  training steps        X  bootstrap resamples
    J  pairs of completions

G is always the group. S is always the prompt, but for the plain call on rows of whole sequences, `tokens_BS`. A digit
is an axis of that size. Every function here takes any leading axes in place of P.
"""

from gopo_jax.advantages import (
    ADVANTAGES,
    dr_grpo_advantages,
    gopo_advantages,
    grpo_advantages,
    reinforce_pp_advantages,
    rloo_advantages,
)
from gopo_jax.entropy import clip_cov, entropy_bonus, kl_cov, token_covariances, top_entropy_mask
from gopo_jax.groups import valid_rewards
from gopo_jax.logprobs import token_logprobs
from gopo_jax.losses import add_metrics, kl_penalty, listwise_loss, loss_count, policy_loss, preference_loss
from gopo_jax.relatives import (
    gdpo_advantages,
    gopo_multi_advantages,
    krpo_advantages,
    odrpo_advantages,
    soft_gopo_advantages,
)
from gopo_jax.surrogates import (
    SURROGATES,
    cispo_surrogate,
    clip_surrogate,
    importance_ratio,
    sampler_correction,
    sapo_surrogate,
    token_broadcast,
)

__version__ = "0.1.0"

__all__ = [
    "ADVANTAGES",
    "SURROGATES",
    "add_metrics",
    "cispo_surrogate",
    "clip_cov",
    "clip_surrogate",
    "dr_grpo_advantages",
    "entropy_bonus",
    "gdpo_advantages",
    "gopo_advantages",
    "gopo_multi_advantages",
    "grpo_advantages",
    "importance_ratio",
    "kl_cov",
    "kl_penalty",
    "krpo_advantages",
    "listwise_loss",
    "loss_count",
    "odrpo_advantages",
    "policy_loss",
    "preference_loss",
    "reinforce_pp_advantages",
    "rloo_advantages",
    "sampler_correction",
    "sapo_surrogate",
    "soft_gopo_advantages",
    "token_broadcast",
    "token_covariances",
    "token_logprobs",
    "top_entropy_mask",
    "valid_rewards",
]
