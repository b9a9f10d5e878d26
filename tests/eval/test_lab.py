"""The lab: its command line, its distortions and measures, its noisy comparisons, and its runs side by side."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from eval.lab.cells import DISTORTIONS, METHODS, PARTS, Cell, load_outcome, load_outcomes, outcome_file
from eval.lab.command import LabConfig, best_rate_index, keep_settings, lab, parse_lab, plan_sheet
from eval.lab.program import (
    MAX_GRAD_NORM,
    OUTLIER,
    LabProgram,
    advantages_of,
    distorted,
    members,
    rank_length_correlation,
)
from eval.lab.world import World, WorldConfig, build_world, comparisons, order_agreement, proxies, raw_rewards
from gopo_jax import ADVANTAGES
from models.checkpoint import load_model
from train.rewards.model import RewardModelScorer

TINY = WorldConfig(
    sft_steps=2, gold_steps=2, validation_prompts=4, max_completion_length=6, comparisons=8, proxy_batch=4
)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out", "x", "--part", "everything"], "part"),
        (["--out", "x", "--steps", "7"], "multiple of evaluate_every"),
        (["--out", "x", "--beta", "0"], "beta: expected a number above 0"),
        (["--out", "x", "--beta", ".inf"], "beta: expected a number above 0"),
        (["--out", "x", "--seeds", "0"], "seeds: expected from 1 to 1000"),
        (["--out", "x", "--seeds", "1001"], "seeds: expected from 1 to 1000"),  # they would be tuned on
        (["--out", "x", "--learning_rates", "[]"], "learning_rates: expected positive numbers"),
        (["--out", "x", "--learning_rates", "[.nan, 1]"], "learning_rates: expected positive numbers"),
        (["--out", "x", "--world.comparisons", "10"], "multiple of proxy_batch"),
        (["--out", "x", "--world.poolsize", "10"], "unknown key"),
        ([], "out"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_lab(arguments)


def test_the_grid_has_all_that_is_asked_for() -> None:
    assert [cell.name for cell in PARTS["default"]] == [
        "gopo_g8_noise0_none_tuned",
        "grpo_g8_noise0_none_tuned",
        "gopo_g8_noise30_none_tuned",
        "grpo_g8_noise30_none_tuned",
    ]
    full = PARTS["full"]
    assert len(set(full)) == len(full) == len({cell.name for cell in full})
    wanted = {"group_size": {2, 4, 8, 16}, "noise": {0.0, 0.1, 0.2, 0.3}, "method": {"gopo", "grpo", "dr_grpo", "rloo"}}
    wanted |= {"distortion": {"none", "exp", "cubic", "outliers_1", "outliers_5", "bf16"}}
    for part in ("factors", "full"):
        for name, values in wanted.items():
            assert {getattr(cell, name) for cell in PARTS[part]} == values
        situations = {(c.group_size, c.noise, c.distortion, c.regime) for c in PARTS[part]}
        assert {Cell("grpo", *situation) for situation in situations} <= set(PARTS[part]), (
            "what others are compared with"
        )


def test_cells_of_other_settings_are_refused_and_the_plan_says_what_is_left(tmp_path: Path) -> None:
    config = LabConfig(out=str(tmp_path))
    keep_settings(tmp_path, config)
    keep_settings(tmp_path, replace(config, part="full"))
    with pytest.raises(ValueError, match=r"steps: 40, now 70.*another --out"):
        keep_settings(tmp_path, replace(config, steps=70))
    (tmp_path / "lab.json").write_text(json.dumps(json.loads((tmp_path / "lab.json").read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match=r"format: 0, now 2"):
        keep_settings(tmp_path, config)
    rows = {row[0]: row[1:3] for row in plan_sheet(tmp_path).rows}
    assert rows["default"] == ("4", "0") and rows["full"] == (str(len(PARTS["full"])), "0")


def test_the_highest_rate_is_taken_and_divergence_is_none() -> None:
    assert best_rate_index(np.array([np.nan, 1.0, 2.0, np.nan]), "gopo") == 2
    with pytest.raises(FloatingPointError, match="tuning gopo: diverged at every learning rate"):
        best_rate_index(np.full(3, np.nan), "gopo")


@pytest.mark.parametrize("G", [2, 8])
@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_distortion_keeps_the_order_of_a_group(name: str, G: int) -> None:
    rewards_PG = jax.random.normal(jax.random.key(G), (2000, G))
    rewards_PG = rewards_PG.at[:500, 1].set(rewards_PG[:500, 0])  # ties, some of them of the best
    given_PG = distorted(rewards_PG, jnp.array(DISTORTIONS.index(name)), jax.random.key(1))
    gopo, grpo = (METHODS.index(name) for name in ("gopo", "grpo"))
    if name == "bf16":
        assert bool((jnp.diff(jnp.take_along_axis(given_PG, rewards_PG.argsort(-1), -1)) >= 0).all())
        np.testing.assert_array_equal(given_PG, rewards_PG.astype(jnp.bfloat16).astype(jnp.float32))
        return
    same = jnp.array_equal(advantages_of(given_PG, gopo), advantages_of(rewards_PG, gopo))
    assert bool(same), "ranks do not see it"
    assert (name == "none") == bool(jnp.array_equal(given_PG, rewards_PG))
    if name != "none" and G > 2:  # of two, GRPO sees the order alone too
        assert float(jnp.abs(advantages_of(given_PG, grpo) - advantages_of(rewards_PG, grpo)).max()) > 0.1
    if name.startswith("outliers"):
        moved = float((given_PG - rewards_PG > OUTLIER / 2).mean())
        share = int(name.rpartition("_")[2]) / 100
        assert abs(moved - share) < 4 * np.sqrt(share / (2000 * G)) + share / 4, "of all completions, not of groups"


def test_the_methods_are_the_project_s_advantages() -> None:
    rewards_PG = jax.random.normal(jax.random.key(0), (5, 4))
    for i, name in enumerate(METHODS):
        np.testing.assert_array_equal(advantages_of(rewards_PG, jnp.array(i)), ADVANTAGES[name](rewards_PG))


def test_rank_length_correlation_is_spearman_s_within_groups() -> None:
    rng = np.random.default_rng(0)
    rewards_PG, lengths_PG = rng.normal(size=(6, 8)).astype(np.float32), rng.integers(1, 5, (6, 8))
    lengths_PG[0] = 3  # nothing to correlate with: left out
    by_hand = [scipy.stats.spearmanr(r, n).statistic for r, n in zip(rewards_PG[1:], lengths_PG[1:], strict=True)]
    assert np.isnan(rank_length_correlation(jnp.asarray(rewards_PG[:1]), jnp.asarray(lengths_PG[:1])))
    found = rank_length_correlation(jnp.asarray(rewards_PG), jnp.asarray(lengths_PG))
    np.testing.assert_allclose(found, np.mean(by_hand), rtol=1e-5)


def test_comparisons_are_gold_s_word_turned_as_often_as_asked_and_nested() -> None:
    gold_PG = jax.random.normal(jax.random.key(0), (50, 16))
    config, world = replace(TINY, comparisons=8000), SimpleNamespace(gold=SimpleNamespace(pool_PG=gold_PG))
    turned: dict[float, np.ndarray] = {}
    for noise in (0.0, 0.1, 0.3):
        pairs_M2, prompt_M, chosen_M = comparisons(world, config, jax.random.key(1), noise)  # type: ignore[arg-type]
        assert bool((pairs_M2[:, 0] != pairs_M2[:, 1]).all())
        right_M = gold_PG[prompt_M[:, None], pairs_M2].argmax(1)
        turned[noise] = np.asarray(chosen_M != right_M)
        assert abs(turned[noise].mean() - noise) < 4 * np.sqrt(noise * (1 - noise) / 8000) + 1e-9
    assert (turned[0.3] >= turned[0.1]).all(), "more noise turns more of the same comparisons"


def test_agreement_of_gold_with_itself_its_opposite_and_nothing() -> None:
    gold_PG = jax.random.normal(jax.random.key(0), (5, 4))
    found = [float(order_agreement(r, gold_PG)) for r in (3 * gold_PG + 1, -gold_PG, 0 * gold_PG)]
    assert found == [1.0, 0.0, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return build_world(folder, TINY)


Run = Callable[..., tuple[Any, ...]]


@pytest.fixture(scope="module")
def run(world: World, folder: Path) -> Run:
    """run(cell, seeds, steps): final parameters and metrics of the steps; `evaluated`: an evaluation too.

    All cells of a group size share a program. `most`: another bound of the gradient's norm than the lab's.
    """
    programs: dict[Any, LabProgram] = {}

    def train(
        cell: Cell, seeds: tuple[int, ...], steps: int, *, most: float = MAX_GRAD_NORM, evaluated: bool = False
    ) -> tuple[Any, ...]:
        key, sizes = (cell.group_size, most), {"beta": 0.1, "max_completion_length": 6, "every": 1}
        programs[key] = program = programs.get(key) or LabProgram(world, cell.group_size, **sizes)
        member = members(cell, seeds, np.full(len(seeds), 3e-3), proxies(world, folder, TINY, seeds, cell.noise))
        state, measured = program.start(member), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eval.lab.program.MAX_GRAD_NORM", most)
            for t in range(steps):
                state, of_step = program.advance(member, state, t)
                measured.append(of_step)
        joined = jax.tree.map(lambda *of_steps: np.concatenate(of_steps, 1), *measured)
        return state.params, joined, *([program.evaluate(member, state, 1)] if evaluated else [])

    return train


@pytest.mark.slow
def test_ranks_do_not_see_the_scale_of_the_reward_and_z_scores_do(run: Run) -> None:
    """The lab's own form of the invariance that tests/train/test_invariance.py shows of the trainer."""
    plain = run(Cell("gopo"), (0, 1), 4)
    assert float(plain[1]["ties"].max()) == 0
    for distortion in ("exp", "cubic", "outliers_5"):
        jax.tree.map(np.testing.assert_array_equal, plain, run(Cell("gopo", distortion=distortion), (0, 1), 4))
    plain, bent = (run(Cell("grpo", distortion=distortion), (0, 1), 4) for distortion in ("none", "exp"))
    assert not np.array_equal(plain[0]["embed_VD"], bent[0]["embed_VD"])


