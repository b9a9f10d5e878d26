"""Adapters: the base is untouched, fresh ones change nothing, merged equals unmerged, and others can load them."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.checkpoint import load_model
from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import abstract_model, flatten, load_pretrained, split
from models.lora import PROJECTIONS, Lora, adapter_names, is_adapter, merge_adapters, merge_trainable, split_trainable
from models.qwen3 import Backbone
from models.sharding import RULES, parameter_axes
from models.tokenizer import Tokenizer
from train.__main__ import main
from train.config import CheckpointConfig, DataConfig, ModelConfig, PolicyConfig, RewardModelConfig
from train.loop import train_policy
from train.run.directory import read_metrics
from train.supervised.reward_model import train_reward_model

MakeConfig = Callable[..., PolicyConfig]
numbers = partial(read_metrics, clock=False)
LORA = Lora(rank=3, alpha=6.0)


def adapted(model: Backbone, lora: Lora = LORA, *, random_b: bool = True) -> Any:
    """(graphdef, params) of a network with adapters; of a fresh one B is 0."""
    network = type(model)(model.config, nnx.Rngs(1), lora=lora)
    graphdef, params = split(network)
    rng = np.random.default_rng(2)
    adapters = {
        name: jnp.asarray(rng.normal(0, 0.1, value.shape), jnp.float32) if random_b and "_lora_b_" in name else value
        for name, value in params["layers"].items()
        if is_adapter(name)
    }
    base = split(model)[1]
    return graphdef, base | {"layers": base["layers"] | adapters}


def logprobs(graphdef: Any, params: Any) -> jax.Array:
    rng = np.random.default_rng(0)
    prompt_PS, tokens_PGT = rng.integers(0, 300, (2, 5)), rng.integers(0, 300, (2, 3, 4))
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model.logits(model.predict(prompt_PS, jnp.array([5, 3]), tokens_PGT)))


@pytest.mark.slow
@pytest.mark.parametrize("targets", [tuple(PROJECTIONS), ("q_proj", "down_proj"), ("o_proj",)])
def test_fresh_ones_change_nothing_and_merged_equals_unmerged(
    targets: tuple[str, ...], make_model: Callable[..., Backbone], tiny_config: Qwen3Config
) -> None:
    model, lora = make_model(tiny_config), replace(LORA, targets=targets)
    plain = logprobs(*split(model))
    np.testing.assert_array_equal(logprobs(*adapted(model, lora, random_b=False)), plain)
    graphdef, params = adapted(model, lora)
    unmerged = logprobs(graphdef, params)
    assert float(jnp.abs(unmerged - plain).max()) > 1e-2
    merged = merge_adapters(params, lora)
    assert flatten(merged).keys() == flatten(split(model)[1]).keys()
    np.testing.assert_allclose(logprobs(split(model)[0], merged), unmerged, atol=1e-5)
    untouched = [name for name in flatten(merged) if name.removeprefix("layers.") not in adapter_names(lora)]
    assert len(untouched) == len(flatten(merged)) - len(targets)
    for name in untouched:
        assert flatten(merged)[name] is flatten(params)[name]


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_matrix(
    make_model: Callable[..., Backbone], tiny_config: Qwen3Config
) -> None:
    """dA = s dW B^T and dB = s A^T dW, with dW of the network whose W is the merged one."""
    model = make_model(tiny_config)
    graphdef, params = adapted(model)
    trained, frozen = split_trainable(params)
    weight = jax.random.normal(jax.random.key(0), logprobs(graphdef, params).shape)
    of_trained = jax.grad(lambda trained: (weight * logprobs(graphdef, merge_trainable(trained, frozen))).mean())
    found = jax.jit(of_trained)(trained)["layers"]
    plain = split(model)[0]
    of_all = jax.grad(lambda params: (weight * logprobs(plain, params)).mean())
    whole = jax.jit(of_all)(merge_adapters(params, LORA))["layers"]
    for name, pair in adapter_names(LORA).items():
        a, b = (params["layers"][part] for part in pair)
        L, A = len(a), LORA.rank
        dw = whole[name].reshape(L, a.reshape(L, -1, A).shape[1], -1)
        da = LORA.scale * jnp.einsum("lio,lao->lia", dw, b.reshape(L, A, -1))
        db = LORA.scale * jnp.einsum("lia,lio->lao", a.reshape(L, -1, A), dw)
        np.testing.assert_allclose(found[pair.a], da.reshape(a.shape), atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found[pair.b], db.reshape(b.shape), atol=1e-6, err_msg=name)
        assert float(jnp.abs(da).max()) > 1e-4 and float(jnp.abs(db).max()) > 1e-4


def test_names_shapes_and_places() -> None:
    abstract = abstract_model(Qwen3Config(64, 32, 48, 2, 4, 2, 16), lora=LORA)
    shapes, axes = split(abstract)[1]["layers"], parameter_axes(abstract)["layers"]
    expected = {"query_lora_a_LDA": (2, 32, 3), "query_lora_b_LAHE": (2, 3, 4, 16), "output_lora_a_LHEA": (2, 4, 16, 3)}
    expected |= {"output_lora_b_LAD": (2, 3, 32), "down_lora_a_LFA": (2, 48, 3), "down_lora_b_LAD": (2, 3, 32)}
    assert expected.items() <= {name: value.shape for name, value in shapes.items()}.items()
    assert axes["query_lora_b_LAHE"] == ("layers", "rank", "heads", "head_dim")
    assert axes["down_lora_a_LFA"] == ("layers", "mlp", "rank")
    for name, value in shapes.items():
        assert len(axes[name]) == len(value.shape) and set(axes[name]) <= RULES.keys()
    bfloat16 = split(abstract_model(Qwen3Config(64, 32, 48, 2, 4, 2, 16), param_dtype="bfloat16", lora=LORA))[1]
    for name, value in bfloat16["layers"].items():
        assert value.dtype == ("float32" if is_adapter(name) else "bfloat16")


def test_the_base_starts_as_it_does_without_adapters(tiny_config: Qwen3Config) -> None:
    config = replace(tiny_config, tie_word_embeddings=False)
    build = abstract_model(config).__class__
    plain = split(build(config, nnx.Rngs(params=3)))[1]
    _, frozen = split_trainable(split(build(config, nnx.Rngs(params=3, lora=3), lora=LORA))[1])
    jax.tree.map(np.testing.assert_array_equal, frozen, plain)


@pytest.mark.slow
def test_a_policy_run_leaves_its_base_alone_and_goes_on_exactly(
    policy_config: MakeConfig, tmp_path: Path, tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = policy_config(tmp_path / "whole", lora=LORA, max_steps=4)
    train_policy(whole)
    rows = numbers(tmp_path / "whole" / "run")
    assert rows[1]["kl"] == 0 < rows[-1]["kl"]  # the reference is the base
    cut = replace(whole, output_dir=str(tmp_path / "cut"), max_steps=2)
    train_policy(cut)
    train_policy(replace(cut, max_steps=4))
    # (the validation at the end of the shorter run is the one row that only it has)
    assert [row for row in numbers(tmp_path / "cut")][1:] == [
        row | {k: v for k, v in other.items() if k.startswith("validation/")}
        for row, other in zip(rows[1:], numbers(tmp_path / "cut")[1:], strict=True)
    ]
    base = split(load_pretrained(tiny_policy_dir))[1]
    run, found = tmp_path / "whole" / "run", split(load_model(tmp_path / "whole" / "run"))[1]
    assert flatten(found).keys() == flatten(base).keys()
    for name, value in flatten(found).items():  # what no adapter changes is the base's, bit for bit
        if name.removeprefix("layers.") not in adapter_names(LORA):
            np.testing.assert_array_equal(value, flatten(base)[name])
        else:
            assert 0 < float(jnp.abs(value - flatten(base)[name]).max()) < 0.1
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"base", "1", "2", "3", "4"}
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # noqa: E731
    assert size(run / "checkpoints" / "4" / "params") < size(run / "checkpoints" / "base")
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "merged")]) == 0
    jax.tree.map(np.testing.assert_array_equal, split(load_pretrained(tmp_path / "merged"))[1], found)
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "peft"), "--adapters", "true"]) == 0
    assert "adapters of rank 3 for Qwen3ForCausalLM of" in capsys.readouterr().out
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 6.0, str(tiny_policy_dir))


@pytest.mark.slow
def test_a_reward_model_with_adapters(
    tiny_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sentences: list[str]
) -> None:
    """Its head is new and is trained too."""
    rows = [{"prompt": "", "chosen": s[:10] + " yes", "rejected": s[:10] + " no"} for s in sentences[:16]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardModelConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tiny_policy_dir), remat="none"),
        data=DataConfig(train=str(tmp_path / "pairs.jsonl")),
        max_steps=30,
        batch_size=8,
        lora=LORA,
        checkpoint=CheckpointConfig(every=30),
    )
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-2, warmup_steps=1))
    train_reward_model(config)
    losses = [row["loss"] for row in numbers(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    base, found = flatten(split(load_pretrained(tiny_policy_dir))[1]), load_model(tmp_path / "run")
    assert found.config.architecture == REWARD_MODEL
    np.testing.assert_array_equal(split(found)[1]["embed_VD"], base["embed_VD"])
    out = tmp_path / "peft"
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--out", str(out), "--adapters", "true"]) == 0
    about = json.loads((out / "adapter_config.json").read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert Tokenizer(out).eos_ids == Tokenizer(tiny_policy_dir).eos_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank: expected at least 0"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha: expected a number above 0"),
        ({"rank": 4, "alpha": float("inf")}, "lora.alpha: expected a finite number, got inf"),
        ({"rank": 4, "targets": ["q_proj", "qkv"]}, "lora.targets: expected some of q_proj, k_proj"),
        ({"rank": 4, "targets": []}, "lora.targets: expected some of"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_adapters_of_what_has_none(tiny_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(tiny_policy_dir), "--out", str(tmp_path / "out"), "--adapters", "true"]
    assert main(["export", *arguments]) == 2
    assert "has no adapters; expected a run that was trained with lora.rank above 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
