"""Optimizers by name: their directions, what they decay, what their state weighs, and where it waits."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from jax.sharding import AbstractMesh

from models.checkpoint import Checkpoints
from models.sharding import RULES, Layout, make_layout
from train.build import make_optimizer, make_tokenizer
from train.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    SftConfig,
)
from train.loop import train_policy
from train.optimizers import DIRECTIONS, is_decayed, matrix_inputs
from train.plan.dry_run import memory_per_device
from train.plan.programs import network_config
from train.run.directory import Run, read_metrics
from train.running import SetupError
from train.state import abstract_opt_state, apply_gradient, load_optimizer, make_state, offload_optimizer
from train.supervised.program import LossAux, make_offloaded_update, make_supervised_update
from train.supervised.sft import train_sft

L, D, H, E, F, V = 3, 8, 2, 4, 12, 20
SHAPES = {
    "embed_VD": (V, D),
    "layers": {
        "attention_norm_LD": (L, D),
        "query_LDHE": (L, D, H, E),
        "query_bias_LHE": (L, H, E),
        "output_LHED": (L, H, E, D),
        "up_LDF": (L, D, F),
        "down_lora_b_LAD": (L, 2, D),
    },
    "norm_D": (D,),
}
AXES = {
    "embed_VD": ("vocab", "embed"),
    "layers": {
        "attention_norm_LD": ("layers", "width"),
        "query_LDHE": ("layers", "embed", "heads", "head_dim"),
        "query_bias_LHE": ("layers", "heads", "head_dim"),
        "output_LHED": ("layers", "heads", "head_dim", "embed"),
        "up_LDF": ("layers", "embed", "mlp"),
        "down_lora_b_LAD": ("layers", "rank", "embed"),
    },
    "norm_D": ("width",),
}
FACTORED = {"min_dim_size_to_factor": 4}
CHOICES = {
    "adamw": OptimizerConfig(),
    "adafactor": OptimizerConfig(name="adafactor", options=FACTORED),
    "lion": OptimizerConfig(name="lion", options={"b2": 0.98}),
    "sgd": OptimizerConfig(name="sgd"),
    "momentum": OptimizerConfig(name="sgd", options={"momentum": 0.9, "nesterov": True}),
    "muon": OptimizerConfig(name="muon"),
    "optax.lamb": OptimizerConfig(name="optax.lamb", options={"b1": 0.8}),
}
chosen = pytest.mark.parametrize("choice", CHOICES)


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def random_params(seed: int = 0, dtype: str = "float32") -> Any:
    rng, layout = np.random.default_rng(seed), make_layout(data=1, devices=jax.devices()[:1])
    place = lambda shape: layout.put(rng.normal(size=shape).astype(dtype), (None,) * len(shape))  # noqa: E731
    return jax.tree.map(place, SHAPES, is_leaf=is_shape)


def whole_params(seed: int = 0) -> Any:
    """The same without adapters, so that all of them are trained."""
    params = random_params(seed)
    return params | {"layers": {name: p for name, p in params["layers"].items() if "lora" not in name}}


def one_layout() -> Layout:
    return make_layout(data=1, devices=jax.devices()[:1])


def updates_of(config: OptimizerConfig, params: Any, *gradients: Any) -> Any:
    """The last update that gradients make, in turn."""
    optimizer, _ = make_optimizer(config, 10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_of_all_is_that_of_optax(weight_decay: float) -> None:
    """Bit for bit, states too: what was trained before there were other optimizers goes on."""
    config = OptimizerConfig(weight_decay=weight_decay, decay_all=True, learning_rate=1e-2, warmup_steps=2)
    optimizer, schedule = make_optimizer(config, 10)
    adamw = optax.adamw(schedule, 0.9, 0.999, 1e-8, weight_decay=weight_decay)
    params, gradient = random_params(), random_params(1)
    ends = []
    for each in (optimizer, optax.chain(optax.clip_by_global_norm(1.0), adamw)):
        state, update = each.init(params), jax.jit(each.update)
        for _ in range(3):
            updates, state = update(gradient, state, params)
        ends.append((updates, state))
    same(*ends)
    masked, _ = make_optimizer(replace(config, decay_all=False), 10)
    assert jax.tree.structure(masked.init(params)) == jax.tree.structure(ends[0][1])


@pytest.mark.parametrize("choice", [name for name in CHOICES if name != "optax.lamb"])  # which scales by norms
@pytest.mark.parametrize("decay_all", [False, True], ids=["matrices", "all"])
def test_without_a_gradient_weights_decay_but_norms_and_biases_do_not(choice: str, decay_all: bool) -> None:
    """A weight loses learning_rate x weight_decay of itself."""
    config = replace(CHOICES[choice], weight_decay=0.1, decay_all=decay_all, learning_rate=1e-2, warmup_steps=0)
    params = random_params()
    updates = updates_of(config, params, jax.tree.map(jnp.zeros_like, params))

    def check(path: Any, update: Any, param: Any) -> None:
        share = 1e-3 if decay_all or is_decayed(path[-1].key) else 0.0
        np.testing.assert_allclose(update, -share * param, rtol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, updates, params)
    decayed = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params) if is_decayed(path[-1].key)}
    assert decayed == {"embed_VD", "query_LDHE", "output_LHED", "up_LDF", "down_lora_b_LAD"}


def test_muon_orthogonalizes_each_layers_matrix_by_itself() -> None:
    """As optax.contrib.muon does for that matrix alone; embeddings, norms and biases are AdamW's."""
    base = {"learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": float("inf")}
    params, gradients = random_params(), (random_params(1), random_params(2))
    updates = updates_of(OptimizerConfig(name="muon", **base), params, *gradients)
    adam = updates_of(OptimizerConfig(**base), params, *gradients)
    alone = optax.contrib.muon(1.0, consistent_rms=0.2)
    update = jax.jit(alone.update)
    for name, update_L in updates["layers"].items():
        if name not in matrix_inputs():
            np.testing.assert_array_equal(update_L, adam["layers"][name])
            continue
        inputs = int(np.prod(update_L.shape[1 : 1 + matrix_inputs()[name]]))
        for layer in range(L):
            state = alone.init(jnp.zeros((inputs, update_L[layer].size // inputs)))
            for gradient in gradients:
                matrix = gradient["layers"][name][layer].reshape(inputs, -1)
                wanted, state = update(matrix, state, matrix)
            np.testing.assert_allclose(update_L[layer].reshape(inputs, -1), wanted, atol=2e-5, err_msg=name)
    for name in ("embed_VD", "norm_D"):
        np.testing.assert_array_equal(updates[name], adam[name])


def test_adafactor_looks_at_each_layer_by_itself() -> None:
    config = replace(CHOICES["adafactor"], learning_rate=1.0, warmup_steps=0, max_grad_norm=float("inf"))
    params, gradient = random_params(), random_params(1)
    updates = updates_of(config, params, gradient)
    alone = optax.adafactor(1.0, multiply_by_parameter_scale=False, **FACTORED)
    update = jax.jit(alone.update)
    slices = [{"layers": {n: p[i] for n, p in gradient["layers"].items()}} for i in range(L)]
    for i, layer in enumerate(slices):
        wanted, _ = update(layer, alone.init(layer), layer)
        for name, array in wanted["layers"].items():
            np.testing.assert_allclose(updates["layers"][name][i], array, rtol=1e-5, err_msg=name)


@chosen
def test_a_state_that_was_saved_or_waited_on_the_host_is_the_same(choice: str, tmp_path: Path) -> None:
    """Offloaded or not, saved and restored or not: the next step is the same, bit for bit."""
    config, layout = replace(CHOICES[choice], learning_rate=1e-2, warmup_steps=0), one_layout()
    optimizer, _ = make_optimizer(config, 10)
    step = jax.jit(lambda state, gradient: apply_gradient(optimizer, state, gradient))
    fresh = make_state(whole_params(), optimizer, layout)
    after = step(fresh, whole_params(1))
    waiting = offload_optimizer(after)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(waiting.opt_state)} <= {"pinned_host"}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, waiting.params, {"opt_state": waiting.opt_state, "step": waiting.step}, {})
    params, train = checkpoints.restore(1, fresh.params, {"opt_state": fresh.opt_state, "step": fresh.step})
    checkpoints.close()
    restored = fresh._replace(params=params, **train)
    wanted = step(after, whole_params(2))
    for state in (load_optimizer(waiting), restored):
        same(step(state, whole_params(2)), wanted)


def test_a_supervised_update_is_the_same_with_its_optimizer_on_the_host() -> None:
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1), 10)

    def objective(params: Any, batch: Any) -> tuple[jax.Array, LossAux]:
        hidden = jnp.tanh(batch @ params["embed_VD"]) * params["norm_D"]
        for layer in range(L):
            hidden = hidden + jnp.tanh(hidden @ params["layers"]["up_LDF"][layer])[:, :D]
        loss = jnp.mean(hidden**2)
        return loss, LossAux({"loss": (loss, jnp.ones(()))}, jnp.zeros(1))

    batch = jax.random.normal(jax.random.key(0), (5, V))
    ends = []
    for make, place in ((make_supervised_update, lambda s: s), (make_offloaded_update, offload_optimizer)):
        state = make_state(whole_params(), optimizer, one_layout())
        update, state = make(objective, optimizer, state), place(state)
        for _ in range(3):
            state, metrics = update(state, batch)
        ends.append((load_optimizer(state), metrics))
    same(*ends)


