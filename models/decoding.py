"""How the sampler runs the network: the prompt once per group, then one token of every completion at a time.

Two ways, chosen here by the devices' kind (`mesh.decoding`), with the same tokens up to rounding:

    scanned    a scan over the stacked layers, and a cache that is read in pieces: the fastest on CPUs
    unrolled   every layer's weights and cache are arrays of their own, query, key and value one product, and attention
               is kernels (models.decode_attention) where they can be: on accelerators, where a scan inside the token
               loop copies each layer's weights out of the stack for every token
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import KeyValues, Past, group_attention, heads_first
from models.config import Qwen3Config
from models.decode_attention import (
    HeadNorms,
    LayerKeyValues,
    Token,
    decode_attention,
)
from models.decode_gpu import has_kernel
from models.decode_tpu import has_tpu_kernel, padded_positions
from models.flash_attention import choose_attention, flash_attention
from models.lora import merge_adapters
from models.precision import products_in
from models.qwen3 import ACTIVATIONS, Prefix, Qwen3, last_hidden, rms_norm, rotary_angles, rotate
from models.sharding import GPUS, Layout, constrain, platform_of, with_sharding


class Decoder(Protocol):
    """What the sampler needs of a network; `prefix` and `past` are the decoder's own."""

    layout: Layout | None
    shrinks: bool  # whether fewer rows take less time, so that ended completions are worth moving out

    def start(self, prompt_PS: jax.Array, lengths_P: jax.Array, G: int, T: int) -> tuple[Any, Any]:
        """Returns the prompts' state, with `last_PD`, and an empty cache for G completions of T tokens of each."""

    def step(self, token_PG: jax.Array, prefix: Any, past: Any, live_PG: jax.Array) -> tuple[jax.Array, Any]:
        """Returns hidden states [P, G, D] behind one more token of each completion, and the cache with it."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D]."""


class ScannedDecoder:
    """Runs the model as it is."""

    shrinks = True

    def __init__(self, model: Qwen3) -> None:
        self._model, self.layout, self.logits = model, model.layout, model.logits

    def start(self, prompt_PS: jax.Array, lengths_P: jax.Array, G: int, T: int) -> tuple[Prefix, Past]:
        _, prefix = self._model.prefill(prompt_PS, lengths_P)
        past = Past.empty(prefix.kv, G, T)
        axes = ("layers", "prompt", "kv_heads", "group", None, None)
        keys, values = (constrain(self.layout, array, *axes) for array in past[:2])
        return prefix, past._replace(keys_LPKGET=keys, values_LPKGTE=values)

    def step(self, token_PG: jax.Array, prefix: Prefix, past: Past, live_PG: jax.Array) -> tuple[jax.Array, Past]:
        del live_PG  # ended completions are computed, and move out when half have ended
        hidden_PG1D, new_LPKG1E = self._model.extend(token_PG[..., None], prefix, past=past)
        return hidden_PG1D[:, :, 0], past.append(new_LPKG1E)


class DecodeLayer(NamedTuple):
    """One layer's weights, in the compute dtype, adapters added.

    Of every key/value head its W = Q + 2 projections lie together: Q queries, the key, the value; M = K W E. Weights
    have two axes: with a small one in the middle, a TPU would pad it.
    """

    attention_norm_D: Any
    qkv_DM: Any
    qkv_bias_KWE: Any  # None without biases
    query_norm_E: Any
    key_norm_E: Any
    output_KQED: Any
    output_bias_D: Any
    mlp_norm_D: Any
    gate_DF: Any
    up_DF: Any
    down_FD: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeWeights:
    """A policy's weights as the unrolled decoder reads them."""

    config: Qwen3Config = field(metadata={"static": True})
    kernels: str | None = field(metadata={"static": True})  # attention by kernels for "gpu" or "tpu"
    layout: Layout | None = field(metadata={"static": True})  # of the activations
    embed_VD: Any
    unembed_VD: Any  # None: tied
    norm_D: Any
    layers: tuple[DecodeLayer, ...]


LAYER_AXES = DecodeLayer(
    attention_norm_D=("width",),
    qkv_DM=("embed", "kv_heads"),
    qkv_bias_KWE=("kv_heads", None, "head_dim"),
    query_norm_E=("head_dim",),
    key_norm_E=("head_dim",),
    output_KQED=("kv_heads", None, "head_dim", "embed"),
    output_bias_D=("width",),
    mlp_norm_D=("width",),
    gate_DF=("embed", "mlp"),
    up_DF=("embed", "mlp"),
    down_FD=("mlp", "embed"),
)


