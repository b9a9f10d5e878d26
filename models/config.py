"""The config of a Qwen3, from and to a Hugging Face `config.json`.

Every field of such a file is honoured, or refused by name where this code would compute something else.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLICY, REWARD_MODEL = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"
FULL, SLIDING = "full_attention", "sliding_attention"
DTYPES = ("float32", "bfloat16", "float16")  # of stored weights
ACTIVATION_NAMES = (  # Hugging Face's names; their functions are models.qwen3.ACTIVATIONS
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "sigmoid", "tanh", "linear"),
)

# Fields that do not change the network's computation.
_INERT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type", "_attn_implementation", "attn_implementation"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
    *("is_decoder", "add_cross_attention", "pruned_heads", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
    *("tokenizer_class", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash"),
    *("name_or_path", "prefix", "finetuning_task", "task_specific_params", "keys_to_ignore_at_inference"),
    *("tf_legacy_loss", "gradient_checkpointing", "model_max_length", "pretraining_tp", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "sep_token_id", "unsloth_fixed", "unsloth_version"),
    # settings of transformers 4's generation, which it stored here
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}
_LARGEST_NUMBER = (2 - 2**-23) * 2.0**127  # of float32
_LARGEST_SIZE = 2**31 - 1  # of an axis
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies beyond the trained length, under Hugging Face's names.

    linear divides every frequency by `factor`. yarn (Peng et al., https://arxiv.org/abs/2309.00071) divides those of
    slow rotations, not those of fast ones, with a ramp between, and scales cosines and sines by `attention_factor`.
    """

    rope_type: str  # linear or yarn
    factor: float  # how many times the trained length is stretched
    # yarn: the trained length in tokens; default: max_position_embeddings
    original_max_position_embeddings: int | None = None
    # yarn: scales cosines and sines; default: from factor, mscale and mscale_all_dim
    attention_factor: float | None = None
    # yarn: pairs with more rotations in the trained length keep their frequency; default: 32
    beta_fast: float | None = None
    beta_slow: float | None = None  # yarn: pairs with fewer rotations have it divided by factor; default: 1
    mscale: float | None = None  # yarn: over mscale_all_dim, what attention_factor is computed from; null: not used
    mscale_all_dim: float | None = None  # yarn: see mscale; null: not used
    truncate: bool = True  # yarn: the ramp between the two begins and ends at whole pairs

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "yarn"):
            raise ValueError(f"rope_type: expected 'linear' or 'yarn', got {self.rope_type!r}")
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and (value is not None or name == "factor"):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
            if value is not None:
                _as_float(self, name)
        original = self.original_max_position_embeddings
        if original is not None and not _is_size(original):
            raise ValueError(
                f"original_max_position_embeddings: expected a whole number of at least 1, got {original!r}"
            )
        if not isinstance(self.truncate, bool):
            raise ValueError(f"truncate: expected true or false, got {self.truncate!r}")


