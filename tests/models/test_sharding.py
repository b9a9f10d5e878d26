"""The mesh: 8 devices compute what one computes, and what cannot be placed is refused with both sides named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from models.config import Qwen3Config
from models.generate import SamplingCopy
from models.hf_weights import abstract_model, abstract_params, split
from models.lora import PROJECTIONS, Lora
from models.sharding import RULES, constrain, make_layout, parameter_axes, parameter_shardings

ROOT = Path(__file__).parents[2]
CONFIG = Qwen3Config(64, 32, 64, 2, 4, 2, 16)

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4, data 2": {"data": 2, "tensor": 4, "rules": {"kv_heads": []}},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "group sharded": {"data": 4, "fsdp": 2, "rules": {"prompt": ["data"], "group": ["fsdp"]}},
    # attention by kernels, without a GPU
    "kernels, all axes": {"data": 2, "fsdp": 2, "tensor": 2, "attention": "interpreted tpu"},
    "kernels, group sharded": {
        **{"data": 2, "fsdp": 2, "tensor": 2, "attention": "interpreted gpu"},
        "rules": {"prompt": ["data"], "group": ["fsdp"]},
    },
}

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from models.config import Qwen3Config
from models.hf_weights import abstract_model, load_pretrained, save_pretrained, split
from models.decoding import UnrolledDecoder
from models.generate import SamplingCopy, known_drawing, sampling_program
from models.slots import Batch, SlotRollouts, join_parts, slot_programs
from models.sampler import Rollout, SamplingParams, sample
from models.sharding import make_layout
from dataclasses import replace
from flax import nnx
from train.config import *
from train.batch import Groups, make_batch
from train.run.metrics import fetch_metrics
from train.state import copy_tree, make_state
from train.update import Update

directory, meshes = sys.argv[1], json.loads(sys.argv[2])
P, G, S, T, V = 8, 4, 8, 6, 64
config = PolicyConfig(
    output_dir="x", model=ModelConfig(path=directory), data=DataConfig(train="x"), max_steps=1,
    rewards=[RewardSpec(function="a.b")], prompts_per_step=P, num_generations=G, microbatch_prompts=8,
    max_completion_length=T, loss=LossConfig(logprob_chunk=64))
rng = np.random.default_rng(0)
prompt_PS, lengths_P = rng.integers(0, V, (P, S)), rng.integers(1, S + 1, P)
rollout = Rollout(rng.integers(0, V, (P, G, T)), np.zeros((P, G, T), np.float32),
                  rng.integers(1, T + 1, (P, G)), np.ones((P, G), bool))
advantages_PG = rng.normal(size=(P, G)).astype(np.float32)

def compute(layout):
    graphdef, params = split(load_pretrained(directory, mesh=layout))
    sgd = optax.sgd(1.0)
    state = make_state(copy_tree(params), sgd, layout)
    batch = make_batch(Groups([], prompt_PS, lengths_P, rollout, advantages_PG[..., None]), config)
    batch = batch._replace(advantages_PG=advantages_PG)
    reference = jax.tree.map(lambda p: p * 1.1, params)
    spread = len({s.device for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards})
    after, updates = Update(graphdef, sgd, config, layout, state)(state, reference, batch, 0)
    rows = np.arange(P, dtype=np.int32)
    placed = layout.put(prompt_PS, ("prompt", None)), layout.put(lengths_P, ("prompt",)), layout.put(rows, ("prompt",))
    copied = SamplingCopy(graphdef, params, layout)(params)
    sampling = SamplingParams(1.0, 0, 1.0, 0, np.array([1], np.int32))
    draw = lambda p: sampling_program(graphdef, T, 0)(p, *placed, jax.random.key(3), sampling, num_generations=G)
    rollouts, weights = [draw(params), draw(copied)], copied
    if dict(layout.rules)["heads"] == dict(layout.rules)["kv_heads"]:  # as accelerators decode
        weights = SamplingCopy(graphdef, params, layout, "unrolled")(params)
        rollouts.append(draw(weights))
        sizes = {"num_generations": G, "max_completion_length": T}
        for kernels in ("gpu", "tpu"):
            with_kernels = lambda w: sample(
                UnrolledDecoder(replace(w, kernels=kernels), interpret=True), *placed, jax.random.key(3), sampling,
                **sizes)
            rollouts.append(jax.jit(with_kernels)(weights))
    slots, batch = 4, Batch(prompt_PS.astype(np.int32), lengths_P.astype(np.int32), jax.random.key(3))
    for given in (copied, weights) if slots % layout.shard_count("prompt") == 0 else ():  # in parts
        options = {"slots": slots, "num_generations": G, "layout": layout, "drawing": known_drawing(given, sampling)}
        programs = slot_programs(graphdef, T, 0, layout)
        parts = SlotRollouts(programs, given, batch, sampling, finishes=False, **options)
        rollouts.append(join_parts(list(parts)))
        assert all(program._cache_size() <= 1 for program in programs), "each is compiled once"
    return jax.device_get((after.params, fetch_metrics(updates), *rollouts)), spread

one, _ = compute(make_layout(devices=jax.devices()[:1]))
for name, mesh in meshes.items():
    other, spread = compute(make_layout(**mesh))
    gap = lambda a, b: float(max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b))))
    print(json.dumps({"mesh": name, "devices": spread, "gradient": gap(one[0], other[0]),
        "metrics": gap(one[1], other[1]),
        "tokens_equal": float(np.mean([one[2].tokens_PGT == found.tokens_PGT for found in other[2:]])),
        "logprobs": gap(one[2].logprobs_PGT, other[2].logprobs_PGT)}))
"""


