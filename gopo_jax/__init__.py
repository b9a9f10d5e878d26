"""GOPO in JAX: rank-based advantages and the losses around them. Arrays in, arrays out.

Axis letters, used as a suffix on every array name in the whole project (`rewards_PG`):

    P  prompts                      D  model width           L  layers
    G  completions per prompt       F  feed-forward width    C  a chunk of another axis
    S  prompt tokens                H  query heads           O  possible answers (theory)
    T  completion tokens            K  key/value heads       R  reward functions
    V  vocabulary                   E  head_dim              N  seeds
    B  rows flattened for a library Q  query heads per key/value head
    A  rank of adapters

G is always the group, S always the prompt. The functions here take any leading axes in place of P.
"""

from gopo_jax.advantages import ADVANTAGES, gopo_advantages, grpo_advantages, rloo_advantages
from gopo_jax.logprobs import token_logprobs
from gopo_jax.losses import kl_penalty, listwise_loss, loss_count, policy_loss, preference_loss

__version__ = "0.1.0"

__all__ = [
    "ADVANTAGES",
    "gopo_advantages",
    "grpo_advantages",
    "kl_penalty",
    "listwise_loss",
    "loss_count",
    "policy_loss",
    "preference_loss",
    "rloo_advantages",
    "token_logprobs",
]
