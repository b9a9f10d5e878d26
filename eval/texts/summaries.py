"""`python -m eval summaries`: compares summaries with references and with their posts.

  rouge1, rouge2, rougeL   F1 = 2 P R / (P + R) of the overlap of summary and reference: n-grams, or the longest common
                           subsequence; by the package rouge-score with Porter's stemmer
  words, tokens            length in words between white space, and in the policy's tokens; where a script has no spaces
                           between words, a word is a character in every measure (`train.rewards.words`)
  compression              words of the summary / words of its post
  novelty n                share of the summary's n-grams (repeated ones count again) that are not in the post
  coverage, density        over the fragments f that a summary shares with its post, matched greedily from its start:
                           sum |f| / |summary| and sum |f|^2 / |summary|, in words

Completions of one prompt are averaged first; means and 95 % intervals (Student's t) are over prompts. The result also
has these measures of each post's first sentences and of the references.

References:
  Lin, ROUGE: A Package for Automatic Evaluation of Summaries, https://aclanthology.org/W04-1013.
  See et al., Get To The Point, https://arxiv.org/abs/1704.04368 (novel n-grams).
  Grusky et al., Newsroom, https://arxiv.org/abs/1804.11283 (coverage and density).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.sheets import Sheet, missing, number
from eval.stats import mean_and_interval, prompt_means, without_nan
from eval.texts.rows import (
    groups_of,
    map_rows,
    prompt_text,
    response_text,
    rows_by_temperature,
    user_text,
    write_json,
)
from train.console import console
from train.data.rows import Row, load_rows
from train.parse import parse
from train.rewards.words import RougeTokenizer, plain_words, spaced_words
from train.run.files import check_out
from train.running import setup_errors

REFERENCE = "reference"  # default column, which may be absent
ROUGES, NOVELTY = ("rouge1", "rouge2", "rougeL"), (1, 2, 3)
PATHS: dict[str, tuple[str, ...]] = {  # keys of each measure in the result
    **{name: (name,) for name in ROUGES},
    **{name: ("length", name) for name in ("words", "tokens", "compression")},
    **{f"new {n}-grams": ("novelty", str(n)) for n in NOVELTY},
    **{name: ("extractive", name) for name in ("coverage", "density")},
}
SHOWN_BY_TEMPERATURE = ("rouge1", "rouge2", "rougeL", "words", "new 2-grams")
# Full-width marks end a sentence without white space, behind a closing quotation mark or bracket if there is one.
SENTENCE_END = re.compile(r"(?<=[.!?؟।۔።])\s+|(?<=[。！？｡])(?![。！？｡」』”’）])\s*|(?<=[。！？｡][」』”’）])\s*|\n+")
Measures = dict[str, float | None]  # of one text; None = undefined


@dataclass(frozen=True, kw_only=True)
class SummariesConfig:
    """ROUGE, length and novelty of summaries, beside the posts' first sentences and the references."""

    responses: str  # JSONL (.gz too) with prompt, or post, and completion, or response
    out: str  # the JSON file to write
    reference: str = REFERENCE  # the column of the responses, or of data, that holds the references
    data: str | None = None  # rows with the references, whose number is prompt_id; default: the responses
    columns: dict[str, str] = field(default_factory=dict)  # of the responses, our name: theirs
    lead: int = 2  # sentences of the post that are judged beside the summaries; 0: none

    def __post_init__(self) -> None:
        if self.lead < 0:
            raise ValueError(f"lead: expected a number of sentences from 0, got {self.lead}")
        if self.data is None and self.reference in ("completion", "response"):
            raise ValueError(
                f"reference: {self.reference!r} is the column of the summaries themselves; expected another one, or "
                f"--data FILE, whose column that is"
            )


def parse_summaries(arguments: list[str]) -> SummariesConfig:
    return parse(SummariesConfig, arguments, "python -m eval summaries")


