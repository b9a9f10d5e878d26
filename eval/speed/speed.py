"""`python -m eval speed`: seconds and memory of a training step, and its share of the machine's peak arithmetic.

A workload is a network with random weights and prompts of fixed lengths. The timed program is `python -m train policy`
in a process of its own, first with an empty compilation cache, then with the cache of the first process. The peak is
the best rate of a square matrix product, measured on the same machine.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.speed.machine import copy_gbytes, matmul_gflops
from eval.speed.peers import OWN_SCRIPTS, SCRIPTS, Timings, check_peer, ratio_table, run_peer, write_work
from eval.speed.workloads import END_SHARE, WORKLOADS, Workload, prepare
from models.config import REWARD_MODEL
from models.flops import decode_bytes, forward_flops, step_flops
from models.tokenizer import Tokenizer
from train.console import console
from train.data.rows import load_rows
from train.parse import parse
from train.run.files import check_out, write_whole
from train.run.metrics_file import read_metrics
from train.running import setup_errors

UNTIMED = 2  # first steps, left out of every median


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Seconds of a policy's training step and of its parts."""

    workload: str = "w1"  # w1 to w4 or qwen3-SIZE: see eval/speed/workloads.py
    steps: int = 7  # steps that are timed, after two that are not
    rollout_prompts: int | None = None  # prompts that are sampled at a time; null: all of a step
    json: str | None = None  # a JSON file to write the figures to
    # a Python that has TRL, which is then run in turn with ours (bench/peers/README.md has how to make one); null: not
    trl: str | None = None
    tunix: str | None = None  # the same of Tunix
    against: str | None = None  # a folder with other scripts that run them (eval/speed/peers.py); null: bench/peers
    tuned: bool = False  # TRL once more, with an allocator that keeps what is freed
    rounds: int = 2  # how many times each trainer is run, in turn
    sweep: str | None = None  # a picture to draw: step time against each of G, lengths and vocabulary
    # a folder to write the workload to, for a script of bench/peers alone; nothing is measured
    prepare: str | None = None

    def __post_init__(self) -> None:
        if self.workload not in WORKLOADS:
            raise ValueError(f"workload: expected one of {', '.join(WORKLOADS)}, got {self.workload!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if self.rollout_prompts is not None and self.rollout_prompts < 1:
            raise ValueError(f"rollout_prompts: expected at least 1, got {self.rollout_prompts}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.sweep is not None and not self.sweep.lower().endswith((".png", ".svg", ".pdf")):
            raise ValueError(f"sweep: expected a picture's name that ends in .png, .svg or .pdf, got {self.sweep!r}")
        if self.sweep is not None and (self.peers or self.against is not None):
            raise ValueError("against, trl, tunix, sweep: expected peers or a sweep, one of the two at a time")
        if self.prepare is not None and (self.peers or self.against or self.sweep or self.json):
            raise ValueError("prepare: measures nothing; leave out --against, --trl, --tunix, --sweep and --json")
        if self.tuned and self.trl is None:
            raise ValueError("tuned: expected --trl PYTHON with it")
        if self.against is not None and not self.peers:
            raise ValueError("against: expected --trl PYTHON or --tunix PYTHON, of an environment that has it")
        for name, python in self.peers.items():
            if not self.script(name).is_file():
                raise ValueError(f"against: expected {SCRIPTS[name]} in {self.script(name).parent}, there is none")
            if shutil.which(python) is None:
                raise ValueError(f"{name}: {python} is not a program; expected the path of a Python that has it")

    def script(self, peer: str) -> Path:
        """The file that runs a peer."""
        return (OWN_SCRIPTS if self.against is None else Path(self.against)) / SCRIPTS[peer]

    @property
    def peers(self) -> dict[str, str]:
        """The Python of each peer that takes part, as an absolute path: the scripts run in their own folder."""
        given = {name: getattr(self, name) for name in SCRIPTS if getattr(self, name) is not None}
        return {name: os.path.abspath(shutil.which(python) or python) for name, python in given.items()}


def parse_speed(arguments: list[str]) -> SpeedConfig:
    return parse(SpeedConfig, arguments, "python -m eval speed")


def speed(config: SpeedConfig) -> dict[str, Any]:
    """Measures a workload and prints a table; returns the content of `--json`.

    Raises:
      SetupError: the program, or a peer's, failed.
    """
    workload = replace(WORKLOADS[config.workload], rollout_prompts=config.rollout_prompts)
    with setup_errors():
        for out in filter(None, (config.json, config.sweep)):
            check_out(out)
        if config.prepare is not None:
            result = prepare_alone(config, workload, Path(config.prepare))
        elif config.sweep is not None:
            result = sweep(workload, config.steps, Path(config.sweep))
        elif config.peers:
            result = compare_with_peers(config, workload)
        else:
            result = measure_workload(config, workload)
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(config.json), json.dumps(result, indent=2) + "\n")
    return result


def prepare_alone(config: SpeedConfig, workload: Workload, folder: Path) -> dict[str, Any]:
    """Writes a workload to a folder and says how a peer is run on it."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare(workload, folder, UNTIMED + config.steps)
    write_work(folder)
    steps = f"--data {folder.resolve()} --steps {UNTIMED + config.steps}"
    console.print(f"PYTHON bench/peers/run_trl.py grpo {steps}", highlight=False, soft_wrap=True)
    return {"workload": config.workload, "folder": str(folder)}


def measure_workload(config: SpeedConfig, workload: Workload) -> dict[str, Any]:
    """Runs the program on a workload, once cold and once warm."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(workload, work, UNTIMED + config.steps)
        cold = run_program(work, max_steps=1)
        warm = run_program(work, max_steps=UNTIMED + config.steps)
        rows = load_rows(str(work / "prompts.jsonl"))
        prompts = Tokenizer(work / "tokenizer").encode([row["prompt"] for row in rows])
        length = round(statistics.median(row["completions/mean_length"] for row in warm.rows[UNTIMED:]))
        reward_model_s = score_seconds(workload, work, prompts, length)
    peak, copy = matmul_gflops(workload.dtype), copy_gbytes()
    timed = warm.rows[UNTIMED:]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in timed)

    P, G = workload.prompts_per_step, workload.num_generations
    work_done = ([len(ids) for ids in prompts[:P]], [[length] * G] * P)
    flops = step_flops(forward_flops(workload.network, *work_done) / 1e9, reference=True)
    flops["reward_model"] = forward_flops(replace(workload.network, architecture=REWARD_MODEL), *work_done) / 1e9
    read = decode_bytes(workload.network, *work_done, itemsize=4 if workload.dtype == "float32" else 2) / 1e9
    seconds = {part: median(f"timing_s/{part}") for part in ("step", "generate", "reward", "update")}
    result = {
        "workload": config.workload,
        "step_s": seconds["step"],
        "generate_s": seconds["generate"],
        "score_s": seconds["reward"],
        "reward_model_s": reward_model_s,
        "update_s": seconds["update"],
        "peak_rss_mib": warm.peak_rss_mib,
        "cold_start_s": cold.first_step_s,
        "warm_start_s": warm.first_step_s,
        "matmul_gflops": peak,
        "update_fraction_of_peak": flops["update"] / seconds["update"] / peak,
        "generate_fraction_of_peak": flops["generate"] / seconds["generate"] / peak,
        "step_fraction_of_peak": flops["step"] / seconds["step"] / peak,
        "copy_gbytes": copy,
        "generate_fraction_of_copy": read / seconds["generate"] / copy,
        "least_gflop": flops,
        "mean_completion_length": length,
        "compilations": warm.compilations,
        "steps": [{name: row[f"timing_s/{name}"] for name in seconds} for row in timed],
    }
    print_figures(result, workload)
    return result


