"""The reference policy of the KL penalty: the policy at the start, or another model; it may follow the policy.

    reference = mixup policy + (1 - mixup) reference        every loss.reference_sync_steps steps

The trust region of TR-DPO: Gorbatovski et al., https://arxiv.org/abs/2404.09656. A reference that follows is a part of
the trainer's state: checkpoints hold it. Any other is read again at every start.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.checkpoint import read_network
from models.config import Qwen3Config
from models.hf_weights import split
from models.sharding import Layout, to_device, to_host, with_sharding
from models.tokenizer import Tokenizer
from train.build import make_model
from train.config import LossConfig, ModelConfig, PolicyConfig
from train.state import copy_tree, tree_shardings

# Fields of a network's config that change nothing that is computed, or are compared otherwise.
_INERT = {
    "max_position_embeddings",
    "initializer_range",
    "architecture",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
_WINDOWS = {"layer_types", "sliding_window"}  # `windows` says what they come to


class Reference:
    """The reference policy of a run.

    Attributes:
      params: its parameters: those that are trained in the policy, or all; None without a KL penalty.
    """

    def __init__(self, settings: LossConfig, params: Any) -> None:
        """`params`: on the devices, and of nobody else."""
        self._settings = settings
        self._abstract = jax.tree.map(lambda a: with_sharding(a, a.sharding), params)
        self._mix = jax.jit(
            partial(mix, settings.reference_mixup), donate_argnums=0, out_shardings=tree_shardings(params)
        )
        self._keep(params)

    def _keep(self, params: Any) -> None:
        self.params = to_host(params) if self._settings.offload_reference else params

    def follow(self, step: int, params: Any) -> None:
        """Moves the reference towards the policy's parameters, if that is due after this step."""
        period = self._settings.reference_sync_steps
        if period is not None and step % period == 0:
            self._keep(self._mix(to_device(self.params), params))

    def metrics(self, step: int) -> dict[str, float]:
        """Returns how many steps ago the reference of this step was last moved; nothing if it never is."""
        period = self._settings.reference_sync_steps
        return {} if period is None else {"reference/age": (step - 1) % period}

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint needs of it, beside the run's pins."""
        return {} if self._settings.reference_sync_steps is None else {"reference": self.params}

    @property
    def abstract(self) -> dict[str, Any]:
        """The shapes of `saved`, on the devices."""
        return {} if self._settings.reference_sync_steps is None else {"reference": self._abstract}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes up what a checkpoint has."""
        if "reference" in saved:
            self._keep(saved["reference"])


@jax.named_scope("reference")
def mix(share: float, reference: Any, policy: Any) -> Any:
    """Returns share policy + (1 - share) reference, computed in float32; with share 1 the policy itself."""

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
        wide = share * new.astype(jnp.float32) + (1 - share) * old.astype(jnp.float32)
        return (wide if share < 1 else new).astype(old.dtype)

    return jax.tree.map(mixed, reference, policy)


def make_reference(
    config: PolicyConfig, model: ModelConfig | None, params: Any, layout: Layout, tokenizer: Tokenizer
) -> Reference:
    """Returns the reference of a run at its start.

    Args:
      model: another model than the start, see `check_reference`; None: the policy at its start.
      params: the trained parameters before step 0. Fresh adapters change nothing, so they are a reference.
    """
    if not config.loss.beta:
        return Reference(config.loss, None)
    if model is None:
        return Reference(config.loss, copy_tree(params))
    # With adapters all its parameters are read, and stand before the policy's frozen base.
    return Reference(config.loss, split(make_model(model, config.lora, layout, config.seed, tokenizer))[1])


def check_reference(other: ModelConfig | None, start: ModelConfig) -> None:
    """Refuses another model as reference that cannot be compared with the start of a run; see `check_networks`."""
    if other is not None:
        policy = read_network(start.path) if start.path is not None else start.architecture
        assert policy is not None and other.path is not None  # ModelConfig has checked it
        check_networks(other.path, read_network(other.path), policy)


def check_networks(path: str, network: Qwen3Config, policy: Qwen3Config) -> None:
    """Refuses a reference whose log-probabilities could not be compared with the policy's, from their configs alone.

    Raises:
      ValueError: a reward model, another vocabulary or another architecture.
    """
    if network.is_reward_model:
        raise ValueError(f"loss.reference: {path} is a reward model; expected a policy")
    if network.vocab_size != policy.vocab_size:
        raise ValueError(
            f"loss.reference: {path}: has a vocabulary of {network.vocab_size} tokens, and the policy one of "
            f"{policy.vocab_size}; expected a model with the policy's tokenizer"
        )
    for name in [
        *(item.name for item in dataclasses.fields(Qwen3Config) if item.name not in _INERT | _WINDOWS),
        "windows",
    ]:
        theirs, ours = getattr(network, name), getattr(policy, name)
        if theirs != ours:
            raise ValueError(
                f"loss.reference: {path}: has the {name} {theirs}, and the policy {ours}; expected a model of the "
                f"policy's architecture"
            )
