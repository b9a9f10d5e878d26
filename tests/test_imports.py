"""The direction of imports, read from the sources: jax <- gopo_jax <- models <- train <- eval, no circle of rooms."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("gopo_jax", "models", "train", "eval")  # each may import itself and what stands before it
TRANSFORMERS = ("models/tokenizer.py", "eval/speed/torch_step.py")  # the second measures it, in a process of its own
STUDIES = ("eval.lab", "eval.theory")  # nothing outside imports them
SOURCES = sorted(path.relative_to(ROOT).as_posix() for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
FOLDERS = sorted({path.rpartition("/")[0] for path in SOURCES})
DOTTED = re.compile(rf"({'|'.join(LAYERS)})(\.[A-Za-z_]\w*)+")


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, whether it is a plain `import`) of every import; strings that are dotted names count too."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from ((node.lineno, f"{dots}{node.module or ''}.{alias.name}", False) for alias in node.names)
        elif isinstance(node, ast.Constant) and id(node) not in prose and DOTTED.fullmatch(str(node.value)):
            yield node.lineno, str(node.value), False


def violations(source: str, path: str) -> list[str]:
    """What a file's imports do that the layout forbids, one line each."""
    layer = path.split("/")[0]
    above = LAYERS[LAYERS.index(layer) + 1 :]
    faults = []
    for line, name, plain in imports(source):
        root = name.split(".")[0]
        where = f"{path}:{line}: imports {name}"
        if name.startswith("."):
            faults.append(f"{where}, a relative import; write it absolute")
        elif root in above:
            faults.append(f"{where}, a layer above {layer}")
        elif root == "eval" and plain:
            faults.append(f"{where}, which hides the builtin eval; write 'from eval.x import y'")
        elif root == "tests":
            faults.append(f"{where}: programs do not import tests")
        elif layer == "gopo_jax" and root not in ("jax", "gopo_jax") and root not in sys.stdlib_module_names:
            faults.append(f"{where}: gopo_jax depends on jax alone")
        elif root == "transformers" and path not in TRANSFORMERS:
            faults.append(f"{where}: models/tokenizer.py is the only door to transformers")
        for study in STUDIES:
            if f"{name}.".startswith(f"{study}.") and not path.startswith((study.replace(".", "/"), "eval/__main__")):
                faults.append(f"{where}, a study, on which nothing may depend")
    return sorted(set(faults))


def room_of(module: str) -> str:
    """A folder is one room, and so is every module beside the folders."""
    layer, *rest = module.split(".")
    if layer == "gopo_jax" and rest[:1] != ["theory"]:
        return layer  # one shelf of functions
    return ".".join([layer, *rest[:1]])


def rooms_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The rooms that every room imports, from sources by path; `__main__` loads commands by name and stands outside."""
    modules = {module_of(path) for path in sources}
    rooms: dict[str, set[str]] = {}
    for path, source in sources.items():
        here = room_of(module_of(path))
        for _, name, _ in imports(source) if "__main__" not in path else ():
            longest = next((m for m in prefixes(name) if m in modules), None)
            if longest is not None and room_of(longest) != here and longest not in LAYERS[1:]:
                rooms.setdefault(here, set()).add(room_of(longest))
    return rooms


def prefixes(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def circle(rooms: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_are_sources_to_check() -> None:
    assert "gopo_jax/__init__.py" in SOURCES


@pytest.mark.parametrize("path", SOURCES)
def test_imports_follow_the_arrows(path: str) -> None:
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_rooms_stack_without_a_circle() -> None:
    rooms = rooms_of({path: (ROOT / path).read_text(encoding="utf-8") for path in SOURCES})
    assert len(rooms) > 30
    assert circle(rooms) == []


def test_no_modules_import_each_other() -> None:
    modules = {module_of(path): path for path in SOURCES}
    used = {
        module: {next(filter(modules.__contains__, prefixes(name)), module) for _, name, _ in imports(text)} - {module}
        for module, path in modules.items()
        if "__main__" not in path
        for text in [(ROOT / path).read_text(encoding="utf-8")]
    }
    packages = {folder.replace("/", ".") for folder in FOLDERS}
    assert circle({module: names - packages for module, names in used.items() if module not in packages}) == []


def test_the_root_of_eval_imports_none_of_its_stages() -> None:
    """What all stages share stands at the root; a stage may import the root, not the other way round."""
    rooms = rooms_of({path: (ROOT / path).read_text(encoding="utf-8") for path in SOURCES})
    stages = {folder.replace("/", ".") for folder in FOLDERS if folder.startswith("eval/")}
    assert {room: used & stages for room, used in rooms.items() if room.startswith("eval") and room not in stages} == {
        room: set() for room in rooms if room.startswith("eval") and room not in stages
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_what_it_is_for(folder: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
    assert docstring and docstring.splitlines()[0].endswith((".", ":"))


def test_the_loop_can_be_read_at_once() -> None:
    assert len((ROOT / "train" / "loop.py").read_text(encoding="utf-8").splitlines()) < 300


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gopo_jax/x.py", "import numpy as np"),
        ("gopo_jax/x.py", "from jaxlib import xla_client"),
        ("gopo_jax/x.py", "from models.qwen3 import Qwen3"),
        ("gopo_jax/x.py", "def f():\n    import flax.nnx"),
        ("gopo_jax/x.py", "from . import checks"),
        ("models/x.py", "from train.config import Config"),
        ("models/x.py", "import os, eval.report"),
        ("models/x.py", "if True:\n    from transformers import AutoTokenizer"),
        ("models/sub/tokenizer.py", "import transformers"),
        ("train/x.py", "from eval.ifeval import verify"),
        ("train/x.py", "from ..models import qwen3"),
        ("train/x.py", "import tests.helpers"),
        ("train/x.py", 'BUILT_IN = {"ifeval": "eval.ifeval.strict"}'),
        ("models/x.py", 'PROGRAM = "train.loop"'),
        ("eval/x.py", "import eval"),
        ("eval/x.py", "import eval.report as report"),
        ("eval/texts/x.py", "from eval.lab.world import World"),
        ("eval/x.py", "from eval import theory"),
        ("eval/x.py", 'COMMAND = "eval.lab.command"'),
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
        ("models/x.py", '"""Read by `train.loop`."""\nTEXT = "see train.loop and eval.report"'),
        ("train/x.py", "import models.qwen3\nfrom train.config import Config"),
        ("eval/x.py", "from eval.report import page\nfrom train.config import Config\nimport gopo_jax"),
        ("eval/lab/x.py", "from eval.lab.world import World"),
        ("eval/__main__.py", 'COMMANDS = {"lab": ("eval.lab.command", "parse_lab", "lab")}'),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(source, path) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"train/a/x.py": "from train.b.y import f", "train/b/y.py": "from train.a.z import g", "train/a/z.py": ""},
        {"train/a/x.py": "from train import top", "train/top.py": "def f():\n    from train.a.x import g"},
        {"eval/a/x.py": 'NAME = "eval.b.y.f"', "eval/b/y.py": "from eval.a.x import NAME"},
    ],
)
def test_a_planted_circle_is_found(sources: dict[str, str]) -> None:
    assert circle(rooms_of(sources))
