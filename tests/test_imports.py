"""The direction of imports: jax <- gopo_jax <- models <- train <- eval, read from the sources."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("gopo_jax", "models", "train", "eval")  # each may import itself and what stands before it
SOURCES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def violations(source: str, path: str) -> list[str]:
    """What a file's imports do that the layout forbids, one line each."""
    layer = path.split("/")[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"{path}:{node.lineno}: relative import; write it absolute")
                continue
            names = [node.module or ""]
        else:
            continue
        for name in names:
            root = name.split(".")[0]
            where = f"{path}:{node.lineno}: imports {name}"
            if root in above:
                found.append(f"{where}, a layer above {layer}")
            elif root == "eval" and isinstance(node, ast.Import):
                found.append(f"{where}, which hides the builtin eval; write 'from eval.x import y'")
            elif root == "tests":
                found.append(f"{where}: programs do not import tests")
            elif layer == "gopo_jax" and root not in ("jax", "gopo_jax") and root not in sys.stdlib_module_names:
                found.append(f"{where}: gopo_jax depends on jax alone")
            elif root == "transformers" and path != "models/tokenizer.py":
                found.append(f"{where}: models/tokenizer.py is the only door to transformers")
    return found


def test_there_are_sources_to_check() -> None:
    assert "gopo_jax/__init__.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES)
def test_imports_follow_the_arrows(path: str) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gopo_jax/x.py", "import numpy as np"),
        ("gopo_jax/x.py", "from jaxlib import xla_client"),
        ("gopo_jax/x.py", "from models.qwen3 import Qwen3"),
        ("gopo_jax/x.py", "def f():\n    import flax.nnx"),
        ("gopo_jax/x.py", "from . import checks"),
        ("models/x.py", "from train.config import Config"),
        ("models/x.py", "import os, eval.report.report"),
        ("models/x.py", "if True:\n    from transformers import AutoTokenizer"),
        ("models/sub/tokenizer.py", "import transformers"),
        ("train/x.py", "from train.rewards.ifeval import verify"),
        ("train/x.py", "from ..models import qwen3"),
        ("train/x.py", "import tests.helpers"),
        ("eval/x.py", "import eval"),
        ("eval/x.py", "import eval.report.report as report"),
    ],
)
def test_a_planted_fault_is_found(path: str, source: str) -> None:
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gopo_jax/x.py", "import math\nimport jax.numpy as jnp\nfrom gopo_jax import checks"),
        ("models/tokenizer.py", "from transformers import AutoTokenizer"),
        ("models/x.py", "import numpy as np\nfrom flax import nnx\nfrom gopo_jax import token_logprobs"),
        ("train/x.py", "import models.qwen3\nfrom train.config import Config"),
        ("eval/x.py", "from eval.report.report import page\nfrom train.config import Config\nimport gopo_jax"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(source, path) == []
