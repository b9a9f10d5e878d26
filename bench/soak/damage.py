"""Damages the files of runs, one at a time, and looks whether anything is wrong without a word.

    python -m bench.soak damage [--short]

Checkpoints: bits are flipped all over the files of a step, and every file is deleted, cut, emptied and zeroed in turn;
then the step is found and restored. Pointers: the file that names the directory of checkpoints that are kept elsewhere
is damaged; then the step is found, and the run gone on with. Runs: every file of a whole run, with adapters and their
base, is deleted, cut, emptied, zeroed and flipped in turn; then the run goes on for a step, and a step is exported.
Good ends are values and tokenizers as they were saved, the step before with a line that says so, and one line that
refuses; a value or tokenizer that has changed without a line, and a traceback, are faults, which are printed; with any
the exit code is 1.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoint import Checkpoints, find_step
from models.checkpoint_files import warn_once
from models.checkpoint_steps import check_pointer, checkpoints_folder

DEEDS = ("deleted", "cut", "emptied", "zeroed")
AS_SAVED, BEFORE, REFUSED, SILENT, TRACEBACK = "as saved", "the step before", "refused", "SILENT", "TRACEBACK"
FAULTS = (SILENT, TRACEBACK)
Values = Mapping[int, Any]  # step -> (params, train)


class Damage(NamedTuple):
    """One file with another content."""

    file: Path
    what: str
    content: bytes | None  # None: no file


def deeds_on(files: Sequence[Path]) -> Iterator[Damage]:
    """Yields every deed on every file that would change it."""
    for file in files:
        content = file.read_bytes()
        new = {"deleted": None, "cut": content[: len(content) // 2], "emptied": b"", "zeroed": bytes(len(content))}
        for deed in DEEDS:
            if new[deed] != content:
                yield Damage(file, deed, new[deed])


def flips_in(files: Sequence[Path], count: int) -> Iterator[Damage]:
    """Yields damages by one flipped bit: so many evenly over all bytes, and three in each file."""
    contents = [(file, file.read_bytes()) for file in files if file.stat().st_size]
    ends = np.cumsum([len(content) for _, content in contents])
    places = []
    for i in range(count):
        position = int((i + 0.5) * ends[-1] / count)
        number = int(np.searchsorted(ends, position, side="right"))
        places.append((*contents[number], position - int(ends[number - 1]) * (number > 0), i % 8))
    for i, (file, content) in enumerate(contents):
        places += [(file, content, at, (i + at) % 8) for at in {0, len(content) // 2, len(content) - 1}]
    for file, content, at, bit in places:
        flipped = bytes([content[at] ^ 1 << bit])
        yield Damage(file, f"bit {bit} of byte {at} flipped", content[:at] + flipped + content[at + 1 :])


@contextlib.contextmanager
def damaged(damage: Damage) -> Iterator[None]:
    """Damages a file while the body runs."""
    before = damage.file.read_bytes()
    if damage.content is None:
        damage.file.unlink()
    else:
        damage.file.write_bytes(damage.content)
    try:
        yield
    finally:
        damage.file.write_bytes(before)


# Checkpoints


def save_steps(run: Path, steps: int = 2) -> Values:
    """Saves a few small arrays of all kinds as the steps of a run; returns them."""
    rng, values = np.random.default_rng(0), {}
    checkpoints = Checkpoints(run)
    for step in range(1, steps + 1):
        layers = {"query_LD": jnp.asarray(rng.normal(size=(2, 40)), jnp.bfloat16)}
        params = {"embed_VD": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "layers": layers}
        train = {"opt_state": ({"mu": params, "count": jnp.int32(step)},), "step": jnp.int32(step)}
        values[step] = (params, train)
        checkpoints.save(step, params, train, {"model": {"layers": 2}, "run": {"seed": 0}, "pins": {}})
    checkpoints.close()
    return values


def restore_newest(run: Path, checkpoints: Checkpoints, values: Values) -> tuple[str, str]:
    """Restores the step that the run's name means; returns how that ended, and the words that it printed."""
    warn_once.cache_clear()
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        try:
            step = find_step(run)[1]
            restored = checkpoints.restore(step, *values[step])
        except (ValueError, FileNotFoundError) as error:
            is_one_line = "\n" not in str(error) and str(run) in str(error)
            return REFUSED if is_one_line else TRACEBACK, str(error)
        except BaseException as error:
            return TRACEBACK, repr(error)
    if "Traceback" in words.getvalue():
        return TRACEBACK, words.getvalue()
    if not same_bits(restored, values[step]):
        return SILENT, words.getvalue()
    if step == max(values):
        return AS_SAVED, words.getvalue()
    return BEFORE if f"it is passed over for step {step}" in words.getvalue() else SILENT, words.getvalue()


