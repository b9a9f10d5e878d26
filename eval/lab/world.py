"""The lab's environment: a start policy, a gold reward model that no policy is trained on, and noisy proxies.

    start    a small Qwen3, supervised on review sentences (data/reviews, the demo's cut)
    gold     a reward model trained on all labelled pairs of those sentences. It defines the truth: it labels
             comparisons and judges policies, but never rewards a policy
    pool     completions of the start policy to the training prompts, with their gold rewards
    proxies  one reward model for each seed, trained on that seed's comparisons of pool completions of one prompt;
             a share of the labels is flipped; every noise has the same pairs, and the flipped sets are nested

Rewards of gold and of every proxy are shifted and scaled to mean 0 and standard deviation 1 over the pool.
The lab's directory stores everything, and a later run reads it from there.
"""

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from eval.lab.cells import write_arrays
from gopo_jax import preference_loss
from models.checkpoint import find_step, is_run, load_model
from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import flatten, nest, split
from models.qwen3 import last_hidden
from models.reward_model import Qwen3RewardModel
from models.sampler import SamplingParams, sample
from models.tokenizer import Tokenizer
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RewardModelConfig,
    SftConfig,
)
from train.data.rows import load_rows
from train.run.files import write_jsonl
from train.running import SetupError
from train.supervised.reward_model import train_reward_model
from train.supervised.sft import train_sft

