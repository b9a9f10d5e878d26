"""The arithmetic that speed is measured against, counted twice; and the whole of `eval speed` on a tiny workload."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.speed import speed as measuring
from eval.speed import workloads
from eval.speed.peers import run_peer
from eval.speed.speed import RunFigures, parse_speed
from eval.speed.workloads import WORKLOADS, Workload, even_share
from models.config import REWARD_MODEL, Qwen3Config
from models.flops import decode_bytes, forward_flops, step_flops

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


def test_a_reward_model_reads_its_score_at_the_last_token() -> None:
    """As a policy without logits whose completions are a token longer."""
    reward = replace(TINY, architecture=REWARD_MODEL)
    groups = {7: [3, 1, 9], 4: [5, 5, 2]}
    longer = [[m + 1 for m in lengths] for lengths in groups.values()]
    logits = 2 * sum(map(sum, longer)) * TINY.hidden_size * TINY.vocab_size
    assert (
        forward_flops(reward, list(groups), list(groups.values())) == forward_flops(TINY, list(groups), longer) - logits
    )


def test_the_least_bytes_are_those_of_every_token() -> None:
    groups = {7: [3, 1, 9], 4: [5, 5, 2]}
    D, E, K, L = TINY.hidden_size, TINY.head_dim, TINY.num_key_value_heads, TINY.num_hidden_layers
    layer = D * TINY.num_attention_heads * E * 2 + 2 * D * K * E + 3 * D * TINY.intermediate_size
    numbers = 0
    for t in range(9):
        numbers += L * layer + D * TINY.vocab_size
        for n, lengths in groups.items():
            live = [t for m in lengths if t < m]
            numbers += 2 * L * K * E * (n * bool(live) + sum(live))
    assert decode_bytes(TINY, list(groups), list(groups.values()), itemsize=2) == 2 * numbers


def test_sharing_the_prompt_is_what_is_saved() -> None:
    """At G = 8, 8 prompts of 512 and completions of 64 tokens: less than a third of what repeated prompts take."""
    small, P, G = WORKLOADS["w2"].network, 8, 8
    shared = forward_flops(small, [512] * P, [[64] * G] * P)
    repeated = forward_flops(small, [512] * P * G, [[64]] * P * G)
    assert 3 < repeated / shared < G


def test_the_reward_of_the_workloads() -> None:
    assert even_share(["p", "p", "p"], ["bdf", "ace", "ab"]) == [1.0, 0.0, 0.5]
    assert even_share(["p"], [""]) == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "w9"], "workload: expected one of w1"),
        (["--steps", "0"], "steps: expected at least 1"),
        (["--rounds", "0"], "rounds: expected at least 1"),
        (["--against", "."], "against: expected --trl PYTHON or --tunix PYTHON"),
        (["--against", ".", "--trl", sys.executable], "expected run_trl.py in ."),
        (["--against", "PEERS", "--trl", "no/python"], "trl: .*no/python is not a program"),
        (["--trl", "no/python"], "trl: .*no/python is not a program"),
        (["--tuned", "true"], "tuned: expected --trl PYTHON"),
        (["--against", "PEERS", "--sweep", "cost.png"], "against, trl, tunix, sweep: expected peers or a sweep"),
        (["--tunix", sys.executable, "--sweep", "cost.png"], "against, trl, tunix, sweep: expected peers or a sweep"),
        (["--prepare", "work", "--trl", sys.executable], "prepare: measures nothing; leave out"),
        (["--prepare", "work", "--json", "out.json"], "prepare: measures nothing; leave out"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "run_trl.py").touch()
    with pytest.raises(ValueError, match=message):
        parse_speed([str(tmp_path) if argument == "PEERS" else argument for argument in arguments])


PEER = """
import json, os, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
assert sys.argv[1] == "grpo" and os.environ["PEER_PROMPT"] == "64" and os.environ["PEER_COMPLETION"] == "64"
kept = "MALLOC_TRIM_THRESHOLD_" in os.environ
step = {"step": 5.0 if kept else 6.0} | ({"completion_tokens": 63.0} if kept else {})
steps = [{"step": 100.0}, {"step": 100.0}] + [step] * (int(arguments["--steps"]) - 2)
row = {"steps": steps, "cold_start_s": 30.0, "peak_rss_mib": 2000}
open(arguments["--out"], "a").write(json.dumps(row) + "\\n")
"""


def test_peers_and_ours_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_trl.py").write_text(PEER)
    turns: list[int] = []

    def ours(work: Path, max_steps: int) -> RunFigures:
        turns.append(max_steps)
        assert not (work / "xla").exists() or max_steps == 1
        (work / "xla").mkdir(exist_ok=True)
        untimed, timed = ({"timing_s/step": seconds, "completions/mean_length": 64.0} for seconds in (9.0, 2.0))
        return RunFigures([untimed] * 2 + [timed] * (max_steps - 2), 15.0, 1000.0, {})

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measuring, "prepare", lambda *_: None)
    monkeypatch.setattr(measuring, "write_work", lambda *_: None)
    monkeypatch.setattr(measuring, "run_program", ours)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)  # a relative path is one from here, not from the scripts' folder
    (tmp_path / "scripts").mkdir()
    (tmp_path / "run_trl.py").rename(tmp_path / "scripts" / "run_trl.py")
    settings = ["--steps", "3", "--against", "scripts", "--trl", "./python", "--tuned", "true"]
    assert main(["speed", *settings, "--json", str(tmp_path / "out.json")]) == 0
    assert turns == [5, 5, 5, 5, 1]
    found = json.loads((tmp_path / "out.json").read_text())["against"]
    assert found["trl"].pop("completion_tokens") is None
    assert found["trl"] == {"step_s": 6.0, "cold_start_s": 30.0, "peak_rss_mib": 2000, "steps": [6.0] * 6}
    assert found["trl_tuned"]["step_s"] == 5.0 and found["gopo_jax"]["step_s"] == 2.0
    assert found["trl_tuned"]["completion_tokens"] == 63.0 and found["gopo_jax"]["completion_tokens"] == 64.0
    table = capsys.readouterr().out
    assert all(ratio in table for ratio in ("1.00x", "3.00x", "2.00x"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('no such optimizer'); raise SystemExit(3)", r"failed \(3\): no such optimizer$"),
        ("raise SystemExit(3)", r"failed \(3\): it printed nothing$"),
        ("import os; raise OSError('disk full')", r"failed \(1\): OSError: disk full$"),
        ("print('error: expected a peer'); print('bye'); raise SystemExit(2)", r"\(2\): expected a peer$"),
        ("pass", r"expected a JSON line with steps, cold_start_s and peak_rss_mib in .*, got FileNotFoundError"),
        ("WRITE('nothing')", "expected a JSON line with .*, got JSONDecodeError"),
        ("""WRITE('{"cold_start_s": 1, "peak_rss_mib": 1}')""", "expected a JSON line with .*, got KeyError: 'steps'"),
        ("""WRITE('{"steps": [{"step": 1}], "cold_start_s": 1, "peak_rss_mib": 1}')""", "expected 3 steps, got 1"),
    ],
    ids=["message", "silent", "traceback", "refusal", "no_file", "no_json", "no_steps", "fewer_steps"],
)
def test_a_peer_that_fails_is_one_line(script: str, message: str, tmp_path: Path) -> None:
    written = "import sys\ndef WRITE(line): open(sys.argv[sys.argv.index('--out') + 1], 'w').write(line)\n"
    (tmp_path / "run_trl.py").write_text(written + script)
    with pytest.raises(ValueError, match=message) as error:
        run_peer(tmp_path / "run_trl.py", sys.executable, tmp_path, 1, 2, {})
    assert "\n" not in str(error.value)


def test_workload_is_written_for_one_script_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(measuring, "prepare", lambda workload, folder, count: steps.append(count))
    monkeypatch.setattr(measuring, "write_work", lambda folder: (folder / "work.json").touch())
    assert main(["speed", "--workload", "w3", "--steps", "1", "--prepare", str(tmp_path / "work")]) == 0
    assert steps == [3] and (tmp_path / "work" / "work.json").exists()
    assert f"run_trl.py grpo --data {tmp_path / 'work'} --steps 3" in capsys.readouterr().out


def test_a_sweep_is_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Workload] = []

    def ours(work: Path, max_steps: int) -> RunFigures:
        row = {f"timing_s/{part}": float(len(asked)) for part in ("step", "generate", "update")}
        return RunFigures([row] * max_steps, 1.0, 500.0, {})

    monkeypatch.setattr(measuring, "prepare", lambda workload, *_: asked.append(workload))
    monkeypatch.setattr(measuring, "run_program", ours)
    found = measuring.sweep(WORKLOADS["w1"], 1, tmp_path / "cost.png")["sweep"]
    assert {name: [row["value"] for row in rows] for name, rows in found.items()} == measuring.SWEEPS
    assert asked[0].num_generations == 2 and asked[-1].network.vocab_size == 151_936
    assert (tmp_path / "cost.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_program_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Qwen3Config(2048, 32, 64, 1, 2, 1, 16, tie_word_embeddings=True)
    monkeypatch.setitem(measuring.WORKLOADS, "w1", Workload(16, 16, network, 4, 4, 2, ends=True))
    monkeypatch.setattr(workloads, "SMALL_NETWORK", network)
    assert main(["speed", "--workload", "w1", "--steps", "2", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for name in (
        "step_s",
        "generate_s",
        "update_s",
        "reward_model_s",
        "cold_start_s",
        "warm_start_s",
        "peak_rss_mib",
        "matmul_gflops",
    ):
        assert result[name] > 0, name
    assert result["workload"] == "w1" and "score_s" in result
    assert result["generate_s"] + result["update_s"] < result["step_s"] * 1.01
    assert 0 < result["update_fraction_of_peak"] < 1 and len(result["steps"]) == 2
    assert result["compilations"]["all"] > 3
    assert 1 <= result["mean_completion_length"] <= 16
    assert "matmul peak" in capsys.readouterr().out
