"""The reference policy: another model, or one that follows the policy; resumed = uninterrupted."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoint import load_model
from models.hf_weights import save_pretrained, split
from models.lora import Lora
from models.sharding import make_layout, to_device
from train.build import make_tokenizer
from train.config import LossConfig, PolicyConfig
from train.loop import train_policy
from train.pins import Pins
from train.plan.dry_run import memory_per_device
from train.plan.programs import network_config
from train.reference import Reference, check_networks, make_reference
from train.run.directory import read_metrics
from train.running import SetupError

MakeConfig = Callable[..., PolicyConfig]


def place(*values: float) -> dict[str, Any]:
    return {"x": jax.device_put(jnp.asarray(values), make_layout().sharding((None,)))}


@pytest.mark.parametrize("away", [False, True], ids=["here", "offloaded"])
@pytest.mark.parametrize("mixup", [0.25, 1.0])
def test_a_reference_follows_the_policy(mixup: float, away: bool) -> None:
    """Every second step it is mixup x policy + (1 - mixup) x reference; with 1 it is the policy, in new arrays."""
    settings = LossConfig(reference_sync_steps=2, reference_mixup=mixup, offload_reference=away)
    reference, wanted = Reference(settings, place(1.0, -2.0)), np.array([1.0, -2.0])
    ages = []
    for step in range(1, 6):
        policy = place(step, 0.1)
        reference.follow(step, policy)
        ages.append(reference.metrics(step)["reference/age"])
        if step % 2 == 0:
            wanted = mixup * np.array([step, 0.1]) + (1 - mixup) * wanted
        np.testing.assert_allclose(to_device(reference.params)["x"], wanted, rtol=1e-6)
        jax.tree.map(lambda array: array.delete(), policy)  # as an update donates it
        memory = reference.params["x"].sharding.memory_kind
        assert memory == ("pinned_host" if away else jax.devices()[0].default_memory().kind)
    assert ages == [0, 1, 0, 1, 0]
    assert reference.saved.keys() == reference.abstract.keys() == {"reference"}


def test_a_reference_that_stays_is_no_part_of_checkpoints() -> None:
    reference = Reference(LossConfig(), place(1.0))
    reference.follow(100, place(2.0))
    assert float(reference.params["x"][0]) == 1.0
    assert reference.saved == reference.abstract == reference.metrics(3) == {}


def test_bfloat16_parameters_are_mixed_in_float32() -> None:
    """0.6 x 1 + 0.4 x 1.0078125 = 1.003125, which is rounded once, to 1."""
    ours, theirs = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), place(value)) for value in (1.0, 1.0078125))
    reference = Reference(LossConfig(reference_sync_steps=1), theirs)
    reference.follow(1, ours)
    assert reference.params["x"].dtype == jnp.bfloat16 and float(reference.params["x"][0]) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_sync_steps": 0}, "reference_sync_steps: expected at least 1, got 0"),
        ({"reference_mixup": 0.5}, "loss.reference_mixup: 0.5 needs loss.reference_sync_steps"),
        ({"reference_sync_steps": 5, "reference_mixup": 0.0}, r"expected a number in \(0, 1\], got 0.0"),
        ({"reference_sync_steps": 5, "reference_mixup": 1.5}, r"expected a number in \(0, 1\], got 1.5"),
        ({"reference_sync_steps": 5, "beta": 0.0}, "loss.reference_sync_steps: is of the KL penalty"),
        ({"reference": "runs/sft", "beta": 0.0}, "loss.reference: is of the KL penalty, which loss.beta: 0 leaves out"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**settings)


def test_adapters_are_not_averaged(policy_config: MakeConfig, tmp_path: Path) -> None:
    lora = Lora(rank=2)
    policy_config(tmp_path, lora=lora, loss=LossConfig(reference_sync_steps=2, reference_mixup=1.0))
    with pytest.raises(ValueError, match="a mean of adapters is not the adapter of a mean; .* expected 1 .* got 0.6"):
        policy_config(tmp_path, lora=lora, loss=LossConfig(reference_sync_steps=2))
    with pytest.raises(ValueError, match="another model's weights cannot follow adapters"):
        policy_config(tmp_path, lora=lora, loss=LossConfig(reference_sync_steps=2, reference="runs/x"))


def changed_copy(directory: Path, out: Path, by: float) -> Path:
    """A model whose matrices are larger by a factor."""
    model = load_model(directory)
    params = jax.tree.map(lambda p: p * by if p.ndim > 2 else p, split(model)[1])
    save_pretrained(nnx.merge(split(model)[0], params), out)
    return out


@pytest.mark.parametrize("rank", [0, 2], ids=["all parameters", "adapters"])
def test_another_model_is_the_reference(
    rank: int, policy_config: MakeConfig, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    """Its weights, whatever the policy trains; with adapters all of them, before the policy's base."""
    other = changed_copy(tiny_policy_dir, tmp_path / "other", 2.0)
    loss = LossConfig(reference=str(other))
    config = policy_config(tmp_path, lora=Lora(rank=rank), loss=loss)
    pins, layout = Pins(config), make_layout(data=1)
    assert pins.pins["loss.reference"]["exact"] == str(other)
    model = pins.reference(config.model, loss.reference)
    assert model is not None and model.path == str(other)
    reference = make_reference(config, model, None, layout, make_tokenizer(config.model, config.chat))
    wanted = split(load_model(other))[1]
    found = reference.params | {"layers": {n: p for n, p in reference.params["layers"].items() if "lora" not in n}}
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert ("query_lora_a_LDA" in reference.params["layers"]) == bool(rank)
    arrays = memory_per_device(config, network_config(str(tiny_policy_dir)), None)[1]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(reference.params))
    assert arrays["reference"] == whole and (arrays["parameters"] == whole) == (not rank)
    follows = replace(config, lora=Lora(), loss=LossConfig(reference_sync_steps=2))
    plain = replace(follows, loss=LossConfig())
    sizes = [memory_per_device(each, network_config(str(tiny_policy_dir)), None)[2][0] for each in (plain, follows)]
    assert sizes[1] - sizes[0] == sum(leaf.nbytes for leaf in jax.tree.leaves(wanted))


