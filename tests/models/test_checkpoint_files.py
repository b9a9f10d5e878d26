"""A step whose directory is incomplete is not a checkpoint: it is named, and the one before is taken."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest
from etils import epath

from models import checkpoint_steps
from models.checkpoint import Checkpoints, find_step, read_about, resolve_step
from models.checkpoint_files import give_up_state, is_weights_only, list_steps, missing_part, warn_once
from models.checkpoint_steps import check_pointer

PARAMS = {"x": jnp.zeros(2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 to 3."""
    run = tmp_path_factory.mktemp("saved") / "run"
    checkpoints = Checkpoints(run)
    for step in (1, 2, 3):
        checkpoints.save(step, PARAMS, PARAMS, {"model": {"step": step}})
    checkpoints.close()
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    warn_once.cache_clear()
    return Path(shutil.copytree(saved, tmp_path / "run"))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: list[tuple[Callable[[Path], None], str, str]] = [
    (empty, "", "its directory is empty"),
    *((remove, item, f"{item} missing") for item in ("params", "train", "about", "digests")),
    *((empty, item, f"{item}/_METADATA missing") for item in ("params", "train")),
    *((empty, item, f"{item}/metadata missing") for item in ("about", "digests")),
    *(
        (damage, name, f"{name} {words}")
        for name in (
            "_CHECKPOINT_METADATA",
            "params/_METADATA",
            "train/manifest.ocdbt",
            "about/metadata",
            "digests/metadata",
        )
        for damage, words in ((remove, "missing"), (clear, "is empty"))
    ),
    *((remove, f"{part}commit_success.txt", f"{part}commit_success.txt missing") for part in ("", "params/", "about/")),
    (lambda file: file.write_text("{") and None, "_CHECKPOINT_METADATA", "_CHECKPOINT_METADATA is damaged"),
    (
        lambda file: file.write_text('{"commit_timestamp_nsecs": null}') and None,
        "_CHECKPOINT_METADATA",
        "_CHECKPOINT_METADATA says that it was not completed",
    ),
]


