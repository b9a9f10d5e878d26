"""Laws of several sources of rows: shares, orders, one source = none said, interrupted = uninterrupted; mistakes."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from models.checkpoint import Checkpoints
from models.tokenizer import Tokenizer
from train.__main__ import main
from train.config import (
    DataConfig,
    DataSource,
    ModelConfig,
    PolicyConfig,
    RewardModelConfig,
    RewardSpec,
    SftConfig,
    ValidationConfig,
    resolved,
)
from train.data.mix import Mix
from train.data.prompts import load_prompts, load_splits
from train.data.rows import batch_indices, hold_out
from train.loop import train_policy
from train.parse import parse
from train.pins import Pins
from train.run.directory import read_metrics
from train.run.files import write_jsonl
from train.supervised.program import load_examples, load_mixed_examples
from train.supervised.reward_model import reward_model_task
from train.supervised.sft import sft_task

WEIGHTS = [[1, 1], [2, 1], [0.7, 0.2, 0.1], [1e-6, 1, 1, 1], [5, 3, 2, 1, 1, 1, 0.333], [3.5]]

# The order


def drawn(mix: Mix, slots: int, count: int = 1, **settings: Any) -> list[int]:
    return [i for step in range(slots // count) for i in mix.indices(count, step=step, **{"seed": 0} | settings)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_the_weights_after_any_number_of_rows(weights: list[float]) -> None:
    K = len(weights)
    mix = Mix([str(k) for k in range(K)], [3 + k for k in range(K)], weights)
    shares, counts = np.array(weights) / sum(weights), np.zeros(K)
    for m, source in enumerate(mix.sources(drawn(mix, 600, 50)), 1):
        counts[source] += 1
        assert (abs(counts - m * shares) <= (1 + K * shares) / 2 + 1e-9).all()


@pytest.mark.parametrize("weights", WEIGHTS[:3], ids=str)
def test_each_source_has_epochs_of_its_own_and_batches_cut_one_stream(weights: list[float]) -> None:
    sizes = [4 + k for k in range(len(weights))]
    mix = Mix([str(k) for k in range(len(sizes))], sizes, weights)
    stream = drawn(mix, 240)
    owners, start = mix.sources(stream), 0
    for k, size in enumerate(sizes):
        own = [i - start for i, owner in zip(stream, owners, strict=True) if owner == k]
        start += size
        epochs = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 1 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1, "other orders"
    for count in (3, 16, 60):
        assert drawn(mix, 240, count) == stream
    for other in ({"seed": 1}, {"attempt": 1}):
        changed = drawn(mix, 240, **other)
        assert changed != stream and (mix.sources(changed) == owners).all()


@pytest.mark.parametrize("weights", [None, [2.0]])
def test_one_source_is_drawn_as_if_there_were_no_mix(weights: Any) -> None:
    mix = Mix(["a"], [7], weights)
    for step in range(9):
        for attempt in (0, 2):
            assert mix.indices(5, 3, step, attempt) == batch_indices(7, 5, 3, step, attempt)
    assert mix.metrics([0, 1], 9) == {}


def test_without_weights_the_sources_are_one_data_set() -> None:
    mix = Mix(["a", "b"], [4, 6])
    assert [mix.indices(5, 3, step) for step in range(4)] == [batch_indices(10, 5, 3, step) for step in range(4)]
    assert mix.metrics([0, 3, 4, 9], 30) == {
        "data/a/frac": 0.5,
        "data/b/frac": 0.5,
        "data/a/epoch": 3.0,
        "data/b/epoch": 3.0,
    }


def test_passes_are_counted_of_each_source() -> None:
    mix = Mix(["a", "b"], [2, 100], [1, 3])
    metrics = mix.metrics(mix.indices(8, 0, 4), 40)
    assert metrics == {"data/a/frac": 0.25, "data/b/frac": 0.75, "data/a/epoch": 5.0, "data/b/epoch": 0.3}


# The config


def test_names_columns_and_splits_of_sources() -> None:
    sources = [
        DataSource(source="x/train.jsonl", weight=1),
        DataSource(source="y/train.parquet", weight=1, columns={}),
        DataSource(source="trl-lib/tldr", weight=1, split="test"),
        DataSource(source="glob:data/*.jsonl", weight=1, columns={"prompt": "q"}, name="my.data"),
        DataSource(source="glob:more/*.jsonl", weight=1),
    ]
    data = DataConfig(train=sources, columns={"prompt": "question"})
    assert [source.name for source in data.sources] == ["train_1", "train_2", "tldr", "my.data", "more"]
    asked = {"prompt": "question"}
    assert [source.columns for source in data.sources] == [asked, {}, asked, {"prompt": "q"}, asked]
    assert [source.split for source in data.sources] == ["train", "train", "test", "train", "train"]
    assert data.weights == [1] * 5 and DataConfig(train="x").weights is None


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "expected at least one source, got none"),
        ([{"weight": 0}], r"\[0\].weight: expected a finite number above 0, got 0; leave out"),
        ([{"weight": 1}, {"weight": -1}], r"\[1\].weight: expected a finite number above 0, got -1"),
        ([{"weight": float("nan")}], "above 0, got nan"),
        ([{"weight": float("inf")}], "above 0, got inf"),
        ([{"weight": 1}, {}], "expected a weight of every source, or of none .* got none of s1"),
        ([{"name": "a/b"}], r"\[0\].name: expected letters, digits"),
        ([{"name": "a"}, {"name": "a"}], "the sources' names must differ, got 'a' twice"),
    ],
)
def test_impossible_mixes_are_refused(sources: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=f"^data.train.*{words}"):
        DataConfig(train=[DataSource(source=f"s{i}", **given) for i, given in enumerate(sources)])


NEEDED = ["--model.path=x", "--output_dir=x", "--max_steps=1"]
ONE, TWO = DataSource(source="a.jsonl", weight=2.0), DataSource(source="b.jsonl", weight=1.0, columns={"prompt": "q"})
TYPED = ["{source: a.jsonl, weight: 2}", "{source: b.jsonl, weight: 1, columns: {prompt: q}}"]


def sft_data(*arguments: str) -> Any:
    return parse(SftConfig, [*NEEDED, *arguments]).data.train


def test_a_mix_on_the_command_line_and_in_files(tmp_path: Path) -> None:
    file, other = tmp_path / "x.yaml", tmp_path / "y.yaml"
    file.write_text(f"data:\n  train: [{', '.join(TYPED)}]\n")
    other.write_text("data.train: [{source: a.jsonl}]\n")
    assert sft_data("--data.train", *TYPED, "--seed", "3") == [ONE, TWO]
    assert sft_data("--data.train", f"[{', '.join(TYPED)}]") == sft_data(f"--data.train=[{TYPED[0]},{TYPED[1]}]")
    assert sft_data("--config", str(file)) == [ONE, TWO]
    assert sft_data("--data.train", TYPED[0]) == [ONE]
    alone = [DataSource(source="a.jsonl")]  # nothing is left of the list before
    assert sft_data("--config", str(file), "--config", str(other)) == alone
    assert sft_data("--config", str(file), "--data.train", "[{source: a.jsonl}]") == alone
    assert sft_data("--config", str(file), "--data.train", "x.jsonl") == "x.jsonl"
    config = parse(SftConfig, [*NEEDED, "--config", str(file)])
    file.write_text(yaml.safe_dump(json.loads(json.dumps(resolved(config)))))
    assert parse(SftConfig, ["--config", str(file)]) == config


@pytest.mark.parametrize(
    "name", ["a b", "[12]/rows.jsonl", "{a}.jsonl", "123", "null", "true", "a: b", "#x", "~", "[x]"]
)
def test_a_name_is_a_text_as_ever(name: str) -> None:
    assert sft_data("--data.train", name) == sft_data(f"--data.train={name}") == name
    with pytest.raises(ValueError, match="unexpected 'more'; expected options"):
        sft_data("--data.train", name, "more")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("5", r"data.train: expected text\|\{key: value\} ..., got 5"),
        ("{source: a}", r"data.train: expected text\|\{key: value\} ..., got \{'source': 'a'\}"),
        ("[a, b]", "data.train: expected 'key: value' lines, got 'a'"),
        ("[{sauce: a}]", r"unknown key 'data.train\[\].sauce'; did you mean 'data.train\[\].source'"),
        ("[{source: a, weight: much}]", r"data.train\[\].weight: expected number\|null, got much"),
        ("[{weight: 1}]", r"expected --data.train\[\].source; "),
        ("[]", "data.train: expected at least one source, got none"),
    ],
)
def test_mistakes_in_a_mix_are_one_line(value: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"data:\n  train: {value}\n")
    with pytest.raises(ValueError, match=words) as caught:
        sft_data("--config", str(tmp_path / "x.yaml"))
    assert "\n" not in str(caught.value)


# Rows


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    """Ten and five rows, the second with another name for the prompt and a column of its own."""
    rows = [{"prompt": f"A{i}", "wanted": "x", "completion": "a"} for i in range(10)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"question": f"B{i}", "level": i, "completion": "b"} for i in range(5)])
    return [
        DataSource(source=str(tmp_path / "a.jsonl"), weight=1),
        DataSource(source=str(tmp_path / "b.jsonl"), weight=3, columns={"prompt": "question"}),
    ]


def test_a_policys_batches_have_their_shares_and_columns(
    policy_config: Callable[..., PolicyConfig], tiny_tokenizer_dir: Path, tmp_path: Path, sources: list[DataSource]
) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)

    def load(data: DataConfig, **settings: Any) -> Any:
        return load_prompts(policy_config(tmp_path, data=data, **settings), tokenizer)

    prompts, validation = load(DataConfig(train=sources))
    assert len(prompts) == len(validation) + 11 == 15, "validation is a sample of all rows, without weights"
    seen: Counter[str] = Counter()
    for step in range(10):
        rows = prompts.batch(0, step, 4)
        seen.update(row["prompt"][0] for row in rows)
        columns = prompts.columns(rows)
        assert [value is None for value in columns["wanted"]] == [row["prompt"][0] == "B" for row in rows]
        assert [value is None for value in columns["level"]] == [row["prompt"][0] == "A" for row in rows]
        rewards_PG = np.array([[1.0, 2.0] if row["prompt"][0] == "A" else [5.0, np.nan] for row in rows])
        assert prompts.source_metrics(rows, rewards_PG, 4 * step + 4) == {
            "data/a/frac": 0.25,
            "data/b/frac": 0.75,
            "data/a/epoch": (step + 1) / 10,
            "data/b/epoch": 3 * (step + 1) / 5,
            "data/a/reward": 1.5,
            "data/b/reward": 5.0,
        }
    assert seen == {"A": 10, "B": 30}
    assert [row["prompt"] for row in prompts.first(2)] == ["A0", "A1", "B0", "B1"]

    whole, _ = load(DataConfig(train=sources[0].source))
    for weight in (None, 5.0):  # one source in a list = its name
        listed, _ = load(DataConfig(train=[replace(sources[0], weight=weight)]))
        for step in range(5):
            assert listed.batch(3, step, 4) == whole.batch(3, step, 4)
        assert listed.source_metrics(listed.rows[:1], np.zeros((1, 2)), 4) == {}


def test_rows_are_held_out_of_all_sources_alike(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, sources: list[DataSource]
) -> None:
    data = DataConfig(train=sources, validation_rows=6)
    splits = load_splits(policy_config(tmp_path, data=data))
    names = [*(f"A{i}" for i in range(10)), *(f"B{i}" for i in range(5))]
    for rows, indices in zip((splits.train, splits.validation), hold_out(15, 6, 0), strict=True):
        assert [row["prompt"] for row in rows] == [names[i] for i in indices]
    assert splits.owners == [int(row["prompt"][0] == "B") for row in splits.train]
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"B{i}"} for i in range(5)])
    data = DataConfig(
        train=sources, test=str(tmp_path / "test.jsonl"), drop_duplicates=True, validation=sources[0].source
    )
    config = policy_config(tmp_path, data=replace(data, validation=str(tmp_path / "test.jsonl")))
    with pytest.raises(ValueError, match="^data.train: b has a weight, but no row to train on"):
        load_prompts(config, Tokenizer(config.model.tokenizer_path))
    unweighted = [replace(source, weight=None) for source in sources]
    config = replace(config, data=replace(config.data, train=unweighted))
    prompts, _ = load_prompts(config, Tokenizer(config.model.tokenizer_path))
    assert {row["prompt"][0] for row in prompts.rows} == {"A"}


def test_every_source_is_pinned(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, sources: list[DataSource], capsys: Any
) -> None:
    """Rows that are added to one stay out; rows that change are refused by the source's name."""
    config = policy_config(tmp_path, data=DataConfig(train=sources), validation=ValidationConfig(prompts=0))
    tokenizer, pins = Tokenizer(config.model.tokenizer_path), Pins(config)
    started, _ = load_prompts(config, tokenizer, pins)
    assert {"data.train[0]", "data.train[1]"} <= pins.pins.keys()
    checkpoints = Checkpoints(Path(config.output_dir))
    checkpoints.save(1, {"x": np.zeros(1)}, {"step": np.zeros(())}, {"run": {}, "pins": pins.pins})
    checkpoints.close()
    with open(sources[0].source, "a") as file:
        file.write('{"prompt": "A10", "wanted": "x", "completion": "a"}\n')
    prompts, _ = load_prompts(config, tokenizer, Pins(config))
    assert prompts.rows == started.rows and prompts.batch(0, 7, 4) == started.batch(0, 7, 4)
    assert "data.train[0]: " in capsys.readouterr().out
    write_jsonl(Path(sources[1].source), [{"question": "B", "completion": "b"}] * 5)
    with pytest.raises(ValueError, match=r"^data.train\[1\]: .*b.jsonl: has changed since"):
        load_prompts(config, tokenizer, Pins(config))