@chosen
def test_a_state_is_split_as_its_parameters(choice: str) -> None:
    """Moments as their parameter, means over an axis without it, all else whole."""
    layout = Layout(AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor")), tuple(RULES.items()))
    place = lambda shape, axes: jax.ShapeDtypeStruct(shape, "float32", sharding=layout.sharding(axes))  # noqa: E731
    params = jax.tree.map(place, SHAPES, AXES, is_leaf=is_shape)
    optimizer, _ = make_optimizer(CHOICES[choice], 10)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_opt_state(params, optimizer, layout))
    specs = {jax.tree_util.keystr(path): tuple(leaf.sharding.spec) for path, leaf in leaves}
    for path, leaf in leaves:
        leaf.sharding.shard_shape(leaf.shape)  # raises where the mesh does not divide it
        if getattr(path[-1], "key", None) == "up_LDF" and leaf.shape == (L, D, F):
            assert leaf.sharding == params["layers"]["up_LDF"].sharding
    if choice == "adafactor":
        rows = next(spec for name, spec in specs.items() if ".v_row" in name and "up_LDF" in name)
        columns = next(spec for name, spec in specs.items() if ".v_col" in name and "up_LDF" in name)
        assert (rows, columns) == ((None, "fsdp"), (None, "tensor"))


