"""Reads and writes Hugging Face directories: safetensors (one file or sharded) <-> parameters.

The table `TENSORS` maps names and axes: "HE,D" is a matrix [H * E, D] in the file; our query_LDHE stacks these matrices
over the layers, reshaped and transposed. Nothing is unpickled, no remote code is run.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors.numpy import save_file

from models.config import DTYPES, Qwen3Config, read_config, stored_dtype
from models.lora import Parameters
from models.qwen3 import Backbone, Qwen3
from models.reward_model import Qwen3RewardModel
from models.sharding import RULES, Layout, parameter_shardings, with_sharding
from models.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    aligned_empty,
    all_finite,
    find_directory,
    open_weights,
)

BLOCK_BYTES = 64 * 2**20  # bytes of a file that are read at a time

# our name -> (Hugging Face's name, its axes in our letters); {} is the layer, our axes are our name's last letters
TENSORS: dict[str, tuple[str, str]] = {
    "embed_VD": ("model.embed_tokens.weight", "V,D"),
    "norm_D": ("model.norm.weight", "D"),
    "unembed_VD": ("lm_head.weight", "V,D"),
    "score_D": ("score.weight", "1,D"),
    "layers.attention_norm_LD": ("model.layers.{}.input_layernorm.weight", "D"),
    "layers.query_LDHE": ("model.layers.{}.self_attn.q_proj.weight", "HE,D"),
    "layers.key_LDKE": ("model.layers.{}.self_attn.k_proj.weight", "KE,D"),
    "layers.value_LDKE": ("model.layers.{}.self_attn.v_proj.weight", "KE,D"),
    "layers.output_LHED": ("model.layers.{}.self_attn.o_proj.weight", "D,HE"),
    "layers.query_bias_LHE": ("model.layers.{}.self_attn.q_proj.bias", "HE"),
    "layers.key_bias_LKE": ("model.layers.{}.self_attn.k_proj.bias", "KE"),
    "layers.value_bias_LKE": ("model.layers.{}.self_attn.v_proj.bias", "KE"),
    "layers.output_bias_LD": ("model.layers.{}.self_attn.o_proj.bias", "D"),
    "layers.query_norm_LE": ("model.layers.{}.self_attn.q_norm.weight", "E"),
    "layers.key_norm_LE": ("model.layers.{}.self_attn.k_norm.weight", "E"),
    "layers.mlp_norm_LD": ("model.layers.{}.post_attention_layernorm.weight", "D"),
    "layers.gate_LDF": ("model.layers.{}.mlp.gate_proj.weight", "F,D"),
    "layers.up_LDF": ("model.layers.{}.mlp.up_proj.weight", "F,D"),
    "layers.down_LFD": ("model.layers.{}.mlp.down_proj.weight", "D,F"),
}
AXIS_FIELDS = {
    **{"V": "vocab_size", "D": "hidden_size", "F": "intermediate_size", "L": "num_hidden_layers"},
    **{"H": "num_attention_heads", "K": "num_key_value_heads", "E": "head_dim"},
}  # the config field with an axis' size


def abstract_model(config: Qwen3Config, **options: Any) -> Backbone:
    """Returns the network of a config, a policy or a reward model, with shapes in place of arrays."""
    network = Qwen3RewardModel if config.is_reward_model else Qwen3
    return nnx.eval_shape(lambda: network(config, nnx.Rngs(0), **options))


def split(model: nnx.Module) -> tuple[Any, Parameters]:
    """Splits a network into its graphdef and its parameters, a nested dict; `nnx.merge` is the inverse."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract_params(model: Backbone, layout: Layout | None) -> Parameters:
    """Returns the shapes and, on a mesh, the shardings of a network's parameters.

    Raises:
      ValueError: a parameter axis that the mesh does not divide.
    """
    _, shapes = split(model)
    return shapes if layout is None else jax.tree.map(with_sharding, shapes, parameter_shardings(model, layout))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested parameters to {"layers.query_LDHE": array}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in flat}


