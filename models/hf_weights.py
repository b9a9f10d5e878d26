"""Hugging Face directories in and out: safetensors (one file or sharded) <-> parameters.

One table says where each tensor lives. A matrix of ours is Hugging Face's [out, in] transposed, its axes
unfolded: query_LDHE[l] = q_proj.weight.T.reshape(D, H, E). Nothing is unpickled, no remote code is run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import Qwen3Config, read_config, read_json
from models.qwen3 import Backbone, Qwen3
from models.reward_model import Qwen3RewardModel
from models.sharding import RULES, Layout, parameter_shardings

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

# ours -> (Hugging Face's name, transposed?); {} is the layer
TENSORS: dict[str, tuple[str, bool]] = {
    "embed_VD": ("model.embed_tokens.weight", False),
    "norm_D": ("model.norm.weight", False),
    "unembed_VD": ("lm_head.weight", False),
    "score_D": ("score.weight", False),
    "layers.attention_norm_LD": ("model.layers.{}.input_layernorm.weight", False),
    "layers.query_LDHE": ("model.layers.{}.self_attn.q_proj.weight", True),
    "layers.key_LDKE": ("model.layers.{}.self_attn.k_proj.weight", True),
    "layers.value_LDKE": ("model.layers.{}.self_attn.v_proj.weight", True),
    "layers.output_LHED": ("model.layers.{}.self_attn.o_proj.weight", True),
    "layers.query_bias_LHE": ("model.layers.{}.self_attn.q_proj.bias", False),
    "layers.key_bias_LKE": ("model.layers.{}.self_attn.k_proj.bias", False),
    "layers.value_bias_LKE": ("model.layers.{}.self_attn.v_proj.bias", False),
    "layers.output_bias_LD": ("model.layers.{}.self_attn.o_proj.bias", False),
    "layers.query_norm_LE": ("model.layers.{}.self_attn.q_norm.weight", False),
    "layers.key_norm_LE": ("model.layers.{}.self_attn.k_norm.weight", False),
    "layers.mlp_norm_LD": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers.gate_LDF": ("model.layers.{}.mlp.gate_proj.weight", True),
    "layers.up_LDF": ("model.layers.{}.mlp.up_proj.weight", True),
    "layers.down_LFD": ("model.layers.{}.mlp.down_proj.weight", True),
}

Parameters = dict[str, Any]


def abstract_model(config: Qwen3Config, **options: Any) -> Backbone:
    """The network of a config without any array allocated: a policy or a reward model."""
    network = Qwen3RewardModel if config.is_reward_model else Qwen3
    return nnx.eval_shape(lambda: network(config, nnx.Rngs(0), **options))


def split(model: nnx.Module) -> tuple[Any, Parameters]:
    """(graphdef, params): the static half, and a nested dict of arrays. `nnx.merge` puts them together."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Nested parameters as {"layers.query_LDHE": array}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in flat}


def as_layout(mesh: Mesh | Layout | None) -> Layout | None:
    return Layout(mesh, tuple(RULES.items())) if isinstance(mesh, Mesh) else mesh


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | Layout | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: str = "full",
) -> Backbone:
    """The policy or reward model of a Hugging Face directory, its weights read straight into their shards.

    Args:
      path_or_hub_id: a local directory, or a model's name on the Hub (downloaded and cached).
      mesh: where the weights go (axes data, fsdp, tensor); None = the default device.
      dtype: compute dtype. param_dtype: dtype of the stored parameters; None = dtype.
      remat: what the backward pass keeps of a layer, see `models.qwen3.REMAT`.

    Raises:
      FileNotFoundError: no such directory, config or weight file.
      ValueError: a config that is not supported, or tensors that are missing, left over, of another shape,
        or unreadable.
    """
    directory = _directory(path_or_hub_id)
    config = read_config(directory)
    layout = as_layout(mesh)
    param_dtype = jnp.dtype(param_dtype or dtype)
    model = abstract_model(config, dtype=dtype, param_dtype=param_dtype, layout=layout, remat=remat)
    graphdef, shapes = split(model)
    files = _tensor_files(directory)
    wanted = {hf: name for name in flatten(shapes) for hf in _hf_names(name, config)}
    extra = files.keys() - wanted.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    for problem, names in (("missing from", wanted.keys() - files.keys()), ("not known to this config in", extra)):
        if names:
            raise ValueError(f"{directory}: {len(names)} tensors are {problem} the weights, e.g. {sorted(names)[0]}")
    shardings = flatten(parameter_shardings(model, layout)) if layout is not None else {}

    def read(name: str, shape: tuple[int, ...]) -> jax.Array:
        tensors = [_Tensor(files[hf], hf, TENSORS[name][1]) for hf in _hf_names(name, config)]
        stacked = "{}" in TENSORS[name][0]
        for tensor in tensors:
            tensor.check(shape[1:] if stacked else shape)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or tuple(slice(None) for _ in shape)
            if not stacked:
                return tensors[0].load(shape)[index].astype(param_dtype)
            layers = range(shape[0])[index[0]]
            parts = [tensors[layer].load(shape[1:])[index[1:]].astype(param_dtype) for layer in layers]
            return np.stack(parts)

        if name in shardings:
            return jax.make_array_from_callback(shape, shardings[name], shard)
        return jnp.asarray(shard(None))

    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: read(".".join(str(key.key) for key in path), leaf.shape), shapes
    )
    return nnx.merge(graphdef, params)