@pytest.mark.parametrize("packing", [False, True])
def test_sft_mixes_rows_or_packed_rows(
    packing: bool, tiny_policy_dir: Path, tmp_path: Path, sources: list[DataSource]
) -> None:
    def config(train: Any, **settings: Any) -> SftConfig:
        data, model = DataConfig(train=train, **settings), ModelConfig(path=str(tiny_policy_dir))
        return SftConfig(output_dir="x", model=model, data=data, max_steps=1, packing=packing, max_length=16)

    tokenizer = Tokenizer(tiny_policy_dir)

    def owners_of(rows: list[Any]) -> list[set[str]]:
        examples = [row if packing else [row] for row in rows]
        return [{tokenizer.hf.decode(ids)[0] for ids, _ in row} for row in examples]

    mixed = config(sources)
    rows, _, mix = load_mixed_examples(mixed, sft_task(mixed), tokenizer)
    assert all(len(letters) == 1 for letters in owners_of(rows)), "a packed row is one source's"
    batch = [rows[i] for i in mix.indices(8, 0, 3)]
    assert [letters == {"A"} for letters in owners_of(batch)].count(True) == 2
    joined = tmp_path / "ab.jsonl"
    together = [json.loads(line) for source in sources for line in Path(source.source).read_text().splitlines()]
    write_jsonl(
        joined,
        [{"prompt": row.get("prompt", row.get("question")), "completion": row["completion"]} for row in together],
    )
    for settings in ({}, {"validation_rows": 4}):
        plain = config([replace(source, weight=None) for source in sources], **settings)
        expected = load_examples(config(str(joined), **settings), sft_task(plain), tokenizer)
        assert load_examples(plain, sft_task(plain), tokenizer) == expected, "without weights: one file"