def with_weight_shardings(weights: DecodeWeights, layout: Layout) -> DecodeWeights:
    """Returns shapes of weights with their shardings."""

    def sharded(shape: Any, axes: Any) -> Any:
        return None if shape is None else with_sharding(shape, layout.sharding(axes))

    table = ("vocab", "embed")
    return replace(
        weights,
        embed_VD=sharded(weights.embed_VD, table),
        unembed_VD=sharded(weights.unembed_VD, table),
        norm_D=sharded(weights.norm_D, ("width",)),
        layers=tuple(DecodeLayer(*map(sharded, layer, LAYER_AXES)) for layer in weights.layers),
    )


def choose_decoding(decoding: str, layout: Layout, config: Qwen3Config) -> str:
    """Returns scanned, unrolled or kernels: what `mesh.decoding` asks for, or of "auto" what the devices want.

    Raises:
      ValueError: the devices, the rules of the mesh, or the width of the heads do not allow it.
    """
    rules, kernel = dict(layout.rules), kernel_for(layout, config.head_dim)
    joins = rules["heads"] == rules["kv_heads"]  # a key's query heads lie where it does: they are one product
    if decoding == "auto":
        if platform_of(layout) == "cpu" or not joins:
            return "scanned"
        return "unrolled" if kernel is None else "kernels"
    if decoding in ("unrolled", "kernels") and not joins:
        raise ValueError(f"mesh.decoding: {decoding} needs one rule for heads and kv_heads; expected auto or scanned")
    if decoding == "kernels" and kernel is None:
        kind = layout.mesh.devices.flat[0].platform
        raise ValueError(
            "mesh.decoding: kernels are for heads of 32, 64, 128, ... on GPUs and of 128, 256, ... on TPUs, got heads "
            f"of {config.head_dim} on {kind}; expected auto, scanned or unrolled"
        )
    return decoding


def kernel_for(layout: Layout | None, head_dim: int) -> str | None:
    """Returns whose kernels can do the attention of such heads: "gpu" or "tpu"; None: XLA does it."""
    platform = platform_of(layout)
    if platform in GPUS:
        return "gpu" if has_kernel(head_dim) else None
    return "tpu" if platform == "tpu" and has_tpu_kernel(head_dim) else None


def decode_weights(graphdef: Any, params: Any, *, kernels: str | None = None) -> DecodeWeights:
    """Returns the weights of the unrolled decoder, from a policy's parameters; its attention is kernels for a "gpu" or
    a "tpu", or XLA's."""
    model: Qwen3 = nnx.merge(graphdef, params)
    config, dtype, lora = model.config, model.dtype, model.layers.lora
    params = params if lora is None else merge_adapters(params, lora)
    layers = {name: array.astype(dtype) for name, array in params["layers"].items()}
    K, E = config.num_key_value_heads, config.head_dim

    def by_head(query: str, key: str, value: str) -> jax.Array:
        """Joins projections or biases [L, (D,) heads, E] to [L, (D,) K, W, E]."""
        parts = [layers[name] for name in (query, key, value)]
        return jnp.concatenate([part.reshape(*part.shape[:-2], K, -1, E) for part in parts], axis=-2)

    D = config.hidden_size
    qkv_LDM = by_head("query_LDHE", "key_LDKE", "value_LDKE").reshape(config.num_hidden_layers, D, -1)
    biases = by_head("query_bias_LHE", "key_bias_LKE", "value_bias_LKE") if config.attention_bias else None
    output = layers["output_LHED"].reshape(config.num_hidden_layers, K, -1, E, D)
    unrolled = tuple(
        DecodeLayer(
            attention_norm_D=layers["attention_norm_LD"][i],
            qkv_DM=qkv_LDM[i],
            qkv_bias_KWE=None if biases is None else biases[i],
            query_norm_E=layers["query_norm_LE"][i],
            key_norm_E=layers["key_norm_LE"][i],
            output_KQED=output[i],
            output_bias_D=layers["output_bias_LD"][i] if config.attention_bias else None,
            mlp_norm_D=layers["mlp_norm_LD"][i],
            gate_DF=layers["gate_LDF"][i],
            up_DF=layers["up_LDF"][i],
            down_FD=layers["down_LFD"][i],
        )
        for i in range(config.num_hidden_layers)
    )
    unembed = None if config.tie_word_embeddings else params["unembed_VD"].astype(dtype)
    embed, norm = params["embed_VD"].astype(dtype), params["norm_D"].astype(dtype)
    return DecodeWeights(config, kernels, model.layout, embed, unembed, norm, unrolled)


class UnrolledPrefix(NamedTuple):
    """The state of prompts that their completions attend to."""

    layers: tuple[LayerKeyValues, ...]
    lengths_P: jax.Array
    last_PD: jax.Array


