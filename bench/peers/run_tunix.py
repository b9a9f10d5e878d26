"""Trains Tunix's GRPO on a workload of `python -m eval speed`: README.md has how it is installed and called."""

import itertools
from collections.abc import Iterator
from typing import Any

from harness import StepClock, Work, even_share, run_script

PACKAGES = "google-tunix==0.1.7 jax==0.10.2 flax==0.12.8 optax==0.2.8 transformers==5.12.1"


def train(work: Work, steps: int, clock: StepClock) -> list[float]:
    """Trains for so many steps on one device; returns the mean length of each step's completions."""
    import jax
    import numpy as np
    from flax import nnx
    from transformers import PreTrainedTokenizerFast
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import RLCluster

    lengths: list[float] = []

    class Learner(GRPOLearner):
        """Tells the clock when the parameters of a step have been computed, and gives each rollout noise of its own."""

        def _generate_and_compute_advantage(self, *inputs: Any, **options: Any) -> Any:
            # the sampler's own key is the same in every step
            self.rl_cluster.cluster_config.rollout_config.seed = jax.random.key_data(jax.random.key(len(lengths)))
            example = super()._generate_and_compute_advantage(*inputs, **options)
            lengths.append(float(np.asarray(example.completion_mask).sum(1).mean()))
            return example

        def _run_global_step(self, *inputs: Any, **options: Any) -> None:
            super()._run_global_step(*inputs, **options)
            jax.block_until_ready(nnx.state(self.rl_cluster.actor_trainer.model))
            clock.end()

    def reward(completions: list[str], **_: Any) -> list[float]:
        return even_share(completions)

    def batches() -> Iterator[dict[str, Any]]:
        prompts = itertools.cycle(work.prompts)
        while True:
            yield {"prompts": np.array(list(itertools.islice(prompts, work.prompts_per_step)))}

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = RLCluster(
        actor=random_policy(work, mesh),
        reference=random_policy(work, mesh),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(work.folder / work.tokenizer),
        cluster_config=cluster_options(work, steps, mesh),
    )
    algorithm = GRPOConfig(
        num_generations=work.num_generations,
        beta=work.beta,
        epsilon=work.clip,
        loss_agg_mode="token-mean",
        kl_loss_mode="low_var_kl",  # k3, as TRL and gopo_jax
    )
    learner = Learner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward)
    clock.start()
    learner.train(batches())
    return lengths


def random_policy(work: Work, mesh: Any) -> Any:
    """Returns a policy with random weights on the mesh, the same in every call."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    network, dtype = work.network, jnp.dtype(work.dtype)
    config = qwen3.ModelConfig(
        num_layers=network["num_hidden_layers"],
        vocab_size=network["vocab_size"],
        embed_dim=network["hidden_size"],
        hidden_dim=network["intermediate_size"],
        num_heads=network["num_attention_heads"],
        num_kv_heads=network["num_key_value_heads"],
        head_dim=network["head_dim"],
        rope_theta=network["rope_theta"],
        norm_eps=network["rms_norm_eps"],
        use_tied_embedding=network["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )
    graph, state = nnx.split(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    keys = map(jax.random.key, itertools.count())

    def placed(weights: jax.Array) -> jax.Array:
        # Tunix draws matrices much larger than transformers and gopo_jax do; its norms' scales stay as they are
        if weights.ndim > 1:
            weights = network["initializer_range"] * jax.random.normal(next(keys), weights.shape, dtype)
        return jax.device_put(weights, whole)

    return nnx.merge(graph, jax.tree.map(placed, state))


def cluster_options(work: Work, steps: int, mesh: Any) -> Any:
    """Returns the settings of Tunix that do the same work on one device, all completions of a step as one batch."""
    import optax
    from tunix.rl.rl_cluster import ClusterConfig, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    beta1, beta2 = work.adam_betas
    adamw = optax.adamw(work.learning_rate, beta1, beta2, work.adam_epsilon, weight_decay=work.weight_decay)
    return ClusterConfig(
        role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
        training_config=RLTrainingConfig(
            actor_optimizer=optax.chain(optax.clip_by_global_norm(work.max_grad_norm), adamw),
            eval_every_n_steps=steps + 1,
            max_steps=steps,
        ),
        rollout_config=RolloutConfig(
            max_prompt_length=work.max_prompt_length,
            max_tokens_to_generate=work.max_completion_length,
            kv_cache_size=work.max_prompt_length + work.max_completion_length,
            temperature=work.temperature,
            top_p=1.0,
            top_k=None,
            eos_tokens=work.end_ids,
        ),
    )


if __name__ == "__main__":
    raise SystemExit(run_script("run_tunix.py", PACKAGES, train))
