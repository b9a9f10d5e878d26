"""What a step carries on: master weights, arrays kept on the host, checkpoints kept elsewhere."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

import train.run.directory
from eval.report.compare import last_change
from models.checkpoint import Checkpoints, checkpoints_folder, find_step, load_model
from models.hf_weights import split
from models.sharding import make_layout, to_device, to_host
from train.build import make_optimizer, make_tokenizer, updated_share
from train.config import CheckpointConfig, LogConfig, LossConfig, MeshConfig, OptimizerConfig, PolicyConfig
from train.loop import train_policy
from train.run.directory import Run, read_metrics
from train.running import SetupError
from train.state import apply_gradient, make_state

MakeConfig = Callable[..., PolicyConfig]
numbers = partial(read_metrics, clock=False)


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-3])
def test_the_share_that_an_update_changes_is_counted_over_bfloat16_parameters(size: float) -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(0.02 * rng.normal(size=n), jnp.bfloat16) for n in (4000, 500)] + [jnp.ones(100, jnp.bfloat16)]
    changed = sum(
        int((np.asarray(array, np.float32) + np.float32(by)).astype(array.dtype)[i] != array[i]) / 2
        for array in map(np.asarray, arrays)
        for by in (size, -size)
        for i in range(array.size)
    )
    share = updated_share({"a": arrays, "b": jnp.ones(9999)}, size)
    assert share == pytest.approx(changed / 4600, rel=1e-5)
    assert updated_share({"a": arrays[-1:]}, 2**-10) == 0 and updated_share({"a": arrays[-1:]}, 2**-7) == 1
    assert updated_share({"b": jnp.ones(5)}, size) == 1


@pytest.mark.parametrize("master", [False, True])
def test_master_weights_keep_what_bfloat16_loses(master: bool) -> None:
    """1,000 steps of Adam by 1e-4: from 1 to 0.9 with master weights, nowhere without (1/256 is bfloat16's step)."""
    config = OptimizerConfig(learning_rate=1e-4, warmup_steps=0, master_weights=master)
    optimizer, _ = make_optimizer(config, 1000)
    start = jax.device_put(jnp.ones(8, jnp.bfloat16), make_layout().sharding((None,)))
    state = make_state({"layers": {"x": start}}, optimizer, make_layout())
    step = jax.jit(lambda state: apply_gradient(optimizer, state, {"layers": {"x": jnp.ones(8, jnp.bfloat16)}}))
    for _ in range(1000):
        state = step(state)
        if master:
            exact = state.opt_state.master["layers"]["x"]
            np.testing.assert_array_equal(state.params["layers"]["x"], exact.astype(jnp.bfloat16))
    found = float(state.params["layers"]["x"][0])
    assert state.params["layers"]["x"].dtype == jnp.bfloat16
    assert found == pytest.approx(0.9, abs=1 / 256) if master else found == 1.0


@pytest.mark.slow
def test_master_weights_of_float32_would_be_twice_the_same(policy_config: MakeConfig, tmp_path: Path) -> None:
    config = policy_config(tmp_path)
    with pytest.raises(ValueError, match="optimizer.master_weights: is for parameters that are trained in bfloat16"):
        replace(config, optimizer=OptimizerConfig(master_weights=True))
    model = replace(config.model, param_dtype="bfloat16")
    train_policy(replace(config, model=model, optimizer=OptimizerConfig(master_weights=True), max_steps=2))
    saved = Checkpoints(tmp_path / "run")
    assert saved.latest() == 2
    saved.close()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(split(load_model(tmp_path / "run", dtype="auto"))[1])} == {
        "bfloat16"
    }


@pytest.mark.slow
def test_what_waits_on_the_host_changes_nothing(policy_config: MakeConfig, tmp_path: Path) -> None:
    here = policy_config(tmp_path / "here", loss=LossConfig(beta=0.1))
    away = policy_config(tmp_path / "away", loss=LossConfig(beta=0.1, offload_reference=True))
    optimizer = replace(away.optimizer, offload=True)
    away = replace(away, rewards=[replace(away.rewards[0], offload=True)], optimizer=optimizer)
    train_policy(here)
    train_policy(away)
    assert numbers(tmp_path / "here" / "run") == numbers(tmp_path / "away" / "run")


def test_host_memory() -> None:
    tree = {"a": jax.device_put(jnp.arange(3.0), make_layout().sharding((None,))), "b": None}
    waiting = to_host(tree)
    assert waiting["a"].sharding.memory_kind == "pinned_host" and waiting["b"] is None
    back = to_device(waiting)
    assert back["a"].sharding == tree["a"].sharding
    assert to_device(tree)["a"].unsafe_buffer_pointer() == tree["a"].unsafe_buffer_pointer()  # no copy
    np.testing.assert_array_equal(back["a"], tree["a"])


def test_host_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def addressable_memories(self) -> list[Any]:
            return []

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(ValueError, match="offload: cpu has no memory of the host that devices can read"):
        to_host({})