def test_comparisons_of_both_kinds_are_mixed(tiny_reward_dir: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"Q{i}", "chosen": "a", "rejected": "b"} for i in range(4)])
    groups = [{"prompt": f"G{i}", "completions": ["a", "b", "c"], "scores": [3, 2, 1]} for i in range(4)]
    write_jsonl(tmp_path / "groups.jsonl", groups)
    train = [DataSource(source=str(tmp_path / f"{name}.jsonl"), weight=1) for name in ("pairs", "groups")]
    config = RewardModelConfig(
        output_dir="x", model=ModelConfig(path=str(tiny_reward_dir)), data=DataConfig(train=train), max_steps=1
    )
    task, tokenizer = reward_model_task(config), Tokenizer(tiny_reward_dir)
    examples, _, mix = load_mixed_examples(config, task, tokenizer)
    batch = [examples[i] for i in mix.indices(4, 0, 0)]
    assert sorted(len(example.rows) for example in batch) == [2, 2, 3, 3]
    assert task.collate(batch, tokenizer, 64)["tokens_PGT"].shape[:2] == (4, 4)


# Runs


@pytest.fixture
def mixed_run(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, sources: list[DataSource]
) -> Callable[..., PolicyConfig]:
    """mixed_run(name, max_steps): the config of a run that takes a second, in tmp_path / name."""

    def make(name: str, max_steps: int) -> PolicyConfig:
        return policy_config(
            tmp_path,
            output_dir=str(tmp_path / name),
            data=DataConfig(train=sources),
            rewards=[RewardSpec(function="length", options={"target": 4})],
            validation=ValidationConfig(prompts=0),
            max_steps=max_steps,
            num_generations=2,
            max_completion_length=2,
        )

    return make


