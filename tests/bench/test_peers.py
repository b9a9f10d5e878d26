"""bench/peers: the scripts do the work that `eval speed` times, by its own words, and need nothing of this project."""

import ast
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from eval.__main__ import main
from eval.speed import peers, speed, workloads
from eval.speed.peers import OWN_SCRIPTS, SCRIPTS, run_peer, write_work
from eval.speed.workloads import Workload, even_share, prepare
from models.config import Qwen3Config
from models.tokenizer import Tokenizer
from train.config import PolicyConfig
from train.parse import parse

NETWORK = Qwen3Config(512, 32, 64, 1, 2, 1, 16, tie_word_embeddings=True)
ENDS = Workload(16, 16, NETWORK, 4, 8, 2, ends=True)


def load(name: str) -> ModuleType:
    """A module of bench/peers, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", OWN_SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


harness = load("harness")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workload with work.json; a tenth of the tokens end a completion."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "SMALL_NETWORK", NETWORK)
        patch.setattr(workloads, "END_SHARE", 10)
        prepare(ENDS, folder, 2)
    write_work(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_peer_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PEER_")]:
        monkeypatch.delenv(name)


def test_work_is_what_the_program_does(folder: Path) -> None:
    work = harness.read_work(folder)
    config = parse(PolicyConfig, ["--config", str(folder / "config.yaml")])
    tokenizer = Tokenizer(folder / work.tokenizer)
    assert Qwen3Config.from_hf(work.network) == config.model.architecture == NETWORK
    assert (work.rows, work.beta, work.clip) == (32, config.loss.beta, config.loss.clip_low)
    assert set(work.end_ids) == set(tokenizer.eos_ids) == {*tokenizer.special_tokens.values(), *range(10, 512, 10)}
    assert work.learning_rate == config.optimizer.learning_rate and work.dtype == config.model.dtype
    lengths = [len(ids) for ids in tokenizer.encode(work.prompts)]
    assert max(lengths) == work.max_prompt_length == 16
    # what the scripts leave at the peers' defaults, or write out
    assert (config.loss.aggregate, config.loss.kl, config.top_k, config.top_p) == ("token", "k3", 0, 1.0)
    assert (config.num_iterations, config.optimizer.lr_scheduler_type) == (1, "constant")


@pytest.mark.parametrize("texts", [[""], ["bdf", "ace", "ab"], ["日本 語", "é\n\t"]])
def test_reward_is_the_same_on_both_sides(texts: list[str]) -> None:
    assert harness.even_share(texts) == even_share([], texts)


def test_scripts_import_nothing_of_this_project() -> None:
    """At their top Python alone, so that the message about what is not installed can be printed."""
    for file in OWN_SCRIPTS.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                roots = {str(name).split(".")[0] for name in names}
                assert not roots & {"gopo_jax", "models", "train", "eval"}
                assert node not in tree.body or roots <= {*sys.stdlib_module_names, "harness"}


def test_readme_installs_what_the_scripts_ask_for() -> None:
    readme = (OWN_SCRIPTS / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS.values():
        source = (OWN_SCRIPTS / script).read_text(encoding="utf-8")
        packages = next(
            ast.literal_eval(node.value)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
        )
        assert f"pip install {packages}\n" in readme and script in readme
        assert all(requirement.count("==") == 1 for requirement in packages.split())


SCRIPT = """
from harness import run_script

def train(work, steps, clock):
    clock.start()
    for _ in range(steps):
        clock.end()
    return [float(work.rows + step) for step in range(steps)]

raise SystemExit(run_script("run_trl.py", "PACKAGES", train))
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes a stand-in of bench/peers: the real harness, and a peer that needs the given packages."""

    def make(packages: str) -> Path:
        folder = tmp_path / "peers"
        folder.mkdir()
        shutil.copy(OWN_SCRIPTS / "harness.py", folder)
        (folder / "run_trl.py").write_text(SCRIPT.replace("PACKAGES", packages))
        monkeypatch.setattr(peers, "OWN_SCRIPTS", folder)
        monkeypatch.setattr(speed, "OWN_SCRIPTS", folder)
        return folder / "run_trl.py"

    return make


def test_figures_are_those_that_eval_speed_reads(folder: Path, scripts: Callable[[str], Path]) -> None:
    timings = run_peer(scripts("pytest==0"), sys.executable, folder, 3, 2, {"PROMPT": 16, "COMPLETION": 16, "ENDS": 10})
    assert len(timings.step_s) == 3 and all(0 <= seconds < 1 for seconds in timings.step_s)
    assert timings.completion_tokens == [34.0, 35.0, 36.0]
    assert 0 < timings.cold_start_s[0] < 60 and 1 < timings.peak_rss_mib[0] < 1000


def run_script(script: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, script.name, *arguments]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    return result.returncode, result.stderr


# Mistakes


def test_python_without_the_peer_is_refused_before_anything_runs(
    scripts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts("pytest==0 no-such-peer==1.0")
    monkeypatch.setattr(speed, "prepare", lambda *_: pytest.fail("prepared already"))
    assert main(["speed", "--trl", sys.executable]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"run_trl.py: expected a Python that has no-such-peer, got {sys.executable}" in error
    assert error.endswith(" -m pip install pytest==0 no-such-peer==1.0\n")


def test_script_without_its_work_says_who_writes_it(scripts: Callable[[str], Path], tmp_path: Path) -> None:
    script = scripts("pytest==0")
    code, error = run_script(script, "grpo", "--data", str(tmp_path), "--steps", "1")
    assert code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {tmp_path}/work.json: no such file; `python -m eval speed --workload NAME --prep")
    code, error = run_script(script, "grpo", "--data", str(tmp_path), "--steps", "0")
    assert (code, error) == (2, "error: --steps: expected at least 1, got 0\n")


def test_work_of_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    work = json.loads((folder / "work.json").read_text())
    work["heat"] = work.pop("temperature")
    (tmp_path / "work.json").write_text(json.dumps(work))
    with pytest.raises(harness.PeerError, match=r"another version \(see heat, temperature\); write it again"):
        harness.read_work(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PEER_PROMPT", "64", "PEER_PROMPT: expected 16 tokens, as in .*work.json, got 64"),
        ("PEER_COMPLETION", "64", "PEER_COMPLETION: expected 16 tokens"),
        ("PEER_ENDS", "7", "PEER_ENDS: expected none, or a number whose multiples are end_ids in .*, got 7"),
        ("PEER_ENDS", "0", "PEER_ENDS: expected none"),
        ("PEER_ENDS", "many", "PEER_ENDS: expected none"),
    ],
)
def test_environment_that_means_other_work_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(harness.PeerError, match=message):
        harness.read_work(folder)


# The real one


@pytest.mark.parity
def test_completions_of_trl_end_as_ours_do(folder: Path) -> None:
    """Lengths are geometric with the share p of end tokens, cut at T: their mean is (1 - (1 - p)^T) / p."""
    work = harness.read_work(folder)
    timings = run_peer(OWN_SCRIPTS / "run_trl.py", sys.executable, folder, 4, 1, {"PROMPT": 16, "COMPLETION": 16})
    share, longest = len(work.end_ids) / NETWORK.vocab_size, work.max_completion_length
    expected = (1 - (1 - share) ** longest) / share
    error = longest / 2 / (4 * work.rows) ** 0.5  # no length deviates by more than half of T on average
    assert abs(statistics.mean(timings.completion_tokens) - expected) < 4 * error
    assert min(timings.step_s) > 0
