"""The lab's cells, each one method in one situation with several seeds: their names, the grid, their files."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

METHODS = ("gopo", "grpo", "dr_grpo", "rloo")
GROUP_SIZES = (2, 4, 8, 16)
NOISES = (0.0, 0.1, 0.2, 0.3)
DISTORTIONS = ("none", "exp", "cubic", "outliers_1", "outliers_5", "bf16")
REGIMES = ("tuned", "equal_rms", "equal_norm")


@dataclass(frozen=True)
class Cell:
    """One setting of every factor that the lab varies; a cell runs all seeds.

    Args:
      method: name of the advantage.
      group_size: G; prompts x G is the same in all cells.
      noise: share of the proxy's training comparisons with a flipped label.
      distortion: of the proxy's scale; it keeps the order, except for the ties of bf16.
      regime: "tuned" uses the method's own tuned learning rate; "equal_rms" one learning rate for all, with advantages
        scaled so that their root mean square at the start is 1; "equal_norm" also scales every gradient to norm 1.
    """

    method: str
    group_size: int = 8
    noise: float = 0.0
    distortion: str = "none"
    regime: str = "tuned"

    @property
    def name(self) -> str:
        return f"{self.method}_g{self.group_size}_noise{round(100 * self.noise)}_{self.distortion}_{self.regime}"


def cells(
    methods: tuple[str, ...] = METHODS,
    group_sizes: tuple[int, ...] = (8,),
    noises: tuple[float, ...] = (0.0, 0.3),
    distortions: tuple[str, ...] = ("none",),
    regimes: tuple[str, ...] = ("tuned",),
) -> list[Cell]:
    situations = product(group_sizes, noises, distortions, regimes)
    return [Cell(method, *rest) for rest in situations for method in methods]


TWO_METHODS = ("gopo", "grpo")
THREE_METHODS = METHODS[:3]  # RLOO's advantage is Dr. GRPO's times G / (G - 1), equal where scaled
PARTS: dict[str, list[Cell]] = {
    "default": cells(TWO_METHODS),
    "methods": cells(),
    "regimes": cells(THREE_METHODS, regimes=REGIMES[1:]),
    "distortions": cells(THREE_METHODS, distortions=DISTORTIONS[1:], noises=(0.0,)),
    "group_size": cells(TWO_METHODS, GROUP_SIZES, (0.0,)) + cells(TWO_METHODS, GROUP_SIZES, regimes=("equal_rms",)),
    "noise": cells(TWO_METHODS, noises=NOISES),
}
PARTS["factors"] = list(dict.fromkeys(cell for part in PARTS.values() for cell in part))  # one factor at a time
_CROSSED = (
    cells(group_sizes=GROUP_SIZES, noises=NOISES)
    + cells(THREE_METHODS, GROUP_SIZES, NOISES, regimes=REGIMES[1:])
    + cells(distortions=DISTORTIONS[1:], noises=NOISES)
    + cells(THREE_METHODS, distortions=DISTORTIONS[1:], noises=NOISES, regimes=("equal_rms",))
)
PARTS["full"] = list(dict.fromkeys(PARTS["factors"] + _CROSSED))


def situation_text(cell: Cell) -> str:
    """ "G 8, noise 0.3", and distortion and regime where they are not the usual ones."""
    special = [value for value, usual in ((cell.distortion, "none"), (cell.regime, "tuned")) if value != usual]
    return ", ".join([f"G {cell.group_size}", f"noise {cell.noise:g}", *special])


class CellOutcome(NamedTuple):
    """The result of a cell. N seeds, M evaluations, P validation prompts, G completions of each, Y training steps.

    Rewards are standardized to mean 0 and standard deviation 1 over the start policy's completions; the proxy is the
    undistorted one. Evaluation 0 is the start policy.
    """

    cell: Cell
    about: dict[str, Any]  # learning_rate, beta, seeds, seconds; proxy_accuracy, one per seed; versions
    steps_M: np.ndarray
    proxy_NMPG: np.ndarray
    gold_NMPG: np.ndarray
    length_NMPG: np.ndarray
    kl_NMPG: np.ndarray  # sum over a completion's tokens of log policy - log reference, in nats
    training: dict[str, np.ndarray]  # [N, Y] each, by name: the metrics that `eval.lab.program` measures at every step

    def save(self, folder: Path) -> None:
        """Writes FOLDER/NAME.npz atomically."""
        arrays: dict[str, Any] = {
            name: value for name, value in self._asdict().items() if isinstance(value, np.ndarray)
        }
        arrays |= {f"training/{name}": value for name, value in self.training.items()}
        about = json.dumps({"cell": asdict(self.cell), "about": self.about})
        write_arrays(outcome_file(folder, self.cell), {"about": np.array(about), **arrays})


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a .npz file atomically, also beside other processes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(file)


def outcome_file(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.npz"


def load_outcome(file: Path) -> CellOutcome:
    with np.load(file) as arrays:
        header: Mapping[str, Any] = json.loads(str(arrays["about"]))
        fields = {name: arrays[name] for name in arrays.files if name != "about" and "/" not in name}
        training = {name.removeprefix("training/"): arrays[name] for name in arrays.files if "/" in name}
    return CellOutcome(Cell(**header["cell"]), header["about"], training=training, **fields)


def load_outcomes(folder: Path) -> Iterator[CellOutcome]:
    """Loads the finished cells, in the order of the grid."""
    for cell in PARTS["full"]:
        if outcome_file(folder, cell).is_file():
            yield load_outcome(outcome_file(folder, cell))
