"""`python -m eval theory`: what it writes is what the theory says and what training finds; mistakes are one line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval.__main__ import main
from eval.theory import command
from eval.theory.command import Case, cases, parse_theory, theory
from gopo_jax.advantages import gopo_advantages, grpo_advantages
from gopo_jax.theory import expected_advantage, games, rlhf_policy, stationary_policy
from train.running import SetupError

REFERENCE_O, REWARDS_O = (0.5, 0.3, 0.15, 0.05), (0.0, 1.0, 0.2, 3.0)
TINY = (
    "--beta 0.5 --group_sizes 2 --noise 0 --at_group_size 2 --penalty_beta 0.5 --groups 4 --steps 4 --exact_steps 2 "
    "--points 2 --problems 1 --sizes 2"
)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "out"),
        ("--beta", "expected a value behind it"),
        ("--beta 0.1,0", "above 0"),
        ("--beta 0.1,x", "beta"),
        ("--at_beta 0", "at_beta: expected numbers above 0, got 0"),
        ("--beta []", "beta: expected at least one number"),
        ("--sizes []", "sizes: expected at least one number"),
        ("--at_group_size 1", "at_group_size: expected"),
        ("--seed -1", "seed: expected"),
        ("--seed 9223372036854775808", "seed: expected"),
        ("--noise -1", "at least 0"),
        ("--group_sizes 2,1", "from 2"),
        ("--sizes 3,100000", "groups to enumerate"),
        ("--group_sizes 2.5", "group_sizes"),
        ("--reference 0.5,0.6 --rewards 1,2", "add up to 1"),
        ("--reference 0.5,0.5", "each of at least 2 answers"),
        ("--rewards 1,1,0,0", "one highest"),
        ("--steps 1", "at least 2"),
        ("--bet 1", "did you mean 'beta'"),
    ],
)
def test_a_mistake_is_one_line(given: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")] if given else []
    assert main(["theory", *out, *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_directory_should_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("")
    assert main(["theory", "--out", str(tmp_path / "out")]) == 2
    assert "is a file; expected a directory" in capsys.readouterr().err


def test_without_a_prediction_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> Any:
        raise AssertionError("trained")

    def unsolved(*given: Any, **more: Any) -> Any:
        raise RuntimeError("no stationary policy found")

    monkeypatch.setattr(command, "trainings", never)
    monkeypatch.setattr(command, "stationary_policy", unsolved)
    with pytest.raises(SetupError, match="no stationary policy"):
        theory(parse_theory(["--out", str(tmp_path), *TINY.split()]))


def test_every_case_is_trained_once_and_each_picture_has_its_dots() -> None:
    config = parse_theory(["--out", "x", "--beta", "0.5,1"])
    todo = cases(config)
    assert len(set(todo)) == len(todo)
    rows = [case._asdict() | {"sampled": 0.5} for case in todo]
    for axis, values in (("beta", [0.5, 1]), ("group_size", [2, 4, 8]), ("noise", [0, 1, 2, 4])):
        found = command.sampled_dots(config, rows, axis, ["GOPO", "GRPO", "GRPO, G = 8"])
        assert len(found) == 2
        assert all(sorted(x for x, _ in points) == values for points in found.values())


def test_the_files_hold_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One case of many, without the pictures: the whole command takes longer, see below."""
    monkeypatch.setattr(command, "cases", lambda config: [Case("gopo", 2, 0.5)])
    for name in ("predicted_curves", "gradient_ratios", "theory_pictures"):
        monkeypatch.setattr(command, name, lambda *given: {})
    for name in ("one", "two"):
        theory(parse_theory(["--out", str(tmp_path / name), *TINY.split()]))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    (line,) = csv.DictReader((tmp_path / "one" / "theory.csv").read_text().splitlines())
    (row,) = json.loads((tmp_path / "one" / "theory.json").read_text())["rows"]
    with jax.enable_x64(True):
        settings: Any = {"beta": 0.5, "advantage": "gopo", "group_size": 2}
        expected_O = np.asarray(stationary_policy(jnp.array(REFERENCE_O), jnp.array(REWARDS_O), **settings))
    assert float(line["predicted"]) == float(expected_O[3])
    assert row["predicted_policy"] == expected_O.tolist()
    assert float(line["difference"]) == np.abs(np.array(row["sampled_policy"]) - expected_O).max()
    assert {name: line[name] for name in ("advantage", "kl", "beta")} == {
        "advantage": "gopo",
        "kl": "k3",
        "beta": "0.5",
    }


