"""Laws of what is trained on and validated on: columns, what is held out, what is there twice, ids that are kept."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from models.tokenizer import Tokenizer
from train.__main__ import main
from train.build import make_tokenizer
from train.config import (
    ChatConfig,
    DataConfig,
    PolicyConfig,
    RewardModelConfig,
    RewardSpec,
    SftConfig,
    ValidationConfig,
    resolved,
)
from train.data import token_cache
from train.data.chats import normalize_prompts, prompt_and_answer
from train.data.prompts import load_prompts, load_splits, overlapping_rows
from train.data.rows import hold_out, load_rows, sample_indices
from train.plan.dry_run import SCHEMAS, look_up_schema, schema_from_card
from train.run.files import write_jsonl
from train.supervised import sft
from train.supervised.program import SupervisedTask, load_examples

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}

# Columns


def test_columns_have_our_names(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b", "prompt": "other", "n": 1}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    found = load_rows(str(tmp_path / "x.jsonl"), columns={"prompt": "question", "completion": "answer"})
    assert found == [{"prompt": "a", "completion": "b", "n": 1}]
    swapped = load_rows(str(tmp_path / "x.jsonl"), columns={"question": "answer", "answer": "question"})
    assert (swapped[0]["question"], swapped[0]["answer"]) == ("b", "a")


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"question": "a"}, {"query": "b", "n": 1}])
    with pytest.raises(ValueError, match="row 2 has no 'question', which data.columns takes as 'prompt'; .* query, n"):
        load_rows(str(tmp_path / "x.jsonl"), columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prompt_column": "q", "columns": {"prompt": "q"}}, "prompt_column or columns.prompt"),
        ({"validation": "x", "validation_rows": 5}, "validation .* or validation_rows"),
        ({"validation_rows": -1}, "validation_rows: expected at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(train="x", **settings)


def test_what_is_for_policies_is_refused_elsewhere(policy_config: Callable[..., PolicyConfig], tmp_path: Path) -> None:
    policy = policy_config(tmp_path)
    for settings in ({"test": "x"}, {"drop_duplicates": True}):
        with pytest.raises(ValueError, match="are for train policy"):
            RewardModelConfig(output_dir="x", model=policy.model, data=DataConfig(train="x", **settings), max_steps=1)


# Conversations


def test_a_conversation_is_asked_without_its_answer() -> None:
    turns = [USER, ANSWER, USER]
    for prompt in (turns, [*turns, ANSWER]):
        assert normalize_prompts([{"x": prompt}], "file", "x", ChatConfig())[0]["x"] == turns
    with pytest.raises(ValueError, match="file: row 1: .* the assistant's alone"):
        normalize_prompts([{"x": [ANSWER]}], "file", "x", ChatConfig())


@pytest.mark.parametrize("prompt", ["Why?", " Why?\n", [USER], None])
def test_a_prompt_that_is_in_the_answer_again_is_asked_once(prompt: Any) -> None:
    assert prompt_and_answer({"prompt": prompt, "chosen": [USER, ANSWER]}, "chosen", "file") == ([USER], "So.")


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("Why?", [SYSTEM, USER]),
        ([USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER]),
        (None, [SYSTEM, USER]),
        ("Why?", [SYSTEM]),
        ([SYSTEM], [USER]),
    ],
)
def test_system_messages_come_first_and_once(prompt: Any, before: list[dict[str, str]]) -> None:
    row = {"prompt": prompt, "chosen": [*before, ANSWER]}
    assert prompt_and_answer(row, "chosen", "file") == ([SYSTEM, USER], "So.")


def test_a_whole_conversation_is_learned_from_its_last_message(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    tokenizer.hf.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    expected = sft.encode_examples(
        [{"prompt": [USER, ANSWER, USER], "completion": "So."}], tokenizer, "file", ChatConfig()
    )
    for extra in ({}, {"prompt": "Why?"}):
        write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER, ANSWER, USER, ANSWER]} | extra])
        told = [{"messages": [USER, ANSWER, USER, ANSWER], "prompt": "something else"}]
        assert sft.encode_examples(told, tokenizer, "file", ChatConfig()) == expected
        rows = load_rows(str(tmp_path / "x.jsonl"), columns={"completion": "messages"})
        assert sft.encode_examples(rows, tokenizer, "file", ChatConfig()) == expected
    with pytest.raises(ValueError, match="row 2 has no 'prompt'"):
        sft.encode_examples([{"completion": [USER, ANSWER]}, {"completion": "So."}], tokenizer, "file", ChatConfig())


# What is held out


@pytest.mark.parametrize(("count", "rows"), [(30, 7), (2, 1), (1000, 500), (5, 0)])
def test_what_is_held_out_is_not_kept_and_depends_on_the_seed_alone(count: int, rows: int) -> None:
    kept, out = hold_out(count, rows, seed=3)
    assert len(out) == rows and sorted(kept + out) == list(range(count))
    assert kept == sorted(kept) and out == sorted(out)
    assert hold_out(count, rows, seed=3) == (kept, out)
    if rows > 5:
        assert hold_out(count, rows, seed=4) != (kept, out)
        assert out != list(range(rows)), "the first so many are no sample"


def test_more_than_there_is_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="data.validation_rows: expected fewer than the 5 rows that there are, got 5"):
        hold_out(5, 5, 0)
    assert sample_indices(5, 5, 0) == sample_indices(5, 9, 1) == list(range(5)), "where all are taken, in their order"


def test_validation_is_cut_off_train_or_sampled(
    policy_config: Callable[..., PolicyConfig], tiny_tokenizer_dir: Path, tmp_path: Path, prompts_file: Path
) -> None:
    tokenizer, rows = Tokenizer(tiny_tokenizer_dir), load_rows(str(prompts_file))

    def parts(**settings: Any) -> tuple[list[Any], list[Any]]:
        config = policy_config(
            tmp_path, data=DataConfig(train=str(prompts_file), **settings), validation=ValidationConfig(prompts=4)
        )
        return tuple(prompts.rows for prompts in load_prompts(config, tokenizer))  # type: ignore[return-value]

    train, validation = parts(validation_rows=6)
    kept, out = hold_out(len(rows), 6, 0)
    assert train == [rows[i] for i in kept]
    assert validation == [rows[out[i]] for i in sample_indices(6, 4, 0)]
    assert parts(validation_rows=6) == (train, validation) != parts(validation_rows=6, split_seed=1)
    train, validation = parts(validation=str(prompts_file))
    assert train == rows and validation == [rows[i] for i in sample_indices(len(rows), 4, 0)] != rows[:4]


def test_supervised_rows_are_held_out_before_any_is_left_out(
    policy_config: Callable[..., PolicyConfig], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """So that what a policy holds out of the same data is held out here too, whatever the limits are."""
    lengths = [2 + i % 5 for i in range(20)]
    write_jsonl(tmp_path / "x.jsonl", [{"text": "x" * n} for n in lengths])
    data = DataConfig(train=str(tmp_path / "x.jsonl"), validation_rows=8, split_seed=2)
    config = RewardModelConfig(
        output_dir="x", model=policy_config(tmp_path).model, data=data, max_steps=1, max_length=5
    )

    def encode(rows: Any, *_: Any) -> list[tuple[int, int]]:
        return [(number, len(row["text"])) for number, row in enumerate(rows)]

    task = SupervisedTask(encode, lambda example: example[1], None, None, None)  # type: ignore[arg-type]
    train, held_out = load_examples(config, task, Tokenizer(tiny_tokenizer_dir))
    for examples, numbers in zip((train, held_out["validation"]), hold_out(20, 8, 2), strict=True):
        assert examples == [(i, lengths[i]) for i in numbers if lengths[i] <= 5]


# What the policy continues


def test_an_answer_that_is_begun_is_left_out_or_continued(
    policy_config: Callable[..., PolicyConfig], chatty: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, empty = {"role": "assistant", "content": "The colour is"}, {"role": "assistant", "content": ""}
    chats = [[USER, begun], [USER], "Why?", [USER, empty]]
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": chat} for chat in chats])
    data, asked = DataConfig(train=str(tmp_path / "x.jsonl")), "user:Why?<|im_end|>assistant:"
    for is_set, first in ((False, asked), (True, asked + "The colour is")):
        chat = ChatConfig(continue_final_message=is_set, system_prompt=None)
        config = policy_config(tmp_path, data=data, chat=chat, max_prompt_length=64)
        tokenizer = Tokenizer(chatty.path, continue_final_message=is_set)
        prompts, _ = load_prompts(config, tokenizer)
        ids, lengths = prompts.encode(prompts.rows)
        texts = [chatty.hf.decode(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        assert texts == [first, asked, "Why?", asked]
        assert ("2 of 4 prompts end with the assistant's message" in capsys.readouterr().out) != is_set
    whole = chatty.conversation_ids([prompts.rows[0]["prompt"]], [" blue."])
    assert chatty.hf.decode(whole[0]) == asked + "The colour is blue.<|im_end|>", "one answer for a reward model"
    assert make_tokenizer(config.model, config.chat).continue_final_message

    call = {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for message, words in (
        (call, "assistant's last message has tool_calls; expected the beginning of an answer"),
        (None, "expected messages that ask something, got the assistant's alone"),
    ):
        write_jsonl(tmp_path / "x.jsonl", [{"prompt": [USER, message] if message else [begun]}])
        with pytest.raises(ValueError, match=f"x.jsonl: row 1: .*{words}"):
            load_prompts(config, tokenizer)
    with pytest.raises(ValueError, match="^chat.continue_final_message: is for train policy and eval generate"):
        RewardModelConfig(output_dir="x", model=config.model, data=data, max_steps=1, chat=config.chat)


# What is there twice


def test_prompts_in_common_are_found_whatever_their_case_and_white_space() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "WHY \n not?"}]
    rows = [{"x": "why not?"}, {"x": "Why not"}, {"x": chat}, {"x": " Why\tnot? "}]
    assert overlapping_rows(rows, [{"x": "Why not?"}], "x") == [0, 2, 3]
    assert overlapping_rows(rows, [], "x") == []


@pytest.mark.parametrize("drop", [False, True])
def test_prompts_in_common_are_counted_and_left_out_if_wanted(
    drop: bool,
    policy_config: Callable[..., PolicyConfig],
    tiny_tokenizer_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"train": ["a a", "B", "c", "d", "B"], "validation": ["b", "x"], "test": ["A  a"]}
    for name, prompts in names.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    data = DataConfig(**{name: str(tmp_path / f"{name}.jsonl") for name in names}, drop_duplicates=drop)
    config = policy_config(tmp_path, data=data)
    train, _ = load_prompts(config, Tokenizer(tiny_tokenizer_dir))
    assert [row["prompt"] for row in train.rows] == (["c", "d"] if drop else names["train"])
    assert "3 prompts are in validation or test too: " + ("left out" if drop else "kept") in capsys.readouterr().out
    if drop:
        write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a a"}])
        with pytest.raises(ValueError, match="every prompt is in validation or test too"):
            load_splits(config)


# Token ids


@pytest.fixture
def tokenizer(tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokenizer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_CACHED_PROMPTS", 0)
    monkeypatch.setattr(token_cache, "CHUNK_PROMPTS", 7)
    yield Tokenizer(tiny_tokenizer_dir)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "gopo_jax" / "tokens").glob("*"))


def test_ids_from_the_cache_are_those_without_it(
    tokenizer: Tokenizer, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokenizer.prompt_ids(sentences)
    missed = [ids.tolist() for ids in token_cache.prompt_ids(sentences, tokenizer)]
    assert missed == expected and len(kept(tmp_path)) == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(Tokenizer, "prompt_ids", refuse)
    hit = token_cache.prompt_ids(sentences, tokenizer)
    assert [ids.tolist() for ids in hit] == expected and all(ids.dtype == np.int32 for ids in hit)


def test_other_prompts_settings_or_tokenizers_have_ids_of_their_own(
    tokenizer: Tokenizer, sentences: list[str], tiny_tokenizer_dir: Path
) -> None:
    def key(prompts: Any, tokenizer: Tokenizer) -> str:
        return token_cache.cache_key(prompts, str(tokenizer.fingerprint))

    templated = Tokenizer(tiny_tokenizer_dir)
    templated.hf.chat_template = "{{ messages }}"
    asked = [{"role": "user", "content": sentences[0]}]
    padded = Tokenizer(tiny_tokenizer_dir)
    padded.hf.bos_token = padded.hf.eos_token
    dated = Tokenizer(tiny_tokenizer_dir)
    dated.hf.chat_template = "{{ strftime_now('%d') }}"
    assert dated.fingerprint is None
    keys = [
        key(sentences, tokenizer),
        key(sentences[:-1], tokenizer),
        key(sentences[::-1], tokenizer),
        key([asked, *sentences[1:]], tokenizer),
        key(sentences, Tokenizer(tiny_tokenizer_dir, enable_thinking=True)),
        key(sentences, templated),
        key(sentences, padded),
    ]
    assert len(set(keys)) == len(keys) and key(list(sentences), Tokenizer(tiny_tokenizer_dir)) == keys[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_file_is_made_again(
    damage: str, tokenizer: Tokenizer, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [ids.tolist() for ids in token_cache.prompt_ids(sentences, tokenizer)]
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    middle = len(whole) // 3
    if damage == "other":
        np.savez(file, ids=np.zeros(3, np.int32), lengths=np.full(len(sentences), 1))
    else:
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        file.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    assert [ids.tolist() for ids in token_cache.prompt_ids(sentences, tokenizer)] == expected
    assert "damaged" in capsys.readouterr().out.replace("\n", " ")
    assert file.read_bytes() == whole and kept(tmp_path) == [file]


def test_a_cache_that_cannot_be_written_stops_nothing(
    tokenizer: Tokenizer, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the directory would be")
    assert len(token_cache.prompt_ids(sentences, tokenizer)) == len(sentences)
    assert "cannot be written" in capsys.readouterr().out


def test_a_batch_is_encoded_from_the_kept_ids(
    policy_config: Callable[..., PolicyConfig], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer, config = Tokenizer(tiny_tokenizer_dir), policy_config(tmp_path)
    for prompts in load_prompts(config, tokenizer):  # of the second a sample was taken
        rows = prompts.batch(0, 1, 3)
        expected = tokenizer.encode_prompts(prompts.prompts(rows), config.max_prompt_length)
        for found, wanted in zip(prompts.encode(rows), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


# Dry run and inspection


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """run(config, *arguments, command="policy"): exit code, output, errors; weights may not be read."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("models.checkpoint.load_pretrained", "train.rewards.model.load_model", "train.build.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were read"))

    def program(config: Any, *arguments: str, command: tuple[str, ...] = ("policy",)) -> tuple[int, str, str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved(config)))))
        code = main([*command, "--config", str(tmp_path / "config.yaml"), *arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return program


def test_a_dry_run_counts_what_the_run_would_do(
    run: Callable[..., tuple[int, str, str]], policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    config = policy_config(tmp_path, data=dataclasses.replace(policy_config(tmp_path).data, validation_rows=6))
    code, out, _ = run(config, "--dry_run")
    assert code == 0 and not (tmp_path / "run").exists()
    expected = [
        "24 rows, columns prompt, wanted",
        "6 rows of train held out to validate on, by seed 0",
        "3 steps of 4 prompts x 4 = 16 completions, 48 in all; 0.67 epochs of 18 rows",  # 3 * 4 / 18
        "3 validations of 4 prompts x 4",  # steps 0, 2, 3
        "3 checkpoints of ",
    ]
    assert [text for text in expected if text not in out] == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"train": "trl-lib/tldr", "split": "training"}, "no split 'training'; expected one of train, validation"),
        ({"train": "trl-lib/tldr", "columns": {"prompt": "post"}}, "no column 'post' .* prompt, completion"),
        ({"train": "trl-lib/tldr", "prompt_column": "post"}, "no column 'post'; its columns are prompt, completion"),
        ({"train": "trl-lib/tldr", "validation_rows": 116722}, "fewer than the 116722 rows"),
        ({"train": "x.jsonl"}, "x.jsonl: no such file"),
    ],
)
def test_a_dry_run_refuses_data_that_could_not_be_used(
    run: Callable[..., tuple[int, str, str]],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    settings: dict[str, Any],
    named: str,
) -> None:
    code, _, error = run(policy_config(tmp_path, data=DataConfig(**settings)), "--dry_run")
    assert code == 2 and error.count("\n") == 1
    with pytest.raises(ValueError, match=named):
        raise ValueError(error)


