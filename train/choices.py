"""Which tokens of a step's batch keep their surrogate, and which get KL-Cov's penalty, chosen on the host.

The choice is made once for a step, by the policy before the first update, from the tokens of all its groups: whatever
the micro-batches, mini-batches, devices and processes, it is the same. Many tokens are equal but for rounding, as the
first ones of a group are, which one prompt predicts; so entropies and covariances are compared in steps of GRID.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gopo_jax import clip_cov, kl_cov, token_broadcast, token_covariances, top_entropy_mask
from train.batch import Batch
from train.config import PolicyConfig
from train.state import CHOICE, stream_key

GRID = 2.0**-10  # nats; rounding of float32 is a thousandth of it


def with_token_choices(batch: Batch, config: PolicyConfig, step: int) -> Batch:
    """Fills in the fields that `config.loss.token_choices` names.

    Args:
      batch: the whole step's, with advantages, old log-probabilities, and entropies if they are asked for.
      step: fixes what is chosen at random.
    """
    settings = config.loss
    if not settings.token_choices:
        return batch
    mask_PGT, chosen = jnp.asarray(batch.mask_PGT), dict[str, jax.Array]()
    if "top_entropy_PGT" in settings.token_choices:
        entropy_PGT = jnp.asarray(steady(batch.entropy_PGT))
        chosen["top_entropy_PGT"] = top_entropy_mask(entropy_PGT, mask_PGT, settings.top_entropy_quantile)
    if {"clip_cov_PGT", "kl_cov_PGT"} & {*settings.token_choices}:
        advantages_PG = jnp.asarray(batch.advantages_PG)
        advantages_PGT = token_broadcast(advantages_PG, mask_PGT.shape[-1], settings.token_broadcast)
        covariance_PGT = steady(token_covariances(jnp.asarray(batch.old_PGT), advantages_PGT, mask_PGT))
    if "clip_cov_PGT" in settings.token_choices:
        key, bounds = stream_key(config.seed, CHOICE, step), {"low": settings.clip_cov_lb, "high": settings.clip_cov_ub}
        chosen["clip_cov_PGT"] = clip_cov(covariance_PGT, mask_PGT, key, ratio=settings.clip_cov_ratio, **bounds)
    if "kl_cov_PGT" in settings.token_choices:
        chosen["kl_cov_PGT"] = kl_cov(covariance_PGT, mask_PGT, ratio=settings.kl_cov_ratio)
    return batch._replace(**{name: np.asarray(array) for name, array in chosen.items()}, entropy_PGT=None)


def steady(values: Any) -> Any:
    """Rounds to the next step of GRID."""
    return (values / GRID).round() * GRID
