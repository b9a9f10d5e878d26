"""Live comparison with transformers on PyTorch: `make parity`. Random networks, every option, unequal lengths."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from models import sampler
from models.checkpoint import Checkpoints
from models.config import ACTIVATION_NAMES, POLICY, REWARD_MODEL, Qwen3Config
from models.hf_weights import INDEX_FILE, load_pretrained, save_pretrained, split
from models.lora import Lora, is_adapter, merge_adapters, split_trainable
from models.peft import save_adapters
from models.qwen3 import Qwen3, rotary_frequencies
from models.reward_model import Qwen3RewardModel
from models.tokenizer import train_bpe
from train.__main__ import main

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SEEDS = range(28)
VOCABULARY, LENGTHS = 97, np.array([40, 7, 23, 1])


def draw(seed: int) -> dict[str, Any]:
    """A config.json with random sizes, about half of whose options are off their defaults."""
    rng = np.random.default_rng(seed)
    heads, sharing = int(rng.choice([1, 2, 4])), int(rng.choice([1, 2, 3]))
    layers = int(rng.integers(1, 5))
    hf: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": int(rng.choice([32, 40, 48])),
        "intermediate_size": int(rng.choice([56, 80])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads * sharing,
        "num_key_value_heads": heads,
        "head_dim": int(rng.choice([8, 16, 24])),
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "tie_word_embeddings": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "hidden_act": str(rng.choice(["silu", "silu", *ACTIVATION_NAMES])),
        "dtype": str(rng.choice(["float32", "bfloat16", "float16"])),
    }
    rope = {"rope_type": str(rng.choice(["default", "linear", "yarn", "yarn"])), "rope_theta": 10_000.0}
    rope["rope_theta"] = float(rng.choice([100.0, 10_000.0, 1e6, 5e6]))
    if rope["rope_type"] != "default":
        rope["factor"] = float(rng.choice([2.0, 4.0]))
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = int(rng.choice([16, 32]))
        optional = {"attention_factor": 1.2, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
        rope |= {name: value for name, value in optional.items() if rng.integers(3) == 0}
        if rng.integers(2):
            rope |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    if rng.integers(2):
        hf["rope_parameters"] = rope
    else:
        hf["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] != "default":
            hf["rope_scaling"] = rope
    if rng.integers(2):
        hf |= {"use_sliding_window": True, "sliding_window": int(rng.integers(1, 12))}
        hf["max_window_layers"] = int(rng.integers(0, layers))
    return hf


def options(hf: dict[str, Any]) -> set[str]:
    """What in a config is not as in Qwen3Config() of transformers."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    found = {f"rope {rope.get('rope_type', 'default')}", f"dtype {hf['dtype']}"}
    found |= {name for name in ("rope_parameters", "rope_theta", "tie_word_embeddings") if hf.get(name)}
    found |= {name for name in ("attention_bias", "sliding_window", "max_window_layers") if hf.get(name)}
    found |= {name for name in rope if name not in ("rope_type", "rope_theta", "factor")}
    found |= {"untied"} if not hf["tie_word_embeddings"] else set()
    found |= {"hidden_act"} if hf["hidden_act"] != "silu" else set()
    found |= {"rms_norm_eps"} if hf["rms_norm_eps"] != 1e-6 else set()
    found |= {"head_dim"} if hf["head_dim"] * hf["num_attention_heads"] != hf["hidden_size"] else set()
    return found


def test_every_option_is_drawn_at_least_three_times() -> None:
    counts = Counter(option for seed in SEEDS for option in options(draw(seed)))
    assert len(SEEDS) >= 24
    expected = {"rope_theta", "rope_parameters", "rope linear", "rope yarn", "head_dim", "tie_word_embeddings"}
    expected |= {"untied", "attention_bias", "rms_norm_eps", "hidden_act", "sliding_window", "max_window_layers"}
    expected |= {"dtype float32", "dtype bfloat16", "dtype float16", "attention_factor", "beta_fast", "beta_slow"}
    expected |= {"truncate", "mscale", "mscale_all_dim", "original_max_position_embeddings"}
    assert {option: counts[option] for option in expected if counts[option] < 3} == {}


@pytest.fixture(autouse=True)
def quiet() -> None:
    """No progress bars of transformers."""
    logging = pytest.importorskip("transformers").utils.logging
    logging.disable_progress_bar()


def write(hf: dict[str, Any], reward: bool, directory: Path, seed: int) -> Any:
    """A transformers network of a config with random weights, in a directory with that very config.json."""
    import torch
    import transformers

    kind = "Qwen3ForSequenceClassification" if reward else "Qwen3ForCausalLM"
    hf = hf | {"architectures": [kind]} | ({"id2label": {"0": "LABEL_0"}} if reward else {})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    torch.manual_seed(seed)
    network = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(directory))
    with torch.no_grad():
        for name, parameter in network.named_parameters():  # norms and biases start at 1 and 0: move them
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    network.to(getattr(torch, hf["dtype"])).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(hf))  # not as transformers would write it
    return getattr(transformers, kind)