def compare_with_peers(config: SpeedConfig, workload: Workload) -> dict[str, Any]:
    """Runs peers and gopo_jax in turn; each cold start of gopo_jax has an empty compilation cache."""
    turns = [(name, name, python) for name, python in config.peers.items()]
    turns += [("trl_tuned", "trl", config.peers["trl"])] if config.tuned else []
    ours, peers = Timings(), {label: Timings() for label, _, _ in turns}
    for name, python in config.peers.items():
        check_peer(config.script(name), python)
    lengths = {"PROMPT": workload.prompt, "COMPLETION": workload.completion}
    lengths |= {"ENDS": END_SHARE} if workload.ends else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(workload, work, UNTIMED + config.steps)
        write_work(work)
        for _ in range(config.rounds):
            for label, name, python in turns:
                script, tuned = config.script(name).resolve(), label != name
                peers[label].add(run_peer(script, python, work, config.steps, UNTIMED, lengths, tuned=tuned))
                shutil.rmtree(work / "xla", ignore_errors=True)
                run = run_program(work, UNTIMED + config.steps)
                seconds, tokens = (
                    [row[name] for row in run.rows[UNTIMED:]] for name in ("timing_s/step", "completions/mean_length")
                )
                ours.add(Timings(seconds, [run.first_step_s], [run.peak_rss_mib], tokens))
        warm = run_program(work, max_steps=1)
    console.print(ratio_table(ours, peers), highlight=False)
    console.print(f"warm start  {warm.first_step_s:.1f} s", highlight=False)
    summaries = {name: timings.summary() for name, timings in {"gopo_jax": ours, **peers}.items()}
    return {"workload": config.workload, "warm_start_s": warm.first_step_s, "against": summaries}


