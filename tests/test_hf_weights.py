"""Hugging Face directories: the same numbers as transformers, the same bits back, and clear refusals."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models.qwen3
from models.checkpoint import Checkpoints, load_model
from models.config import Qwen3Config, read_config
from models.hf_weights import SINGLE_FILE, flatten, load_pretrained, save_pretrained, split

MODELS = Path(__file__).parent / "data" / "models"
GOLDEN = "golden_hf_transformers_fp32.npz"


@pytest.fixture
def rounded_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies rounded to bfloat16: how the hf_* goldens were computed (tests/data/README.md)."""
    exact = models.qwen3.rotary_frequencies
    monkeypatch.setattr(
        models.qwen3, "rotary_frequencies", lambda *a: exact(*a).astype(jnp.bfloat16).astype(jnp.float32)
    )


def unpadded(tokens_BS: np.ndarray, mask_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the left, as right-padded rows and lengths."""
    lengths_B = mask_BS.sum(1)
    return np.stack([np.roll(row, n) for row, n in zip(tokens_BS, lengths_B, strict=True)]), lengths_B


def check_logits(name: str) -> None:
    model, golden = load_pretrained(MODELS / name), np.load(MODELS / name / GOLDEN)
    tokens_BS, mask_BS = golden["input_ids"], golden["attention_mask"].astype(bool)
    call = jax.jit(lambda model, *arrays: model(*arrays))
    full = np.full(len(tokens_BS), tokens_BS.shape[1])
    np.testing.assert_allclose(call(model, tokens_BS, full), golden["logits"], atol=1e-4)
    right_BS, lengths_B = unpadded(tokens_BS, mask_BS)
    logits_BSV = call(model, right_BS, lengths_B)
    for row, (n, mask) in enumerate(zip(lengths_B, mask_BS, strict=True)):
        np.testing.assert_allclose(logits_BSV[row, :n], golden["logits_left_padded"][row, mask], atol=1e-4)


def test_logits_equal_transformers() -> None:
    check_logits("tiny_qwen3")


@pytest.mark.usefixtures("rounded_rotary")
def test_logits_equal_transformers_tied() -> None:
    check_logits("hf_tied_causal")


@pytest.mark.usefixtures("rounded_rotary")
def test_scores_equal_transformers() -> None:
    directory = MODELS / "hf_reward_seqcls"
    model, golden = load_pretrained(directory), np.load(directory / GOLDEN)
    scores = model(golden["right_ids"], golden["right_mask"].sum(1))
    np.testing.assert_allclose(scores, golden["right_scores"][:, 0], atol=1e-4)
    scores = model(*unpadded(golden["left_ids"], golden["left_mask"]))
    np.testing.assert_allclose(scores, golden["left_scores"][:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_qwen3", "hf_tied_causal", "hf_reward_seqcls"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_export_and_read_back_is_bit_for_bit(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    before = load_file(MODELS / name / SINGLE_FILE)
    dtype = jnp.dtype(next(iter(before.values())).dtype)
    model = load_pretrained(MODELS / name, dtype=dtype)
    save_pretrained(model, tmp_path, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 40_000)
    after = {key: tensor for file in files for key, tensor in load_file(file).items()}
    if model.config.tie_word_embeddings:
        before.pop("lm_head.weight", None)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        np.testing.assert_array_equal(after[key].view(np.uint8), tensor.view(np.uint8), err_msg=key)
    assert read_config(tmp_path) == read_config(MODELS / name)


def test_orbax_and_back_is_bit_for_bit(tmp_path: Path) -> None:
    model = load_pretrained(MODELS / "tiny_qwen3")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, split(model)[1], {"step": jnp.zeros(())}, {"model": model.config.to_hf(), "run": {}})
    checkpoints.close()
    again = load_model(f"{tmp_path}@7")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(model)[1])


def test_every_released_dense_config_is_read() -> None:
    released = json.loads((MODELS / "qwen3_dense_configs.json").read_text())
    for name, hf in released.items():
        if isinstance(hf, dict):
            config = Qwen3Config.from_hf(hf, name)
            assert config.rope_theta == hf["rope_theta"] and config.hidden_size == hf["hidden_size"]
            assert Qwen3Config.from_hf(config.to_hf()) == config


BASE = json.loads((MODELS / "tiny_qwen3" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": "qwen3_moe"}, "model_type"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Qwen3Config.from_hf(BASE | change, "config.json")


def test_rope_theta_in_both_spellings() -> None:
    nested = {k: v for k, v in BASE.items() if k != "rope_theta"}
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    assert Qwen3Config.from_hf(nested).rope_theta == 5e6
    assert Qwen3Config.from_hf(BASE | {"rope_theta": 5e6}).rope_theta == 5e6


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(MODELS / "tiny_qwen3", tmp_path / "model")
    return tmp_path / "model"


def test_broken_directories_are_refused(directory: Path) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    norm = "model.norm.weight"

    def refused(change: dict, *removed: str, match: str) -> None:
        kept = {key: value for key, value in (tensors | change).items() if key not in removed}
        save_file(kept, directory / SINGLE_FILE)
        with pytest.raises(ValueError, match=match):
            load_pretrained(directory)

    refused({}, norm, match="1 tensors are missing.*norm")
    refused({"model.extra.weight": tensors[norm]}, match="not known.*extra")
    refused({norm: tensors[norm][:-1].copy()}, match=r"model.norm.weight has shape \(63,\)")
    (directory / SINGLE_FILE).write_bytes((MODELS / "tiny_qwen3" / SINGLE_FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pretrained(directory)
    (directory / SINGLE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
        load_pretrained(directory)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_pretrained(directory / "nowhere")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_pretrained(load_pretrained(MODELS / "tiny_qwen3"), tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_pretrained(tmp_path)


def test_flat_names_cover_every_parameter() -> None:
    flat = flatten(split(load_pretrained(MODELS / "tiny_qwen3"))[1])
    assert {"embed_VD", "unembed_VD", "norm_D", "layers.query_LDHE"} <= flat.keys()
