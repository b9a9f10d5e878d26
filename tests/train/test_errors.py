"""Every mistake in a config or the data gives one clear error, through the real door, before anything is computed."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh

from models.checkpoint import Checkpoints
from models.config import REWARD_MODEL, Qwen3Config, read_config
from models.hf_weights import save_pretrained, split
from models.qwen3 import Backbone
from models.sharding import MESH_AXES, RULES, Layout
from models.tokenizer import Tokenizer
from train.__main__ import main
from train.config import PolicyConfig, resolved
from train.loop import train_policy
from train.run.directory import read_metrics
from train.running import SetupError


class Computing(AssertionError):
    """Set-up is over: what follows would sample or train."""


@pytest.fixture(autouse=True)
def no_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise Computing

    monkeypatch.setattr("train.loop.Generator", refuse)
    monkeypatch.setattr("train.supervised.program.make_supervised_update", refuse)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@dataclasses.dataclass
class Door:
    """A valid config in `here`, whose settings and files a test breaks before it runs the program."""

    here: Path
    settings: dict[str, Any]
    places: dict[str, str]  # what "{name}" in a setting stands for
    capture: pytest.CaptureFixture[str]

    def set(self, changes: dict[str, Any]) -> None:
        for dotted, value in changes.items():
            *outer, last = dotted.split(".")
            inner = self.settings
            for key in outer:
                inner = inner[key]
            inner[last] = self._fill(value)

    def _fill(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.format(**self.places)
        if isinstance(value, list):
            return [self._fill(item) for item in value]
        return {k: self._fill(v) for k, v in value.items()} if isinstance(value, dict) else value

    def run(self, *arguments: str, command: str = "policy") -> str:
        """The error of the program, checked to be one line and the whole story."""
        file = self.here / "config.yaml"
        file.write_text(yaml.safe_dump(self.settings))
        before = self.files()
        status = main([command, "--config", str(file), *(argument.format(**self.places) for argument in arguments)])
        error = self.capture.readouterr().err
        print(error)
        assert status == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
        assert self.files() == before, "nothing was written"
        return error.removeprefix("error: ").strip()

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.here.rglob("*") if path.is_file()}


@pytest.fixture
def door(
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    tiny_policy_dir: Path,
    tiny_reward_dir: Path,
    tiny_tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> Door:
    places = {"here": tmp_path, "policy": tiny_policy_dir, "reward": tiny_reward_dir, "tokenizer": tiny_tokenizer_dir}
    settings = resolved(policy_config(tmp_path))
    return Door(tmp_path, settings, {name: str(path) for name, path in places.items()}, capsys)


def test_without_a_mistake_the_program_would_compute(door: Door) -> None:
    """So that every error below comes from its mistake."""
    with pytest.raises(Computing):
        door.run()
    assert (door.here / "run" / "config.yaml").is_file()


# Settings

NETWORK = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
NETWORK |= {"num_attention_heads": 2, "num_key_value_heads": 1}

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"zzz": 1},
        "config.yaml: unknown key 'zzz'; expected one of output_dir, max_steps, seed,",
    ),
    "unknown key with a near one": (
        {"num_generation": 4},
        "config.yaml: unknown key 'num_generation'; did you mean 'num_generations'?",
    ),
    "unknown key that is nested elsewhere": (
        {"learning_rte": 1},
        "config.yaml: unknown key 'learning_rte'; did you mean 'optimizer.learning_rate'?",
    ),
    "unknown nested key": (
        {"optimizer.lerning_rate": 1},
        "config.yaml: unknown key 'optimizer.lerning_rate'; did you mean 'optimizer.learning_rate'?",
    ),
    "unknown key in a list": (
        {"rewards": [{"model": "{reward}", "wieght": 2.0}]},
        "config.yaml: unknown key 'rewards[].wieght'; did you mean 'rewards[].weight'?",
    ),
    "num_generations 1": ({"num_generations": 1}, "num_generations: expected at least 2 completions per prompt"),
    "text for an integer": ({"num_generations": "many"}, "num_generations: expected integer, got many"),
    "fraction for an integer": ({"max_steps": 2.5}, "max_steps: expected integer, got 2.5"),
    "text for a number": (
        {"optimizer.learning_rate": "fast"},
        "optimizer.learning_rate: expected number, got fast",
    ),
    "text for a number in a list": (
        {"rewards": [{"model": "{reward}", "weight": "much"}]},
        "rewards[].weight: expected number, got much",
    ),
    "not one of the choices": ({"loss.kl": "k4"}, "loss.kl: expected k1|k2|k3, got k4"),
    "text for a list": ({"rewards": "a.b"}, "config.yaml: rewards: expected 'key: value' lines, got 'a.b'"),
    "a list for a dataclass": ({"optimizer": [1, 2]}, "config.yaml: optimizer: expected 'key: value' lines, got 1"),
    "null for a required one": ({"max_steps": None}, "max_steps"),
    "temperature 0": ({"temperature": 0.0}, "temperature: expected a number above 0, got 0"),
    "top_p 0": ({"top_p": 0.0}, "top_p: expected a number in (0, 1], got 0"),
    "min_p 2": ({"min_p": 2.0}, "min_p: expected a number in [0, 1], got 2"),
    "penalty 0": ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0, got 0"),
    "empty stop": ({"stop": ["a", ""]}, "stop: expected texts of at least one character, each once, got ['a', '']"),
    "stop twice": ({"stop": ["a", "a"]}, "stop: expected texts of at least one character, each once, got ['a', 'a']"),
    "stop at a special token": (
        {"stop": ["<|im_end|>"]},
        "stop: '<|im_end|>': <|im_end|> is a special token, which is in no completion's text",
    ),
    "no steps": ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
    "negative rate": ({"optimizer.learning_rate": -1.0}, "learning_rate: expected a number above 0, got -1"),
    "micro-batch": (
        {"microbatch_prompts": 3},
        "microbatch_prompts: expected a divisor of prompts_per_step = 4, got 3",
    ),
    "no prompt at a time": (
        {"rollout_prompts": 0},
        "rollout_prompts: expected a number from 1 to prompts_per_step = 4, or null to sample all of them at once, "
        "got 0",
    ),
    "more prompts at a time than a step has": (
        {"rollout_prompts": 5},
        "rollout_prompts: expected a number from 1 to prompts_per_step = 4, or null to sample all of them at once, "
        "got 5",
    ),
    "advantage": ({"advantage": "gopoo"}, "advantage: expected one of gopo, grpo"),
    "advantage option": (
        {"advantage": "grpo", "advantage_options": {"ties": "average"}},
        "advantage_options: grpo has no 'ties'; expected one of scale, epsilon",
    ),
    "advantage without options": (
        {"advantage": "rloo", "advantage_options": {"ties": "average"}},
        "advantage_options: rloo has no 'ties'; it has no options",
    ),
    "advantage option's value": (
        {"advantage_options": {"ties": "random"}},
        "ties: expected one of 'average', 'ordinal', got 'random'",
    ),
    "no rewards": ({"rewards": []}, "rewards: expected at least one reward, got none"),
    "same reward twice": (
        {"rewards": [{"model": "{reward}"}, {"model": "{reward}", "weight": 0.5}]},
        "rewards: names must differ",
    ),
    "reward of two kinds": (
        {"rewards": [{"model": "{reward}", "function": "math.floor"}]},
        "either model or function, not both",
    ),
    "reward of no kind": ({"rewards": [{"weight": 1.0}]}, "either model or function"),
    "path and architecture": (
        {"model.architecture": NETWORK},
        "model: expected either path (pretrained) or architecture (random weights), not both",
    ),
    "neither path nor architecture": ({"model.path": None}, "model: expected either path"),
    "architecture without a tokenizer": (
        {"model": {"architecture": NETWORK}},
        "model.tokenizer: needed with model.architecture",
    ),
    "impossible architecture": (
        {"model": {"architecture": NETWORK | {"head_dim": 3}, "tokenizer": "{tokenizer}"}},
        "head_dim: expected an even number",
    ),
    "text in an architecture": (
        {"model": {"architecture": NETWORK | {"head_dim": "x"}, "tokenizer": "{tokenizer}"}},
        "model.architecture.head_dim: expected integer, got x",
    ),
    "text for an optional integer": ({"checkpoint.keep": "all"}, "checkpoint.keep: expected integer|null, got all"),
    "all checkpoints deleted": ({"checkpoint.keep": -1}, "checkpoint.keep: expected at least 1, or null to keep all"),
    "no checkpoint kept": ({"checkpoint.keep": 0}, "checkpoint.keep: expected at least 1, or null to keep all"),
    "a period without keep": ({"checkpoint.keep_every": 5}, "checkpoint.keep_every: 5 needs checkpoint.keep; without"),
    "a period between saves": (
        {"checkpoint": {"every": 4, "keep": 1, "keep_every": 6}},
        "checkpoint.keep_every: expected a multiple of checkpoint.every: 4, or null, got 6",
    ),
    "weights of no period": (
        {"checkpoint.weights_only": True},
        "weights_only: true needs checkpoint.keep_every",
    ),
    "a direction of no metric": (
        {"checkpoint.greater_is_better": True},
        "greater_is_better: is of checkpoint.best, which",
    ),
    "the best of no validation": (
        {"checkpoint.best": "validation/reward", "validation.prompts": 0},
        "checkpoint.best: nothing is validated with validation.prompts: 0",
    ),
    "rewards of no validation": (
        {"validation": {"prompts": 0, "rewards": [{"function": "length"}]}},
        "validation.rewards: nothing is validated with validation.prompts: 0",
    ),
    "one name of two rewards": (
        {"validation": {"rewards": [{"function": "length", "name": "a"}, {"function": "length", "name": "a"}]}},
        "rewards: names must differ",
    ),
    "no token of validation": (
        {"validation.max_completion_length": 0},
        "max_completion_length: expected at least 1, got 0",
    ),
    "no probability of validation": ({"validation.top_p": 0}, "validation.top_p: expected a number in (0, 1], or null"),
    "two steps ahead": (
        {"rollout_ahead": 2},
        "rollout_ahead: expected 0 or 1, the steps that are sampled ahead, got 2",
    ),
    "ahead without weights": (
        {"rollout_ahead": 1},
        "rollout_ahead: 1 learns from samples of older weights, which loss",
    ),
    "ahead and again": (
        {
            "rollout_ahead": 1,
            "loss": {"importance_sampling_mode": "token_truncate"},
            "dynamic_sampling_attempts": 2,
        },
        "rollout_ahead: 1 samples a step's prompts once and together; leave dynamic_sampling_attempts out",
    ),
    "a table at every step": ({"log.completions_every": -1}, "completions_every: expected at least 0, got -1"),
    "negative seed": ({"seed": -1}, "seed: expected a number from 0 to 2**32 - 1 = 4294967295, got -1, which would"),
    "seed of 33 bits": ({"seed": 2**32 + 5}, "got 4294967301, which would draw the same as 5"),
    "infinite rate": ({"optimizer.learning_rate": math.inf}, "learning_rate: expected a finite number, got inf"),
    "rate of no number": ({"optimizer.learning_rate": math.nan}, "learning_rate: expected a number above 0, got nan"),
    "rate that is 0": ({"optimizer.learning_rate": 1e-60}, "got 1e-60, which is 0 in float32"),
    "beta of 1": ({"optimizer.adam_beta2": 1.0}, "adam_beta2: expected a number in [0, 1), got 1.0"),
    "negative beta": ({"optimizer.adam_beta1": -0.9}, "adam_beta1: expected a number in [0, 1), got -0.9"),
    "a number that is null": ({"optimizer.warmup_steps": None}, "optimizer.warmup_steps: expected integer, got null"),
    "a reward's number that is null": (
        {"rewards": [{"model": "{reward}", "weight": None}]},
        "rewards[].weight: expected number, got null",
    ),
    "a section that is null": ({"optimizer": None}, "optimizer: expected {key: value}, got null"),
    "a rate beyond float32": (
        {"optimizer.learning_rate": 1e39},
        "optimizer.learning_rate: expected a finite number, got 1e+39, which is infinite in float32",
    ),
    "an integer without end": ({"max_steps": 10**25}, "max_steps: expected an integer from -2**63 to 2**63 - 1, got 1"),
    "a warm-up without end": ({"optimizer.warmup_steps": 2**31}, "warmup_steps: expected at most 2**31 - 1 = "),
    "no bound": ({"loss.importance_sampling_clip_min": math.inf}, "importance_sampling_clip_min: expected a finite"),
    "no frequencies": (
        {"model": {"architecture": NETWORK | {"rope_theta": 0.0}, "tokenizer": "{tokenizer}"}},
        "rope_theta: expected a number above 0, got 0.0",
    ),
    "infinite penalty": ({"loss.beta": math.inf}, "beta: expected a finite number, got inf"),
    "temperature without end": ({"temperature": math.inf}, "temperature: expected a finite number, got inf"),
    "temperature that is 0": ({"temperature": 1e-40}, "temperature: expected a number above 0, got 1e-40, which is 0"),
    "weights of 0": (
        {"rewards": [{"model": "{reward}", "weight": 0.0}]},
        "rewards: expected a weight other than 0, got none: nothing would be learned",
    ),
    "weight of no number": (
        {"rewards": [{"model": "{reward}", "weight": math.nan}]},
        "weight: expected a finite number, got nan",
    ),
    "mesh": ({"mesh.fsdp": 3}, "mesh: data -1 x fsdp 3 x tensor 1 does not make the 1 devices"),
    "mesh of two free sizes": ({"mesh.fsdp": -1}, "mesh: data -1 x fsdp -1 x tensor 1 does not make the 1 devices"),
    "mesh rule": ({"mesh.rules": {"prompts": ["data"]}}, "mesh.rules: 'prompts': ['data'] is not a rule"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(door: Door, case: str) -> None:
    changes, message = SETTINGS[case]
    door.set(changes)
    assert message in door.run()
    assert not (door.here / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_generation", "4"], "command line: unknown key 'num_generation'; did you mean 'num_generations'?"),
        (["--optimizer.lr", "1"], "command line: unknown key 'optimizer.lr'; expected one of learning_rate,"),
        (
            ["--optimizer.learning_rat=1"],
            "command line: unknown key 'optimizer.learning_rat'; did you mean 'optimizer.learning_rate'?",
        ),
        (
            ["--learning_rte", "1e-6"],
            "command line: unknown key 'learning_rte'; did you mean 'optimizer.learning_rate'?",
        ),
        (["--max_steps", "three"], "max_steps"),
        (["--max_steps"], "max_steps"),
        (["--num_generations", "1"], "num_generations: expected at least 2"),
        (["--config", "{here}/none.yaml"], "--config {here}/none.yaml: no such file"),
        (["stray"], "stray"),
    ],
)
def test_command_line(door: Door, arguments: list[str], message: str) -> None:
    assert message.format(**door.places) in door.run(*arguments)
    assert not (door.here / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("- 1\n- 2\n", "expected 'key: value' lines, got list"),
        ("", "expected 'key: value' lines, got NoneType"),
    ],
)
def test_config_file(door: Door, text: str, message: str) -> None:
    file = door.here / "broken.yaml"
    file.write_text(text)
    error = door.run("--config", str(file))
    assert error.startswith(f"{file}: ") and message in error


@pytest.mark.parametrize("missing", ["output_dir", "model", "data", "rewards", "max_steps"])
def test_required_settings(door: Door, missing: str) -> None:
    del door.settings[missing]
    assert missing in door.run()


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["polcy"]):
        assert main(arguments) == 2
        assert "usage: python -m train {sft,reward,policy}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts_per_step": 3, "microbatch_prompts": 3},
        {"microbatch_prompts": 1},
        {"validation.batch_prompts": 3},
        {"rewards": [{"model": "{reward}", "batch_prompts": 3}]},
    ],
)
def test_rows_that_the_mesh_does_not_divide(
    door: Door, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = Layout(AbstractMesh((2, 1, 1), MESH_AXES), tuple(RULES.items()))  # type: ignore[arg-type]
    monkeypatch.setattr("train.build.make_layout", lambda **_: two)
    door.set(changes)
    error = door.run()
    assert "rows" in error and "cannot be split over 2 devices" in error
    assert not (door.here / "run").exists()


# Data

ROW = '{"prompt": "Good", "wanted": "x"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one row, got an empty file"),
        ("\n\n", "expected at least one row, got an empty data set"),
        (ROW + '{"text": "Good"}\n', "row 2 has no 'prompt'; its columns are text"),
        (ROW + '{"prompt": ""}\n', "row 2 has no 'prompt'"),
        (ROW + '{"prompt": null}\n', "row 2 has no 'prompt'"),
        (ROW + '{"prompt": 5}\n', "row 2: 'prompt': expected text or a list of chat messages"),
        (ROW + '{"prompt": ["Good"]}\n', "row 2: 'prompt': expected text or a list of chat messages"),
        (ROW + '{"prompt": [{"role": "user", "content": "Good"}]}\n', "has no chat template"),
        (ROW + '\n{"prompt": "Go\n', "line 3 is not JSON"),
        (ROW + '["Good"]\n', "line 2: expected a JSON object, got list"),
        ('{"prompt": "This is longer than eight tokens, whatever the merges are"}\n', "max_prompt_length = 8"),
    ],
)
@pytest.mark.parametrize("which", ["train", "validation"])
def test_data_files(door: Door, which: str, text: str, message: str) -> None:
    file = door.here / "prompts.jsonl"
    file.write_text(text)
    door.set({f"data.{which}": str(file)})
    error = door.run()
    assert message in error
    assert str(file) in error or "chat template" in error
    assert not (door.here / "run").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{here}/none.jsonl", "none.jsonl: no such file"),
        ("{here}/none.jsonl.gz", "none.jsonl.gz: no such file"),
        ("{here}/none.parquet", "none.parquet: no such file"),
        ("{here}/none", "none: no such file; expected JSON Lines or a JSON array"),
        ("no-one/nothing", "no-one/nothing: neither a .jsonl or .parquet file nor a data set that the Hub could give"),
        ("no-such-data-set", "no-such-data-set: neither a .jsonl or .parquet file nor a data set"),
        ("{here}/rubbish.parquet", "rubbish.parquet: expected parquet, as the name says, got plain text"),
        ("{here}/rubbish.jsonl.gz", "rubbish.jsonl.gz: expected gzip, as the name says, got plain text"),
        ("{here}", ": is a directory with {here}/rubbish.jsonl.gz and 2 more; expected a file of JSON Lines"),
    ],
)
def test_data_sources(door: Door, source: str, message: str) -> None:
    for name in ("rubbish.parquet", "rubbish.jsonl.gz"):
        (door.here / name).write_text("rubbish")
    door.set({"data.train": source})
    assert message.format(**door.places) in door.run()


def test_no_column_of_that_name(door: Door) -> None:
    door.set({"data.prompt_column": "question"})
    assert "row 1 has no 'question'; its columns are prompt, wanted" in door.run()


# Models


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "{here}/none"}, "none: no such directory"),
        ({"model.path": "{here}/nothing"}, "nothing: not a checkpoint; expected a run directory with checkpoints/STEP"),
        ({"model.path": "{here}/started"}, "started: not a checkpoint; expected a run directory with checkpoints/STEP"),
        ({"model.path": "{here}/none@3"}, "none@3: no such directory"),
        ({"model.path": "no-one/nothing"}, "nothing: no model of that name here, and the Hub could not give one"),
        ({"model.path": "no-one/nothing", "model.tokenizer": "{tokenizer}"}, "the Hub could not give one"),
        ({"model.path": "{tokenizer}"}, "not a checkpoint"),
        ({"model.path": "{reward}"}, "is a reward model; expected a policy"),
        ({"model.tokenizer": "{here}/none"}, "none: no such directory; expected a Hugging Face tokenizer directory"),
        ({"model.tokenizer": "{here}/nothing"}, "nothing: no Hugging Face tokenizer could be read there"),
        ({"rewards": [{"model": "{policy}"}]}, "expected a reward model (Qwen3RewardModel), got a policy"),
        ({"rewards": [{"model": "{here}/none"}]}, "none: no such directory"),
        ({"rewards": [{"model": "{here}/nothing"}]}, "nothing: not a checkpoint"),
        (
            {"rewards": [{"model": "no-one/nothing"}]},
            "no-one/nothing: no model of that name here, and the Hub could not give one",
        ),
        ({"rewards": [{"function": "no_such_module.f"}]}, "no_such_module.f: cannot be imported"),
        ({"rewards": [{"function": "math.no_such_function"}]}, "math.no_such_function: cannot be imported"),
        ({"rewards": [{"function": "floor"}]}, "floor: cannot be imported"),
        ({"rewards": [{"function": "math.pi"}]}, "math.pi: expected a function, got float"),
        (
            {"rewards": [{"function": "length", "options": {"taget": 9}}]},
            "length has no 'taget'; expected one of target",
        ),
        ({"rewards": [{"function": "rouge"}]}, "no column 'completion'; the columns are wanted; name the right one"),
    ],
)
def test_models(door: Door, changes: dict[str, Any], message: str) -> None:
    (door.here / "nothing").mkdir()
    (door.here / "started" / "checkpoints").mkdir(parents=True)
    door.set(changes)
    assert message in door.run()
    assert not (door.here / "run").exists()


def test_vocabulary_smaller_than_the_tokenizers(
    door: Door, tiny_config: Qwen3Config, make_model: Callable[..., Backbone]
) -> None:
    size = Tokenizer(door.places["tokenizer"]).size
    message = f"vocab_size is {size - 1}, but the tokenizer {door.places['tokenizer']} has {size} ids"
    smaller = dataclasses.replace(tiny_config, vocab_size=size - 1)
    door.set({"model": {"architecture": dataclasses.asdict(smaller), "tokenizer": "{tokenizer}"}})
    assert f"model.architecture: {message}" in door.run()

    save_pretrained(make_model(smaller), door.here / "small")
    door.set({"model": {"path": "{here}/small", "tokenizer": "{tokenizer}"}})
    assert f"{door.here}/small: {message}" in door.run()

    reward = door.here / "small_reward"
    save_pretrained(make_model(dataclasses.replace(smaller, architecture=REWARD_MODEL)), reward)
    Tokenizer(door.places["tokenizer"]).save(reward)
    door.set({"model": {"path": "{policy}"}, "rewards": [{"model": str(reward)}]})
    assert f"{reward}: vocab_size is {size - 1}" in door.run()


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _nonsense(file: Path) -> None:
    file.write_text('{"a": 1}')


def _reconfigure(**changes: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        config = json.loads(file.read_text())
        config.update(changes)
        file.write_text(json.dumps(config))

    return change


def test_a_reward_model_that_cannot_read_the_prompts(door: Door, tiny_policy_dir: Path) -> None:
    policy = door.here / "chatty"
    shutil.copytree(tiny_policy_dir, policy)
    (policy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    door.set({"model.path": str(policy), "chat.text_as_chat": True})
    assert "this tokenizer has no chat template" in door.run()
    door.set(
        {"model.path": "{policy}", "chat.text_as_chat": False, "rewards": [{"model": "{reward}", "max_length": 2}]}
    )
    assert "more than its max_length = 2, so nothing could be scored" in door.run()


@pytest.mark.parametrize(
    ("file", "break_it", "message"),
    [
        ("model.safetensors", Path.unlink, "expected model.safetensors or model.safetensors.index.json"),
        ("model.safetensors", _cut, "not a readable safetensors file"),
        ("config.json", Path.unlink, "not a checkpoint"),
        ("config.json", _cut, "config.json"),
        ("config.json", _reconfigure(model_type="llama"), "model_type = 'llama' is not supported"),
        ("config.json", _reconfigure(intermediate_size=65), "config.json asks for"),
        ("config.json", _reconfigure(num_hidden_layers=3), "layer_types: expected num_hidden_layers = 3 entries"),
        ("config.json", _reconfigure(num_hidden_layers=3, layer_types=None), "tensors are missing from the weights"),
        ("tokenizer.json", _cut, "no Hugging Face tokenizer could be read there"),
        ("tokenizer.json", _nonsense, "no Hugging Face tokenizer could be read there"),
        ("tokenizer_config.json", _reconfigure(model_max_length={}), "no Hugging Face tokenizer could be read there"),
        ("generation_config.json", _reconfigure(eos_token_id="x"), "eos_token_id: expected ids, got 'x'"),
    ],
)
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_broken_model_directories(
    door: Door, role: str, file: str, break_it: Callable[[Path], None], message: str
) -> None:
    copy = door.here / "copy"
    shutil.copytree(door.places[role], copy)
    break_it(copy / file)
    door.set({"model.path": str(copy)} if role == "policy" else {"rewards": [{"model": str(copy)}]})
    error = door.run()
    assert message in error and str(copy) in error


# Runs


@pytest.fixture(scope="session")
def run_with_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, policy_config: Callable[..., PolicyConfig], make_model: Any
) -> Path:
    """A run directory as `train policy` leaves it behind, with checkpoints 1 and 3; nothing was trained for it."""
    config = policy_config(tmp_path_factory.mktemp("finished"))
    run = Path(config.output_dir)
    network = read_config(str(config.model.path))
    checkpoints = Checkpoints(run)
    about = {"model": network.to_hf(), "run": resolved(config)}
    for step in (1, 3):
        checkpoints.save(step, split(make_model(network))[1], {"step": np.zeros(())}, about)
    checkpoints.close()
    Tokenizer(config.model.path or "").save(run / "tokenizer")
    (run / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    return run


def test_a_step_that_does_not_exist_lists_those_that_do(door: Door, run_with_checkpoints: Path) -> None:
    for step in ("2", "03x", "-1", "last"):
        door.set({"model.path": f"{run_with_checkpoints}@{step}"})
        assert door.run() == f"{run_with_checkpoints}@{step}: no such step; expected one of 1, 3"
    door.set({"model.path": f"{run_with_checkpoints}@best"})
    assert door.run() == (
        f"{run_with_checkpoints}@best: no best step is known, as early stopping has not ended this run; expected one "
        f"of 1, 3"
    )
    door.set({"output_dir": f"{run_with_checkpoints}@3"})
    assert door.run() == (
        f"output_dir: {run_with_checkpoints}@3 is the name of step 3 of the run {run_with_checkpoints}; expected a "
        f"name that does not end in @3"
    )


def test_a_checkpoint_that_is_not_whole(door: Door, run_with_checkpoints: Path) -> None:
    copy = door.here / "copy"
    shutil.copytree(run_with_checkpoints, copy)
    shutil.rmtree(copy / "checkpoints" / "3" / "about")
    door.set({"model.path": f"{copy}@3"})
    assert door.run() == f"{copy}@3: that step is not whole (about missing); expected one of 1"
    shutil.rmtree(copy / "checkpoints" / "1" / "params")
    door.set({"model.path": str(copy)})
    assert "none of the checkpoints in it is whole (step 3: about missing)" in door.run()


def test_a_checkpoint_whose_arrays_are_damaged(door: Door, run_with_checkpoints: Path) -> None:
    copy = door.here / "copy"
    shutil.copytree(run_with_checkpoints, copy)
    for file in ("_METADATA", "manifest.ocdbt"):
        (copy / "checkpoints" / "3" / "params" / file).write_text("{")
    door.set({"model.path": str(copy)})
    assert f"{copy}: step 3 is not a checkpoint that can be read" in door.run()


def test_a_run_directory_with_another_config_is_left_as_it_is(door: Door, run_with_checkpoints: Path) -> None:
    run = door.here / "run"
    shutil.copytree(run_with_checkpoints, run)
    before = door.settings | {"output_dir": str(run), "advantage": "grpo", "seed": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(before))
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    error = door.run()
    assert error.startswith(f"{run}: holds a run with another config (seed: 3, now 0)")
    assert len(read_metrics(run)) == 2


# Warnings


def test_updates_that_bfloat16_rounds_away_are_warned_of(door: Door) -> None:
    def printed() -> str:
        with pytest.raises(Computing):
            door.run()
        shutil.rmtree(door.here / "run")
        return door.capture.readouterr().out

    door.set({"model.param_dtype": "bfloat16", "optimizer.learning_rate": 1e-6})
    share = re.search(
        r"warning: an update of optimizer.learning_rate = 1e-06 changes (\d\.\d)% of the bfloat16 parameters;.* set "
        r"optimizer.master_weights: true",
        printed(),
    )
    assert share and 0 < float(share[1]) < 1
    for silent in (
        {"optimizer.master_weights": True},
        {"optimizer.master_weights": False, "optimizer.learning_rate": 0.1},
        {"model.param_dtype": "float32", "optimizer.learning_rate": 1e-6},
    ):
        door.set(silent)
        assert "warning" not in printed()


# The other doors


def test_train_policy_raises_setup_errors(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    config = policy_config(tmp_path)
    for wrong in (
        dataclasses.replace(config, data=dataclasses.replace(config.data, train=str(tmp_path / "none.jsonl"))),
        dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path))),
        dataclasses.replace(config, advantage_options={"ties": "random"}),
    ):
        with pytest.raises(SetupError) as caught:
            train_policy(wrong)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


SUPERVISED = ("output_dir", "model", "max_steps", "optimizer", "checkpoint", "log")


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("sft", "", "expected at least one row, got an empty file"),
        ("sft", '{"prompt": "Good"}\n', "row 1 has no 'completion'; its columns are prompt"),
        ("sft", '{"text": "Good"}\n{"tex": "Good"}\n', "row 2 has no 'text'; its columns are tex"),
        (
            "sft",
            '{"text": "Longer than the four tokens that fit"}\n',
            "none of the 1 rows has 2 to max_length = 4",
        ),
        ("reward", '{"text": "Good"}\n', "row 1 has no 'chosen'; its columns are text"),
        ("reward", '{"chosen": "Good"}\n', "row 1 has no 'rejected'; its columns are chosen"),
    ],
)
def test_supervised_data(door: Door, command: str, text: str, message: str) -> None:
    file = door.here / "rows.jsonl"
    file.write_text(text)
    door.settings = {name: door.settings[name] for name in SUPERVISED}
    door.settings |= {"data": {"train": str(file)}, "max_length": 4, "batch_size": 2}
    assert message in door.run(command=command)
    file.write_text('{"text": "a b", "chosen": "a b", "rejected": "a"}\n')
    with pytest.raises(Computing):
        door.run(command=command)


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_supervised_settings(door: Door, command: str) -> None:
    door.settings = {name: door.settings[name] for name in SUPERVISED}
    door.settings |= {"data": {"train": "{here}/none.jsonl"}, "batch_size": 2}
    assert "unknown key 'batchsize'; did you mean 'batch_size'?" in door.run("--batchsize", "3", command=command)
    assert "unknown key 'num_generations'" in door.run("--num_generations", "3", command=command)
    assert "none.jsonl: no such file" in door.run(command=command)
    door.set({"model": {"architecture": NETWORK | {"vocab_size": 299}, "tokenizer": "{tokenizer}"}})
    (door.here / "rows.jsonl").write_text('{"text": "a b", "chosen": "a b", "rejected": "a"}\n')
    door.set({"data.train": "{here}/rows.jsonl"})
    assert "model.architecture: vocab_size is 299" in door.run(command=command)