def same_bits(tree: Any, other: Any) -> bool:
    """Whether two pytrees have the same arrays, bit for bit."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def damage_checkpoint(run: Path, flips: int) -> Counter[str]:
    """Damages the newest of two steps, which it saves in `run`; returns how often each end came, and prints faults."""
    values = save_steps(run)
    step = run / "checkpoints" / str(max(values))
    files = sorted(path for path in step.rglob("*") if path.is_file())
    checkpoints = Checkpoints(run)
    ends: Counter[str] = Counter()
    for damage in (*deeds_on(files), *flips_in(files, flips)):
        with damaged(damage):
            end, words = restore_newest(run, checkpoints, values)
        ends[f"{damage.what if damage.what in DEEDS else 'flipped'}: {end}"] += 1
        if end in FAULTS:
            print(f"{damage.file.relative_to(run)} {damage.what}: {end}: {words}")
    checkpoints.close()
    return ends


# Pointers


def damage_pointer(run: Path, flips: int) -> Counter[str]:
    """Damages the file that names where a run's checkpoints are; returns how often each end came, and prints faults."""
    place = run.with_name(f"{run.name}_place")
    params, train = {"embed_VD": jnp.ones((2, 3))}, {"step": jnp.int32(1)}
    checkpoints = Checkpoints(run, directory=str(place))
    checkpoints.save(1, params, train, {"model": {}, "run": {}, "pins": {}})
    checkpoints.close()
    file = run / "checkpoints"
    attempts = {"find": lambda: find_step(run), "go on": lambda: check_pointer(run, None)}
    ends: Counter[str] = Counter()
    for damage in (*deeds_on([file]), *flips_in([file], flips)):
        if damage.content is None:  # then it is a run without checkpoints
            continue
        for name, attempt in attempts.items():
            with damaged(damage):
                end, words = end_of_pointer(run, place, attempt)
            ends[f"{name}, {damage.what if damage.what in DEEDS else 'flipped'}: {end}"] += 1
            if end in FAULTS:
                print(f"{file} {damage.what}, {name}: {end}: {words}")
    return ends


def end_of_pointer(run: Path, place: Path, attempt: Callable[[], Any]) -> tuple[str, str]:
    """Says how an attempt at a run ended whose checkpoints are in `place`."""
    try:
        attempt()
        folder = Path(checkpoints_folder(run))
    except (ValueError, FileNotFoundError) as error:
        is_one_line = "\n" not in str(error) and str(run / "checkpoints") in str(error)
        return REFUSED if is_one_line else TRACEBACK, str(error)
    except BaseException as error:
        return TRACEBACK, repr(error)
    return AS_SAVED if folder == place else SILENT, str(folder)


# Whole runs