def test_a_mesh_that_no_sides_of_a_torus_make_takes_parts_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JAX refuses it for TPUs."""

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("Failed to find assignment")

    devices = jax.devices()[:1]
    expected = make_layout(data=1, fsdp=1, tensor=1, devices=devices).mesh
    monkeypatch.setattr(jax, "make_mesh", refuse)
    assert make_layout(data=1, fsdp=1, tensor=1, devices=devices).mesh == expected
    monkeypatch.setattr("jax.experimental.mesh_utils.create_device_mesh", refuse)
    with pytest.raises(ValueError, match=r"^mesh: data 1 x fsdp 1 x tensor 1 cannot be laid on the torus of these 1"):
        make_layout(data=1, fsdp=1, tensor=1, devices=devices)


@pytest.mark.slow
def test_eight_devices_equal_one(tmp_path: Path) -> None:
    from models.hf_weights import save_pretrained
    from models.qwen3 import Qwen3

    save_pretrained(Qwen3(CONFIG, nnx.Rngs(0)), tmp_path)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    # More threads than devices: where all of them wait in collectives, XLA on a CPU ends the process after 40 s.
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": "32"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(MESHES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["mesh"] for result in results] == list(MESHES)
    for result in results:
        assert result["devices"] == 8, result
        assert result["gradient"] < 1e-5 and result["metrics"] < 1e-5, result
        # equal draws; a token may differ only where rounding crosses a boundary, and nothing here lies on one
        assert result["tokens_equal"] == 1 and result["logprobs"] < 1e-4, result


TRAFFIC = """
import json, sys
import jax, jax.numpy as jnp
from flax import nnx
from models.config import Qwen3Config
from models.hf_weights import abstract_model, abstract_params, split
from models.sharding import gather, make_layout
from train.plan.hlo import read_program
from train.plan.roofline import Roofline

LAYERS, G, S = 3, 4, 8
network = Qwen3Config(64, 32, 80, LAYERS, 4, 2, 24)

def in_layers(layout, P, T):
    model = abstract_model(network, layout=layout)
    graphdef, params = split(model)[0], abstract_params(model, layout)
    int32 = lambda dims, *axes: jax.ShapeDtypeStruct(dims, jnp.int32, sharding=layout.sharding(axes))
    tokens = int32((P, S), "prompt", None), int32((P,), "prompt"), int32((P, G, T), "prompt", "group", None)
    loss = lambda params, *tokens: nnx.merge(graphdef, params).prefill_and_extend(*tokens)[1].sum()
    placement = jax.tree.map(lambda leaf: leaf.sharding, params)
    text = jax.jit(jax.grad(loss), out_shardings=placement).lower(params, *tokens).compile().as_text()
    work = Roofline(read_program(text)).work()
    items = [(item.opcode, work) for item, work in work.items.items() if item.loops and work.sent]
    count = lambda kind: sum(work.kernels for opcode, work in items if opcode == kind) / LAYERS
    return {"bytes": sum(sum(work.sent.values()) for _, work in items) / LAYERS,
            "gathers": count("all-gather"), "others": count("all-to-all") + count("collective-permute")}

whole, grouped = (make_layout(**mesh) for mesh in json.loads(sys.argv[1]))
weight, near_1 = jnp.array([1 + 2**-10, 2.0]), 1 + 2**-10
product = jax.jit(lambda weight: (gather(whole, weight, "bfloat16", ("embed",)) * near_1).sum())
print(json.dumps({
    "whole": [in_layers(whole, *sizes) for sizes in ((4, 16), (8, 32))],
    "grouped": [in_layers(grouped, *sizes) for sizes in ((4, 16), (4, 32), (8, 16))],
    "product": float(product(weight)), "gradient": jax.grad(product)(weight).tolist()}))
