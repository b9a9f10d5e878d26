"""JAX starts the accelerators that are there, and is kept from those whose compilers alone are installed."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from train import accelerators
from train.accelerators import GPU_COMPILER, has_gpu, has_tpu, skip_absent_accelerators

Machine = Callable[..., SimpleNamespace]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(files in /dev, plugins, libtpu, platforms) is where the test goes on; returns JAX's configuration."""

    def make(
        files: tuple[str, ...] = (), plugins: tuple[str, ...] = (), libtpu: bool = False, platforms: str | None = None
    ) -> SimpleNamespace:
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        config = SimpleNamespace(jax_platforms=platforms)
        config.update = lambda name, value: setattr(config, name, value)
        entries = [SimpleNamespace(value=plugin) for plugin in plugins]
        monkeypatch.setattr(accelerators, "DEV", tmp_path)
        monkeypatch.setattr(accelerators, "entry_points", lambda group: entries)
        monkeypatch.setattr(accelerators, "has_tpu_compiler", lambda: libtpu)
        monkeypatch.setattr(accelerators, "jax", SimpleNamespace(config=config))
        return config

    return make


@pytest.mark.parametrize("compilers", [{"plugins": (GPU_COMPILER,)}, {"libtpu": True}], ids=["gpu", "tpu"])
def test_compilers_alone_are_not_started(machine: Machine, compilers: dict[str, object]) -> None:
    config = machine(files=("null", "vfio/vfio"), **compilers)
    skip_absent_accelerators()
    assert config.jax_platforms == "cpu"


@pytest.mark.parametrize("file", ["nvidia0", "nvidiactl", "dxg", "kfd", "accel0", "vfio/3"])
def test_an_accelerator_leaves_the_choice_to_jax(machine: Machine, file: str) -> None:
    config = machine(files=(file,), plugins=(GPU_COMPILER,), libtpu=True)
    skip_absent_accelerators()
    assert config.jax_platforms is None
    assert (has_gpu(), has_tpu()) == ((False, True) if file.startswith(("accel", "vfio")) else (True, False))


@pytest.mark.parametrize("platforms", ["", "cuda,cpu", "tpu,cpu"])
def test_a_given_platform_stands(machine: Machine, platforms: str) -> None:
    config = machine(plugins=(GPU_COMPILER,), platforms=platforms)
    skip_absent_accelerators()
    assert config.jax_platforms == platforms


@pytest.mark.parametrize("plugins", [(), ("a_maker_of.chips", GPU_COMPILER)], ids=["none", "another maker's"])
def test_without_compilers_and_with_another_plugin_jax_chooses(machine: Machine, plugins: tuple[str, ...]) -> None:
    config = machine(plugins=plugins)
    skip_absent_accelerators()
    assert config.jax_platforms is None
