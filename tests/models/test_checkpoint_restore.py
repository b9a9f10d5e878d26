"""What is read of a step is what was saved, in any dtype; steps from before there were digests load with a note."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from models.checkpoint import Checkpoints
from models.checkpoint_damage import data_files
from models.checkpoint_files import warn_once
from models.checkpoint_restore import StepReader

RNG = np.random.default_rng(0)
PARAMS: dict[str, Any] = {
    "embed_VD": jnp.asarray(RNG.normal(size=(40, 30)), jnp.float32),
    "layers": {"norm_LD": jnp.ones((2, 3))},
}
TRAIN = {"step": jnp.int32(3)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    warn_once.cache_clear()
    return save(tmp_path / "run", PARAMS)


def save(run: Path, params: dict[str, Any]) -> Path:
    checkpoints = Checkpoints(run)
    checkpoints.save(1, params, TRAIN, {"model": {"depth": 2}})
    checkpoints.close()
    return run


def reader(run: Path) -> StepReader:
    return StepReader(run, epath.Path(run / "checkpoints"), 1, lambda: "; and so on")


def target(dtype: str) -> dict[str, Any]:
    """Of the embedding alone in another dtype, perhaps."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), PARAMS)
    return shapes | {"embed_VD": jax.ShapeDtypeStruct((40, 30), dtype, sharding=place)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_are_compared_before_they_are_cast(run: Path, tmp_path: Path, dtype: str) -> None:
    """A changed last bit is noticed though the cast rounds it away."""
    restored = reader(run).arrays("params", target(dtype))
    expected = PARAMS | {"embed_VD": PARAMS["embed_VD"].astype(dtype)}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, expected)
    params = run / "checkpoints" / "1" / "params"
    shutil.rmtree(params)
    changed = np.array(PARAMS["embed_VD"])
    changed[7, 8] = np.nextafter(changed[7, 8], 9)
    save(tmp_path / "other", PARAMS | {"embed_VD": jnp.asarray(changed)})
    shutil.copytree(tmp_path / "other" / "checkpoints" / "1" / "params", params)
    (name,) = data_files(epath.Path(params), "embed_VD")
    with pytest.raises(ValueError) as error:
        reader(run).arrays("params", target(dtype))
    assert str(error.value) == (
        f"{run}: step 1 is not a checkpoint that can be read (params/{name}: array embed_VD has other values than were "
        f"saved); and so on"
    )


def test_what_is_not_there_is_named(run: Path) -> None:
    for changed, words in (
        (target("float32") | {"score_D": jnp.ones(3)}, "params.score_D was not saved"),
        ({"embed_VD": PARAMS["embed_VD"]}, "params.layers.norm_LD was saved, but is not expected"),
    ):
        with pytest.raises(ValueError, match=f"step 1 is not a checkpoint that can be read .{words}.; and so on"):
            reader(run).arrays("params", changed)


def test_a_step_from_before_there_were_digests(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "1"
    shutil.rmtree(step / "digests")
    metadata = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    del metadata["item_handlers"]["digests"]
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    checkpoints = Checkpoints(run)
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1, PARAMS, TRAIN), (PARAMS, TRAIN))
    checkpoints.close()
    assert capsys.readouterr().err == (
        f"{run}: is from before checkpoints had digests: damage to its arrays would not be noticed\n"
    )
