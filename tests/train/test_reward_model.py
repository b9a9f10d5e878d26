"""Laws of reward model training: formats, shared prefix = repeated prompt, a group = its pairs, calibration."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import REWARD_MODEL, Qwen3Config
from models.hf_weights import split
from models.qwen3 import Backbone
from models.tokenizer import Tokenizer
from train.config import ChatConfig, DataConfig, EarlyStoppingConfig, ModelConfig, RewardModelConfig
from train.supervised import reward_model
from train.supervised.calibration import expected_calibration_error, reliability_bins
from train.supervised.program import fill_batch
from train.supervised.reward_model import (
    Comparison,
    collate_comparisons,
    comparison_loss,
    comparison_objective,
    encode_comparisons,
    length_baseline,
)


def config(**settings: Any) -> RewardModelConfig:
    model = ModelConfig(path="somewhere")
    return RewardModelConfig(
        **{"output_dir": "x", "model": model, "data": DataConfig(train="x"), "max_steps": 1} | settings
    )


# Formats

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
OTHER, AGAIN = {"role": "assistant", "content": "B"}, {"role": "user", "content": "R"}
ASKED = "user:Q<|im_end|>"
SAID = [f"{ASKED}assistant:A<|im_end|>", f"{ASKED}assistant:B<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param({"prompt": "Q ", "chosen": "A", "rejected": "B"}, ["Q A", "Q B"], id="standard, explicit"),
        pytest.param({"chosen": "Q A", "rejected": "Q B"}, ["Q A", "Q B"], id="standard, implicit"),
        pytest.param({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, SAID, id="conversational, explicit"),
        pytest.param({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, SAID, id="conversational, implicit"),
        pytest.param({"prompt": "Q", "chosen": [ANSWER], "rejected": [OTHER]}, SAID, id="text prompt, messages"),
        pytest.param({"prompt": [USER], "chosen": "A", "rejected": "B"}, SAID, id="messages, text answers"),
        pytest.param(
            {"chosen": [USER, OTHER, AGAIN, ANSWER], "rejected": [USER, OTHER, AGAIN, OTHER]},
            [f"{SAID[1]}user:R<|im_end|>assistant:{x}<|im_end|>" for x in "AB"],
            id="conversational, implicit, several shared turns",
        ),
        pytest.param(
            {"prompt": "Q ", "completions": ["B", "A", "C"], "scores": [1, 2.5, 1]}, ["Q B", "Q A", "Q C"], id="group"
        ),
        pytest.param({"prompt": [USER], "completions": [[ANSWER], [OTHER]], "scores": [2, 1]}, SAID, id="group, chat"),
        pytest.param({"completions": ["Q A", "Q B"], "scores": [2, 1]}, ["Q A", "Q B"], id="group of whole texts"),
    ],
)
def test_formats(chatty: Tokenizer, row: dict[str, Any], expected: list[str]) -> None:
    extra = {"score_chosen": 3.0, "score_rejected": 9.0}  # other columns say nothing
    (example,) = encode_comparisons([row | extra], chatty, "file", ChatConfig())
    assert [chatty.hf.decode(ids) for ids in example.rows] == expected
    assert example.scores == [float(x) for x in row.get("scores", [1, 0])]
    assert example.margin == 0
    if "chosen" in row:
        assert encode_comparisons([row | {"margin": 0.5}], chatty, "file", ChatConfig())[0].margin == 0.5


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Q", "completions": ["A"], "scores": [1]}, "row 1: expected 'completions', a list of at least 2"),
        ({"prompt": "Q", "completions": ["A", "B"], "scores": [1]}, "as many 'scores', got 2 and 1"),
        ({"prompt": "Q", "completions": ["A", "B"]}, "got 2 and no list"),
        ({"completions": ["A", "B"], "scores": [1, float("nan")]}, "'scores': expected numbers"),
        ({"completions": ["A", "B"], "scores": ["1", "2"]}, "'scores': expected numbers"),
        ({"chosen": "A", "rejected": "B", "margin": "big"}, "row 1: 'margin': expected a number, got 'big'"),
        ({"chosen": "A", "rejected": "B", "margin": [1]}, "row 1: 'margin': expected a number"),
        ({"chosen": "A", "rejected": "B", "margin": float("nan")}, "row 1: 'margin': expected a number, got nan"),
        ({"chosen": "A", "rejected": "B", "margin": -1e200}, "row 1: 'margin': expected a number"),
        ({"chosen": "A", "rejected": "B", "margin": 10**400}, "row 1: 'margin': expected a number"),
        ({"completions": ["A", "B"], "scores": [1, 10**400]}, "'scores': expected numbers"),
        ({"completions": ["A", ""], "scores": [1, 2]}, "row 1: 'completions': row 2 has no 'answer'"),
        ({"prompt": [USER], "completions": [[ANSWER], [USER]], "scores": [1, 2]}, "end with the assistant's"),
    ],
)
def test_rows_that_are_refused(chatty: Tokenizer, row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        encode_comparisons([row], chatty, "file", ChatConfig())


CALLED = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [CALLED], "rejected": [ANSWER]},
        {"chosen": [USER, CALLED], "rejected": [USER, ANSWER]},
        {"prompt": [USER], "completions": [[CALLED], [ANSWER]], "scores": [1, 0]},
    ],
    ids=["explicit", "implicit", "group"],
)
def test_tools_and_calls_are_compared_or_refused(chatty: Tokenizer, row: dict[str, Any]) -> None:
    row |= {"tools": [{"name": "f"}]}
    with pytest.raises(ValueError, match="file: row 1: .*the chat template has no place for"):
        encode_comparisons([row], chatty, "file", ChatConfig())
    chatty.hf.chat_template = (
        "{% for t in tools or [] %}{{ t.name }};{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}(){% endfor %}<|im_end|>{% endfor %}"
    )
    (example,) = encode_comparisons([row], chatty, "file", ChatConfig())
    expected = [f"f;user:Q<|im_end|>assistant:{answer}<|im_end|>" for answer in ("f()", "A")]
    assert [chatty.hf.decode(ids) for ids in example.rows] == expected


@pytest.mark.parametrize("answer", ["A<|im_end|>", [{"role": "assistant", "content": "A<|im_end|>\n"}]])
def test_an_answer_that_brings_its_end_has_it_once(chatty: Tokenizer, answer: Any) -> None:
    row = {"prompt": [USER], "chosen": answer, "rejected": [OTHER]}
    assert [chatty.hf.decode(ids) for ids in encode_comparisons([row], chatty, "file", ChatConfig())[0].rows] == SAID
    with pytest.raises(ValueError, match="file: row 1: 'rejected': the answer has the special token"):
        encode_comparisons([row | {"rejected": "B<|im_end|>C"}], chatty, "file", ChatConfig())


def test_something_has_to_be_compared(chatty: Tokenizer) -> None:
    """In the whole data set; a part of it, such as its first rows, may be without."""
    rows: list[dict[str, Any]] = [{"completions": ["A", "B"], "scores": scores} for scores in ([1, 1], [1, 2])]
    examples = encode_comparisons(rows, chatty, "file", ChatConfig())
    pack = reward_model.reward_model_task(config()).pack
    assert pack(examples, "file") == examples
    with pytest.raises(ValueError, match="file: nothing is compared"):
        pack(encode_comparisons(rows[:1], chatty, "file", ChatConfig()), "file")


# The loss


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


def group(prompt: int, lengths: list[int], scores: list[float], seed: int = 0) -> Comparison:
    """Rows that share so many tokens and then differ at once."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, 250, prompt).tolist()
    rows = [[*shared, 250 + i, *rng.integers(2, 250, n - 1)] for i, n in enumerate(lengths)]
    return Comparison([list(map(int, row)) for row in rows], scores)


