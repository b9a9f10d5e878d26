"""Summaries against references and against their posts: ROUGE, length, novelty, and how much is copied.

  rouge1, rouge2, rougeL   F1 = 2 P R / (P + R) of what a summary and its reference have in common: n-grams, or their
                           longest common subsequence; by the package rouge-score with Porter's stemmer
  words, tokens            length between white space, and as the policy counted it
  compression              words of the summary / words of its post
  novelty n                share of the summary's n-grams (each as often as it stands there) that are not in the post
  coverage, density        over the fragments f that a summary shares with its post, found greedily from its start:
                           sum |f| / |summary| and sum |f|^2 / |summary|, in words

Completions of one prompt are averaged first; means and 95 % intervals (Student's t) are over prompts. Beside them
stand the same measures of the post's first sentences and of the references.

References:
  Lin, ROUGE: A Package for Automatic Evaluation of Summaries, https://aclanthology.org/W04-1013.
  See et al., Get To The Point, https://arxiv.org/abs/1704.04368 (novel n-grams).
  Grusky et al., Newsroom, https://arxiv.org/abs/1804.11283 (coverage and density).
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.sheets import Sheet, missing, number
from eval.stats import mean_and_interval, prompt_means, without_nan
from eval.texts.rows import answered, asked, by_temperature, check_out, groups_of, prompt_of, read, write_json
from train.console import console
from train.data.rows import Row, load_rows
from train.parse import parse
from train.running import setup_errors

REFERENCE = "reference"  # the column's usual name, which need not be there
ROUGES, NOVELTY = ("rouge1", "rouge2", "rougeL"), (1, 2, 3)
PATHS: dict[str, tuple[str, ...]] = {  # where a measure stands in the result
    **{name: (name,) for name in ROUGES},
    **{name: ("length", name) for name in ("words", "tokens", "compression")},
    **{f"new {n}-grams": ("novelty", str(n)) for n in NOVELTY},
    **{name: ("extractive", name) for name in ("coverage", "density")},
}
BRIEF = ("rouge1", "rouge2", "rougeL", "words", "new 2-grams")
Measures = dict[str, float | None]  # of one text; None = there is none


@dataclass(frozen=True, kw_only=True)
class SummariesConfig:
    responses: str  # JSONL (.gz too) with prompt, or post, and completion, or response
    out: str  # the JSON file to write
    reference: str = REFERENCE  # the column with the references: of the responses, or of `data`
    data: str | None = None  # take the references from here; prompt_id is the row's number
    columns: dict[str, str] = field(default_factory=dict)  # renames the responses' columns: ours: theirs
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


def summaries(config: SummariesConfig) -> dict[str, Any]:
    """Write the measures of all summaries together and of each to `config.out`; returns them.

    Raises:
      SetupError: a mistake in the settings or the data.
    """
    with setup_errors():
        check_out(config.out, config.responses, *([config.data] if config.data else []))
        rows = load_rows(config.responses, columns=config.columns, setting="columns")
        texts: list[str] = read(rows, config.responses, answered)
        posts: list[str] = read(rows, config.responses, post_of)
        references = references_of(config, rows)
        score = rouge_scorer()
    prompts = [row.get("prompt_id", post) for row, post in zip(rows, posts, strict=True)]
    groups = groups_of(prompts)
    each = [measures(*row, score) for row in zip(texts, posts, references, strict=True)]
    for row, found in zip(rows, each, strict=True):
        found["tokens"] = row.get("length")
    first = [min(group) for group in groups]  # one row of each prompt: its post and its reference
    result: dict[str, Any] = {
        "responses": config.responses,
        **together(each, groups),
        "count": len(rows),
        "with_reference": sum(reference is not None for reference in references),
        "lead": None,
        "reference": None,
    }
    if config.lead:
        leads = [measures(lead(posts[i], config.lead), posts[i], references[i], score) for i in first]
        result["lead"] = {"sentences": config.lead, **together(leads, [[i] for i in range(len(first))])}
    if known := [(text, posts[i]) for i in first if (text := references[i]) is not None]:
        own = [measures(text, post, None, score) for text, post in known]
        result["reference"] = together(own, [[i] for i in range(len(own))])
    result["temperatures"] = {
        name: together([each[i] for i in part], groups_of(prompts[i] for i in part))
        for name, part in by_temperature(rows).items()
    }
    names = ("prompt_id", "temperature", "sample")
    result["rows"] = [
        {name: row[name] for name in names if name in row} | found for row, found in zip(rows, each, strict=True)
    ]
    write_json(config.out, result)
    show(result, config)
    return result


def measures(text: str, post: str, reference: str | None, score: Any) -> Measures:
    """All there is to say of one summary; against no reference, no ROUGE."""
    found: Measures = {}
    overlaps = score(reference, text) if reference is not None else {}
    for name in ROUGES:
        f1, precision, recall = "fmeasure", "precision", "recall"
        for key, part in ((name, f1), (f"{name}_precision", precision), (f"{name}_recall", recall)):
            found[key] = getattr(overlaps[name], part) if overlaps else None
    length, of_post = len(text.split()), len(post.split())
    found |= {"words": length, "compression": length / of_post if of_post else None}
    summary, source = words(text), words(post)
    for n in NOVELTY:
        found[f"novelty{n}"] = novelty(summary, source, n)
    sizes = [len(fragment) for fragment in fragments(summary, source)]
    found["coverage"] = sum(sizes) / len(summary) if summary else None
    found["density"] = sum(size**2 for size in sizes) / len(summary) if summary else None
    return found


def rouge_scorer() -> Any:
    """(reference, text) -> ROUGE by name.

    Raises:
      ImportError: the package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"summaries: {error}; pip install rouge-score") from error
    return functools.partial(RougeScorer(list(ROUGES), use_stemmer=True).score)