@pytest.mark.slow
def test_scores_are_those_of_the_trainer_s_reward_model(world: World, folder: Path) -> None:
    """The end-of-text token is no part of what is scored, and an empty completion is read at its prompt."""
    scorer, prompts = RewardModelScorer(str(folder / "gold")), world.validation
    text_GT = [world.tokenizer.encode([" It is good."])[0], []]
    T = max(map(len, text_GT)) + 1
    tokens_GT = np.array([row + list(world.tokenizer.eos_ids[:1]) * (T - len(row)) for row in text_GT])
    tokens_PGT = jnp.asarray(np.broadcast_to(tokens_GT, (4, 2, T)))
    lengths_PG = jnp.broadcast_to(jnp.array([len(row) for row in text_GT]), (4, 2))
    found_PG = raw_rewards(load_model(folder / "gold"), prompts, tokens_PGT, lengths_PG)
    asked = world.tokenizer.decode(np.asarray(prompts.tokens_PS)[:, None], np.asarray(prompts.lengths_P)[:, None])
    expected_PG = scorer([row[0] for row in asked], [[" It is good.", ""]] * 4)
    np.testing.assert_allclose(found_PG, expected_PG, atol=1e-5)


@pytest.mark.slow
def test_runs_side_by_side_are_runs_alone(run: Run) -> None:
    """Sums may be rounded otherwise, so: the same completions and rewards, parameters within rounding."""
    cell = Cell("grpo", noise=0.3)
    together = run(cell, (0, 1), 2, evaluated=True)
    for seed in range(2):
        alone = run(cell, (seed,), 2, evaluated=True)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(np.asarray(a[seed], np.float64), np.asarray(b[0], np.float64), atol=2e-4)