def measure_summaries(config: SummariesConfig) -> dict[str, Any]:
    """Writes the mean measures and those of each summary to `config.out`, and returns them.

    Raises:
      SetupError: invalid settings or data.
    """
    with setup_errors():
        check_out(config.out, config.responses, *([config.data] if config.data else []))
        rows = load_rows(config.responses, columns=config.columns, setting="columns")
        texts: list[str] = map_rows(rows, config.responses, response_text)
        posts: list[str] = map_rows(rows, config.responses, post_of)
        references = references_of(config, rows)
        score = rouge_scorer()
    prompts = [row.get("prompt_id", post) for row, post in zip(rows, posts, strict=True)]
    groups = groups_of(prompts)
    row_measures = [measure_summary(*row, score) for row in zip(texts, posts, references, strict=True)]
    for row, measures in zip(rows, row_measures, strict=True):
        measures["tokens"] = row.get("length")
    first = [min(group) for group in groups]  # one row per prompt, for its post and reference
    result: dict[str, Any] = {
        "responses": config.responses,
        **average_measures(row_measures, groups),
        "count": len(rows),
        "with_reference": sum(reference is not None for reference in references),
        "lead": None,
        "reference": None,
    }
    if config.lead:
        leads = [measure_summary(lead_sentences(posts[i], config.lead), posts[i], references[i], score) for i in first]
        result["lead"] = {"sentences": config.lead, **average_measures(leads, [[i] for i in range(len(first))])}
    if with_reference := [(text, posts[i]) for i in first if (text := references[i]) is not None]:
        reference_measures = [measure_summary(text, post, None, score) for text, post in with_reference]
        result["reference"] = average_measures(reference_measures, [[i] for i in range(len(reference_measures))])
    result["temperatures"] = {
        name: average_measures([row_measures[i] for i in part], groups_of(prompts[i] for i in part))
        for name, part in rows_by_temperature(rows).items()
    }
    names = ("prompt_id", "temperature", "sample")
    result["rows"] = [
        {name: row[name] for name in names if name in row} | own for row, own in zip(rows, row_measures, strict=True)
    ]
    write_json(config.out, result)
    print_summaries(result, config)
    return result


def measure_summary(text: str, post: str, reference: str | None, score: Any) -> Measures:
    """Computes every measure of one summary; without a reference, or one without a word, ROUGE is None."""
    measures: Measures = {}
    overlaps = score(reference, text) if reference is not None and plain_words(reference) else {}
    for name in ROUGES:
        f1, precision, recall = "fmeasure", "precision", "recall"
        for key, part in ((name, f1), (f"{name}_precision", precision), (f"{name}_recall", recall)):
            measures[key] = getattr(overlaps[name], part) if overlaps else None
    length, post_length = len(spaced_words(text)), len(spaced_words(post))
    measures |= {"words": length, "compression": length / post_length if post_length else None}
    summary, source = plain_words(text), plain_words(post)
    for n in NOVELTY:
        measures[f"novelty{n}"] = novelty(summary, source, n)
    sizes = [len(fragment) for fragment in fragments(summary, source)]
    measures["coverage"] = sum(sizes) / len(summary) if summary else None
    measures["density"] = sum(size**2 for size in sizes) / len(summary) if summary else None
    return measures


def rouge_scorer() -> Any:
    """(reference, text) -> ROUGE by name.

    Raises:
      ImportError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"summaries: {error}; pip install rouge-score") from error
    return RougeScorer(list(ROUGES), tokenizer=RougeTokenizer(stem=True)).score


def novelty(summary: Sequence[str], post: Sequence[str], n: int) -> float | None:
    """Share of the summary's n-grams that are not in the post; None for fewer than n words."""
    grams = [tuple(summary[i : i + n]) for i in range(len(summary) - n + 1)]
    post_grams = {tuple(post[i : i + n]) for i in range(len(post) - n + 1)}
    return sum(gram not in post_grams for gram in grams) / len(grams) if grams else None


def fragments(summary: Sequence[str], post: Sequence[str]) -> list[Sequence[str]]:
    """Fragments that the summary shares with the post: from its start, always the longest match."""
    positions: dict[str, list[int]] = {}
    for j, word in enumerate(post):
        positions.setdefault(word, []).append(j)

    def match_length(i: int, j: int) -> int:
        size = 0
        while i + size < len(summary) and j + size < len(post) and summary[i + size] == post[j + size]:
            size += 1
        return size

    matches, i = [], 0
    while i < len(summary):
        size = max((match_length(i, j) for j in positions.get(summary[i], ())), default=0)
        if size:
            matches.append(summary[i : i + size])
        i += max(size, 1)
    return matches


def post_of(row: Row) -> str:
    """The summarized text: column "post", else the prompt's text between POST: and TL;DR:, else the whole prompt."""
    if isinstance(row.get("post"), str):
        return row["post"]
    text = prompt_text(row)
    body = re.search(r"^POST:\s*(.*?)\s*(?:^TL;DR:\s*)?\Z", text, re.DOTALL | re.MULTILINE)
    return body[1] if body else text


def lead_sentences(post: str, sentences: int) -> str:
    """The first sentences; a sentence ends with . ! or ? before white space, with 。 ！ or ？, or with its line."""
    parts = [part for part in SENTENCE_END.split(post.strip()) if part.strip()]
    return " ".join(parts[:sentences])


