"""Laws of what goes in and what is written down: the order of the data, rows, prompts, the config, the metrics."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr

from models.tokenizer import Tokenizer
from train.config import ChatConfig, DataConfig, PolicyConfig, RewardSpec, SupervisedConfig, resolved
from train.data.chats import as_chat, normalize_prompts, prompt_and_answer
from train.data.prompts import Prompts, load_prompts
from train.data.rows import batch_indices, load_rows, require_columns
from train.parse import parse
from train.run.directory import read_metrics
from train.run.files import write_jsonl
from train.run.metrics import mean_metrics, rollout_metrics
from train.supervised import reward_model, sft

# Order


@pytest.mark.parametrize(("size", "count"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 2)])
def test_each_epoch_is_a_permutation(size: int, count: int) -> None:
    steps = [batch_indices(size, count, seed=0, step=step) for step in range(5 * size)]
    assert all(len(step) == count for step in steps)
    stream = np.array(steps).reshape(-1, size)  # size divides 5 * size * count
    np.testing.assert_array_equal(np.sort(stream, 1), np.tile(np.arange(size), (len(stream), 1)))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    size, count = 30, 10

    def epoch(number: int, seed: int) -> list[int]:
        return [i for step in range(3 * number, 3 * number + 3) for i in batch_indices(size, count, seed, step)]

    orders = [epoch(number, seed) for number in range(3) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert [epoch(number, seed) for number in range(3) for seed in range(3)] == orders
    for step in (5, 0, 2):  # in any order, and alone
        assert batch_indices(size, count, 1, step) == epoch(step // 3, 1)[step % 3 * count :][:count]
    finer = [i for step in range(6) for i in batch_indices(size, 5, 1, step)]
    assert finer == epoch(0, 1), "the batch size cuts the same stream"


# Rows

ROWS = [{"prompt": "Good food", "wanted": 1}, {"prompt": "Schön – sí", "wanted": 2}]


def test_rows_of_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, *, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert load_rows("someone/something", "test") == ROWS
    Path("someone/something").mkdir(parents=True)  # without data, so that it does not hide the Hub's
    assert load_rows("someone/something", "test") == ROWS
    assert asked == [("someone/something", "test"), ("hf://datasets/someone/something", "test")]
    Path("someone/something/data").mkdir()
    Path("someone/something/data/train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="someone/something: is a directory with someone/something/data/train.parquet"):
        load_rows("someone/something", "test")


@pytest.mark.parametrize(
    "value", [None, "", [], 5, 0.5, {}, ["text"], [{"role": "user"}], [{"role": "user", "content": "a"}, "b"]]
)
def test_columns_hold_text_or_messages(value: Any) -> None:
    messages = [{"role": "user", "content": "a"}]
    require_columns([{"x": "text"}, {"x": messages}], "file", "x")
    with pytest.raises(ValueError, match="file: row 3"):
        require_columns([{"x": "text"}, {"x": messages}, {"x": value}], "file", "x")


# Prompts


def test_prompts_that_fit_are_kept_in_order_and_the_others_counted(
    policy_config: Callable[..., PolicyConfig], tiny_tokenizer_dir: Path, tmp_path: Path, sentences: list[str]
) -> None:
    tokenizer, file = Tokenizer(tiny_tokenizer_dir), tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"question": text, "number": i} for i, text in enumerate(sentences)]
    lengths = [len(tokenizer.encode([text])[0]) for text in sentences]
    rows[lengths.index(min(lengths))]["extra"] = "x"
    write_jsonl(file, rows)
    limit = sorted(lengths)[len(lengths) // 2]
    config = policy_config(
        tmp_path, max_prompt_length=limit, data=DataConfig(train=str(file), prompt_column="question")
    )
    prompts = Prompts(rows, str(file), config, tokenizer)
    fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    assert limit in lengths and 0 < len(fitting) < len(rows)
    assert prompts.rows == fitting and len(prompts) == len(fitting)
    assert prompts.too_long == len(rows) - len(fitting)

    batch = prompts.batch(seed=3, step=4, count=5)
    assert batch == [fitting[i] for i in batch_indices(len(fitting), 5, 3, 4)]
    assert prompts.prompts(batch) == [row["question"] for row in batch]
    columns = {name: [row.get(name) for row in batch] for name in ("extra", "number")}
    assert prompts.columns(batch) == columns, "what a row does not have is None"
    assert prompts.columns(batch, slice(1, 3)) == {name: values[1:3] for name, values in columns.items()}


# The config

SETTINGS: dict[str, Any] = {
    "output_dir": "runs/x",
    "model": {"path": "somewhere"},
    "data": {"train": "x.jsonl"},
    "rewards": [{"function": "a.b", "weight": 2}, {"model": "runs/rm"}],
    "max_steps": 5,
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "advantage_options": {"ties": "ordinal"},
}


def test_command_line_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(SETTINGS))
    arguments = ["--max_steps", "9", "--optimizer.learning_rate=2e-6"]
    for order in (["--config", str(file), *arguments], [*arguments, "--config", str(file)]):
        config = parse(PolicyConfig, order)
        assert isinstance(config, PolicyConfig)
        assert (config.max_steps, config.optimizer.learning_rate) == (9, 2e-6)  # the command line
        assert (config.output_dir, config.optimizer.warmup_steps) == ("runs/x", 2)  # the file
        assert config.advantage_options == {"ties": "ordinal"}
        defaults = {field.name: field.default for field in dataclasses.fields(PolicyConfig)}
        assert (config.num_generations, config.top_p) == (defaults["num_generations"], defaults["top_p"])
        assert config.rewards == [RewardSpec(function="a.b", weight=2.0), RewardSpec(model="runs/rm")]
        assert [spec.label for spec in config.rewards] == ["b", "rm"]


@pytest.mark.parametrize("where", ["command line", "another file"])
def test_a_list_of_rewards_replaces_the_one_before(tmp_path: Path, where: str) -> None:
    """The first is what the tiny configs' headers say."""
    file, more = tmp_path / "x.yaml", tmp_path / "more.yaml"
    for before in ({"function": "length", "options": {"target": 5}, "weight": 2}, {"model": "runs/rm", "name": "a"}):
        for after in ({"model": "runs/tldr/tiny_reward"}, {"function": "length"}):
            file.write_text(yaml.safe_dump(SETTINGS | {"rewards": [before]}))
            more.write_text(yaml.safe_dump({"rewards": [after]}))
            arguments = {
                "command line": ["--rewards", json.dumps([after])],
                "another file": ["--config", str(more)],
            }[where]
            config = parse(PolicyConfig, ["--config", str(file), *arguments, "--max_steps", "3"])
            assert config.rewards == [RewardSpec(**after)] and config.max_steps == 3


