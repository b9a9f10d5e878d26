"""The shape of a Qwen3, from and to a Hugging Face `config.json`.

Every field of such a file is honoured or, where this code would compute something else, refused by name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLICY, REWARD_MODEL = "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"

# Fields that do not change what the network computes.
_INERT = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
}


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
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads = {self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary pairs), got {self.head_dim}")
        if self.architecture not in (POLICY, REWARD_MODEL):
            raise ValueError(f"architecture: expected {POLICY} or {REWARD_MODEL}, got {self.architecture}")

    @property
    def is_reward_model(self) -> bool:
        return self.architecture == REWARD_MODEL

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "Qwen3Config":
        """The config of a Hugging Face dictionary.

        Raises:
          ValueError: another model type or architecture, a missing field, or a field whose value asks for
            something that is not implemented; the message names the field.
        """
        hf = dict(hf)

        def refuse(field: str, value: object, supported: str) -> None:
            raise ValueError(f"{source}: {field} = {value!r} is not supported; expected {supported}")

        if (model_type := hf.pop("model_type", None)) != "qwen3":
            refuse("model_type", model_type, "'qwen3' (dense Qwen3)")
        architecture = (hf.get("architectures") or [POLICY])[0]
        if architecture not in (POLICY, REWARD_MODEL):
            refuse("architectures", architecture, f"{POLICY} or {REWARD_MODEL}")
        if architecture == REWARD_MODEL and len(hf.get("id2label") or {0: ""}) != 1:
            refuse("id2label", hf["id2label"], "one label, the reward")
        if (activation := hf.pop("hidden_act", "silu")) != "silu":
            refuse("hidden_act", activation, "'silu'")
        if dropout := hf.pop("attention_dropout", 0.0):
            refuse("attention_dropout", dropout, "0")
        if hf.pop("use_sliding_window", False) or "sliding_attention" in (hf.pop("layer_types", None) or ()):
            refuse("use_sliding_window", True, "False (full attention in every layer)")
        hf.pop("sliding_window", None), hf.pop("max_window_layers", None)  # inert without use_sliding_window
        if hf.get("quantization_config") is not None:
            refuse("quantization_config", hf["quantization_config"], "unquantized weights")
        fields = {name: hf.pop(name) for name in cls.__dataclass_fields__ if name in hf}
        fields["rope_theta"] = _rope_theta(hf, fields.get("rope_theta"), refuse)
        fields["architecture"] = architecture
        if isinstance(fields.get("eos_token_id"), list):  # hashable: a config is part of what is compiled
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        unknown = sorted(hf.keys() - _INERT)
        if unknown:
            refuse(unknown[0], hf[unknown[0]], "a field of a Qwen3 config; remove it if it changes nothing")
        fields.setdefault("head_dim", 128)  # transformers' defaults for Qwen3
        missing = [n for n in ("vocab_size", "hidden_size", "num_hidden_layers") if n not in fields]
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"{source}: a field is missing: {missing or error}") from error

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back, and that transformers loads."""
        hf = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "architecture"}
        hf = {name: value for name, value in hf.items() if value is not None}
        hf |= {"model_type": "qwen3", "architectures": [self.architecture], "hidden_act": "silu"}
        if self.is_reward_model:
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return hf


def read_config(directory: str | Path) -> Qwen3Config:
    """The config in a Hugging Face model directory."""
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face model directory with a config.json")
    return Qwen3Config.from_hf(read_json(file), source=str(file))


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an error names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); was it downloaded whole?") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _rope_theta(hf: dict[str, Any], theta: float | None, refuse: Any) -> float:
    """The rotary base, from `rope_theta` or from `rope_parameters` (transformers 5); only plain rotary."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = hf.pop(field, None) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            refuse(f"{field}.rope_type", kind, "'default'")
        nested = rope.get("rope_theta")
        if nested is not None and theta is not None and nested != theta:
            refuse(f"{field}.rope_theta", nested, f"the same as rope_theta = {theta}")
        theta = nested if nested is not None else theta
    return float(theta) if theta is not None else 10_000.0  # transformers' default
