"""What a stranger installs: the wheel holds gopo_jax alone and works with jax alone. No network is used."""

import email
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


def unconditional(requirements: list[str]) -> set[str]:
    """Names of the requirements that hold without any extra, on this machine."""
    parsed = [Requirement(line) for line in requirements]
    return {canonicalize_name(r.name) for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})}


def closure(name: str) -> set[str]:
    """A distribution and all that it needs, by name."""
    seen: set[str] = set()
    todo = {name}
    while todo:
        seen.add(name := todo.pop())
        todo |= unconditional(metadata.requires(name) or []) - seen
    return seen


def clean_environment(path: Path, distributions: set[str], wheel: Path) -> Path:
    """A virtual environment of exactly these installed distributions and the wheel; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    (site,) = path.glob("lib/python*/site-packages")
    for name in distributions:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            os.symlink(Path(str(distribution.locate_file(top))), site / top)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return path / "bin" / "python"


def test_wheel_holds_gopo_jax_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        header = email.message_from_bytes(archive.read(metadata_name))
    packages = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert packages == {"gopo_jax"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gopo_jax").rglob("*.py")}
    assert modules <= set(names)
    assert unconditional(header.get_all("Requires-Dist", [])) == {"jax"}


def test_wheel_works_with_jax_alone(wheel: Path, tmp_path: Path) -> None:
    needed = closure("jax")
    assert {"jax", "jaxlib", "numpy"} <= needed
    python = clean_environment(tmp_path / "venv", needed, wheel)
    program = """
import importlib.util
import gopo_jax

print(gopo_jax.__file__)
print(gopo_jax.gopo_advantages([3.0, 1.0, 2.0]).tolist())
print([name for name in ("flax", "optax", "transformers", "models", "train") if importlib.util.find_spec(name)])
"""
    environment = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"}
    command = [str(python), "-I", "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    where, advantages, present = ran.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert advantages == "[2.0, -2.0, 0.0]"
    assert present == "[]"
