"""`python -m eval lab`: a controlled study on two CPU cores: does ranking help, when, and why?

    python -m eval lab --out runs/lab                   the default cells: gopo and grpo, G = 8, noise 0 and 30 %
    python -m eval lab --out runs/lab --part factors    four methods, one factor at a time: noise, G, scale, regime
    python -m eval lab --out runs/lab --part full       the factors crossed
    python -m eval lab --out runs/lab --part plan       all parts: cells, finished cells, minutes left

Every cell (`eval.lab.cells.Cell`) is one method in one situation, `seeds` runs side by side in one compiled program
(`eval.lab.program`), in a world made for it (`eval.lab.world`). Each method's learning rate is tuned first, with the
same budget: every one of `learning_rates`, with `tuning_seeds` seeds that are used for nothing else, at G = 8, without
noise and distortion. The rate with the highest mean *proxy* reward in the last quarter of the run wins; the gold reward
is kept from training. The other regimes use one rate for all methods, GRPO's.

A finished cell is not run again: a restarted lab loses only the cell it was in. The parts add up in one directory, and
the table and the pictures show every finished cell (`eval.lab.results`).
"""

import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.progress import Progress

from eval.lab.cells import METHODS, PARTS, Cell, CellOutcome, load_outcomes, outcome_file
from eval.lab.program import LabProgram, members
from eval.lab.results import summarize, versions
from eval.lab.tables import write
from eval.lab.world import StandardScorer, World, WorldConfig, build_world, proxies
from eval.sheets import Sheet
from train.console import console, progress_bar
from train.parse import parse
from train.run.files import write_whole
from train.run.lock import Lock, owned
from train.running import setup_errors

