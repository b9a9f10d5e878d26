"""`train plan`: loops are counted as often as they run, traffic by axis, and memory is what a real process takes."""

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx
from jax.sharding import AbstractMesh

from models.config import Qwen3Config
from models.flops import layer_weights
from models.hf_weights import abstract_model, split
from models.published import PUBLISHED
from models.sharding import make_layout
from train import processes
from train.__main__ import main
from train.config import PlanConfig
from train.parse import parse
from train.plan.hlo import Trips, read_program
from train.plan.programs import SLOTS, parameter_count, step_parts
from train.plan.roofline import Roofline, Work

ROOT = Path(__file__).parents[2]


def compiled(function: Any, *shapes: tuple[int, ...]) -> str:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile().as_text()


def program_work(text: str, trips: Trips = lambda depth, index: 1.0) -> Work:
    return Roofline(read_program(text), trips=trips).work()


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
        for i in range(5):
            x = jnp.tanh(x @ w[i])
        return x

    def nested(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, x: scanned(x, w), x)

    shapes = ((8, 16), (5, 16, 16))
    once = 2 * 8 * 16 * 16
    assert program_work(compiled(unrolled, *shapes)).flops == program_work(compiled(scanned, *shapes)).flops == 5 * once
    assert program_work(compiled(nested, *shapes)).flops == 15 * once


def test_a_loop_of_unknown_length_is_asked_for() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        def twice(x: jax.Array) -> jax.Array:  # a loop in a loop, and one behind it
            return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

        x = jax.lax.while_loop(lambda x: x.sum() < 1, twice, x)
        return jax.lax.while_loop(lambda x: x.sum() < 2, lambda x: jnp.sin(x @ w @ w), x)

    text, once = compiled(until, (8, 8), (8, 8)), 2 * 8 * 8 * 8
    asked = []

    def trips(depth: int, index: int) -> float:
        asked.append((depth, index))
        return {(0, 0): 7, (1, 0): 3, (0, 1): 2}[depth, index]

    assert program_work(text, trips).flops == 7 * 3 * once + 2 * 2 * once
    assert sorted(asked) == [(0, 0), (0, 1), (1, 0)]


def test_of_branches_the_named_one_counts_or_else_the_cheapest() -> None:
    def branched(x: jax.Array, w: jax.Array) -> jax.Array:
        with jax.named_scope("choice"):
            return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    program, once = read_program(compiled(branched, (8, 8), (8, 8))), 2 * 8 * 8 * 8
    taken = [Roofline(program, taken=taken).work().flops for taken in ({"choice": 1}, {"choice": 0}, {"other": 1}, {})]
    assert taken == [2 * once, once, once, once]


