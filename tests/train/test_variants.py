"""Every advantage, ratio, surrogate and variant by its name: the config takes it, an update learns with it."""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import optax
import pytest
import yaml

from gopo_jax import ADVANTAGES, SURROGATES
from train.batch import Groups, make_batch
from train.config import LossConfig, PolicyConfig, RewardSpec
from train.loop import train_policy
from train.objective import make_advantages
from train.parse import parse
from train.run.directory import read_metrics

ROOT = Path(__file__).parents[2]
VARIANTS = sorted(file.stem for file in (ROOT / "configs" / "variants").glob("*.yaml"))
RECIPE = str(ROOT / "configs" / "tldr" / "qwen3_8b_gopo.yaml")
MakeConfig = Callable[..., PolicyConfig]
MakeGroups = Callable[..., Groups]
UpdateOnce = Callable[..., Any]
numbers = partial(read_metrics, clock=False)


OTHERWISE = {  # than every variant, wherever that is possible
    "advantage": "odrpo",
    "advantage_options": {"scale": "none"},
    "dynamic_sampling_attempts": 7,
    "temperature": 0.7,
    "num_iterations": 2,
    "loss": {
        "beta": 0.3,
        "kl": "k2",
        "kl_in": "reward",
        "ratio": "sequence_token",
        "surrogate": "cispo",
        "surrogate_options": {"clip_max": 9.0},
        "aggregate": "constant",
        "token_broadcast": "log_decay",
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_algorithm_over_any_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(OTHERWISE))
    masked = {"loss": {"mask_truncated_completions": True, "clip_low": 0.4}}
    (tmp_path / "masked.yaml").write_text(yaml.safe_dump(masked))
    plain = parse(PolicyConfig, ["--variant", name, "--config", RECIPE])
    for file in ("other", "masked"):
        config = parse(
            PolicyConfig, ["--variant", name, "--config", RECIPE, "--config", str(tmp_path / f"{file}.yaml")]
        )
        assert config.loss == plain.loss
        for key in ("advantage", "advantage_options", "dynamic_sampling_attempts"):
            assert getattr(config, key) == getattr(plain, key)
        assert config.data == plain.data and config.temperature == (0.7 if file == "other" else 1.0)
    wanted = yaml.safe_load((ROOT / "configs" / "variants" / f"{name}.yaml").read_text())
    assert {key: getattr(config.loss, key) for key in wanted.get("loss", {})} == wanted.get("loss", {})
    assert config.advantage == wanted.get("advantage", "gopo")


def test_gopo_s_file_sets_all_that_makes_an_algorithm() -> None:
    written = yaml.safe_load((ROOT / "configs" / "variants" / "gopo.yaml").read_text())
    placement = {"offload_reference", "logprob_chunk"}  # no part of the algorithm
    sampler = {f"importance_sampling_{what}" for what in ("mode", "clip_max", "clip_min")}  # a repair, of any of them
    assert written["loss"].keys() == {item.name for item in fields(LossConfig)} - placement - sampler
    assert LossConfig(**written["loss"]) == LossConfig() and written["advantage"] == "gopo"


def test_the_command_line_overrides_a_variant() -> None:
    config = parse(PolicyConfig, ["--config", RECIPE, "--loss.clip_high=0.5", "--variant=dapo"])
    assert config.loss.clip_high == 0.5 and config.loss.clip_low == 0.2 and config.dynamic_sampling_attempts == 3
    with pytest.raises(ValueError, match="--variant: expected one of bnpo, cispo, .*, got 'dappo'"):
        parse(PolicyConfig, ["--config", RECIPE, "--variant", "dappo"])


def test_impossible_settings_are_refused(policy_config: MakeConfig, tmp_path: Path) -> None:
    def refuse(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            policy_config(tmp_path, **settings)

    refuse("minibatch_prompts: expected a divisor of prompts_per_step = 4, got 3", minibatch_prompts=3)
    refuse("microbatch_prompts: expected a divisor of minibatch_prompts = 1, got 2", minibatch_prompts=1)
    refuse("advantage: expected one of gopo, .*, or the dotted path of a function, got 'gppo'", advantage="gppo")
    refuse("advantage: no_such.f: cannot be imported", advantage="no_such.f")
    refuse("advantage_options: gdpo has no 'weights_R'", advantage="gdpo", advantage_options={"weights_R": [1.0]})
    penalty = LossConfig(kl_in="reward")
    refuse("loss.kl_in: reward is taken off one reward; gdpo takes every", advantage="gdpo", loss=penalty)
    with pytest.raises(ValueError, match="loss.kl_in: reward needs a penalty"):
        LossConfig(kl_in="reward", beta=0.0)
    with pytest.raises(ValueError, match="surrogate_options: cispo has no 'dual_clip'; expected one of clip_max"):
        LossConfig(surrogate="cispo", surrogate_options={"dual_clip": 3.0})
    for surrogate, (given, why) in {
        "cispo": ({"clip_high": 5.0}, "are of the surrogate clip; cispo has surrogate_options: clip_max"),
        "clip": ({"surrogate_options": {"dual_clip": 0.5}}, "dual_clip: expected a number above 1, got 0.5"),
        "sapo": ({"surrogate_options": {"temperature_pos": "1"}}, "temperature_pos: expected a number, got '1'"),
    }.items():
        with pytest.raises(ValueError, match=why):
            LossConfig(surrogate=surrogate, **given)  # type: ignore[arg-type]
    for name in ("clip", "cispo", "sapo"):
        for option in {"clip": ["dual_clip"], "cispo": ["clip_max"], "sapo": ["temperature_pos"]}[name]:
            for value in (float("nan"), True, 0.0):
                with pytest.raises(ValueError, match=f"{option}: expected a number"):
                    LossConfig(surrogate=name, surrogate_options={option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature_neg: expected a finite number, got inf"):
        LossConfig(surrogate="sapo", surrogate_options={"temperature_neg": float("inf")})
    for value in (float("nan"), float("inf")):
        wrong = {"advantage": "grpo", "advantage_options": {"epsilon": value}}
        refuse("advantage_options: epsilon: expected finite numbers, got", **wrong)
    refuse(
        "advantage_options: levels: expected finite numbers, got",
        advantage="odrpo",
        advantage_options={"levels": [0.0, float("nan")]},
    )
    with pytest.raises(ValueError, match="kl_in: reward and mask_truncated_completions"):
        LossConfig(kl_in="reward", mask_truncated_completions=True)
    refuse("minibatch_prompts: expected at least 1, got 0", minibatch_prompts=0)
    with pytest.raises(ValueError, match="importance_sampling_clip_max: expected at least 3"):
        LossConfig(importance_sampling_clip_min=3.0)


def test_every_surrogate_and_advantage_is_in_some_variant() -> None:
    settings = [yaml.safe_load((ROOT / "configs" / "variants" / f"{name}.yaml").read_text()) for name in VARIANTS]
    assert {each["advantage"] for each in settings if "advantage" in each} == ADVANTAGES.keys()
    assert {each["loss"]["surrogate"] for each in settings if "surrogate" in each.get("loss", {})} == SURROGATES.keys()


# Learning


def variant_settings(name: str) -> dict[str, Any]:
    """What `--variant name` sets."""
    variant = parse(PolicyConfig, ["--config", RECIPE, "--variant", name])
    names = ("advantage", "advantage_options", "dynamic_sampling_attempts", "loss")
    return {key: getattr(variant, key) for key in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"advantage {name}" for name in ADVANTAGES), *VARIANTS])
def test_every_name_has_an_update(
    name: str, policy_config: MakeConfig, tmp_path: Path, make_groups: MakeGroups, update_once: UpdateOnce
) -> None:
    plain = name.startswith("advantage ")
    settings = {"advantage": name.removeprefix("advantage ")} if plain else variant_settings(name)
    config = policy_config(tmp_path, **settings)
    found = update_once(config, make_groups(config))
    assert all(math.isfinite(value) for value in found.metrics.values()) and found.metrics["grad_norm"] > 0
    gradient = optax.tree_utils.tree_get(found.after.opt_state, "mu")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": LossConfig(token_broadcast="log_decay", kl="k2")},
        {"loss": LossConfig(token_broadcast="poly_decay", kl="k1")},
        {"loss": LossConfig(surrogate_options={"dual_clip": 3.0}), "num_iterations": 2, "minibatch_prompts": 2},
    ],
    ids=["log", "poly", "dual clip, 4 updates"],
)
def test_every_option_has_an_update(
    settings: Any, policy_config: MakeConfig, tmp_path: Path, make_groups: MakeGroups, update_once: UpdateOnce
) -> None:
    config = policy_config(tmp_path, **settings)
    found = update_once(config, make_groups(config))
    assert found.metrics["grad_norm"] > 0 and int(found.after.step) == config.updates_per_step


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(importance_sampling_mode="token_truncate", token_broadcast="loglog_decay"),
        LossConfig(importance_sampling_mode="sequence_mask", aggregate="sequence"),
    ],
    ids=["loglog and truncation", "sequence mask"],
)
def test_completions_of_another_sampler_are_weighed(
    loss: LossConfig, policy_config: MakeConfig, tmp_path: Path, make_groups: MakeGroups, update_once: UpdateOnce
) -> None:
    """The weight is the policy's probability over the sampler's, of a token or of a completion."""
    config = policy_config(tmp_path, loss=loss, num_iterations=2, microbatch_prompts=4)
    groups = make_groups(config)
    old_PGT = update_once(config, groups).batch.old_PGT
    apart_PGT = np.random.default_rng(0).normal(0, 0.1, old_PGT.shape).astype(np.float32)
    groups = groups._replace(rollout=groups.rollout._replace(logprobs_PGT=old_PGT + apart_PGT))
    found, mask_PGT = update_once(config, groups), make_batch(groups, config).mask_PGT
    if loss.importance_sampling_mode == "sequence_mask":
        apart_PGT = np.broadcast_to((apart_PGT * mask_PGT).sum(-1, keepdims=True), apart_PGT.shape)
    weights = np.exp(-apart_PGT)[mask_PGT]
    for what, expected in {"mean": weights.mean(), "min": weights.min(), "max": weights.max()}.items():
        assert found.metrics[f"sampling/importance_sampling_ratio/{what}"] == pytest.approx(expected, rel=1e-4)
    assert found.metrics["grad_norm"] > 0


