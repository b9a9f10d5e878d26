"""Times what digests add to a save and to a restore of a run's checkpoint.

    python -m bench.digests [MILLIONS_OF_PARAMETERS [ROUNDS]]

The state is that of AdamW in float32: parameters and two moments, in arrays of the shapes of a Qwen3. A save is timed
until it is on the disk, and for how long it holds up training; a restore until the arrays are on their devices. With
and without digests take turns in one process, after a call of each that compiles.
"""

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import models.checkpoint_restore
import models.checkpoint_saves
from models.checkpoint import Checkpoints
from models.digests import digest_arrays

V, D, F = 32_768, 768, 3_072
HEADS = {"query_LDHE": (D, 12, 64), "key_LDKE": (D, 4, 64), "value_LDKE": (D, 4, 64), "output_LHED": (12, 64, D)}
MLP = {"gate_LDF": (D, F), "up_LDF": (D, F), "down_LFD": (F, D), "mlp_norm_LD": (D,)}


def make_params(millions: float) -> dict[str, Any]:
    """Returns the parameters of a network of about this size."""
    per_layer = sum(jnp.zeros(shape).size for shape in (HEADS | MLP).values())
    layers = max(1, round((millions * 1e6 - V * D) / per_layer))
    keys = iter(jax.random.split(jax.random.key(0), 16))
    stacked = {name: jax.random.normal(next(keys), (layers, *shape)) for name, shape in (HEADS | MLP).items()}
    return {"embed_VD": jax.random.normal(next(keys), (V, D)), "layers": stacked}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def main(millions: float, rounds: int) -> None:
    params = make_params(millions)
    train = {"opt_state": [jax.tree.map(lambda x: x * 0.1, params) for _ in range(2)], "step": jnp.int32(1)}
    state = {"params": params, "train": train}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    first = timed(lambda: digest_arrays(state))
    print(f"{count / 1e6:.0f} M parameters, {size / 1e9:.2f} GB; the first digest, which compiles: {first:.2f} s")
    seconds: dict[str, list[float]] = {}
    for turn in range(1 + rounds):
        for name, patched in (("with digests", False), ("without", True)):
            with tempfile.TemporaryDirectory() as folder, without_digests(patched):
                times = time_checkpoint(Path(folder) / "run", params, train, patched)
            for what, spent in times.items():
                seconds.setdefault(f"{what}, {name}", []).extend([spent] if turn else [])
        seconds.setdefault("digest of the state", []).extend([timed(lambda: digest_arrays(state))] if turn else [])
    for what, values in sorted(seconds.items()):
        print(f"{what:45s} {statistics.median(values):7.3f} s  ({min(values):.3f} to {max(values):.3f})")


@contextlib.contextmanager
def without_digests(patched: bool) -> Iterator[None]:
    """Saves no digests while the body runs."""
    with contextlib.ExitStack() as stack:
        for name in ("digest_arrays", "make_digests") if patched else ():
            stack.enter_context(mock.patch.object(models.checkpoint_saves, name, lambda *_: {}))
        yield


def time_checkpoint(run: Path, params: Any, train: Any, patched: bool) -> dict[str, float]:
    checkpoints = Checkpoints(run)
    held_up = timed(lambda: checkpoints.save(1, params, train, {}))
    saved = held_up + timed(checkpoints.wait)
    if patched:
        shutil.rmtree(run / "checkpoints" / "1" / "digests")
    with mock.patch.object(models.checkpoint_restore, "has_digests", lambda _: not patched):
        restored = timed(lambda: checkpoints.restore(1, params, train))
    checkpoints.close()
    return {"a save holds up training": held_up, "a save is on the disk": saved, "a restore": restored}


if __name__ == "__main__":
    words = sys.argv[1:]
    main(float(words[0]) if words else 100.0, int(words[1]) if len(words) > 1 else 3)
