"""`python -m eval summaries`: each measure by its definition, and what is averaged over what."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.__main__ import main
from eval.texts.summaries import (
    fragments,
    lead_sentences,
    mean_with_t_interval,
    measure_summary,
    novelty,
    post_of,
    rouge_scorer,
)
from train.rewards.words import plain_words
from train.run.files import write_jsonl

POST = "The cat sat on the mat. It was happy! Then the dog came\nand barked."
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def same_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., Row]:
    def run(rows: Sequence[Row], *arguments: object) -> Row:
        write_jsonl(tmp_path / "r.jsonl", rows)
        given = ("summaries", "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "o.json", *arguments)
        assert main([str(argument) for argument in given]) == 0
        return json.loads((tmp_path / "o.json").read_text())

    return run


def test_rouge_is_the_overlap_of_stems() -> None:
    found = measure_summary("the cats sat", POST, "a cat sits on the mat", rouge_scorer())
    # of 3 and 6 words: the, cat; in order: cat alone, or the alone ("sat" and "sits" have two stems)
    assert found["rouge1_precision"] == 2 / 3 and found["rouge1_recall"] == 2 / 6
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert found["rougeL_precision"] == 1 / 3 and found["rouge2"] == 0


@pytest.mark.parametrize("text", [POST, "Another text, of no importance."])
def test_a_text_against_itself(text: str) -> None:
    found = measure_summary(text, text, text, rouge_scorer())
    assert [found[name] for name in ("rouge1", "rouge2", "rougeL", "coverage", "compression")] == [1, 1, 1, 1, 1]
    assert [found[f"novelty{n}"] for n in (1, 2, 3)] == [0, 0, 0]
    assert found["density"] == len(plain_words(text))


def test_nothing_in_common() -> None:
    found = measure_summary("Nobody knows why", POST, "dogs bark", rouge_scorer())
    assert [found[name] for name in ("rouge1", "rougeL", "coverage", "density")] == [0, 0, 0, 0]
    assert [found[f"novelty{n}"] for n in (1, 2, 3)] == [1, 1, 1]


def test_an_empty_summary_has_no_shares() -> None:
    found = measure_summary("", POST, "dogs bark", rouge_scorer())
    assert found["rouge1"] == found["words"] == found["compression"] == 0
    assert all(found[name] is None for name in ("novelty1", "novelty3", "coverage", "density"))


def test_novelty_counts_n_grams_that_the_post_lacks() -> None:
    summary, post = plain_words("the cat, the dog - the cow"), plain_words(POST)
    assert novelty(summary, post, 1) == 1 / 6  # cow
    assert novelty(summary, post, 2) == 3 / 5  # cat the, dog the, the cow
    assert novelty(summary[:1], post, 2) is None


def test_fragments_are_the_longest_pieces_from_the_left() -> None:
    found = fragments(plain_words("happy cat sat on the dog came x the mat"), plain_words(POST))
    assert [" ".join(fragment) for fragment in found] == ["happy", "cat sat on the", "dog came", "the mat"]


def test_the_post_is_found_in_the_prompt() -> None:
    prompt = f"SUBREDDIT: r/pets\n\nTITLE: TL;DR: a cat\n\nPOST: {POST}\n\nTL;DR:"
    assert post_of({"prompt": prompt}) == post_of({"prompt": [{"role": "user", "content": prompt}]}) == POST
    assert post_of({"prompt": "It was a"}) == "It was a" and post_of({"post": POST, "prompt": "x"}) == POST


def test_the_lead_is_the_first_sentences() -> None:
    assert (
        lead_sentences(POST, 1) == "The cat sat on the mat."
        and lead_sentences(POST, 9).count(" ") == len(POST.split()) - 1
    )
    assert lead_sentences(POST, 3) == "The cat sat on the mat. It was happy! Then the dog came"


def test_every_measure_counts_characters_where_there_are_no_spaces() -> None:
    post, signs = "今天天气很好。我们去公园玩！", len("今天天气很好我们去公园玩")
    found = measure_summary("天气很好", post, "今天天气好", rouge_scorer())
    assert found["words"] == 4 and found["compression"] == 4 / signs
    assert found["coverage"] == 1 and found["density"] == 4 and found["novelty2"] == 0
    assert found["rouge1_precision"] == 3 / 4 and found["rouge1_recall"] == 3 / 5
    assert measure_summary("好", post, "!", rouge_scorer())["rouge1"] is None, "a reference without a word"
    assert lead_sentences(post, 1) == "今天天气很好。" and lead_sentences("「好！」他说。走。", 2) == "「好！」 他说。"


def test_the_interval_is_over_prompts() -> None:
    values = np.array([1.0, 2.0, 4.0, np.nan])
    found = mean_with_t_interval(values)
    assert found is not None and found["prompts"] == 3
    from scipy.stats import ttest_1samp

    interval = ttest_1samp(values[:3], 0).confidence_interval(0.95)
    np.testing.assert_allclose([found["low"], found["high"]], interval)
    assert mean_with_t_interval(np.array([np.nan])) is None
    alone = mean_with_t_interval(np.array([3.0]))
    assert alone is not None and alone["mean"] == 3 and alone["low"] is None


def rows(count: int = 3) -> list[Row]:
    texts = ["the cat", "a dog came", "nothing new here", "it was happy"]
    return [
        {"prompt_id": p, "prompt": f"POST: {p} {POST}", "completion": texts[(p + g) % 4], "length": 3 + g + p}
        | {"temperature": 0.5 + g, "sample": 0, "reference": f"cat and dog {p}"}
        for p in range(count)
        for g in range(2)
    ]


def test_completions_are_averaged_before_prompts(evaluate: Callable[..., Row]) -> None:
    """A prompt with three completions counts as much as one with two."""
    given = [*rows(), rows()[0]]
    result = evaluate(given)
    for name, found in (("words", result["length"]["words"]), ("rouge1", result["rouge1"])):
        each = [[row[name] for row in result["rows"] if row["prompt_id"] == p] for p in range(3)]
        assert [len(group) for group in each] == [3, 2, 2]
        assert found["mean"] == pytest.approx(np.mean([np.mean(group) for group in each]))
    assert result["rouge1"].keys() >= {"low", "high", "standard_error", "prompts", "precision", "recall"}
    assert result["length"]["tokens"]["prompts"] == 3
    at = result["temperatures"]["0.5"]["length"]["tokens"]["mean"]
    assert at == pytest.approx(4.0) and result["temperatures"].keys() == {"0.5", "1.5"}
    assert result["lead"]["sentences"] == 2 and result["lead"]["novelty"]["1"]["mean"] == 0
    assert result["reference"]["length"]["words"]["mean"] == 4


def test_without_references_there_is_no_rouge(evaluate: Callable[..., Row], capsys: pytest.CaptureFixture[str]) -> None:
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in rows()]
    result = evaluate(bare)
    assert result["rouge1"] is result["rougeL"] is result["reference"] is None
    assert result["novelty"]["2"]["prompts"] == result["length"]["words"]["prompts"] == 3
    assert result["length"]["tokens"] is None
    assert "no column 'reference'" in capsys.readouterr().out


def test_references_from_the_data_are_those_of_the_column(evaluate: Callable[..., Row], tmp_path: Path) -> None:
    data = [{"prompt": row["prompt"], "completion": row["reference"]} for row in rows()[::2]]
    write_jsonl(tmp_path / "data.jsonl", data)
    bare = [{name: value for name, value in row.items() if name != "reference"} for row in rows()]
    expected, result = evaluate(rows()), evaluate(bare, "--data", tmp_path / "data.jsonl", "--reference", "completion")
    assert result == expected


def test_summaries_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(given: Sequence[Row], *more: object) -> str:
        write_jsonl(tmp_path / "r.jsonl", given)
        arguments = ("--responses", tmp_path / "r.jsonl", "--out", tmp_path / "o.json", *more)
        assert main(["summaries", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"prompt": "another", "reference": "r"}] * 2)
    assert "prompt_id 0 is another prompt in" in refused(rows(), "--data", data)
    assert "prompt_id 5: expected the number" in refused([rows()[0] | {"prompt_id": 5}], "--data", data)
    assert "there is no 'gold'; its columns are prompt, reference" in refused(
        rows(), "--data", data, "--reference", "gold"
    )
    assert "'completion' is the column of the summaries themselves" in refused(rows(), "--reference", "completion")
    assert "row 1: has neither" in refused([{"prompt": "p"}])
    assert "no row has 'nosuch' (--reference)" in refused(rows(), "--reference", "nosuch")
    assert "is the same file as" in refused(rows(), "--out", tmp_path / "r.jsonl")
    assert "is the same file as" in refused(rows(), "--data", data, "--out", data)
    assert "'nosuch', which columns takes as 'post'" in refused(rows(), "--columns.post", "nosuch")
    assert not (tmp_path / "o.json").exists()