PREPARE = Path(__file__).parents[2] / "data" / "reviews" / "prepare.py"
POOL_COMPLETIONS, POOL_PROMPTS = 16, 32  # completions per training prompt; prompts scored at a time
POOL_ARRAYS = ("tokens_PGT", "lengths_PG", "raw_PG")
WIDTH = {"vocab_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
START = Qwen3Config(hidden_size=96, intermediate_size=288, num_hidden_layers=2, head_dim=24, **WIDTH)  # type: ignore[arg-type]
GOLD = Qwen3Config(hidden_size=128, intermediate_size=384, num_hidden_layers=2, head_dim=32, **WIDTH)  # type: ignore[arg-type]
PROXY = Qwen3Config(hidden_size=96, intermediate_size=288, num_hidden_layers=1, head_dim=24, **WIDTH)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WorldConfig:
    """How big the lab's world is."""

    sft_steps: int = 280  # of the start policy's training
    gold_steps: int = 160  # of the gold reward model's training
    max_prompt_length: int = 8  # tokens; longer prompts are left out
    max_completion_length: int = 16  # tokens; longer completions are cut
    validation_prompts: int = 64  # prompts that policies are evaluated on
    comparisons: int = 4096  # pairs of completions that each proxy is trained on
    proxy_batch: int = 64  # comparisons per step of a proxy's training
    proxy_learning_rate: float = 2e-3  # of a proxy's training, at its first step; it falls to 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"world.{name}: expected a number above 0, got {value}")
        if self.comparisons % self.proxy_batch:
            raise ValueError(
                f"world.comparisons: expected a multiple of proxy_batch, {self.proxy_batch}, got {self.comparisons}"
            )


class PromptIds(NamedTuple):
    tokens_PS: jax.Array
    lengths_P: jax.Array


class StandardScorer(NamedTuple):
    """A reward model's parameters with its mean and scale on the pool; may have a leading seed axis."""

    params: Any
    mean: jax.Array
    scale: jax.Array
    pool_PG: jax.Array  # its standardized rewards of the pool
    accuracy: jax.Array  # share of completion pairs in the pool that it orders as gold does


SCORER_FIELDS = StandardScorer._fields[1:]


class World(NamedTuple):
    tokenizer: Tokenizer
    policy: Any  # the start policy's graph
    start: Any  # its parameters
    gold_graph: Any
    gold: StandardScorer
    proxy_graph: Any
    train: PromptIds
    validation: PromptIds
    pool_PGT: jax.Array
    pool_lengths_PG: jax.Array  # without end-of-text tokens, as `raw_rewards` takes them

    @property
    def sampling(self) -> SamplingParams:
        return untruncated_sampling(self.tokenizer)


def untruncated_sampling(tokenizer: Tokenizer) -> SamplingParams:
    """Sampling from the policy's own distribution: temperature 1, no top-k or top-p."""
    absent_V = tokenizer.absent_ids(START.vocab_size)
    return SamplingParams(1.0, 0, 1.0, 0, np.array(tokenizer.eos_ids, np.int32), absent_V)


def raw_rewards(model: Qwen3RewardModel, prompts: PromptIds, tokens_PGT: jax.Array, lengths_PG: jax.Array) -> jax.Array:
    """Rewards [P, G], float32, scored as train/rewards/__init__.py scores texts: without the end-of-text token.

    Args:
      lengths_PG: lengths without that token; an empty completion is scored at the prompt's last token.
    """
    hidden_PSD, hidden_PGTD = model.prefill_and_extend(prompts.tokens_PS, prompts.lengths_P, tokens_PGT)
    last = jnp.maximum(lengths_PG - 1, 0)[..., None, None]
    own_PGD = jnp.take_along_axis(hidden_PGTD, last, axis=2)[:, :, 0]
    asked_PD = last_hidden(hidden_PSD, prompts.lengths_P)
    return model.score_hidden(jnp.where(lengths_PG[..., None] > 0, own_PGD, asked_PD[:, None]))


def standard_rewards(
    graph: Any, scorer: StandardScorer, prompts: PromptIds, tokens_PGT: jax.Array, lengths_PG: jax.Array
) -> jax.Array:
    """`raw_rewards`, standardized on the pool."""
    raw_PG = raw_rewards(nnx.merge(graph, scorer.params), prompts, tokens_PGT, lengths_PG)
    return (raw_PG - scorer.mean) / scorer.scale


def standardized_scorer(params: Any, raw_PG: jax.Array, gold_PG: jax.Array) -> StandardScorer:
    mean, scale = raw_PG.mean(), raw_PG.std()
    return StandardScorer(params, mean, scale, (raw_PG - mean) / scale, order_agreement(raw_PG, gold_PG))


def pool_rewards(model: Qwen3RewardModel, train: PromptIds, tokens_PGT: jax.Array, lengths_PG: jax.Array) -> jax.Array:
    """`raw_rewards` of the pool, POOL_PROMPTS prompts at a time: it has thousands of completions."""

    def one(of_prompt: tuple[jax.Array, ...]) -> jax.Array:
        tokens_S, length, tokens_GT, lengths_G = (array[None] for array in of_prompt)
        return raw_rewards(model, PromptIds(tokens_S, length), tokens_GT, lengths_G)[0]

    return jax.lax.map(one, (*train, tokens_PGT, lengths_PG), batch_size=POOL_PROMPTS)


def build_world(folder: Path, config: WorldConfig) -> World:
    """Loads the world of a directory, and makes its missing parts.

    Raises:
      SetupError: the repository's data is missing or has too few prompts; before anything is trained.
    """
    if not PREPARE.is_file():
        raise SetupError(f"{PREPARE}: not there; the lab needs the repository's data/, run it in a checkout")
    runpy.run_path(str(PREPARE))["main"](folder)
    tokenizer = Tokenizer(folder / "tokenizer")
    train, validation = _prompts(folder, tokenizer, config)
    _train_start_and_gold(folder, config)
    policy, start = split(load_model(folder / "start"))
    gold_graph, gold_params = split(load_model(folder / "gold"))

    @jax.jit
    def pool(key: jax.Array) -> tuple[jax.Array, ...]:
        rollout = sample(
            nnx.merge(policy, start),
            *train,
            jnp.arange(len(train.lengths_P)),
            key,
            untruncated_sampling(tokenizer),
            num_generations=POOL_COMPLETIONS,
            max_completion_length=config.max_completion_length,
            pad_id=tokenizer.pad_id,
        )
        lengths_PG = rollout.lengths_PG - rollout.finished_PG
        raw_PG = pool_rewards(nnx.merge(gold_graph, gold_params), train, rollout.tokens_PGT, lengths_PG)
        return rollout.tokens_PGT, lengths_PG, raw_PG

    arrays = cached_arrays(folder / "pool.npz", lambda: dict(zip(POOL_ARRAYS, pool(jax.random.key(0)), strict=True)))
    tokens_PGT, lengths_PG, raw_PG = (arrays[name] for name in POOL_ARRAYS)
    gold = standardized_scorer(gold_params, raw_PG, raw_PG)
    proxy_graph, _ = split(nnx.eval_shape(lambda: _new_proxy(jax.random.key(0), tokenizer)))
    return World(tokenizer, policy, start, gold_graph, gold, proxy_graph, train, validation, tokens_PGT, lengths_PG)


def proxies(world: World, folder: Path, config: WorldConfig, seeds: tuple[int, ...], noise: float) -> StandardScorer:
    """One proxy for each seed, stacked; read from the directory if they were trained before."""
    named = f"noise{round(100 * noise)}_seeds{seeds[0]}-{seeds[-1]}"

    def train() -> dict[str, jax.Array]:
        trained = jax.jit(jax.vmap(lambda seed: _train_proxy(world, config, seed, noise)))(jnp.array(seeds))
        return flatten(trained.params) | {name: getattr(trained, name) for name in SCORER_FIELDS}

    arrays = cached_arrays(folder / "proxies" / f"{named}.npz", train)
    about = {name: arrays.pop(name) for name in SCORER_FIELDS}
    return StandardScorer(nest(arrays), **about)


def cached_arrays(file: Path, make: Callable[[], Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """Loads the arrays of a file, after making and writing it atomically if it is missing."""
    if not file.is_file():
        write_arrays(file, {name: np.asarray(array) for name, array in make().items()})
    with np.load(file) as stored:
        return {name: jnp.asarray(stored[name]) for name in stored.files}


def _train_proxy(world: World, config: WorldConfig, seed: jax.Array, noise: float) -> StandardScorer:
    """Trains a Bradley-Terry model on the seed's comparisons, one epoch, AdamW with linear decay to 0."""
    draw, init = jax.random.split(jax.random.fold_in(jax.random.key(1), seed))
    pairs_J2, prompt_J, chosen_J = comparisons(world, config, draw, noise)
    params = split(_new_proxy(init, world.tokenizer))[1]
    steps = config.comparisons // config.proxy_batch
    optimizer = optax.adamw(optax.linear_schedule(config.proxy_learning_rate, 0.0, steps), weight_decay=0.1)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        prompts, batch_J2 = prompt_J[rows], pairs_J2[rows]
        asked = PromptIds(world.train.tokens_PS[prompts], world.train.lengths_P[prompts])
        tokens_J2T = world.pool_PGT[prompts[:, None], batch_J2]
        lengths_J2 = world.pool_lengths_PG[prompts[:, None], batch_J2]
        rewards_J2 = raw_rewards(nnx.merge(world.proxy_graph, params), asked, tokens_J2T, lengths_J2)
        chosen_J1 = chosen_J[rows][:, None]
        chosen, rejected = (jnp.take_along_axis(rewards_J2, at, 1)[:, 0] for at in (chosen_J1, 1 - chosen_J1))
        return preference_loss(chosen, rejected)[0]

    def step(state: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, opt_state = state
        rows = i * config.proxy_batch + jnp.arange(config.proxy_batch)
        updates, opt_state = optimizer.update(jax.grad(loss)(params, rows), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    model = nnx.merge(world.proxy_graph, params)
    raw_PG = pool_rewards(model, world.train, world.pool_PGT, world.pool_lengths_PG)
    return standardized_scorer(params, raw_PG, world.gold.pool_PG)


def comparisons(world: World, config: WorldConfig, key: jax.Array, noise: float) -> tuple[jax.Array, ...]:
    """Draws J pairs of one prompt's completions; a label is the index gold prefers, flipped for a share `noise`."""
    prompt_key, first_key, second_key, flip_key = jax.random.split(key, 4)
    J, (P, G) = config.comparisons, world.gold.pool_PG.shape
    prompt_J = jax.random.randint(prompt_key, (J,), 0, P)
    first_J = jax.random.randint(first_key, (J,), 0, G)
    second_J = (first_J + jax.random.randint(second_key, (J,), 1, G)) % G
    pairs_J2 = jnp.stack([first_J, second_J], 1)
    gold_J2 = world.gold.pool_PG[prompt_J[:, None], pairs_J2]
    flipped_J = jax.random.uniform(flip_key, (J,)) < noise
    chosen_J = (gold_J2[:, 1] > gold_J2[:, 0]) ^ flipped_J
    return pairs_J2, prompt_J, chosen_J.astype(jnp.int32)


def order_agreement(proxy_PG: jax.Array, gold_PG: jax.Array) -> jax.Array:
    """Share of a prompt's completion pairs that are ordered as gold orders them; ties of the proxy count one half."""
    sign_PGG, gold_PGG = (jnp.sign(r[:, :, None] - r[:, None, :]) for r in (proxy_PG, gold_PG))
    return (gold_PGG * sign_PGG).sum() / jnp.abs(gold_PGG).sum() / 2 + 0.5


def _new_proxy(key: jax.Array, tokenizer: Tokenizer) -> Qwen3RewardModel:
    config = replace(PROXY, architecture=REWARD_MODEL, pad_token_id=tokenizer.pad_id)
    return Qwen3RewardModel(config, nnx.Rngs(params=key), remat="none")


def _train_start_and_gold(folder: Path, config: WorldConfig) -> None:
    data, tokenizer = folder / "data", str(folder / "tokenizer")
    pairs = data / "gold_train.jsonl"
    if not pairs.is_file():
        write_jsonl(
            pairs, [row for half in ("reward", "judge") for row in load_rows(str(data / f"{half}_train.jsonl"))]
        )
    shared: dict[str, Any] = {"batch_size": 32, "max_length": 40, "checkpoint": CheckpointConfig(every=1000, keep=1)}
    shared |= {"log": LogConfig(tensorboard=False)}
    start = SftConfig(
        output_dir=str(folder / "start"),
        data=DataConfig(train=str(data / "sft_train.jsonl"), validation=str(data / "sft_validation.jsonl")),
        model=ModelConfig(tokenizer=tokenizer, architecture=START, remat="none"),
        max_steps=config.sft_steps,
        eval_steps=config.sft_steps,
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=20, weight_decay=0.1),
        **shared,
    )
    gold = RewardModelConfig(
        output_dir=str(folder / "gold"),
        data=DataConfig(train=str(pairs), validation=str(data / "pairs_validation.jsonl")),
        model=ModelConfig(tokenizer=tokenizer, architecture=GOLD, remat="none"),
        max_steps=config.gold_steps,
        eval_steps=config.gold_steps,
        optimizer=OptimizerConfig(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=10, weight_decay=1.0),
        **shared,
    )
    if not _has_ended(start):
        train_sft(start)
    if not _has_ended(gold):
        train_reward_model(gold)


def _has_ended(config: SftConfig | RewardModelConfig) -> bool:
    return is_run(config.output_dir) and find_step(config.output_dir)[1] == config.max_steps


def _prompts(folder: Path, tokenizer: Tokenizer, config: WorldConfig) -> tuple[PromptIds, PromptIds]:
    """Distinct training and validation prompts of at most `max_prompt_length` tokens."""

    def read(part: str) -> list[str]:
        texts = [row["prompt"] for row in load_rows(str(folder / "data" / f"prompts_{part}.jsonl"))]
        lengths = map(len, tokenizer.prompt_ids(texts))
        short = [text for text, n in zip(texts, lengths, strict=True) if n <= config.max_prompt_length]
        return list(dict.fromkeys(short))

    def encode(texts: list[str]) -> PromptIds:
        return PromptIds(*map(jnp.asarray, tokenizer.encode_prompts(texts, config.max_prompt_length)))

    validation = read("validation")
    if config.validation_prompts > len(validation):
        raise SetupError(
            f"world.validation_prompts: expected at most {len(validation)}, the prompts of up to "
            f"{config.max_prompt_length} tokens that there are, got {config.validation_prompts}"
        )
    train = [text for text in read("train") if text not in set(validation)]
    return encode(train), encode(validation[: config.validation_prompts])
