"""The Qwen3 decoder with a group axis: the prompt is computed once, its G completions see its keys and values.

    hidden_PSD, prefix = model.prefill(prompt_PS, lengths_P)
    hidden_PGTD, new   = model.extend(tokens_PGT, prefix)
    hidden_PGTD        = model.predict(prompt_PS, lengths_P, tokens_PGT)     # hidden[t] predicts token t

Prompts and completions are right-padded; lengths, not token values, tell where a prompt ends. A completion needs no
padding mask: its padding follows its tokens, and causal attention never looks ahead. A row may also pack several
completions of its prompt: `offset_PGT` is then each token's index in its completion.
The layers are stacked on a leading L axis and scanned, so compile time does not grow with depth.
Left out on purpose: dropout (Qwen3 has none), mixture of experts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gopo_jax import token_logprobs
from models.attention import KeyValues, Past, PrefixKeyValues, group_attention, heads_first, prefix_key_values
from models.config import Qwen3Config
from models.flash_attention import choose_attention, flash_attention
from models.lora import Lora, adapter_names, add_adapters
from models.precision import products_in
from models.rotary import rotary_frequencies, yarn_frequencies  # noqa: F401  both can be imported from here
from models.sharding import Layout, constrain, gather, platform_of, total_shards

# Checkpoint policies: which values of a layer's forward pass are saved for the backward pass, not recomputed.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # autodiff's own choice; a checkpoint that saves everything is 2x slower on a CPU
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# config.hidden_act, under Hugging Face's names
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **dict.fromkeys(("silu", "swish"), jax.nn.silu),
    **dict.fromkeys(("gelu", "gelu_python"), partial(jax.nn.gelu, approximate=False)),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), jax.nn.gelu),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}


class Prefix(NamedTuple):
    """The state of prompts that their completions attend to."""

    kv: PrefixKeyValues  # of all layers
    lengths_P: jax.Array
    last_PD: jax.Array  # hidden state of the last prompt token; it predicts the first completion token


class Layers(nnx.Module):
    """The parameters of all L layers, stacked; `__call__` runs one layer, on one slice of them."""

    def __init__(
        self, config: Qwen3Config, rngs: nnx.Rngs, param_dtype: Any, layout: Layout | None, lora: Lora | None
    ) -> None:
        self.config, self.layout, self.lora = config, layout, lora
        self.attention = choose_attention(layout, config)
        L, D, F, E = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads

        def weight(shape: tuple[int, ...], *axes: str) -> nnx.Param:
            value = config.initializer_range * jax.random.normal(rngs.params(), (L, *shape), param_dtype)
            return nnx.Param(value, axes=("layers", *axes))

        def constant(value: float, shape: tuple[int, ...], *axes: str) -> nnx.Param:
            return nnx.Param(jnp.full((L, *shape), value, param_dtype), axes=("layers", *axes))

        self.attention_norm_LD = constant(1, (D,), "width")
        self.query_LDHE = weight((D, H, E), "embed", "heads", "head_dim")
        self.key_LDKE = weight((D, K, E), "embed", "kv_heads", "head_dim")
        self.value_LDKE = weight((D, K, E), "embed", "kv_heads", "head_dim")
        self.query_norm_LE = constant(1, (E,), "head_dim")
        self.key_norm_LE = constant(1, (E,), "head_dim")
        self.output_LHED = weight((H, E, D), "heads", "head_dim", "embed")
        if config.attention_bias:
            self.query_bias_LHE = constant(0, (H, E), "heads", "head_dim")
            self.key_bias_LKE = constant(0, (K, E), "kv_heads", "head_dim")
            self.value_bias_LKE = constant(0, (K, E), "kv_heads", "head_dim")
            self.output_bias_LD = constant(0, (D,), "width")
        self.mlp_norm_LD = constant(1, (D,), "width")
        self.gate_LDF = weight((D, F), "embed", "mlp")
        self.up_LDF = weight((D, F), "embed", "mlp")
        self.down_LFD = weight((F, D), "mlp", "embed")
        add_adapters(self, lora, rngs)

    def __call__(
        self,
        x_PGTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        *,
        prompt: KeyValues | None = None,
        **attention: Any,
    ) -> tuple[jax.Array, KeyValues]:
        """Returns the layer's output, and the keys and values of its positions.

        `prompt` has the keys and values of the group's prompt, if this pass computes them too, else `prefix` has them
        (see `group_attention`, whose the other arguments are).
        """
        config, dtype = self.config, x_PGTD.dtype
        multiply = partial(linear, flatten=total_shards(self.layout, "group", "sequence") == 1)

        def project(x: jax.Array, name: str, inputs: int = 1) -> jax.Array:
            with jax.named_scope(name.partition("_")[0]):  # "gate_LDF": gate; `train plan --top` prints it
                y = multiply(x, getattr(self, name)[...].astype(dtype), inputs)
                if (adapters := adapter_names(self.lora).get(name)) is None:
                    return y
                assert self.lora is not None
                a, b = (getattr(self, part)[...].astype(dtype) for part in adapters)
                return y + self.lora.scale * multiply(multiply(x, a, inputs), b)

        y_PGTD = rms_norm(x_PGTD, self.attention_norm_LD, config.rms_norm_eps)
        query_PGTHE = project(y_PGTD, "query_LDHE")
        key_PGTKE = project(y_PGTD, "key_LDKE")
        value_PGTKE = project(y_PGTD, "value_LDKE")
        if config.attention_bias:
            query_PGTHE += self.query_bias_LHE[...].astype(dtype)
            key_PGTKE += self.key_bias_LKE[...].astype(dtype)
            value_PGTKE += self.value_bias_LKE[...].astype(dtype)
        query_PGTHE = rotate(rms_norm(query_PGTHE, self.query_norm_LE, config.rms_norm_eps), rotary)
        key_PGTKE = rotate(rms_norm(key_PGTKE, self.key_norm_LE, config.rms_norm_eps), rotary)
        query_PGTHE = constrain(self.layout, query_PGTHE, "prompt", "group", "sequence", "heads", None)
        new_PGTKE = KeyValues(key_PGTKE, value_PGTKE)
        out_PGTHE = self._attend(query_PGTHE, new_PGTKE, prompt, **attention)
        y_PGTD = project(out_PGTHE, "output_LHED", inputs=2)
        if config.attention_bias:
            y_PGTD += self.output_bias_LD[...].astype(dtype)
        x_PGTD = constrain(self.layout, x_PGTD + y_PGTD, "prompt", "group", "sequence", "width")

        y_PGTD = rms_norm(x_PGTD, self.mlp_norm_LD, config.rms_norm_eps)
        gate_PGTF = ACTIVATIONS[config.hidden_act](project(y_PGTD, "gate_LDF"))
        hidden_PGTF = gate_PGTF * project(y_PGTD, "up_LDF")
        hidden_PGTF = constrain(self.layout, hidden_PGTF, "prompt", "group", "sequence", "mlp")
        x_PGTD = x_PGTD + project(hidden_PGTF, "down_LFD")
        return constrain(self.layout, x_PGTD, "prompt", "group", "sequence", "width"), new_PGTKE

    def _attend(
        self,
        query_PGTHE: jax.Array,
        new_PGTKE: KeyValues,
        prompt: KeyValues | None,
        *,
        prefix: PrefixKeyValues | None = None,
        past: Past | None = None,
        layer: jax.typing.ArrayLike = 0,
        prefix_lengths_P: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Attention by kernels where they can, else by XLA, [P, G, T, H, E]."""
        if self.attention != "xla" and prefix is None and past is None:
            options |= {"prompt": prompt, "prompt_lengths_P": prefix_lengths_P, "layout": self.layout}
            return flash_attention(query_PGTHE, new_PGTKE, kernels=self.attention, **options)
        P, G, T, H, E = query_PGTHE.shape
        query_PGTKQE = query_PGTHE.reshape(P, G, T, self.config.num_key_value_heads, -1, E)
        prefix = prefix if prompt is None else prefix_key_values(prompt)
        options |= {"prefix": prefix, "prefix_lengths_P": prefix_lengths_P, "past": past, "layer": layer}
        return group_attention(query_PGTKQE, heads_first(new_PGTKE), **options).reshape(P, G, T, H, E)


