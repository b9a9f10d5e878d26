"""YAML is read as PyYAML reads it, but that a key stands once."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.judges.task import TASKS, load_task
from eval.runs import PolicyRun
from train.config import PolicyConfig
from train.loop import train_policy
from train.parse import parse
from train.running import SetupError
from train.strict_yaml import load_yaml

ROOT = Path(__file__).parents[2]


def random_value(rng: random.Random, depth: int = 3) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([None, True, 3, 2.5, "text", "", "on", "1", "a: b", "# x", "é\n"])
    if rng.random() < 0.4:
        return [random_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = rng.sample(["a", "b", "a.b", "1", 1, None, True, "<", "c c"], rng.randrange(5))
    return {key: random_value(rng, depth - 1) for key in keys}


@pytest.mark.parametrize("flow", [False, True])
def test_without_a_repeated_key_it_is_pyyaml(flow: bool) -> None:
    rng = random.Random(0)
    for _ in range(60):
        value = random_value(rng)
        value = {1: value} if isinstance(value, dict) and 1 in value and True in value else value
        text = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True)
        assert load_yaml(text, "x") == yaml.safe_load(text)
    for file in [*ROOT.glob("configs/**/*.yaml"), *TASKS.glob("*.yaml")]:
        if file.parent.name != "launch":
            assert load_yaml(file.read_text(), "x", dotted=True) == yaml.safe_load(file.read_text())
    for text in ("", "# nothing", "a: &x {b: 1}\nc: {<<: *x, b: 2}", "a: &x [1]\nb: *x", "a: &x {y: *x}", "{a: , b: }"):
        assert str(load_yaml(text, "x")) == str(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", "lines 1 and 3"),
        ("a:\n  x: 1\n\n  y: 2\n  x: 3\n", "x", "lines 2 and 5"),
        ("{a: 1, a: 1}", "a", "line 1"),
        ("- {b: 1}\n- {b: 1,\n   b: 2}\n", "b", "lines 2 and 3"),
        ("a: 1\n'a': 2\n", "a", "lines 1 and 2"),
        ("1: a\n0x1: b\n", 1, "lines 1 and 2"),
        ("yes: a\non: b\n", True, "lines 1 and 2"),
        ("a: &x\n  k: 1\n  k: 2\nb: *x\n", "k", "lines 2 and 3"),
        ("base: &x {k: 1}\nc:\n  <<: *x\n  m: 1\n  m: 2\n", "m", "lines 4 and 5"),
    ],
)
def test_a_repeated_key_is_named_with_its_lines(text: str, key: Any, lines: str) -> None:
    with pytest.raises(ValueError, match=f"^some.yaml: key {key!r} stands twice, in {lines};"):
        load_yaml(text, "some.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "optimizer.weight_decay: 0.1\noptimizer: {learning_rate: 1.0}",  # the block would reset it
        "optimizer: {weight_decay: 0.5}\noptimizer.weight_decay: 0.1",
        "x:\n  optimizer.weight_decay: 0.1\n  optimizer: {}",
    ],
)
def test_a_dotted_key_stands_for_one_in_a_block(text: str) -> None:
    assert load_yaml(text, "x") == yaml.safe_load(text)
    with pytest.raises(ValueError, match="key 'optimizer.weight_decay' stands twice, in line"):
        load_yaml(text, "x", dotted=True)


def test_a_dotted_key_below_a_block_without_it_is_read() -> None:
    text = "optimizer: {learning_rate: 1.0}\noptimizer.weight_decay: 0.1\nheld_out: {set: a, set.2: b, a.1: c, a: d}\n"
    assert load_yaml(text, "x", dotted=True) == yaml.safe_load(text)


# Every door


def test_config_files_and_what_is_typed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max_steps: 1\noptimizer: {learning_rate: 1.0}\n# more\noptimizer: {weight_decay: 0.1}\n")
    needed = ["--data.train", "x", "--output_dir", "x", "--max_steps", "1", "--model.path", "m"]
    for arguments, message in (
        (["--config", str(file)], f"{file}: key 'optimizer' stands twice, in lines 2 and 4"),
        (["--rewards", "[{model: a, model: b}]"], "--rewards: key 'model' stands twice, in line 1"),
        (["--optimizer", "{adam_beta1: 0.1, adam_beta1: 0.2}"], "--optimizer: key 'adam_beta1' stands twice"),
        (["--data.columns", "{prompt: a, prompt: b}"], "--data.columns: key 'prompt' stands twice"),
        (["--optimizer", str(file)], f"{file}: key 'optimizer' stands twice"),
    ):
        with pytest.raises(ValueError) as caught:
            parse(PolicyConfig, [*needed, "--rewards", "[{model: a}]", *arguments])
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_judging_tasks_and_saved_configs(tmp_path: Path, policy_config: Callable[..., PolicyConfig]) -> None:
    task = tmp_path / "task.yaml"
    task.write_text((TASKS / "chat.yaml").read_text() + "\nmax_tokens: 5\nmax_tokens: 6\n")
    with pytest.raises(ValueError, match=r"task.yaml: key 'max_tokens' stands twice, in lines \d+ and \d+"):
        load_task(str(task))

    run = tmp_path / "run"
    (run / "completions").mkdir(parents=True)
    (run / "completions" / "validation_000000.jsonl").touch()
    (run / "config.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ValueError, match="config.yaml: key 'seed' stands twice, in lines 1 and 2"):
        _ = PolicyRun.open(str(run)).config
    with pytest.raises(SetupError, match="config.yaml: key 'seed' stands twice, in lines 1 and 2"):
        train_policy(policy_config(tmp_path))
    assert sorted(path.name for path in run.iterdir()) == ["completions", "config.yaml"]


@pytest.mark.parametrize("text", ["a: \x7f", "a: " + "[" * 3000, "a: " + "{b: " * 3000 + "}" * 3000])
def test_what_is_no_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\Ax.yaml: not YAML: .*\Z"):
        load_yaml(text, "x.yaml")