def rewarded(name: str, **options: Any) -> dict[str, Any]:
    return {"rewards": [RewardSpec(function=name, options=options)]}


@pytest.mark.parametrize(
    ("command", "row", "settings", "named"),
    [
        ("policy", {}, rewarded("length", unit="pages"), "length: unit: expected one of words, characters"),
        ("policy", {}, rewarded("rouge"), "rouge: .* there is no column 'completion'; the columns are wanted"),
        ("policy", {}, rewarded("soft_overlong_punishment", cache=3), "needs 'max_completion_length'"),
        ("policy", {}, {"max_prompt_length": 1}, "none of the 8 prompts has at most max_prompt_length = 1 tokens"),
        ("sft", {"completion": "Good."}, {}, "row 1 has no 'prompt'"),
        ("sft", {"messages": [USER]}, {}, "row 1: 'messages': expected a list of at least 2"),
        ("sft", {"prompt": [USER], "completion": "Good."}, {}, "no chat template"),
        ("reward", {"prompt": 5, "chosen": "a", "rejected": "b"}, {}, "row 1: 'prompt': expected text"),
        ("reward", {"chosen": "a", "rejected": "b", "margin": "big"}, {}, "row 1: 'margin': expected a number"),
        ("reward", {"completions": ["good food", "bad food"], "scores": [1, 1]}, {}, "nothing is compared"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    run: Callable[..., tuple[int, str, str]],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    command: str,
    row: dict[str, Any],
    settings: dict[str, Any],
    named: str,
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [row or {"prompt": "good food", "wanted": 1}] * 8)
    data = DataConfig(train=str(tmp_path / "x.jsonl"))
    config: Any = policy_config(tmp_path, data=data, validation=ValidationConfig(prompts=0))
    if command == "policy":
        config = dataclasses.replace(config, **settings)
    else:
        kind = {"sft": SftConfig, "reward": RewardModelConfig}[command]
        config = kind(output_dir="x", model=config.model, data=data, max_steps=1, batch_size=2)
    code, _, error = run(config, "--dry_run", command=(command,))
    assert code == 2
    with pytest.raises(ValueError, match=named):
        raise ValueError(error)


def test_a_dry_run_needs_no_key_and_knows_packed_rows(
    run: Callable[..., tuple[int, str, str]],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = policy_config(tmp_path, **rewarded("judge", model="m"))
    assert run(config, "--dry_run")[0] == 0
    many = dataclasses.replace(config, validation=ValidationConfig(every=3, num_generations=2))
    assert "2 validations of 24 prompts x 2" in run(many, "--dry_run")[1], "there are no more than that"

    write_jsonl(tmp_path / "x.jsonl", [{"text": "good"}] * 12)
    data = DataConfig(train=str(tmp_path / "x.jsonl"))
    packed = SftConfig(output_dir="x", model=config.model, data=data, max_steps=3, batch_size=2, packing=True)
    _, out, _ = run(packed, "--dry_run", command=("sft",))
    assert "3 steps of 2 rows; 6.00 epochs of 1 rows" in out
    monkeypatch.setattr("train.plan.dry_run.MAX_TOKENIZED_ROWS", 11)
    _, out, _ = run(packed, "--dry_run", command=("sft",))
    assert "tokens: not counted" in out and "epochs" not in out


def test_a_dry_run_refuses_models_in_the_wrong_place(
    run: Callable[..., tuple[int, str, str]],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    tiny_policy_dir: Path,
    tiny_reward_dir: Path,
) -> None:
    config = policy_config(tmp_path)
    wrong = dataclasses.replace(config, rewards=[dataclasses.replace(config.rewards[0], model=str(tiny_policy_dir))])
    assert "is a policy; expected a reward model" in run(wrong, "--dry_run")[2]
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tiny_reward_dir)))
    assert "is a reward model; expected a policy" in run(wrong, "--dry_run")[2]
    assert "--chip: expected one of v4" in run(config, "--dry_run", "--chip", "abacus")[2]
    assert "--devices: expected a number" in run(config, "--dry_run", "--devices", "many")[2]
    assert "--devices: expected a value" in run(config, "--dry_run", "--devices")[2]


