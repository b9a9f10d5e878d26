"""Writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT computes y = x W^T + (alpha / r) (x A^T) B^T with A [r, inputs] and B [outputs, r], one pair for every layer.
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
from models.hf_weights import TENSORS, written_as
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
    """Writes the trained parameters of `models.lora.split_trainable`: the adapters and a reward model's head.

    Args:
      params: the trained parameters.
      lora: size, scale and targets of the adapters.
      config: the network.
      directory: where to write; created if needed.
      base: PEFT's default path of the base model; None = PEFT's user has to give it.
      dtype: dtype of the written tensors.

    Raises:
      ValueError: values that are not finite in that dtype.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = jnp.dtype(dtype)
    tensors = {}
    for name, adapters in adapter_names(lora).items():
        module = TENSORS[f"layers.{name}"][0].removesuffix(".weight")
        a_L, b_L = (np.asarray(params["layers"][part]) for part in adapters)
        for layer in range(config.num_hidden_layers):
            a, b = a_L[layer].reshape(-1, lora.rank).T, b_L[layer].reshape(lora.rank, -1).T
            for part, matrix in (("lora_A", a), ("lora_B", b)):
                key = f"{PREFIX}{module.format(layer)}.{part}.weight"
                tensors[key] = written_as(matrix, target, key)
    if REWARD_HEAD in params:
        tensors[f"{PREFIX}{TENSORS[REWARD_HEAD][0]}"] = written_as(
            np.asarray(params[REWARD_HEAD])[None], target, REWARD_HEAD
        )
    adapter_config = {
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
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config, indent=2) + "\n")
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copymode(directory / "adapter_config.json", file)  # safetensors makes files readable to their owner only