def nest(flat: Mapping[str, Any]) -> Parameters:
    """Nests flat parameters: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep=".")


def as_layout(mesh: Mesh | Layout | None) -> Layout | None:
    """Returns a layout with the default rules for a mesh; a layout or None unchanged."""
    return Layout(mesh, tuple(RULES.items())) if isinstance(mesh, Mesh) else mesh


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | Layout | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: str = "full",
) -> Backbone:
    """Loads the policy or reward model of a Hugging Face directory, its weights straight into their shards.

    Each process reads only the parts of a tensor that its devices hold, in blocks of at most 64 MiB. Its host memory
    holds at most its own shards (with an accelerator: those of one parameter at a time) and one block.

    Args:
      path_or_hub_id: a local directory, or a model's name on the Hub (downloaded and cached).
      mesh: the mesh (axes data, fsdp, tensor) or layout to shard over; None = the default device.
      dtype: compute dtype; "auto" = the one that config.json names, else the weights'.
      param_dtype: dtype of the stored parameters; None = dtype. A reward model's head is always float32.
      remat: a checkpoint policy of layers, a key of `models.qwen3.REMAT`.

    Returns:
      A `Qwen3` or a `Qwen3RewardModel`.

    Raises:
      FileNotFoundError: no such directory, config or weight file.
      ValueError: a config that is not supported, or tensors that are missing, unknown, of another shape or
        dtype than the config's, unreadable, or not finite.
    """
    directory = find_directory(path_or_hub_id)
    config = read_config(directory)
    if dtype == "auto":
        dtype = stored_dtype(directory) or _first_stored_dtype(directory, config)
    dtype = jnp.dtype(dtype)
    layout = as_layout(mesh)
    model = abstract_model(config, dtype=dtype, param_dtype=jnp.dtype(param_dtype or dtype), layout=layout, remat=remat)
    graphdef, shapes = split(model)
    shardings = flatten(parameter_shardings(model, layout)) if layout is not None else {}
    default = SingleDeviceSharding(jnp.zeros(()).devices().pop())

    with open_weights(directory, _unneeded_tensors(config)) as opened:
        _check_tensors(directory, opened, config, list(flatten(shapes)))
        if config.tie_word_embeddings and not config.is_reward_model and "lm_head.weight" in opened:
            _check_tied(directory, opened)
        with _progress_bar(directory, flatten(shapes), shardings) as advance:

            def read(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
                name = ".".join(str(key.key) for key in path)
                shards: dict[Any, np.ndarray] = {}  # devices with the same ranges share a shard

                def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                    ranges = _index_ranges(index, leaf.shape)
                    if ranges not in shards:
                        shards[ranges] = _read_shard(opened, name, ranges, config, leaf.dtype, advance)
                    return shards[ranges]

                sharding = shardings.get(name, default)
                return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, shard))

            params = jax.tree_util.tree_map_with_path(read, shapes)
    return nnx.merge(graphdef, params)


def save_pretrained(
    model: Backbone, directory: str | Path, *, dtype: Any = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes config.json and safetensors that transformers, vLLM and SGLang read, one file in memory at a time.

    Args:
      model: a policy or a reward model.
      directory: where to write; created if needed.
      dtype: dtype of the written tensors; None = that of the embedding.
      max_shard_bytes: above this size the weights are split over several files with an index.

    Raises:
      ValueError: a dtype that is not one of `models.config.DTYPES`, or values that are not finite in it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, params = model.config, flatten(split(model)[1])
    target = jnp.dtype(dtype or params["embed_VD"].dtype)
    if target.name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {target.name}")
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"dtype": target.name}, indent=2) + "\n")

    shards: list[dict[str, tuple[str, int | None]]] = [{}]  # Hugging Face's name -> our name and the layer
    sizes = [0]
    for name in params:
        for layer, hf_name in _hf_names(name, config).items():
            size = math.prod(_hf_shape(name, config)) * target.itemsize
            if sizes[-1] + size > max_shard_bytes and shards[-1]:
                shards.append({})
                sizes.append(0)
            shards[-1][hf_name] = (name, layer)
            sizes[-1] += size
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        tensors = {
            hf_name: _to_hf_tensor(name, params[name] if layer is None else params[name][layer], config, target)
            for hf_name, (name, layer) in shard.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        shutil.copymode(
            directory / "config.json", directory / file
        )  # safetensors makes files readable to their owner only
    if len(shards) > 1:
        weight_map = {hf_name: file for file, shard in zip(files, shards, strict=True) for hf_name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _hf_names(name: str, config: Qwen3Config) -> dict[int | None, str]:
    """Returns Hugging Face's name of a parameter by layer; {None: name} for one without layers."""
    template = TENSORS[name][0]
    if "{}" not in template:
        return {None: template}
    return {layer: template.format(layer) for layer in range(config.num_hidden_layers)}


