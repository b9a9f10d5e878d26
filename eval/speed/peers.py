"""`eval speed --trl PYTHON --tunix PYTHON`: runs other trainers on the same work, in turn with gopo_jax.

The scripts are `run_trl.py` and `run_tunix.py` in bench/peers, or in the folder of `--against`. They are called as

    PEER_PROMPT=64 PEER_COMPLETION=64 PYTHON run_trl.py grpo --data WORK --steps N --out FILE

and append one JSON line to FILE: `steps` (each with `step`, in seconds, and where it is known `completion_tokens`, the
mean length), `cold_start_s`, `peak_rss_mib`. WORK/work.json says what the work is. A script that makes it by itself
reads the environment: tokens of a prompt and of a completion, and in workloads whose completions end early
PEER_ENDS=100, which makes every token id divisible by 100, except 0, an end token.
"""

import json
import os
import re
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.tokenizer import Tokenizer
from train.config import PolicyConfig
from train.parse import parse

SCRIPTS = {"trl": "run_trl.py", "tunix": "run_tunix.py"}
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_SCRIPTS = Path(__file__).parents[2] / "bench" / "peers"
# makes glibc's malloc keep freed memory instead of returning it and faulting it in again
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}


@dataclass
class Timings:
    """Measurements of one trainer over all its runs."""

    step_s: list[float] = field(default_factory=list)
    cold_start_s: list[float] = field(default_factory=list)
    peak_rss_mib: list[float] = field(default_factory=list)
    completion_tokens: list[float] = field(default_factory=list)  # of each timed step, where it is known

    def add(self, other: "Timings") -> None:
        self.step_s += other.step_s
        self.cold_start_s += other.cold_start_s
        self.peak_rss_mib += other.peak_rss_mib
        self.completion_tokens += other.completion_tokens

    def summary(self) -> dict[str, Any]:
        """Median seconds, the largest peak memory, and the mean length of completions (None if it is not known)."""
        return {
            "step_s": statistics.median(self.step_s),
            "cold_start_s": statistics.median(self.cold_start_s),
            "peak_rss_mib": max(self.peak_rss_mib),
            "completion_tokens": statistics.mean(self.completion_tokens) if self.completion_tokens else None,
            "steps": self.step_s,
        }


def write_work(folder: Path) -> None:
    """Writes work.json of a prepared workload: what `train policy` does there, for programs without gopo_jax.

    The keys are the fields of `Work` in bench/peers/harness.py.
    """
    config: PolicyConfig = parse(PolicyConfig, ["--config", str(folder / "config.yaml")])
    assert config.model.architecture is not None
    tokenizer, optimizer = Tokenizer(folder / "tokenizer"), config.optimizer
    work = {
        "network": config.model.architecture.to_hf(),
        "dtype": config.model.dtype,
        "tokenizer": "tokenizer",
        "prompts": [json.loads(line)["prompt"] for line in Path(config.data.train_text).read_text().splitlines()],
        "end_ids": list(tokenizer.eos_ids),
        "pad_id": tokenizer.pad_id,
        "prompts_per_step": config.prompts_per_step,
        "num_generations": config.num_generations,
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "beta": config.loss.beta,
        "clip": config.loss.clip_high,
        "learning_rate": optimizer.learning_rate,
        "adam_betas": [optimizer.adam_beta1, optimizer.adam_beta2],
        "adam_epsilon": optimizer.adam_epsilon,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
    }
    (folder / "work.json").write_text(json.dumps(work, indent=1) + "\n")


def check_peer(script: Path, python: str) -> None:
    """Asks a script of bench/peers whether its Python has all that it needs; takes a moment.

    Raises:
      ValueError: it has not; the message is the script's.
    """
    if script.parent.resolve() == OWN_SCRIPTS:  # others need not know the question
        _run([python, script.name, "check"], script.parent, {})


def run_peer(
    script: Path, python: str, work: Path, steps: int, warmup: int, lengths: dict[str, int], *, tuned: bool = False
) -> Timings:
    """Runs a peer once, optionally with a tuned allocator; leaves out the first `warmup` steps.

    Raises:
      ValueError: the peer failed; the message ends with its error, or the last line that it printed.
    """
    out = work / f"{script.stem}-{time.monotonic_ns()}.jsonl"
    command = [python, script.name, "grpo", "--data", str(work), "--steps", str(warmup + steps), "--out", str(out)]
    environment = {f"PEER_{name}": str(value) for name, value in lengths.items()}
    _run(command, script.parent, environment | (TUNED if tuned else {}))
    try:
        row = json.loads(out.read_text().splitlines()[-1])
        timed = row["steps"][warmup : warmup + steps]
        tokens = [float(step["completion_tokens"]) for step in timed if "completion_tokens" in step]
        timings = Timings(
            [float(step["step"]) for step in timed], [float(row["cold_start_s"])], [float(row["peak_rss_mib"])], tokens
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{script}: expected a JSON line with steps, cold_start_s and peak_rss_mib in the file of --out, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(timings.step_s) != steps:
        raise ValueError(f"{script}: expected {warmup + steps} steps, got {len(row['steps'])}")
    return timings


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Runs a command in a folder; raises a ValueError with the reason if it fails."""
    # a compilation cache would make every start but the first a warm one
    environment = {name: value for name, value in os.environ.items() if name != CACHE} | environment
    process = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if process.returncode:
        raise ValueError(f"{' '.join(command)}: failed ({process.returncode}): {failure_reason(process.stdout)}")


def failure_reason(output: str) -> str:
    """Returns the last line of a program's output that is an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(error|[\w.]*(Error|Exception|Interrupt))(:|$)", line)]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")


def ratio_table(ours: Timings, peers: dict[str, Timings]) -> str:
    """Formats seconds and MiB of every trainer, their ratios to those of gopo_jax, and tokens of a completion."""
    own = ours.summary()
    lines = [f"{'':12}{'step':>9}{'':>8}{'cold start':>12}{'':>8}{'peak MiB':>10}{'':>8}{'tokens':>8}"]
    for name, timings in {"gopo_jax": ours, **peers}.items():
        summary = timings.summary()
        tokens = summary["completion_tokens"]
        ratios = {key: summary[key] / own[key] for key in ("step_s", "cold_start_s", "peak_rss_mib")}
        lines.append(
            f"{name:12}{summary['step_s']:9.2f}{ratios['step_s']:7.2f}x{summary['cold_start_s']:12.1f}"
            f"{ratios['cold_start_s']:7.2f}x{summary['peak_rss_mib']:10.0f}{ratios['peak_rss_mib']:7.2f}x"
            f"{'–' if tokens is None else format(tokens, '.1f'):>8}"
        )
    return "\n".join(lines)