def test_the_scanned_network_is_the_unrolled_one_and_the_closed_form() -> None:
    """For S tokens: 2 S (weights of the layers + D V) + 4 S^2 H E L, scores of what is not seen included."""
    config = Qwen3Config(64, 32, 48, 3, 4, 2, 16)
    graphdef, params = split(abstract_model(config))
    B, S = 2, 8

    def scanned(params: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens, jnp.full(B, S))

    def unrolled(params: Any, tokens: jax.Array) -> jax.Array:  # each layer is a network of one
        one, _ = split(abstract_model(Qwen3Config(64, 32, 48, 1, 4, 2, 16)))
        outer = nnx.merge(graphdef, params)
        x, total = tokens, 0.0
        for i in range(3):
            layer = {**params, "layers": jax.tree.map(lambda p, i=i: p[i : i + 1], params["layers"])}
            hidden = nnx.merge(one, layer).hidden(x)
            total = total + hidden.sum()
            x = (tokens + hidden.argmax(-1)) % 64  # depends on the layer, so nothing is left out
        return outer.logits(hidden) + total

    tokens = jax.ShapeDtypeStruct((B, S), jnp.int32)
    counts = [program_work(jax.jit(f).lower(params, tokens).compile().as_text()).flops for f in (scanned, unrolled)]
    expected = 2 * B * S * (layer_weights(config) + 32 * 64) + 4 * B * S * S * 4 * 16 * 3
    assert counts == [expected, expected]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", "data"),
        ("replica_groups=[2,4]<=[8]", "fsdp+tensor"),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", "data+tensor"),
        ("replica_groups=mesh['a'=8] {'a'}", "data+fsdp+tensor"),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp+tensor"),
    ],
)
def test_what_is_sent_and_over_which_axes(groups: str, axes: str) -> None:
    lines = [
        "ENTRY %main (a: f32[4,16]) -> f32[4,16] {",
        "  %a = f32[4,16]{1,0} parameter(0)",
        f"  %b = f32[8,16]{{1,0}} all-gather(%a), channel_id=1, {groups}, dimensions={{0}}, use_global_device_ids=true",
        f"  %c = bf16[10]{{0}} all-reduce(%d), channel_id=2, {groups}, to_apply=%add",
        "  %d = bf16[10]{0} constant(0)",
        "  ROOT %e = f32[4,16]{1,0} collective-permute(%a), channel_id=3, source_target_pairs={{0,4},{4,0}}",
        "}",
    ]
    n = {"tensor": 2, "fsdp": 2, "data": 2}
    size = math.prod(n[axis] for axis in axes.split("+"))
    sent = program_work("\n".join(lines)).by_axis({"data": 2, "fsdp": 2, "tensor": 2})
    assert sent["all-gather", axes] == 4 * 16 * 4 * (size - 1)
    assert sent["all-reduce", axes] == pytest.approx(2 * 10 * 2 * (size - 1) / size)
    assert sent["collective-permute", "data"] == 4 * 16 * 4


# https://huggingface.co/Qwen: number of parameters, and without embeddings, in units of 1e9
CARDS = {"0.6B": (0.6, 0.44), "1.7B": (1.7, 1.4), "4B": (4.0, 3.6), "8B": (8.2, 6.95), "14B": (14.8, 13.2)}


