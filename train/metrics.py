"""A run's directory and what is written into it: config.yaml, metrics.jsonl, tensorboard/, completions/.

    runs/NAME/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/STEP/, tokenizer/, completions/}

`metrics.jsonl` has one row per step, each step once: resuming cuts the file back to the restored step.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gopo_jax.losses import Metrics
from models.checkpoint import Checkpoints, about, folder_of
from models.config import Qwen3Config
from models.flops import forward_flops, peak_flops, step_flops
from models.tokenizer import Tokenizer
from train.batch import Groups
from train.config import PolicyConfig, RunConfig, resolved
from train.console import console
from train.processes import are_several, gather, is_first
from train.state import TrainState

METRICS, CONFIG, COMPLETIONS, CALIBRATION = "metrics.jsonl", "config.yaml", "completions", "calibration.json"
# What may differ between a run and its continuation: it changes no number that is already written.
_MAY_CHANGE = ("max_steps", "log", "checkpoint", "mesh", "output_dir", "early_stopping")
_WHERE = ("offload", "offload_reference", "logprob_chunk", "batch_prompts")  # of parts: where and how much at a time


class SetupError(ValueError):
    """A user's mistake, found before anything is computed. The message is the whole story."""


@contextlib.contextmanager
def setup_errors() -> Iterator[None]:
    """Turn what the checks of a run's set-up raise into one clear error; the operating system's with its file."""
    try:
        yield
    except OSError as error:
        raise SetupError(str(error) if error.filename is None else f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, ImportError) as error:
        raise SetupError(str(error)) from error


