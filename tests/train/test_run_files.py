"""Laws of what a program will write: names, places and disks that will not take it are refused before it computes."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from models.checkpoint import Checkpoints, checkpoints_folder, read_about
from train.__main__ import main
from train.config import CheckpointConfig, PolicyConfig
from train.loop import train_policy
from train.run.directory import check_run
from train.run.files import check_out, check_out_directory, check_room
from train.running import SetupError

ODD_NAMES = ["a b", "a[b", "~x", "%41", "a@5", "é", "lr=1,b", "#", "-", "a:b", " a "]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(out: str, *others: str, rows: bool = False) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError) as caught:
        check_out(out, *others, rows=rows)
    assert sorted(Path().rglob("*")) == before and "\n" not in str(caught.value)
    return str(caught.value)


# Files


@pytest.mark.parametrize("name", [*ODD_NAMES, "a[12]", "a*", "a?", "a\\b"])
def test_every_name_of_a_file_is_that_file(name: str, here: Path) -> None:
    for out in (f"{here}/{name}/{name}.jsonl", f"./{name}.jsonl", f"{name}.jsonl"):
        check_out(out, "r.jsonl", "org/data", rows=True)
    assert not list(here.iterdir()), "nothing was made"


def test_names_that_mean_something_else_are_refused(here: Path) -> None:
    assert "expected the name of what to write, got ''" in refused("")
    assert "has a character in it that is no part of a name" in refused("a\nb.jsonl")
    assert "is not UTF-8" in refused("\udcff.jsonl")
    assert "gs://bucket/o.jsonl: is an address" in refused("gs://bucket/o.jsonl")
    assert "is longer than 237 bytes" in refused("é" * 120 + ".jsonl")
    for first in ("~", "~me", "$HOME", "${RUNS}"):
        assert f"{first} means something to a shell alone" in refused(f"{first}/o.jsonl")
        Path(first).mkdir()
        check_out(f"{first}/o.jsonl")
    assert "expected a name that ends in .jsonl" in refused("o.jsonl.gz", rows=True)
    assert "expected a name that ends in .jsonl" in refused("o", rows=True)


def test_what_is_in_use_or_no_file_is_refused(here: Path) -> None:
    Path("r.jsonl.partial").write_text("{}")
    os.mkfifo("pipe")
    Path("link").symlink_to("nowhere")
    assert "is a pipe or a device" in refused("pipe")
    assert "link is a link to nothing" in refused("link/o.json")
    assert "is a directory" in refused("new/")
    assert "is the same file as r.jsonl.partial" in refused("r.jsonl.partial", "r.jsonl.partial")
    assert "is written by way of r.jsonl.partial, which is r.jsonl.partial" in refused("r.jsonl", "r.jsonl.partial")


def test_a_directory_that_permits_no_file_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_out("new/o.json")
    assert "/proc does not permit it" in refused("/proc/nowhere/o.json")  # root may write there, the kernel may not
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != here)
    assert f"{here} does not permit it" in refused("new/o.json")


def test_a_full_disk_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert f"{here} has 1.0 kB left; make room" in refused("new/o.json")
    with pytest.raises(ValueError, match="new: a checkpoint takes 5.0 kB, but only 1.0 kB are free there"):
        check_room(Path("new"), 5000, "a checkpoint")
    check_room(Path("new"), 1000, "a checkpoint")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(total=0, free=0))
    check_out("new/o.json")  # a file system that does not say


def test_a_directory_of_files() -> None:
    check_out_directory("out", "a.json", "figures/b.png", others=("a.json",))
    for out, words in {"": "expected the name", "~/out": "to a shell alone", "s3://b/out": "is an address"}.items():
        with pytest.raises(ValueError, match=words):
            check_out_directory(out, "a.json")
    with pytest.raises(ValueError, match="is the same file as out/a.json"):
        check_out_directory("out", "a.json", others=("out/a.json",))
    Path("out").touch()
    with pytest.raises(ValueError, match="out is a file; expected a directory there"):
        check_out_directory("out", "a.json")


# Runs


@pytest.fixture
def config(policy_config: Callable[..., PolicyConfig], here: Path) -> PolicyConfig:
    return policy_config(here, output_dir="run")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_checkpoints_are_restored_from_every_name_that_is_not_refused(name: str, config: PolicyConfig) -> None:
    run, params = Path("runs") / name / "x", {"w": jnp.arange(3.0)}
    check_run(replace(config, output_dir=str(run)))
    for step in (1, 2):
        checkpoints = Checkpoints(run, keep=1)
        checkpoints.save(step, params, {"step": jnp.zeros((), int)}, {"run": name})
        checkpoints.close()
    checkpoints = Checkpoints(run)
    assert checkpoints.restore(2, params, {"step": jnp.zeros((), int)})[0]["w"].tolist() == [0, 1, 2]
    assert name == "a@5" or read_about(run) == {"run": name}


@pytest.mark.parametrize("name", ["run[12]", "lr[1e-6]", "a*", "a**", "a?", "a\\b"])
def test_checkpoints_are_not_kept_where_they_could_not_be_restored(name: str, config: PolicyConfig) -> None:
    with pytest.raises(ValueError, match="checkpoints cannot be kept in a directory with .* in its path"):
        check_run(replace(config, output_dir=f"{name}/run"))
    for directory in (name, f"gs://bucket/{name}"):
        with pytest.raises(ValueError, match="checkpoints cannot be kept in a directory with .* in its path"):
            check_run(replace(config, checkpoint=CheckpointConfig(directory=directory)))
    check_run(replace(config, output_dir=f"{name}/run", checkpoint=CheckpointConfig(directory="elsewhere")))


def test_a_folder_of_checkpoints_keeps_the_blanks_of_its_name(here: Path) -> None:
    Checkpoints("run", directory=" kept ").close()
    assert checkpoints_folder("run") == checkpoints_folder(Path("run")) and (here / " kept ").is_dir()
    assert str(checkpoints_folder("run")) == f"{here}/ kept "


@pytest.mark.parametrize(
    ("output_dir", "words"),
    [
        ("gs://bucket/run", "gs://bucket/run: is an address"),
        ("~/run", "means something to a shell alone"),
        ("", "expected the name of what to write"),
        ("file", "file: is a file; expected a directory for the run"),
        ("file/run", "file is a file; expected a directory there"),
        ("/proc/run", "/proc does not permit it"),
        ("sweep@3", "sweep@3: would be read as a step of sweep"),
        ("sweep@best", "would be read as a step of sweep"),
        ("taken", "taken/metrics.jsonl: is no run's"),
    ],
)
def test_a_run_does_not_read_its_data_before_its_place_is_known(
    output_dir: str, words: str, config: PolicyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.loop.load_prompts", lambda *_: pytest.fail("the data was read"))
    Path("file").write_text("mine")
    Path("taken").mkdir()
    Path("taken/metrics.jsonl").write_text("mine")
    with pytest.raises(SetupError, match=words):
        train_policy(replace(config, output_dir=output_dir))
    assert Path("file").read_text() == Path("taken/metrics.jsonl").read_text() == "mine"


def test_a_run_whose_checkpoints_have_no_room_does_not_start(
    config: PolicyConfig, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("train.loop.Generator", lambda *_, **__: pytest.fail("it starts"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20 + 1))
    monkeypatch.setattr("train.run.directory._tree_bytes", lambda _: 10**9)
    with pytest.raises(SetupError, match=r"run/checkpoints: a checkpoint takes 2.0 GB, but only 1.0 MB are free there"):
        train_policy(config)
    kept = replace(config, checkpoint=CheckpointConfig(every=1, keep=1))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=25 * 10**8))
    with pytest.raises(SetupError, match=r"keep: 1, and one more while saving, takes 3.0 GB, but only 2.5 GB are free"):
        train_policy(kept)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=3 * 10**9))
    with pytest.raises(pytest.fail.Exception, match="it starts"):
        train_policy(kept)
    with pytest.raises(pytest.fail.Exception, match="it starts"):
        train_policy(config)
    assert "run/checkpoints: 3 checkpoints of 1.0 GB are to come, and 3.0 GB are free" in capsys.readouterr().out


# Exports


def test_an_export_does_not_replace_what_is_none(
    tiny_policy_dir: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused_export(out: str) -> str:
        assert main(["export", "--checkpoint", str(tiny_policy_dir), "--out", out]) == 2
        return capsys.readouterr().err

    Path("out.partial").mkdir()
    Path("out.partial/thesis.tex").write_text("mine")
    assert "out.partial, which is there already and is no unfinished export (it holds thesis.tex)" in refused_export(
        "out"
    )
    assert Path("out.partial/thesis.tex").read_text() == "mine"
    assert "is an address" in refused_export("gs://bucket/out") and "to a shell alone" in refused_export("~/out")
    with monkeypatch.context() as patch:
        patch.setattr("train.export.load_model", lambda *_, **__: pytest.fail("the model was read"))
        assert "/proc does not permit it" in refused_export("/proc/out")
    usage = shutil.disk_usage(here)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
        patch.setattr("train.export.parameter_bytes", lambda *_: 2**30)
        assert "takes 1.1 GB, but only 1.0 MB are free there" in refused_export("full")
    Path("killed.partial").mkdir()
    Path("killed.partial/config.json").write_text("{")
    for out in ("killed", "a [1] é"):
        assert main(["export", "--checkpoint", str(tiny_policy_dir), "--out", out]) == 0
        assert Path(out, "model.safetensors").is_file() and not Path(f"{out}.partial").exists()
        assert f"{out}: Qwen3ForCausalLM of" in capsys.readouterr().out, "brackets are printed"
