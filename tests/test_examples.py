"""The examples run as they stand, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
