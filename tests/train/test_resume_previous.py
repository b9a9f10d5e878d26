"""--resume previous: a damaged newest checkpoint is refused in one line, and the run goes on from the one before."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from models.checkpoint import STOPPED, find_step
from models.checkpoint_damage import data_files
from train.__main__ import main
from train.config import CheckpointConfig, DataConfig, ModelConfig, SftConfig
from train.run.directory import read_metrics


@pytest.fixture
def file(policy_config: Callable[..., object], tiny_policy_dir: Path, sentences: list[str], tmp_path: Path) -> Path:
    """The config of a run of `train sft` of 3 steps."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences[:8]))
    config = SftConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_policy_dir), remat="none"),
        data=DataConfig(train=str(rows)),
        max_steps=3,
        batch_size=4,
        max_length=64,
        checkpoint=CheckpointConfig(every=1),
    )
    config = replace(config, log=replace(config.log, tensorboard=False, progress=False))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(asdict(config)))
    return tmp_path / "sft.yaml"


def test_a_run_goes_on_before_its_damaged_newest_step(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what is damaged; then the run trains that step again, bit for bit, and keeps the damaged one."""
    train = ["sft", "--config", str(file)]
    run = file.parent / "run"
    assert main(train) == 0
    rows = read_metrics(run, clock=False)
    newest = run / "checkpoints" / "3"
    (data,) = data_files(newest / "params", "layers.gate_LDF")
    content = (newest / "params" / data).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    (newest / "params" / data).write_bytes(flipped)
    capsys.readouterr()
    line = rf"error: {run}: step 3 is not a checkpoint that can be read \(params/{data}: array [\w.]+ has other values "
    line += "than were saved\\); put its files back, or "
    assert main([*train, "--max_steps", "4"]) == 2
    assert re.fullmatch(f"{line}go on from step 2 with --resume previous\n", capsys.readouterr().err)
    assert main(["export", "--checkpoint", str(run), "--out", str(file.parent / "out")]) == 2
    assert re.fullmatch(f"{line}name another step, such as {run}@2\n", capsys.readouterr().err)
    assert main([*train, "--resume", "previous"]) == 0
    assert f"{newest}: is passed over, as --resume previous says, and is now called 3.aside\n" in (
        capsys.readouterr().err
    )
    assert read_metrics(run, clock=False) == rows and find_step(run)[1] == 3
    assert (run / "checkpoints" / "3.aside" / "params" / data).is_file()


def test_resume_previous_is_refused_where_it_means_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["sft", "--config", str(file)]
    run = file.parent / "run"
    assert main([*train, "--resume", "newest"]) == 2
    assert "error: --resume: expected previous behind it, got 'newest'" in capsys.readouterr().err
    assert main([*train, "--resume"]) == 2
    assert main([*train, "--dry_run", "--resume", "previous"]) == 2
    capsys.readouterr()
    assert main([*train, "--resume", "previous"]) == 2
    assert "expected a step before the newest one from which the run can go on, got no step" in capsys.readouterr().err
    (run / STOPPED).write_text('{"step": 3, "best_step": 2}')
    assert main([*train, "--resume", "previous"]) == 2
    assert f"error: --resume previous: {run} was ended by early stopping" in capsys.readouterr().err
    (run / STOPPED).write_text('{"step": 3')
    assert main(train) == 2
    assert f"error: {run / STOPPED}: is damaged, and does not say which step of the run is the best" in (
        capsys.readouterr().err
    )
