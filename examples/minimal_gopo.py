"""RLHF with ranked rewards, whole, in one file: gopo_jax's functions in JAX code of your own.

    python -m examples.minimal_gopo [STEPS]

A judge likes sequences of digits that count upwards. It is only ever asked which of two it prefers; a reward model
learns from that (`preference_loss`), and a policy learns from the order in which the reward model puts its samples
(`gopo_advantages`, `policy_loss`). Printed is the judge's own score, which neither has seen: 8 is perfect, and a random
policy gets 0.8. It takes half a minute on a laptop. `python -m train policy` does the same with Qwen3, and beyond it
meshes, prompts that are computed once per group, packing, checkpoints.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gopo_jax import gopo_advantages, policy_loss, preference_loss, token_logprobs

V, S, T = 10, 2, 8  # digits; tokens of a prompt and of a completion
P, G, D = 16, 16, 64  # prompts per step, completions per prompt, width
BETA = 0.02  # weight of the KL penalty

Params = dict[str, Any]


def init(key: jax.Array, outputs: int) -> Params:
    """Returns the parameters of a causal transformer of one layer."""
    shapes = {"embed": (V, D), "position": (S + T, D), "qkv": (3, D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    shapes |= {"head": (D, outputs)}
    keys = jax.random.split(key, len(shapes))
    params = {name: jax.random.normal(k, shapes[name]) / D**0.5 for name, k in zip(shapes, keys, strict=True)}
    return params | {"embed": params["embed"] * D**0.5, "head": params["head"] * 0.01}


def forward(params: Params, tokens: jax.Array) -> jax.Array:
    """Returns hidden states [..., length, D] of [..., length] tokens; each position sees those up to itself."""
    x = params["embed"][tokens] + params["position"][: tokens.shape[-1]]
    q, k, v = (x @ weights for weights in params["qkv"])
    scores = q @ jnp.swapaxes(k, -1, -2) / D**0.5
    x += jax.nn.softmax(jnp.where(jnp.tri(tokens.shape[-1], dtype=bool), scores, -jnp.inf)) @ v
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def join(prompt_PS: jax.Array, tokens_PGT: jax.Array) -> jax.Array:
    prompt_PGS = jnp.broadcast_to(prompt_PS[:, None], (*tokens_PGT.shape[:2], S))
    return jnp.concatenate([prompt_PGS, tokens_PGT], -1)


@jax.jit
def sample(params: Params, prompt_PS: jax.Array, key: jax.Array) -> jax.Array:
    """Draws tokens_PGT, G completions of each prompt."""
    sequence = join(prompt_PS, jnp.zeros((len(prompt_PS), G, T), jnp.int32))

    def draw(sequence: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        logits_PGV = jnp.take(forward(params, sequence), at - 1, axis=-2) @ params["head"]
        token_PG = jax.random.categorical(jax.random.fold_in(key, at), logits_PGV)
        return sequence.at[..., at].set(token_PG), None

    return jax.lax.scan(draw, sequence, jnp.arange(S, S + T))[0][..., S:]


def logprobs(params: Params, prompt_PS: jax.Array, tokens_PGT: jax.Array) -> jax.Array:
    """Returns logprobs_PGT of a completion's tokens, each predicted at the position before it."""
    hidden_PGTD = forward(params, join(prompt_PS, tokens_PGT))[..., S - 1 : -1, :]
    return token_logprobs(hidden_PGTD, params["head"].T, tokens_PGT, chunk=T)


def judge(prompt_PS: jax.Array, tokens_PGT: jax.Array) -> jax.Array:
    """How many tokens are the one before plus 1 (9 is followed by 0)."""
    whole = join(prompt_PS, tokens_PGT)[..., S - 1 :]
    return (whole[..., 1:] == (whole[..., :-1] + 1) % V).sum(-1)


@jax.jit
def reward(params: Params, prompt_PS: jax.Array, tokens_PGT: jax.Array) -> jax.Array:
    """Returns the reward model's rewards_PG, the sum over a completion's tokens."""
    return (forward(params, join(prompt_PS, tokens_PGT))[..., S:, :] @ params["head"][:, 0]).sum(-1)


def learn_reward(key: jax.Array, comparisons: int = 40_000, batch: int = 200) -> Params:
    """Fits a reward model to comparisons of random sequences that count upwards now and then."""
    first, *keys = jax.random.split(key, 1 + comparisons // batch)
    params, optimizer = init(first, 1), optax.adam(3e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: Any, key: jax.Array) -> tuple[Params, Any]:
        kp, kt, kc, kr = jax.random.split(key, 4)
        prompt_PS, noise_PGT = jax.random.randint(kp, (batch, S), 0, V), jax.random.randint(kt, (batch, 2, T), 0, V)
        counts_PGT = (prompt_PS[:, -1:, None] + 1 + jnp.arange(T)) % V
        is_counting_PGT = jax.random.uniform(kc, (batch, 2, T)) < jax.random.uniform(kr, (batch, 2, 1))
        pair_PGT = jnp.where(is_counting_PGT, counts_PGT, noise_PGT)
        score_PG = judge(prompt_PS, pair_PGT)

        def loss(params: Params) -> jax.Array:
            a, b = reward(params, prompt_PS, pair_PGT).T
            sign = jnp.sign(score_PG[:, 0] - score_PG[:, 1])  # 0: no preference, left out
            return preference_loss(sign * a, sign * b, mask=sign != 0)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for k in keys:
        params, state = step(params, state, k)
    return params


def main(steps: int) -> float:
    """Trains; returns the judge's mean score of the last step."""
    keys = jax.random.split(jax.random.key(0), steps + 2)
    judged = learn_reward(keys[0])
    policy = reference = init(keys[1], V)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(policy)

    @jax.jit
    def update(policy: Params, state: Any, prompt_PS: jax.Array, tokens_PGT: jax.Array) -> tuple[Params, Any]:
        advantages_PG = gopo_advantages(reward(judged, prompt_PS, tokens_PGT))  # best 2, worst -2: ranks alone count
        mask_PGT = jnp.ones(tokens_PGT.shape, bool)  # every token counts: no completion ends early here
        ref_PGT = logprobs(reference, prompt_PS, tokens_PGT)

        def loss(policy: Params) -> jax.Array:
            new_PGT = logprobs(policy, prompt_PS, tokens_PGT)
            old_PGT = jax.lax.stop_gradient(new_PGT)  # one update per batch: the sampler's are the same
            return policy_loss(new_PGT, old_PGT, advantages_PG, mask_PGT, kl="k3", ref_logprobs=ref_PGT, beta=BETA)[0]

        updates, state = optimizer.update(jax.grad(loss)(policy), state)
        return optax.apply_updates(policy, updates), state

    for number, key in enumerate(keys[2:], 1):
        prompt_PS = jax.random.randint(jax.random.fold_in(key, 1), (P, S), 0, V)
        tokens_PGT = sample(policy, prompt_PS, key)
        policy, state = update(policy, state, prompt_PS, tokens_PGT)
        score = float(judge(prompt_PS, tokens_PGT).mean())
        if number == 1 or number % 50 == 0:
            print(
                f"step {number:4}: judge {score:.2f} of {T}, e.g. {np.array(prompt_PS[0])} {np.array(tokens_PGT[0, 0])}"
            )
    return score


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
