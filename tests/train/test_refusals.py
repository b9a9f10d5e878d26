"""Settings that make no sense are refused by name, in one line, when the config is read or by a dry run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from train.config import LossConfig, ModelConfig, PolicyConfig, RewardSpec
from train.pins import Pins
from train.plan.dry_run import dry_run
from train.running import SetupError


def function(**settings: Any) -> RewardSpec:
    return RewardSpec(function="length", **settings)


MISNAMED = {
    "policy": ("model.path", {"model": ModelConfig(path="/no/such/model")}),
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