def test_the_card_of_a_data_set_is_read() -> None:
    messages = {
        "name": "messages",
        "list": [{"name": "content", "dtype": "string"}, {"name": "role", "dtype": "string"}],
    }
    features = [{"name": "prompt", "dtype": "string"}, messages, {"name": "tags", "sequence": "string"}]
    info = {"features": features, "splits": [{"name": "train", "num_bytes": 1, "num_examples": 7}]}
    columns = {"prompt": "string", "messages": "list of {content: string, role: string}", "tags": "list of string"}
    for given in (info, [info, {"features": []}]):
        assert schema_from_card({"dataset_info": given}) == {"splits": {"train": 7}, "columns": columns}
    assert schema_from_card({}) is schema_from_card({"dataset_info": []}) is None


def test_the_hub_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class Gone(RepositoryNotFoundError):
        def __init__(self) -> None:
            pass

    def answer(given: Any) -> None:
        def dataset_info(self: Any, name: str, timeout: float) -> Any:
            if isinstance(given, BaseException):
                raise given
            return SimpleNamespace(card_data=given and SimpleNamespace(to_dict=lambda: given))

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        look_up_schema.cache_clear()

    info = {"features": [{"name": "a", "dtype": "string"}], "splits": [{"name": "b", "num_examples": 3}]}
    kept = yaml.safe_load(SCHEMAS.read_text())["google/IFEval"]
    answer({"dataset_info": info})
    assert look_up_schema("google/IFEval") == ({"splits": {"b": 3}, "columns": {"a": "string"}}, "from the Hub")
    for given, origin in ((None, "not on its card"), (OSError(), "the Hub was not reached")):
        answer(given)
        assert look_up_schema("google/IFEval") == (kept, f"{origin}: as train/plan/schemas.yaml had it")
    assert look_up_schema("some/thing")[0] is None
    answer(Gone())
    with pytest.raises(FileNotFoundError, match="some/thing: neither a .jsonl or .parquet file nor a data set"):
        look_up_schema("some/thing")
    look_up_schema.cache_clear()