def theirs(network: Any, directory: Path, dtype: str, tokens_BS: np.ndarray, mask_BS: np.ndarray) -> np.ndarray:
    import torch

    model = network.from_pretrained(directory, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS.astype(int)))
    return out.logits.float().numpy()


def ours(directory: Path, dtype: str, tokens_BS: np.ndarray) -> np.ndarray:
    model = load_pretrained(directory, dtype=dtype)
    return np.asarray(jax.jit(lambda model, *arrays: model(*arrays))(model, tokens_BS, LENGTHS))


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward"])
def test_equals_transformers(seed: int, reward: bool, tmp_path: Path) -> None:
    """float32: within 1e-4, padded right or left. bfloat16: as far from float32 as transformers' own bfloat16 is.

    Two bfloat16 networks with independent roundings, each at a root mean square error e from the float32 one, are
    sqrt(2) e apart: both e (times 1.5, for the few numbers there are) and that are the bounds.
    """
    pytest.importorskip("torch")
    hf = draw(seed)
    network = write(hf, reward, tmp_path / "theirs", seed)
    rng = np.random.default_rng(seed)
    S = LENGTHS.max()
    mask_BS = np.arange(S) < LENGTHS[:, None]
    tokens_BS = np.where(mask_BS, rng.integers(1, VOCABULARY, mask_BS.shape), 0)

    def real(answers: np.ndarray) -> np.ndarray:
        return answers.reshape(-1) if reward else answers[mask_BS]

    exact = real(theirs(network, tmp_path / "theirs", "float32", tokens_BS, mask_BS))
    np.testing.assert_allclose(real(ours(tmp_path / "theirs", "float32", tokens_BS)), exact, atol=1e-4, rtol=0)
    shifted = (np.arange(S) - (S - LENGTHS)[:, None]) % S
    left_BS, left_mask_BS = (np.take_along_axis(x, shifted, 1) for x in (tokens_BS, mask_BS))
    left = theirs(network, tmp_path / "theirs", "float32", left_BS, left_mask_BS)
    left = left.reshape(-1) if reward else left[left_mask_BS]
    np.testing.assert_allclose(left, exact, atol=1e-4, rtol=0)

    their_error = real(theirs(network, tmp_path / "theirs", "bfloat16", tokens_BS, mask_BS)) - exact
    our_error = real(ours(tmp_path / "theirs", "bfloat16", tokens_BS)) - exact
    print(f"bfloat16 error of {rms(exact):.3f}: ours {rms(our_error):.5f}, theirs {rms(their_error):.5f}")
    assert rms(our_error) <= 1.5 * rms(their_error) + (0.01 * rms(exact) if reward else 0)
    assert rms(our_error - their_error) <= 1.5 * 2**0.5 * rms(their_error) + (0.01 * rms(exact) if reward else 0)

    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=50_000)
    again = theirs(network, tmp_path / "ours", "float32", tokens_BS, mask_BS)
    np.testing.assert_array_equal(real(again), exact)


@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one file", "sharded"])
def test_an_exported_run_loads_in_transformers_with_the_same_logits(
    reward: bool, tied: bool, size: str, tmp_path: Path
) -> None:
    """Hugging Face -> Orbax -> `train export` -> transformers, in the dtype it came in."""
    pytest.importorskip("torch")
    hf = draw(3) | {"tie_word_embeddings": tied, "dtype": "bfloat16", "vocab_size": 300}
    network = write(hf, reward, tmp_path / "theirs", 3)
    model, run = load_pretrained(tmp_path / "theirs", dtype="auto"), tmp_path / "run"
    checkpoints = Checkpoints(run)
    checkpoints.save(1, split(model)[1], {"step": np.zeros(())}, {"model": model.config.to_hf(), "run": {}})
    checkpoints.close()
    train_bpe(["some text"], run / "tokenizer", 260)
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), "--max_shard_size", size]) == 0
    assert (tmp_path / "out" / INDEX_FILE).is_file() == (size == "20KB")
    tokens_BS, mask_BS = np.arange(1, 41).reshape(1, -1), np.ones((1, 40), bool)
    before, after = (theirs(network, tmp_path / name, "bfloat16", tokens_BS, mask_BS) for name in ("theirs", "out"))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("seed", [seed for seed in SEEDS if "factor" in str(draw(seed))][:6])
