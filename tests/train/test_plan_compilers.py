"""The plan by the accelerators' own compilers: figures of one call, what they add up to, and what happens without them.

Tests marked `compilers` need JAX's compiler for GPUs and libtpu (make plan-check); the others stand a compiler in.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.attention import KeyValues
from models.config import Qwen3Config
from models.decode_tpu import tpu_kernel_work
from models.flash_attention import flash_attention
from models.sharding import make_layout
from train.__main__ import main
from train.accelerators import has_gpu, has_tpu, has_tpu_compiler
from train.config import MeshConfig, PlanConfig
from train.parse import parse
from train.plan import compilers
from train.plan.chips import CHIPS, USABLE_SHARE
from train.plan.compilers import Compiled, Compiler, NoCompiler, find_compiler
from train.plan.devices import device_count
from train.plan.hlo import product_flops, read_program
from train.plan.plans import Plan
from train.plan.programs import Cost, StepProgram
from train.plan.roofline import Roofline, Work
from train.plan.suggest import candidate_meshes, with_smaller_microbatch
from train.plan.tables import rank

NETWORK = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
NETWORK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
SETTINGS = {
    **{"output_dir": "x", "model.architecture": json.dumps(NETWORK), "model.tokenizer": "x", "data.train": "x"},
    **{"model.dtype": "bfloat16", "rewards": '[{"function": "a.b"}]', "max_steps": 100, "prompts_per_step": 8},
    **{"microbatch_prompts": 4, "num_generations": 2, "max_prompt_length": 16, "max_completion_length": 32},
    **{"num_iterations": 2},
}
ARGUMENTS = ["plan", *(f"--{name}={value}" for name, value in SETTINGS.items())]
SHARDED = ["--mesh", "data=1,fsdp=2,tensor=2"]
MESH = ["--mesh", "data=1,fsdp=1,tensor=1"]


TEXT = """
ENTRY %main (x: bf16[4096,4096]) -> bf16[4096,4096] {
  %x = bf16[4096,4096]{1,0} parameter(0)
  %y = bf16[4096,4096]{1,0} dot(%x, %x), lhs_contracting_dims={1}, metadata={op_name="jit(f)/gate/dot_general"}
  ROOT %z = bf16[4096,4096]{1,0} add(%y, %y)
}
"""


@dataclasses.dataclass(frozen=True)
class StandIn(Compiler):
    """A compiler that makes the same two kernels of every program."""

    def _compile(self, lowered: Any) -> Compiled:
        made.append(self.name)
        return Compiled(TEXT, 1024.0, "", 0.0)

    def places(self, mesh_devices: Any) -> list[tuple[int, tuple[int, ...]]]:
        return [(0, ()) for _ in mesh_devices]


made: list[str] = []


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every chip's compiler is a StandIn; the names of those that compiled are listed."""

    def find(name: str, count: int) -> Compiler:
        return StandIn(name, CHIPS[name], jax.devices()[:count], "1")

    monkeypatch.setattr("train.plan.command.find_compiler", find)
    monkeypatch.setattr("train.plan.compilers.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("train.plan.command.simulated_devices", lambda count: jax.devices()[:count])
    made.clear()
    yield made


def test_figures_are_of_one_call_and_add_up(
    stand_in: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--out", str(tmp_path / "plan.json"), "--hlo", str(tmp_path / "hlo")]
    price = ["--price_per_chip_hour", "3.6", "--top", "3"]
    assert main([*ARGUMENTS, *MESH, "--chip", "H200", *price, *files]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    programs = found["programs"]
    assert list(programs) == ["copy", "sample", "logprobs", "gradient", "optimizer"]
    calls = {name: program["calls"] for name, program in programs.items()}
    assert calls == {"copy": 1, "sample": 1, "logprobs": 4, "gradient": 4, "optimizer": 2}
    keys = {"seconds", "flops", "bytes", "kernels", "host_waits", "memory_bytes"}
    assert all(keys <= set(program) and all(program[key] >= 0 for key in keys) for program in programs.values())
    seconds = {name: program["calls"] * program["seconds"] for name, program in programs.items()}
    assert found["step_seconds"] == pytest.approx(sum(seconds.values()))
    assert found["parts"]["sample"]["seconds"] == pytest.approx(seconds["copy"] + seconds["sample"])
    assert found["parts"]["update"]["seconds"] == pytest.approx(sum(map(seconds.get, list(programs)[2:])))  # type: ignore[arg-type]
    assert found["tokens_per_second"] == pytest.approx(8 * 2 * 32 / found["step_seconds"])
    hours = 100 * found["step_seconds"] / 3600
    assert found["price"] == pytest.approx({"per_chip_hour": 3.6, "step": 0.036 * hours, "run": 3.6 * hours})
    assert found["peak_bytes"] == max(program["memory_bytes"] for program in programs.values())
    assert {file.stem for file in (tmp_path / "hlo").iterdir()} == set(programs)
    assert "ENTRY" in (tmp_path / "hlo" / "gradient.hlo").read_text()
    assert (
        "H200: fits" in printed and "completion tokens a second" in printed and "gradient: kernels of a call" in printed
    )
    assert sorted(stand_in) == ["H200"] * 5

    assert main([*ARGUMENTS, *MESH, "--chip", "H200", "--out", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert len(stand_in) == 5, "what was compiled is kept"
    assert again["programs"]["sample"]["seconds"] == programs["sample"]["seconds"]
    assert again["price"]["run"] is None and "before, and kept" in capsys.readouterr().out


def a_plan(chip: str, seconds: float, peak: float, fsdp: int) -> Plan:
    costs = [Cost(peak, Work(seconds=seconds, kernels=1), {}, 0.0, predicted=seconds > 0)]
    programs = [StepProgram("sample", 1, None, (), {})]
    flops = dict.fromkeys(("sample", "score", "update"), 1e12)
    return Plan(chip, {"data": 1, "fsdp": fsdp, "tensor": 1}, 4, {}, programs, costs, "a stand-in", flops, 512)


def test_several_chips_stand_in_one_table(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheapest comes first and is the plan that is shown and written; by seconds, where a price is missing."""
    seconds = {"H200": 2.0, "A100": 3.0, "v5e": 1.0}
    full = {"v5e": CHIPS["v5e"].memory}
    monkeypatch.setattr(
        "train.plan.command.make_plan", lambda config, chip, *_: a_plan(chip, seconds[chip], full.get(chip, 1.0), 1)
    )
    out, chips = ["--out", str(tmp_path / "plan.json")], ["--chip", "A100, v5e, H200"]
    for price, order in (("H200=9,A100=1,v5e=1", ["A100", "H200", "v5e"]), ("A100=1", ["H200", "A100", "v5e"])):
        assert main([*ARGUMENTS, *MESH, *chips, *out, "--price_per_chip_hour", price]) == 0
        printed = capsys.readouterr().out
        rows = [line.split() for line in printed.splitlines() if "data 1 x fsdp 1" in line and " of " in line]
        assert [row[1 if row[0] == "->" else 0] for row in rows[:3]] == order and rows[0][0] == "->"
        assert "does NOT fit" in " ".join(rows[2])
        assert json.loads((tmp_path / "plan.json").read_text())["chip"] == order[0]


def test_meshes_that_fit_are_tried_and_the_fastest_is_taken(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many that fit as `tries` says, each once; one that does not fit is named and does not count."""
    full, seconds = 2 * CHIPS["H100"].memory, {1: 3.0, 2: 9.0, 4: 7.0, 8: 5.0}
    meshes = [MeshConfig(data=1, fsdp=fsdp, tensor=1) for fsdp in seconds]
    monkeypatch.setattr("train.plan.command.candidate_meshes", lambda *_: meshes)

    def make(config: PlanConfig, chip: str, *_: Any) -> Plan:
        fsdp = config.mesh.fsdp
        return a_plan(chip, seconds[fsdp], full if fsdp == 1 else 1.0, fsdp)

    monkeypatch.setattr("train.plan.command.make_plan", make)
    assert main([*ARGUMENTS, "--devices", "1", "--chip", "H100", "--suggest", "true", "--tries", "2"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "of 79 GiB" in line and "fsdp" in line]
    found = [("->" in row, re.search(r"fsdp (\d)", row)[1], "does NOT fit" in row) for row in rows]  # type: ignore[index]
    assert found[:3] == [(True, "4", False), (False, "2", False), (False, "1", True)]


def test_micro_batches_are_halved_until_the_gradient_should_fit() -> None:
    config = parse(PlanConfig, [*ARGUMENTS[1:], "--prompts_per_step", "64", "--microbatch_prompts", "64"])
    memory = CHIPS["H200"].memory

    def smaller(share: float, fsdp: int = 1, program: str = "gradient") -> int | None:
        made = a_plan("H200", 1.0, share * memory, fsdp)
        made.programs[0] = made.programs[0]._replace(name=program)
        found = with_smaller_microbatch(config, made)
        return found and found.microbatch_prompts

    assert (smaller(0.9), smaller(1.5), smaller(3.0), smaller(20.0)) == (None, 32, 16, 2)
    assert smaller(3.0, fsdp=16) == 16 and smaller(3.0, fsdp=32) is None  # a micro-batch has a prompt for each device
    assert smaller(1.5, program="sample") is None, "micro-batches do not make sampling smaller"


def test_candidate_meshes_hold_the_arrays_and_the_one_with_less_traffic_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, **_: AbstractMesh(sizes, names))
    config = parse(PlanConfig, [*ARGUMENTS[1:], "--prompts_per_step", "16", "--microbatch_prompts", "16"])
    devices: Any = [None] * 8
    meshes = candidate_meshes(config, "H200", devices, Qwen3Config(**NETWORK), [])
    sizes = [(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes]
    assert len(set(sizes)) == len(sizes) == 7 and all(math.prod(size) == 8 for size in sizes)  # 2 key/value heads
    assert sizes.index((8, 1, 1)) < sizes.index((1, 8, 1))  # parameters are not gathered
    large = Qwen3Config(**(NETWORK | {"hidden_size": 4096, "intermediate_size": 65536, "num_hidden_layers": 16}))
    kept = candidate_meshes(config, "A100", devices, large, [])
    assert kept and all(mesh.fsdp * mesh.tensor >= 4 for mesh in kept)


def test_a_program_that_its_compiler_refuses_does_not_fit(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A TPU's compiler refuses what exceeds the memory; the plan says how much that is, and has no seconds."""
    refused = Compiled("", 40 * 2**30, "", 0.0, fits=False)
    compile_for_cpu = StandIn._compile

    def compile_or_refuse(self: StandIn, lowered: Any) -> Compiled:
        return refused if "accumulate" in lowered.as_text()[:200] else compile_for_cpu(self, lowered)

    monkeypatch.setattr(StandIn, "_compile", compile_or_refuse)
    out = tmp_path / "plan.json"
    assert main([*ARGUMENTS, "--num_iterations", "1", *MESH, "--chip", "v6e", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["step_seconds"] is None and found["fits"] is False and found["peak_bytes"] == 40 * 2**30
    assert "v6e: does NOT fit, 125 % of 32 GiB" in capsys.readouterr().out


def test_without_the_compiler_the_plan_estimates_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compilers, "_version", lambda package: None)
    monkeypatch.setattr("train.plan.command.simulated_devices", lambda count: jax.devices()[:count])
    assert main([*ARGUMENTS, *MESH, "--chip", "v5p", "--out", str(tmp_path / "plan.json")]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert printed.splitlines()[0].startswith("libtpu is not installed") and "there are no seconds" in printed
    assert "(an estimate)" in printed and "seconds  " not in printed
    assert found["step_seconds"] is None and found["price"]["run"] is None and not found["predicted"]
    gradient = found["programs"]["gradient"]
    assert gradient["flops"] > 0 and gradient["memory_bytes"] > 0 and gradient["seconds"] is None


def test_a_failure_of_the_compiler_is_one_line_and_an_estimate(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Any, lowered: Any) -> Compiled:
        raise NoCompiler("JAX's compiler for H200 failed: INTERNAL: broken")

    monkeypatch.setattr(StandIn, "_compile", fails)
    monkeypatch.setattr("train.plan.compilers.cache_folder", lambda: Path("/nonexistent/cache"))
    assert main([*ARGUMENTS, *MESH, "--chip", "H200"]) == 0
    printed = capsys.readouterr()
    assert "failed: INTERNAL: broken: estimated instead" in printed.out and "(an estimate)" in printed.out
    assert not printed.err


@pytest.mark.parametrize("folder", ["/dev/null/cache", f"/tmp/{'a' * 300}"], ids=["no folder", "long"])
def test_a_cache_that_cannot_be_written_is_said_once(
    folder: str, stand_in: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.plan.compilers.cache_folder", lambda: Path(folder))
    assert main([*ARGUMENTS, *MESH, "--chip", "H200"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("compiled programs are not kept there") == 1 and not printed.err and len(stand_in) == 5


def test_an_interrupt_ends_the_plan_at_once(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler cannot be stopped, and Python would wait for it."""

    def interrupted(*_: Any) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.plan.command.make_plan", interrupted)
    monkeypatch.setattr("train.plan.command.os._exit", sys.exit)
    with pytest.raises(SystemExit) as raised:
        main([*ARGUMENTS, *MESH, "--chip", "H200"])
    assert raised.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_hours_and_price_are_those_of_all_devices() -> None:
    plan, estimated = a_plan("H200", 7.2, 1.0, 4), a_plan("H200", 0.0, 1.0, 4)
    assert plan.devices == 4 and plan.hours(500) == pytest.approx(1.0)
    assert plan.price(500, {"H200": 2.5, "v5p": 9.0}) == pytest.approx(10.0)
    assert plan.price(500, {"v5p": 9.0}) is estimated.price(500, {"H200": 2.5}) is estimated.hours(500) is None
    assert plan.price(500, {"H200": 0.0}) == 0.0


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (["--top", "3", "--price_per_chip_hour", "0"], "--top, --price_per_chip_hour: without effect"),
        (["--top", "3"], "--top: without effect"),
        (["--top", "3", "--chip", "H200"], None),
        ([], None),
    ],
    ids=["both", "top", "with_a_chip", "neither"],
)
def test_options_that_need_a_chip_say_so(
    options: list[str],
    ignored: str | None,
    stand_in: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("train.plan.command.make_plan", lambda config, chip, *_: a_plan(chip, 0.0, 1.0, 1))
    assert main([*ARGUMENTS, *MESH, *options]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert len(notes) == (ignored is not None) and all(line.startswith(f"{ignored}, since") for line in notes)


def test_what_is_estimated_comes_after_what_is_predicted() -> None:
    """Without seconds there is no price, not even of chips that cost nothing."""
    config = parse(PlanConfig, [*ARGUMENTS[1:], "--chip", "H200,v5p", "--price_per_chip_hour", "0"])
    plans = [a_plan("v5p", 0.0, 1.0, 1), a_plan("H200", 3.0, 1.0, 1), a_plan("H200", 2.0, 1.0, 1)]
    assert sorted(plans, key=lambda plan: rank(config, plan)) == plans[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "H200,abacus"), "chip: expected one or more of v4, v5e,"),
        (("--price_per_chip_hour", "dear"), "price_per_chip_hour: expected a price such as 3.5, or H200=3.5,v5p=4.2"),
        (("--price_per_chip_hour", "3,4"), "price_per_chip_hour: expected a price"),
        (("--price_per_chip_hour", "abacus=4"), "price_per_chip_hour: expected a price"),
        (("--devices", "H200=0"), "devices: expected a number such as 8, or H200=8,v5p=64, got 'H200=0'"),
        (("--devices", "1.5"), "devices: expected a number"),
        (("--tries", "0"), "tries: expected at least 1"),
        (("--chip", "H200", "--out", "/dev/null/plan.json"), "/dev/null"),
        (("--chip", "H200", "--out", ""), "expected the name of what to write, got ''"),
        (("--chip", "H200", "--hlo", ""), "expected the name of what to write, got ''"),
        (("--chip", "H200", "--out", "x/y", "--hlo", "x/y/z"), "--out, --hlo: x/y cannot be a file and a directory"),
        (("--chip", "H200,v5p", "--devices", "H200=1", "--mesh.fsdp", "-1"), "--devices: how many v5p? It says H200=1"),
        (("--chip", "v5e", "--devices", "1", "--suggest", "true"), "no mesh fits 1 v5e"),
    ],
    ids=[
        "chip",
        "price",
        "prices",
        "priced chip",
        "devices",
        "half a device",
        "tries",
        "out",
        "no out",
        "no hlo",
        "out and hlo",
        "devices of a chip",
        "too large",
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, stand_in: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    large = json.dumps(NETWORK | {"hidden_size": 8192, "intermediate_size": 65536, "num_hidden_layers": 64})
    mesh = () if "--suggest" in arguments else MESH
    assert main([*ARGUMENTS, "--model.architecture", large, *mesh, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1 and not stand_in


def test_prices_and_devices_are_one_number_or_one_for_each_chip() -> None:
    def prices(*arguments: str) -> dict[str, float]:
        return parse(PlanConfig, [*ARGUMENTS[1:], *arguments]).prices

    assert prices() == {} and prices("--price_per_chip_hour", "3.5") == dict.fromkeys(CHIPS, 3.5)
    assert prices("--price_per_chip_hour", "H200=3.5, v5p=4") == {"H200": 3.5, "v5p": 4}
    config = parse(PlanConfig, [*ARGUMENTS[1:], *SHARDED])
    assert device_count(config) == device_count(config, "H200") == 4
    config = parse(PlanConfig, [*ARGUMENTS[1:], "--devices", "H200=8,v5p=64"])
    assert (device_count(config, "H200"), device_count(config, "v5p")) == (8, 64)
    assert device_count(parse(PlanConfig, [*ARGUMENTS[1:], *SHARDED, "--devices", "2"]), "v4") == 2


@pytest.mark.compilers
def test_the_compilers_are_of_jaxs_version() -> None:
    assert version("jax-cuda13-plugin") == version("jax-cuda13-pjrt") == version("jaxlib")
    assert has_tpu_compiler()


@pytest.mark.compilers
@pytest.mark.skipif(has_gpu() or has_tpu(), reason="JAX runs on the accelerator")
def test_programs_run_on_cpus_and_say_nothing_of_the_compilers() -> None:
    program = "import jax; from train.running import exit_code; exit_code(lambda: print(jax.default_backend()))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command, root = [sys.executable, "-c", program], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The plans of a small run by both compilers."""
    plans, folder = {}, tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.plan.command.simulated_devices", lambda count: [None] * count)
        patch.setattr("train.plan.compilers.cache_folder", lambda: folder)
        for chip in ("H200", "v5p"):
            files = ["--out", str(folder / chip / "plan.json"), "--hlo", str(folder / chip / "hlo")]
            assert main([*ARGUMENTS, *SHARDED, "--chip", chip, *files, "--top", "5"]) == 0
            plans[chip] = json.loads((folder / chip / "plan.json").read_text()) | {"hlo": folder / chip / "hlo"}
    return plans


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["H200", "v5p"])
def test_both_compilers_plan_a_run(chip: str, planned: dict[str, dict[str, Any]]) -> None:
    found = planned[chip]
    assert found["predicted"] and found["step_seconds"] > 0 and found["compiler"].endswith(chip)
    assert found["peak_bytes"] < USABLE_SHARE * CHIPS[chip].memory and found["fits"]
    text = (found["hlo"] / "gradient.hlo").read_text()
    assert "/gate/" in text and "/attention/" in text  # the scopes that --top prints
    assert found["programs"]["gradient"]["sent_bytes"]  # parameters are gathered over fsdp


@pytest.mark.compilers
def test_both_compilers_count_the_same_products(planned: dict[str, dict[str, Any]]) -> None:
    """The arithmetic is the model's, however a compiler writes it: dots, library calls or convolutions.

    That of attention is not compared: kernels have whole blocks, which are larger than these rows.
    """
    for name in ("logprobs", "gradient"):
        texts = {chip: (planned[chip]["hlo"] / f"{name}.hlo").read_text() for chip in ("H200", "v5p")}
        works = [Roofline(read_program(text), CHIPS[chip]).work() for chip, text in texts.items()]
        counts = [sum(w.flops for at, w in work.items.items() if "attention" not in at.scope) for work in works]
        assert counts[0] == pytest.approx(counts[1], rel=0.1) and counts[0] > 0, name
    waits = {chip: planned[chip]["programs"]["sample"]["host_waits"] for chip in ("H200", "v5p")}
    assert waits == {"H200": 32, "v5p": 0}  # the host learns after every token whether to go on, and waits for no more


@pytest.mark.compilers
def test_both_decode_by_kernels(planned: dict[str, dict[str, Any]]) -> None:
    """Two in each layer of a token on a GPU and one on a TPU, which copies no cache for it."""
    texts = {chip: (planned[chip]["hlo"] / "sample.hlo").read_text() for chip in planned}
    assert texts["H200"].count("prefix_attention") >= 2 and texts["H200"].count("past_attention") >= 2
    program = read_program(texts["v5p"])
    items = [item for computation in program.computations.values() for item in computation.values()]
    kernels = [item for item in items if item.opcode == "custom-call" and "token_attention" in item.scope]
    # 4 prompts of 2 completions on one of two devices, one of the two key/value heads with its two queries
    work = tpu_kernel_work(P=4, G=2, K=1, Q=2, E=128, S=16, filled=15.5, itemsize=2)["token_attention"]
    assert len(kernels) == 2 and all(f'"flops":"{work.flops:.0f}"' in item.attributes for item in kernels)
    assert all(f'"bytes_accessed":"{work.bytes:.0f}"' in item.attributes for item in kernels)
    loop = next(
        program.computations[program.body(item)]
        for item in items
        if item.opcode == "while" and program.iterations(item) is None
    )
    cache = "bf16[4,1,2,32,128]"
    assert any(cache in item.shape for item in loop.values())
    assert not [item for item in loop.values() if item.opcode in ("copy", "copy-start") and cache in item.shape]


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["H200", "v5p"])
def test_rows_attend_by_kernels(chip: str, planned: dict[str, dict[str, Any]]) -> None:
    """In the prompt's pass while sampling, in scores, and in the gradient."""
    texts = {name: (planned[chip]["hlo"] / f"{name}.hlo").read_text() for name in ("sample", "logprobs", "gradient")}
    assert "flash_forward_alone" in texts["sample"] and "flash_forward/" in texts["logprobs"]
    for kernel in ("flash_forward", "flash_queries", "flash_keys"):
        assert f"{kernel}/" in texts["gradient"] and f"{kernel}_alone" in texts["gradient"], kernel
    assert "flash_prompt/" in texts["gradient"]


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["H200", "v5p"])
def test_kernels_take_heads_and_rows_of_every_kind(chip: str) -> None:
    """They compile, with 8B's heads too: no block overflows the shared memory of a GPU, or a TPU's vector memory."""
    device = jax.sharding.SingleDeviceSharding(find_compiler(chip, 1).devices[0])

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    for G, H, K, E, dtype in ((16, 8, 1, 16, jnp.bfloat16), (3, 5, 1, 64, jnp.float32), (2, 32, 8, 128, jnp.bfloat16)):
        row, prompt = (KeyValues(*[shape(*sizes, K, E, dtype=dtype)] * 2) for sizes in ((1, G, 200), (1, 70)))
        query, lengths = shape(1, G, 200, H, E, dtype=dtype), shape(1, dtype=jnp.int32)

        def loss(query: Any, row: Any, prompt: Any, lengths: Any, window: Any) -> Any:
            options = {"prompt": prompt, "prompt_lengths_P": lengths, "window": window}
            kernels = "tpu" if chip == "v5p" else "gpu"
            return flash_attention(query, row, kernels=kernels, **options).astype(jnp.float32).sum()

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, row, prompt, lengths, shape(dtype=jnp.int32))
        assert lowered.compile().as_text().count("flash_prompt") >= 1


@pytest.mark.compilers
def test_a_mesh_may_split_the_sides_of_a_torus() -> None:
    """JAX alone lays axes along whole sides: 2 of 16 TPUs that stand in a square of 4 x 4 are none."""
    devices = find_compiler("v6e", 16).devices
    mesh = make_layout(data=2, fsdp=4, tensor=2, devices=devices).mesh
    assert sorted(device.id for device in mesh.devices.flat) == sorted(device.id for device in devices)


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["H200", "v5p"])
def test_products_of_float32_are_float32(chip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TF32 nor bfloat16 passes: every product that a compiler writes says `highest`."""
    monkeypatch.setattr("train.plan.command.simulated_devices", lambda count: [None] * count)
    monkeypatch.setattr("train.plan.compilers.cache_folder", lambda: tmp_path)
    narrow = json.dumps(NETWORK | {"head_dim": 32})  # kernels for wide heads take a GPU's compiler a minute in float32
    options = ["--hlo", str(tmp_path / "hlo"), "--model.dtype", "float32", "--model.architecture", narrow]
    assert main([*ARGUMENTS, *MESH, "--chip", chip, *options]) == 0
    for name in ("sample", "logprobs", "gradient"):
        program = read_program((tmp_path / "hlo" / f"{name}.hlo").read_text())
        products = [
            item.attributes.lower().replace('"', "")
            for computation in program.computations.values()
            for item in computation.values()
            if product_flops(item, computation)
        ]
        assert products and all(re.search(r"operand_precision[=:][{\[]highest,highest", text) for text in products)
        assert not any("tf32" in text for text in products)