def test_a_resolved_config_is_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"mesh": {"rules": {"prompt": ["data"], "group": ["fsdp"]}}}))
    config = parse(PolicyConfig, ["--config", str(file)])
    file.write_text(yaml.safe_dump(resolved(config)))
    assert parse(PolicyConfig, ["--config", str(file)]) == config


def test_an_architecture_in_a_file(tmp_path: Path) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    file = tmp_path / "x.yaml"
    model = {"architecture": sizes, "tokenizer": "somewhere"}
    file.write_text(yaml.safe_dump({"output_dir": "x", "model": model, "data": {"train": "x"}, "max_steps": 1}))
    config = parse(SupervisedConfig, ["--config", str(file), "--model.architecture.hidden_size", "16"])
    found = {name: getattr(config.model.architecture, name) for name in sizes}
    assert found == sizes | {"hidden_size": 16}
    file.write_text(yaml.safe_dump(resolved(config)))
    assert parse(SupervisedConfig, ["--config", str(file)]) == config


# Metrics


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    rows = [{"step": 0, "reward": 0.5}, {"step": 1, "reward": -1.25}]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    assert read_metrics(tmp_path) == rows
    whole = (tmp_path / "metrics.jsonl").read_text()
    last = json.dumps({"step": 2, "reward": 3.0})
    for length in range(1, len(last)):
        (tmp_path / "metrics.jsonl").write_text(whole + last[:length])
        assert read_metrics(tmp_path) == rows


def test_divide_has_no_mean_of_nothing() -> None:
    means = mean_metrics({"a": (jnp.float32(6), jnp.float32(4)), "b": (jnp.float32(0), jnp.float32(0))})
    assert means["a"] == 6 / 4 and math.isnan(means["b"])


