"""Times steps whose reward takes a while on other machines, without and with `rollout_ahead: 1`.

    python -m bench.rollout_ahead [SECONDS] [STEPS]

The work is that of `eval speed --workload w1` with a reward that sleeps so many seconds, as one that waits for a server
does. Both are runs of `train policy` in this process, one after the other; steps that compile do not count.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import yaml

from eval.speed.workloads import WORKLOADS, prepare
from train.config import PolicyConfig
from train.loop import train_policy
from train.parse import parse
from train.run.metrics_file import read_metrics

WARM_UP = 3


def sleeping_reward(completions: list[str], *, seconds: float = 2.0) -> list[float]:
    """Waits, then rewards the share of letters a."""
    time.sleep(seconds)
    return [text.count("a") / max(len(text), 1) for text in completions]


def main(seconds: float, steps: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        prepare(WORKLOADS["w1"], Path(work), steps + WARM_UP)
        settings = yaml.safe_load((Path(work) / "config.yaml").read_text())
        settings["rewards"] = [{"function": "bench.rollout_ahead.sleeping_reward", "options": {"seconds": seconds}}]
        settings["loss"] = {"importance_sampling_mode": "token_truncate"}
        file, medians = Path(work) / "config.yaml", dict[int, float]()
        for ahead in (0, 1):
            settings |= {"rollout_ahead": ahead, "output_dir": f"{work}/run{ahead}"}
            file.write_text(yaml.safe_dump(settings))
            train_policy(parse(PolicyConfig, ["--config", str(file)]))
            rows = read_metrics(settings["output_dir"])[WARM_UP:]
            phases = {
                name: statistics.median(row[f"timing_s/{name}"] for row in rows)
                for name in ("generate", "reward", "update", "step")
            }
            print(f"rollout_ahead: {ahead}: " + ", ".join(f"{name} {value:.2f} s" for name, value in phases.items()))
            medians[ahead] = phases["step"]
    print(f"rollout_ahead: 1 is {medians[0] / medians[1]:.2f} times as fast; medians of {steps} steps")


if __name__ == "__main__":
    main(
        seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 2.0,
        steps=int(sys.argv[2]) if len(sys.argv) > 2 else 8,
    )
