"""The shipped configs: the paper's values are in all of its recipes, every config can run, the small ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.tokenizer import Tokenizer
from train.__main__ import main
from train.config import PolicyConfig, RewardModelConfig
from train.data.prompts import load_splits
from train.data.rows import load_rows
from train.parse import parse
from train.run.directory import read_metrics

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TASKS = ("tldr", "ultrachat", "ifeval")
# demo, preferences: need data that is made, see the slow test; launch: shell and Kubernetes; variants: parts of configs
EXCLUDED = ("demo", "preferences", "launch", "variants")
SHIPPED = sorted(
    f.relative_to(ROOT) for f in CONFIGS.rglob("*.yaml") if f.relative_to(CONFIGS).parts[0] not in EXCLUDED
)
PAPER_RECIPES = sorted(file for file in SHIPPED if file.name.startswith("qwen3_"))
# The paper's settings, arXiv 2602.03876, as its recipes and its trainer's defaults have them.
PAPER = {
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.999,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 1.0,
    "optimizer.learning_rate": 1e-6,
    "optimizer.lr_scheduler_type": "constant",
    "optimizer.warmup_steps": 10,
    "num_generations": 8,
    "prompts_per_step": 128,
    "loss.clip_low": 0.2,
    "loss.clip_high": 0.2,
    "loss.kl": "k3",
    "loss.beta": 0.04,
    "loss.token_broadcast": "uniform",
    "num_iterations": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_prompt_length": 1024,
    "max_completion_length": 2048,
    "validation.every": 25,
    "validation.prompts": 500,
    "checkpoint.every": 25,
    "chat.enable_thinking": False,
    "chat.text_as_chat": True,
}
OF_TASK: dict[str, dict[str, Any]] = {
    "tldr": {
        "max_steps": 500,
        "data.train": "trl-lib/tldr",
        "data.validation": "trl-lib/tldr",
        "data.validation_split": "validation",
        "chat.system_prompt": "Summarize the following text in 100 words or less",
    },
    "ultrachat": {
        "max_steps": 500,
        "data.train": "HuggingFaceH4/ultrachat_200k",
        "data.split": "train_sft",
        "data.validation_rows": 500,
        "data.test": "HuggingFaceH4/ultrachat_200k",
        "data.test_split": "test_sft",
    },
    "ifeval": {
        "max_steps": 750,
        "data.train": "allenai/tulu-3-sft-personas-instruction-following",
        "data.validation_rows": 500,
        "data.test": "google/IFEval",
        "data.test_split": "train",
    },
}


def flat(values: dict[str, Any], outer: str = "") -> dict[str, Any]:
    """{"a.b": value} of nested settings."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{outer}{key}.") if isinstance(value, dict) else {f"{outer}{key}": value}
    return found


def written(file: Path) -> dict[str, Any]:
    return flat(yaml.safe_load((ROOT / file).read_text()))


def test_there_is_a_recipe_for_every_task_size_and_method() -> None:
    names = [
        f"configs/{t}/qwen3_{size}_{a}.yaml" for t in TASKS for size in ("1.7b", "4b", "8b") for a in ("gopo", "grpo")
    ]
    assert [str(file) for file in PAPER_RECIPES] == sorted(names)
    small = [f"configs/{task}/tiny_{kind}.yaml" for task in TASKS for kind in ("gopo", "grpo", "reward")]
    assert {*small, *(f"configs/{task}/reward_qwen3_8b.yaml" for task in TASKS)} < set(map(str, SHIPPED))


@pytest.mark.parametrize("file", PAPER_RECIPES, ids=str)
def test_all_of_the_papers_values_are_written_out(file: Path) -> None:
    """Written out: a default may change, a recipe may not."""
    values = written(file)
    expected = PAPER | OF_TASK[file.parent.name]
    assert {key: values.get(key) for key in expected} == expected
    assert [reward["model"] for reward in values["rewards"]] == ["Skywork/Skywork-Reward-V2-Qwen3-8B"]
    size, method = file.stem.removeprefix("qwen3_").split("_")
    assert values["model.path"].lower() == f"qwen/qwen3-{size}" and values["advantage"] == method
    assert values["output_dir"] == f"runs/{file.parent.name}/{file.stem}"
    config = parse(PolicyConfig, ["--config", str(ROOT / file)])
    assert config.prompts_per_step * config.num_generations == 1024 and not config.advantage_options