SWEEPS = {
    "num_generations": [2, 4, 8, 16, 32],
    "prompt": [64, 128, 256, 512, 1024],
    "completion": [64, 128, 256, 512],
    "vocab_size": [4096, 16384, 65536, 151_936],
}
STEP_PARTS = ("step", "generate", "update")


def sweep(workload: Workload, steps: int, picture: Path) -> dict[str, Any]:
    """Step time against each setting of SWEEPS, the others as in the workload."""
    points: dict[str, list[dict[str, float]]] = {}
    for name, values in SWEEPS.items():
        points[name] = []
        for value in values:
            changed = (
                {name: value} if name != "vocab_size" else {"network": replace(workload.network, vocab_size=value)}
            )
            with tempfile.TemporaryDirectory() as folder:
                prepare(replace(workload, **changed), Path(folder), UNTIMED + steps)
                run = run_program(Path(folder), UNTIMED + steps)
            timed = run.rows[UNTIMED:]
            parts = {part: statistics.median(row[f"timing_s/{part}"] for row in timed) for part in STEP_PARTS}
            points[name].append({"value": value, **parts, "peak_rss_mib": run.peak_rss_mib})
            console.print(
                f"{name:16}{value:8d}  "
                + "  ".join(f"{part} {parts[part]:7.3f} s" for part in STEP_PARTS)
                + f"  {run.peak_rss_mib:6.0f} MiB",
                highlight=False,
            )
    draw_sweep(points, picture)
    return {"sweep": points}