def words(text: str) -> list[str]:
    """The words in lower case, without what stands between them."""
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def novelty(summary: Sequence[str], post: Sequence[str], n: int) -> float | None:
    """The share of the summary's n-grams that are not in the post; None of fewer than n words."""
    grams = [tuple(summary[i : i + n]) for i in range(len(summary) - n + 1)]
    there = {tuple(post[i : i + n]) for i in range(len(post) - n + 1)}
    return sum(gram not in there for gram in grams) / len(grams) if grams else None


def fragments(summary: Sequence[str], post: Sequence[str]) -> list[Sequence[str]]:
    """What the summary shares with the post: from its start on, always the longest piece that stands there."""
    places: dict[str, list[int]] = {}
    for j, word in enumerate(post):
        places.setdefault(word, []).append(j)

    def same(i: int, j: int) -> int:
        size = 0
        while i + size < len(summary) and j + size < len(post) and summary[i + size] == post[j + size]:
            size += 1
        return size

    found, i = [], 0
    while i < len(summary):
        size = max((same(i, j) for j in places.get(summary[i], ())), default=0)
        if size:
            found.append(summary[i : i + size])
        i += max(size, 1)
    return found


def post_of(row: Row) -> str:
    """What is summarized: the column "post", or what stands between POST: and TL;DR: of a prompt, or all of it."""
    if isinstance(row.get("post"), str):
        return row["post"]
    text = prompt_of(row)
    body = re.search(r"^POST:\s*(.*?)\s*(?:^TL;DR:\s*)?\Z", text, re.DOTALL | re.MULTILINE)
    return body[1] if body else text


def lead(post: str, sentences: int) -> str:
    """The first sentences, which end with . ! or ? before white space, or with a line."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", post.strip()) if part.strip()]
    return " ".join(parts[:sentences])


def references_of(config: SummariesConfig, rows: Sequence[Row]) -> list[str | None]:
    """Each row's reference; None where there is none.

    Raises:
      ValueError: `data` has another prompt under a row's prompt_id, or no such column; or no row has the column that
        was named.
    """
    if config.data is None:
        if config.reference != REFERENCE and not any(config.reference in row for row in rows):
            names = ", ".join(rows[0]) or "(none)"
            raise ValueError(
                f"{config.responses}: no row has {config.reference!r} (--reference); the columns are {names}"
            )
        return [_text(row.get(config.reference)) for row in rows]
    data = load_rows(config.data)
    if not any(config.reference in row for row in data):
        names = ", ".join(data[0])
        raise ValueError(f"{config.data}: there is no {config.reference!r}; its columns are {names}; see --reference")

    def one(row: Row) -> str | None:
        number = row.get("prompt_id")
        if not isinstance(number, int) or not 0 <= number < len(data):
            raise ValueError(
                f"prompt_id {number!r}: expected the number of one of the {len(data)} rows of {config.data}"
            )
        prompt = data[number].get("prompt")
        if prompt is not None and "prompt" in row and asked(prompt) != prompt_of(row):
            raise ValueError(f"prompt_id {number} is another prompt in {config.data}; expected the data it was made of")
        return _text(data[number].get(config.reference))

    return read(rows, config.responses, one)


def _text(reference: Any) -> str | None:
    return reference if isinstance(reference, str) and reference.strip() else None


def together(each: Sequence[Measures], groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The means of all measures over prompts, with their intervals; None of what no text has."""

    def of(name: str) -> dict[str, Any] | None:
        return estimate(prompt_means([[each[i].get(name) for i in group] for group in groups]))

    parts = {name: (of(name), of(f"{name}_precision"), of(f"{name}_recall")) for name in ROUGES}
    return {
        **{n: f1 and f1 | {"precision": p, "recall": r} for n, (f1, p, r) in parts.items()},
        "length": {name: of(name) for name in ("words", "tokens", "compression")},
        "novelty": {str(n): of(f"novelty{n}") for n in NOVELTY},
        "extractive": {name: of(name) for name in ("coverage", "density")},
    }


def estimate(values_P: np.ndarray) -> dict[str, Any] | None:
    """Mean, standard error and 95 % interval by Student's t over the prompts that have a value; of one: no interval."""
    mean = mean_and_interval(values_P)
    return without_nan(mean) if mean["prompts"] else None


def show(result: Mapping[str, Any], config: SummariesConfig) -> None:
    columns: list[tuple[str, Any]] = [("summaries", result)]
    columns += [(f"first {config.lead} sentences", result["lead"])] if result["lead"] else []
    columns += [("references", result["reference"])] if result["reference"] else []
    rows = [
        (name, *(_cell(_at(part, path)) for _, part in columns)) for name, path in PATHS.items() if _any(columns, path)
    ]
    console.print(Sheet(f"Summaries of {config.responses}", ("mean over prompts", *dict(columns)), rows).rich())
    if len(result["temperatures"]) > 1:
        shown = [(name, path) for name, path in PATHS.items() if name in BRIEF and _at(result, path)]
        parts = [
            (name, *(number((_at(part, path) or {}).get("mean")) for _, path in shown))
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


def _at(part: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    found: Any = part
    for key in path:
        found = found and found[key]
    return found


def _any(columns: Sequence[tuple[str, Any]], path: Sequence[str]) -> bool:
    return any(_at(part, path) for _, part in columns)


def _cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return number(None)
    half = None if found["high"] is None else found["high"] - found["mean"]
    return number(found["mean"]) if missing(half) else f"{number(found['mean'])} ± {number(half)}"