def _axis_letters(name: str) -> str:
    """Returns the letters of a parameter's axes without L, e.g. DHE of layers.query_LDHE."""
    return name.rpartition("_")[2].removeprefix("L")


def _hf_axis_groups(name: str) -> list[str]:
    """Returns the letters of each axis of Hugging Face's tensor, e.g. [HE, D]."""
    return TENSORS[name][1].split(",")


def _axis_size(letter: str, config: Qwen3Config) -> int:
    return getattr(config, AXIS_FIELDS[letter]) if letter in AXIS_FIELDS else 1


def _hf_shape(name: str, config: Qwen3Config) -> tuple[int, ...]:
    return tuple(math.prod(_axis_size(letter, config) for letter in group) for group in _hf_axis_groups(name))


def _to_hf_tensor(name: str, array: jax.Array, config: Qwen3Config, dtype: Any) -> np.ndarray:
    """Converts one layer of our parameter to Hugging Face's tensor."""
    letters = "".join(_hf_axis_groups(name)).replace("1", "")
    tensor = np.asarray(array).transpose([_axis_letters(name).index(letter) for letter in letters])
    _refuse_overflow(tensor, dtype, name)
    return written_as(tensor.reshape(_hf_shape(name, config)), dtype, name)


def written_as(tensor: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Converts a tensor to the dtype that is written.

    Raises:
      ValueError: it has NaN or infinite values, perhaps in that dtype alone.
    """
    with np.errstate(over="ignore"):  # refused here
        written = np.ascontiguousarray(tensor.astype(dtype))
    if not all_finite(written):
        raise ValueError(f"{name} has NaN or infinite values in {written.dtype.name}; expected finite weights to write")
    return written


def _refuse_overflow(array: np.ndarray, dtype: Any, name: str) -> None:
    if dtype == np.float16 and array.dtype != np.float16 and array.size and np.abs(array).max() > 65_504:
        raise ValueError(f"{name} has values beyond 65504, the largest in float16; expected dtype bfloat16 or float32")


def _index_ranges(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[range, ...]:
    index = index or (slice(None),) * len(shape)
    return tuple(range(*part.indices(size)) for part, size in zip(index, shape, strict=True))


def _read_shard(
    opened: Mapping[str, StoredTensor],
    name: str,
    ranges: tuple[range, ...],
    config: Qwen3Config,
    dtype: Any,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Reads the shard of a parameter at `ranges`, into memory that a CPU device uses without a copy."""
    out = aligned_empty(tuple(len(part) for part in ranges), dtype)
    stacked = "{}" in TENSORS[name][0]
    range_of = dict(zip(_axis_letters(name), ranges[1:] if stacked else ranges, strict=True))
    for row, layer in enumerate(ranges[0] if stacked else [None]):
        stored = opened[_hf_names(name, config)[layer]]
        for elements in _copy_blocks(stored, name, range_of, out[row] if stacked else out, config):
            advance(elements * out.itemsize)
    return out


def _copy_blocks(
    stored: StoredTensor, name: str, range_of: Mapping[str, range], out: np.ndarray, config: Qwen3Config
) -> Iterator[int]:
    """Copies the part of a stored tensor at `range_of` our axes to `out`, by blocks of rows; yields their elements."""
    groups, axes = _hf_axis_groups(name), _axis_letters(name)
    ranges = {letter: range_of.get(letter, range(1)) for group in groups for letter in group}
    inner = [math.prod(_axis_size(letter, config) for letter in group[1:]) for group in groups]
    rows, first = ranges[groups[0][0]], groups[0][0]
    # the file is sliced by each group's first letter, the array by the others (head_dim) after reading
    columns = [slice(ranges[g[0]].start * n, ranges[g[0]].stop * n) for g, n in zip(groups, inner, strict=True)][1:]
    row_bytes = inner[0] * math.prod(c.stop - c.start for c in columns) * stored.dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    letters = [letter for group in groups for letter in group]
    for start in range(rows.start, rows.stop, step):
        block = range(start, min(start + step, rows.stop))
        array = stored.read(slice(block.start * inner[0], block.stop * inner[0]), *columns)
        sliced = {g[0]: ranges[g[0]] for g in groups} | {first: block}
        array = array.reshape([len(sliced[x]) if x in sliced else _axis_size(x, config) for x in letters])
        array = array[
            tuple(slice(None) if x in sliced else slice(range_of[x].start, range_of[x].stop) for x in letters)
        ]
        array = array.reshape([n for x, n in zip(letters, array.shape, strict=True) if x != "1"])
        named = [x for x in letters if x != "1"]
        index = tuple(slice(start - rows.start, block.stop - rows.start) if x == first else slice(None) for x in axes)
        _refuse_overflow(array, out.dtype, f"{stored.file}: {stored.name}")
        np.copyto(out[index], array.transpose([named.index(x) for x in axes]), casting="unsafe")
        yield array.size


def _first_stored_dtype(directory: Path, config: Qwen3Config) -> Any:
    with open_weights(directory, _unneeded_tensors(config)) as opened:
        return next(iter(opened.values())).dtype


def _unneeded_tensors(config: Qwen3Config) -> set[str]:
    """Returns the tensors that files or their index may name and the network does not read.

    That is the head of a tied embedding, which is the embedding, and that of a reward model, which has none.
    """
    return {"lm_head.weight"} if config.tie_word_embeddings or config.is_reward_model else set()


def _check_tensors(directory: Path, opened: Mapping[str, StoredTensor], config: Qwen3Config, names: list[str]) -> None:
    """Raises ValueError unless names and shapes of the stored tensors are those of the config."""
    expected = {hf_name: name for name in names for hf_name in _hf_names(name, config).values()}
    missing = sorted(expected.keys() - opened.keys())
    extra = sorted(opened.keys() - expected.keys() - _unneeded_tensors(config))
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} tensors are missing from the weights, e.g. {missing[0]}; "
            + _hint(missing[0], "weights that have it")
        )
    if extra:
        raise ValueError(
            f"{directory}: {len(extra)} tensors are not known to this config in the weights, e.g. {extra[0]}; "
            + _hint(extra[0], "weights without it")
        )
    for hf_name, name in expected.items():
        stored, shape = opened[hf_name], _hf_shape(name, config)
        if stored.shape != shape:
            fields = " x ".join(
                " * ".join(AXIS_FIELDS[letter] for letter in group) if group != "1" else "1"
                for group in _hf_axis_groups(name)
            )
            raise ValueError(
                f"{stored.file}: {hf_name} has shape {stored.shape}; config.json asks for {shape} ({fields}); "
                f"is this the config of these weights?"
            )


