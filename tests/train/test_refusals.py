"""Settings that make no sense are refused by name, in one line, when the config is read or by a dry run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.config import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
    RewardSpec,
    ValidationConfig,
)
from train.pins import Pins
from train.plan.dry_run import dry_run
from train.running import SetupError
from train.validation import check_best


def function(**settings: Any) -> RewardSpec:
    return RewardSpec(function="length", **settings)


MISNAMED = {
    "reference": ("loss.reference", {"loss": LossConfig(reference="/no/such/model")}),
    "reward": ("rewards[1].model", {"rewards": [function(), RewardSpec(model="/no/such/model")]}),
}


@pytest.mark.parametrize("case", MISNAMED)
def test_model_that_is_not_there_is_refused_under_its_settings_name(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, case: str
) -> None:
    setting, changes = MISNAMED[case]
    config = policy_config(tmp_path, **changes)
    for look in (lambda: dry_run(config, None, None), lambda: Pins(config)):
        with pytest.raises(ValueError) as caught:
            look()
        assert str(caught.value).startswith(f"{setting}: /no/such/model: no such directory; expected a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"callbacks": ["nosuch.Mail"]}, "callbacks: nosuch.Mail: cannot be imported", id="callback"),
        pytest.param({"callbacks": ["os.getcwd"]}, "callbacks: os.getcwd: expected a class", id="no hooks"),
        pytest.param({"trackers": ["nosuch.Tracker"]}, "log.trackers: nosuch.Tracker: cannot be", id="tracker"),
        pytest.param({"start_from": "nosuch@best"}, "start_from: nosuch@best: expected a run, or", id="start"),
    ],
)
def test_dry_run_refuses_what_a_run_could_not_start_with(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = policy_config(tmp_path)
    if "trackers" in changes:
        changes = {"log": replace(config.log, **changes)}
    with pytest.raises(SetupError) as caught:
        dry_run(replace(config, **changes), None, None)
    assert str(caught.value).startswith(message)


def optimizer(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: OptimizerConfig(name=name, **settings)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "every": (lambda: ValidationConfig(every=0), "validation.every: expected at least 1, got 0"),
    "temperature": (lambda: ValidationConfig(temperature=0.0), "validation.temperature: expected a number above 0"),
    "top_k": (lambda: ValidationConfig(top_k=-1), "validation.top_k: expected at least 0, got -1"),
    "checkpoint": (lambda: CheckpointConfig(every=0), "checkpoint.every: expected at least 1, got 0"),
    "rate": (optimizer("adamw", learning_rate=0.0), "optimizer.learning_rate: expected a number above 0"),
    "beta": (optimizer("adamw", adam_beta1=1.0), "optimizer.adam_beta1: expected a number in [0, 1), got 1.0"),
    "best": (lambda: CheckpointConfig(best="reward"), "checkpoint.best: expected a metric of the validation, such as"),
    "lion": (optimizer("lion", options={"b1": 2}), "optimizer.options: b1 of lion: expected a number in [0, 1), got 2"),
    "sgd": (optimizer("sgd", options={"momentum": -1}), "optimizer.options: momentum of sgd: expected a number in"),
    "muon": (optimizer("muon", options={"ns_steps": 0}), "optimizer.options: ns_steps of muon: expected at least 1"),
    "adafactor": (optimizer("adafactor", options={"decay_rate": 3}), "optimizer.options: decay_rate of adafactor: exp"),
    "moments of sgd": (optimizer("sgd", moments_dtype="bfloat16"), "optimizer.moments_dtype: bfloat16 is for momentum"),
    "state of sgd": (optimizer("sgd", offload=True), "optimizer.offload: sgd has no state without"),
    "weight": (lambda: ValidationConfig(rewards=[function(weight=3.0)]), "validation.rewards: weight is for rewards"),
    "no prompts": (
        lambda: ValidationConfig(prompts=0, top_p=0.5),
        "validation.top_p: nothing is sampled with validation.prompts: 0",
    ),
    "no token": (lambda: LossConfig(top_entropy_quantile=0.0), "loss.top_entropy_quantile: 0 leaves no token"),
    "no penalty": (lambda: LossConfig(kl_cov_ratio=0.1, ppo_kl_coef=0.0), "loss.ppo_kl_coef: 0 leaves KL-Cov no"),
    "no mode": (
        lambda: LossConfig(importance_sampling_clip_max=3.0),
        "loss.importance_sampling_clip_min, loss.importance_sampling_clip_max: are of",
    ),
    "length": (lambda: function(max_length=10), "rewards.offload, max_length: are for reward models"),
    "offload": (lambda: function(offload=True), "rewards.offload, max_length: are for reward models"),
    "experiment": (lambda: LogConfig(mlflow_experiment=""), "log.mlflow_experiment: expected a name, or null, got ''"),
    "split": (
        lambda: DataConfig(train=[DataSource(source="rows.jsonl.gz", split="train")]),
        "data.train[0].split: is of a data set on the Hub or a directory; rows.jsonl.gz has no splits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_setting_without_sense_or_effect_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_completions_cannot_be_shorter_than_they_must_be(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="^min_tokens: expected at most max_completion_length = 8, got 9$"):
        policy_config(tmp_path, min_tokens=9)
    assert policy_config(tmp_path, min_tokens=8).min_tokens == 8


@pytest.mark.parametrize(
    ("best", "is_known"),
    [
        ("validation/reward", True),
        ("validation/rewards/tiny/mean", True),
        ("validation/rewards/length/unscorable", True),
        ("validation/rm/truncated_frac", True),
        ("validation/logged/length/anything", True),
        ("validation/rewards/nosuch/mean", False),
        ("validation/loss", False),
    ],
)
def test_best_step_is_by_a_metric_that_the_validation_will_have(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, best: str, is_known: bool
) -> None:
    validation = ValidationConfig(rewards=[function()])
    config = policy_config(tmp_path, checkpoint=CheckpointConfig(best=best), validation=validation)
    if is_known:
        return check_best(config)
    with pytest.raises(ValueError, match=r"checkpoint.best: expected a metric of the validation, one of validation/"):
        check_best(config)
    return None