def test_a_model_that_cannot_be_compared_is_refused(tiny_policy_dir: Path, tiny_reward_dir: Path) -> None:
    policy = network_config(str(tiny_policy_dir))
    check_networks("other", replace(policy, eos_token_id=3, sliding_window=7), policy)
    for path, network, message in (
        ("scores", network_config(str(tiny_reward_dir)), "scores is a reward model; expected a policy"),
        ("big", replace(policy, vocab_size=999), "has a vocabulary of 999 tokens, and the policy one of"),
        ("deep", replace(policy, num_hidden_layers=7), "deep: has the num_hidden_layers 7, and the policy"),
        ("fast", replace(policy, rope_theta=3.0), "fast: has the rope_theta 3.0, and the policy"),
    ):
        with pytest.raises(ValueError, match=f"loss.reference: .*{message}"):
            check_networks(path, network, policy)


@pytest.mark.parametrize("away", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "offloaded"])
def test_a_run_whose_reference_follows_goes_on_as_if_never_interrupted(
    away: bool, policy_config: MakeConfig, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, from a checkpoint between two moves; right after a move with mixup 1 the KL is 0."""
    other = changed_copy(tiny_policy_dir, tmp_path / "other", 2.0)
    loss = LossConfig(reference=str(other), reference_sync_steps=2, reference_mixup=1.0, offload_reference=away)
    whole = policy_config(tmp_path, loss=loss, max_steps=4)
    whole = replace(whole, validation=replace(whole.validation, prompts=0))
    train_policy(whole)
    cut = replace(whole, output_dir=str(tmp_path / "cut"))
    shutil.copytree(whole.output_dir, cut.output_dir)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train_policy(cut)
    rows = [read_metrics(run.output_dir, clock=False) for run in (whole, cut)]
    assert rows[0] == rows[1] and [row["reference/age"] for row in rows[0]] == [0, 1, 0, 1]
    kl = [row["kl"] for row in rows[0]]
    assert kl[2] == pytest.approx(0, abs=1e-6) and min(kl[0], kl[1], kl[3]) > 1e-6
    changed_copy(tiny_policy_dir, other, 3.0)
    with pytest.raises(SetupError, match="loss.reference: .*other: .* was started from .*, whose files have changed"):
        train_policy(replace(cut, max_steps=5))