@pytest.mark.slow
def test_equal_rms_and_equal_norm_do_what_they_say(run: Run) -> None:
    scales = {}
    for method in METHODS:
        _, tuned = run(Cell(method), (0, 1), 1)
        _, rms = run(Cell(method, regime="equal_rms"), (0, 1), 1)
        np.testing.assert_allclose(rms["advantage_rms"], 1, atol=0.5)  # 64 completions; the pool has thousands
        scales[method] = float((rms["advantage_rms"] / tuned["advantage_rms"]).mean())
    np.testing.assert_allclose(scales["gopo"], (12 / 7) ** -0.5, rtol=1e-2)  # 4 (G + 1) / (3 (G - 1)) at G = 8
    np.testing.assert_allclose(scales["grpo"], (7 / 8) ** -0.5, rtol=1e-2)  # (G - 1) / G
    np.testing.assert_allclose(scales["dr_grpo"], scales["rloo"] * 8 / 7, rtol=1e-5)
    for regime, most in (("equal_rms", 0.01), ("equal_rms", 100.0), ("equal_norm", 100.0)):
        _, found = run(Cell("grpo", regime=regime), (0, 1), 1, most=most)
        assert (np.asarray(found["grad_norm"]) > 0.01).all() and (np.asarray(found["grad_norm"]) < 100).all()
        clipped = np.minimum(found["grad_norm"], most) if regime == "equal_rms" else np.full((2, 1), most)
        np.testing.assert_allclose(found["step_norm"], clipped, rtol=1e-4)


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"steps": 2, "evaluate_every": 1, "seeds": 2, "tuning_seeds": 1, "learning_rates": [1e-3, 3e-3]}
    config = LabConfig(out=str(folder), world=TINY, **small)  # type: ignore[arg-type]
    calls: list[str] = []
    save = vars(__import__("eval.lab.cells", fromlist=["CellOutcome"]).CellOutcome)["save"]

    def dies(self: Any, there: Path) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(self.cell.name)
        save(self, there)

    monkeypatch.setattr("eval.lab.cells.CellOutcome.save", dies)
    with pytest.raises(KeyboardInterrupt):
        lab(config)
    there = folder / "cells"
    first = {
        cell.name: outcome_file(there, cell).read_bytes()
        for cell in PARTS["default"]
        if outcome_file(there, cell).is_file()
    }
    assert list(first) == calls and len(calls) == 2
    monkeypatch.setattr("eval.lab.cells.CellOutcome.save", save)
    lab(config)
    assert "4 cells in part default, 2 to run" in capsys.readouterr().out
    assert {cell.name: outcome_file(there, cell).read_bytes() for cell in PARTS["default"][:2]} == first
    assert [outcome.cell for outcome in load_outcomes(there)] == PARTS["default"]
    tuning = json.loads((folder / "tuning.json").read_text())
    assert set(tuning) == {"gopo", "grpo"} and all(len(found["tried"]) == 2 for found in tuning.values())

    again = load_outcome(outcome_file(there, PARTS["default"][2]))
    outcome_file(there, again.cell).unlink()
    lab(config)
    redone = load_outcome(outcome_file(there, again.cell))
    for name in ("proxy_NMPG", "gold_NMPG", "kl_NMPG", "length_NMPG"):
        np.testing.assert_array_equal(getattr(again, name), getattr(redone, name))
    assert (folder / "results.csv").is_file() and (folder / "curves.csv").is_file()