@pytest.mark.parametrize("master", [False, True], ids=["rounded", "master weights"])
@pytest.mark.parametrize("choice", ["adamw", "momentum", "lion", "adafactor", "muon", "optax.adamw"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_have_the_dtype_that_is_asked_for(moments: str, choice: str, master: bool) -> None:
    """float32: all of them, even of bfloat16 parameters; bfloat16: momentum, or the gradients' mean, alone."""
    config = CHOICES.get(choice, OptimizerConfig(name="optax.adamw"))
    options = config.options | ({"momentum": 0.9} if choice == "adafactor" else {})
    config = replace(config, options=options, moments_dtype=moments, master_weights=master)
    dtype = "bfloat16" if moments == "float32" else "float32"
    optimizer, _ = make_optimizer(config, 10)
    state = jax.eval_shape(optimizer.init, jax.tree.map(lambda x: x.astype(dtype), random_params()))
    leaves = jax.tree_util.tree_leaves_with_path(state.inner if master else state)
    dtypes = {
        kind: {leaf.dtype.name for path, leaf in leaves if {getattr(entry, "name", "") for entry in path} & {*kind}}
        for kind in (("mu", "trace", "ema"), ("nu", "v", "v_row", "v_col"))
    }
    assert list(dtypes.values()) in ([{moments}, {"float32"}], [{moments}, set()])


def test_float32_moments_of_bfloat16_parameters_add_up() -> None:
    """After 2,000 gradients of 1 the squares' mean is 1 - 0.999**2000; in bfloat16 it stops where 8 bits end."""
    params = {"layers": {"up_LDF": jnp.zeros((1, 2, 2), jnp.bfloat16)}}
    gradient = jax.tree.map(jnp.ones_like, params)
    means = []
    for moments in ("float32", None):
        optimizer, _ = make_optimizer(OptimizerConfig(moments_dtype=moments, max_grad_norm=float("inf")), 10)
        scan = lambda state, _, o=optimizer: (o.update(gradient, state, params)[1], None)  # noqa: E731
        state, _ = jax.lax.scan(scan, optimizer.init(params), length=2000)
        means.append(float(jax.tree.leaves(optax.tree_utils.tree_get(state, "nu"))[0].ravel()[0]))
    assert means[0] == pytest.approx(1 - 0.999**2000, rel=1e-3) and means[1] <= 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamm"}, r"optimizer.name: expected one of adamw, .*, muon, or the dotted path .* got 'adamm'"),
        ({"name": "optax.nothing"}, "optimizer.name: optax.nothing: cannot be imported"),
        ({"name": "optax.chain"}, r"optimizer.name: optax.chain: expected a factory f\(learning_rate, \*\*options\)"),
        ({"name": "optax.contrib.muon"}, "takes stacked layers for no matrices; expected muon"),
        ({"name": "lion", "options": {"beta": 1}}, "optimizer.options: lion has no 'beta'; expected one of b1, b2"),
        ({"options": {"b1": 0.5}}, "optimizer.options: adamw has no 'b1'; expected one of eps_root, nesterov"),
        ({"name": "sgd", "adam_beta1": 0.5}, "optimizer.adam_beta1: sgd does not take it; it has optimizer.options"),
        ({"name": "lion", "options": {"b1": "x"}}, "optimizer.name: lion: with the options .* makes no updates"),
        ({"name": "optax.lbfgs"}, "optimizer.name: optax.lbfgs: with the options {} it makes no updates"),
        ({"name": "optax.sgd", "weight_decay": 0.1}, "optimizer.weight_decay: optax.sgd does not take it"),
        ({"name": "optax.sgd", "moments_dtype": "bfloat16"}, "optimizer.moments_dtype: optax.sgd has no mu_dtype"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_wrong_choices_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make_optimizer(OptimizerConfig(**settings), 10)
    assert "\n" not in str(refusal.value)


def test_a_run_does_not_go_on_with_another_optimizer(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the setting; where the state waits may change; an older run's decay is said to change."""
    config = policy_config(tmp_path, optimizer=OptimizerConfig(weight_decay=0.1, learning_rate=1e-3))
    tokenizer = make_tokenizer(config.model, config.chat)
    run = Run(config, {}, tokenizer)
    optimizer, _ = make_optimizer(config.optimizer, 10)
    state = make_state(whole_params(), optimizer, one_layout())
    run.save(1, state)
    run.close()
    Run(replace(config, optimizer=replace(config.optimizer, offload=True)), {}, tokenizer).close()
    lion = replace(config, optimizer=OptimizerConfig(name="lion", weight_decay=0.1, learning_rate=1e-3))
    with pytest.raises(ValueError, match=r"another config \(optimizer.name: 'adamw', now 'lion'\)"):
        Run(lion, {}, tokenizer)
    file = tmp_path / "run" / "config.yaml"
    older = yaml.safe_load(file.read_text())
    for name in set(older["optimizer"]) & {"name", "options", "decay_all", "moments_dtype", "offload"}:
        del older["optimizer"][name]
    file.write_text(yaml.safe_dump(older))
    Run(replace(config, optimizer=replace(config.optimizer, decay_all=True)), {}, tokenizer).close()
    assert capsys.readouterr().err == ""
    file.write_text(yaml.safe_dump(older))
    Run(config, {}, tokenizer).close()
    assert "optimizer.weight_decay was for norms and biases too when this run was started" in capsys.readouterr().err
    file.unlink()  # and so the checkpoint alone knows
    run = Run(lion, {}, tokenizer)
    other = make_state(whole_params(), make_optimizer(lion.optimizer, 10)[0], one_layout())
    with pytest.raises(ValueError, match="the state there is not of the optimizer of optimizer.name: lion"):
        run.resume(other)
    run.close()


@pytest.mark.parametrize("choice", [*DIRECTIONS])
def test_the_plan_counts_what_the_state_weighs(
    choice: str, policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    """In parameters: AdamW 2, Lion 1, SGD 0, Adafactor's means less than 1, Muon between Lion and AdamW."""
    config = policy_config(tmp_path, optimizer=replace(CHOICES[choice], offload=choice == "lion"))
    _, arrays, (each, _) = memory_per_device(config, network_config(str(config.model.path)), None)
    state = arrays["offloaded optimizer" if choice == "lion" else "optimizer"] / arrays["parameters"]
    assert ("optimizer" in arrays) == (choice != "lion")
    assert each == pytest.approx(arrays["parameters"] * (1 + state), rel=1e-6)
    least, most = {"adamw": (2, 2), "adafactor": (0, 0.9), "lion": (1, 1), "sgd": (0, 0), "muon": (1.01, 1.99)}[choice]
    assert least - 1e-3 <= state <= most + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["muon", "adafactor"])
def test_a_run_trains_with_another_optimizer_and_goes_on(
    choice: str, policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    """Killed after a step and resumed, with its state here or on the host: the same rows, bit for bit."""
    settings = replace(CHOICES[choice], learning_rate=1e-3, warmup_steps=1, weight_decay=0.1)
    whole = policy_config(tmp_path / "whole", optimizer=settings, loss=LossConfig(beta=0.1))
    train_policy(whole)
    parts = replace(whole, output_dir=str(tmp_path / "parts"), optimizer=replace(settings, offload=True))
    train_policy(parts)
    for step in (2, 3):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(step))
    train_policy(parts)
    rows = [read_metrics(run.output_dir, clock=False) for run in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    with pytest.raises(SetupError, match=r"another config \(optimizer.name: '\w+', now 'sgd'\)"):
        train_policy(replace(whole, optimizer=OptimizerConfig(name="sgd", learning_rate=1e-3)))


@pytest.mark.slow
def test_supervised_fine_tuning_is_the_same_with_the_state_on_the_host(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Up to rounding: gradient and update are one program here, and two with the state on the host."""
    rows = "".join(json.dumps({"prompt": f"{n} is", "completion": f" a number, {n + 1} too"}) + "\n" for n in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    runs = {name: str(tmp_path / name) for name in ("here", "away")}
    for name, run in runs.items():
        settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=1, weight_decay=0.1, offload=name == "away")
        config = SftConfig(
            output_dir=run,
            model=ModelConfig(path=str(tiny_policy_dir)),
            data=DataConfig(train=str(tmp_path / "rows.jsonl"), validation_rows=4),
            max_steps=3,
            batch_size=4,
            optimizer=settings,
            checkpoint=CheckpointConfig(every=2),
            log=LogConfig(tensorboard=False, progress=False),
        )
        train_sft(config)
    shutil.rmtree(Path(runs["away"]) / "checkpoints" / "3")
    train_sft(config)  # goes on from step 2
    here, away = (read_metrics(run, clock=False) for run in runs.values())
    assert [row["step"] for row in here] == [row["step"] for row in away] == [0, 1, 2, 3]
    for row, other in zip(here, away, strict=True):
        assert row.keys() == other.keys()
        np.testing.assert_allclose(list(row.values()), list(other.values()), rtol=1e-5)
