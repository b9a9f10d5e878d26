"""The accelerators' compilers: which of them can be had, and what they made before is kept and read back whole.

Needs none of them; tests/train/test_plan_compilers.py has those that do.
"""

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import pytest

from train.plan import compilers
from train.plan.chips import CHIPS
from train.plan.compilers import Compiled, Compiler, NoCompiler, find_compiler, torus

compiled: list[str] = []  # names of the compilers that compiled


@dataclasses.dataclass(frozen=True)
class Counting(Compiler):
    """A compiler that makes the same of every program."""

    def _compile(self, lowered: Any) -> Compiled:
        compiled.append(self.name)
        return Compiled("ENTRY " + "text " * 20, 1024.0, "", 0.0)

    def places(self, mesh_devices: Any) -> list[tuple[int, tuple[int, ...]]]:
        return [(0, ()) for _ in mesh_devices]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("train.plan.compilers.cache_folder", lambda: tmp_path / "cache")
    compiled.clear()
    return compiled


NO_COMPILER = [
    ("H200", {}, "JAX's compiler for GPUs is not installed: pip install -e '.[plan-gpu]' (H200)"),
    ("H200", {"jax-cuda13-plugin": "0.1"}, f"jax-cuda13-plugin is 0.1, and JAX is {jax.__version__}: pip install"),
    ("H200", {"jax-cuda13-plugin": jax.__version__}, "jax-cuda13-pjrt is not installed, and JAX is"),
    ("v5p", {}, "libtpu is not installed: pip install -e '.[tpu]' (v5p)"),
    ("v5p", {"libtpu": "0.0.1"}, "libtpu is 0.0.1, and JAX"),
    ("v5e", {"libtpu": str(compilers._wanted("libtpu"))}, "512 v5e: a slice has up to 256, and JAX makes no mesh of"),
]


@pytest.mark.parametrize(("chip", "installed", "message"), NO_COMPILER, ids=range(len(NO_COMPILER)))
def test_a_missing_or_wrong_compiler_is_named(
    chip: str, installed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "_version", installed.get)
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(NoCompiler) as raised:
        find_compiler(chip, 512 if chip == "v5e" else 4)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_damaged_kept_program_is_compiled_again(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Counting("H200", CHIPS["H200"], jax.devices()[:1], "1")
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    first = compiler.compile(lowered)
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    whole = file.read_bytes()
    for n, damaged in enumerate((whole[:-20], whole[:30] + b"\xff" * 20 + whole[50:], b"", b"[]"), 2):
        file.write_bytes(damaged)
        assert compiler.compile(lowered).text == first.text and len(made) == n
        assert "compiled again" in capsys.readouterr().out
    assert compiler.compile(lowered)._replace(seconds=0) == first._replace(seconds=0) and len(made) == n


def test_a_kept_program_is_of_the_same_devices_and_flags(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal programs that are compiled at once are compiled once."""
    compiler = Counting("H200", CHIPS["H200"], jax.devices()[:1], "1")
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(compiler.compile, [lowered] * 4))
    assert len(made) == 1
    for other in ({"version": "2"}, {"name": "H100"}, {"chip": CHIPS["H100"]}, {"devices": [None, None]}):
        dataclasses.replace(compiler, **other).compile(lowered)  # type: ignore[arg-type]
    assert len(made) == 5
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "--xla_something=1")
            compiler.compile(lowered)
    assert len(made) == 7


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 37.20G of 31.25G hbm. Exceeded hbm capacity by 5.95G.", 37.2 * 2**30),
        ("RESOURCE_EXHAUSTED: ... Used 1.50T of 31.25G hbm.", 1.5 * 2**40),
        ("RESOURCE_EXHAUSTED: ... Used 18.24M of 16.00M vmem.", None),
    ],
    ids=["GiB", "TiB", "vector memory"],
)
def test_a_refusal_for_memory_is_one_of_the_main_memory(message: str, needed: float | None) -> None:
    assert compilers._needed_bytes(message) == needed


def test_a_product_without_tiles_is_compiled_by_the_vendors_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails then too is one line."""
    asked: list[dict[str, Any]] = []

    class Lowered:
        def compile(self, compiler_options: dict[str, Any]) -> Any:
            asked.append(compiler_options)
            raise RuntimeError("INTERNAL: no output tile sizes" if len(asked) == 1 else "INTERNAL: broken\nat once")

    compiler = Compiler("JAX's compiler for H200", CHIPS["H200"], [], "1")
    with pytest.raises(NoCompiler, match=r"^JAX's compiler for H200 failed: INTERNAL: broken$"):
        compiler._compile(Lowered())
    assert asked == [compilers.GPU_OPTIONS, compilers.LIBRARY_PRODUCTS]


def test_a_plugin_that_cannot_be_loaded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """JAX logs a traceback, and then knows no topology."""
    logger = logging.getLogger("jax._src.xla_bridge")
    with compilers.plugin_errors_kept():
        try:
            raise OSError("Failed to open plugin.so\nfile too short")
        except OSError:
            logger.exception("Jax plugin configuration error: Exception when calling initialize()")
        logger.warning("another thing")
    assert [record.getMessage() for record in caplog.records] == ["another thing"]
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", lambda *_, **__: [][0])
    monkeypatch.setattr(compilers, "_version", lambda package: jax.__version__)
    with pytest.raises(NoCompiler, match=r"cannot describe 4 H200 \(Failed to open plugin.so\)$"):
        find_compiler("H200", 4)
    compilers._plugin_errors.clear()


@pytest.mark.parametrize(
    ("count", "three", "two"),
    [
        *((1, (1, 1, 1), (1, 1)), (4, (2, 2, 1), (2, 2)), (8, (2, 2, 2), (2, 4)), (64, (4, 4, 4), (8, 8))),
        *((3, None, None), (6, None, None)),
    ],
    ids=["1", "4", "8", "64", "3", "6"],
)
def test_tpus_stand_on_the_most_compact_torus(count: int, three: Any, two: Any) -> None:
    assert (torus(count, 3), torus(count, 2)) == (three, two)
