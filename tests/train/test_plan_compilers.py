"""The compilers of GPUs and TPUs, on a machine that has neither: `make plan-check`."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from train.accelerators import has_gpu, has_tpu, has_tpu_compiler

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.compilers


def test_the_compilers_are_installed() -> None:
    assert version("jax-cuda13-plugin") == version("jax-cuda13-pjrt") == version("jaxlib")
    assert has_tpu_compiler()


@pytest.mark.skipif(has_gpu() or has_tpu(), reason="JAX runs on the accelerator")
def test_programs_run_on_cpus_and_say_nothing_of_the_compilers() -> None:
    program = "import jax; from train.running import exit_code; exit_code(lambda: print(jax.default_backend()))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