FIRST_TUNING_SEED = 1000
FORMAT = 2  # of what a cell computes and of its file: raise it when they change; cells of another are refused
PACE = 27.0  # seconds per cell on two cores, until a cell has finished
PartName = Literal["default", "methods", "regimes", "distortions", "group_size", "noise", "factors", "full", "plan"]


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Does ranking help: a controlled study. A directory keeps one setting of everything but `part`."""

    out: str  # the directory to write
    part: PartName = "default"  # the cells to run; plan: only print all parts and the minutes they have left
    seeds: int = 8  # runs of a cell, side by side
    steps: int = 40  # of each run
    evaluate_every: int = 2  # steps between evaluations
    beta: float = 0.1  # weight of the k3 penalty in the loss
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 3e-2])  # tried for every method
    tuning_seeds: int = 8  # runs of each learning rate, with seeds that are used for nothing else
    world: WorldConfig = field(default_factory=WorldConfig)  # what the policies live in

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "evaluate_every", "tuning_seeds"):
            if not 1 <= getattr(self, name) <= FIRST_TUNING_SEED:
                raise ValueError(f"{name}: expected from 1 to {FIRST_TUNING_SEED}, got {getattr(self, name)}")
        if self.steps % self.evaluate_every:
            raise ValueError(f"steps: expected a multiple of evaluate_every, {self.evaluate_every}, got {self.steps}")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError(f"learning_rates: expected positive numbers, got {self.learning_rates}")
        if not 0 < self.beta < math.inf:
            raise ValueError(
                f"beta: expected a number above 0, got {self.beta}; the KL penalty is part of what is studied"
            )

    @property
    def cells(self) -> list[Cell]:
        return PARTS["full" if self.part == "plan" else self.part]

    @property
    def command(self) -> str:
        """The command that makes the same cells."""
        usual, other = LabConfig(out=self.out), []
        for name, value in asdict(self).items():
            given = [(f"{name}.{k}", v, getattr(usual.world, k)) for k, v in value.items()] if name == "world" else []
            other += [f" --{key} {v}" for key, v, was in given or [(name, value, getattr(usual, name))] if v != was]
        return f"python -m eval lab --out {self.out}" + "".join(other)


def parse_lab(arguments: list[str]) -> LabConfig:
    config: LabConfig = parse(LabConfig, arguments, "python -m eval lab")
    return config


def lab(config: LabConfig) -> None:
    """Runs the missing cells of a part, then writes the table and the pictures of all finished cells.

    Raises:
      SetupError: another lab runs in the directory, it has other settings, or data is missing; before anything is
        trained.
    """
    folder = Path(config.out)
    if config.part == "plan":
        sheet = plan_sheet(folder)
        console.print(sheet.rich(), sheet.note)
        return
    with ExitStack() as stack:
        with setup_errors():
            stack.enter_context(owned(Lock(folder)))
            keep_settings(folder, config)
        world = build_world(folder, config.world)
        Laboratory(folder, config, world).run()
        write(summarize(list(load_outcomes(folder / "cells")), config.command), folder)


def keep_settings(folder: Path, config: LabConfig) -> None:
    """Writes the settings to lab.json; refuses a directory with other settings."""
    plain = {"format": FORMAT} | {name: v for name, v in asdict(config).items() if name not in ("out", "part")}
    file, text = folder / "lab.json", json.dumps(plain, indent=1)
    before = json.loads(file.read_text()) if file.is_file() else plain
    if differing := [name for name in plain | before if plain.get(name) != before.get(name)]:
        name = differing[0]
        raise ValueError(
            f"{folder}: holds cells with other settings ({name}: {before.get(name)}, now {plain.get(name)}); "
            f"choose another --out, or delete that directory"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


class Laboratory:
    """Runs cells; caches a compiled program for each G, and proxies for each noise."""

    def __init__(self, folder: Path, config: LabConfig, world: World) -> None:
        self.folder, self.config, self.world = folder, config, world
        self._programs: dict[int, LabProgram] = {}
        self._proxies: dict[tuple[tuple[int, ...], float], StandardScorer] = {}

    def run(self) -> None:
        """Runs the unfinished cells of the part."""
        config, cells_folder = self.config, self.folder / "cells"
        missing = [cell for cell in config.cells if not outcome_file(cells_folder, cell).is_file()]
        console.print(f"{self.folder}: {len(config.cells)} cells in part {config.part}, {len(missing)} to run")
        with progress_bar() as bar:
            rates = self.tune({cell.method for cell in missing} | ({"grpo"} if missing else set()), bar)
            all_cells = bar.add_task("cells", total=len(missing))
            for number, cell in enumerate(missing, 1):
                rate = rates[cell.method if cell.regime == "tuned" else "grpo"]
                seeds = tuple(range(config.seeds))
                outcome = self.outcome(cell, seeds, np.full(config.seeds, rate), bar)
                outcome.save(cells_folder)
                bar.update(all_cells, completed=number)
                gold = outcome.gold_NMPG[:, -1].mean()
                took = outcome.about["seconds"]
                console.print(f"{number}/{len(missing)} {cell.name}: gold {gold:+.3f}, {took:.0f} s", highlight=False)

    def tune(self, methods: set[str], bar: Progress) -> dict[str, float]:
        """The tuned learning rate of each method; stored in tuning.json."""
        config, file = self.config, self.folder / "tuning.json"
        tuned = json.loads(file.read_text()) if file.is_file() else {}
        rates, seeds_per_rate = np.sort(config.learning_rates), config.tuning_seeds
        for method in (name for name in METHODS if name in methods - tuned.keys()):
            seeds = tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds_per_rate))
            outcome = self.outcome(Cell(method), seeds * len(rates), np.repeat(rates, seeds_per_rate), bar)
            late = outcome.steps_M > 0.75 * config.steps
            proxy, kl = (
                array_NMPG[:, late].mean((1, 2, 3)).reshape(-1, seeds_per_rate)
                for array_NMPG in (outcome.proxy_NMPG, outcome.kl_NMPG)
            )
            best = float(rates[best_rate_index(proxy.mean(1), method)])
            rows = zip(rates.tolist(), proxy.tolist(), kl.mean(1).tolist(), strict=True)
            tried = [{"learning_rate": rate, "proxy": proxy_N, "kl": kl} for rate, proxy_N, kl in rows]
            tuned[method] = {"learning_rate": best, "tried": tried}
            write_whole(file, json.dumps(tuned, indent=1))
            console.print(f"tuned {method}: learning rate {best:g}", highlight=False)
        return {method: tuned[method]["learning_rate"] for method in tuned}

    def outcome(self, cell: Cell, seeds: tuple[int, ...], learning_rates: np.ndarray, bar: Progress) -> CellOutcome:
        """Trains a cell's runs side by side, and evaluates them every `evaluate_every` steps."""
        config, began = self.config, time.perf_counter()
        scorer = self.proxies(seeds, cell.noise)
        program = self.program(cell.group_size)
        member = members(cell, seeds, learning_rates, scorer)
        state = program.start(member)
        evaluations, training = [program.evaluate(member, state, 0)], []
        task = bar.add_task(cell.name, total=config.steps)
        for first in range(0, config.steps, config.evaluate_every):
            state, measured = program.advance(member, state, first)
            done = first + config.evaluate_every
            evaluations.append(program.evaluate(member, state, done))
            training.append(measured)
            jax.block_until_ready(state)
            bar.update(task, completed=done)
        bar.remove_task(task)
        evaluated = {f"{k}_NMPG": np.stack([e[k] for e in evaluations], 1) for k in evaluations[0]}
        measures = {k: np.concatenate([m[k] for m in training], 1) for k in training[0]}
        about = {
            "learning_rate": float(learning_rates[0]),  # equal for all runs of a cell
            "beta": config.beta,
            "seeds": list(seeds),
            "seconds": time.perf_counter() - began,
            "proxy_accuracy": np.asarray(scorer.accuracy).tolist(),
            "advantage_scale": np.asarray(state.advantage_scale).tolist(),
            "command": config.command,
            "versions": versions(),
        }
        steps_M = np.arange(0, config.steps + 1, config.evaluate_every)
        return CellOutcome(cell, about, steps_M, training=measures, **evaluated)

    def program(self, group_size: int) -> LabProgram:
        if group_size not in self._programs:
            self._programs[group_size] = LabProgram(
                self.world,
                group_size,
                beta=self.config.beta,
                max_completion_length=self.config.world.max_completion_length,
                every=self.config.evaluate_every,
            )
        return self._programs[group_size]

    def proxies(self, seeds: tuple[int, ...], noise: float) -> StandardScorer:
        """The seeds' proxies, stacked; a seed may occur more than once."""
        distinct = tuple(dict.fromkeys(seeds))
        if (distinct, noise) not in self._proxies:
            self._proxies[distinct, noise] = proxies(self.world, self.folder, self.config.world, distinct, noise)
        rows = np.array([distinct.index(seed) for seed in seeds])
        return jax.tree.map(lambda array_N: array_N[rows], self._proxies[distinct, noise])


def best_rate_index(values: np.ndarray, method: str) -> int:
    """Index of the highest value, NaN left out.

    Raises:
      FloatingPointError: every value is NaN.
    """
    if np.isnan(values).all():
        raise FloatingPointError(f"tuning {method}: diverged at every learning rate; expected smaller learning_rates")
    return int(np.nanargmax(values))


def plan_sheet(folder: Path) -> Sheet:
    """The parts of the grid: cells, finished cells, and the minutes left at the pace so far."""
    cells_folder = folder / "cells"
    seconds = [outcome.about["seconds"] for outcome in load_outcomes(cells_folder)]
    pace, source = (float(np.median(seconds)), "the median so far") if seconds else (PACE, "2 cores")
    rows = []
    for part, cells in PARTS.items():
        done = sum(outcome_file(cells_folder, cell).is_file() for cell in cells)
        rows.append((part, str(len(cells)), str(done), f"{(len(cells) - done) * pace / 60:.0f}"))
    columns = ("part", "cells", "ended", "minutes left")
    note = f"At {pace:.0f} s a cell ({source}). Parts overlap; what has ended is not run again. Tuning comes on top."
    return Sheet("The lab's grid", columns, rows, note)
