"""Reads results of `eval judge`, `eval ifeval` and `eval summaries` to show them beside a comparison.

The judged texts are assigned to a run by their path (inside the run's directory) or by their `checkpoint`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.runs import PolicyRun
from models.names import split_step
from train.data.rows import load_rows

JUDGE_RESULT = "judge.json"
SIDES = ("a", "b")


def read_result(file: Path, option: str, keys: Sequence[str], command: str) -> dict[str, Any]:
    """Reads a result file with the given keys.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a result of `python -m eval COMMAND`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{option} {file}: no such file; run `python -m eval {command}` first")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {file}: not JSON ({error})") from error
    missing = [key for key in keys if not isinstance(result, dict) or key not in result]
    if missing:
        raise ValueError(
            f"{option} {file}: not a result of `python -m eval {command}`, or one of an earlier version: it has no "
            f"{missing[0]!r}; run that command again"
        )
    return result


def owner(path: str, runs: Sequence[PolicyRun]) -> PolicyRun | None:
    """The run that wrote a file of texts: the file lies in its directory, or the rows name one of its checkpoints."""
    file = Path(path)
    for run in runs:
        if run.path.resolve() in file.resolve().parents:
            return run
    if not file.is_file():
        return None
    checkpoint = str(load_rows(path)[0].get("checkpoint") or "")
    directory = Path(split_step(checkpoint)[0]).resolve()
    return next((r for r in runs if checkpoint and r.path.resolve() in (directory, *directory.parents)), None)


def read_judged(folder: str, runs: Sequence[PolicyRun]) -> dict[str, Any]:
    """Reads a result of `eval judge` about two of the runs, under their names and in their order.

    Raises:
      FileNotFoundError, ValueError: no such result, or a result about other texts.
    """
    keys = ("a", "b", "model", "task", "pairs", "wins", "ties", "losses", "win_rate")
    result = read_result(Path(folder) / JUDGE_RESULT, "--judged", keys, "judge")
    if not all(isinstance(result[side], str) for side in SIDES):
        raise ValueError(f"--judged {folder}: {JUDGE_RESULT}: expected paths in 'a' and 'b'; judge again")
    owners = []
    for side in SIDES:
        run = owner(result[side], runs)
        if run is None:
            raise ValueError(
                f"--judged {folder}: {result[side]} is not of {' or '.join(str(run.path) for run in runs)}: it does "
                f"not lie there, and its rows name no checkpoint from there; give a judgement of these runs"
            )
        owners.append(run)
    if owners[0] == owners[1]:
        raise ValueError(f"--judged {folder}: both sides are of {owners[0].path}; expected two runs against each other")
    names = {f"name_{side}": run.name for side, run in zip(SIDES, owners, strict=True)}
    mirror = runs.index(owners[0]) > runs.index(owners[1])
    named = result | names | {"source": folder, "mirrored": mirror}
    return mirrored(named) if mirror else named


def mirrored(result: Mapping[str, Any]) -> dict[str, Any]:
    """Mirrors judgements to B against A. Numbers that do not depend on the sides, like position bias, stay."""
    swapped = {"a": "b", "b": "a", "name_a": "name_b", "name_b": "name_a", "wins": "losses", "losses": "wins"}
    mirrored_result = {key: result[swapped.get(key, key)] for key in result}
    for key in ("win_rate", "length_controlled"):
        mirrored_result[key] = _mirrored_rate(result.get(key))
    for key in ("aspects", "temperatures"):
        mirrored_result[key] = {name: _mirrored_rate(rate) for name, rate in (result.get(key) or {}).items()}
    return mirrored_result


def _mirrored_rate(rate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    ends = {"mean": rate["mean"], "low": rate["high"], "high": rate["low"]}
    return dict(rate) | {key: None if value is None else 1 - value for key, value in ends.items()}


def name_of(result: Mapping[str, Any]) -> str:
    """The name of a judge: its model and its task."""
    return f"{result['model']}, {result['task']}" if result["task"] else str(result["model"])


def texts_of(result: Mapping[str, Any]) -> str:
    """The kind of judged texts: sampled at some temperatures, or of the validation."""
    temperatures = ", ".join(result.get("temperatures") or {})
    return f"texts at {temperatures}" if temperatures else "validation texts"


def read_ifeval(files: Sequence[str], runs: Sequence[PolicyRun]) -> list[dict[str, Any]]:
    keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    return _read_named(files, runs, "--ifeval", keys, "ifeval")


def read_summaries(files: Sequence[str], runs: Sequence[PolicyRun]) -> list[dict[str, Any]]:
    return _read_named(files, runs, "--summaries", ("rouge1", "rouge2", "rougeL", "length", "novelty"), "summaries")


def _read_named(
    files: Sequence[str], runs: Sequence[PolicyRun], option: str, keys: Sequence[str], command: str
) -> list[dict[str, Any]]:
    """Reads results; adds `source` and a unique `name`: the run's or the file's, with the source if needed."""
    results = [read_result(Path(file), option, keys, command) | {"source": file} for file in files]
    owners = [owner(result["responses"], runs) if result.get("responses") else None for result in results]
    names = [run.name if run else Path(file).stem for run, file in zip(owners, files, strict=True)]
    return [
        result | {"name": name if names.count(name) == 1 else f"{name}, {result['source']}"}
        for result, name in zip(results, names, strict=True)
    ]
