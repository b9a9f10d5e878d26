"""`python -m eval device`: this machine's accelerator beside its plan, beside other kernels, and beside torch.

1. The programs of a policy's step are timed on the device, one after the other as in a run (`timed_programs`).
2. `python -m train plan` predicts the same step, on the CPU.
3. Every other implementation of attention and decoding in `IMPLEMENTATIONS` is timed as in 1.
4. transformers' generate and a training step in torch are timed on the same work (`torch_step`).

Each part is a process of its own, in this order, and has the time that the parts before it have left of --minutes. What
fails or does not fit is a line below the tables. The printed form is always the same, and is what docs/speed.md has.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.speed.device_report import TORCH, Report, compared_figures, markdown, planned_figures
from eval.speed.workloads import WORKLOADS, Workload
from models.config import Qwen3Config
from train.console import console, print_plain
from train.parse import parse
from train.plan.chips import chip_of
from train.run.files import check_out, write_whole
from train.running import SetupError, setup_errors

ROOT = Path(__file__).parents[2]
TINY = Qwen3Config(2048, 64, 128, 2, 4, 2, 16, tie_word_embeddings=True)
SIZES = {
    "qwen3-1.7b": WORKLOADS["qwen3-1.7b"],
    "tiny": Workload(32, 32, TINY, 4, 4, 2, dtype="bfloat16"),
}
# Name of an implementation of attention and decoding -> the settings of `train policy` that choose it. The first is
# what a run takes by default, and what is planned; the others are compared with it.
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "default": (),
    "attention by XLA": ("--mesh.attention=xla",),
    "unrolled, XLA": ("--mesh.decoding=unrolled",),
    "scanned, XLA": ("--mesh.decoding=scanned",),
}
TIMED = "eval.speed.timed_programs"
DEFAULT_CHIP = "H200"  # planned for where the machine's device is none of the plan's chips
REPEATS = 3  # timed calls of each program
LEAST_SECONDS = 15  # with less time left no part is started


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Speed and memory of this machine's accelerator, beside the plan's prediction and beside torch."""

    # qwen3-1.7b: 16 prompts x 8 completions, 512 + 512 tokens; tiny: seconds on a CPU; default: tiny on a CPU alone
    size: Literal["qwen3-1.7b", "tiny"] | None = None
    minutes: float = 10.0  # for the whole program; what does not fit is left out, and a line says so
    json: str | None = None  # a JSON file to write all figures to
    out: str | None = None  # a Markdown file to write the printed tables to

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes: expected a finite number above 0, got {self.minutes}")

    @property
    def command(self) -> str:
        """The command line of these settings, files left out."""
        given = f" --size {self.size}" if self.size is not None else ""
        return f"python -m eval device{given}" + (f" --minutes {self.minutes:g}" if self.minutes != 10 else "")


def parse_device(arguments: list[str]) -> DeviceConfig:
    return parse(DeviceConfig, arguments, "python -m eval device")


@dataclass
class Parts:
    """Runs parts as processes, each in the time that is left."""

    folder: Path  # for their files
    minutes: float
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.began)

    def run(self, name: str, command: list[str], out: Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Runs a command that writes JSON to `out`; returns that, or what was written of it until the time was over.

        Args:
          name: of the part, in notes.
          command: arguments of Python.
          env: what its environment has beside this one's.
        """
        seconds = self.seconds_left
        if seconds < LEAST_SECONDS:
            self.notes.append(f"{name}: left out, since {max(seconds, 0):.0f} s of --minutes {self.minutes:g} are left")
            return {}
        console.print(f"{name} ...", highlight=False)
        log, began = self.folder / f"{out.name}.log", time.monotonic()
        with open(log, "w", encoding="utf-8") as file:
            try:
                code = subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=os.environ | (env or {}), stdout=file, stderr=file,
                    timeout=seconds,
                ).returncode  # fmt: skip
                why = f"failed ({code}): {last_line(log)}" if code else ""
            except subprocess.TimeoutExpired:
                why = f"ended unfinished after {seconds:.0f} s, when the time of --minutes {self.minutes:g} was over"
        if why:
            self.notes.append(f"{name}: {why}")
        console.print(f"{name}: {why or 'done'}, {time.monotonic() - began:.0f} s", highlight=False)
        return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}

    def run_module(self, name: str, module: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a module that reads a JSON file of settings and writes one of figures."""
        stem = f"{len(list(self.folder.iterdir()))}-{module}"
        given, out = self.folder / f"{stem}.settings.json", self.folder / f"{stem}.json"
        given.write_text(json.dumps(settings), encoding="utf-8")
        return self.run(name, ["-m", module, str(given), str(out)], out)


def measure_device(config: DeviceConfig) -> dict[str, Any]:
    """Measures, prints the report and writes it; returns the content of `--json`.

    Raises:
      SetupError: no place to write to, a size that a CPU cannot do, or the code's own programs failed.
    """
    with setup_errors():
        if config.json is not None:
            check_out(config.json)
        if config.out is not None:
            check_out(config.out, *filter(None, [config.json]))
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(Path(folder), config.minutes)
        report = make_report(config, parts)
    text = markdown(report)
    print_plain(f"\n{text}")
    result = asdict(report) | {"table": [compared._asdict() for compared in compared_figures(report)]}
    for out, content in ((config.json, json.dumps(result, indent=2) + "\n"), (config.out, text)):
        if out is not None:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(out), content)
    if "update_s" not in report.figures[next(iter(IMPLEMENTATIONS))]:
        raise SetupError(f"device: not everything was measured: {'; '.join(report.notes)}")
    return result


