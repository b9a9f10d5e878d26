"""What a run was started from stays what it is: models, reward models, tokenizers, rows."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from models.checkpoint import Checkpoints, read_about, read_newest_about
from models.config import read_config
from models.hf_weights import split
from models.tokenizer import Tokenizer
from models.tokenizer_copy import TOKENIZER_DIGESTS
from train.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, PolicyConfig, RewardSpec, SftConfig
from train.data.prompts import load_prompts
from train.loop import train_policy
from train.pins import Pins
from train.run.directory import Run, check_run, read_metrics
from train.running import SetupError
from train.supervised.program import load_examples
from train.supervised.sft import sft_task

MakeConfig = Callable[..., PolicyConfig]


def save_step(run: Path, step: int, about: dict[str, Any], params: Any = None, directory: str | None = None) -> None:
    checkpoints = Checkpoints(run, directory=directory)
    checkpoints.save(step, {"x": jnp.zeros(1)} if params is None else params, {"step": jnp.zeros(())}, about)
    checkpoints.close()


@pytest.fixture
def from_runs(policy_config: MakeConfig, tmp_path: Path, tiny_policy_dir: Path) -> PolicyConfig:
    """A policy that starts from step 2 of one run, against the reward model of another."""
    for name in ("sft", "rm"):
        save_step(tmp_path / name, 2, {"model": {}})
        Tokenizer(tiny_policy_dir).save(tmp_path / name / "tokenizer")
    model = ModelConfig(path=str(tmp_path / "sft"), remat="none")
    return policy_config(tmp_path, model=model, rewards=[RewardSpec(model=str(tmp_path / "rm"), batch_prompts=4)])


def go_on(config: PolicyConfig, pins: Pins) -> None:
    """Leaves a run's directory behind as the run would, with one checkpoint."""
    save_step(Path(config.output_dir), 1, {"run": {}, "pins": pins.pins}, directory=config.checkpoint.directory)


def exact_names(config: PolicyConfig) -> list[str | None]:
    pins = Pins(config)
    [reward] = pins.rewards(config.rewards)
    assert reward.label == config.rewards[0].label  # the names of metrics do not change
    return [pins.model(config.model).path, reward.model]


def test_a_newer_step_of_what_a_run_was_started_from_is_ignored(
    from_runs: PolicyConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = [f"{tmp_path / 'sft'}@2", f"{tmp_path / 'rm'}@2"]
    assert exact_names(from_runs) == started
    for name in ("sft", "rm"):
        save_step(tmp_path / name, 9, {"model": {}})
    assert exact_names(from_runs) == [name.replace("@2", "@9") for name in started]  # no checkpoint yet: it starts anew
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "9")
    go_on(from_runs, Pins(from_runs))
    save_step(tmp_path / "sft", 9, {"model": {}})
    capsys.readouterr()
    assert exact_names(from_runs) == [started[0], f"{tmp_path / 'rm'}@9"]
    assert (
        "model.path: stays " in (printed := capsys.readouterr().out.replace("\n", "")) and "rewards.rm: " not in printed
    )


@pytest.mark.parametrize("name", ["sft", "rm"])
def test_what_is_gone_or_has_changed_is_refused_by_name(from_runs: PolicyConfig, tmp_path: Path, name: str) -> None:
    go_on(from_runs, Pins(from_runs))
    setting = {"sft": "model.tokenizer", "rm": r"rewards.rm \(tokenizer\)"}[name]
    tokenizer = tmp_path / name / "tokenizer" / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text + " ")
    with pytest.raises(ValueError, match=rf"^{setting}: .*run was started from .*{name}/tokenizer, whose files"):
        Pins(from_runs)
    tokenizer.write_text(text)
    Pins(from_runs)
    save_step(tmp_path / name, 9, {"model": {}})
    shutil.rmtree(tmp_path / name / "checkpoints" / "2")
    with pytest.raises(
        ValueError, match=rf"^(model.path|rewards.rm): .*{name}: .*run was started from .*{name}@2, which is gone"
    ):
        train_policy(from_runs)


def test_a_run_from_before_there_were_pins_goes_on(from_runs: PolicyConfig, tmp_path: Path) -> None:
    save_step(Path(from_runs.output_dir), 1, {"run": {}})
    save_step(tmp_path / "sft", 9, {"model": {}})
    assert exact_names(from_runs) == [f"{tmp_path / 'sft'}@9", f"{tmp_path / 'rm'}@2"]