@dataclass(frozen=True)
class Qwen3Config:
    """Dimensions and constants of a dense Qwen3, under Hugging Face's names."""

    vocab_size: int  # rows of the embedding table
    hidden_size: int  # model width (D)
    intermediate_size: int  # width of the MLP (F)
    num_hidden_layers: int  # layers (L)
    num_attention_heads: int  # query heads (H)
    num_key_value_heads: int  # key and value heads (K), each shared by H / K query heads
    head_dim: int  # width of a head (E)
    hidden_act: str = "silu"  # activation of the MLP, by Hugging Face's name
    rms_norm_eps: float = 1e-6  # added to the mean square in every normalization
    rope_theta: float = 1_000_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # for texts beyond the trained length; null: none
    tie_word_embeddings: bool = False  # the embedding table is the output projection too
    attention_bias: bool = False  # attention's four projections have biases
    sliding_window: int | None = None  # positions that one sees, itself included; null: all before it
    # full_attention or sliding_attention, for each layer; null: full_attention in all
    layer_types: tuple[str, ...] | None = None
    max_position_embeddings: int = 40_960  # tokens that the network is made for; nothing is cut at it
    initializer_range: float = 0.02  # standard deviation of random weights
    architecture: str = POLICY  # Qwen3ForCausalLM, or Qwen3ForSequenceClassification: a reward model
    pad_token_id: int | None = None  # carried along for transformers, which needs it to batch a reward model's texts
    bos_token_id: int | None = None  # carried along for other programs
    eos_token_id: int | tuple[int, ...] | None = None  # carried along for other programs

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if not _is_size(getattr(self, name)):
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
            if name != "max_position_embeddings" and getattr(self, name) > _LARGEST_SIZE:
                raise ValueError(
                    f"{name}: expected a whole number of at most {_LARGEST_SIZE}, got {getattr(self, name)}"
                )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
            _as_float(self, name)
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta: expected a number above 0, got {self.rope_theta!r}")
        for name in ("tie_word_embeddings", "attention_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads = {self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary pairs), got {self.head_dim}")
        if self.hidden_act not in ACTIVATION_NAMES:
            raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATION_NAMES)}, got {self.hidden_act!r}")
        if self.architecture not in (POLICY, REWARD_MODEL):
            raise ValueError(f"architecture: expected {POLICY} or {REWARD_MODEL}, got {self.architecture}")
        types = self.layer_types
        if types is not None and (len(types) != self.num_hidden_layers or not set(types) <= {FULL, SLIDING}):
            raise ValueError(
                f"layer_types: expected num_hidden_layers = {self.num_hidden_layers} entries, each {FULL} or "
                f"{SLIDING}, got {len(types)}: {', '.join(sorted(set(map(str, types))))}"
            )
        if SLIDING in (types or ()) and not _is_size(self.sliding_window):
            raise ValueError(
                f"sliding_window: expected a whole number of at least 1, since layer_types has {SLIDING}, got "
                f"{self.sliding_window!r}"
            )

    @property
    def is_reward_model(self) -> bool:
        """Whether the network has a scalar head instead of logits."""
        return self.architecture == REWARD_MODEL

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """The window of each layer, in positions with its own; None = unlimited, for a layer or for all layers."""
        if SLIDING not in (self.layer_types or ()):
            return None
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types or ())

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "Qwen3Config":
        """Reads the config from a Hugging Face dictionary; `source` is its name in error messages.

        Raises:
          ValueError: another model type or architecture, a missing field, or a field whose value is not
            implemented; the message names the field.
        """
        # null = not given, except for sliding_window, where null = no window and not given = 4096
        hf = {name: value for name, value in hf.items() if value is not None or name == "sliding_window"}

        def refuse(field: str, value: object, supported: str) -> None:
            raise ValueError(f"{source}: {field} = {value!r} is not supported; expected {supported}")

        if (model_type := hf.pop("model_type", None)) != "qwen3":
            refuse("model_type", model_type, "'qwen3' (dense Qwen3; no mixture of experts, no other family)")
        names = hf.get("architectures") or [POLICY]
        architecture = names[0] if isinstance(names, list) else names
        if architecture not in (POLICY, REWARD_MODEL):
            refuse("architectures", architecture, f"{POLICY} or {REWARD_MODEL}")
        if architecture == REWARD_MODEL:
            for field, labels in (("id2label", hf.get("id2label") or {0: ""}), ("num_labels", hf.get("num_labels", 1))):
                if (len(labels) if isinstance(labels, dict | list) else labels) != 1:
                    refuse(field, labels, "one label, the reward")
        for field in ("dtype", "torch_dtype"):
            if str(hf.get(field, "float32")).removeprefix("torch.") not in DTYPES:
                refuse(field, hf[field], f"one of {', '.join(DTYPES)}")
        if dropout := hf.pop("attention_dropout", 0.0):
            refuse("attention_dropout", dropout, "0")
        if "quantization_config" in hf:
            refuse("quantization_config", hf["quantization_config"], "unquantized weights")
        if (partial := hf.pop("partial_rotary_factor", 1.0)) != 1.0:
            refuse("partial_rotary_factor", partial, "1 (all of head_dim is rotated)")
        if not _is_size(layers := hf.get("num_hidden_layers", 1)):  # needed to fill layer_types
            refuse("num_hidden_layers", layers, "a whole number of at least 1")
        if layers > _MOST_LAYERS:
            refuse("num_hidden_layers", layers, f"at most {_MOST_LAYERS} layers")
        theta, scaling = _pop_rope(hf, refuse)
        window, types = _pop_windows(hf, refuse)
        fields = {name: hf.pop(name) for name in cls.__dataclass_fields__ if name in hf}
        if isinstance(fields.get("eos_token_id"), list):  # hashable, for jit
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        # an unknown field that is false, 0 or empty changes nothing
        if unknown := sorted(name for name in hf.keys() - _INERT if hf[name]):
            refuse(unknown[0], hf[unknown[0]], "a field of a Qwen3 config; remove it if it changes nothing")
        # transformers' defaults for Qwen3 that differ from those of this class
        defaults = {"head_dim": 128, "max_position_embeddings": 32_768}
        if "num_attention_heads" in fields:
            fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields = defaults | fields | {"rope_theta": theta, "rope_scaling": scaling, "architecture": architecture}
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in sizes if name not in fields]:
            raise ValueError(f"{source}: a field is missing: {missing[0]}; expected all of {', '.join(sizes)}")
        try:
            return cls(**fields, sliding_window=window, layer_types=types)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that `from_hf` and transformers read."""
        translated = ("architecture", "rope_theta", "rope_scaling", "sliding_window", "layer_types")
        hf = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in translated}
        hf |= {"model_type": "qwen3", "architectures": [self.architecture]}
        # both spellings: transformers 5 reads rope_parameters, transformers 4 rope_theta and rope_scaling
        hf |= {"rope_theta": self.rope_theta, "rope_parameters": {"rope_type": "default"}}
        if self.rope_scaling is not None:
            scaling = {name: value for name, value in vars(self.rope_scaling).items() if value is not None}
            if self.rope_scaling.rope_type == "linear":
                scaling = {name: scaling[name] for name in ("rope_type", "factor")}
            hf |= {"rope_scaling": scaling, "rope_parameters": dict(scaling)}
        hf["rope_parameters"]["rope_theta"] = self.rope_theta
        types = self.layer_types or (FULL,) * self.num_hidden_layers
        hf |= {"layer_types": list(types), "use_sliding_window": SLIDING in types}
        hf["max_window_layers"] = types.index(SLIDING) if SLIDING in types else self.num_hidden_layers
        if SLIDING in types:
            hf["sliding_window"] = self.sliding_window
        if self.is_reward_model:
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return {name: value for name, value in hf.items() if value is not None}


def read_config(directory: str | Path) -> Qwen3Config:
    """Reads the config of a Hugging Face model directory."""
    file = Path(directory) / "config.json"
    return Qwen3Config.from_hf(_read_config_json(directory), source=str(file))


def stored_dtype(directory: str | Path) -> str | None:
    """Returns the dtype that a model directory's config.json names, or None."""
    hf = _read_config_json(directory)
    return str(hf.get("dtype") or hf.get("torch_dtype") or "").removeprefix("torch.") or None


