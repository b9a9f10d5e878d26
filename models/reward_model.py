"""The reward model: the Qwen3 backbone with a scalar head on the last real token."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import Qwen3Config
from models.precision import products_in
from models.qwen3 import Backbone


class Qwen3RewardModel(Backbone):
    """Scores whole texts, like Hugging Face's `Qwen3ForSequenceClassification` with one label."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(config, rngs, **options)
        # float32 always: a bfloat16 score has 8 bits; ties would be 12-50 % of groups of 8
        value = config.initializer_range * jax.random.normal(rngs.params(), (config.hidden_size,), jnp.float32)
        self.score_D = nnx.Param(value, axes=("width",))

    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Returns float32 rewards [B] of right-padded sequences, from their last real token."""
        hidden_BSD = self.hidden(tokens_BS)
        return self.score_hidden(jnp.take_along_axis(hidden_BSD, (lengths_B - 1)[:, None, None], axis=1)[:, 0])

    @jax.named_scope("score")
    def score_group(
        self, prefix_PS: jax.Array, prefix_lengths_P: jax.Array, suffix_PGT: jax.Array, suffix_lengths_PG: jax.Array
    ) -> jax.Array:
        """Returns float32 rewards [P, G] of G texts that share a prefix, which is computed once.

        Prefixes and suffixes are right-padded; every suffix has at least one token.
        """
        _, hidden_PGTD = self.prefill_and_extend(prefix_PS, prefix_lengths_P, suffix_PGT)
        last_PG11 = (suffix_lengths_PG - 1)[..., None, None]
        return self.score_hidden(jnp.take_along_axis(hidden_PGTD, last_PG11, axis=2)[:, :, 0])

    @jax.named_scope("head")
    def score_hidden(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 rewards [...] of hidden states [..., D]."""
        with products_in(jnp.float32):
            return hidden.astype(jnp.float32) @ self.score_D[...]
