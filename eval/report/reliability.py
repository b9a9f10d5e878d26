"""`python -m eval reliability`: reliability diagrams of reward models, from the calibration.json of their runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.pictures import Picture
from eval.report.plots import reliability_picture
from models.names import split_step
from train.console import console
from train.parse import parse
from train.run.directory import CALIBRATION
from train.running import setup_errors


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Draw RM/reliability.png and .svg of each run of `train reward`."""

    runs: list[str]  # runs of `train reward` with held-out data


def parse_reliability(arguments: list[str]) -> ReliabilityConfig:
    return parse(ReliabilityConfig, arguments, "python -m eval reliability", positional=("runs",))


def draw_reliability(config: ReliabilityConfig) -> None:
    """Draws RM/reliability.png and .svg of each run.

    Raises:
      SetupError: a run that has not validated.
    """
    runs = list(dict.fromkeys(split_step(run)[0] for run in config.runs))
    with setup_errors():
        for run in runs:
            if not (Path(run) / CALIBRATION).is_file():
                raise FileNotFoundError(
                    f"{run}: no {CALIBRATION} in it; expected a run of `train reward` with data.validation or "
                    f"data.held_out that has validated at least once"
                )
    for run in runs:
        reliability_pictures(Path(run), [run])
        console.print(str(Path(run) / "reliability.png"))


def reliability_pictures(folder: Path, models: Sequence[str]) -> list[Picture]:
    """Draws one picture of all validated models and all their held-out sets."""
    bins = {}
    paths = list(dict.fromkeys(split_step(model)[0] for model in models))
    folders = [Path(path).resolve().name for path in paths]
    for path, name_of_run in zip(paths, folders, strict=True):
        title = name_of_run if folders.count(name_of_run) == 1 else path
        file = Path(path) / CALIBRATION
        sets = json.loads(file.read_text(encoding="utf-8"))["sets"] if file.is_file() else {}
        for name, rows in sets.items():
            short = name.removeprefix("validation/")
            bins[short if len(models) == 1 else f"{title}, {short}"] = rows
    return [reliability_picture(folder, bins)] if bins else []
