"""The compilers of GPUs and TPUs, on a machine that has neither: `make plan-check`."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.compilers


def test_the_gpu_compiler_is_of_jax_version() -> None:
    assert version("jax-cuda13-plugin") == version("jax-cuda13-pjrt") == version("jaxlib")
    assert find_spec("jax_plugins.xla_cuda13") is not None


def test_the_tpu_compiler_has_its_library() -> None:
    import libtpu

    assert libtpu.get_library_path()