def test_inspection_measures_and_shows(
    run: Callable[..., tuple[int, str, str]],
    policy_config: Callable[..., PolicyConfig],
    tmp_path: Path,
    tiny_tokenizer_dir: Path,
) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    texts = ["the food", "The  food", "a", "good good good", "service"]
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": text, "completion": "yes"} for text in texts])
    lengths = sorted(len(ids) for ids in tokenizer.encode(texts))
    config = policy_config(tmp_path, data=DataConfig(train=str(tmp_path / "x.jsonl")), max_prompt_length=lengths[-2])
    code, out, _ = run(config, "--rows", "1", command=("inspect", "policy"))
    assert (
        code == 0
        and "train: 1 of 5 prompts stand in an earlier row too" in out
        and "5 prompts of train are in validation" in out
    )
    (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["train", "prompts"]]
    assert row[2:] == [str(n) for n in (5, lengths[0], lengths[2], round(np.percentile(lengths, 95)), lengths[-1], 1)]
    assert "prompt 1: " in out and "prompt 2: " not in out
    write_jsonl(tmp_path / "x.jsonl", [{"chosen": "good food", "rejected": "bad"}, {"chosen": "a", "rejected": "bbbb"}])
    reward = RewardModelConfig(output_dir="x", model=config.model, data=config.data, max_steps=1)
    code, out, _ = run(reward, "--rows=1", command=("inspect", "reward"))
    assert code == 0 and "the longer one in 50.0 % of the comparisons" in out and "row 1, score 0" in out
    assert "unknown command 'plan'; expected one of sft, reward, policy" in run(config, command=("inspect", "plan"))[2]


