"""Only the order of the rewards matters to GOPO, bit for bit and all through training; to GRPO their size matters too.

Pairs of runs of `train policy` whose rewards differ by a strictly increasing function. The reward has no ties: it is a
few bits of a hash of the tokens and, below them, a completion's place in its group, so one of 2^16 numbers; that the
distortions are strictly increasing in float32 is seen on all of them.
"""

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
import yaml

from train.config import CheckpointConfig, LogConfig, PolicyConfig, RewardSpec
from train.loop import train_policy
from train.parse import parse
from train.run.directory import read_metrics

ROOT = Path(__file__).parents[2]
VALUES, PLACES = 2**16, 8  # PLACES: the largest group of these runs
ALL_REWARDS = 2 * np.arange(VALUES) / VALUES - 1
DISTORTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda r: r,
    "outliers": lambda r: np.where(np.abs(r) > 0.7, 1000 * r, r),  # both tails stretched
    "exp": lambda r: np.exp(4 * r) - 7,
    "cubic": lambda r: r**3,
}
slow = pytest.mark.slow
MakeRun = Callable[..., dict[str, Any]]


def distorted(name: str, values: np.ndarray) -> np.ndarray:
    return DISTORTIONS[name](values).astype(np.float32)


def hashed(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, distortion: str) -> list[float]:
    """A reward without ties."""
    hashes = [zlib.crc32(bytes(str(ids), "ascii")) % (VALUES // PLACES) for ids in completion_ids]
    return distorted(distortion, ALL_REWARDS[[PLACES * h + i % PLACES for i, h in enumerate(hashes)]]).tolist()


def coarse(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, distortion: str) -> list[float]:
    """A reward of three values, so with many ties."""
    return distorted(distortion, np.array([sum(ids) % 3 - 0.9 for ids in completion_ids])).tolist()


def reward(name: str, distortion: str) -> list[RewardSpec]:
    return [RewardSpec(function=f"rewards_of_test_invariance.{name}", name="r", options={"distortion": distortion})]


def without_rewards(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def is_reward(name: str) -> bool:
        return re.fullmatch(r"(validation/)?(reward|reward_std|rewards/.*)", name) is not None

    return [{name: value for name, value in row.items() if not is_reward(name)} for row in rows]


def left_behind(config: PolicyConfig) -> dict[str, Any]:
    """What a run ended with and wrote, but for the rewards themselves and the clock."""
    run, restore = Path(config.output_dir).absolute(), ocp.StandardCheckpointer().restore
    texts = [file.read_text().splitlines() for file in sorted(run.glob("completions/*.jsonl"))]
    tables = [pq.read_table(file).to_pydict() for file in sorted(run.glob("completions/*.parquet"))]
    return {
        "params": restore(run / "checkpoints" / str(config.max_steps) / "params"),
        "train": restore(run / "checkpoints" / str(config.max_steps) / "train"),
        "texts": without_rewards([json.loads(line) for lines in texts for line in lines]),
        "tables": without_rewards(tables),
        "metrics": without_rewards(read_metrics(run, clock=False)),
    }


@pytest.fixture(scope="module", autouse=True)
def rewards_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rewards_of_test_invariance", sys.modules[__name__])
        yield


@pytest.fixture(scope="module")
def run(policy_config: Callable[..., PolicyConfig], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """run(advantage, distortion, reward="hashed"): what it left behind; the same run is not made twice."""
    done: dict[tuple[str, ...], dict[str, Any]] = {}

    def trained(advantage: str, distortion: str, name: str = "hashed") -> dict[str, Any]:
        if (advantage, distortion, name) not in done:
            config = policy_config(
                tmp_path_factory.mktemp("run"),
                advantage=advantage,
                rewards=reward(name, distortion),
                checkpoint=CheckpointConfig(every=100),
                log=LogConfig(tensorboard=False, progress=False, completions_every=1),
            )
            train_policy(config)
            done[advantage, distortion, name] = left_behind(config)
        return done[advantage, distortion, name]

    return trained


def assert_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("params", "train"):
        jax.tree.map(np.testing.assert_array_equal, a[part], b[part])
    for part in ("texts", "tables", "metrics"):
        assert a[part] == b[part]


def ties(run: dict[str, Any]) -> float:
    return max(row["rank/tie_frac"] for row in run["metrics"] if "rank/tie_frac" in row)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_distortions_are_strictly_increasing_in_float32(name: str) -> None:
    assert (np.diff(distorted(name, ALL_REWARDS)) > 0).all()


@pytest.mark.parametrize("distortion", ["outliers", pytest.param("exp", marks=slow), pytest.param("cubic", marks=slow)])
def test_gopos_run_is_the_same_to_the_last_bit(run: MakeRun, distortion: str) -> None:
    assert ties(run("gopo", "none")) == 0
    assert_the_same(run("gopo", "none"), run("gopo", distortion))


@pytest.mark.parametrize(
    ("advantage", "distortion"),
    [("grpo", "outliers")]
    + [pytest.param("grpo", name, marks=slow) for name in ("exp", "cubic")]
    + [pytest.param("dr_grpo", name, marks=slow) for name in ("outliers", "exp", "cubic")],
)
def test_grpos_run_is_another(run: MakeRun, advantage: str, distortion: str) -> None:
    plain, other = run(advantage, "none"), run(advantage, distortion)
    assert plain["tables"][0]["completion"] == other["tables"][0]["completion"]  # they begin alike
    assert plain["tables"][0]["advantage"] != other["tables"][0]["advantage"]
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain["params"], other["params"])
    assert min(jax.tree.leaves(far)) > 1e-5  # every parameter's array has moved


@slow
def test_ties_do_not_change_that(run: MakeRun) -> None:
    """Equal rewards share their mean rank, so what is equal stays equal."""
    assert ties(run("gopo", "none", "coarse")) > 0.2
    assert_the_same(run("gopo", "none", "coarse"), run("gopo", "exp", "coarse"))


@slow
def test_the_demos_run_is_the_same_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's config, prompts and sizes, 16 x 8 completions a step; random weights, and this file's reward."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    prepare = [sys.executable, str(ROOT / "data" / "reviews" / "prepare.py"), "runs/demo"]
    subprocess.run(prepare, cwd=tmp_path, env=environment, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    config, network = (ROOT / "configs" / "demo" / f"{name}.yaml" for name in ("gopo", "sft"))
    model = {"path": None} | yaml.safe_load(network.read_text())["model"]
    arguments = ["--config", str(config), "--model", json.dumps(model)]
    arguments += ["--max_steps", "4", "--optimizer.warmup_steps", "1", "--validation.every", "2"]
    demo = parse(PolicyConfig, [*arguments, "--log.tensorboard", "false", "--log.completions_every", "1"])

    def trained(distortion: str) -> dict[str, Any]:
        run = replace(demo, output_dir=distortion, rewards=reward("hashed", distortion))
        train_policy(run)
        return left_behind(run)

    plain = trained("none")
    assert ties(plain) == 0 and len(plain["metrics"]) == 5
    assert_the_same(plain, trained("exp"))