def draw_sweep(points: dict[str, list[dict[str, float]]], picture: Path) -> None:
    """Draws a panel for each setting: seconds of a step and of its parts, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(2, 2).flat, points.items(), strict=True):
        values = [row["value"] for row in rows]
        for part, marker in zip(STEP_PARTS, "os^", strict=False):
            axes.plot(values, [row[part] for row in rows], marker=marker, label=part)
        axes.plot(values, [rows[0]["step"] * value / values[0] for value in values], ":", color="0.6", label="linear")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


def print_figures(result: dict[str, Any], workload: Workload) -> None:
    P, G = workload.prompts_per_step, workload.num_generations
    console.print(
        f"{result['workload']}: {P} prompts of at most {workload.prompt} tokens, {G} completions of at most "
        f"{workload.completion} (mean {result['mean_completion_length']:.0f}); medians of {len(result['steps'])} steps"
    )
    console.print(f"{'':18}{'seconds':>9}{'GFLOP/s':>9}{'of peak':>9}", highlight=False)
    for part in ("step", "generate", "update", "reward_model"):
        rate = result["least_gflop"][part] / result[f"{part}_s"]
        line = f"{part:18}{result[f'{part}_s']:9.3f}{rate:9.1f}{rate / result['matmul_gflops']:9.0%}"
        console.print(line, highlight=False)
    console.print(
        f"{'score':18}{result['score_s']:9.3f}  by a function; reward_model is a network of the policy's size\n"
        f"{'cold start':18}{result['cold_start_s']:9.2f}  to the end of the first step, nothing cached\n"
        f"{'warm start':18}{result['warm_start_s']:9.2f}  with the compilation cache\n"
        f"{'peak memory':18}{result['peak_rss_mib']:9.0f}  MiB\n"
        f"{'matmul peak':18}{'':9}{result['matmul_gflops']:9.1f}\n"
        f"{'copy':18}{'':9}{result['copy_gbytes']:9.1f}  GB/s; generate reads "
        f"{result['generate_fraction_of_copy']:.0%} of that\n"
        f"{'compilations':18}{result['compilations']['all']:9d}  {result['compilations']['timed']} in the timed steps",
        highlight=False,
    )


@dataclass
class RunFigures:
    """Figures of one run of the program."""

    rows: list[dict[str, float]]  # metrics, one row per step
    first_step_s: float  # from the start of the process to the end of its first step
    peak_rss_mib: float
    compilations: dict[str, int]  # "all": in the whole run; "timed": in its timed steps


def run_program(work: Path, max_steps: int) -> RunFigures:
    """Runs `python -m train policy` on a prepared workload, from scratch, with the workload's compilation cache.

    Raises:
      ValueError: the program failed; the message ends with its last output.
    """
    shutil.rmtree(work / "run", ignore_errors=True)
    command = [sys.executable, "-m", "train", "policy", "--config", str(work / "config.yaml")]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(work / "xla"), "JAX_LOG_COMPILES": "1"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--max_steps", str(max_steps)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log: list[tuple[float, str]] = []

    def read_log() -> None:
        assert process.stderr is not None
        log.extend((time.monotonic(), line.decode(errors="replace")) for line in process.stderr)

    reader = threading.Thread(target=read_log)
    reader.start()
    ends: list[float] = []  # times at which steps ended
    ended, status, usage = 0, 0, None
    while not ended:  # os.wait4 also returns the peak memory, Popen.wait does not
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        steps = sum(row["step"] > 0 for row in read_metrics(work / "run"))
        ends += [time.monotonic()] * (steps - len(ends))
        time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    reader.join()
    assert process.stderr is not None
    process.stderr.close()
    if process.returncode or not ends or usage is None:
        tail = "".join(line for _, line in log[-5:]).strip()
        raise ValueError(f"{' '.join(command)}: failed ({process.returncode}): {tail}")
    compiled = [at for at, line in log if re.search(r"Finished XLA compilation", line)]
    timed = ends[min(UNTIMED, len(ends)) - 1]
    return RunFigures(
        [row for row in read_metrics(work / "run") if row["step"] > 0],
        ends[0] - began,
        usage.ru_maxrss / 1024,
        {"all": len(compiled), "timed": sum(timed < at <= ends[-1] for at in compiled)},
    )


def score_seconds(workload: Workload, work: Path, prompts: list[list[int]], length: int, repeats: int = 5) -> float:
    """Median seconds for a reward model with random weights to score one batch of such completions."""
    from flax import nnx

    from models.hf_weights import save_pretrained
    from models.reward_model import Qwen3RewardModel
    from train.rewards.model import RewardModelScorer

    tokenizer, P, G = Tokenizer(work / "tokenizer"), workload.prompts_per_step, workload.num_generations
    network = replace(workload.network, architecture=REWARD_MODEL)
    save_pretrained(Qwen3RewardModel(network, nnx.Rngs(0), param_dtype=workload.dtype), work / "reward")
    tokenizer.save(work / "reward")
    scorer = RewardModelScorer(str(work / "reward"), dtype=workload.dtype, batch_prompts=P)
    ids = [token for prompt in prompts for token in prompt]
    texts = [tokenizer.hf.decode(ids[g * 37 :][:length]) for g in range(G)]
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        scorer([tokenizer.hf.decode(prompt) for prompt in prompts[:P]], [texts] * P)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