@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_advantages_of_noisy_rewards_are_those_of_samples(noise: float, float64: None) -> None:
    size, rng = 5, np.random.default_rng(0)
    answers_PG = rng.choice(4, size=(40_000, size), p=REFERENCE_O)
    rewards_PG = np.array(REWARDS_O)[answers_PG] + noise * rng.normal(size=answers_PG.shape)
    sampled: Any = {"gopo": gopo_advantages(rewards_PG), "grpo": grpo_advantages(rewards_PG, epsilon=0.0)}
    for name, advantages_PG in sampled.items():
        options: Any = {"advantage": name, "group_size": size, "ddof": 1}
        expected_O = expected_advantage(np.array(REFERENCE_O), np.array(REWARDS_O), noise=noise, **options)
        without_O = expected_advantage(np.array(REFERENCE_O), np.array(REWARDS_O), **options)
        assert abs(float(np.array(REFERENCE_O) @ expected_O)) < 1e-12
        for answer in range(4):
            drawn = np.asarray(advantages_PG)[answers_PG == answer]
            assert abs(drawn.mean() - expected_O[answer]) < 4.5 * drawn.std() / np.sqrt(drawn.size)
        assert float(jnp.abs(expected_O - without_O).max()) > 0.01  # the noise is not nothing


def test_noise_has_the_limits_that_it_must_have(float64: None) -> None:
    policy_O, rewards_O = np.array(REFERENCE_O), np.array(REWARDS_O)

    def at(noise: float, size: float, name: Any = "grpo") -> np.ndarray:
        options: Any = {"advantage": name, "group_size": size, "ddof": 1}
        return np.asarray(expected_advantage(policy_O, rewards_O, noise=noise, **options))

    for name in ("gopo", "grpo", "rloo"):
        np.testing.assert_allclose(at(1e-4, 5, name), at(0.0, 5, name), atol=1e-6)
    np.testing.assert_allclose(at(1.0, 2) * 2 * np.sqrt(2), at(1.0, 2, "gopo"), atol=1e-12)  # as without noise
    far = [float(np.abs(at(1.0, size) - at(1.0, np.inf)).max()) for size in (2, 5)]
    assert far[0] > 1.5 * far[1]
    lengths = jnp.array([0.1, 1.0, 5.0, 50.0])
    np.testing.assert_allclose(games.expected_cosine(lengths, 1), jax.lax.erf(lengths / np.sqrt(2)), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": -1.0}, "at least 0"),
        ({"noise": 1.0, "epsilon": 0.1}, "expected 0 with noise"),
        ({"noise": 1.0, "rewards_O": None, "preference_OO": [[0.5, 1], [0, 0.5]], "group_size": 2}, "rewards_O"),
    ],
)
def test_impossible_noise_is_refused(change: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"rewards_O": [1.0, 0.0], "advantage": "grpo", "group_size": 4}
    with pytest.raises(ValueError, match=words):
        expected_advantage([0.5, 0.5], **given | change)


@pytest.mark.slow
def test_the_whole_command_writes_the_same_twice(tmp_path: Path) -> None:
    found = [theory(parse_theory(["--out", str(tmp_path / name), *TINY.split()])) for name in ("one", "two")]
    assert found[0] == found[1]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    drawn = {f"{name}.{kind}" for name in ("over_beta", "over_group_size", "over_noise") for kind in ("png", "svg")}
    drawn |= {f"{name}.{kind}" for name in ("penalties", "gradients") for kind in ("png", "svg")}
    assert set(files(tmp_path / "one")) == {"theory.json", "theory.csv", "theory.md"} | drawn
    for row in found[0]["rows"]:
        assert (row["predicted"] is None) == (row["kl"] in ("k1", "none"))
    with jax.enable_x64(True):
        lines = found[0]["curves"]["beta"]["lines"]
        expected = [rlhf_policy(jnp.array(REFERENCE_O), jnp.array(REWARDS_O), beta)[3] for beta in (0.25, 1.0)]
    np.testing.assert_allclose(lines["RLHF's optimum"], expected, rtol=1e-12)
    assert found[0]["gradients"]["here"][0] == pytest.approx(2 * np.sqrt(2))  # G = 2, whatever the policy


@pytest.mark.slow
def test_what_the_command_trains_ends_where_it_predicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("predicted_curves", "gradient_ratios", "theory_pictures"):
        monkeypatch.setattr(command, name, lambda *given: {})
    shorter = "--noise 0,2 --groups 128 --steps 1000 --exact_steps 4000"
    rows = theory(parse_theory(["--out", str(tmp_path), *shorter.split()]))["rows"]
    plain = [row for row in rows if row["kl"] == "k3" and row["noise"] == 0 and row["beta"] in (0.1, 0.5, 2.0)]
    assert {(row["advantage"], row["group_size"], row["beta"]) for row in plain} == {
        (name, size, beta) for name in ("gopo", "grpo") for size in (2, 4, 8) for beta in (0.1, 0.5, 2.0)
    }
    assert all(row["difference"] <= 0.01 for row in rows if row["difference"] is not None)
    assert all(row["difference_exact"] < 1e-8 for row in rows if row["kl"] == "k3")
    assert sum(row["noise"] == 2 for row in rows) == 3
    drifted = {row["kl"]: row for row in rows if row["kl"] in ("k1", "none")}
    assert drifted["k1"]["exact_policy"] == pytest.approx(drifted["none"]["exact_policy"], abs=1e-9)
    assert drifted["k1"]["sampled"] > 0.99 and drifted["k1"]["predicted"] is None
