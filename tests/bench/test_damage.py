"""bench/soak/damage: no damage to a checkpoint goes unnoticed, and none ends in a traceback."""

from pathlib import Path

import pytest

from bench.soak.damage import DEEDS, FAULTS, damage_checkpoint, damage_pointer


def test_every_file_damaged_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = damage_checkpoint(tmp_path / "run", flips=30)
    assert not [end for end in ends if end.endswith(FAULTS)], capsys.readouterr().out
    for what in (*DEEDS, "flipped"):
        assert sum(count for end, count in ends.items() if end.startswith(f"{what}: ")) > 15
    assert ends["flipped: refused"] > 20 and ends["deleted: the step before"] > 5 and ends["zeroed: refused"] > 5


def test_every_byte_of_the_name_of_another_place_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = damage_pointer(tmp_path / "run", flips=len(str(tmp_path)))
    assert not [end for end in ends if end.endswith(FAULTS)], capsys.readouterr().out
    assert all(ends[f"{name}, flipped: refused"] > 20 for name in ("find", "go on"))
