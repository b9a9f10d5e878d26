"""The lab's training: several runs side by side, in one compiled program.

A run takes the steps of train/loop.py: prompts, rollouts, rewards, `ADVANTAGES[method]`, the trainer's own
`policy_objective`, Adam after clipping the gradient's norm. Methods differ only in the advantage: all share one loss, a
mean over the batch's tokens with a k3 penalty. Every factor of a cell except G is traced, so one program serves all
cells of a G. Runs of the same seed see the same proxy, prompts and random numbers, whatever their method. `jax.vmap`
puts the runs side by side; they do not affect each other.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from eval.lab.cells import DISTORTIONS, METHODS, Cell
from eval.lab.world import POOL_COMPLETIONS, PromptIds, StandardScorer, World, standard_rewards
from gopo_jax import ADVANTAGES, gopo_advantages, loss_count
from models.sampler import Rollout, sample
from train.config import DataConfig, LossConfig, ModelConfig, PolicyConfig, RewardSpec
from train.objective import completion_logprobs, policy_objective
from train.packing import MicroBatch

STEP_COMPLETIONS = 64  # per step, prompts x G, in every cell
VALIDATION_COMPLETIONS = 2  # of each validation prompt
LR_WARMUP_STEPS, MAX_GRAD_NORM = 5, 1.0
OUTLIER = 30.0  # standard deviations of the start policy's rewards


class Member(NamedTuple):
    """Settings of one run; stacked on an axis N."""

    seed: jax.Array
    method: jax.Array  # index into METHODS
    distortion: jax.Array  # index into DISTORTIONS
    learning_rate: jax.Array
    equal_rms: jax.Array  # whether advantages are scaled to root mean square 1 at the start
    equal_norm: jax.Array  # whether all gradients are scaled to norm MAX_GRAD_NORM, not only larger ones
    proxy: StandardScorer


class TrainingState(NamedTuple):
    params: Any
    opt_state: Any
    advantage_scale: jax.Array


def members(cell: Cell, seeds: tuple[int, ...], learning_rates: np.ndarray, proxy: StandardScorer) -> Member:
    """The runs of a cell: one for each pair of seed and learning rate."""
    N = len(seeds)

    def same(value: Any) -> jax.Array:
        return jnp.full(N, value)

    return Member(
        jnp.array(seeds),
        same(METHODS.index(cell.method)),
        same(DISTORTIONS.index(cell.distortion)),
        jnp.asarray(learning_rates, jnp.float32),
        same(cell.regime != "tuned"),
        same(cell.regime == "equal_norm"),
        proxy,
    )


def distorted(rewards_PG: jax.Array, distortion: jax.Array, key: jax.Array) -> jax.Array:
    """The proxy's rewards on another scale; within a group the order stays, except for what bfloat16 makes equal.

    exp        e^r
    cubic      r^3
    outliers_x the best of a group is raised by OUTLIER, in as many groups as raise x % of all completions
    bf16       r rounded to bfloat16
    """
    G = rewards_PG.shape[-1]
    uniform_P1 = jax.random.uniform(key, (*rewards_PG.shape[:-1], 1))

    def outliers(share: float) -> jax.Array:
        best_PG = rewards_PG == rewards_PG.max(-1, keepdims=True)  # equal rewards stay equal
        return rewards_PG + OUTLIER * (best_PG & (uniform_P1 < share * G))

    scales = {
        "none": rewards_PG,
        "exp": jnp.exp(rewards_PG),
        "cubic": rewards_PG**3,
        "outliers_1": outliers(0.01),
        "outliers_5": outliers(0.05),
        "bf16": rewards_PG.astype(jnp.bfloat16).astype(jnp.float32),
    }
    return jnp.stack([scales[name] for name in DISTORTIONS])[distortion]


def advantages_of(rewards_PG: jax.Array, method: jax.Array) -> jax.Array:
    return jnp.stack([ADVANTAGES[name](rewards_PG) for name in METHODS])[method]


def rank_length_correlation(rewards_PG: jax.Array, lengths_PG: jax.Array) -> jax.Array:
    """Spearman's correlation of reward and length within a group, averaged over the groups in which both vary.

    NaN without such a group.
    """
    a_PG, b_PG = gopo_advantages(rewards_PG), gopo_advantages(lengths_PG.astype(jnp.float32))  # centred ranks
    scale_P = jnp.sqrt(jnp.square(a_PG).sum(-1) * jnp.square(b_PG).sum(-1))
    varies_P = scale_P > 0
    total = jnp.where(varies_P, (a_PG * b_PG).sum(-1) / jnp.where(varies_P, scale_P, 1), 0).sum()
    return total / varies_P.sum()


class LabProgram:
    """The compiled functions for one G. They take members and states stacked on N, and return arrays stacked on N."""

    def __init__(self, world: World, group_size: int, *, beta: float, max_completion_length: int, every: int) -> None:
        self.world, self.G, self.T = world, group_size, max_completion_length
        self.optimizer = optax.scale_by_adam()
        self.config = PolicyConfig(  # the fields that the trainer's objective reads
            output_dir="",
            max_steps=1,
            data=DataConfig(train=""),
            model=ModelConfig(path=""),
            rewards=[RewardSpec(function="length")],
            num_generations=group_size,
            max_completion_length=max_completion_length,
            loss=LossConfig(beta=beta, logprob_chunk=STEP_COMPLETIONS * max_completion_length),
        )
        self.start = jax.jit(jax.vmap(self._start))
        self.advance = jax.jit(jax.vmap(partial(self._advance, every=every), in_axes=(0, 0, None)))
        self.evaluate = jax.jit(jax.vmap(self._evaluate, in_axes=(0, 0, None)))

    def _start(self, member: Member) -> TrainingState:
        """The start state; advantage_scale is 1, or 1 / RMS of the advantages on the pool."""
        world = self.world
        groups_PG = member.proxy.pool_PG.reshape(-1, POOL_COMPLETIONS // self.G, self.G).reshape(-1, self.G)
        key = jax.random.fold_in(jax.random.key(2), member.seed)
        advantages_PG = advantages_of(distorted(groups_PG, member.distortion, key), member.method)
        rms = jnp.sqrt(jnp.square(advantages_PG).mean())
        return TrainingState(world.start, self.optimizer.init(world.start), jnp.where(member.equal_rms, 1 / rms, 1.0))

    def _advance(
        self, member: Member, state: TrainingState, first: jax.Array, *, every: int
    ) -> tuple[TrainingState, dict[str, jax.Array]]:
        """Takes `every` steps; returns the state and the metrics of each step."""
        return jax.lax.scan(partial(self._step, member), state, first + jnp.arange(every))

    def _step(self, member: Member, state: TrainingState, t: jax.Array) -> tuple[TrainingState, dict[str, jax.Array]]:
        world, G = self.world, self.G
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), member.seed), t)
        choose, draw, shake = jax.random.split(key, 3)
        rows_P = jax.random.choice(choose, len(world.train.lengths_P), (STEP_COMPLETIONS // G,), replace=False)
        prompts = PromptIds(world.train.tokens_PS[rows_P], world.train.lengths_P[rows_P])
        rollout = self._rollout(state.params, prompts, draw, G)
        rewards_PG = standard_rewards(world.proxy_graph, member.proxy, prompts, *without_end_token(rollout))
        distorted_PG = distorted(rewards_PG, member.distortion, shake)
        advantages_PG = state.advantage_scale * advantages_of(distorted_PG, member.method)
        batch = self._batch(prompts, rollout)._replace(advantages_PG=advantages_PG)
        loss = partial(policy_objective, graphdef=world.policy, config=self.config)
        denominator = loss_count(batch.mask_PGT)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, world.start, {}, batch, denominator)
        norm = optax.tree.norm(gradient)
        largest = jnp.where(member.equal_norm, norm, jnp.maximum(norm, MAX_GRAD_NORM))
        gradient = jax.tree.map(lambda g: g * MAX_GRAD_NORM / largest, gradient)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state)
        rate = member.learning_rate * jnp.minimum((t + 1) / LR_WARMUP_STEPS, 1.0)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        measured = {
            "reward": rewards_PG.mean(),
            "kl": metrics["kl"][0] / metrics["kl"][1],
            "grad_norm": norm,
            "step_norm": optax.tree.norm(gradient),  # of the gradient after clipping
            "update_norm": optax.tree.norm(updates),
            "advantage_rms": jnp.sqrt(jnp.square(advantages_PG).mean()),
            "length": rollout.lengths_PG.mean(),
            "rank_length": rank_length_correlation(rewards_PG, rollout.lengths_PG),
            "ties": _tie_share(distorted_PG),
        }
        return TrainingState(optax.apply_updates(state.params, updates), opt_state, state.advantage_scale), measured

    def _evaluate(self, member: Member, state: TrainingState, number: jax.Array) -> dict[str, jax.Array]:
        """proxy, gold, length and kl [P, G] of completions of the validation prompts."""
        world, prompts = self.world, self.world.validation
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(4), member.seed), number)
        rollout = self._rollout(state.params, prompts, key, VALIDATION_COMPLETIONS)
        batch = self._batch(prompts, rollout)
        ref_PGT = completion_logprobs(world.policy, self.config, world.start, batch)
        return {
            "proxy": standard_rewards(world.proxy_graph, member.proxy, prompts, *without_end_token(rollout)),
            "gold": standard_rewards(world.gold_graph, world.gold, prompts, *without_end_token(rollout)),
            "length": rollout.lengths_PG,
            "kl": jnp.where(batch.mask_PGT, rollout.logprobs_PGT - ref_PGT, 0).sum(-1),
        }

    def _rollout(self, params: Any, prompts: PromptIds, key: jax.Array, G: int) -> Rollout:
        return sample(
            nnx.merge(self.world.policy, params),
            *prompts,
            jnp.arange(len(prompts.lengths_P)),
            key,
            self.world.sampling,
            num_generations=G,
            max_completion_length=self.T,
            pad_id=self.world.tokenizer.pad_id,
        )

    def _batch(self, prompts: PromptIds, rollout: Rollout) -> MicroBatch:
        """A batch as `train.packing` makes it, but with a row per completion: the program's shapes are fixed."""
        P, G, T = rollout.tokens_PGT.shape
        return MicroBatch(
            prompt_PS=prompts.tokens_PS,
            lengths_P=prompts.lengths_P,
            tokens_PBT=rollout.tokens_PGT,
            offset_PBT=None,
            slot_PGT=jnp.broadcast_to(jnp.arange(G * T).reshape(G, T), (P, G, T)),
            sampled_PGT=rollout.logprobs_PGT,
            mask_PGT=jnp.arange(T) < rollout.lengths_PG[..., None],
        )


def without_end_token(rollout: Rollout) -> tuple[jax.Array, jax.Array]:
    """Tokens and lengths without the end-of-text token, as `standard_rewards` takes them."""
    return rollout.tokens_PGT, rollout.lengths_PG - rollout.finished_PG


def _tie_share(rewards_PG: jax.Array) -> jax.Array:
    """Share of pairs in a group with equal rewards."""
    G = rewards_PG.shape[-1]
    equal_PGG = rewards_PG[..., :, None] == rewards_PG[..., None, :]
    return (equal_PGG.sum((-2, -1)) - G).mean() / (G * (G - 1))