def make_report(config: DeviceConfig, parts: Parts) -> Report:
    """Runs all parts in the order of their importance."""
    machine = parts.run_module("machine", TIMED, {"program": "machine", "dtype": "bfloat16"})
    if not machine:
        raise SetupError(f"device: JAX finds no device: {'; '.join(parts.notes)}")
    on_cpu = machine["platform"] == "cpu"
    size = config.size or ("tiny" if on_cpu else "qwen3-1.7b")
    if on_cpu and config.size not in (None, "tiny"):
        raise SetupError(f"size: expected tiny, for JAX finds no accelerator here but a CPU alone, got {config.size}")
    workload, chip = SIZES[size], chip_of(machine["device"]) or DEFAULT_CHIP
    facts = {"size": size, "command": config.command, "date": time.strftime("%Y-%m-%d"), "planned_for": chip}
    arguments = policy_arguments(workload)
    (default, own), *others = IMPLEMENTATIONS.items()

    def time_step(name: str, settings: tuple[str, ...]) -> dict[str, Any]:
        step = {"program": "step", "arguments": [*arguments, *settings], "repeats": REPEATS}
        return parts.run_module(f"step, {name}", TIMED, step)

    figures = {default: time_step(default, own)}
    plan_file = parts.folder / "plan.json"
    command = ["-m", "train", "plan", *arguments, *own, "--chip", chip, "--out", str(plan_file)]
    # The plan must not take the accelerator.
    plan = parts.run(f"plan, {chip}", command, plan_file, {"JAX_PLATFORMS": "cpu"})
    figures |= {name: time_step(name, settings) for name, settings in others}
    figures[TORCH] = time_in_torch(workload, machine["platform"], parts)
    planned, notes = planned_figures(plan, chip)
    report = Report(facts | machine, asdict(workload), figures, planned, notes)
    if not report.is_planned:
        notes.append(f"planned: for one {chip}, which this machine is not, so there is no ratio")
    if on_cpu:
        notes.append("memory: of a whole process, with Python and compilers")
    if not others:
        notes.append(f"implementations of attention and decoding: {default} alone, so none is compared with it")
    notes += parts.notes
    return report


def time_in_torch(workload: Workload, platform: str, parts: Parts) -> dict[str, Any]:
    """Times transformers' generate and a training step in torch; notes why where it cannot."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing or platform not in ("cpu", "gpu"):
        why = f"{' and '.join(missing)} not installed" if missing else f"it does not run on a {platform}"
        parts.notes.append(f"{TORCH}: left out, {why}")
        return {}
    work = {
        "network": workload.network.to_hf(),
        "platform": platform,
        "prompts": workload.prompts_per_step,
        "generations": workload.num_generations,
        "prompt": workload.prompt,
        "completion": workload.completion,
        "microbatch_prompts": workload.microbatch_prompts,
        "dtype": workload.dtype,
        "beta": 0.04,
        "repeats": REPEATS,
    }
    return parts.run_module(TORCH, "eval.speed.torch_step", work)


def policy_arguments(workload: Workload) -> list[str]:
    """Returns a command line of `train policy` and `train plan` for a workload on one device; it names no real file."""
    network = {name: value for name, value in asdict(workload.network).items() if value is not None}
    settings = {
        "output_dir": "none",
        "data.train": "none",
        "model.tokenizer": "none",
        "model.architecture": json.dumps(network),
        "model.dtype": workload.dtype,
        "model.param_dtype": workload.dtype,
        "rewards": '[{"function": "eval.speed.workloads.even_share"}]',
        "max_steps": 10,
        "prompts_per_step": workload.prompts_per_step,
        "num_generations": workload.num_generations,
        "microbatch_prompts": workload.microbatch_prompts,
        "max_prompt_length": workload.prompt,
        "max_completion_length": workload.completion,
        "min_tokens": workload.completion,  # none ends early
        "mesh": "data=1,fsdp=1,tensor=1",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def last_line(file: Path) -> str:
    """Returns the last line of a program's output that is not empty."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")