def test_a_run_has_the_metrics_of_its_sources(mixed_run: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    train_policy(mixed_run("run", 1))
    (row,) = read_metrics(tmp_path / "run")
    assert (row["data/a/frac"], row["data/b/frac"], row["data/b/epoch"]) == (0.25, 0.75, 0.6)
    assert row["data/a/reward"] / 4 + row["data/b/reward"] * 3 / 4 == pytest.approx(row["reward"])


@pytest.mark.slow
def test_a_mixed_run_that_goes_on_equals_one_that_was_never_cut(
    mixed_run: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    train_policy(mixed_run("run", 3))
    for steps in (1, 3):
        train_policy(mixed_run("cut", steps))
    assert read_metrics(tmp_path / "cut", clock=False) == read_metrics(tmp_path / "run", clock=False)


def test_a_mix_is_inspected_and_planned(
    policy_config: Callable[..., PolicyConfig], tmp_path: Path, sources: list[DataSource], capsys: Any
) -> None:
    config = policy_config(
        tmp_path, data=DataConfig(train=sources), rewards=[RewardSpec(function="length", options={"target": 4})]
    )
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved(config)))))
    assert main(["policy", "--config", str(tmp_path / "x.yaml"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "train, a: " in printed and "drawn by weight: a 25.0%, b 75.0%" in printed and "of 15 rows" in printed
    assert main(["inspect", "policy", "--config", str(tmp_path / "x.yaml"), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "A0" in printed and "B0" in printed
