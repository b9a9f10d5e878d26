"""What may differ between a run and its continuation, and a run that starts from a step of another."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoint import load_model
from models.hf_weights import split
from models.lora import Lora
from train.config import DataConfig, OptimizerConfig, PolicyConfig, RewardSpec, ValidationConfig
from train.loop import train_policy
from train.run.changes import differences
from train.run.directory import Run, check_output_dir, check_run, read_metrics
from train.running import SetupError

MakeConfig = Callable[..., PolicyConfig]
SETTINGS: dict[str, Any] = {
    "rewards": [RewardSpec(function="length", options={"target": 3})],
    "validation": ValidationConfig(prompts=0),
}


def parameters(run: str) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(split(load_model(run))[1])]


@pytest.fixture(scope="module")
def whole(policy_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> PolicyConfig:
    """A run of 3 steps with all its checkpoints, with adapters, whose base is started from as well."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    data = DataConfig(train=str(folder / "prompts.jsonl"))
    config = policy_config(folder, data=data, lora=Lora(rank=2), **SETTINGS)
    train_policy(config)
    return config


@pytest.mark.slow
def test_a_run_goes_on_from_a_step_of_another_as_that_one_did(whole: PolicyConfig, tmp_path: Path) -> None:
    """Parameters, optimizer, reference, order of the data and keys: the same numbers, bit for bit; and its rows."""
    again = replace(whole, output_dir=str(tmp_path / "again"), start_from=f"{whole.output_dir}@1")
    train_policy(again)
    assert parameters(again.output_dir) == parameters(whole.output_dir)
    assert read_metrics(again.output_dir, clock=False) == read_metrics(whole.output_dir, clock=False)
    steps = sorted(path.name for path in (tmp_path / "again" / "checkpoints").iterdir())
    assert steps == ["2", "3", "base"]
    train_policy(replace(again, max_steps=4))  # it needs its own checkpoints alone
    assert [row["step"] for row in read_metrics(again.output_dir)] == [1, 2, 3, 4]


def test_a_lower_learning_rate_from_an_earlier_step(whole: PolicyConfig, tmp_path: Path) -> None:
    """Also where rows were added to the data since: they are left out, as in a continuation."""
    file = Path(whole.data.train)
    before = file.read_text()
    file.write_text(before + '{"prompt": "another"}\n')
    lower = OptimizerConfig(learning_rate=1e-9, warmup_steps=1)
    again = replace(whole, output_dir=str(tmp_path / "lower"), start_from=f"{whole.output_dir}@1", optimizer=lower)
    train_policy(again)
    file.write_text(before)
    old, new = (read_metrics(config.output_dir, clock=False) for config in (whole, again))
    assert old[0] == new[0] and np.isclose(new[2]["learning_rate"], 1e-9) and old[2] != new[2]
    for name in ("reward", "completions/mean_length", "kl"):
        assert old[1][name] == new[1][name]  # the second step sampled from the same parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": "nowhere"}, "start_from: nowhere: expected a run"),
        ({"start_from": "RUN@7"}, "no such step; expected one of 1, 2, 3"),
        ({"start_from": "RUN@3"}, "RUN@3: max_steps counts its steps too; expected more than 3, got 3"),
        ({"start_from": "RUN@1", "lora": Lora(rank=3)}, r"belongs to other settings \(lora.rank: 2, now 3\)"),
    ],
    ids=["no run", "no step", "max_steps", "adapters"],
)
def test_a_start_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, whole: PolicyConfig, tmp_path: Path
) -> None:
    changes = changes | {"start_from": changes["start_from"].replace("RUN", whole.output_dir)}
    config = replace(whole, output_dir=str(tmp_path / "x"), **changes)
    with pytest.raises(SetupError, match=message.replace("RUN", re.escape(whole.output_dir))):
        train_policy(config)
    assert not (tmp_path / "x").exists()


def test_a_run_does_not_start_from_itself(whole: PolicyConfig) -> None:
    with pytest.raises(ValueError, match=r"another config \(start_from: None, now '.*@1'\); choose another place"):
        check_run(replace(whole, start_from=f"{whole.output_dir}@1"))


def test_every_leaf_that_differs_is_named(whole: PolicyConfig) -> None:
    optimizer = replace(whole.optimizer, learning_rate=5e-6, weight_decay=0.1)
    with pytest.raises(
        ValueError, match=r"\(optimizer.learning_rate: 0.001, now 5e-06\), and in optimizer.weight_decay; choose"
    ):
        check_output_dir(replace(whole, optimizer=optimizer))
    rewards = [replace(whole.rewards[0], options={"target": 4})]
    with pytest.raises(ValueError, match=r"\(rewards\[0\].options.target: 3, now 4\)"):
        check_output_dir(replace(whole, rewards=rewards))
    many = replace(whole, seed=1, temperature=0.5, optimizer=optimizer, rewards=rewards)
    with pytest.raises(ValueError, match=r"\(seed: 0, now 1\), and in .*, .*, .* and 1 more; choose another place"):
        check_output_dir(many)


def test_differences_are_leaves() -> None:
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"b": 1, "c": [1, 3]}, "e": 2}
    assert list(differences(old, new, "x")) == [("x.a.c[1]", 2, 3), ("x.e", None, 2), ("x.d", 1, None)]
    assert list(differences([1], [1, 2], "x")) == [("x", [1], [1, 2])]
    assert list(differences({"a": 1}, {"a": 1}, "x")) == []


def test_max_steps_below_the_step_is_said(
    whole: PolicyConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "steps", lambda self: iter(()))
    train_policy(replace(whole, max_steps=2))
    assert "has reached step 3 already, so that max_steps: 2 trains nothing; raise it" in capsys.readouterr().out