@pytest.mark.slow
def test_checkpoints_elsewhere(policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is what it is with its checkpoints inside; whoever is given its directory finds them."""
    monkeypatch.chdir(tmp_path)
    inside = policy_config(tmp_path / "inside", max_steps=2, checkpoint=CheckpointConfig(every=1))
    outside = policy_config(
        tmp_path / "outside", max_steps=2, checkpoint=CheckpointConfig(every=1, directory="far/away")
    )
    train_policy(inside)
    train_policy(outside)
    run = tmp_path / "outside" / "run"
    assert (run / "checkpoints").is_file() and {"1", "2"} <= {p.name for p in (tmp_path / "far" / "away").iterdir()}
    assert find_step(run) == (run, 2) and last_change(str(run)) > 0
    ends = [split(load_model(f"{folder}@2"))[1] for folder in (run, tmp_path / "inside" / "run")]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    train_policy(replace(outside, max_steps=3, checkpoint=CheckpointConfig(every=1)))  # it remembers where they are
    assert find_step(run) == (run, 3)
    with pytest.raises(SetupError, match="checkpoint.directory: elsewhere, but the checkpoints of .* are in .*away"):
        train_policy(replace(outside, max_steps=3, checkpoint=CheckpointConfig(directory="elsewhere")))
    shutil.rmtree(tmp_path / "far")
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        find_step(run)


@pytest.mark.parametrize("keep", [0, -1])
def test_no_number_of_checkpoints_to_keep_deletes_them_all(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep: expected at least 1 checkpoint, or None to keep all, got {keep}"):
        Checkpoints(tmp_path, keep=keep)
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_a_place_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("gs://bucket/name\n")
    assert str(checkpoints_folder(tmp_path)) == "gs://bucket/name"
    assert str(checkpoints_folder(tmp_path) / "3" / "params") == "gs://bucket/name/3/params"


def test_processes_that_do_not_share_a_directory_are_told(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.run.directory, "is_distributed", lambda: True)
    monkeypatch.setattr(train.run.directory, "gather", lambda mine: mine)
    config = policy_config(tmp_path)
    tokenizer = make_tokenizer(config.model, config.chat)
    Run(config, {}, tokenizer).close()  # the first process sees what it writes
    assert not list((tmp_path / "run" / "checkpoints").glob("shared*"))
    monkeypatch.setattr(train.run.directory, "is_first", lambda: False)
    with pytest.raises(ValueError, match="process 0 does not see what process 0 writes there; expected one directory"):
        Run(config, {}, tokenizer)


def test_a_run_goes_on_elsewhere_but_not_as_another(policy_config: MakeConfig, tmp_path: Path) -> None:
    """Mesh, offloading and batches of scoring may change, and a config from before a setting existed is its default."""
    config = policy_config(tmp_path)
    tokenizer = make_tokenizer(config.model, config.chat)
    Run(config, {}, tokenizer).close()
    file = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(file.read_text())
    del older["lora"], older["chat"], older["optimizer"]["master_weights"], older["rewards"][0]["offload"]
    file.write_text(yaml.safe_dump(older))
    rewards = [replace(config.rewards[0], offload=True, batch_prompts=2)]
    moved = replace(config, rewards=rewards, mesh=MeshConfig(sampling_copy=False), loss=LossConfig(logprob_chunk=7))
    Run(moved, {}, tokenizer).close()
    for another in (replace(config, seed=5), replace(config, rewards=[replace(config.rewards[0], weight=2.0)])):
        with pytest.raises(ValueError, match="holds a run with another config"):
            Run(another, {}, tokenizer)


def test_a_run_has_a_page_of_its_own_and_keeps_it(
    policy_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Weights & Biases: whatever its directory is called, resumed or moved; a copy and a new start get another."""
    pages: list[dict[str, Any]] = []
    page = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: pages.append(given) or page))
    config = policy_config(tmp_path)
    model = np.zeros(2, np.float32)
    optimizer, _ = make_optimizer(config.optimizer, 1)
    start = jax.device_put(model, make_layout().sharding((None,)))
    state = make_state({"layers": {"x": start}}, optimizer, make_layout())
    tokenizer = make_tokenizer(config.model, config.chat)

    def page_id(directory: str) -> str:
        log = LogConfig(tensorboard=False, wandb_project="study")
        run = Run(replace(config, output_dir=str(tmp_path / directory), log=log), {}, tokenizer)
        run.resume(state)
        run.close()
        assert pages[-1]["name"] == Path(directory).name and pages[-1]["resume"] == "allow"
        return pages[-1]["id"]

    first = page_id("tldr/gopo")
    other = page_id("ifeval/gopo")
    assert first != other and page_id("tldr/gopo") == first and page_id("ifeval/gopo") == other
    shutil.copytree(tmp_path / "tldr" / "gopo", tmp_path / "copy")
    copy = page_id("copy")
    assert copy not in (first, other) and page_id("copy") == copy and page_id("tldr/gopo") == first
    (tmp_path / "tldr" / "gopo").rename(tmp_path / "moved")
    assert page_id("moved") == first
    assert page_id("tldr/gopo") not in (first, other, copy)
    assert json.loads((tmp_path / "moved" / "wandb.json").read_text())["id"] == first


@pytest.mark.slow
def test_two_runs_do_not_share_a_place_for_checkpoints(policy_config: MakeConfig, tmp_path: Path) -> None:
    place = CheckpointConfig(every=1, directory=str(tmp_path / "place"))
    one = policy_config(tmp_path / "one", max_steps=1, checkpoint=place)
    train_policy(one)
    with pytest.raises(SetupError, match="place: holds a run with another config \\(seed: 0, now 1\\)"):
        train_policy(replace(one, output_dir=str(tmp_path / "two"), seed=1))
    train_policy(replace(one, output_dir=str(tmp_path / "moved"), max_steps=2))
    assert [row["step"] for row in read_metrics(tmp_path / "moved")][-1] == 2


def test_optax_adds_up_what_it_is_given() -> None:
    """`apply_updates` adds a float32 change to a bfloat16 parameter in float32, which master weights rely on."""
    p, wanted = jnp.bfloat16(3.0), jnp.bfloat16(3.03125)
    change = wanted.astype(jnp.float32) - p.astype(jnp.float32)
    assert optax.apply_updates(p, change) == wanted
