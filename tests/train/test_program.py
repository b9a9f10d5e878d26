"""Laws of the loop of sft and reward models: what is not finite stops it, before anything of that step is written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import train.supervised.program
from models.checkpoint import find_step
from train.__main__ import main
from train.config import CheckpointConfig, DataConfig, LogConfig, ModelConfig, RewardModelConfig, SftConfig
from train.run.directory import read_metrics
from train.supervised.reward_model import train_reward_model
from train.supervised.sft import train_sft

Metrics = dict[str, tuple[float, float]]


@pytest.fixture
def start(
    tmp_path: Path, tiny_policy_dir: Path, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """start(program, metrics_of_step, factor_of_step): a run of 4 steps whose updates multiply the parameters."""

    def make(program: str, metrics: Callable[[int], Metrics], factor: Callable[[int], float] = lambda step: 1.0) -> Any:
        rows = [{"prompt": s[:8], "completion": s[8:16], "chosen": " yes", "rejected": " no"} for s in sentences[:8]]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def make_update(*_: Any) -> Callable[..., Any]:
            def update(state: Any, batch: Any) -> tuple[Any, Any]:
                step = int(state.step) + 1
                params = jax.tree.map(lambda leaf: leaf * factor(step), state.params)
                return state._replace(params=params, step=state.step + 1), metrics(step)

            return update

        monkeypatch.setattr(train.supervised.program, "make_supervised_update", make_update)
        kind, train_it = {"sft": (SftConfig, train_sft), "reward": (RewardModelConfig, train_reward_model)}[program]
        train_it(
            kind(
                output_dir=str(tmp_path / "run"),
                model=ModelConfig(path=str(tiny_policy_dir), remat="none"),
                data=DataConfig(train=str(tmp_path / "rows.jsonl")),
                max_steps=4,
                batch_size=4,
                max_length=16,
                checkpoint=CheckpointConfig(every=1),
                log=LogConfig(tensorboard=False, progress=False),
            )
        )

    return make


def finite(**changes: tuple[float, float]) -> Metrics:
    return {"loss": (0.5, 1.0), "grad_norm": (1.0, 1.0), **changes}


@pytest.mark.parametrize("program", ["sft", "reward"])
@pytest.mark.parametrize(("name", "value"), [("loss", math.nan), ("grad_norm", math.inf)], ids=["loss", "gradient"])
def test_nothing_is_written_of_a_step_that_is_not_finite(
    start: Callable[..., Any], tmp_path: Path, program: str, name: str, value: float
) -> None:
    with pytest.raises(FloatingPointError, match=f"step 3: {name} is {value}: the run has diverged"):
        start(program, lambda step: finite(**{name: (value, 1.0)}) if step == 3 else finite())
    assert find_step(tmp_path / "run") == (tmp_path / "run", 2)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


def test_weights_that_an_update_spoilt_are_not_saved(start: Callable[..., Any], tmp_path: Path) -> None:
    """The loss that an update descends is that of the weights before it."""
    with pytest.raises(FloatingPointError, match=r"step 2: \w+ has NaN or infinite values after the update"):
        start("sft", lambda step: finite(), lambda step: math.nan if step == 2 else 1.0)
    assert find_step(tmp_path / "run") == (tmp_path / "run", 1)


def test_a_batch_in_which_nothing_is_compared_stops_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    start("reward", lambda step: finite(loss=(0.0, 0.0)) if step == 2 else finite())
    assert ["loss" in row for row in read_metrics(tmp_path / "run")] == [True, False, True, True]


def test_a_run_that_has_diverged_ends_with_one_line_and_exit_code_1(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        train.supervised.sft, "train_sft", lambda _: start("sft", lambda step: finite(loss=(jnp.nan, 1)))
    )
    assert main(["sft", "--output_dir=x", "--model.path=x", "--data.train=x", "--max_steps=4"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: loss is nan: the run has diverged") and error.count("\n") == 1