class Run:
    """An open run directory."""

    def __init__(self, config: RunConfig, model: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self.path = Path(config.output_dir)
        self.config = config
        plain = json.loads(json.dumps(resolved(config)))
        if (self.path / CONFIG).is_file():
            self._refuse_another(yaml.safe_load((self.path / CONFIG).read_text()) or {}, self.path)
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / CONFIG, yaml.safe_dump(plain, sort_keys=False))
            tokenizer.save(self.path / "tokenizer")
        self._about = {"model": dict(model), "run": plain} | ({"lora": plain["lora"]} if config.lora.rank else {})
        self._checkpoints = Checkpoints(self.path, keep=config.checkpoint.keep, directory=config.checkpoint.directory)
        self._check_shared()
        self._trackers: list[Any] = []
        self._progress: Progress | None = None
        self._started = time.perf_counter()
        self.start = 0

    def _refuse_another(self, before: dict[str, Any], place: Any) -> None:
        """Refuse to go on with a run of another config; what an older one did not say was as is the default now."""
        plain, before = json.loads(json.dumps(resolved(self.config))), _with_defaults(before, self.config)
        changed = [key for key in plain if key not in _MAY_CHANGE and _what(plain[key]) != _what(before.get(key))]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{place}: holds a run with another config ({key}: {before.get(key)!r}, now {plain[key]!r}); "
                f"choose another place, or delete that directory to start over"
            )

    def _check_shared(self) -> None:
        """Refuse, where there are several processes, checkpoints in a place that not all of them see."""
        if not are_several():
            return
        number = gather(np.random.default_rng().integers(2**31, size=1, dtype=np.int32))[0]
        sign = folder_of(self.path) / f"shared-{number}.tmp"
        if is_first():
            sign.write_text("all processes see this")
        gather(np.zeros(1))  # by now it is written
        seen = sign.exists()
        gather(np.zeros(1))  # by now all have looked
        if is_first():
            sign.unlink()
        if not seen:
            raise ValueError(
                f"{folder_of(self.path)}: process {jax.process_index()} does not see what process 0 writes there; "
                f"expected one directory for all: a shared output_dir, or checkpoint.directory on one (gs:// too)"
            )

    def resume(self, state: TrainState) -> TrainState:
        """The newest checkpoint if there is one, else `state`; metrics.jsonl is cut back to its step."""
        if state.frozen:
            state = state._replace(frozen=self._checkpoints.keep_base(state.frozen))
        latest = self._checkpoints.latest()
        if latest is not None and self.config.checkpoint.directory is not None:
            self._refuse_another(about(f"{self.path}@{latest}")["run"], folder_of(self.path))
        if latest is not None:
            params, train = self._checkpoints.restore(latest, state.params, _trained(state))
            state = state._replace(params=params, **train)
            self.start = latest
            console.print(f"{self.path}: going on from step {latest} of {self.config.max_steps}")
        if is_first():
            rows = [row for row in read_metrics(self.path) if latest is not None and row["step"] <= latest]
            write_whole(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
            self._open_trackers()
        return state

    def _open_trackers(self) -> None:
        if self.config.log.tensorboard:
            from tensorboardX import SummaryWriter

            self._trackers.append(
                SummaryWriter(str(self.path / "tensorboard"), purge_step=self.start + 1 if self.start else None)
            )
        if self.config.log.wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("log.wandb_project: needs the package wandb; install it or leave this out") from error
            settings = {"project": self.config.log.wandb_project, "name": self.path.name, "id": self.path.name}
            self._trackers.append(wandb.init(**settings, resume="allow", config=resolved(self.config)))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics; a number that does not exist (NaN) is left out."""
        if not is_first():
            return
        row = {name: float(value) for name, value in values.items()}
        row = {name: value for name, value in row.items() if not math.isnan(value)}
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for tracker in self._trackers:
            if hasattr(tracker, "add_scalar"):
                for name, value in row.items():
                    tracker.add_scalar(name, value, step)
            else:
                tracker.log(row, step=step)

    def write_completions(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """completions/NAME.jsonl."""
        if is_first():
            write_jsonl(self.path / COMPLETIONS / f"{name}.jsonl", rows)

    def completions_due(self, step: int) -> bool:
        every = self.config.log.completions_every
        return bool(every) and step % every == 0

    def write_table(self, step: int, table: Mapping[str, Sequence[Any]]) -> None:
        """completions/train_STEP.parquet, and a table in each tracker."""
        if not is_first():
            return
        import pyarrow
        import pyarrow.parquet

        folder = self.path / COMPLETIONS
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"step": [step] * len(table["prompt"])} | dict(table)
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"train_{step:06d}.parquet")
        for tracker in self._trackers:
            if hasattr(tracker, "add_text"):
                shown = zip(*(map(str, column[:8]) for column in table.values()), strict=True)
                lines = [" | ".join(table), " | ".join("---" for _ in table), *(" | ".join(row) for row in shown)]
                tracker.add_text("completions", "\n".join(line.replace("\n", " ") for line in lines), step)
            else:
                import wandb

                rows = list(zip(*columns.values(), strict=True))
                tracker.log({"completions": wandb.Table(columns=list(columns), data=rows)}, step=step)

    def checkpoint_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.config.max_steps

    def save(self, step: int, state: TrainState) -> None:
        self._checkpoints.save(step, state.params, _trained(state), self._about)

    def keep_best(self, step: int) -> None:
        """Keep this step's checkpoint, whatever `checkpoint.keep`, until it is called again."""
        self._checkpoints.best = step

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps."""
        self._checkpoints.drop_after(step)

    def wait(self) -> None:
        """Wait for the checkpoint in flight."""
        self._checkpoints.wait()

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar; what `show` was told stands beside it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
        )
        total = self.config.max_steps
        hidden = not (self.config.log.progress and console.is_terminal)  # `show` prints lines instead
        with Progress(*columns, console=console, disable=hidden) as self._progress:
            task = self._progress.add_task(self.path.name, total=total, completed=self.start, shown="")
            for step in range(self.start, total):
                yield step
                self._progress.update(task, completed=step + 1)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers beside the progress bar; without a terminal, a line now and then."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not math.isnan(value))
        if self._progress is None or not self.config.log.progress:
            return
        self._progress.update(self._progress.task_ids[0], shown=text)
        if not console.is_terminal and step % max(1, self.config.max_steps // 10) == 0:
            console.print(f"{self.path.name} {step}/{self.config.max_steps}  {text}")

    def close(self, how: str | None = None) -> None:
        """Wait for the checkpoint in flight, close the trackers, and say how the run ended."""
        self._checkpoints.close()
        for tracker in self._trackers:
            tracker.close() if hasattr(tracker, "close") else tracker.finish()
        how = how or f"{self.config.max_steps} steps"
        console.print(f"{self.path}: done, {how}, {time.perf_counter() - self._started:.0f} s")


def _with_defaults(before: Any, config: Any) -> Any:
    """A saved config with what was not yet a setting when it was saved."""
    if isinstance(config, list) and isinstance(before, list) and len(config) == len(before):
        return [_with_defaults(old, new) for old, new in zip(before, config, strict=True)]
    if not dataclasses.is_dataclass(config) or not isinstance(before, dict):
        return before
    filled = dict(before)
    for item in dataclasses.fields(config):
        if item.name in before:
            filled[item.name] = _with_defaults(before[item.name], getattr(config, item.name))
        elif item.default is not dataclasses.MISSING:
            filled[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            value = item.default_factory()
            filled[item.name] = resolved(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(filled))


def _what(value: Any) -> Any:
    """A part of a config without what says only where things are, or how much at a time."""
    if isinstance(value, list):
        return [_what(item) for item in value]
    return {k: v for k, v in value.items() if k not in _WHERE} if isinstance(value, dict) else value


def _trained(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step}


def read_metrics(run: str | Path, *, clock: bool = True) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; a last line that a kill cut short is left out.

    Without the clock's fields they are the same, bit for bit, for every run of a config on a machine.
    """
    file = Path(run) / METRICS
    rows: list[dict[str, float]] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not clock:
        rows = [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]
    return rows


def write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSONL file, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_whole(file: Path, text: str) -> None:
    """A file at once: it is there complete, or not at all."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


class Timer:
    """Seconds spent in named parts of a step, as metrics "timing_s/NAME"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = self.seconds.get(f"timing_s/{name}", 0.0)
        self.seconds[f"timing_s/{name}"] = spent + time.perf_counter() - began


def divide(metrics: Mapping[str, tuple[jax.Array, jax.Array]]) -> dict[str, float]:
    """(sum, count) pairs as means; NaN where nothing was counted."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in jax.device_get(dict(metrics)).items()}
    return {name: total / count if count else math.nan for name, (total, count) in pairs.items()}


def require_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Stop a run that has diverged: nothing it would write from here on means anything.

    Raises:
      FloatingPointError: the loss or the gradient's norm is not a number.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"step {step}: {name} is {metrics[name]}: the run has diverged; the checkpoints are as they were; go "
                f"on from an earlier one with a lower optimizer.learning_rate, or look at the rewards of this step"
            )


def sampling_metrics(
    old_PGT: jax.Array, sampled_PGT: jax.Array, mask_PGT: jax.Array, weights_PGT: jax.Array | None
) -> Metrics:
    """How far sampler and trainer are apart, TRL's sampling/*: |difference of log-probabilities|, and its weights."""
    count, found = mask_PGT.sum(dtype=jnp.float32), mask_PGT.any().astype(jnp.float32)
    drift_PGT = jnp.where(mask_PGT, jnp.abs(old_PGT - sampled_PGT), 0)
    metrics: Metrics = {
        "sampling/sampling_logp_difference/mean": (drift_PGT.sum(), count),
        "sampling/sampling_logp_difference/max": (drift_PGT.max(), found),
    }
    if weights_PGT is not None:
        name = "sampling/importance_sampling_ratio"
        metrics[f"{name}/mean"] = (weights_PGT.sum(), count)  # 0 where nothing counts
        metrics[f"{name}/min"] = (jnp.where(mask_PGT, weights_PGT, jnp.inf).min(), found)
        metrics[f"{name}/max"] = (weights_PGT.max(), found)
    return metrics


def throughput(config: PolicyConfig, network: Qwen3Config, drawn: Sequence[Groups], seconds: float) -> dict[str, float]:
    """perf/tokens_per_s, completion tokens; perf/mfu, on devices whose peak is known (`models.flops.PEAK_FLOPS`).

    MFU: the least arithmetic that sampling, the passes over the batch and a reference policy need, every prompt once
    per group and remat not counted, over what the devices could have done in the whole step (reward models, validation
    and waiting take time and add nothing).
    """
    tokens = sum(int(groups.rollout.lengths_PG.sum()) for groups in drawn)
    found = {"perf/tokens_per_s": tokens / seconds}
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        forward = [forward_flops(network, g.lengths_P.tolist(), g.rollout.lengths_PG.tolist()) for g in drawn]
        one = sum(forward) / len(forward)  # as many prompts are learned from as one attempt has
        flops = step_flops(one, reference=config.loss.beta > 0, iterations=config.num_iterations)
        found["perf/mfu"] = (sum(forward) + flops["update"]) / (seconds * peak * jax.device_count())
    return found


def rollout_metrics(rewards_PG: np.ndarray, lengths_PG: np.ndarray, finished_PG: np.ndarray) -> dict[str, float]:
    """TRL's reward/* and completions/* names, and rank/*: how much order the rewards have.

    rank/tie_frac is the share of pairs within a group with equal rewards, rank/all_tied_frac the share of groups
    without any order, rank/length_corr the mean rank correlation of reward and length within a group.
    """
    valid_PG = ~np.isnan(rewards_PG)
    usable = [(r[v], n[v]) for r, n, v in zip(rewards_PG, lengths_PG, valid_PG, strict=True) if v.sum() >= 2]
    ties = [(_pairs_equal(r) / (len(r) * (len(r) - 1) / 2)) for r, _ in usable]
    flat = [float(np.ptp(r) == 0) for r, _ in usable]
    correlations = [c for r, n in usable if not math.isnan(c := _spearman(r, n))]
    mean = lambda values: float(np.mean(values)) if len(values) else math.nan  # noqa: E731
    return {
        "reward": mean(rewards_PG[valid_PG]),
        "reward_std": mean([np.std(r, ddof=1) for r, _ in usable]),
        "frac_reward_zero_std": mean(flat),
        "frac_reward_unscorable": 1 - mean(valid_PG),
        "rank/tie_frac": mean(ties),
        "rank/all_tied_frac": mean(flat),
        "rank/length_corr": mean(correlations),
        "completions/mean_length": mean(lengths_PG),
        "completions/min_length": float(lengths_PG.min()),
        "completions/max_length": float(lengths_PG.max()),
        "completions/mean_terminated_length": mean(lengths_PG[finished_PG]),
        "completions/clipped_ratio": 1 - mean(finished_PG),
    }


def _pairs_equal(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * (counts - 1) / 2).sum())


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    ranks = [np.unique(x, return_inverse=True, return_counts=True) for x in (a, b)]
    middles = [(np.cumsum(counts) - (counts - 1) / 2)[inverse] for _, inverse, counts in ranks]
    return float(np.corrcoef(middles[0], middles[1])[0, 1])