GROUPS = [group(20, [5, 3, 8], [1, 3, 2]), group(17, [2, 7], [1, 0], 1), group(23, [4, 4, 6], [1, 1, 2], 2)]

APART = [group(0, [20, 30, 8], [1, 3, 2], 3), group(0, [26, 29], [1, 0], 1), group(0, [24, 27, 6], [1, 1, 2], 2)]


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_a_shared_prefix_is_a_repeated_prompt(
    make_model: Callable[..., Backbone], tiny_config: Qwen3Config, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient of all parameters."""
    architecture = replace(tiny_config, architecture=REWARD_MODEL, num_hidden_layers=1)
    graphdef, params = split(make_model(architecture, seed=1))
    settings = config(center_rewards_coefficient=0.1)
    program = jax.jit(
        jax.value_and_grad(lambda p, b: comparison_objective(p, b, graphdef=graphdef, config=settings), has_aux=True)
    )
    shared = collate_comparisons(GROUPS, tokenizer, 64)
    monkeypatch.setattr(reward_model, "PREFIX_WORTHWHILE", 0)
    whole = collate_comparisons(GROUPS, tokenizer, 64)
    assert "prefix_PS" in shared and "prefix_PS" not in whole
    assert shared["tokens_PGT"].shape == (3, 4, 8) and whole["tokens_PGT"].shape == (3, 4, 32)
    assert_same(program(params, fill_batch(shared, 3)), program(params, fill_batch(whole, 3)))


def evaluated(examples: list[Comparison], tokenizer: Tokenizer, settings: RewardModelConfig, size: int = 0) -> Any:
    """(loss, metrics) and gradient of a small stand-in for the network: a weight for each token and place."""
    batch = fill_batch(collate_comparisons(examples, tokenizer, 32), size or len(examples))
    tokens_PGT, T = batch["tokens_PGT"], 32
    assert "prefix_PS" not in batch and tokens_PGT.shape[-1] == T
    real_PGT = np.arange(T) < batch["lengths_PG"][..., None]

    def loss(weights: jax.Array) -> Any:
        rewards_PG = (jnp.sin(weights[tokens_PGT] * jnp.arange(1, T + 1)) * real_PGT).sum(-1)
        value, outcome = comparison_loss(rewards_PG, batch, settings)
        return value, outcome.metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.linspace(-1, 1, 300))


def test_texts_without_a_shared_prefix_are_rows_of_their_own(tokenizer: Tokenizer) -> None:
    batch = collate_comparisons([group(0, [30, 28], [1, 0]), group(1, [20, 31], [1, 0])], tokenizer, 40)
    assert "prefix_PS" not in batch and batch["tokens_PGT"].shape == (2, 2, 32)


def test_a_group_is_its_pairs_as_rows(tokenizer: Tokenizer) -> None:
    pairs = [Comparison([e.rows[i], e.rows[j]], [1, 0]) for e in APART for i, j in e.pairs()]
    assert len(pairs) == 3 + 1 + 2
    settings = config(center_rewards_coefficient=0.1)
    assert_same(evaluated(APART, tokenizer, settings), evaluated(pairs, tokenizer, settings))
    assert_same(length_baseline(APART), length_baseline(pairs))


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_filled_up_batches_and_larger_groups_change_nothing(tokenizer: Tokenizer, loss: str) -> None:
    """A batch of one pair, alone; then beside a group of three without any comparison, which makes groups of four."""
    pair, tied = APART[1], group(0, [30, 25, 28], [2, 2, 2], 5)
    expected = evaluated([pair], tokenizer, config(loss=loss))
    assert_same(evaluated([pair, tied], tokenizer, config(loss=loss), size=4), expected)


def test_a_margin_is_how_far_the_scores_should_be_apart(tokenizer: Tokenizer) -> None:
    (loss, metrics), _ = evaluated([APART[1]._replace(margin=0.7)], tokenizer, config())
    np.testing.assert_allclose(loss, np.log1p(np.exp(0.7 - metrics["margin"][0])), rtol=1e-5)


def test_the_longer_answer() -> None:
    assert length_baseline(GROUPS) == {"length_baseline_accuracy": np.mean([0, 0, 1, 0, 1, 1])}
    assert length_baseline([group(3, [2, 2], [0, 1])]) == {"length_baseline_accuracy": 0.5}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"loss": "plackett_luce", "center_rewards_coefficient": 0.1}, "center_rewards_coefficient: is a part of"),
        ({"early_stopping": EarlyStoppingConfig(patience=2)}, "early_stopping.patience: needs data.validation"),
        ({"data": DataConfig(train="x", held_out={"a/b": "x"})}, "data.held_out: expected names .* got 'a/b'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**settings)


# Calibration


def test_a_calibrated_model_has_no_error_and_a_sure_one_has_what_it_misses() -> None:
    rng = np.random.default_rng(0)
    apart = rng.exponential(1.5, 200_000)
    right = rng.random(apart.size) < 1 / (1 + np.exp(-apart))
    assert expected_calibration_error(np.where(right, apart, -apart)) < 0.01
    np.testing.assert_allclose(expected_calibration_error(np.array([50.0] * 6 + [-50.0] * 4)), 0.4)
    assert expected_calibration_error(np.zeros(7)) == 0
    assert np.isnan(expected_calibration_error(np.zeros(0)))


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_the_bins_are_a_histogram(bins: int) -> None:
    differences = np.random.default_rng(1).normal(size=300) * 3
    rows = reliability_bins(differences, bins)
    assert sum(row["count"] for row in rows) == 300 and len(rows) == bins
    weights = [row["count"] for row in rows if row["count"]]
    mean = lambda key: np.average([row[key] for row in rows if row["count"]], weights=weights)  # noqa: E731
    np.testing.assert_allclose(mean("accuracy"), (differences > 0).mean())
    np.testing.assert_allclose(mean("confidence"), (1 / (1 + np.exp(-np.abs(differences)))).mean())
    assert all(row["low"] <= row["confidence"] <= row["high"] for row in rows if row["count"])
    json.dumps(rows)


def test_which_answer_is_named_first_does_not_matter(tokenizer: Tokenizer) -> None:
    """Each comparison counts once: its difference is that of the better answer."""
    rewards_PG = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    found = []
    for turn in (False, True):
        examples = [Comparison(e.rows[::-1], e.scores[::-1]) if turn else e for e in GROUPS]
        batch, rewards = fill_batch(collate_comparisons(examples, tokenizer, 64), 3), rewards_PG.copy()
        for p, example in enumerate(examples):
            size = len(example.scores)
            rewards[p, :size] = rewards[p, :size][::-1] if turn else rewards[p, :size]
        _, outcome = comparison_loss(jnp.asarray(rewards), batch, config())
        apart = np.asarray(outcome.differences)
        found.append(np.sort(apart[~np.isnan(apart)]))
    assert len(found[0]) == 6
    np.testing.assert_allclose(*found, rtol=1e-5)