def test_pins_are_found_where_the_checkpoints_are(from_runs: PolicyConfig, tmp_path: Path) -> None:
    """From another output_dir too, as on another machine; and with other max_steps."""
    config = replace(from_runs, checkpoint=CheckpointConfig(directory=str(tmp_path / "far")))
    go_on(config, Pins(config))
    save_step(tmp_path / "sft", 9, {"model": {}})
    for other in (config, replace(config, output_dir=str(tmp_path / "new"), max_steps=99)):
        assert exact_names(other) == [f"{tmp_path / 'sft'}@2", f"{tmp_path / 'rm'}@2"]
    another = replace(config, output_dir=str(tmp_path / "new"), model=replace(config.model, path=f"{tmp_path / 'rm'}"))
    with pytest.raises(ValueError, match=r"model.path: .*rm, but .*new was started from .*sft \(.*sft@2\); name that"):
        Pins(another)
    assert not (tmp_path / "new").exists()


def test_the_newest_readable_about_counts(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step, {"step": step})
    assert read_newest_about(tmp_path) == {"step": 2} and read_newest_about(tmp_path / "none") == {}
    (tmp_path / "checkpoints" / "2" / "about" / "metadata").write_text("{")
    assert read_newest_about(tmp_path) == {"step": 1}
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(ValueError, match="no checkpoint in it can be read"):
        read_newest_about(tmp_path)


def test_the_base_of_adapters_is_saved_again_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    """A start that was killed before its first checkpoint may have had another base."""
    for base, expected in ((1.0, 1.0), (2.0, 2.0), (3.0, 2.0)):
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.restore_or_save_base({"x": jnp.full(2, base)})["x"][0] == expected
        if base == 2.0:
            checkpoints.save(1, {"a": jnp.zeros(1)}, {"step": jnp.zeros(())}, {})
        checkpoints.close()


def test_a_run_that_goes_on_keeps_its_tokenizer(policy_config: MakeConfig, tmp_path: Path) -> None:
    """Another run's pin would otherwise change with the version of the library that writes it."""
    config = policy_config(tmp_path)
    tokenizer, file = Tokenizer(config.model.tokenizer_path), tmp_path / "run" / "tokenizer" / "tokenizer_config.json"
    for content, is_kept in (("{}", False), ("{ }", True)):
        Run(config, {}, tokenizer).close()
        file.write_text(content)
        Run(config, {}, tokenizer).close()
        assert (file.read_text() == content) == is_kept
        save_step(tmp_path / "run", 1, {"run": {}})


# Rows


def write(file: Path, numbers: list[int], **columns: Any) -> None:
    rows = [{"prompt": f"Number {i}.", "completion": "blue"} | columns for i in numbers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sft(tmp_path: Path, tiny_policy_dir: Path) -> SftConfig:
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), validation_rows=5)
    return SftConfig(
        output_dir=str(tmp_path / "run"), model=ModelConfig(path=str(tiny_policy_dir)), data=data, max_steps=2
    )


