"""Runs that are small enough to be killed many times: a tokenizer, networks, data and configs in one folder."""

import gzip
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
REVIEWS = ROOT / "data" / "reviews" / "sentiment_labelled_sentences.jsonl.gz"
VOCABULARY = 300  # 256 bytes, 2 special tokens, 42 merges
ARCHITECTURE = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"tie_word_embeddings": True, "initializer_range": 0.3},
}
TOKENIZER, REWARD = "tokenizer", "reward_model"  # directories
PROMPTS, TEXTS, PAIRS = "prompts.jsonl", "texts.jsonl", "pairs.jsonl"


def environment() -> dict[str, str]:
    """Returns the environment of a program that compiles quickly rather than well, on a CPU, without a network."""
    flags = "--xla_backend_optimization_level=0"
    defaults = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return defaults | os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def process_environments(processes: int) -> list[dict[str, str]]:
    """Returns what the environment of each process of a job on this machine has besides; nothing of one alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(processes)}
    return [{**job, "JAX_PROCESS_ID": str(index)} for index in range(processes)]


def write_materials(folder: Path) -> None:
    """Writes a tokenizer, a reward model with random weights, prompts, texts and pairs."""
    from models.tokenizer import train_bpe

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
        texts = [text for line in lines if len((text := json.loads(line)["text"]).split()) >= 4][:48]
    train_bpe(texts, folder / TOKENIZER, VOCABULARY)
    write_network(folder / REWARD, folder / TOKENIZER, is_reward_model=True)
    write_rows(folder / PROMPTS, [{"prompt": text[:8], "wanted": text[8]} for text in texts])
    write_rows(folder / TEXTS, [{"text": text} for text in texts])
    write_rows(folder / PAIRS, [{"prompt": t[:8], "chosen": t[8:24], "rejected": t[24:40] or "."} for t in texts])


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_network(directory: Path, tokenizer: Path, *, is_reward_model: bool = False, seed: int = 1) -> None:
    """Writes a Hugging Face directory of a network with random weights, made by numpy, which compiles nothing."""
    import jax
    import numpy as np
    from flax import nnx

    from models.config import REWARD_MODEL, Qwen3Config
    from models.hf_weights import abstract_model, save_pretrained, split
    from models.tokenizer import Tokenizer

    config = Qwen3Config(**ARCHITECTURE)  # type: ignore[arg-type]
    config = replace(config, architecture=REWARD_MODEL) if is_reward_model else config
    graphdef, shapes = split(abstract_model(config, remat="none"))
    rng = np.random.default_rng(seed)

    def values(path: Any, leaf: Any) -> np.ndarray:
        middle = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return np.asarray(middle + 0.3 * rng.normal(size=leaf.shape), np.float32)

    save_pretrained(nnx.merge(graphdef, jax.tree_util.tree_map_with_path(values, shapes)), directory)
    Tokenizer(tokenizer).save(directory)


def policy_settings(materials: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Returns the settings of a policy's run with a reward model and a function, validations and tables of texts."""
    settings: dict[str, Any] = {
        **_shared(materials, run, PROMPTS),
        "rewards": [
            {"model": str(materials / REWARD), "name": "tiny", "max_length": 64, "batch_prompts": 4},
            {"function": "length", "weight": 0.01},
        ],
        **{"prompts_per_step": 4, "num_generations": 4, "microbatch_prompts": 2},
        **{"max_prompt_length": 8, "max_completion_length": 8},
        "validation": {"every": 10, "prompts": 4, "num_generations": 2, "batch_prompts": 4},
    }
    settings["log"]["completions_every"] = 10
    return merged(settings, changes)


def sft_settings(materials: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Returns the settings of a run of `train sft` that holds a few rows out."""
    return merged({**_shared(materials, run, TEXTS), **_supervised()}, changes)


def reward_settings(materials: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Returns the settings of a run of `train reward` that holds a few rows out."""
    return merged({**_shared(materials, run, PAIRS), **_supervised()}, changes)


def _shared(materials: Path, run: Path, data: str) -> dict[str, Any]:
    return {
        "output_dir": str(run),
        "model": {"architecture": ARCHITECTURE, "tokenizer": str(materials / TOKENIZER), "remat": "none"},
        "data": {"train": str(materials / data), "validation_rows": 8},
        "max_steps": 40,
        "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 1},
        "checkpoint": {"every": 3},
        "log": {"progress": False},
    }


def _supervised() -> dict[str, Any]:
    return {"batch_size": 8, "max_length": 32, "eval_steps": 5}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with some of them changed, in nested sections too."""
    both = {key: merged(settings[key], changes[key]) for key in changes if isinstance(settings.get(key), dict)}
    return {**settings, **changes, **both}