def _read_config_json(directory: str | Path) -> dict[str, Any]:
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face model directory with a config.json")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; errors name the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); was it downloaded whole?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _pop_rope(hf: dict[str, Any], refuse: Any) -> tuple[float, RopeScaling | None]:
    """Pops the rotary base and its scaling from `hf`: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    theta = flat = hf.pop("rope_theta", None)
    scalings: list[RopeScaling | None] = []
    original = hf.pop("original_max_position_embeddings", None)
    for field in ("rope_parameters", "rope_scaling"):
        given = hf.pop(field, None) or {}
        if not isinstance(given, dict):
            refuse(field, given, "an object with rope_type and its settings")
        if given.get("truncate", True) is None:
            given = given | {"truncate": False}  # transformers' reading of null
        rope = {name: value for name, value in given.items() if value is not None}
        if not rope:
            continue
        kind = rope.pop("type", None)  # the older spelling
        kind = rope.pop("rope_type", kind or "default")
        if kind == "dynamic":
            why = "its frequencies depend on the whole length, which a prompt computed once for all its completions"
            refuse(f"{field}.rope_type", kind, f"'default', 'linear' or 'yarn' ({why} cannot know)")
        if kind not in ("default", "linear", "yarn"):
            refuse(f"{field}.rope_type", kind, "'default', 'linear' or 'yarn'")
        if field == "rope_scaling" and scalings and theta is not None and theta != flat and "rope_theta" not in rope:
            refuse(field, rope, "the same rope_theta as in rope_parameters, which it replaces in transformers")
        nested = rope.pop("rope_theta", theta)
        if theta is not None and nested != theta:
            refuse(f"{field}.rope_theta", nested, f"the same as rope_theta = {theta}")
        theta = nested
        if (partial := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
            refuse(f"{field}.partial_rotary_factor", partial, "1 (all of head_dim is rotated)")
        if kind == "yarn" and original is not None:
            rope["original_max_position_embeddings"] = original
        known = {"default": (), "linear": ("factor",), "yarn": tuple(RopeScaling.__dataclass_fields__)}[kind]
        for unused in {"factor", "original_max_position_embeddings"} - set(known):
            rope.pop(unused, None)  # transformers ignores it too
        if unknown := sorted(rope.keys() - set(known)):
            refuse(f"{field}.{unknown[0]}", rope[unknown[0]], f"a field of {kind} scaling")
        if kind != "default" and "factor" not in rope:
            if kind == "linear" or "original_max_position_embeddings" not in rope:
                refuse(f"{field}.factor", None, "a number")
            longest, trained = hf.get("max_position_embeddings", 32_768), rope["original_max_position_embeddings"]
            if not _is_size(longest) or not _is_size(trained):
                refuse(f"{field}.original_max_position_embeddings", trained, "a whole number of at least 1")
            rope["factor"] = longest / trained
        try:
            scalings.append(RopeScaling(kind, **rope) if kind != "default" else None)
        except ValueError as error:
            refuse(field, rope, str(error))
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        refuse("rope_scaling", scalings[1], "the same as rope_parameters")
    theta = 10_000.0 if theta is None else theta  # transformers' default
    if not _is_number(theta) or theta <= 0 or (theta == 1 and scalings and scalings[0]):
        refuse("rope_theta", theta, "a number above 0, and not 1 if it is scaled")
    return float(theta), scalings[0] if scalings else None


def _pop_windows(hf: dict[str, Any], refuse: Any) -> tuple[int | None, tuple[str, ...] | None]:
    """Pops `sliding_window` and `layer_types` from `hf`; (None, None) if all layers have full attention.

    As in transformers, the window counts only with `use_sliding_window`, for the layers from `max_window_layers` on or
    those that `layer_types` names.
    """
    window = hf.pop("sliding_window", 4096)
    if not isinstance(use := hf.pop("use_sliding_window", False), bool):
        refuse("use_sliding_window", use, "true or false")
    window = window if use else None
    first, types = hf.pop("max_window_layers", 28), hf.pop("layer_types", None)
    if not isinstance(first, int):
        refuse("max_window_layers", first, "a whole number")
    if types is not None and not (isinstance(types, list) and all(isinstance(kind, str) for kind in types)):
        refuse("layer_types", types, f"a list of {FULL} and {SLIDING}")
    if types is None:
        layers = hf.get("num_hidden_layers", 0)
        types = [SLIDING if window is not None and layer >= first else FULL for layer in range(layers)]
    if SLIDING in types and window is None:
        refuse(
            "layer_types", types, f"{FULL} in every layer, or use_sliding_window = true and a number as sliding_window"
        )
    all_full = list(types) == [FULL] * hf.get("num_hidden_layers", 0)
    return (None, None) if all_full else (window, tuple(types))


def _is_number(value: object) -> bool:
    largest = sys.float_info.max  # of a JSON integer `math.isfinite` asks whether it has one, in vain
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def _as_float(config: Any, name: str) -> None:
    """Makes a number a float: a program is not compiled with an integer of more than 32 bits.

    Raises:
      ValueError: it is infinite in float32.
    """
    value = float(getattr(config, name))
    if value > _LARGEST_NUMBER:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value!r}")
    object.__setattr__(config, name, value)  # the config is frozen


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
