"""`train export` and `--show`: what leaves the project, and what the models see, through the real door."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from models.checkpoint import Checkpoints, load_model
from models.config import read_config, stored_dtype
from models.hf_weights import INDEX_FILE, load_pretrained, split
from models.tokenizer import Tokenizer
from train.__main__ import main, what_to_do
from train.config import ChatConfig, DataConfig, ExportConfig, PolicyConfig, RewardSpec, resolved


@pytest.fixture
def run(tmp_path: Path, tiny_reward_dir: Path) -> Path:
    """A run of `train reward` with two checkpoints, the second's parameters twice the first's."""
    directory = tmp_path / "run"
    model = load_pretrained(tiny_reward_dir)
    Tokenizer(tiny_reward_dir).save(directory / "tokenizer")
    checkpoints = Checkpoints(directory)
    for step, factor in ((10, 1.0), (20, 2.0)):
        params = jax.tree.map(lambda p, by=factor: p * by, split(model)[1])
        checkpoints.save(step, params, {"step": jnp.zeros(())}, {"model": model.config.to_hf(), "run": {}})
    checkpoints.close()
    return directory


def check_equal(directory: Path, checkpoint: str) -> None:
    exported, original = load_pretrained(directory), load_model(checkpoint)
    pad_id = Tokenizer(directory).pad_id  # without it transformers scores a reward model's texts one by one only
    assert exported.config == replace(original.config, pad_token_id=pad_id)
    jax.tree.map(np.testing.assert_array_equal, split(exported)[1], split(original)[1])


def test_a_step_or_the_newest_is_exported_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "newest")]) == 0
    assert re.search(
        r"newest: Qwen3ForSequenceClassification of \S*run@20, float32, .* in 1 file", capsys.readouterr().out
    )
    check_equal(tmp_path / "newest", f"{run}@20")
    assert main(["export", "--checkpoint", f"{run}@10", "--out", str(tmp_path / "first")]) == 0
    check_equal(tmp_path / "first", f"{run}@10")
    tokenizer = Tokenizer(tmp_path / "first")
    assert tokenizer.eos_ids == Tokenizer(run / "tokenizer").eos_ids
    assert json.loads((tmp_path / "first" / "generation_config.json").read_text())["pad_token_id"] == tokenizer.pad_id


def test_shards_and_dtype(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty: as good as new
    arguments = ["--out", str(out), "--dtype", "bfloat16", "--max_shard_size", "20KB"]
    assert main(["export", "--checkpoint", str(run), *arguments]) == 0
    assert (out / INDEX_FILE).is_file() and stored_dtype(out) == "bfloat16"
    assert all(file.stat().st_size < 30_000 for file in out.glob("*.safetensors"))
    exported, original = split(load_pretrained(out))[1], split(load_model(run))[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), exported, original)
    again = tmp_path / "again"  # a directory of ours or of others can be exported too, here in the dtype it is in
    assert main(["export", "--checkpoint", str(out), "--out", str(again)]) == 0
    assert stored_dtype(again) == "bfloat16" and read_config(again) == read_config(out)


def test_mistakes_write_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("precious")

    def refused(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["export", *arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    assert "expected a new or empty directory" in refused("--checkpoint", str(run), "--out", str(full))
    out = ("--out", str(tmp_path / "out"))
    assert "no such step; there are 10, 20" in refused("--checkpoint", f"{run}@15", *out)
    assert "no such directory" in refused("--checkpoint", str(tmp_path / "nowhere"), *out)
    assert "max_shard_size" in refused("--checkpoint", str(run), *out, "--max_shard_size", "large")
    assert "dtype" in refused("--checkpoint", str(run), *out, "--dtype", "int4")
    assert "checkpoint" in refused(*out)


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000), ("7", 7)])
def test_sizes(size: str, expected: int) -> None:
    assert ExportConfig(checkpoint="a", out="b", max_shard_size=size).max_shard_bytes == expected


# --show


def test_show_takes_a_number_or_none() -> None:
    def show(*arguments: str) -> tuple[list[str], str, dict[str, Any]]:
        command, *found = what_to_do(["policy", *arguments])
        assert command == "policy"
        return tuple(found)

    assert show("--config", "a", "--seed", "1") == (["--config", "a", "--seed", "1"], "policy", {})
    assert show("--config", "a", "--show") == (["--config", "a"], "show", {"count": 3})
    assert show("--show", "5", "--seed", "1") == (["--seed", "1"], "show", {"count": 5})
    assert show("--show=2", "--seed", "1") == (["--seed", "1"], "show", {"count": 2})
    assert show("--show", "--seed", "1") == (["--seed", "1"], "show", {"count": 3})
    for wrong in (["--show", "many"], ["--show=0"], ["--show="]):
        with pytest.raises(ValueError, match="--show: expected a number of at least 1"):
            show(*wrong)


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    for name in ("models.checkpoint.load_pretrained", "train.rewards.model.load_model", "train.build.load_model"):
        monkeypatch.setattr(name, refuse)


@pytest.mark.usefixtures("without_weights")
def test_show_prints_what_the_models_see(
    tmp_path: Path,
    tiny_policy_dir: Path,
    tiny_reward_dir: Path,
    policy_config: Callable[..., PolicyConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, directory in (("policy", tiny_policy_dir), ("judge", tiny_reward_dir)):
        shutil.copytree(directory, tmp_path / name)
        template = f"{{% for m in messages %}}[{name}] {{{{ m.content }}}}<|im_end|>{{% endfor %}}"
        template += "{% if add_generation_prompt %}[answer]{% endif %}"
        (tmp_path / name / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"number {i}", "completion": f"done {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = policy_config(
        tmp_path,
        data=DataConfig(train=str(tmp_path / "rows.jsonl")),
        chat=ChatConfig(text_as_chat=True),
        rewards=[RewardSpec(model=str(tmp_path / "judge"))],
        max_prompt_length=40,
    )
    settings = resolved(config)
    settings["model"]["path"] = str(tmp_path / "policy")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["policy", "--config", str(tmp_path / "config.yaml"), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    tokenizer = Tokenizer(tmp_path / "policy")
    assert "[policy] number 1<|im_end|>[answer]\n" in shown
    assert "[judge] number 1<|im_end|>[judge] (the completion)<|im_end|>\n" in shown
    assert "number 2" not in shown
    flat = " ".join(shown.split())
    for token in tokenizer.encode(["[policy] number 1<|im_end|>[answer]"])[0]:
        assert f"{token} {tokenizer.token_text(token)}".replace("  ", " ") in flat
    assert f"{tokenizer.eos_ids[0]} <|im_end|>" in shown
    assert not (tmp_path / "run").exists()
