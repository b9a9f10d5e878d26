"""The update: the gradient of a batch from micro-batches of whole groups, and an optimizer step, once or often."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gopo_jax import add_metrics, kl_penalty, loss_count
from gopo_jax.losses import Metrics
from models.lora import join
from models.sharding import Layout, fetch, to_device
from train.batch import minibatches
from train.config import PolicyConfig
from train.packing import Batch, cut
from train.run.metrics import divide
from train.state import TrainState, shardings

Objective = Callable[..., tuple[jax.Array, Metrics]]


class Programs(NamedTuple):
    """The jitted parts of an update."""

    nothing: Any  # params -> a gradient of zeros
    add: Any  # (gradient so far, state, ref_params, micro-batch, denominator) -> gradient, metrics
    apply: Any  # (state, gradient) -> state, metrics
    logprobs: Any  # (params, micro-batch) -> logprobs_PGT, where they are needed before the update


def make_programs(
    objective: Objective,
    logprobs: Callable[..., jax.Array],
    optimizer: optax.GradientTransformation,
    config: PolicyConfig,
    state: TrainState,
) -> Programs:
    """Those of an `Update`; `state` says where everything lies."""
    microbatches = config.update_prompts // config.microbatch_prompts
    loss_and_gradient = jax.value_and_grad(objective, has_aux=True)
    where = shardings(state)

    @partial(jax.jit, out_shardings=where.params)
    def nothing(params: Any) -> Any:
        exact = jnp.float32 if config.optimizer.master_weights else None
        return jax.tree.map(partial(jnp.zeros_like, dtype=exact), params)

    @partial(jax.jit, donate_argnums=0, out_shardings=(where.params, None))
    def add(total: Any, state: TrainState, ref_params: Any, micro: Any, denominator: jax.Array) -> tuple[Any, Metrics]:
        (loss, metrics), gradient = loss_and_gradient(state.params, ref_params, state.frozen, micro, denominator)
        metrics["loss"] = (loss, jnp.ones(()) / microbatches)
        return jax.tree.map(jnp.add, total, gradient), metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=(where, None))
    def apply(state: TrainState, gradient: Any) -> tuple[TrainState, Metrics]:
        return apply(optimizer, state, gradient), {"grad_norm": (optax.tree.norm(gradient), jnp.ones(()))}

    return Programs(nothing, add, apply, jax.jit(logprobs))


class Update:
    """The optimizer steps on a batch: the gradients of micro-batches are added up in place, then applied."""

    def __init__(
        self,
        objective: Objective,
        logprobs: Callable[..., jax.Array],
        optimizer: optax.GradientTransformation,
        config: PolicyConfig,
        layout: Layout,
        state: TrainState,
    ) -> None:
        """
        Args:
          objective: (params, ref_params, frozen, micro-batch, denominator) -> loss, metrics.
          logprobs: (all params, micro-batch) -> logprobs_PGT.
          state: any state of the run; it says where everything lies, and may be shapes alone.
        """
        self.config, self.layout = config, layout
        self.programs = make_programs(objective, logprobs, optimizer, config, state)

    def before(self, state: TrainState, ref_params: Any, batch: Batch) -> tuple[Batch, Any]:
        """What must be known before the policy changes: its log-probabilities and the reference's, if it changes more
        than once; and the penalty of each completion, if it is taken off the reward."""
        in_reward = self.config.loss.kl_in == "reward"
        if not self.config.logprobs_before_update:
            return {}, 0.0
        found = {"old_PGT": self._logprobs(state.all_params, batch)}
        if ref_params is not None:
            found["ref_PGT"] = self._logprobs(join(to_device(ref_params), state.frozen), batch)
        if not in_reward:
            return found, 0.0
        kl_PGT = kl_penalty(jnp.asarray(found["old_PGT"]), jnp.asarray(found["ref_PGT"]), self.config.loss.kl)
        return found, self.config.loss.beta * np.where(batch["mask_PGT"], kl_PGT, 0).sum(-1)

    def _logprobs(self, params: Any, batch: Batch) -> np.ndarray:
        found_PGT = np.zeros(batch["mask_PGT"].shape, np.float32)
        numbered = batch | {"index_P": np.arange(len(found_PGT))}  # parts come in another order
        for micro in cut(numbered, self.config.microbatch_prompts, self.layout):
            found_PGT[fetch(micro.pop("index_P"))] = fetch(self.programs.logprobs(params, micro))
        return found_PGT

    def __call__(
        self, state: TrainState, ref_params: Any, batch: Batch, step: int
    ) -> tuple[TrainState, dict[str, float]]:
        config, found = self.config, list[Metrics]()
        ref_params = None if "ref_PGT" in batch else to_device(ref_params)
        for part in minibatches(batch, config.update_prompts, config.num_iterations, config.seed, step):
            state, metrics = self._once(state, ref_params, part)
            found.append(metrics)
        return state, divide(add_metrics(*found))

    def _once(self, state: TrainState, ref_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        aggregate = self.config.loss.aggregate
        count = loss_count(jnp.asarray(batch["mask_PGT"]), aggregate, max_length=self.config.max_completion_length)
        microbatches = self.config.update_prompts // self.config.microbatch_prompts
        by_part = aggregate == "token_per_microbatch"  # then it matters which prompts are together
        denominator = microbatches * count if by_part else count
        gradient, parts = self.programs.nothing(state.params), []
        for micro in cut(batch, self.config.microbatch_prompts, self.layout, in_order=by_part):
            gradient, metrics = self.programs.add(gradient, state, ref_params, micro, denominator)
            parts.append(metrics)
        state, metrics = self.programs.apply(state, gradient)
        return state, jax.device_get(metrics) | add_metrics(*jax.device_get(parts))
