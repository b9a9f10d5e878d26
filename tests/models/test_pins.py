"""Pins of models and tokenizers: what has changed is noticed, what has not is not refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import pytest

from models.checkpoint import Checkpoints
from models.hf_weights import save_pretrained
from models.pins import check_pin, model_hash, pin_model, pin_tokenizer, weights_hash

COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def model(tmp_path: Path, tiny_policy_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_policy_dir, tmp_path / "model"))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("position", [0, 100, -1])
def test_other_weights_of_the_same_size_are_noticed(model: Path, position: int) -> None:
    pin = pin_model(str(model))
    flip(model / "model.safetensors", position)
    with pytest.raises(
        ValueError, match=r"model.path: .*model: runs/x was started from .*model, whose files have chang"
    ):
        check_pin(pin, "model.path", "runs/x")
    assert pin_model(str(model))["hash"] != pin["hash"]


def test_another_config_is_noticed_and_files_beside_the_model_are_not(model: Path) -> None:
    pin, tokenizer = pin_model(str(model)), pin_tokenizer(str(model))
    (model / "all_results.json").write_text("{}")
    (model / "README.md").write_text("A model.")
    check_pin(pin, "model.path", "runs/x")
    check_pin(tokenizer, "model.tokenizer", "runs/x")
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5.0}))
    check_pin(tokenizer, "model.tokenizer", "runs/x")
    with pytest.raises(ValueError, match="whose files have changed"):
        check_pin(pin, "model.path", "runs/x")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_another_tokenizer_is_noticed(model: Path, name: str) -> None:
    pin, weights = pin_tokenizer(str(model)), pin_model(str(model))
    (model / name).write_text((model / name).read_text() + " " if (model / name).is_file() else "{{ messages }}")
    with pytest.raises(ValueError, match=r"model.tokenizer: .* whose files have changed since"):
        check_pin(pin, "model.tokenizer", "runs/x")
    check_pin(weights, "model.path", "runs/x")


def test_every_shard_counts_and_so_does_its_place(
    tmp_path: Path, tiny_config: Any, make_model: Callable[..., Any]
) -> None:
    save_pretrained(make_model(tiny_config), tmp_path / "shards", max_shard_bytes=20_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    before = {model_hash(str(tmp_path / "shards"))}
    for file in files:
        flip(file, -1)
        before.add(model_hash(str(tmp_path / "shards")))
    assert len(files) > 1 and len(before) == 1 + len(files)


def test_a_directory_may_move_and_what_is_gone_is_named(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pins = pin_model("model"), pin_tokenizer("model")
    shutil.copytree(model, tmp_path / "elsewhere" / "model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for pin in pins:
        check_pin(pin, "model.path", "runs/x")
    shutil.rmtree(tmp_path / "elsewhere" / "model")
    for pin in pins:
        with pytest.raises(FileNotFoundError, match=r"model.path: model: runs/x was started from model, which is gone"):
            check_pin(pin, "model.path", "runs/x")


def save_step(run: Path, step: int) -> None:
    checkpoints = Checkpoints(run)
    checkpoints.save(step, {"x": jnp.zeros(1)}, {"step": jnp.zeros(())}, {"model": {}})
    checkpoints.close()


def test_a_run_is_pinned_to_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_step(run, 2)
    pin = pin_model(str(run))
    assert pin["exact"] == f"{run}@2" and pin["hash"] == weights_hash(f"{run}@2")
    save_step(run, 5)
    check_pin(pin, "model.path", "runs/x")
    shutil.copytree(run / "checkpoints" / "5", run / "checkpoints" / "2", dirs_exist_ok=True)  # another run's, say
    with pytest.raises(ValueError, match=r"was started from .*run@2, whose files have changed since"):
        check_pin(pin, "model.path", "runs/x")
    shutil.rmtree(run / "checkpoints" / "2")
    with pytest.raises(
        FileNotFoundError, match=r"was started from .*run@2, which is gone \(.*expected one of 5\); put"
    ):
        check_pin(pin, "model.path", "runs/x")
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match=r"was started from .*run@2, which is gone \("):
        check_pin(pin, "model.path", "runs/x")


def test_a_model_on_the_hub_is_pinned_to_its_commit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest commit is the pinned one's successor by then; a commit that the cache has lost is gone."""
    asked: list[tuple[str, str | None, bool]] = []
    newest = [COMMITS[0]]
    for commit in COMMITS:
        shutil.copytree(model, tmp_path / "hub" / "snapshots" / commit)

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        directory = tmp_path / "hub" / "snapshots" / (revision or newest[0])
        if not directory.is_dir():
            raise OSError("not there")
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pin, tokenizer = pin_model("org/model"), pin_tokenizer("org/model")
    assert pin["exact"] == tokenizer["exact"] == f"org/model@{COMMITS[0]}" and pin["hash"] is None
    assert asked == [("org/model", None, True), ("org/model", None, False)]
    newest[0] = COMMITS[1]
    check_pin(pin, "model.path", "runs/x")
    assert asked[-1] == ("org/model", COMMITS[0], True)
    shutil.rmtree(tmp_path / "hub" / "snapshots" / COMMITS[0])
    with pytest.raises(
        FileNotFoundError, match=f"org/model: runs/x was started from org/model@{COMMITS[0]}, which is g"
    ):
        check_pin(pin, "model.path", "runs/x")


def test_a_hash_reads_both_ends_alone(tmp_path: Path) -> None:
    """A file of 1 TB, none of which is on the disk."""
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)
    assert model_hash(str(tmp_path)) == model_hash(str(tmp_path)) and model_hash("Qwen/Qwen3-1.7B") is None
