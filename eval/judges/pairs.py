"""Pairs of completions of the same prompt, and a judge's judgement of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from eval.judges.task import readable
from models.messages import check_text
from train.console import console, print_plain
from train.data.rows import Row, is_number, load_rows

LONGEST_WRITTEN = 20_000  # characters of a reply in judgements.jsonl; longer replies are cut


class PairKey(NamedTuple):
    """Identifies a pair: the k-th completions of a prompt at a temperature."""

    prompt_id: Any
    temperature: float | None
    sample: int


@dataclass(frozen=True)
class CompletionPair:
    """The k-th completions of both policies for one prompt."""

    key: PairKey
    prompt: Any
    a: str
    b: str
    row_a: Mapping[str, Any]
    row_b: Mapping[str, Any]

    def shown(self, order: str) -> tuple[str, str]:
        """The two answers in the given order, "ab" or "ba"."""
        return (self.a, self.b) if order == "ab" else (self.b, self.a)


@dataclass
class Judgement:
    """A judge's verdicts on a pair: one for each order, or a score for each answer.

    An order: {"shown": "ab" or "ba", "winner": "a", "b", "tie" or None, "kind", "aspects", ...}. `kind` is "strict",
    "fallback", "unparsable", "failed" or "too_long"; judges without text write "likelihood".
    """

    orders: list[dict[str, Any]] = field(default_factory=list)
    scores: tuple[float | None, float | None] | None = None
    p: float | None = None  # probability that A is better, mean of both orders
    kind: str | None = None  # why a score is missing


def winner_of(order: str, winner: str | None) -> str | None:
    """Maps "first" or "second" of the shown order to "a" or "b"; other values pass through."""
    if winner not in ("first", "second"):
        return winner
    return order[winner == "second"]


def shortened(text: str) -> str:
    """Cuts a reply to the length that judgements.jsonl stores."""
    return text if len(text) <= LONGEST_WRITTEN else f"{text[:LONGEST_WRITTEN]} [... cut: {len(text)} characters]"


def read_pairs(file_a: str, file_b: str, *, common: bool = False, limit: int | None = None) -> list[CompletionPair]:
    """Pairs the completions of two files, in the order of prompt_id, temperature and sample.

    Args:
      common: leave out prompts that one file lacks, and print how many.
      limit: use only the first `limit` prompts.

    Raises:
      FileNotFoundError, ValueError: files that are not completions of the same prompts; the message says where.
    """
    groups = [load_groups(file) for file in (file_a, file_b)]
    ids = [dict.fromkeys(prompt_id for prompt_id, _ in groups[side]) for side in (0, 1)]
    shared = [prompt_id for prompt_id in ids[0] if prompt_id in ids[1]]
    if not shared:
        raise ValueError(f"{file_a} and {file_b} have no prompt_id in common")
    for one, other, ids_one, ids_other in ((file_a, file_b, *ids), (file_b, file_a, *ids[::-1])):
        unmatched = [prompt_id for prompt_id in ids_one if prompt_id not in ids_other]
        if unmatched and not common:
            raise ValueError(
                f"{other}: {len(unmatched)} of the {len(ids_one)} prompts of {one} are missing, the first with "
                f"prompt_id {unmatched[0]!r}; give completions of the same prompts, or --common true"
            )
        if unmatched:
            console.print(f"{one}: {len(unmatched)} of {len(ids_one)} prompts left out, {other} does not have them")
    prompt_ids = set(sorted(shared, key=_sort_key)[:limit])
    pairs = [
        pair
        for key in sorted({**groups[0], **groups[1]}, key=lambda key: (_sort_key(key[0]), _sort_key(key[1])))
        if key[0] in prompt_ids
        for pair in _pairs_of_group(key, groups, (file_a, file_b))
    ]
    samples = [(pair.row_a.get("sample"), pair.row_b.get("sample")) for pair in pairs]
    if differing := [both for both in samples if None not in both and both[0] != both[1]]:
        console.print(
            f"{len(differing)} of {len(pairs)} pairs have different numbers in 'sample' (first: {differing[0][0]} and "
            f"{differing[0][1]}); they are paired in the order of these numbers"
        )
    print_degenerate(pairs, file_a, file_b)
    return pairs


def print_degenerate(pairs: Sequence[CompletionPair], file_a: str, file_b: str) -> None:
    """Says how many pairs have equal answers, which tie unasked, and how many an empty one, if any do."""
    equal = sum(pair.a == pair.b for pair in pairs)
    empty_a, empty_b = (sum(not pair.shown(order)[0].strip() for pair in pairs) for order in ("ab", "ba"))
    if equal or empty_a or empty_b:
        print_plain(
            f"of {len(pairs):,} pairs {equal:,} have equal answers; {empty_a:,} answers of {file_a} and {empty_b:,} of "
            f"{file_b} are empty"
        )


def load_groups(file: str) -> dict[tuple[Any, float | None], list[Row]]:
    """Loads the rows of a file by (prompt_id, temperature), sorted by sample.

    Raises:
      ValueError: a row without a column or with a value of the wrong type, two prompts under one prompt_id, or two
        completions under one sample.
    """
    groups: dict[tuple[Any, float | None], list[Row]] = {}
    prompts: dict[Any, Any] = {}
    for number, row in enumerate(load_rows(file), 1):
        row = row if "completion" in row or "response" not in row else row | {"completion": row["response"]}
        for column in ("prompt_id", "prompt", "completion"):
            if row.get(column) is None:
                raise ValueError(f"{file}: row {number} has no {column!r}; its columns are {', '.join(row)}")
        if not isinstance(row["completion"], str):
            raise ValueError(f"{file}: row {number}: expected a completion that is text, got {row['completion']!r:.60}")
        try:
            check_text(row["completion"])
            check_text(readable(row["prompt"]))
        except ValueError as error:
            raise ValueError(f"{file}: row {number}: {error}") from error
        if isinstance(row["prompt_id"], (list, dict)):
            raise ValueError(f"{file}: row {number}: expected a prompt_id that is a number or text")
        temperature = row.get("temperature")
        if temperature is not None and not is_number(temperature):
            raise ValueError(f"{file}: row {number}: expected a temperature that is a number, got {temperature!r:.60}")
        if prompts.setdefault(row["prompt_id"], row["prompt"]) != row["prompt"]:
            raise ValueError(f"{file}: row {number}: prompt_id {row['prompt_id']} stands for two prompts")
        groups.setdefault((row["prompt_id"], temperature), []).append(row)
    for key, rows in groups.items():
        samples = [row["sample"] for row in rows if row.get("sample") is not None]
        if not samples:
            continue
        if len(samples) < len(rows) or not all(type(sample) is int for sample in samples):
            raise ValueError(
                f"{file}: {_group_text(key)}: expected a whole number in 'sample' of every row, or of none"
            )
        if len(set(samples)) < len(samples):
            duplicate = next(sample for sample in samples if samples.count(sample) > 1)
            raise ValueError(f"{file}: {_group_text(key)}: two completions are sample {duplicate}; expected each once")
        rows.sort(key=lambda row: row["sample"])
    return groups


def _pairs_of_group(
    key: tuple[Any, float | None], groups: Sequence[dict[tuple[Any, float | None], list[Row]]], files: tuple[str, str]
) -> list[CompletionPair]:
    rows = [groups[side].get(key, []) for side in (0, 1)]
    prompt_id, temperature = key
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"{_group_text(key)}: {len(rows[0])} completions in {files[0]}, {len(rows[1])} in {files[1]}; "
            f"expected as many of both"
        )
    pairs = []
    for k, (a, b) in enumerate(zip(*rows, strict=True)):
        if a["prompt"] != b["prompt"]:
            raise ValueError(f"prompt_id {prompt_id} stands for one prompt in {files[0]} and another one in {files[1]}")
        pairs.append(
            CompletionPair(PairKey(prompt_id, temperature, k), a["prompt"], a["completion"], b["completion"], a, b)
        )
    return pairs


def _group_text(key: tuple[Any, float | None]) -> str:
    return f"prompt_id {key[0]}" + ("" if key[1] is None else f" at temperature {key[1]}")


def _sort_key(value: Any) -> tuple[bool, Any]:
    """Sorts None first, then numbers, then texts."""
    return (isinstance(value, str), -1.0 if value is None else value)