@pytest.mark.parametrize(("damage", "name", "words"), DAMAGE)
def test_a_step_that_is_not_whole_is_passed_over(
    run: Path, damage: Callable[[Path], None], name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """RUN is the step before, and says so once; RUN@STEP is refused; what resumes puts the step aside."""
    damage(run / "checkpoints" / "3" / name)
    assert find_step(run) == (run, 2) and resolve_step(str(run)) == f"{run}@2"
    assert read_about(run) == {"model": {"step": 2}}
    notes = capsys.readouterr().err
    assert notes == f"{run}/checkpoints/3: is not whole ({words}); it is passed over for step 2\n"
    with pytest.raises(FileNotFoundError) as error:
        find_step(f"{run}@3")
    assert str(error.value) == f"{run}@3: that step is not whole ({words}); expected one of 1, 2"
    checkpoints = Checkpoints(run, keep=2)
    assert checkpoints.latest() == 2
    assert checkpoints.restore(2, PARAMS, PARAMS)[0].keys() == PARAMS.keys()
    checkpoints.save(3, PARAMS, PARAMS, {})
    checkpoints.close()
    notes = capsys.readouterr().err
    assert notes == (f"{run}/checkpoints/3: is not whole ({words}); it is passed over, and is now called 3.damaged\n")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3", "3.damaged"]
    assert find_step(run) == (run, 3), "whole again"


def test_old_steps_stay_at_multiples_of_keep_every_with_their_weights_alone(tmp_path: Path) -> None:
    """They are read as any other; no run goes on from them."""
    kept = {"keep": 2, "keep_every": 3, "weights_only": True}
    for steps in (range(1, 6), range(6, 10)):  # a run that is interrupted
        checkpoints = Checkpoints(tmp_path, **kept)
        for step in steps:
            checkpoints.save(step, PARAMS, PARAMS, {"model": {"step": step}})
        checkpoints.close()
    folder = epath.Path(tmp_path / "checkpoints")
    assert list_steps(folder) == [3, 6, 8, 9]
    assert [is_weights_only(folder / str(step)) for step in (3, 6, 8, 9)] == [True, True, False, False]
    assert not (folder / "3" / "train").exists() and missing_part(folder / "3") is None
    assert read_about(f"{tmp_path}@3") == {"model": {"step": 3}} and find_step(f"{tmp_path}@6") == (tmp_path, 6)
    checkpoints = Checkpoints(tmp_path, **kept)
    assert checkpoints.latest() == 9
    checkpoints.delete_after(6)
    checkpoints.close()
    with pytest.raises(ValueError, match="a run goes on from its newest checkpoint, and step 6 has weights alone; put"):
        Checkpoints(tmp_path)


def test_a_step_that_is_interrupted_on_its_way_to_weights_alone(run: Path) -> None:
    """The mark comes first; what the kill left is removed later."""
    step = epath.Path(run / "checkpoints" / "1")
    (step / "WEIGHTS_ONLY").touch()
    (step / "train" / "_METADATA").unlink()
    assert find_step(f"{run}@1") == (run, 1)
    give_up_state(step)
    assert not (step / "train").exists() and missing_part(step) is None
    (step / "params" / "_METADATA").unlink()
    assert missing_part(step) == "params/_METADATA missing"


def test_an_older_version_marked_no_step(run: Path) -> None:
    for marker in (run / "checkpoints" / "3").rglob("commit_success.txt"):
        marker.unlink()
    assert find_step(run) == (run, 3)


def test_without_a_whole_step_nothing_starts_over(run: Path) -> None:
    for step in (1, 2, 3):
        shutil.rmtree(run / "checkpoints" / str(step) / "params")
    words = r"checkpoints: none of the checkpoints in it is whole \(step 3: params missing\)"
    with pytest.raises(FileNotFoundError, match=f"{words}; put one back, or name another checkpoint"):
        find_step(run)
    with pytest.raises(ValueError, match=f"{words}; put one back, or delete .*checkpoints to start over"):
        Checkpoints(run)
    with pytest.raises(FileNotFoundError, match=r"run@2: that step is not whole \(.*\); and no other step is"):
        find_step(f"{run}@2")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_a_second_damaged_step_of_one_number_keeps_the_first(run: Path) -> None:
    for _ in range(2):
        (run / "checkpoints" / "4").mkdir()
        Checkpoints(run).close()
    assert {"4.damaged", "4.damaged1"} < {path.name for path in (run / "checkpoints").iterdir()}
    assert missing_part(epath.Path(run / "checkpoints" / "4.damaged1")) == "its directory is empty"


def test_the_frozen_base_of_adapters_is_whole_or_refused(run: Path) -> None:
    """The steps need it; before the first step what a kill left of it is saved again."""
    checkpoints = Checkpoints(run)
    checkpoints.restore_or_save_base(PARAMS)
    (run / "checkpoints" / "base" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"base: is not whole \(_METADATA missing\); the adapters of every step"):
        checkpoints.restore_or_save_base(PARAMS)
    checkpoints.delete_after(0)
    checkpoints.restore_or_save_base(PARAMS)
    checkpoints.close()
    assert (run / "checkpoints" / "base" / "_METADATA").exists()


# Steps that are removed, or passed over on demand


def test_a_kill_while_steps_are_removed_leaves_none_half_there(run: Path) -> None:
    """Orbax first moves a step away; what a kill leaves of it is not offered, and goes at the next start."""
    removed = run / "checkpoints" / "removed"
    removed.mkdir()
    shutil.move(run / "checkpoints" / "1", removed / "1")
    (removed / "1" / "params" / "_METADATA").unlink()
    assert find_step(run) == (run, 3)
    with pytest.raises(FileNotFoundError, match="expected one of 2, 3"):
        find_step(f"{run}@1")
    Checkpoints(run, keep=2).close()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "3"}