def test_published_shapes_have_the_published_sizes() -> None:
    for size, (total, layers) in (CARDS | {"32B": (32.8, 31.2)}).items():
        config = PUBLISHED[f"Qwen/Qwen3-{size}"]
        assert parameter_count(config) / 1e9 == pytest.approx(total, abs=0.06)
        assert layer_weights(config) / 1e9 == pytest.approx(layers, abs=0.06)
    assert PUBLISHED["Skywork/Skywork-Reward-V2-Qwen3-8B"].is_reward_model
    released = json.loads((ROOT / "tests" / "data" / "models" / "qwen3_dense_configs.json").read_text())
    for size in ("0.6B", "1.7B", "4B", "8B"):
        ours, theirs = PUBLISHED[f"Qwen/Qwen3-{size}"].to_hf(), released[f"Qwen3-{size}"]
        fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in (*fields, "head_dim", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
            assert ours[name] == theirs[name], (size, name)


def test_a_mesh_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--config", str(ROOT / "configs" / "tldr" / "qwen3_8b_gopo.yaml")]
    mesh = parse(PlanConfig, [*recipe, "--mesh", "data=1,fsdp=-1", "--devices", "8"]).mesh
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (1, -1, 1)
    assert parse(PlanConfig, [*recipe, "--mesh=tensor=2"]).mesh.tensor == 2
    for wrong in ("data:1", "pipe=2", ""):
        assert main(["plan", "--mesh", wrong]) == 2
        assert "--mesh: expected sizes such as data=1,fsdp=64,tensor=4" in capsys.readouterr().err


NETWORK = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
NETWORK |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SETTINGS = {
    **{"output_dir": "x", "model.architecture": json.dumps(NETWORK), "model.tokenizer": "x", "data.train": "x"},
    **{"rewards": '[{"function": "a.b"}]', "max_steps": 10, "prompts_per_step": 8, "microbatch_prompts": 8},
    **{"num_generations": 4, "max_prompt_length": 32, "max_completion_length": 64},
}
ARGUMENTS = [f"--{name}={value}" for name, value in SETTINGS.items()]


def test_fewer_prompts_at_a_time_take_less_memory() -> None:
    """Nothing is compiled: a slot is a slot; refills are an eighth of the slots, and turns as many as fill them."""
    layout = make_layout(devices=jax.devices()[:1])
    parts = {}
    for at_a_time in (None, 8, 4, 3, 1):
        config = parse(PlanConfig, [*ARGUMENTS, "--mesh=data=1", f"--rollout_prompts={at_a_time or 'null'}"])
        parts[at_a_time] = step_parts(config, layout, Qwen3Config(**NETWORK), [])
    assert parts[8][0] == parts[None][0], "all at once"
    keys = 2 * NETWORK["num_hidden_layers"] * NETWORK["num_key_value_heads"] * NETWORK["head_dim"] * 4
    cache = parts[None][0][SLOTS]
    assert cache == 8 * (32 + 4 * 64) * keys
    for at_a_time in (4, 3, 1):
        arrays, programs = parts[at_a_time]
        assert 1 <= arrays[SLOTS] / (cache * at_a_time / 8) < 1.02 and arrays[SLOTS] == parts[1][0][SLOTS] * at_a_time
        calls = {program.name: program.calls for program in programs if program.name.startswith("sample")}
        assert calls == {"sample refill": 8, "sample decode": math.ceil(8 / at_a_time)}
        assert all(SLOTS in program.beside for program in programs if program.name in calls)


Mesh = tuple[int, int, int]  # data, fsdp, tensor


def program(*arguments: str, env: dict[str, str] | None = None) -> str:
    """The output of a Python program from the root; it makes its own devices, and compiles as a user's would."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | (env or {})
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def settings_of(mesh: Mesh) -> list[str]:
    sizes = zip(("data", "fsdp", "tensor"), mesh, strict=True)
    return [*ARGUMENTS, *(f"--mesh.{name}={size}" for name, size in sizes)]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mesh], tuple[str, dict[str, Any]]]:
    """planned(mesh): what the program prints and writes; no mesh is planned twice."""

    @functools.cache
    def plan(mesh: Mesh) -> tuple[str, dict[str, Any]]:
        file = tmp_path_factory.mktemp("plan") / "plan.json"
        printed = program("-m", "train", "plan", *settings_of(mesh), "--out", str(file))  # by the compiler for CPUs
        return printed, json.loads(file.read_text())

    return plan


@pytest.mark.slow
def test_the_plan_of_a_small_run(planned: Callable[[Mesh], tuple[str, dict[str, Any]]]) -> None:
    printed, found = planned((2, 2, 2))
    assert "8 devices, data 2 x fsdp 2 x tensor 2" in printed and "H200: fits" in printed
    weights = 4 * parameter_count(Qwen3Config(**NETWORK))
    assert found["arrays"]["parameters"] == pytest.approx(weights / 4, rel=0.01)  # over fsdp and tensor
    assert found["arrays"]["optimizer"] == pytest.approx(2 * weights / 4, rel=0.01)
    assert found["arrays"]["sampling copy"] == pytest.approx(weights / 2, rel=0.01)  # over tensor alone
    assert found["programs"]["copy"]["sent_bytes"] == {"all-gather, fsdp": pytest.approx(weights / 4, rel=0.01)}
    assert set(found["programs"]) == {"copy", "sample", "gradient", "optimizer"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "for how many devices? Give --devices"),
        (("--devices", "6", "--mesh", "data=4,fsdp=1,tensor=1"), "does not make the 6 devices"),
        (
            ("--devices", "16"),
            "8 rows (of a step, of rollout_prompts, of a micro-batch, or of a batch_prompts) cannot be split over 16",
        ),
        (("--mesh", "data=4,fsdp=1,tensor=1", "--rollout_prompts", "2"), "2 rows (of a step, of rollout_prompts, of a"),
        (("--devices", "8", "--suggest", "true"), "--suggest: for which chip?"),
        (("--mesh", "data=1,fsdp=1,tensor=8"), "the axis 'kv_heads' of size 4 cannot be split over 8 devices"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found on an abstract mesh: before any device is needed."""
    monkeypatch.setattr("train.plan.command.simulated_devices", lambda count: [None] * count)
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, **_: AbstractMesh(sizes, names))
    assert main(["plan", *ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


REAL = """
import ctypes, gc, json, sys
import jax, numpy as np
from flax import nnx
from jax.sharding import AbstractMesh
from models.generate import SamplingCopy, sampling_program
from models.hf_weights import abstract_model, split
from models.sampler import SamplingParams
from models.sharding import make_layout, parameter_shardings
from train.batch import Batch
from train.build import make_optimizer
from train.config import PlanConfig
from train.parse import parse
from train.state import copy_tree, make_state
from train.update import Update

config = parse(PlanConfig, sys.argv[1:])
network, mesh = config.model.architecture, config.mesh
layout = make_layout(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
P, G, S, T = config.prompts_per_step, config.num_generations, config.max_prompt_length, config.max_completion_length
model = abstract_model(network, layout=layout)
graphdef, _ = split(model)
init = jax.jit(lambda: split(type(model)(network, nnx.Rngs(0), layout=layout))[1],
               out_shardings=parameter_shardings(model, layout))
optimizer, _ = make_optimizer(config.optimizer, 10)
programs = {}

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def settle():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)

def step():
    state = make_state(init(), optimizer, layout)
    ref = copy_tree(state.params)
    copying = programs.setdefault("copy", SamplingCopy(graphdef, state.params, layout))
    sampler = programs.setdefault("sample", sampling_program(graphdef, T, 0))
    update = programs.setdefault("update", Update(graphdef, optimizer, config, layout, state))
    prompt_PS, lengths_P, rows_P = np.zeros((P, S), np.int32), np.full(P, S, np.int32), np.arange(P, dtype=np.int32)
    put = layout.put
    placed = put(prompt_PS, ("prompt", None)), put(lengths_P, ("prompt",)), put(rows_P, ("prompt",))
    sampling = SamplingParams(1.0, 0, 1.0, T, np.array([1], np.int32))  # at least T tokens
    rollout = sampler(copying(state.params), *placed, jax.random.key(0), sampling, num_generations=G)
    tokens_PGT, logprobs_PGT, lengths_PG, _ = map(np.asarray, rollout)
    assert lengths_PG.min() == T
    del rollout
    mask_PGT, advantages_PG = np.ones((P, G, T), bool), np.ones((P, G), np.float32)
    batch = Batch(prompt_PS, lengths_P, tokens_PGT, logprobs_PGT, mask_PGT, advantages_PG)
    jax.block_until_ready(update(state, ref, batch, 0)[0])

step()  # compiles
settle()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
step()
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a peak is forgotten through /proc")
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1)])
def test_memory_is_what_a_real_process_takes(mesh: Mesh, planned: Callable[[Mesh], tuple[str, dict[str, Any]]]) -> None:
    """8 devices in one process: its rise in resident memory during a step is 8 times the plan's peak, within 15 %."""
    expected = 8 * planned(mesh)[1]["peak_bytes"]
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
    flags += " --xla_backend_optimization_level=0"  # as the plan compiles
    environment = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is returned
    taken = json.loads(program("-c", REAL, *settings_of(mesh), env=environment))
    print(f"mesh {mesh}: planned {expected / 2**20:.0f} MiB, taken {taken / 2**20:.0f} MiB")
    assert expected == pytest.approx(taken, rel=0.15)


def test_shipped_recipes_can_be_read() -> None:
    """The paper's sizes (arXiv 2602.03876) and Kubernetes' three variables; shell scripts are syntactically right."""
    config = parse(PlanConfig, ["--config", str(ROOT / "configs" / "tldr" / "qwen3_8b_gopo.yaml")])
    sizes = (config.prompts_per_step, config.num_generations, config.max_prompt_length, config.max_completion_length)
    assert sizes == (128, 8, 1024, 2048) and config.max_steps == 500
    launch = ROOT / "configs" / "launch"
    jobset = yaml.safe_load((launch / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert set(processes.LAUNCH_VARIABLES) < {item["name"] for item in pod["env"]}
    command = [*pod["command"], *pod["args"]]
    assert parse(PlanConfig, command[command.index("--config") :]).mesh.data == 2
    for script in (launch / "one_host.sh", launch / "tpu_pod.sh", launch / "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