def save_pretrained(
    model: Backbone, directory: str | Path, *, dtype: Any = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a policy or reward model as a Hugging Face directory: config.json and safetensors.

    Args:
      dtype: dtype of the written tensors; None = that of the parameters.
      max_shard_bytes: above this size the weights are cut into several files with an index.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    params = split(model)[1]
    target = jnp.dtype(dtype or next(iter(flatten(params).values())).dtype)
    config = model.config.to_hf() | {"dtype": target.name}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in _hf_tensors(params, model.config, target):
        if size + tensor.nbytes > max_shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE_FILE, metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


class _Tensor:
    """One tensor of a safetensors file, read when asked for, in our axes."""

    def __init__(self, file: Path, name: str, transposed: bool) -> None:
        self.file, self.name, self.transposed = file, name, transposed

    def check(self, shape: tuple[int, ...]) -> None:
        with safe_open(self.file, framework="numpy") as opened:
            found = tuple(opened.get_slice(self.name).get_shape())
        if int(np.prod(found)) != int(np.prod(shape)) or (self.transposed and found[-1] not in _prefix_sizes(shape)):
            raise ValueError(f"{self.file}: {self.name} has shape {found}, which does not fit {shape} of the config")

    def load(self, shape: tuple[int, ...]) -> np.ndarray:
        with safe_open(self.file, framework="numpy") as opened:
            array = opened.get_tensor(self.name)
        return (array.T if self.transposed else array).reshape(shape)


def _prefix_sizes(shape: tuple[int, ...]) -> set[int]:
    return {int(np.prod(shape[:i])) for i in range(1, len(shape))}


def _hf_names(name: str, config: Qwen3Config) -> list[str]:
    template = TENSORS[name][0]
    return [template.format(i) for i in range(config.num_hidden_layers)] if "{}" in template else [template]


def _hf_tensors(params: Parameters, config: Qwen3Config, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in flatten(params).items():
        stacked, transposed = "{}" in TENSORS[name][0], TENSORS[name][1]
        for i, hf in enumerate(_hf_names(name, config)):
            part = np.asarray(array[i] if stacked else array).astype(dtype)
            if transposed:  # [in..., out...] -> [out, in]; only the output projection has two input axes
                inputs = int(np.prod(part.shape[:-1])) if name.endswith("_LHED") else part.shape[0]
                part = part.reshape(inputs, -1).T
            elif name == "score_D":
                part = part[None]
            elif "_bias_" in name:
                part = part.reshape(-1)
            yield hf, np.ascontiguousarray(part)


def could_be_on_hub(name: str | Path) -> bool:
    """Whether it looks like ORGANISATION/MODEL."""
    return str(name).count("/") == 1 and not str(name).startswith(("/", "."))


def _directory(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if not could_be_on_hub(path_or_hub_id):
        raise FileNotFoundError(f"{path}: no such directory; expected a Hugging Face model directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{path_or_hub_id}: no such directory here, and the Hub could not give a model of that name "
            f"({type(error).__name__}); check the spelling, or download it first where there is a network"
        ) from error


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = directory / INDEX_FILE
    if index.is_file():
        files = {name: directory / file for name, file in read_json(index)["weight_map"].items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: {INDEX_FILE} names this file, but it is not there")
        return files
    file = directory / SINGLE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither")
    try:
        with safe_open(file, framework="numpy") as opened:
            return dict.fromkeys(opened.keys(), file)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); was it downloaded whole?") from error