def _hint(tensor: str, weights: str) -> str:
    """Returns the advice for a missing or unknown tensor: the field of config.json that decides on it."""
    for pattern, field in {
        r"lm_head\.": "tie_word_embeddings (and architectures)",
        r"score\.": "architectures",
        r"_proj\.bias": "attention_bias",
        r"layers\.\d+\.": "num_hidden_layers",
    }.items():
        if re.search(pattern, tensor):
            return f"expected {weights}, or another {field} in config.json"
    return f"expected {weights}"


def _check_tied(directory: Path, opened: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError if the file has a head that differs from the embedding it should be tied to."""
    embed, head = opened["model.embed_tokens.weight"], opened["lm_head.weight"]
    equal = (embed.shape, embed.dtype) == (head.shape, head.dtype)
    step = max(1, BLOCK_BYTES // (embed.shape[1] * embed.dtype.itemsize))
    for start in range(0, embed.shape[0] if equal else 0, step):
        rows = slice(start, min(start + step, embed.shape[0]))
        equal = equal and np.array_equal(embed.read(rows), head.read(rows))
    if not equal:
        raise ValueError(
            f"{directory}: config.json says tie_word_embeddings, but lm_head.weight differs from "
            f"model.embed_tokens.weight; expected tie_word_embeddings = false, or no lm_head.weight"
        )


@contextmanager
def _progress_bar(
    directory: Path, shapes: Mapping[str, Any], shardings: Mapping[str, Any]
) -> Iterator[Callable[[int], None]]:
    """Shows the bytes that this process reads into its shards, on a terminal; yields the function that adds some."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    total = 0
    for name, leaf in shapes.items():
        parts = {_index_ranges(None, leaf.shape)}
        if name in shardings:
            indices = shardings[name].addressable_devices_indices_map(leaf.shape).values()
            parts = {_index_ranges(index, leaf.shape) for index in indices}
        total += sum(math.prod(map(len, part)) for part in parts) * leaf.dtype.itemsize
    console = Console(stderr=True)
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal or jax.process_index() > 0
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(str(directory.name), total=total)
        yield lambda size: progress.advance(task, size)
