"""`eval speed --against DIR`: runs other trainers on the same work, in turn with gopo_jax and on the same machine.

DIR holds `run_trl.py` and `run_tunix.py`, which are called as

    PEER_PROMPT=64 PEER_COMPLETION=64 PYTHON run_trl.py grpo --data WORK --steps N --out FILE

and append one JSON line to FILE: `steps` (each with `step`, in seconds), `cold_start_s`, `peak_rss_mib`. In
workloads whose completions end early, PEER_ENDS=100 makes every token id divisible by 100, except 0, an end token.
"""

import json
import os
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPTS = {"trl": "run_trl.py", "tunix": "run_tunix.py"}
# makes glibc's malloc keep freed memory instead of returning it and faulting it in again
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


@dataclass
class Timings:
    """Measurements of one trainer over all its runs."""

    step_s: list[float] = field(default_factory=list)
    cold_start_s: list[float] = field(default_factory=list)
    peak_rss_mib: list[float] = field(default_factory=list)

    def add(self, other: "Timings") -> None:
        self.step_s += other.step_s
        self.cold_start_s += other.cold_start_s
        self.peak_rss_mib += other.peak_rss_mib

    def summary(self) -> dict[str, Any]:
        """Median seconds and the largest peak memory."""
        return {
            "step_s": statistics.median(self.step_s),
            "cold_start_s": statistics.median(self.cold_start_s),
            "peak_rss_mib": max(self.peak_rss_mib),
            "steps": self.step_s,
        }


def run_peer(
    script: Path, python: str, work: Path, steps: int, warmup: int, lengths: dict[str, int], *, tuned: bool = False
) -> Timings:
    """Runs a peer once, optionally with a tuned allocator; leaves out the first `warmup` steps.

    Raises:
      ValueError: the peer failed; the message ends with its last output.
    """
    work.mkdir(exist_ok=True)
    out = work / f"{script.stem}-{time.monotonic_ns()}.jsonl"
    command = [python, script.name, "grpo", "--data", str(work), "--steps", str(warmup + steps), "--out", str(out)]
    environment = os.environ | {f"PEER_{name}": str(value) for name, value in lengths.items()}
    environment |= TUNED if tuned else {}
    process = subprocess.run(
        command, cwd=script.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode or not out.exists():
        raise ValueError(f"{' '.join(command)}: failed ({process.returncode}): {process.stdout[-1000:].strip()}")
    row = json.loads(out.read_text().splitlines()[-1])
    return Timings([step["step"] for step in row["steps"][warmup:]], [row["cold_start_s"]], [row["peak_rss_mib"]])


def ratio_table(ours: Timings, peers: dict[str, Timings]) -> str:
    """Formats seconds and MiB of every trainer, and their ratios to those of gopo_jax."""
    own = ours.summary()
    lines = [f"{'':12}{'step':>9}{'':>8}{'cold start':>12}{'':>8}{'peak MiB':>10}{'':>8}"]
    for name, timings in {"gopo_jax": ours, **peers}.items():
        summary = timings.summary()
        ratios = {key: summary[key] / own[key] for key in ("step_s", "cold_start_s", "peak_rss_mib")}
        lines.append(
            f"{name:12}{summary['step_s']:9.2f}{ratios['step_s']:7.2f}x{summary['cold_start_s']:12.1f}"
            f"{ratios['cold_start_s']:7.2f}x{summary['peak_rss_mib']:10.0f}{ratios['peak_rss_mib']:7.2f}x"
        )
    return "\n".join(lines)