def test_rows_that_are_added_change_neither_the_order_nor_what_is_held_out(
    sft: SftConfig, tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, pins = Tokenizer(tiny_tokenizer_dir), Pins(sft)
    load = partial(load_examples, sft, sft_task(sft), tokenizer)
    write(tmp_path / "rows.jsonl", [*range(30)])
    started = load(pins)
    assert started == load() and len(started[1]["validation"]) == 5
    save_step(tmp_path / "run", 1, {"pins": pins.pins})
    write(tmp_path / "rows.jsonl", [*range(36)])
    assert load(Pins(sft)) == started != load()
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "has changed: 6 rows were added since" in printed and "it goes on with the first 30" in printed


@pytest.mark.parametrize("numbers", [[*range(29)], [30, *range(30)], [*range(29), 77], [*reversed(range(30))]])
def test_rows_that_are_others_are_refused(
    sft: SftConfig, tmp_path: Path, tiny_tokenizer_dir: Path, numbers: list[int]
) -> None:
    tokenizer, pins = Tokenizer(tiny_tokenizer_dir), Pins(sft)
    write(tmp_path / "rows.jsonl", [*range(30)])
    load_examples(sft, sft_task(sft), tokenizer, pins)
    save_step(tmp_path / "run", 1, {"pins": pins.pins})
    write(tmp_path / "rows.jsonl", numbers)
    with pytest.raises(ValueError, match=r"data.train: .*rows.jsonl: has changed since .*expected the 30 rows of then"):
        load_examples(sft, sft_task(sft), tokenizer, Pins(sft))


def test_processes_that_read_other_rows_are_told(
    sft: SftConfig, tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.jsonl", [*range(30)])
    pins = Pins(sft)
    monkeypatch.setattr("train.pins.is_distributed", lambda: True)
    load_examples(sft, sft_task(sft), Tokenizer(tiny_tokenizer_dir), pins)
    pins = Pins(sft)
    monkeypatch.setattr("train.pins.broadcast_from_first", lambda compute: compute() | {"hash": "of process 0"})
    with pytest.raises(ValueError, match="data.train: .*rows.jsonl: process 0 reads other rows there than process 0"):
        load_examples(sft, sft_task(sft), Tokenizer(tiny_tokenizer_dir), pins)


def test_every_column_and_every_part_of_a_policys_data_counts(policy_config: MakeConfig, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")}
    data = DataConfig(**{name: str(file) for name, file in files.items()})
    config = policy_config(tmp_path, data=data, max_prompt_length=64)
    tokenizer = Tokenizer(config.model.tokenizer_path)

    def rewrite(**columns: Any) -> None:
        for number, file in enumerate(files.values()):
            write(file, [*range(9 * number, 9 * number + 9)], **columns.get(file.stem, {}))

    for settings in (config, replace(config, data=replace(data, drop_duplicates=True))):
        rewrite()
        pins = Pins(settings)
        load_prompts(settings, tokenizer, pins)
        save_step(tmp_path / "run", 1, {"pins": pins.pins})
        for name in files:
            rewrite(**{name: {"reference": "red"}})
            if name == "test" and not settings.data.drop_duplicates:  # compared with train, which changes nothing
                load_prompts(settings, tokenizer, Pins(settings))
                continue
            with pytest.raises(ValueError, match=rf"data.{name}: .*{name}.jsonl: has changed since"):
                load_prompts(settings, tokenizer, Pins(settings))
        shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_the_reference_and_the_rewards_stay_when_their_runs_go_on(
    policy_config: MakeConfig, make_model: Any, tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    """Continued after both runs have gone on = continued before, to the last digit; adapters' base likewise."""
    models = {"sft": read_config(tiny_policy_dir), "rm": read_config(tiny_reward_dir)}

    def save(step: int, seed: int) -> None:
        for name, network in models.items():
            params = split(make_model(network, seed))[1]
            save_step(tmp_path / name, step, {"model": network.to_hf(), "run": {}}, params)
            Tokenizer(tiny_policy_dir).save(tmp_path / name / "tokenizer")

    save(2, 0)
    config = policy_config(
        tmp_path,
        model=ModelConfig(path=str(tmp_path / "sft"), remat="none"),
        rewards=[RewardSpec(model=str(tmp_path / "rm"), max_length=64, batch_prompts=4)],
        loss=LossConfig(beta=0.1),
        max_steps=1,
    )
    train_policy(config)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train_policy(replace(config, max_steps=2))
    save(9, 7)
    train_policy(replace(config, output_dir=str(tmp_path / "copy"), max_steps=2))
    assert read_metrics(tmp_path / "copy", clock=False) == read_metrics(tmp_path / "run", clock=False)
    assert read_about(tmp_path / "run")["pins"]["model.path"]["exact"] == f"{tmp_path / 'sft'}@2"
    shutil.rmtree(tmp_path / "rm" / "checkpoints" / "2")
    with pytest.raises(SetupError, match=r"^rewards.rm: .*rm: .*run was started from .*rm@2, which is gone"):
        train_policy(replace(config, max_steps=3))


def test_a_damaged_tokenizer_of_a_run_is_refused_when_it_goes_on(policy_config: MakeConfig, tmp_path: Path) -> None:
    """The run's own command mends it, once the copy is deleted; an edit is accepted, once the digests are."""
    config = policy_config(tmp_path)
    run, copy = tmp_path / "run", tmp_path / "run" / "tokenizer"
    tokenizer, file, digests = Tokenizer(config.model.tokenizer_path), copy / "tokenizer.json", run / TOKENIZER_DIGESTS
    Run(config, {}, tokenizer).close()
    saved, content = digests.read_text(), file.read_bytes()
    file.write_bytes(content + b" ")
    check_run(config)  # without a checkpoint it is copied anew
    save_step(run, 1, {"run": {}})
    with pytest.raises(
        ValueError, match=rf"tokenizer.json: has changed since .* anew from {tokenizer.path}; or delete"
    ):
        check_run(config)
    shutil.rmtree(copy)
    check_run(config)
    Run(config, {}, tokenizer).close()
    assert file.read_bytes() == content and digests.read_text() == saved
    check_run(config)
    file.write_bytes(content + b" ")
    digests.unlink()
    check_run(config)
    Run(config, {}, tokenizer).close()
    assert file.read_bytes() == content + b" " and not digests.exists()


def test_a_run_does_not_begin_anew_where_its_pointer_leads_by_mistake(
    policy_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = CheckpointConfig(directory=str(tmp_path / "place"))
    config = policy_config(tmp_path, checkpoint=place)
    Run(config, {}, Tokenizer(config.model.tokenizer_path)).close()
    pointer = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    check_run(config)  # it was ended before its first checkpoint
    assert "which has no checkpoint: " in capsys.readouterr().out.replace("\n", " ")
    shutil.rmtree(tmp_path / "place")
    for settings in (config, replace(config, checkpoint=CheckpointConfig())):
        with pytest.raises(ValueError, match=f"^{pointer}: says that .*, where no directory is; correct that name"):
            check_run(settings)
    pointer.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{pointer}: expected one line, the directory of the run's checkpoints, got"):
        check_run(config)
    pointer.unlink()
    check_run(config)
