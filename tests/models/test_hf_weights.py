"""Hugging Face directories: the same numbers as transformers, the same bits back, and clear refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models.qwen3
from models.checkpoint import Checkpoints, load_model
from models.config import Qwen3Config, RopeScaling, read_config, stored_dtype
from models.hf_weights import INDEX_FILE, SINGLE_FILE, flatten, load_pretrained, save_pretrained, split

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "tests" / "data" / "models"
GOLDEN = "golden_hf_transformers_fp32.npz"


@pytest.fixture
def rounded_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies rounded to bfloat16: how the hf_* goldens were computed (tests/data/README.md)."""
    exact = models.qwen3.rotary_frequencies

    def rounded(config: Qwen3Config) -> tuple[np.ndarray, float]:
        frequencies, factor = exact(config)
        return frequencies.astype(jnp.bfloat16).astype(np.float32), factor

    monkeypatch.setattr(models.qwen3, "rotary_frequencies", rounded)


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


def check_same_bits(theirs: Path, ours: Path) -> None:
    """Equal tensors, dtypes included; a tied head that was written out may be gone."""
    before = load_file(theirs / SINGLE_FILE)
    after = {name: tensor for file in ours.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if read_config(theirs).tie_word_embeddings:
        before.pop("lm_head.weight", None)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        np.testing.assert_array_equal(after[name].view(np.uint8), tensor.view(np.uint8), err_msg=name)
    assert read_config(ours) == read_config(theirs)
    assert stored_dtype(ours) == next(iter(after.values())).dtype.name


@pytest.mark.parametrize("name", ["tiny_qwen3", "hf_tied_causal", "hf_reward_seqcls"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_there_and_back_is_bit_for_bit(name: str, max_shard_bytes: int, tmp_path: Path) -> None:
    """Hugging Face -> Orbax -> Hugging Face."""
    model = load_pretrained(MODELS / name, dtype=next(iter(load_file(MODELS / name / SINGLE_FILE).values())).dtype)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, split(model)[1], {"step": jnp.zeros(())}, {"model": model.config.to_hf(), "run": {}})
    checkpoints.close()
    again = load_model(f"{tmp_path}@7", dtype="auto")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(model)[1])
    save_pretrained(again, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "hf" / INDEX_FILE).is_file() == (max_shard_bytes == 40_000)
    check_same_bits(MODELS / name, tmp_path / "hf")


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
        ({"hidden_act": "swiglu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.*computed once"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling.beta_fast"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling.*the same as rope_parameters",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "layer_types.*use_sliding_window"),
        ({"layer_types": ["full_attention"]}, "layer_types.*num_hidden_layers"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window"),
        ({"dtype": "int8"}, "dtype"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2}, "num_labels"),
        ({"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, "id2label"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"layer_types": 3}, "layer_types"),
        ({"use_sliding_window": "false"}, "use_sliding_window"),
        ({"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers"),
        ({"use_sliding_window": True, "sliding_window": 4.5, "max_window_layers": 0}, "sliding_window"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}}, "attention_factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": "a"}}, "original_max_position"),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_theta"),
        ({"architectures": ["Qwen3ForSequenceClassification"], "id2label": ["a", "b"]}, "id2label"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": 2**63}, "hidden_size: expected a whole number of at most 2147483647"),
        ({"num_hidden_layers": 2**63}, "num_hidden_layers.*at most 100000 layers"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a number of at least 0"),
        ({"initializer_range": 1e39}, "initializer_range: expected a number that is finite in float32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, "factor: expected a number that is finite"),
        ({"architectures": 5}, "architectures = 5 is not supported"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Qwen3Config.from_hf(BASE | change, "config.json")


def without(*names: str) -> dict:
    return {name: value for name, value in BASE.items() if name not in names}


def test_rope_theta_in_both_spellings() -> None:
    nested = without("rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert Qwen3Config.from_hf(nested).rope_theta == 5e6
    assert Qwen3Config.from_hf(BASE | {"rope_theta": 5e6}).rope_theta == 5e6


def test_rope_scaling_in_both_spellings_and_back() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
    nested = without("rope_theta") | {"rope_parameters": yarn | {"rope_theta": 5e6}}
    flat = BASE | {
        "rope_theta": 5e6,
        "rope_scaling": {"type": "yarn"} | {k: v for k, v in yarn.items() if k != "rope_type"},
    }
    config = Qwen3Config.from_hf(nested)
    assert config == Qwen3Config.from_hf(flat) == Qwen3Config.from_hf(config.to_hf())
    assert config.rope_scaling is not None and config.rope_scaling.beta_fast == 8.0
    hash(config)  # part of what is compiled


def test_windows_as_transformers_reads_them() -> None:
    window = {"use_sliding_window": True, "sliding_window": 8}
    four = without("layer_types") | {"num_hidden_layers": 4}
    config = Qwen3Config.from_hf(four | window | {"max_window_layers": 3})
    assert config.windows == (None, None, None, 8)
    assert Qwen3Config.from_hf(config.to_hf()) == config
    assert Qwen3Config.from_hf(four | window).windows is None  # max_window_layers = 28
    assert Qwen3Config.from_hf(four | {"sliding_window": 8, "max_window_layers": 0}).windows is None
    named = {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert Qwen3Config.from_hf(four | window | named).windows == (8, None, 8, None)


def test_what_old_versions_of_transformers_wrote_beside_is_ignored() -> None:
    defaults = {"max_length": 20, "do_sample": False, "top_k": 50, "tf_legacy_loss": False, "num_beams": 1}
    unused = {"mlp_bias": False, "use_mrope": False, "hidden_dropout": 0.0, "pruned_heads": {}, "_commit_hash": "a1"}
    assert Qwen3Config.from_hf(BASE | defaults | unused) == Qwen3Config.from_hf(BASE)
    with pytest.raises(ValueError, match="mlp_bias"):
        Qwen3Config.from_hf(BASE | {"mlp_bias": True})


def test_yarn_corners_as_transformers_reads_them() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0}
    assert Qwen3Config.from_hf(BASE | {"rope_scaling": yarn | {"truncate": None}}).rope_scaling == RopeScaling(
        "yarn", 2.0, truncate=False
    )
    both = without("rope_theta") | {"rope_parameters": yarn | {"rope_theta": 1e6}, "rope_scaling": yarn}
    with pytest.raises(ValueError, match="rope_scaling.*the same rope_theta"):
        Qwen3Config.from_hf(both)
    linear = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 32}
    assert Qwen3Config.from_hf(BASE | {"rope_scaling": linear}).rope_scaling == RopeScaling("linear", 2.0)
    assert Qwen3Config.from_hf(BASE | {"rope_scaling": {"type": "default", "factor": 1.0}}).rope_scaling is None


def test_null_means_not_given() -> None:
    nothing = {"rope_scaling": None, "layer_types": None, "num_key_value_heads": None, "eos_token_id": None}
    config = Qwen3Config.from_hf(without(*nothing) | nothing)
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.rope_scaling is None and config.windows is None


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    shutil.copytree(MODELS / "tiny_qwen3", tmp_path / "model")
    return tmp_path / "model"


def change_config(directory: Path, **change: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_broken_directories_are_refused(directory: Path) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    norm, embed = "model.norm.weight", "model.embed_tokens.weight"

    def refused(change: dict, *removed: str, match: str) -> None:
        kept = {key: value for key, value in (tensors | change).items() if key not in removed}
        save_file(kept, directory / SINGLE_FILE)
        with pytest.raises(ValueError, match=match):
            load_pretrained(directory)

    refused({}, norm, match="1 tensors are missing.*norm")
    refused({}, "lm_head.weight", match="missing.*lm_head.weight; .*tie_word_embeddings")
    refused({"model.extra.weight": tensors[norm]}, match="not known.*extra")
    refused({"score.weight": tensors[norm][None]}, match="not known.*score.weight; .*architectures")
    refused({norm: tensors[norm][:-1].copy()}, match=r"model.norm.weight has shape \(63,\).*\(64,\) \(hidden_size\)")
    transposed = tensors[embed].T.copy()  # as many numbers, the wrong way round
    refused({embed: transposed}, match=r"embed_tokens.weight has shape .*\(vocab_size x hidden_size\)")
    for bad in (np.nan, np.inf):
        damaged = tensors[embed].copy()
        damaged[-1, 3] = bad
        refused({embed: damaged}, match="embed_tokens.weight has NaN or infinite values")
        refused({embed: damaged.astype(jnp.bfloat16)}, match="embed_tokens.weight has NaN or infinite values")
    refused({embed: tensors[embed].astype(np.int8)}, match="embed_tokens.weight is stored as I8")
    (directory / SINGLE_FILE).write_bytes((MODELS / "tiny_qwen3" / SINGLE_FILE).read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a readable safetensors file.*downloaded whole"):
        load_pretrained(directory)
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="expected model.safetensors.*pytorch_model.bin is a pickle"):
        load_pretrained(directory)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_pretrained(directory / "nowhere")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"num_hidden_layers": 9}, "num_hidden_layers"),
        ({"hidden_size": 32}, "hidden_size"),
        ({"vocab_size": 11}, "vocab_size"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8}, "num_key_value_heads * head_dim"),
        ({"intermediate_size": 1}, "intermediate_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(directory: Path, change: dict, named: str) -> None:
    change_config(directory, **change)
    with pytest.raises(ValueError, match=re.escape(named)):
        load_pretrained(directory)


def test_the_head_of_a_tied_model_may_be_written_out(directory: Path) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, directory / SINGLE_FILE)
    change_config(directory, tie_word_embeddings=True)
    model = load_pretrained(directory)
    np.testing.assert_array_equal(model.head_VD[...], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", ["lost", "in a file that is not there", "twice"])
def test_an_index_may_name_the_head_of_a_tied_model(tmp_path: Path, stored: str) -> None:
    """As Qwen3-1.7B's does: a tied model that is saved anew does not write it."""
    tied = load_pretrained(MODELS / "hf_tied_causal")
    save_pretrained(tied, tmp_path, max_shard_bytes=10_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    if stored == "twice":
        tensors = load_file(tmp_path / file)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / file)
    index["weight_map"]["lm_head.weight"] = "model-nowhere.safetensors" if "not there" in stored else file
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    for dtype in (jnp.float32, "auto"):
        jax.tree.map(np.testing.assert_array_equal, split(load_pretrained(tmp_path, dtype=dtype))[1], split(tied)[1])


def test_an_index_may_not_name_a_head_that_is_needed_and_lost(tmp_path: Path) -> None:
    save_pretrained(load_pretrained(MODELS / "hf_tied_causal"), tmp_path, max_shard_bytes=10_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    change_config(tmp_path, tie_word_embeddings=False)
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="says that lm_head.weight is there, but it is not"):
        load_pretrained(tmp_path)
    index["weight_map"]["lm_head.weight"] = "nowhere.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors: no such file, but .* names it"):
        load_pretrained(tmp_path)


def test_dtype_auto_is_the_configs_and_a_reward_head_is_float32() -> None:
    assert load_pretrained(MODELS / "hf_tied_causal", dtype="auto").embed_VD[...].dtype == jnp.bfloat16
    model = load_pretrained(MODELS / "hf_reward_seqcls", dtype="bfloat16")
    assert model.embed_VD[...].dtype == jnp.bfloat16 and model.score_D[...].dtype == jnp.float32


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    save_pretrained(load_pretrained(MODELS / "tiny_qwen3"), tmp_path, max_shard_bytes=40_000)
    file = tmp_path / INDEX_FILE
    index = json.loads(file.read_text())
    other = next(name for name in index["weight_map"].values() if name != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{other}.*says that model.norm.weight is there"):
        load_pretrained(tmp_path)
    for nonsense in ({}, {"weight_map": {}}, {"weight_map": {"model.norm.weight": 3}}):
        file.write_text(json.dumps(nonsense))
        with pytest.raises(ValueError, match="weight_map"):
            load_pretrained(tmp_path)
    shutil.copy(MODELS / "tiny_qwen3" / SINGLE_FILE, tmp_path)  # is read first, by transformers too
    load_pretrained(tmp_path)


def test_numbers_too_large_for_float16_are_refused(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 1e6, dtype=np.float32)
    save_file(tensors, directory / SINGLE_FILE)
    with pytest.raises(ValueError, match="model.norm.weight has values beyond 65504"):
        load_pretrained(directory, dtype="float16")
    with pytest.raises(ValueError, match="norm_D has values beyond 65504"):
        save_pretrained(load_pretrained(directory), tmp_path / "out", dtype="float16")


ON_EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
import models.hf_weights
from models.checkpoint import Checkpoints, load_model
from models.hf_weights import load_pretrained, save_pretrained, split
from models.sharding import make_layout

models.hf_weights.BLOCK_BYTES = 1000  # several blocks a tensor
out = Path(sys.argv[1])
for directory in map(Path, sys.argv[2:]):
    whole = split(load_pretrained(directory, dtype="auto"))[1]
    for mesh in ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "data": 4}, {"data": 4, "tensor": 2}):
        layout = make_layout(**mesh)
        model = load_pretrained(directory, mesh=layout, dtype="auto")
        params = split(model)[1]
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params)), mesh
        jax.tree.map(np.testing.assert_array_equal, params, whole)
    run = out / directory.name
    checkpoints = Checkpoints(run)
    checkpoints.save(3, params, {"step": np.zeros(())}, {"model": model.config.to_hf(), "run": {}})
    checkpoints.close()
    save_pretrained(load_model(run, mesh=layout, dtype="auto"), run / "hf", max_shard_bytes=40_000)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("names", [["tiny_qwen3", "hf_tied_causal", "hf_reward_seqcls"]], ids=["all"])
def test_eight_devices_hold_the_parts_and_give_back_the_bits(names: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path), *(str(MODELS / name) for name in names)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr[-3000:]
    for name in names:
        check_same_bits(MODELS / name, tmp_path / name / "hf")


def test_a_hub_name_is_looked_up_in_the_cache_and_refused_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--Someone--Qwen3-tiny"
    shutil.copytree(MODELS / "tiny_qwen3", cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_pretrained("Someone/Qwen3-tiny").config == read_config(MODELS / "tiny_qwen3")
    with pytest.raises(FileNotFoundError, match="Someone/Qwen3-other.*the Hub could not give.*check the spelling"):
        load_pretrained("Someone/Qwen3-other")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_pretrained(load_pretrained(MODELS / "tiny_qwen3"), tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load_pretrained(tmp_path)


def test_flat_names_cover_every_parameter() -> None:
    flat = flatten(split(load_pretrained(MODELS / "tiny_qwen3"))[1])
    assert {"embed_VD", "unembed_VD", "norm_D", "layers.query_LDHE"} <= flat.keys()
