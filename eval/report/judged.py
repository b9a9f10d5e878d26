"""Results of other evaluations, read to be shown beside a comparison: `eval judge`, `eval ifeval`, `eval summaries`.

Whose texts they are about is known from where the texts lie (under a run's directory) or from their `checkpoint`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.runs import PolicyRun
from train.data.rows import load_rows

JUDGE_RESULT = "judge.json"
SIDES = ("a", "b")


def read_result(file: Path, option: str, keys: Sequence[str], command: str) -> dict[str, Any]:
    """A result file that has these keys.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is another file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{option} {file}: no such file; run `python -m eval {command}` first")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {file}: not JSON ({error})") from error
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(
            f"{option} {file}: not a result of `python -m eval {command}`, or one of an earlier version: it has no "
            f"{missing[0]!r}; run that command again"
        )
    return found


def owner(path: str, runs: Sequence[PolicyRun]) -> PolicyRun | None:
    """The run that wrote a file of texts: it lies in the run's directory, or its rows name one of its checkpoints."""
    file = Path(path)
    for run in runs:
        if run.path.resolve() in file.resolve().parents:
            return run
    if not file.is_file():
        return None
    checkpoint = str(load_rows(path)[0].get("checkpoint") or "")
    place = Path(checkpoint.partition("@")[0]).resolve()
    return next((r for r in runs if checkpoint and r.path.resolve() in (place, *place.parents)), None)


def read_judged(folder: str, runs: Sequence[PolicyRun]) -> dict[str, Any]:
    """What `eval judge` wrote to a folder, about two of these runs, under their names and in their order.

    Raises:
      FileNotFoundError, ValueError: no such result, or one about something else.
    """
    keys = ("a", "b", "model", "task", "pairs", "wins", "ties", "losses", "win_rate")
    result = read_result(Path(folder) / JUDGE_RESULT, "--judged", keys, "judge")
    if not all(isinstance(result[side], str) for side in SIDES):
        raise ValueError(f"--judged {folder}: {JUDGE_RESULT}: expected paths in 'a' and 'b'; judge again")
    found = []
    for side in SIDES:
        run = owner(result[side], runs)
        if run is None:
            raise ValueError(
                f"--judged {folder}: {result[side]} is not of {' or '.join(str(run.path) for run in runs)}: it does "
                f"not lie there, and its rows name no checkpoint from there; give a judgement of these runs"
            )
        found.append(run)
    if found[0] == found[1]:
        raise ValueError(f"--judged {folder}: both sides are of {found[0].path}; expected two runs against each other")
    names = {f"name_{side}": run.name for side, run in zip(SIDES, found, strict=True)}
    turned = runs.index(found[0]) > runs.index(found[1])
    told = result | names | {"source": folder, "mirrored": turned}
    return mirrored(told) if turned else told


def mirrored(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same judgements as B against A. What does not depend on the sides' names, like position bias, stays."""
    swapped = {"a": "b", "b": "a", "name_a": "name_b", "name_b": "name_a", "wins": "losses", "losses": "wins"}
    found = {key: result[swapped.get(key, key)] for key in result}
    for key in ("win_rate", "length_controlled"):
        found[key] = _mirrored_rate(result.get(key))
    for key in ("aspects", "temperatures"):
        found[key] = {name: _mirrored_rate(rate) for name, rate in (result.get(key) or {}).items()}
    return found


def _mirrored_rate(rate: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if rate is None:
        return None
    ends = {"mean": rate["mean"], "low": rate["high"], "high": rate["low"]}
    return dict(rate) | {key: None if value is None else 1 - value for key, value in ends.items()}


def name_of(result: Mapping[str, Any]) -> str:
    """A judge: its model and its task."""
    return f"{result['model']}, {result['task']}" if result["task"] else str(result["model"])


def texts_of(result: Mapping[str, Any]) -> str:
    """Which texts it judged: drawn at some temperatures, or those of the validation."""
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
    """The results, each with its `source` and a `name`: its run's, or the file's; both if that is not enough."""
    found = [read_result(Path(file), option, keys, command) | {"source": file} for file in files]
    owners = [owner(result["responses"], runs) if result.get("responses") else None for result in found]
    names = [run.name if run else Path(file).stem for run, file in zip(owners, files, strict=True)]
    return [
        result | {"name": name if names.count(name) == 1 else f"{name}, {result['source']}"}
        for result, name in zip(found, names, strict=True)
    ]
