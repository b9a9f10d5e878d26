"""The arithmetic that speed is measured against, counted twice; and the whole of `eval speed` on a tiny workload."""

import json
from pathlib import Path

import pytest

import eval.speed as measuring
from eval.__main__ import main
from eval.flops import forward_flops, step_flops
from eval.speed import WORKLOADS, Workload, even_share, parse_speed
from models.config import Qwen3Config

TINY = Qwen3Config(300, 32, 64, 2, 4, 2, 16, tie_word_embeddings=True)


def counted_one_by_one(config: Qwen3Config, prompt: int, completions: list[int]) -> float:
    """Multiply-adds of every matrix product of every position, times two."""
    D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads

    def position(sees: int) -> int:
        projections = D * H * E + 2 * D * K * E + H * E * D + 3 * D * F
        return config.num_hidden_layers * (projections + 2 * H * E * sees)

    total = sum(position(i + 1) for i in range(prompt))
    for length in completions:
        total += sum(position(prompt + i + 1) for i in range(length - 1))
        total += length * D * config.vocab_size
    return 2.0 * total


def test_the_least_arithmetic_is_that_of_every_product_once() -> None:
    groups = {7: [3, 1, 9], 4: [5, 5, 2]}
    expected = sum(counted_one_by_one(TINY, n, lengths) for n, lengths in groups.items())
    assert forward_flops(TINY, list(groups), list(groups.values())) == expected
    assert step_flops(2.0, reference=True) == {"generate": 2.0, "update": 8.0, "step": 10.0}
    assert step_flops(2.0, reference=False)["update"] == 6.0


def test_sharing_the_prompt_is_what_is_saved() -> None:
    """At G = 8, 8 prompts of 512 and completions of 64 tokens: less than a third of what repeated prompts take."""
    small, P, G = WORKLOADS["w2"].network, 8, 8
    shared = forward_flops(small, [512] * P, [[64] * G] * P)
    repeated = forward_flops(small, [512] * P * G, [[64]] * P * G)
    assert 3 < repeated / shared < G


def test_the_reward_of_the_workloads() -> None:
    assert even_share(["p", "p", "p"], ["bdf", "ace", "ab"]) == [1.0, 0.0, 0.5]
    assert even_share(["p"], [""]) == [0.0]


@pytest.mark.parametrize("arguments", [["--workload", "w9"], ["--steps", "0"]])
def test_a_workload_that_is_not_there_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_speed(arguments)


@pytest.mark.slow
def test_the_program_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Qwen3Config(2048, 32, 64, 1, 2, 1, 16, tie_word_embeddings=True)
    monkeypatch.setitem(measuring.WORKLOADS, "w1", Workload(16, 16, network, 4, 4, 2, ends=True))
    monkeypatch.setattr(measuring, "SMALL", network)
    assert main(["speed", "--workload", "w1", "--steps", "2", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for name in ("step_s", "generate_s", "update_s", "cold_start_s", "warm_start_s", "peak_rss_mib", "matmul_gflops"):
        assert result[name] > 0, name
    assert result["workload"] == "w1" and "score_s" in result
    assert result["generate_s"] + result["update_s"] < result["step_s"] * 1.01
    assert 0 < result["update_fraction_of_peak"] < 1 and len(result["steps"]) == 2
    assert result["compilations"]["all"] > 3
    assert 1 <= result["mean_completion_length"] <= 16
    assert "matmul peak" in capsys.readouterr().out