def test_a_step_goes_when_what_replaces_it_is_on_the_disk(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(checkpoint_steps, "sync_files", lambda path: events.append(f"{path.name} is synced"))
    checkpoints = Checkpoints(run, keep=1)
    for step in (4, 5):
        checkpoints.save(step, PARAMS, PARAMS, {})
        checkpoints._manager.wait_until_finished()
        gone = sorted(path.name for path in (run / "checkpoints" / "removed").iterdir())
        events.append(f"{gone} wait in removed")
        checkpoints.wait()
        assert steps_in(run) == [str(step)] and not (run / "checkpoints" / "removed").exists()
    checkpoints.close()
    assert events == [
        "['1', '2', '3'] wait in removed",
        "4 is synced",
        "['4'] wait in removed",
        "5 is synced",
    ]


def test_what_was_to_be_removed_is_put_back_if_its_successor_is_lost(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that fails before files are on its disk leaves empty ones."""
    (run / "checkpoints" / "removed").mkdir()
    for step in "12":
        shutil.move(run / "checkpoints" / step, run / "checkpoints" / "removed" / step)
    clear(run / "checkpoints" / "3" / "params" / "_METADATA")
    checkpoints = Checkpoints(run, keep=1)
    assert checkpoints.latest() == 2 and checkpoints.restore(2, PARAMS, PARAMS)[0].keys() == PARAMS.keys()
    checkpoints.close()
    assert steps_in(run) == ["2", "3.damaged"]
    assert f"{run}/checkpoints/2: is put back, for no newer step is whole\n" in capsys.readouterr().err


def test_the_step_before_the_newest_on_demand(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest is kept under another name, whole or not; with no whole step before it nothing is touched."""
    clear(run / "checkpoints" / "1" / "about" / "metadata")
    checkpoints = Checkpoints(run, previous=True)
    assert checkpoints.latest() == 2
    checkpoints.close()
    assert steps_in(run) == ["1.damaged", "2", "3.aside"]
    assert f"{run}/checkpoints/3: is passed over, as --resume previous says, and is now called 3.aside\n" in (
        capsys.readouterr().err
    )
    with pytest.raises(
        ValueError, match="--resume previous: .* expected a step before the newest .* of its steps 2 none"
    ):
        Checkpoints(run, previous=True)
    assert steps_in(run) == ["1.damaged", "2", "3.aside"]
    with pytest.raises(ValueError, match="--resume previous: .* expected a step before .*got no step"):
        Checkpoints(run.parent / "new", previous=True)


def test_a_newest_step_that_is_not_whole_is_the_one_that_is_passed_over(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "3" / "params")
    checkpoints = Checkpoints(run, previous=True)
    assert checkpoints.latest() == 2
    checkpoints.close()
    assert steps_in(run) == ["1", "2", "3.aside"]


def steps_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_pointer_to_a_wrong_place_is_refused_by_name(tmp_path: Path) -> None:
    """No step is looked for, and no run begun anew, where the file `checkpoints` leads by mistake."""
    run, place = tmp_path / "run", tmp_path / "places" / "one"
    checkpoints = Checkpoints(run, directory=str(place))
    check_pointer(run, None)
    checkpoints.save(1, PARAMS, PARAMS, {})
    checkpoints.close()
    check_pointer(run, None)
    check_pointer(run, str(place))
    for name, words in {
        str(tmp_path / "none"): "where no directory is",
        str(tmp_path / "places"): "where no checkpoint is, but one",
    }.items():
        (run / "checkpoints").write_text(f"{name}\n")
        says = f"{run}/checkpoints says that they are in {name!r}, where no step is; correct that name"
        with pytest.raises(FileNotFoundError, match=re.escape(f"{run}: not a checkpoint; {says}")):
            find_step(f"{run}@1")
        with pytest.raises(
            ValueError, match=f"^{run}/checkpoints: says that the checkpoints of .* are in .*, {words};"
        ):
            check_pointer(run, None)
    check_pointer(run, str(tmp_path / "places"))  # as the settings say
    for content in (b"", b"\n", b" \n", b"\0\xff\x80", b"one\ntwo\n"):
        (run / "checkpoints").write_bytes(content)
        for attempt in (lambda: find_step(run), lambda: check_pointer(run, None)):
            with pytest.raises(ValueError, match=f"^{run}/checkpoints: expected one line, the directory of the run's"):
                attempt()