def damage_run(folder: Path, flips: int) -> Counter[str]:
    """Damages a run of `train sft` with adapters of two steps; returns how often each end came, and prints faults."""
    from bench.soak.tiny import sft_settings, write_materials

    write_materials(folder / "materials")
    run, copy = folder / "run", folder / "copy"
    changes = {"lora": {"rank": 2}, "checkpoint": {"every": 1}, "eval_steps": 1}
    settings = sft_settings(folder / "materials", copy, **changes)

    def program(*words: str) -> tuple[int, str]:
        return call_program([*words, "--config", str(folder / "run.yaml")] if words[0] == "sft" else list(words))

    def go_on() -> tuple[str, str]:
        code, words = program("sft", "--max_steps", "3")
        return end_of(code, words, outcome, trained)

    def export() -> tuple[str, str]:
        shutil.rmtree(folder / "out", ignore_errors=True)
        code, words = program("export", "--checkpoint", f"{copy}@2", "--out", str(folder / "out"))
        return end_of(code, words, lambda: read_files(folder / "out"), exported)

    def outcome() -> Any:
        return read_weights(copy / "checkpoints" / "3"), read_files(copy / "tokenizer")

    def done(*words: str) -> None:
        code, text = program(*words)
        assert code == 0, text

    (folder / "run.yaml").write_text(json.dumps(settings))
    done("sft", "--max_steps", "2")
    shutil.copytree(copy, run)
    done("export", "--checkpoint", f"{copy}@2", "--out", str(folder / "out"))
    exported = read_files(folder / "out")
    done("sft", "--max_steps", "3")
    trained = outcome()
    files = sorted(
        path for path in run.rglob("*") if path.is_file() and f"{Path('checkpoints', '1')}/" not in str(path)
    )
    ends: Counter[str] = Counter()
    for damage in (*deeds_on(files), *flips_in(files, flips)):
        for name, attempt in (("export", export), ("go on", go_on)):
            shutil.rmtree(copy)
            shutil.copytree(run, copy)
            place = damage._replace(file=copy / damage.file.relative_to(run))
            place.file.unlink()
            if place.content is not None:
                place.file.write_bytes(place.content)
            end, words = attempt()
            ends[f"{name}, {damage.what if damage.what in DEEDS else 'flipped'}: {end}"] += 1
            if end in FAULTS:
                print(f"{damage.file.relative_to(run)} {damage.what}, {name}: {end}: {words}")
    return ends


def call_program(words: list[str]) -> tuple[int, str]:
    """Runs `python -m train` in this process; returns its exit code, and what it printed on the standard error."""
    from train.__main__ import main

    warn_once.cache_clear()
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except BaseException as error:
            return -1, f"Traceback of {error!r}; {errors.getvalue()}"
    return code, errors.getvalue()


def end_of(code: int, words: str, read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    """Says how a program ended."""
    if code not in (0, 2) or "Traceback" in words:
        return TRACEBACK, words
    lines = [line for line in words.splitlines() if line.startswith("error: ")]
    if code == 2:
        return REFUSED if len(lines) == 1 else TRACEBACK, words
    if read() != expected:
        return SILENT, words
    return BEFORE if "passed over" in words else AS_SAVED, words


def read_files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()} if directory.is_dir() else {}


def read_weights(step: Path) -> list[bytes]:
    """Returns the bits of the trained parameters of a step."""
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(step.absolute() / "params")
    return [np.asarray(array).tobytes() for array in jax.tree.leaves(params)]


def main(arguments: Sequence[str] = ()) -> int:
    """Damages checkpoints and runs, prints how often each end came; returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak damage", description=__doc__)
    parser.add_argument("--short", action="store_true", help="60 flips of a checkpoint in place of 600, no whole runs")
    parser.add_argument("--flips", type=int, help="how many bits of a checkpoint are flipped")
    options = parser.parse_args(list(arguments))
    flips, ends = options.flips or (60 if options.short else 600), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        parts = {"checkpoint": damage_checkpoint, "pointer": damage_pointer, "run": damage_run}
        for name, part in list(parts.items())[: 2 if options.short else 3]:
            began = time.perf_counter()
            found = part(Path(folder) / name, flips if name == "checkpoint" else flips // 10)
            for end, count in sorted(found.items()):
                print(f"{name}, {end}: {count}")
            print(f"{name}: {found.total()} in {time.perf_counter() - began:.0f} s")
            ends.update(found)
    return int(any(end.endswith(FAULTS) for end in ends))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