@pytest.mark.slow
def test_several_updates_per_batch_leave_the_policy_that_sampled(
    policy_config: MakeConfig, tmp_path: Path, make_groups: MakeGroups, update_once: UpdateOnce
) -> None:
    """The ratio is 1 at the first update and moves away from it."""
    config = policy_config(tmp_path)
    once, often = (update_once(replace(config, num_iterations=n), make_groups(config)) for n in (1, 3))
    assert once.metrics["ratio"] == 1 and abs(often.metrics["ratio"] - 1) > 1e-6


def run(config: PolicyConfig) -> list[dict[str, float]]:
    train_policy(config)
    return numbers(Path(config.output_dir))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "rloo"])  # groups drawn anew, cut completions; the penalty in the reward
def test_a_variant_trains_three_steps(name: str, policy_config: MakeConfig, tmp_path: Path) -> None:
    rows = run(policy_config(tmp_path, **variant_settings(name)))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    cut_and_masked = [name == "dapo" and row["completions/clipped_ratio"] == 1 for row in rows[1:]]
    assert all(row["grad_norm"] > 0 or nothing for row, nothing in zip(rows[1:], cut_and_masked, strict=True))


@pytest.mark.slow
def test_interrupted_equals_uninterrupted(policy_config: MakeConfig, tmp_path: Path) -> None:
    """With all that a step may do more often than once, and a penalty in the reward."""
    settings: dict[str, Any] = {"num_iterations": 2, "minibatch_prompts": 2, "dynamic_sampling_attempts": 3}
    settings |= {"loss": LossConfig(kl_in="reward", kl="k1"), "max_steps": 4}
    module = ModuleType(f"{__name__}_rewards")
    module.coarse = lambda prompts, completions: [float(len(text) > 6) for text in completions]  # type: ignore
    settings["rewards"] = [RewardSpec(function=f"{module.__name__}.coarse")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        whole = policy_config(tmp_path / "whole", **settings)
        rows = run(whole)
        assert max(row.get("sampling/attempts", 1) for row in rows) > 1
        once = replace(whole, output_dir=str(tmp_path / "once"), num_iterations=1, max_steps=1)
        assert run(once)[1]["reward"] == rows[1]["reward"]  # drawn before anything was learned
        cut = replace(whole, output_dir=str(tmp_path / "cut"))
        shutil.copytree(whole.output_dir, cut.output_dir)  # as a kill leaves it while step 3 is saved
        for step in ("3", "4"):
            shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
        assert run(cut) == rows


# An advantage of one's own, as docs/algorithms.md shows it


def test_the_advantage_of_the_docs(policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "algorithms.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    imported = {line.split()[1].partition(".")[0] for line in code.splitlines() if line.startswith(("import", "from"))}
    assert imported == {"gopo_jax"}
    (tmp_path / "my_lab.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = policy_config(tmp_path, advantage="my_lab.best_advantages", advantage_options={"margin": 0.5})
    advantages = make_advantages(config)
    rewards = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    rewards[0, 1] = np.nan
    found = advantages(rewards[..., None], 0.0)
    for r, a in zip(rewards, found, strict=True):
        there = ~np.isnan(r)
        good = (r[there] >= r[there].max() - 0.5).astype(float)
        np.testing.assert_allclose(a[there], good - (good.sum() - good) / (there.sum() - 1), atol=1e-6)
        assert not a[~there].any()