class Backbone(nnx.Module):
    """Embedding, layers and final norm, without a head.

    `dtype` is the compute dtype (see `models.precision`), `param_dtype` that of stored parameters, `remat` a key of
    `REMAT`.
    """

    def __init__(
        self,
        config: Qwen3Config,
        rngs: nnx.Rngs,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        layout: Layout | None = None,
        remat: str = "full",
        lora: Lora | None = None,
    ) -> None:
        self.config, self.dtype, self.layout, self.remat = config, jnp.dtype(dtype), layout, remat
        table = config.initializer_range * jax.random.normal(
            rngs.params(), (config.vocab_size, config.hidden_size), param_dtype
        )
        self.embed_VD = nnx.Param(table, axes=("vocab", "embed"))
        self.layers = Layers(config, rngs, param_dtype, layout, lora)
        self.norm_D = nnx.Param(jnp.ones(config.hidden_size, param_dtype), axes=("width",))

    def prefill(self, prompt_PS: jax.Array, lengths_P: jax.Array) -> tuple[jax.Array, Prefix]:
        """Returns hidden states of right-padded prompts, and the prefix for their completions."""
        hidden_P1SD, new = self._forward(prompt_PS[:, None], jnp.zeros_like(lengths_P)[:, None, None])
        hidden_PSD, new = hidden_P1SD[:, 0], KeyValues(*(part[:, :, 0] for part in new))
        return hidden_PSD, Prefix(prefix_key_values(new), lengths_P, last_hidden(hidden_PSD, lengths_P))

    def extend(
        self,
        tokens_PGT: jax.Array,
        prefix: Prefix,
        *,
        past: Past | None = None,
        offset_PGT: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Returns hidden states of T further tokens of each completion, and their keys and values.

        `past` caches the keys and values of the completion's earlier tokens; `offset_PGT` is for rows that pack several
        completions (see `group_attention`).
        """
        start_P11 = (prefix.lengths_P + (past.length if past is not None else 0))[:, None, None]
        hidden, new = self._forward(tokens_PGT, start_P11, prefix=prefix, past=past, offset_PGT=offset_PGT)
        return hidden, heads_first(new)

    def prefill_and_extend(
        self, prompt_PS: jax.Array, lengths_P: jax.Array, tokens_PGT: jax.Array, offset_PGT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns hidden states of prompts [P, S, D] and of their completions [P, G, T, D].

        One pass over the layers does both, so sharded parameters are gathered once.
        """
        table_VD = self.gathered_table(self.embed_VD)
        prompt, prompt_rotary = self._embed(table_VD, prompt_PS[:, None], jnp.zeros_like(lengths_P)[:, None, None])
        completion, rotary = self._embed(table_VD, tokens_PGT, lengths_P[:, None, None], offset_PGT)
        options = {"prefix_lengths_P": lengths_P, "offset_PGT": offset_PGT}

        def step(layer: Callable[..., Any], x: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
            prompt, new = layer(x[0], prompt_rotary)
            completion, _ = layer(x[1], rotary, prompt=KeyValues(*(part[:, 0] for part in new)), **options)
            return (prompt, completion), None

        (prompt, completion), _ = self._scan_layers(step, (prompt, completion), None)
        return self._final_norm(prompt)[:, 0], self._final_norm(completion)

    @jax.named_scope("predict")
    def predict(
        self, prompt_PS: jax.Array, lengths_P: jax.Array, tokens_PGT: jax.Array, offset_PGT: jax.Array | None = None
    ) -> jax.Array:
        """Returns the hidden state that predicts each completion token, [P, G, T, D].

        The last token predicts nothing. It is left out on CPUs; elsewhere it is computed, because T - 1 positions make
        products of sizes that no tile divides.
        """
        P, G, T = tokens_PGT.shape
        if T == 1:
            last_PD = self.prefill(prompt_PS, lengths_P)[1].last_PD
            return jnp.broadcast_to(last_PD[:, None, None], (P, G, 1, last_PD.shape[-1]))
        end = -1 if platform_of(self.layout) == "cpu" else None
        inputs_PGT = None if offset_PGT is None else offset_PGT[..., :end]
        hidden_PSD, hidden_PGTD = self.prefill_and_extend(prompt_PS, lengths_P, tokens_PGT[..., :end], inputs_PGT)
        last_P11D = last_hidden(hidden_PSD, lengths_P)[:, None, None]
        first_PG1D = jnp.broadcast_to(last_P11D, (P, G, 1, last_P11D.shape[-1]))
        hidden_PGTD = jnp.concatenate([first_PG1D, hidden_PGTD[:, :, : T - 1]], axis=2)
        return hidden_PGTD if offset_PGT is None else jnp.where(offset_PGT[..., None] == 0, first_PG1D, hidden_PGTD)

    def hidden(self, tokens_BS: jax.Array, offset_BS: jax.Array | None = None) -> jax.Array:
        """Returns hidden states [B, S, D] of right-padded rows; `offset_BS` is for rows that pack several sequences."""
        offset_B1S = None if offset_BS is None else offset_BS[:, None]
        start_B11 = jnp.zeros((len(tokens_BS), 1, 1), jnp.int32)
        return self._forward(tokens_BS[:, None], start_B11, offset_PGT=offset_B1S)[0][:, 0]

    def gathered_table(self, table_VD: nnx.Param) -> jax.Array:
        """All-gathers the table over D once, not for every chunk of tokens that reads it.

        From a table sharded over D the compiler would look up all tokens on all devices, and store them there. The
        table is rounded to the compute dtype before it is gathered and float32 afterwards, so that the gradients of
        many tokens are summed in float32: in bfloat16 a frequent token's sum would stall at 256 times its summands.
        """
        rounded = table_VD[...].astype(self.dtype).astype(jnp.float32)
        return gather(self.layout, rounded, self.dtype, ("vocab", "embed"))

    def _forward(
        self,
        tokens_PGT: jax.Array,
        start_P11: jax.Array,
        *,
        prefix: Prefix | None = None,
        past: Past | None = None,
        offset_PGT: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        x_PGTD, rotary = self._embed(self.gathered_table(self.embed_VD), tokens_PGT, start_P11, offset_PGT)
        lengths_P = prefix.lengths_P if prefix is not None else None
        options = {"prefix_lengths_P": lengths_P, "past": past, "offset_PGT": offset_PGT}

        def step(layer: Callable[..., Any], x_PGTD: jax.Array, kv: PrefixKeyValues | None) -> tuple[Any, KeyValues]:
            return layer(x_PGTD, rotary, prefix=kv, **options)

        x_PGTD, new = self._scan_layers(step, x_PGTD, prefix.kv if prefix is not None else None)
        return self._final_norm(x_PGTD), new

    @jax.named_scope("embed")
    def _embed(
        self, table_VD: jax.Array, tokens_PGT: jax.Array, start_P11: jax.Array, offset_PGT: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the first layer's input, and cosines and sines of the rotary angles of its positions."""
        positions_PGT = start_P11 + (jnp.arange(tokens_PGT.shape[-1]) if offset_PGT is None else offset_PGT)
        x_PGTD = jnp.take(table_VD, tokens_PGT, axis=0).astype(self.dtype)
        x_PGTD = constrain(self.layout, x_PGTD, "prompt", "group", "sequence", "width")
        return x_PGTD, rotary_angles(positions_PGT, self.config)

    def _scan_layers(self, step: Callable[..., Any], x: Any, inputs_L: Any) -> tuple[Any, Any]:
        """Scans x, output = step(layer, x, inputs) over the layers; returns x and the stacked outputs."""
        graphdef, params_L = nnx.split(self.layers)
        policy = REMAT[self.remat]

        def body(x: Any, slices: Any) -> tuple[Any, Any]:
            params, number, window, inputs = slices
            if policy is not None:  # else the gathered parameters of all layers would be saved for the backward pass
                params = gather_layer(self.layout, params, self.dtype)
            return step(partial(nnx.merge(graphdef, params), layer=number, window=window), x, inputs)

        config, unlimited = self.config, np.iinfo(np.int32).max
        windows_L = None if config.windows is None else jnp.array([w or unlimited for w in config.windows], jnp.int32)
        slices = (params_L, jnp.arange(config.num_hidden_layers), windows_L, inputs_L)
        with products_in(self.dtype), jax.named_scope("layers"):
            return jax.lax.scan(jax.checkpoint(body, policy=policy) if policy else body, x, slices)

    def _final_norm(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.norm_D, self.config.rms_norm_eps)


def gather_layer(layout: Layout | None, params: Any, dtype: Any) -> Any:
    """Gathers the parameters of one layer once (see `models.sharding.gather`), however often its products use them."""

    def gather_parameter(parameter: nnx.Param) -> nnx.Variable:
        _, *axes = parameter.get_metadata()["axes"]  # without that of the layers
        return parameter.replace(gather(layout, parameter[...], dtype, axes))

    return jax.tree.map(gather_parameter, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))


def last_hidden(hidden_PSD: jax.Array, lengths_P: jax.Array) -> jax.Array:
    """Returns the hidden state [P, D] of each prompt's last real token."""
    return jnp.take_along_axis(hidden_PSD, (lengths_P - 1)[:, None, None], axis=1)[:, 0]


class Qwen3(Backbone):
    """A policy: the backbone with an output embedding, which gives logits of the next token."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(config, rngs, **options)
        if not config.tie_word_embeddings:
            shape, dtype = self.embed_VD[...].shape, self.embed_VD[...].dtype
            value = config.initializer_range * jax.random.normal(rngs.params(), shape, dtype)
            self.unembed_VD = nnx.Param(value, axes=("vocab", "embed"))

    @property
    def head_VD(self) -> jax.Array:
        """The output embedding, float32 [V, D], rounded to the compute dtype."""
        return self.gathered_table(self.embed_VD if self.config.tie_word_embeddings else self.unembed_VD)

    @jax.named_scope("head")
    def logprobs(self, hidden: jax.Array, tokens: jax.Array, *, chunk_tokens: int | None = None, **options: Any) -> Any:
        """Returns `gopo_jax.token_logprobs` of tokens [P, ..., T] given hidden states [P, ..., T, D].

        Each device has logits of at most `chunk_tokens` tokens at a time (but of one token per row at least); None: of
        1024 on CPUs, of 4096 elsewhere, where every chunk reads and writes the head and its gradient once more. Devices
        with different prompts use copies of the head, so the gradients are summed once, not after every chunk.
        """
        rows = math.prod(tokens.shape[:-1]) // total_shards(self.layout, "prompt", *["group"] * (tokens.ndim == 3))
        devices = total_shards(self.layout, "prompt")
        if chunk_tokens is None:
            chunk_tokens = 1024 if platform_of(self.layout) == "cpu" else 4096

        def logprobs_of(hidden: jax.Array, head_VD: jax.Array, tokens: jax.Array) -> Any:
            with products_in(self.dtype):
                return token_logprobs(hidden, head_VD, tokens, chunk=max(chunk_tokens // rows, 1), **options)

        if devices == 1:
            return logprobs_of(hidden, self.head_VD, tokens)
        heads = jnp.broadcast_to(self.head_VD, (devices, *self.head_VD.shape))
        heads = constrain(self.layout, heads, "prompt", "vocab", "width")
        by_device = [array.reshape(devices, -1, *array.shape[1:]) for array in (hidden, tokens)]
        logprobs = jax.vmap(logprobs_of)(by_device[0], heads, by_device[1])
        return jax.tree.map(lambda array: array.reshape(tokens.shape), logprobs)

    @jax.named_scope("head")
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., V] of hidden states [..., D]."""
        head_VD = self.head_VD.astype(hidden.dtype)
        with products_in(hidden.dtype):
            return jnp.einsum("...d,vd->...v", hidden, head_VD, preferred_element_type=jnp.float32)

    def __call__(self, tokens_BS: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Returns float32 logits [B, S, V] of right-padded sequences; from `lengths_B` on they mean nothing."""
        del lengths_B  # causal attention never sees the padding behind a token
        return self.logits(self.hidden(tokens_BS))


def linear(x: jax.Array, weight: jax.Array, inputs: int = 1, *, flatten: bool = True) -> jax.Array:
    """Contracts the last `inputs` axes of x with the first axes of the weight.

    Args:
      flatten: whether to multiply two matrices, with all other axes of x as one. For the gradient of a contraction over
        several axes, XLA on a CPU would make a transposed copy of the activations, which takes longer than the product.
        But an axis behind the first that is split over devices cannot be merged: its parts would be gathered.
    """
    if not flatten:
        return jnp.tensordot(x, weight, inputs)
    rows, columns = x.shape[: x.ndim - inputs], weight.shape[inputs:]
    width = math.prod(weight.shape[:inputs])
    return (x.reshape(-1, width) @ weight.reshape(width, -1)).reshape(*rows, *columns)


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: nnx.Param | jax.Array, epsilon: float) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + epsilon) * scale over the last axis; the statistics are float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return x32.astype(x.dtype) * scale[...].astype(x.dtype)


def rotary_angles(positions_PGT: jax.Array, config: Qwen3Config) -> tuple[jax.Array, jax.Array]:
    """Returns float32 cosines and sines [P, G, T, 1, E/2] of position * frequency, times the attention factor."""
    frequencies, factor = rotary_frequencies(config)
    angles = positions_PGT[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


@jax.named_scope("rotary")
def rotate(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Applies rotary embedding to [..., heads, E]; the two halves of E form the pairs, as in Hugging Face."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