"""


def test_layers_send_weights_and_no_completions() -> None:
    """For each device, whatever T, forward and backward send in each layer:

    groups whole:  each weight twice (forward, recomputed), its gradient once; nothing of any prompt
    groups split:  the same, and activations of prompts, which each device of a group computes, but of no completion
    """
    whole = {"data": 2, "fsdp": 2}
    grouped = whole | {"rules": {"prompt": ["data"], "group": ["fsdp"]}}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TRAFFIC, json.dumps([whole, grouped])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    small, large = found["whole"]
    assert small == large and small["gathers"] == 2 * len(PROJECTIONS) and small["others"] == 0
    short, long, more = (of["bytes"] for of in found["grouped"])
    assert short == long and short < 1.3 * small["bytes"]
    prompt_bytes = 4 * (4 // 2) * 8 * 32  # hidden states of the two prompts that each device has more
    assert more - short < 8 * prompt_bytes
    assert found["product"] == 3 * (1 + 2**-10), "gathered in the compute dtype"
    assert found["gradient"] == [1 + 2**-10] * 2, "and summed in the parameter's"


def test_every_parameter_axis_has_a_meaning() -> None:
    abstract = abstract_model(CONFIG)
    axes = jax.tree.leaves(parameter_axes(abstract), is_leaf=lambda x: isinstance(x, tuple))
    assert {meaning for names in axes for meaning in names} <= RULES.keys()
    shapes = jax.tree.leaves(nnx.to_pure_dict(nnx.split(abstract)[1]))
    assert [len(names) for names in axes] == [len(shape.shape) for shape in shapes]


def test_what_cannot_be_placed_is_refused() -> None:
    layout = make_layout()
    with pytest.raises(ValueError, match="'heads' and for 'mlp'"):
        layout.spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="'hats': expected one of"):
        layout.spec(("hats",))
    with pytest.raises(ValueError, match="data 3 x fsdp 1 x tensor 1 does not make the 1 devices"):
        make_layout(data=3)
    with pytest.raises(ValueError, match="at most|one size may be -1"):
        make_layout(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="'prompt': \\['pipeline'\\] is not a rule"):
        make_layout(rules={"prompt": ["pipeline"]})


def test_an_axis_that_does_not_divide_is_named() -> None:
    three = make_layout(devices=jax.devices()[:1])
    odd = Qwen3Config(63, 32, 64, 2, 4, 2, 16)

    class ThreeWays(type(three)):  # a mesh of one device cannot fail to divide
        def shard_count(self, axis: str) -> int:
            return 2 if axis == "vocab" else 1

    with pytest.raises(ValueError, match="embed_VD.*'vocab' of size 63 cannot be split over 2 devices"):
        parameter_shardings(abstract_model(odd), ThreeWays(three.mesh, three.rules))


def test_constraints_are_active_on_one_device() -> None:
    layout = make_layout()
    text = str(jax.make_jaxpr(lambda x: constrain(layout, x, "prompt", None))(jax.numpy.ones((4, 3))))
    assert "sharding_constraint" in text


def test_sampled_from_is_whole_where_prompts_are_shared() -> None:
    """Over tensor the copy is cut as the parameters are, over data and fsdp not; it is in the compute dtype."""
    layout = make_layout()
    assert dict(layout.for_sampling().rules)["embed"] == () and dict(layout.rules)["embed"] == ("fsdp",)
    assert dict(layout.for_sampling().rules)["heads"] == ("tensor",)
    assert dict(layout.for_sampling().rules)["prompt"] == ("data", "fsdp")
    grouped = make_layout(rules={"prompt": ["data"], "group": ["tensor"], "mlp": ["fsdp"], "embed": []})
    rules = dict(grouped.for_sampling().rules)
    assert rules["mlp"] == ("fsdp",) and rules["heads"] == () and rules["group"] == ("tensor",)
    model = abstract_model(CONFIG, dtype="bfloat16", layout=layout)
    (graphdef, _), params = split(model), abstract_params(model, layout)
    copy = SamplingCopy(graphdef, params, layout)
    assert all(copy.is_copied)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(copy.targets)} == {"bfloat16"}
    exact = abstract_model(CONFIG, layout=layout)  # float32 on one device: nothing to copy
    params = abstract_params(exact, layout)
    assert not any(SamplingCopy(split(exact)[0], params, layout).is_copied)
    adapted = abstract_model(CONFIG, dtype="bfloat16", param_dtype="bfloat16", layout=layout, lora=Lora(rank=2))
    params = abstract_params(adapted, layout)
    copy = SamplingCopy(split(adapted)[0], params, layout)  # adapters are float32: they alone are copied
    assert len(copy.copied_leaves(params)) == 14 and {leaf.dtype.name for leaf in copy.copied_leaves(params)} == {
        "float32"
    }
