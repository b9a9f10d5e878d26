"""Adapters as PEFT loads them: adapter_config.json and adapter_model.safetensors.

PEFT keeps y = x W^T + (alpha / r) (x A^T) B^T with A [r, inputs] and B [outputs, r], one pair for every layer.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.config import Qwen3Config
from models.hf_weights import TENSORS
from models.lora import REWARD_HEAD, Lora, adapter_names

PREFIX = "base_model.model."


def save_adapters(
    params: Mapping[str, Any],
    lora: Lora,
    config: Qwen3Config,
    directory: str | Path,
    *,
    base: str | None,
    dtype: str = "float32",
) -> None:
    """Write what `models.lora.split_trainable` calls trained: the adapters and, of a reward model, its head.

    Args:
      base: where PEFT finds the base when nobody says; None = it must be told.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = jnp.dtype(dtype)
    tensors = {}
    for name, pair in adapter_names(lora).items():
        module = TENSORS[f"layers.{name}"][0].removesuffix(".weight")
        a_L, b_L = (np.asarray(params["layers"][part]) for part in pair)
        for layer in range(config.num_hidden_layers):
            a, b = a_L[layer].reshape(-1, lora.rank).T, b_L[layer].reshape(lora.rank, -1).T
            for part, matrix in (("lora_A", a), ("lora_B", b)):
                key = f"{PREFIX}{module.format(layer)}.{part}.weight"
                tensors[key] = np.ascontiguousarray(matrix.astype(target))
    if REWARD_HEAD in params:
        tensors[f"{PREFIX}{TENSORS[REWARD_HEAD][0]}"] = np.asarray(params[REWARD_HEAD])[None].astype(target)
    about = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.is_reward_model else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "modules_to_save": ["score"] if REWARD_HEAD in params else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(about, indent=2) + "\n")
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(directory / "adapter_config.json", file)  # safetensors makes it the owner's alone