def references_of(config: SummariesConfig, rows: Sequence[Row]) -> list[str | None]:
    """The reference of each row, or None.

    Raises:
      ValueError: `data` lacks the column, or has another prompt under a row's prompt_id; or no row has the
        named column.
    """
    if config.data is None:
        if config.reference != REFERENCE and not any(config.reference in row for row in rows):
            names = ", ".join(rows[0]) or "(none)"
            raise ValueError(
                f"{config.responses}: no row has {config.reference!r} (--reference); the columns are {names}"
            )
        return [_non_empty(row.get(config.reference)) for row in rows]
    data = load_rows(config.data)
    if not any(config.reference in row for row in data):
        names = ", ".join(data[0])
        raise ValueError(f"{config.data}: there is no {config.reference!r}; its columns are {names}; see --reference")

    def reference(row: Row) -> str | None:
        number = row.get("prompt_id")
        if not isinstance(number, int) or not 0 <= number < len(data):
            raise ValueError(
                f"prompt_id {number!r}: expected the number of one of the {len(data)} rows of {config.data}"
            )
        prompt = data[number].get("prompt")
        if prompt is not None and "prompt" in row and user_text(prompt) != prompt_text(row):
            raise ValueError(f"prompt_id {number} is another prompt in {config.data}; expected the data it was made of")
        return _non_empty(data[number].get(config.reference))

    return map_rows(rows, config.responses, reference)


def _non_empty(reference: Any) -> str | None:
    return reference if isinstance(reference, str) and reference.strip() else None


def average_measures(row_measures: Sequence[Measures], groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Means of all measures over prompts, with intervals; None for a measure that no text has."""

    def estimate(name: str) -> dict[str, Any] | None:
        return mean_with_t_interval(prompt_means([[row_measures[i].get(name) for i in group] for group in groups]))

    parts = {name: (estimate(name), estimate(f"{name}_precision"), estimate(f"{name}_recall")) for name in ROUGES}
    return {
        **{n: f1 and f1 | {"precision": p, "recall": r} for n, (f1, p, r) in parts.items()},
        "length": {name: estimate(name) for name in ("words", "tokens", "compression")},
        "novelty": {str(n): estimate(f"novelty{n}") for n in NOVELTY},
        "extractive": {name: estimate(name) for name in ("coverage", "density")},
    }


def mean_with_t_interval(values_P: np.ndarray) -> dict[str, Any] | None:
    """Mean, standard error and Student's 95 % interval over prompts with a value; no interval for a single prompt."""
    mean = mean_and_interval(values_P)
    return without_nan(mean) if mean["prompts"] else None


def print_summaries(result: Mapping[str, Any], config: SummariesConfig) -> None:
    columns: list[tuple[str, Any]] = [("summaries", result)]
    columns += [(f"first {config.lead} sentences", result["lead"])] if result["lead"] else []
    columns += [("references", result["reference"])] if result["reference"] else []
    rows = [
        (name, *(_cell(_nested(part, path)) for _, part in columns))
        for name, path in PATHS.items()
        if _has_any(columns, path)
    ]
    console.print(Sheet(f"Summaries of {config.responses}", ("mean over prompts", *dict(columns)), rows).rich())
    if len(result["temperatures"]) > 1:
        shown = [(name, path) for name, path in PATHS.items() if name in SHOWN_BY_TEMPERATURE and _nested(result, path)]
        parts = [
            (name, *(number((_nested(part, path) or {}).get("mean")) for _, path in shown))
            for name, part in result["temperatures"].items()
        ]
        console.print(Sheet("By temperature", ("temperature", *dict(shown)), parts).rich())
    without = result["count"] - result["with_reference"]
    if without == result["count"]:
        what = f"no references (no column {config.reference!r}), so no ROUGE"
    else:
        what = f"{without} without a reference"
    words = result["length"]["words"]
    console.print(
        f"{config.out}: {result['count']} summaries of {words['prompts']} prompts, {what}; ± half of the 95 % interval",
        markup=False,
    )


def _nested(part: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    entry: Any = part
    for key in path:
        entry = entry and entry[key]
    return entry


def _has_any(columns: Sequence[tuple[str, Any]], path: Sequence[str]) -> bool:
    return any(_nested(part, path) for _, part in columns)


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if not estimate:
        return number(None)
    half = None if estimate["high"] is None else estimate["high"] - estimate["mean"]
    return number(estimate["mean"]) if missing(half) else f"{number(estimate['mean'])} ± {number(half)}"
