"""Only the order of the rewards matters to GOPO, bit for bit and all through training; to GRPO their size matters too.

Rewards that differ by a strictly increasing function: advantages and updates for all of these functions, with and
without ties, with a tiny config and with the demo's; and a pair of whole runs of `train policy`, whose reward has no
ties: it is a few bits of a hash of the tokens and, below them, a completion's place in its group, so one of 2^16
numbers; that the distortions are strictly increasing in float32 is seen on all of them.
"""

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest

from train.batch import Groups
from train.config import CheckpointConfig, LogConfig, PolicyConfig, RewardSpec
from train.loop import train_policy
from train.parse import parse
from train.run.directory import read_metrics
from train.state import TrainState

ROOT = Path(__file__).parents[2]
VALUES, PLACES = 2**16, 8  # PLACES: the largest group of these runs
ALL_REWARDS = 2 * np.arange(VALUES) / VALUES - 1
DISTORTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda r: r,
    "outliers": lambda r: np.where(np.abs(r) > 0.7, 1000 * r, r),  # both tails stretched
    "exp": lambda r: np.exp(4 * r) - 7,
    "cubic": lambda r: r**3,
}
BENT = [name for name in DISTORTIONS if name != "none"]


def distorted(name: str, values: np.ndarray) -> np.ndarray:
    return DISTORTIONS[name](values).astype(np.float32)


def hashed(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], *, distortion: str) -> list[float]:
    """A reward without ties."""
    hashes = [zlib.crc32(bytes(str(ids), "ascii")) % (VALUES // PLACES) for ids in completion_ids]
    return distorted(distortion, ALL_REWARDS[[PLACES * h + i % PLACES for i, h in enumerate(hashes)]]).tolist()


def reward(distortion: str) -> list[RewardSpec]:
    return [RewardSpec(function="rewards_of_test_invariance.hashed", name="r", options={"distortion": distortion})]


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


def assert_the_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("params", "train"):
        jax.tree.map(np.testing.assert_array_equal, a[part], b[part])
    for part in ("texts", "tables", "metrics"):
        assert a[part] == b[part]


@pytest.mark.parametrize("name", DISTORTIONS)
def test_the_distortions_are_strictly_increasing_in_float32(name: str) -> None:
    assert (np.diff(distorted(name, ALL_REWARDS)) > 0).all()


# One update


@pytest.fixture(scope="module", params=["tiny", "demo"])
def config(request: pytest.FixtureRequest, policy_config: Callable[..., PolicyConfig]) -> PolicyConfig:
    """A config of GOPO. The demo's has its own sizes, 16 x 8 completions, its loss and its optimizer."""
    tiny = policy_config(Path("nowhere"))
    if request.param == "tiny":
        return replace(tiny, advantage="gopo")
    demo = parse(PolicyConfig, ["--config", str(ROOT / "configs" / "demo" / "gopo.yaml")])
    assert (demo.prompts_per_step, demo.num_generations, demo.advantage) == (16, 8, "gopo")
    return replace(demo, model=tiny.model)


MakeUpdate = Callable[[str, str, str], Any]


def drawn(name: str, config: PolicyConfig) -> np.ndarray:
    """Rewards [P, G] as floats of `ALL_REWARDS`: all different, or with ties and a completion without a reward."""
    shape = config.prompts_per_step, config.num_generations
    if name == "distinct":
        return np.random.default_rng(0).choice(ALL_REWARDS, shape, replace=False)
    rewards_PG = np.random.default_rng(1).choice(ALL_REWARDS[:: VALUES // 3], shape)
    rewards_PG[0, 1] = np.nan
    return rewards_PG


@pytest.fixture
def updated(config: PolicyConfig, make_groups: Callable[..., Groups], update_once: Callable[..., Any]) -> MakeUpdate:
    """updated(advantage, distortion, rewards): the update with the distorted rewards."""

    def update(advantage: str, distortion: str, rewards: str) -> Any:
        rewards_PG = distorted(distortion, drawn(rewards, config))
        return update_once(replace(config, advantage=advantage), make_groups(config, rewards_PG))

    return update


@pytest.mark.parametrize("rewards", ["distinct", "with ties"])
def test_gopos_update_is_the_same_to_the_last_bit(updated: MakeUpdate, config: PolicyConfig, rewards: str) -> None:
    """Equal rewards share their mean rank, so what is equal stays equal."""
    tied = [len(set(group)) < len(group) for group in drawn(rewards, config).tolist()]
    assert any(tied) == (rewards == "with ties")
    plain = updated("gopo", "none", rewards)
    assert np.abs(plain.batch.advantages_PG).max() > 0.5
    for distortion in BENT:
        bent = updated("gopo", distortion, rewards)
        np.testing.assert_array_equal(bent.batch.advantages_PG, plain.batch.advantages_PG)
        jax.tree.map(np.testing.assert_array_equal, bent.after, plain.after)
        assert bent.metrics == plain.metrics


@pytest.mark.parametrize("distortion", BENT)
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo"])
def test_grpos_update_is_another(updated: MakeUpdate, advantage: str, distortion: str) -> None:
    plain, bent = (updated(advantage, name, "distinct") for name in ("none", distortion))
    assert np.abs(bent.batch.advantages_PG - plain.batch.advantages_PG).max() > 0.1

    def gradient(state: TrainState) -> Any:  # as Adam has it, which divides its size out of the first step
        return optax.tree_utils.tree_get(state.opt_state, "mu")

    scale = jax.tree.map(lambda a: np.abs(a).max(), gradient(plain.after))
    far = jax.tree.map(lambda a, b, s: np.abs(a - b).max() / s, gradient(plain.after), gradient(bent.after), scale)
    assert min(jax.tree.leaves(far)) > 1e-3  # the gradient of every parameter's array


# Whole runs


def test_gopos_run_is_the_same_to_the_last_bit(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    found, rewards = [], []
    for distortion in ("none", "outliers"):
        config = policy_config(
            tmp_path / distortion,
            rewards=reward(distortion),
            checkpoint=CheckpointConfig(every=100),
            log=LogConfig(tensorboard=False, progress=False, completions_every=1),
        )
        train_policy(config)
        found.append(left_behind(config))
        rewards.append([row.get("reward") for row in read_metrics(config.output_dir)])
    assert rewards[0] != rewards[1]
    assert max(row.get("rank/tie_frac", 0) for row in found[0]["metrics"]) == 0
    assert_the_same(*found)
