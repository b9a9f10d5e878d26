"""Early stopping: a function of the metrics' rows, exact whenever the run was killed; the run then is its best step."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoint import STOPPED, Checkpoints, find_step
from train.config import (
    CheckpointConfig,
    DataConfig,
    EarlyStoppingConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RewardModelConfig,
)
from train.run.directory import Run, read_metrics
from train.run.files import write_jsonl
from train.running import SetupError
from train.supervised import stopping
from train.supervised.reward_model import train_reward_model
from train.supervised.stopping import EarlyStopping

Dies = Callable[[type[BaseException]], Any]


def by_hand(values: list[float], patience: int, min_delta: float) -> tuple[int, int | None]:
    """(best, where it stops) of a list of losses, both counted from 1."""
    best = 0
    for i, value in enumerate(values):
        if i == 0 or value < np.float32(values[best]) - np.float32(min_delta):
            best = i
        elif i - best >= patience:
            return best + 1, i + 1
    return best + 1, None


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.3])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_it_stops_where_it_would_by_hand(patience: int, min_delta: float, metric: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=12).astype(np.float32).tolist()
        best, stops = by_hand([v if metric == "loss" else -v for v in values], patience, min_delta)
        seen = EarlyStopping(EarlyStoppingConfig(patience=patience, min_delta=min_delta, metric=metric))
        for step, value in enumerate(values, 1):
            improved = seen.observe(step, {f"validation/{metric}": value})
            assert improved == (seen.best_step == step)
            if seen.exhausted:
                break
        assert (seen.best_step, seen.last_step if seen.exhausted else None) == (best, stops)


def test_a_number_that_does_not_exist_is_no_improvement_and_off_is_off() -> None:
    seen = EarlyStopping(EarlyStoppingConfig(patience=2))
    assert [
        seen.observe(i, m) for i, m in enumerate([{"validation/loss": 1.0}, {}, {"validation/loss": np.nan}], 1)
    ] == [
        True,
        False,
        False,
    ]
    assert seen.exhausted and seen.best_step == 1
    off = EarlyStopping(EarlyStoppingConfig())
    assert not off.observe(1, {"validation/loss": 1.0}) and not off.exhausted


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    checkpoints, params = Checkpoints(tmp_path, keep=2), {"x": jnp.zeros(2)}
    for step in range(1, 7):
        checkpoints.best = 2 if step < 6 else 4
        checkpoints.save(step, params, params, {})
        checkpoints.wait()
        if step == 5:
            assert steps_of(tmp_path) == [2, 4, 5]
    assert steps_of(tmp_path) == [4, 5, 6]
    checkpoints.delete_after(4)
    checkpoints.close()
    assert steps_of(tmp_path) == [4] and find_step(tmp_path)[1] == 4


def steps_of(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


class Killed(BaseException):
    pass


@pytest.fixture
def config(tmp_path: Path, tiny_policy_dir: Path, sentences: list[str]) -> RewardModelConfig:
    """Learns to tell yes from no; on the validation set, where they are turned, it gets worse from the start."""
    pairs = [{"prompt": s[:8], "chosen": " yes", "rejected": " no"} for s in sentences[:16]]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    for name, rows in (("train", pairs), ("turned", turned)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "turned")}
    return RewardModelConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_policy_dir), remat="none"),
        data=DataConfig(train=data["train"], validation=data["turned"], held_out={"same": data["train"]}),
        max_steps=30,
        batch_size=8,
        max_length=16,
        eval_steps=2,
        early_stopping=EarlyStoppingConfig(patience=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        checkpoint=CheckpointConfig(every=3, keep=1),
        log=LogConfig(tensorboard=False, progress=False),
    )


def what_is_there(run: Path) -> dict[str, Any]:
    """All of a run that is not a time."""
    rows = [{k: v for k, v in row.items() if not k.startswith("timing_s/")} for row in read_metrics(run)]
    files = {name: (run / name).read_text() for name in (STOPPED, "calibration.json")}
    return {"rows": rows, "steps": steps_of(run), "newest": find_step(run)[1], **files}


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_in_the_same_state(
    config: RewardModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dies: Dies,
) -> None:
    run = Path(config.output_dir)
    train_reward_model(config)
    expected = what_is_there(run)
    assert expected["steps"] == [2] and expected["newest"] == 2
    assert json.loads(expected[STOPPED]) == {"step": 6, "best_step": 2, "metric": "loss"}
    assert [row["step"] for row in expected["rows"]] == list(range(7)), "metrics.jsonl keeps all rows"
    calibration = json.loads(expected["calibration.json"])
    assert calibration["step"] == 2 and set(calibration["sets"]) == {"validation", "validation/same"}
    names = {"accuracy", "loss", "ece", "length_baseline_accuracy"}
    assert {f"validation/{p}{name}" for p in ("", "same/") for name in names} <= set(expected["rows"][6])
    assert expected["rows"][6]["validation/same/accuracy"] == 1 - expected["rows"][6]["validation/accuracy"]

    capsys.readouterr()
    train_reward_model(config)
    assert "ended at step 6; the run is its best step, 2" in capsys.readouterr().out
    assert what_is_there(run) == expected

    def killed_in(owner: Any, name: str, call: int, after: bool) -> dict[str, Any]:
        """Killed at the call-th call of a function, before or behind it, then started again."""
        whole, calls = getattr(owner, name), []

        def function(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if len(calls) == call and not after:
                raise Killed
            result = whole(*arguments, **options)
            if len(calls) == call:
                raise Killed
            return result

        run.rename(tmp_path / f"run_{name}_{call}_{after}")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            with dies(Killed):
                train_reward_model(config)
        assert not calls[call:]
        train_reward_model(config)
        return what_is_there(run)

    assert killed_in(Run, "save", 1, False) == expected  # of step 2, the best
    assert killed_in(Run, "save", 3, False) == expected  # of step 6, at which it stops
    assert killed_in(Run, "wait", 1, True) == expected  # all is saved, nothing said
    assert killed_in(stopping, "write_whole", 1, True) == expected  # said, nothing removed
    assert killed_in(Run, "delete_after", 1, True) == expected

    (run / STOPPED).unlink()
    train_reward_model(replace(config, early_stopping=EarlyStoppingConfig(patience=3)))
    assert json.loads((run / STOPPED).read_text()) == {"step": 8, "best_step": 2, "metric": "loss"}
    assert read_metrics(run)[-1]["step"] == 8 and steps_of(run) == [2]

    write_jsonl(run / "metrics.jsonl", [{"step": 1, "timing_s/validation": 0.0, "validation/loss": -1.0}])
    stands_at = SimpleNamespace(path=run, start=1, config=config)
    with pytest.raises(ValueError, match="its best step is 1, whose checkpoint was not kept"):
        EarlyStopping(config.early_stopping).replay(stands_at)  # type: ignore[arg-type]


@pytest.mark.slow
def test_without_its_rows_it_does_not_guess(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, dies: Dies
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "wait", kill)
        with dies(Killed):
            train_reward_model(config)
    (Path(config.output_dir) / "metrics.jsonl").unlink()
    with pytest.raises(SetupError, match="expected rows up to step 6"):
        train_reward_model(config)