@pytest.mark.parametrize("file", [file for file in SHIPPED if file.stem.endswith("_gopo")], ids=str)
def test_gopo_and_grpo_differ_in_their_name_and_advantage_alone(file: Path) -> None:
    gopo, grpo = written(file), written(file.with_name(file.name.replace("gopo", "grpo")))
    assert {key for key in gopo.keys() | grpo.keys() if gopo.get(key) != grpo.get(key)} == {"output_dir", "advantage"}
    assert (gopo["advantage"], grpo["advantage"]) == ("gopo", "grpo")
    assert grpo["output_dir"] == gopo["output_dir"].replace("gopo", "grpo")


DRY_RUNS = """
import json, sys
from train.__main__ import main
for command, file in json.loads(sys.argv[1]):
    print("##", file, main([command, "--config", file, "--dry_run", "--devices", "8", "--chip", "H200"]), flush=True)
"""


def test_every_shipped_config_passes_a_dry_run_without_the_network() -> None:
    # grpo differs from gopo in two words (see above)
    files = [file for file in SHIPPED if not file.stem.endswith("_grpo")]
    runs = [("reward" if "reward" in file.stem else "policy", str(file)) for file in files]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DRY_RUNS, json.dumps(runs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    results = [line.split() for line in done.stdout.splitlines() if line.startswith("##")]
    assert [(file, code) for _, file, code in results] == [(file, "0") for _, file in runs], done.stderr
    assert "trl-lib/tldr, train: 116,722 rows, columns prompt (string)" in done.stdout
    assert "the Hub was not reached: as train/plan/schemas.yaml had it" in done.stdout
    assert done.stdout.count("mesh data 1 x fsdp 8 x tensor 1") == len([f for f in files if "tiny" not in f.name])
    assert "does NOT fit" not in done.stdout


@pytest.mark.slow
def test_configs_whose_data_is_made_pass_a_dry_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    def run(program: str, name: str, *arguments: str) -> None:
        assert main([program, "--config", str(CONFIGS / f"{name}.yaml"), *arguments]) == 0

    for name, folder in (("reviews", "runs/demo"), ("preferences", "runs/preferences")):
        prepare = [sys.executable, str(ROOT / "data" / name / "prepare.py"), folder]
        subprocess.run(prepare, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=300)
    for program, name in (("sft", "sft"), ("reward", "reward")):  # what the demo's policies start from
        run(program, f"demo/{name}", "--max_steps", "1", "--optimizer.warmup_steps", "0")
    programs = {"demo/sft": "sft", "demo/gopo": "policy", "demo/grpo": "policy"}
    programs |= dict.fromkeys(("demo/reward", "demo/judge", "preferences/hh", "preferences/tldr"), "reward")
    made = {str(file.relative_to(CONFIGS).with_suffix("")) for d in EXCLUDED[:2] for file in (CONFIGS / d).glob("*")}
    assert programs.keys() == made - {"demo/generate"}  # of `eval generate`, which draws nothing dry
    for name, program in programs.items():
        run(program, name, "--dry_run")


@pytest.mark.parametrize("task", TASKS)
def test_shipped_rows_are_in_one_place_alone_and_have_the_columns_of_the_hub(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    splits = load_splits(parse(PolicyConfig, ["--config", f"configs/{task}/tiny_gopo.yaml"]))
    assert splits.train and splits.validation and splits.test and splits.duplicates == 0
    schemas = yaml.safe_load((ROOT / "train" / "plan" / "schemas.yaml").read_text())
    small, real = (written(CONFIGS / task / name)["data.train"] for name in ("tiny_gopo.yaml", "qwen3_8b_gopo.yaml"))
    assert set(load_rows(small)[0]) == set(schemas[real]["columns"])
    pairs, real = (
        written(CONFIGS / task / f"{name}.yaml")["data.train"] for name in ("tiny_reward", "reward_qwen3_8b")
    )
    assert set(load_rows(pairs)[0]) <= set(schemas[real]["columns"])


def test_the_shipped_tokenizer_writes_chatml() -> None:
    tokenizer = Tokenizer(ROOT / "data" / "tokenizer")
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b<|im_end|>"}]
    text = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render(turns) == text
    (ids,) = tokenizer.prompt_ids([turns])
    assert ids.count(tokenizer.eos_ids[0]) == 2 and tokenizer.hf.decode(ids) == text


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [*[(task, "gopo") for task in TASKS], ("ultrachat", "reward")])
def test_the_small_recipes_train(task: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.loop import train_policy
    from train.supervised.reward_model import train_reward_model

    monkeypatch.chdir(ROOT)
    more = ["--output_dir", str(tmp_path), "--log", '{"tensorboard": false, "progress": false}']
    arguments = ["--config", f"configs/{task}/tiny_{kind}.yaml", *more]
    if kind == "reward":
        train_reward_model(parse(RewardModelConfig, arguments))
    else:
        train_policy(parse(PolicyConfig, arguments))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert any(name.startswith("validation/") for name in rows[3])