def test_rotary_frequencies_equal_transformers(seed: int, tmp_path: Path) -> None:
    """Up to two units in the last place, by which two power functions differ; at positions of 10^5 too."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    hf, ulps = draw(seed) | {"max_position_embeddings": 131_072}, 2**-22
    (tmp_path / "config.json").write_text(json.dumps(hf))
    rotary = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    frequencies, factor = rotary_frequencies(Qwen3Config.from_hf(hf))
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=ulps)
    positions = np.array([[0, 1, 1000, 40_000, 131_071]])
    cosine, _ = rotary(torch.zeros(1), torch.tensor(positions))
    angles = positions[..., None].astype(np.float32) * frequencies
    wrong = np.abs(np.cos(angles) * factor - cosine.numpy()[..., : hf["head_dim"] // 2])
    assert (wrong <= factor * (1e-6 + angles * ulps)).all()


@pytest.mark.parametrize("architecture", [POLICY, REWARD_MODEL])
def test_peft_loads_our_adapters(architecture: str, tmp_path: Path) -> None:
    """The base of transformers with our exported adapters computes what our merged network computes."""
    import torch
    import transformers
    from peft import PeftModel

    config = Qwen3Config(VOCABULARY, 32, 56, 3, 4, 2, 8, architecture=architecture, pad_token_id=0)
    network, lora = Qwen3RewardModel if architecture == REWARD_MODEL else Qwen3, Lora(rank=5, alpha=7.0)
    base = network(config, nnx.Rngs(0))
    save_pretrained(base, tmp_path / "base")
    _, params = split(network(config, nnx.Rngs(0, lora=1), lora=lora))
    rng = np.random.default_rng(0)
    for name, value in params["layers"].items():
        if is_adapter(name):
            params["layers"][name] = jax.numpy.asarray(rng.normal(0, 0.3, value.shape), "float32")
    if architecture == REWARD_MODEL:
        params["score_D"] = params["score_D"] + 1  # trained beside the adapters: the base has another
    save_adapters(split_trainable(params)[0], lora, config, tmp_path / "adapters", base=str(tmp_path / "base"))

    kind = "AutoModelForCausalLM" if architecture == POLICY else "AutoModelForSequenceClassification"
    options = {"num_labels": 1} if architecture == REWARD_MODEL else {}
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "base", dtype="float32", **options)
    tokens_BS, lengths_B = rng.integers(1, VOCABULARY, (2, 9)), np.array([9, 9])
    ours = nnx.merge(split(base)[0], merge_adapters(params, lora))(tokens_BS, lengths_B)
    with torch.no_grad():
        plain = theirs(torch.tensor(tokens_BS)).logits.numpy()
        found = PeftModel.from_pretrained(theirs, tmp_path / "adapters")(torch.tensor(tokens_BS)).logits.numpy()
    assert np.abs(found - plain).max() > 0.1
    np.testing.assert_allclose(found.reshape(ours.shape), ours, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_penalty_and_min_p_are_transformers_own(seed: int) -> None:
    """The logits that its processors leave, in its order: penalty, temperature, min-p."""
    import torch
    from transformers.generation import logits_process

    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(0, 3, (5, VOCABULARY)).astype(np.float32)
    tokens_BT = rng.integers(0, VOCABULARY, (5, 30))
    penalty, temperature, min_p = float(rng.uniform(0.5, 2)), float(rng.uniform(0.5, 2)), float(rng.uniform(0, 0.3))
    scores: Any = torch.tensor(logits_BV)
    for processor in (
        logits_process.RepetitionPenaltyLogitsProcessor(penalty),
        logits_process.TemperatureLogitsWarper(temperature),
        logits_process.MinPLogitsWarper(min_p),
    ):
        scores = processor(torch.tensor(tokens_BT), scores)
    seen_BV = np.zeros(logits_BV.shape, bool)
    np.put_along_axis(seen_BV, tokens_BT, True, 1)
    found_BV = np.asarray(sampler.penalize(logits_BV, seen_BV, penalty)) / temperature
    left_BV = np.isfinite(scores.numpy())
    np.testing.assert_allclose(found_BV[left_BV], scores.numpy()[left_BV], rtol=1e-5)
    # every uniform number draws one of the tokens that are left, and all of them are drawn
    params = sampler.SamplingParams(temperature, 0, 1.0, 0, np.zeros(0, np.int32), None, min_p, penalty)
    uniform_I = np.linspace(0, 1, 2000, endpoint=False, dtype=np.float32)
    weights_BV = np.exp(scores.numpy() - scores.numpy().max(1, keepdims=True))
    for logits_V, seen_V, weights_V in zip(logits_BV, seen_BV, weights_BV, strict=True):
        rows = [np.broadcast_to(array, (2000, VOCABULARY)) for array in (logits_V, seen_V)]
        tokens_I, _ = sampler.draw(rows[0], uniform_I, np.zeros(VOCABULARY, bool), params, seen=rows[1])
        drawn = np.unique(tokens_I)
        assert (weights_V[drawn] > 0).all()
        assert set(np.flatnonzero(weights_V / weights_V.sum() > 1e-3)) <= set(drawn.tolist())
