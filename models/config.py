"""The shape of a Qwen3, from and to a Hugging Face `config.json`.

Every field of such a file is honoured or, where this code would compute something else, refused by name.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLICY, REWARD_MODEL = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"
FULL, SLIDING = "full_attention", "sliding_attention"
DTYPES = ("float32", "bfloat16", "float16")  # in which weights may be stored
ACTIVATION_NAMES = (  # Hugging Face's names; what they compute: models.qwen3.ACTIVATIONS
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"),
    *("quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "mish", "hardswish", "sigmoid", "tanh", "linear"),
)

# Fields that do not change what the network computes.
_INERT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type", "_attn_implementation", "attn_implementation"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
    *("is_decoder", "add_cross_attention", "pruned_heads", "tie_encoder_decoder", "torchscript", "use_bfloat16"),
    *("tokenizer_class", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash"),
    *("name_or_path", "prefix", "finetuning_task", "task_specific_params", "keys_to_ignore_at_inference"),
    *("tf_legacy_loss", "gradient_checkpointing", "model_max_length", "pretraining_tp", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "sep_token_id", "unsloth_fixed", "unsloth_version"),
    # how transformers 4 would generate, which it kept here
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length, under Hugging Face's names.

    linear: every frequency divided by `factor`. yarn (Peng et al., https://arxiv.org/abs/2309.00071): slow rotations
    are, fast ones are not, with a ramp between; cosines and sines are scaled by `attention_factor`.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None  # None: max_position_embeddings; yarn's own fields from here
    attention_factor: float | None = None  # None: from factor, mscale and mscale_all_dim
    beta_fast: float | None = None  # None: 32 rotations
    beta_slow: float | None = None  # None: 1 rotation
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the ramp begins and ends at whole pairs

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "yarn"):
            raise ValueError(f"rope_type: expected 'linear' or 'yarn', got {self.rope_type!r}")
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0) and (value is not None or name == "factor"):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
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

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    sliding_window: int | None = None  # None: every position sees all before it
    layer_types: tuple[str, ...] | None = None  # which layers the window is for; None: full_attention in all
    max_position_embeddings: int = 40_960
    initializer_range: float = 0.02
    architecture: str = POLICY
    # carried along for other programs: transformers batches a reward model's texts only if it knows the padding
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if not _is_size(getattr(self, name)):
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {getattr(self, name)!r}")
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
        return self.architecture == REWARD_MODEL

    @property
    def windows(self) -> tuple[int | None, ...] | None:
        """How many positions each layer sees, itself included; None = all. None instead of the tuple: in all layers."""
        if SLIDING not in (self.layer_types or ()):
            return None
        return tuple(self.sliding_window if kind == SLIDING else None for kind in self.layer_types or ())

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "Qwen3Config":
        """The config of a Hugging Face dictionary.

        Raises:
          ValueError: another model type or architecture, a missing field, or a field whose value asks for
            something that is not implemented; the message names the field.
        """
        # null: not given; but no window is not the default window
        hf = {name: value for name, value in hf.items() if value is not None or name == "sliding_window"}

        def refuse(field: str, value: object, supported: str) -> None:
            raise ValueError(f"{source}: {field} = {value!r} is not supported; expected {supported}")

        if (model_type := hf.pop("model_type", None)) != "qwen3":
            refuse("model_type", model_type, "'qwen3' (dense Qwen3; no mixture of experts, no other family)")
        architecture = (hf.get("architectures") or [POLICY])[0]
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
        if not _is_size(layers := hf.get("num_hidden_layers", 1)):  # what follows counts layers
            refuse("num_hidden_layers", layers, "a whole number of at least 1")
        theta, scaling = _pop_rope(hf, refuse)
        window, types = _pop_windows(hf, refuse)
        fields = {name: hf.pop(name) for name in cls.__dataclass_fields__ if name in hf}
        if isinstance(fields.get("eos_token_id"), list):  # hashable: a config is part of what is compiled
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        # what is false, 0 or empty asks for nothing
        if unknown := sorted(name for name in hf.keys() - _INERT if hf[name]):
            refuse(unknown[0], hf[unknown[0]], "a field of a Qwen3 config; remove it if it changes nothing")
        # transformers' defaults for Qwen3, where they are not those of this class
        defaults = {"head_dim": 128, "max_position_embeddings": 32_768}
        if "num_attention_heads" in fields:
            fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields = defaults | fields | {"rope_theta": theta, "rope_scaling": scaling, "architecture": architecture}
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in sizes if name not in fields]:
            raise ValueError(f"{source}: a field is missing: {missing[0]}")
        try:
            return cls(**fields, sliding_window=window, layer_types=types)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back, and that transformers loads."""
        own = ("architecture", "rope_theta", "rope_scaling", "sliding_window", "layer_types")
        hf = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in own}
        hf |= {"model_type": "qwen3", "architectures": [self.architecture]}
        # both spellings: transformers 5 reads rope_parameters, what is older rope_theta and rope_scaling
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
    """The config in a Hugging Face model directory."""
    file = Path(directory) / "config.json"
    return Qwen3Config.from_hf(_read_config_json(directory), source=str(file))


def stored_dtype(directory: str | Path) -> str | None:
    """The dtype that a model directory's config.json names, if any."""
    hf = _read_config_json(directory)
    return str(hf.get("dtype") or hf.get("torch_dtype") or "").removeprefix("torch.") or None


def _read_config_json(directory: str | Path) -> dict[str, Any]:
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face model directory with a config.json")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an error names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); was it downloaded whole?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _pop_rope(hf: dict[str, Any], refuse: Any) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling, taken out of `hf`: `rope_theta` with `rope_scaling`, or `rope_parameters`."""
    theta = flat = hf.pop("rope_theta", None)
    found: list[RopeScaling | None] = []
    original = hf.pop("original_max_position_embeddings", None)
    for field in ("rope_parameters", "rope_scaling"):
        given = hf.pop(field, None) or {}
        if not isinstance(given, dict):
            refuse(field, given, "an object with rope_type and its settings")
        if given.get("truncate", True) is None:
            given = given | {"truncate": False}  # as transformers reads null here
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
        if field == "rope_scaling" and found and theta is not None and theta != flat and "rope_theta" not in rope:
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
        for idle in {"factor", "original_max_position_embeddings"} - set(known):
            rope.pop(idle, None)  # transformers does not look at it either
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
            found.append(RopeScaling(kind, **rope) if kind != "default" else None)
        except ValueError as error:
            refuse(field, rope, str(error))
    if len(found) == 2 and found[0] != found[1]:
        refuse("rope_scaling", found[1], "the same as rope_parameters")
    theta = 10_000.0 if theta is None else theta  # transformers' default
    if not _is_number(theta) or theta <= 0 or (theta == 1 and found and found[0]):
        refuse("rope_theta", theta, "a number above 0, and not 1 if it is scaled")
    return float(theta), found[0] if found else None


def _pop_windows(hf: dict[str, Any], refuse: Any) -> tuple[int | None, tuple[str, ...] | None]:
    """`sliding_window` and `layer_types`, taken out of `hf`; None and None where every layer sees everything.

    As in transformers: the window counts only with `use_sliding_window`; the layers from `max_window_layers` on have
    it, unless `layer_types` names them.
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
    everywhere = list(types) == [FULL] * hf.get("num_hidden_layers", 0)
    return (None, None) if everywhere else (window, tuple(types))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
