"""What several tests share: a tiny tokenizer, a tiny policy, a tiny reward model, prompts, and a run's config."""

import os

# Before jax starts: most of a test's time is compiling, so compile quickly rather than well.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, save_pretrained, split
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer, train_bpe
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardSpec,
    ValidationConfig,
)

REVIEWS = Path(__file__).parent.parent / "data" / "reviews" / "sentiment_labelled_sentences.jsonl.gz"
VOCABULARY = 300  # 256 bytes, 2 special tokens, 42 merges


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A compilation cache of this session: a second run of the same shapes does not compile again."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            directory = str(tmp_path_factory.mktemp("xla"))
            patch.setenv("JAX_COMPILATION_CACHE_DIR", directory)  # programs and subprocesses keep to it
            jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        yield


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Forty review sentences, of 4 words at least."""

    def texts() -> Iterator[str]:
        with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
            for line in lines:
                if len((text := json.loads(line)["text"]).split()) >= 4:
                    yield text

    return [text for text, _ in zip(texts(), range(40), strict=False)]


@pytest.fixture(scope="session")
def tiny_config() -> Qwen3Config:
    """A policy whose random weights are large enough that its next-token distribution is far from uniform."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )


def random_model(config: Qwen3Config, seed: int = 0) -> Backbone:
    """A policy or reward model with random weights, norms included; made by numpy, which compiles nothing."""
    graphdef, shapes = split(abstract_model(config, remat="none"))
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> jax.Array:
        middle, scale = (1.0, 0.1) if "norm" in jax.tree_util.keystr(path) else (0.0, config.initializer_range)
        return jnp.asarray(middle + scale * rng.normal(size=leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(values, shapes))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Backbone]:
    """make_model(config, seed=0)."""
    return random_model


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(sentences, directory, VOCABULARY)
    return directory


@pytest.fixture
def chatty(tiny_tokenizer_dir: Path, tmp_path: Path) -> Tokenizer:
    """The tiny tokenizer with a chat template."""
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "chatty")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% if enable_thinking %}hm{% endif %}{% endif %}"
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    return Tokenizer(tmp_path / "chatty")


@pytest.fixture(scope="session")
def tiny_policy_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Qwen3Config, tiny_tokenizer_dir: Path
) -> Path:
    """A Hugging Face directory: random weights and the tokenizer."""
    directory = tmp_path_factory.mktemp("policy")
    save_pretrained(random_model(tiny_config), directory)
    Tokenizer(tiny_tokenizer_dir).save(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_reward_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Qwen3Config, tiny_tokenizer_dir: Path
) -> Path:
    """A Hugging Face directory of a reward model, with the same tokenizer."""
    directory = tmp_path_factory.mktemp("reward")
    save_pretrained(random_model(replace(tiny_config, architecture=REWARD_MODEL), seed=1), directory)
    Tokenizer(tiny_tokenizer_dir).save(directory)
    return directory


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """JSONL: "prompt", the first 8 characters of a sentence (at most 8 tokens), and the column "wanted", the ninth."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": sentence[:8], "wanted": sentence[8]} for sentence in sentences[:24]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def policy_config(tiny_policy_dir: Path, tiny_reward_dir: Path, prompts_file: Path) -> Callable[..., PolicyConfig]:
    """policy_config(tmp_path, **overrides): a run of 3 steps in tmp_path / "run" that takes seconds."""

    def make(tmp_path: Path, **overrides: Any) -> PolicyConfig:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "model": ModelConfig(path=str(tiny_policy_dir), remat="none"),
            "data": DataConfig(train=str(prompts_file)),
            "rewards": [RewardSpec(model=str(tiny_reward_dir), name="tiny", max_length=64, batch_prompts=4)],
            "max_steps": 3,
            "prompts_per_step": 4,
            "num_generations": 4,
            "microbatch_prompts": 2,
            "max_prompt_length": 8,
            "max_completion_length": 8,
            "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
            "validation": ValidationConfig(every=2, prompts=4, num_generations=4, batch_prompts=4),
            "checkpoint": CheckpointConfig(every=1),
            "log": LogConfig(tensorboard=False, progress=False),
        }
        return PolicyConfig(**(settings | overrides))

    return make
