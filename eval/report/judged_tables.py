"""The tables of `eval judge`, `eval ifeval` and `eval summaries`, as a report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.judged import name_of, texts_of
from eval.sheets import NONE, Sheet, count, number, percent, percent_error, plus_minus, rate_text

IFEVAL = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
MEASURES: dict[str, tuple[str, ...]] = {
    **{f"ROUGE-{n}": (f"rouge{n}",) for n in "12L"},
    **{name: ("length", name) for name in ("words", "tokens", "compression")},
    **{f"new {n}-grams": ("novelty", n) for n in "123"},
}


def all_of(result: Mapping[str, Any]) -> list[Sheet]:
    """Returns the tables of a comparison's `judged` that have rows."""
    others = result.get("judged") or []
    sheets = [judged(result, others), aspects(others), temperatures(others), judging(others), agreement(others)]
    return [sheet for sheet in sheets if sheet.rows] if others else []


def judged(result: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns win rates by every judge: the reward model's at the last step, then those of `eval judge`."""
    last = result["win_rate"][-1]
    rows = [(f"{result['judge']}, validation texts", count(last["step"]), rate_text(last), *[NONE] * 4)]
    for label, other in zip(labels(others), others, strict=True):
        bias = other.get("position_bias") or {}
        rows.append(
            (
                label,
                count(other.get("step")),
                rate_text(other["win_rate"]),
                rate_text(other.get("length_controlled")),
                "/".join(count(other[key]) for key in ("wins", "ties", "losses")),
                percent(other.get("consistent")),
                percent(bias.get("share")),
            )
        )
    return Sheet(
        f"Win rate of {result['a']} over {result['b']} by every judge",
        ("judge", "step", "win rate", "at equal length", "won/tied/lost", "consistent", "first shown"),
        rows,
        "95 % intervals over prompts. At equal length: by a logistic regression on the difference in length. "
        "Consistent: pairs in which both orders gave the same verdict. First shown: how often the answer that was "
        "shown first won, ties as halves; 50 % without position bias.",
        "judges",
    )


def judging(others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns how many pairs were judged, left out or lost, and what they cost."""
    keys = ("prompts", "pairs", "judged", "identical", "unparsable", "failed", "too_long", "requests", "cached")
    rows = [("back end", *(str(other.get("backend") or NONE) for other in others))]
    rows += [(key.replace("_", " "), *(count(other.get(key)) for other in others)) for key in keys]
    for kind, name in (("prompt", "tokens read"), ("completion", "tokens written")):
        rows.append((name, *(count((other.get("tokens") or {}).get(kind)) for other in others)))
    rows.append(("cost", *(NONE if other.get("cost") is None else f"{other['cost']:.2f}" for other in others)))
    return Sheet(
        "The pairs that were judged",
        ("what", *labels(others)),
        [row for row in rows if set(row[1:]) != {NONE}],
        "Identical answers tie without being asked about; an answer of the judge that cannot be read is counted as "
        "unparsable, never guessed.",
        "judging",
    )


def aspects(others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the win rate of each judgement by each aspect of its task."""
    names = list(dict.fromkeys(name for other in others for name in other.get("aspects") or {}))
    rows = [(name, *(rate_text((other.get("aspects") or {}).get(name)) for other in others)) for name in names]
    return Sheet("Win rate by aspect", ("aspect", *labels(others)), rows, "95 % intervals over prompts.", "aspects")


def agreement(others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns Cohen's kappa of each judge with the others."""
    rows = [
        (label, str(pair["with"]), number(pair["kappa"]), count(pair["pairs"]))
        for label, other in zip(labels(others), others, strict=True)
        for pair in other.get("agreement") or []
    ]
    note = "Cohen's kappa of the verdicts on the same pairs: 1 always the same, 0 no more often than by chance."
    return Sheet("Agreement of the judges", ("judge", "with", "kappa", "pairs"), rows, note, "agreement")


def temperatures(others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the win rate of each judgement at each sampling temperature."""
    swept = [(label, other) for label, other in zip(labels(others), others, strict=True) if other.get("temperatures")]
    at = sorted({float(t) for _, other in swept for t in other["temperatures"]})
    rates = [{float(t): rate for t, rate in other["temperatures"].items()} for _, other in swept]
    return Sheet(
        "Win rate over sampling temperatures",
        ("temperature", *(label for label, _ in swept)),
        [(f"{t:g}", *(rate_text(rate.get(t)) for rate in rates)) for t in at],
        "95 % intervals over prompts.",
        "temperatures",
    )


def labels(others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a name for each judgement: judge, texts, and then step, sides or source until the name is unique."""
    names = [f"{name_of(other)}, {texts_of(other)}" for other in others]
    for more in (
        lambda other: f"step {other.get('step')}",
        lambda other: f"{other['name_a']} over {other['name_b']}",
        lambda other: str(other["source"]),
    ):
        names = [
            name if names.count(name) == 1 else f"{name}, {more(other)}"
            for name, other in zip(names, others, strict=True)
        ]
    return names


def ifeval(results: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the four accuracies of each result, and at each of its temperatures."""
    rows = []
    for name, part in with_temperatures(results):
        errors = part.get("standard_errors") or {}
        rows.append((name, *(percent_error(part[key], errors.get(key)) for key in IFEVAL), count(part.get("count"))))
    return Sheet(
        "IFEval: instructions followed",
        ("responses of", *(key.replace("_", " ") for key in IFEVAL), "responses"),
        rows,
        "Prompt: all instructions of a prompt are followed; instruction: of all instructions together. Loose counts "
        "also what is followed without asterisks, first line or last line. ± standard error over prompts.",
        "ifeval",
    )


def summaries(results: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns ROUGE, length and novelty, beside those of the posts' first sentences and of the references."""
    columns = with_temperatures(results)
    for key, name in (("lead", "first sentences"), ("reference", "references")):  # of the posts, the same for all
        columns += [(name, results[0][key])] if results[0].get(key) else []
    rows = []
    for name, path in MEASURES.items():
        values = [(part.get(path[0]) or {}).get(path[1]) if path[1:] else part.get(path[0]) for _, part in columns]
        rows.append((name, *(NONE if value is None else plus_minus(value) for value in values)))
    return Sheet(
        "ROUGE, length and novelty",
        ("mean over prompts", *(name for name, _ in columns)),
        [row for row in rows if set(row[1:]) != {NONE}],
        "ROUGE: F1 against the references. Compression: words of the summary / of the post. New n-grams: the share "
        "that is not in the post. ± standard error over prompts.",
        "summaries",
    )


def with_temperatures(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns each result by its name, followed by its parts where it has several temperatures."""
    named: list[tuple[str, Mapping[str, Any]]] = []
    for result in results:
        named.append((result["name"], result))
        parts = result.get("temperatures") or {}
        named += [(f"{result['name']}, temperature {t}", part) for t, part in parts.items() if len(parts) > 1]
    return named