class UnrolledPast(NamedTuple):
    """The cache of growing completions; the first `length` positions are filled."""

    layers: tuple[LayerKeyValues, ...]
    length: jax.Array


class UnrolledDecoder:
    """Runs a network from `DecodeWeights`, one layer after the other in one program.

    Args:
      weights: as `decode_weights` returns them.
      interpret: run the kernels without their device, slowly.
    """

    shrinks = False  # the weights are read for one row as for all, and attention reads live rows alone

    def __init__(self, weights: DecodeWeights, *, interpret: bool = False) -> None:
        self._weights, self._config, self.layout = weights, weights.config, weights.layout
        self._prompt_attention = choose_attention(weights.layout, weights.config)
        self._windows = weights.config.windows or (None,) * weights.config.num_hidden_layers
        self._attend = partial(decode_attention, layout=weights.layout, kernel=weights.kernels, interpret=interpret)

    def start(self, prompt_PS: jax.Array, lengths_P: jax.Array, G: int, T: int) -> tuple[UnrolledPrefix, UnrolledPast]:
        with products_in(self._weights.embed_VD.dtype):
            return self._prefill(prompt_PS, lengths_P, G, T)

    def step(
        self, token_PG: jax.Array, prefix: UnrolledPrefix, past: UnrolledPast, live_PG: jax.Array
    ) -> tuple[jax.Array, UnrolledPast]:
        with products_in(self._weights.embed_VD.dtype):
            return self._decode(token_PG, prefix, past, live_PG)

    @jax.named_scope("head")
    def logits(self, hidden: jax.Array) -> jax.Array:
        table_VD = self._weights.embed_VD if self._weights.unembed_VD is None else self._weights.unembed_VD
        with products_in(table_VD.dtype):
            return jnp.einsum("...d,vd->...v", hidden, table_VD, preferred_element_type=jnp.float32)

    def _prefill(
        self, prompt_PS: jax.Array, lengths_P: jax.Array, G: int, T: int
    ) -> tuple[UnrolledPrefix, UnrolledPast]:
        P, S = prompt_PS.shape
        rotary = rotary_angles(jnp.broadcast_to(jnp.arange(S), (P, 1, S)), self._config)
        x_P1SD = self._embed(prompt_PS[:, None])
        prefix, past = [], []
        for weights, window in zip(self._weights.layers, self._windows, strict=True):
            qkv = self._projections(x_P1SD, weights)
            out, keys_values = self._attend_in_prompt(qkv, weights, rotary, window)
            x_P1SD = self._rest_of_layer(x_P1SD, out, weights)
            prefix.append(LayerKeyValues(*map(self._in_slabs, keys_values)))
            K, E = keys_values.keys.shape[1], keys_values.keys.shape[-1]
            axes = ("prompt", "kv_heads", "group", None, None)
            empty = jnp.zeros((P, K, G, T, E), keys_values.keys.dtype)
            empty = constrain(self.layout, self._in_slabs(empty), *axes)
            past.append(LayerKeyValues(empty, empty))
        hidden_PSD = self._norm(x_P1SD, self._weights.norm_D)[:, 0]
        state = UnrolledPrefix(tuple(prefix), lengths_P, last_hidden(hidden_PSD, lengths_P))
        return state, UnrolledPast(tuple(past), jnp.zeros((), jnp.int32))

    def _in_slabs(self, array_TE: jax.Array) -> jax.Array:
        """Adds positions [..., T, E] to those of a whole slab, which a TPU's kernel reads and writes at a time."""
        if self._weights.kernels != "tpu":
            return array_TE
        missing = padded_positions(array_TE.shape[-2]) - array_TE.shape[-2]
        return jnp.pad(array_TE, [(0, 0)] * (array_TE.ndim - 2) + [(0, missing), (0, 0)])

    def _decode(
        self, token_PG: jax.Array, prefix: UnrolledPrefix, past: UnrolledPast, live_PG: jax.Array
    ) -> tuple[jax.Array, UnrolledPast]:
        position_PG1 = jnp.broadcast_to((prefix.lengths_P + past.length)[:, None, None], (*token_PG.shape, 1))
        cos, sin = (angle[:, :, 0, 0] for angle in rotary_angles(position_PG1, self._config))
        token = Token(cos, sin, prefix.lengths_P, past.length, live_PG)
        x_PG1D = self._embed(token_PG[..., None])
        caches = []
        layers = zip(self._weights.layers, prefix.layers, past.layers, self._windows, strict=True)
        for weights, prompt, cache, window in layers:
            qkv_PGKWE = self._projections(x_PG1D, weights)[:, :, 0]
            norms = HeadNorms(weights.query_norm_E, weights.key_norm_E, self._config.rms_norm_eps)
            with jax.named_scope("attention"):
                out_PGKQE, cache = self._attend(qkv_PGKWE, norms, token, prompt, cache, window=window)
            x_PG1D = self._rest_of_layer(x_PG1D, out_PGKQE[:, :, None], weights)
            caches.append(cache)
        hidden_PGD = self._norm(x_PG1D, self._weights.norm_D)[:, :, 0]
        return hidden_PGD, UnrolledPast(tuple(caches), past.length + 1)

    @jax.named_scope("embed")
    def _embed(self, tokens_PGT: jax.Array) -> jax.Array:
        x_PGTD = jnp.take(self._weights.embed_VD, tokens_PGT, axis=0)
        return constrain(self.layout, x_PGTD, "prompt", "group", "sequence", "width")

    def _norm(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, self._config.rms_norm_eps)

    def _projections(self, x_PGTD: jax.Array, weights: DecodeLayer) -> jax.Array:
        """Returns queries, keys and values [P, G, T, K, W, E] of a layer."""
        y_PGTD = self._norm(x_PGTD, weights.attention_norm_D)
        with jax.named_scope("qkv"):
            K, E = self._config.num_key_value_heads, self._config.head_dim
            qkv = (y_PGTD @ weights.qkv_DM).reshape(*y_PGTD.shape[:3], K, -1, E)
            qkv = qkv if weights.qkv_bias_KWE is None else qkv + weights.qkv_bias_KWE
        return constrain(self.layout, qkv, "prompt", "group", "sequence", "kv_heads", None, None)

    @jax.named_scope("attention")
    def _attend_in_prompt(
        self, qkv: jax.Array, weights: DecodeLayer, rotary: tuple[jax.Array, jax.Array], window: int | None
    ) -> tuple[jax.Array, LayerKeyValues]:
        """Attends within prompts; returns [P, 1, S, K, Q, E], and their keys and values."""
        cos, sin = (angle[..., None, :] for angle in rotary)  # over K and W
        query = rotate(self._norm(qkv[..., :-2, :], weights.query_norm_E), (cos, sin))
        key = rotate(self._norm(qkv[..., -2:-1, :], weights.key_norm_E), (cos, sin))
        new = KeyValues(key[..., 0, :], qkv[..., -1, :])
        keys, values = heads_first(new)
        if self._prompt_attention != "xla":
            P, G, S, K, Q, E = query.shape
            options: Any = {"window": window, "layout": self.layout, "kernels": self._prompt_attention}
            out = flash_attention(query.reshape(P, G, S, K * Q, E), new, **options).reshape(query.shape)
        else:
            out = group_attention(query, KeyValues(keys, values), window=window)
        return out, LayerKeyValues(keys[:, :, 0], values[:, :, 0])

    @jax.named_scope("layers")
    def _rest_of_layer(self, x_PGTD: jax.Array, out_PGTKQE: jax.Array, weights: DecodeLayer) -> jax.Array:
        """Adds the attention's output, and then the feed-forward network, to the residual stream."""
        axes = ("prompt", "group", "sequence", "width")
        with jax.named_scope("output"):
            width = weights.output_KQED.shape[-1]  # heads as one axis: with three, XLA transposes what it contracts
            y_PGTD = out_PGTKQE.reshape(*x_PGTD.shape[:3], -1) @ weights.output_KQED.reshape(-1, width)
            y_PGTD = y_PGTD if weights.output_bias_D is None else y_PGTD + weights.output_bias_D
        x_PGTD = constrain(self.layout, x_PGTD + y_PGTD, *axes)
        y_PGTD = self._norm(x_PGTD, weights.mlp_norm_D)
        with jax.named_scope("gate"):
            gate_PGTF = y_PGTD @ weights.gate_DF
        with jax.named_scope("up"):
            up_PGTF = y_PGTD @ weights.up_DF
        hidden_PGTF = ACTIVATIONS[self._config.hidden_act](gate_PGTF) * up_PGTF
        with jax.named_scope("down"):
            y_PGTD = jnp.einsum("pgtf,fd->pgtd", hidden_PGTF, weights.down_FD)
        return constrain(self.layout, x_PGTD + y_PGTD, *axes)


def make_decoder(params: Any, graphdef: Any) -> Decoder:
    """Returns the decoder of a policy's parameters, or of the `DecodeWeights` that were made of them."""
    if not isinstance(params, DecodeWeights):
        return ScannedDecoder(nnx.merge(graphdef, params))
    return UnrolledDecoder(params)
