"""The update of a step: sums the gradients of micro-batches of whole groups and applies them, once or several times."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gopo_jax import kl_penalty, loss_count
from gopo_jax.losses import Metrics
from models.lora import merge_trainable
from models.sharding import Layout, fetch, to_device
from train.batch import Batch, minibatches
from train.choices import with_token_choices
from train.config import PolicyConfig
from train.objective import Denominators, bonus_mask, completion_logprobs, policy_objective
from train.packing import microbatches
from train.run.metrics import UpdateMetrics
from train.state import TrainState, apply_gradient, load_optimizer, offload_optimizer, tree_shardings


class Programs(NamedTuple):
    """The jitted programs of an update."""

    zero_grads: Any  # params -> a gradient of zeros, float32
    accumulate: (
        Any  # (gradient, state, ref_params, micro-batch, denominator) -> gradient plus the micro-batch's, metrics
    )
    apply_gradients: Any  # (state, gradient, losses of the micro-batches, if they are looked at) -> state, metrics
    # (all params, micro-batch) -> logprobs_PGT, for what is needed before the first update; where tokens are chosen by
    # their entropies, the pair (logprobs_PGT, entropy_PGT)
    logprobs: Any


def make_programs(
    graphdef: Any, optimizer: optax.GradientTransformation, config: PolicyConfig, state: TrainState
) -> Programs:
    """Jits the programs of an `Update`; `state` fixes where every array lies and may consist of shapes alone."""
    objective = partial(policy_objective, graphdef=graphdef, config=config)
    loss_and_gradient = jax.value_and_grad(objective, has_aux=True)
    parts = config.update_prompts // config.microbatch_prompts
    placement = tree_shardings(state)

    @partial(jax.jit, out_shardings=placement.params)
    @jax.named_scope("zero")
    def zero_grads(params: Any) -> Any:
        # float32: in bfloat16 a sum stalls at 256 times its summands
        return jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), params)

    @partial(jax.jit, donate_argnums=0, out_shardings=(placement.params, None))
    def accumulate(
        total: Any, state: TrainState, ref_params: Any, micro: Any, denominator: jax.Array
    ) -> tuple[Any, Metrics]:
        (loss, metrics), gradient = loss_and_gradient(state.params, ref_params, state.frozen, micro, denominator)
        metrics["loss"] = (loss, jnp.ones(()) / parts)
        with jax.named_scope("accumulate"):
            return jax.tree.map(jnp.add, total, gradient), metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=(placement, None))
    @jax.named_scope("optimizer")
    def apply_gradients(
        state: TrainState, gradient: Any, losses: Sequence[jax.Array] = ()
    ) -> tuple[TrainState, Metrics]:
        norm = optax.tree.norm(gradient)
        metrics = {"grad_norm": (norm, jnp.ones(()))}
        if not config.optimizer.is_float32:  # the whole sum is rounded, once: the moments are as the parameters
            gradient = jax.tree.map(lambda total, param: total.astype(param.dtype), gradient, state.params)
        updated = apply_gradient(optimizer, state, gradient)
        if config.skip_nonfinite:
            is_finite = jnp.isfinite(jnp.stack([norm, *losses])).all()
            updated = jax.tree.map(partial(jnp.where, is_finite), updated, state)
            metrics["frac_updates_skipped"] = (1.0 - is_finite, jnp.ones(()))
        return updated, metrics

    by_entropy = "top_entropy_PGT" in config.loss.token_choices
    logprobs = jax.jit(partial(completion_logprobs, graphdef, config, with_entropy=by_entropy))
    return Programs(zero_grads, accumulate, apply_gradients, logprobs)


class Update:
    """The optimizer steps on a batch."""

    def __init__(
        self,
        graphdef: Any,
        optimizer: optax.GradientTransformation,
        config: PolicyConfig,
        layout: Layout,
        state: TrainState,
    ) -> None:
        """`state`: any state on the devices; it fixes where every array lies and may consist of shapes alone."""
        self.config, self.layout = config, layout
        self.programs = make_programs(graphdef, optimizer, config, state)

    def old_and_ref_logprobs(self, state: TrainState, ref_params: Any, batch: Batch) -> tuple[Batch, Any]:
        """Fills in `old_PGT` and `ref_PGT` if the config needs them before the first update.

        Several updates per batch need both: the policy changes under them, and the reference is computed once. A KL
        penalty in the reward needs them too, and so does a choice of tokens, which may need `entropy_PGT`.

        Returns:
          The batch, and penalty_PG, the KL to take off every completion's reward; 0 if it is in the loss.
        """
        if not self.config.logprobs_before_update:
            return batch, 0.0
        policies = {"old_PGT": state.all_params}
        if ref_params is not None:
            policies["ref_PGT"] = merge_trainable(to_device(ref_params), state.frozen)
        batch = batch._replace(**self._logprobs(policies, batch))
        settings = self.config.loss
        if settings.kl_in != "reward":
            return batch, 0.0
        kl_PGT = kl_penalty(jnp.asarray(batch.old_PGT), jnp.asarray(batch.ref_PGT), settings.kl)
        return batch, settings.beta * np.where(batch.mask_PGT, kl_PGT, 0).sum(-1)

    def _logprobs(self, policies: dict[str, Any], batch: Batch) -> dict[str, np.ndarray]:
        """Returns the log-probabilities of the batch by each of the policies, under their names.

        Where tokens are chosen by their entropies, those of the old policy are `entropy_PGT`. All micro-batches are
        dispatched before the first is fetched. What waits on the devices is small: the tokens, and 4 bytes of each for
        a policy.
        """
        by_entropy = "top_entropy_PGT" in self.config.loss.token_choices

        def of_part(micro: Any) -> dict[str, jax.Array]:
            arrays = {name: self.programs.logprobs(params, micro) for name, params in policies.items()}
            if not by_entropy:
                return arrays
            entropy_PGT = arrays["old_PGT"][1]
            return {name: pair[0] for name, pair in arrays.items()} | {"entropy_PGT": entropy_PGT}

        parts = [
            (indices, of_part(micro))
            for indices, micro in microbatches(batch, self.config.microbatch_prompts, self.layout)
        ]
        filled = {name: np.zeros(batch.mask_PGT.shape, np.float32) for name in parts[0][1]}
        for indices, arrays in parts:
            for name, array_PGT in arrays.items():
                filled[name][indices] = fetch(array_PGT)
        return filled

    def __call__(
        self, state: TrainState, ref_params: Any, batch: Batch, step: int
    ) -> tuple[TrainState, list[UpdateMetrics]]:
        """Dispatches all updates on `batch`; returns the state after them and their metrics, still on the devices."""
        config, metrics = self.config, list[UpdateMetrics]()
        ref_params = to_device(ref_params) if batch.ref_PGT is None else None
        batch = with_token_choices(batch, config, step)
        for part in minibatches(batch, config.update_prompts, config.num_iterations, config.seed, step):
            state, of_part = self.optimizer_step(state, ref_params, part)
            metrics.append(of_part)
        return state, metrics

    def optimizer_step(self, state: TrainState, ref_params: Any, batch: Batch) -> tuple[TrainState, UpdateMetrics]:
        """One optimizer step on the gradient of the whole batch, summed over its micro-batches."""
        aggregate, size = self.config.loss.aggregate, self.config.microbatch_prompts
        count = loss_count(jnp.asarray(batch.mask_PGT), aggregate, max_length=self.config.max_completion_length)
        by_part = aggregate == "token_per_microbatch"  # then it matters which prompts are together
        denominator: Any = self.config.update_prompts // size * count if by_part else count
        if self.config.loss.entropy_coef:
            denominator = Denominators(denominator, jnp.asarray(bonus_mask(batch).sum(), jnp.float32))
        gradient, metrics = self.programs.zero_grads(state.params), list[Metrics]()
        learner = state._replace(opt_state=None) if self.config.optimizer.offload else state
        for _, micro in microbatches(batch, size, self.layout, in_order=by_part):
            gradient, of_part = self.programs.accumulate(gradient, learner, ref_params, micro, denominator)
            metrics.append(of_part)
        del learner  # the update donates its arrays
        losses = [of_part["loss"][0] for of_part in metrics] if self.config.skip_nonfinite else []
        if self.config.optimizer.offload:
            state, of_update = self.programs.apply_gradients(load_optimizer(state), gradient, losses)
            return offload_optimizer(state), UpdateMetrics(of_update, metrics)
        state, of_update = self.programs.apply_gradients(state, gradient, losses)
        return state, UpdateMetrics(of_update, metrics)
