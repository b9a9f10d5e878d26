"""The examples run as they stand, and do what they say.

Those of rewards are run where what they are examples of is tested: custom_reward.py in train/test_workers.py, and
reward_server.py in train/test_remote.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import tracker
from examples.custom_reward import brevity

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_minimal_gopo_learns_what_the_judge_likes() -> None:
    """The judge's score, which nothing has seen, rises from that of chance to most of the most."""
    file = ROOT / "examples" / "minimal_gopo.py"
    ran = subprocess.run(
        [sys.executable, "-m", "examples.minimal_gopo", "150"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    scores = [float(score) for score in re.findall(r"judge ([0-9.]+) of 8", ran.stdout)]
    assert scores[0] < 1.5 and scores[-1] > 6, ran.stdout
    assert len(file.read_text().splitlines()) <= 150


def test_the_tracker_goes_on_in_its_table(tmp_path: Path) -> None:
    for step in (1, 2):
        table = tracker.Table(tmp_path, {})
        table.write_row(step, {"reward": 0.1 + 0.2, "kl": 0.0})
        table.flush()
        table.close()
    lines = [f"{step},{name}" for step in (1, 2) for name in ("reward,0.30000000000000004", "kl,0.0")]
    assert (tmp_path / "metrics.csv").read_text().splitlines() == lines


def test_the_callback_says_how_a_run_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bell = tracker.Bell(tmp_path / "mine", None)
    bell.step(1, {"reward": 0.5})
    bell.step(2, {"validation/reward": 1.0})
    bell.end(2, "SIGTERM")
    assert capsys.readouterr().out == "mine has ended at step 2 (SIGTERM), reward 0.5\n"


def test_a_text_of_too_few_words_has_no_reward() -> None:
    assert brevity(["a b", "a"], ["c d", "c d"], unknown_below=2) == [0.0, None]