def test_inspection_of_ties_and_of_a_part_that_is_wrong(
    run: Callable[..., tuple[int, str, str]], policy_config: Callable[..., PolicyConfig], tmp_path: Path
) -> None:
    rows = [{"prompt": "p", "completions": ["a", "b"], "scores": scores} for scores in ([1, 1], [1, 1], [2, 1])]
    write_jsonl(tmp_path / "x.jsonl", [row | {"chosen": "a", "rejected": "b"} for row in rows])
    write_jsonl(tmp_path / "wrong.jsonl", [{"prompt": "p"}])
    data = DataConfig(train=str(tmp_path / "x.jsonl"))
    config = RewardModelConfig(output_dir="x", model=policy_config(tmp_path).model, data=data, max_steps=1)
    code, out, _ = run(config, "--rows", "2", "--mesh", "data=1", command=("inspect", "reward"))
    assert code == 0 and "row 2, score 1" in out and "answers" in out
    assert "train: 1 of 3 rows and 2 of 3 prompts stand in an earlier row too" in out
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": c, "rejected": "b"} for c in ("a", "b", "", "a")])
    write_jsonl(tmp_path / "turned.jsonl", [{"prompt": "p", "chosen": c, "rejected": r} for c, r in ("ab", "ba", "ba")])
    pairs = DataConfig(train=str(tmp_path / "pairs.jsonl"), validation=str(tmp_path / "turned.jsonl"))
    code, out, _ = run(dataclasses.replace(config, data=pairs), command=("inspect", "reward"))
    lines = [
        "train: 1 of 4 rows and 3 of 4 prompts stand in an earlier row too",
        "validation: 1 of 3 rows and 2 of 3 prompts stand in an earlier row too",
        "1 rows and 1 prompts of train are in validation too",
        "train: of 4 comparisons 1 have equal answers, 1 an empty better answer, 0 an empty worse one",
        "train: 0 pairs stand in an earlier row the other way round",
        "validation: 2 pairs stand in an earlier row the other way round",
    ]
    assert code == 0 and [line for line in lines if line not in out.splitlines()] == []
    held_out = dataclasses.replace(data, held_out={"train": str(tmp_path / "wrong.jsonl")})
    code, _, error = run(dataclasses.replace(config, data=held_out), command=("inspect", "reward"))
    assert code == 2 and f"{tmp_path / 'wrong.jsonl'}: row 1 has no 'chosen'" in error


def test_every_kind_of_prompt_is_checked_once(
    chatty: Tokenizer, tmp_path: Path, policy_config: Callable[..., PolicyConfig]
) -> None:
    """So that a reward model's template that refuses a role, or has no place for tool calls, is known at the start."""
    chatty.hf.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    call = ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    kinds = ["Why?", [USER], [SYSTEM, USER], [USER, ANSWER, USER], [USER, call, USER]]
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": prompt} for prompt in [*kinds, "How?", [USER, ANSWER, USER]]])
    config = policy_config(tmp_path, max_prompt_length=200, data=DataConfig(train=str(tmp_path / "x.jsonl")))
    prompts, _ = load_prompts(config, chatty)
    assert prompts.one_of_each_kind() == kinds


def test_a_column_of_tools_is_not_asked_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"x": [USER], "tools": [{"name": "f"}]}]
    assert normalize_prompts(rows, "file", "x", ChatConfig()) == rows
    assert "file: the column 'tools' goes to reward functions alone" in " ".join(capsys.readouterr().out.split())
