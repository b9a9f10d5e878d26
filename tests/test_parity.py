"""Live comparison with transformers on PyTorch: `make parity`. Random networks, every option, unequal lengths."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from models.hf_weights import load_pretrained, save_pretrained

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
CHANGES = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True},
    {"head_dim": 24, "num_key_value_heads": 1},
    {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "attention_bias": True},
    {"num_hidden_layers": 1, "tie_word_embeddings": True, "hidden_size": 32},
]


@pytest.mark.parametrize("change", CHANGES, ids=[",".join(change) or "base" for change in CHANGES])
@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward"])
def test_equals_transformers(change: dict, reward: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    torch.manual_seed(len(str(change)))
    config = Qwen3Config(**(BASE | change), pad_token_id=0, num_labels=1)
    theirs = (Qwen3ForSequenceClassification if reward else Qwen3ForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # norms and biases start at 1 and 0: move them
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    tokens_BS = np.random.default_rng(0).integers(1, 97, (4, 20))
    lengths_B = np.array([20, 7, 13, 1])
    mask_BS = np.arange(20) < lengths_B[:, None]
    tokens_BS = np.where(mask_BS, tokens_BS, 0)

    def answers(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            out = model(torch.tensor(tokens_BS), attention_mask=torch.tensor(mask_BS.astype(int)))
        return out.logits.numpy()

    ours = load_pretrained(tmp_path / "theirs")
    found = np.asarray(jax.jit(lambda model, *arrays: model(*arrays))(ours, tokens_BS, lengths_B))
    expected = answers(theirs)
    if reward:
        np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)
    else:
        np.testing.assert_allclose(found[mask_BS], expected[mask_BS], atol=1e-4)

    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=50_000)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(
        answers(again)[mask_BS[:, 0] if reward else mask_BS], expected[mask_BS[:, 0] if reward else mask_BS]
    )
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "qwen3"