def rollouts(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards with ties and NaN, lengths with ties; among them a constant group and groups with 0 and 1 scores."""
    rng = np.random.default_rng(seed)
    rewards_PG = np.round(rng.normal(size=(9, 5)), 1).astype(np.float32)
    lengths_PG = rng.integers(1, 6, (9, 5))
    rewards_PG[rng.random(rewards_PG.shape) < 0.2] = np.nan
    rewards_PG[0], rewards_PG[1], rewards_PG[2] = 1.5, np.nan, [np.nan] * 4 + [1.0]
    rewards_PG[3], lengths_PG[4] = [1, 1, 2, 2, np.nan], 3
    return rewards_PG, lengths_PG, rng.random((9, 5)) < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_rollout_metrics_are_their_formulas(seed: int) -> None:
    rewards_PG, lengths_PG, finished_PG = rollouts(seed)
    stds, ties, flat, correlations = [], [], [], []
    for rewards_G, lengths_G in zip(rewards_PG, lengths_PG, strict=True):
        valid_G = ~np.isnan(rewards_G)
        r, n = rewards_G[valid_G], lengths_G[valid_G]
        if len(r) < 2:
            continue
        stds.append(r.std(ddof=1))
        ties.append(np.mean([r[i] == r[j] for i in range(len(r)) for j in range(i)]))
        flat.append(len(set(r)) == 1)
        if len(set(r)) > 1 and len(set(n)) > 1:
            correlations.append(spearmanr(r, n).statistic)
    assert len(stds) < len(rewards_PG) and any(flat) and len(correlations) < len(stds) and 0 < np.mean(ties) < 1
    expected = {
        "reward": np.nanmean(rewards_PG),
        "reward_std": np.mean(stds),
        "frac_reward_zero_std": np.mean(flat),
        "frac_reward_unscorable": np.isnan(rewards_PG).mean(),
        "rank/tie_frac": np.mean(ties),
        "rank/all_tied_frac": np.mean(flat),
        "rank/length_corr": np.mean(correlations),
        "completions/mean_length": lengths_PG.mean(),
        "completions/min_length": lengths_PG.min(),
        "completions/max_length": lengths_PG.max(),
        "completions/mean_terminated_length": lengths_PG[finished_PG].mean(),
        "completions/clipped_ratio": (~finished_PG).mean(),
    }
    metrics = rollout_metrics(rewards_PG, lengths_PG, finished_PG)
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_what_does_not_exist_is_nan() -> None:
    lengths_PG = np.ones((2, 3), int)
    metrics = rollout_metrics(np.full((2, 3), np.nan, np.float32), lengths_PG, np.zeros((2, 3), bool))
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert metrics["frac_reward_unscorable"] == metrics["completions/clipped_ratio"] == 1
    scores = {"reward", "reward_std", "frac_reward_zero_std"} | {f"rank/{n}" for n in ("tie_frac", "all_tied_frac")}
    assert undefined == scores | {"rank/length_corr", "completions/mean_terminated_length"}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_every_form_of_a_comparison_is_the_same_conversation(side: str) -> None:
    asked, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    expected = ([asked], "So.")
    assert prompt_and_answer({"prompt": [asked], side: [answer]}, side, "file") == expected
    assert prompt_and_answer({"prompt": "Why?", side: [answer]}, side, "file") == expected
    assert prompt_and_answer({side: [asked, answer]}, side, "file") == expected
    assert prompt_and_answer({"prompt": "Why?", side: "So."}, side, "file") == ("Why?", "So.")
    assert prompt_and_answer({side: "So."}, side, "file") == ("", "So.")


# Chats

ASKED = [{"role": "user", "content": "Good food?"}]
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_system_prompt_or_none_and_text_in_a_users_message() -> None:
    assert as_chat("text", ChatConfig(), "f") == "text"
    assert as_chat("text", ChatConfig(text_as_chat=True), "f") == [{"role": "user", "content": "text"}]
    assert as_chat(ASKED, ChatConfig(), "f") == ASKED
    assert as_chat(ASKED, ChatConfig(system_prompt="Be brief."), "f") == [SYSTEM, *ASKED]
    empty = as_chat("text", ChatConfig(system_prompt="", text_as_chat=True), "f")
    assert empty == [{"role": "system", "content": ""}, {"role": "user", "content": "text"}]
    assert as_chat([SYSTEM, *ASKED], ChatConfig(text_as_chat=True), "f") == [SYSTEM, *ASKED]


@pytest.mark.parametrize(
    ("prompt", "named"), [("text", "row 3: chat.system_prompt .* plain text"), ([SYSTEM, *ASKED], "row 3: .*their own")]
)
def test_a_system_prompt_that_has_no_place_is_refused(prompt: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        normalize_prompts(
            [{"x": ASKED}, {"x": ASKED}, {"x": prompt}], "file", "x", ChatConfig(system_prompt="Be brief.")
        )


def test_all_programs_see_the_same_conversation(
    chatty: Tokenizer, tmp_path: Path, policy_config: Callable[..., PolicyConfig]
) -> None:
    """The policy's prompt, what it learns in SFT, and what the reward model is trained on begin alike."""
    chat = ChatConfig(system_prompt="Be brief.", text_as_chat=True)
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Good food?"}) + "\n")
    config = policy_config(tmp_path, chat=chat, max_prompt_length=64, data=DataConfig(train=str(file)))
    prompts, _ = load_prompts(config, chatty)
    (prompt,) = prompts.prompts(prompts.rows)
    assert prompt == [SYSTEM, *ASKED]
    asked = "system:Be brief.<|im_end|>user:Good food?<|im_end|>"
    assert chatty.render(prompt) == asked + "assistant:"
    row = {"prompt": "Good food?", "completion": "Yes<|im_end|>", "chosen": "Yes", "rejected": "No", "margin": 0.5}
    ((ids, learned_from),) = sft.encode_examples([row], chatty, "file", chat)
    assert chatty.encode([asked + "assistant:"]) == [ids[:learned_from]]
    assert ids.count(chatty.eos_ids[0]) == 3, "the prompt's two and the one that is learned"
    assert chatty.hf.decode(ids[learned_from:]) == "Yes<|im_end|>"
    (((chosen, rejected), scores, margin),) = reward_model.encode_comparisons([row], chatty, "file", chat)
    assert scores[0] > scores[1]
    assert chatty.hf.decode(chosen) == asked + "assistant:Yes<|im_end|>" and margin == 0.5
    assert chatty.hf.decode(rejected) == asked + "assistant:No<|im_end|>"


def test_text_that_is_learned_whole_has_no_system_prompt(chatty: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the column 'text' is learned as it is"):
        sft.encode_examples([{"text": "Good food."}], chatty, "file", ChatConfig(system_prompt="Be brief."))


def test_whole_texts_of_a_comparison_keep_their_special_tokens(chatty: Tokenizer) -> None:
    row = {"chosen": "user:Q<|im_end|>assistant:A<|im_end|>", "rejected": "user:Q<|im_end|>assistant:B<|im_end|>"}
    (((chosen, _), _, _),) = reward_model.encode_comparisons([row], chatty, "file", ChatConfig())
    assert chosen.count(chatty.eos_ids[0]) == 2


def test_a_completion_of_several_messages_is_learned_at_its_end(chatty: Tokenizer) -> None:
    turns = [{"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    row = {"prompt": ASKED, "completion": [*turns, {"role": "assistant", "content": "C"}]}
    ((ids, learned_from),) = sft.encode_examples([row], chatty, "file", ChatConfig())
    asked = "user:Good food?<|im_end|>assistant:A<|im_end|>user:B<|im_end|>assistant:"
    assert chatty.hf.decode(ids[:learned_from]) == asked and chatty.hf.decode(ids[learned_from:]) == "C<|im_end|>"
    for encode, rows in (
        (sft.encode_examples, [{"prompt": ASKED, "completion": turns}]),
        (reward_model.encode_comparisons, [{"prompt": ASKED, "chosen": turns, "rejected": turns}]),
    ):
        with pytest.raises(ValueError, match="file: row 1: .* end with the assistant's, got 'user'"):
            encode(rows, chatty, "file", ChatConfig())


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"chosen": "a", "rejected": "b"}, "row 1: chat.text_as_chat is set, but there is no prompt"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "row 1: 'prompt': expected text"),
        ({"prompt": "\ud800", "chosen": "a", "rejected": "b"}, "row 1: 'prompt': .*surrogate"),
    ],
)
def test_a_comparison_that_cannot_be_asked_is_refused(chatty: Tokenizer, row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        reward_model.encode_comparisons([row], chatty, "file", ChatConfig(text_as_chat=True))
