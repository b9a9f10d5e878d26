"""What a run was started from: exact models and tokenizers, and the content of its data, kept in its checkpoints.

The first start resolves `model.path`, the tokenizers and the reward models to RUN@STEP, a directory with a hash or
ORGANISATION/MODEL@COMMIT, and hashes the rows. A continuation uses these, whatever the names mean by then, and refuses
what is gone or has changed. Rows that were added at the end of the data are left out. A run without a checkpoint starts
anew; one from before there were pins is pinned as things are.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from models.checkpoint import is_run, read_newest_about, read_step_about, resolve_step
from models.pins import Pin, check_pin, pin_model, pin_tokenizer
from models.tokenizer import tokenizer_path
from train.config import ModelConfig, PolicyConfig, RewardSpec, RunConfig
from train.console import console
from train.processes import broadcast_from_first, is_distributed
from train.running import naming

REFERENCE = "loss.reference"


class Pins:
    """The pins of one run, by setting.

    Attributes:
      pins: setting -> pin of a model or tokenizer (see `models.pins`), or of rows (see `pin_rows`).
    """

    def __init__(self, config: RunConfig) -> None:
        """Reads the pins of the run in `config.output_dir`, and pins what has none. Process 0 decides for all.

        Raises:
          ValueError: a model or tokenizer is gone or has changed since the run was started, or cannot be found now.
        """
        self._run = config.output_dir
        result = broadcast_from_first(lambda: _resolve(config))
        if result["refused"]:
            raise ValueError(result["refused"])
        self.pins: dict[str, Pin] = result["pins"]
        self._is_new = result["is_new"]
        for note in result["notes"]:
            console.print(note, markup=False)

    def model(self, model: ModelConfig) -> ModelConfig:
        """Returns the settings of the network with exact names."""
        path = None if model.path is None else self.pins["model.path"]["exact"]
        return dataclasses.replace(model, path=path, tokenizer=self.pins["model.tokenizer"]["exact"])

    def reference(self, model: ModelConfig, name: str | None) -> ModelConfig | None:
        """Returns the settings of the model that loss.reference names, exactly; None if it names none."""
        if name is None:
            return None
        exact = self.pins[REFERENCE]["exact"]
        return dataclasses.replace(self.model(model), path=exact, architecture=None)

    def rewards(self, specs: Iterable[RewardSpec]) -> list[RewardSpec]:
        """Returns the rewards with exact names of their models; their labels stay."""
        return [
            spec
            if spec.model is None
            else dataclasses.replace(spec, model=self.pins[_reward_setting(spec)]["exact"], name=spec.label)
            for spec in specs
        ]

    def rows(self, setting: str, source: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the rows that the run was started with; without those that were added at the end since.

        Args:
          setting: the user's name for the data, for example "data.train".
          source: the file or data set.

        Raises:
          ValueError: rows were changed, removed or added elsewhere; or the processes read different rows.
        """
        is_of_start = self._is_new and setting in self.pins  # of `start_from`, which may have had other data
        if setting not in self.pins or (is_of_start and self.pins[setting]["name"] != source):
            self.pins[setting] = broadcast_from_first(lambda: pin_rows(source, rows))
            if is_distributed() and pin_rows(source, rows) != self.pins[setting]:
                raise ValueError(
                    f"{setting}: {source}: process {jax.process_index()} reads other rows there than process 0; "
                    f"expected one file for all processes, or equal copies"
                )
            return rows
        pin = self.pins[setting]
        if pin["name"] != source:
            raise ValueError(_names_another(setting, source, pin["name"], self._run))
        started = rows[: pin["rows"]]
        if pin_rows(source, started) != pin:
            raise ValueError(
                f"{setting}: {source}: has changed since {self._run} was started: expected the {pin['rows']} rows of "
                f"then, in their order (more may follow), got {len(rows)} rows that do not begin with these; put the "
                f"file back, or start another run from this one (model.path: {self._run}, another output_dir)"
            )
        if len(rows) > len(started):
            console.print(
                f"{setting}: {source}: has changed: {len(rows) - len(started)} rows were added since {self._run} was "
                f"started; it goes on with the first {len(started)}. To train on all, start another run from this one",
                markup=False,
            )
        return started


def pin_rows(source: str, rows: Sequence[Mapping[str, Any]]) -> Pin:
    """Pins the content of rows and their order; the order of a row's columns does not count."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"kind": "rows", "name": source, "rows": len(rows), "hash": digest.hexdigest()}


def _names_another(setting: str, name: str, pinned: str, run: str) -> str:
    return f"{setting}: {name}, but {run} was started from {pinned}; name that, or choose another output_dir"


def _reward_setting(spec: RewardSpec) -> str:
    return f"rewards.{spec.label}"


def _pin(make_pin: Callable[[str], Pin], where: str, name: str) -> Pin:
    """Pins a model or tokenizer; an error begins with `where`, the setting that names it."""
    with naming(where):
        return make_pin(name)


def _named_models(config: RunConfig) -> dict[str, tuple[Callable[[str], Pin], str]]:
    """Returns setting -> (how it is pinned, the name in the config)."""
    named: dict[str, tuple[Callable[[str], Pin], str]] = {}
    if config.model.path is not None:
        named["model.path"] = (pin_model, config.model.path)
    if isinstance(config, PolicyConfig) and config.loss.reference is not None:
        named[REFERENCE] = (partial(_pin, pin_model, REFERENCE), config.loss.reference)
    named["model.tokenizer"] = (pin_tokenizer, config.model.tokenizer_path)
    for setting, spec in config.named_rewards if isinstance(config, PolicyConfig) else ():
        if spec.model is not None:
            where = f"{setting}.model"
            named[_reward_setting(spec)] = (partial(_pin, pin_model, where), spec.model)
            tokenizer = (partial(_pin, pin_tokenizer, where), tokenizer_path(spec.model))
            named[f"{_reward_setting(spec)} (tokenizer)"] = tokenizer
    return named


def _inherited(config: RunConfig, start: str) -> dict[str, Pin]:
    """Returns the pins of a run that begins at a step of another: that run's, for models that have the same names."""
    exact, named = resolve_step(start), {setting: name for setting, (_, name) in _named_models(config).items()}
    pins = read_step_about(exact).get("pins", {})
    same = {setting: pin for setting, pin in pins.items() if pin["kind"] == "rows" or named.get(setting) == pin["name"]}
    return same | {"start_from": {"kind": "start", "name": start, "exact": exact}}


def _resolve(config: RunConfig) -> dict[str, Any]:
    """Returns the run's pins, a line about each that its name no longer means, or the reason to refuse them."""
    pins: dict[str, Pin] = {}
    notes: list[str] = []
    run = config.output_dir
    try:
        about = read_newest_about(run, config.checkpoint.directory)
        saved: Mapping[str, Pin] = about.get("pins", {})
        if not about and config.start_from is not None:
            saved = _inherited(config, config.start_from)
        for setting, (make_pin, name) in _named_models(config).items():
            if setting not in saved:
                pins[setting] = make_pin(name)
                continue
            pins[setting] = pin = saved[setting]
            if pin["name"] != name:
                raise ValueError(_names_another(setting, name, f"{pin['name']} ({pin['exact']})", run))
            check_pin(pin, setting, run)
            if pin["kind"] == "model" and is_run(name) and resolve_step(name) != pin["exact"]:
                notes.append(
                    f"{setting}: stays {pin['exact']}, which {run} was started from, not the newer step of {name}"
                )
    except (OSError, ValueError) as error:
        return {"refused": str(error)}
    return {"refused": None, "pins": dict(saved) | pins, "notes": notes, "is_new": not about}
