"""The tables of `eval judge`, `eval ifeval` and `eval summaries`, as a report shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.judged import name_of, texts_of
from eval.sheets import NONE, Sheet, count, estimate, estimate_error, number, percent, percent_error

IFEVAL = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
MEASURES: dict[str, tuple[str, ...]] = {
    **{f"ROUGE-{n}": (f"rouge{n}",) for n in "12L"},
    **{name: ("length", name) for name in ("words", "tokens", "compression")},
    **{f"new {n}-grams": ("novelty", n) for n in "123"},
}


def all_of(result: Mapping[str, Any]) -> list[Sheet]:
    """The tables of a comparison's `judged` that have rows."""
    others = result.get("judged") or []
    sheets = [judged(result, others), aspects(others), temperatures(others), judging(others), agreement(others)]
    return [sheet for sheet in sheets if sheet.rows] if others else []


def judged(result: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Win rates by every judge: the reward model's at the last step, then those of `eval judge`."""
    last = result["win_rate"][-1]
    rows = [(f"{result['judge']}, validation texts", count(last["step"]), estimate(last), *[NONE] * 4)]
    for label, found in zip(labels(others), others, strict=True):
        bias = found.get("position_bias") or {}
        rows.append(
            (
                label,
                count(found.get("step")),
                estimate(found["win_rate"]),
                estimate(found.get("length_controlled")),
                "/".join(count(found[key]) for key in ("wins", "ties", "losses")),
                percent(found.get("consistent")),
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
    """What became of the pairs, and what it took."""
    keys = ("prompts", "pairs", "judged", "identical", "unparsable", "failed", "too_long", "requests", "cached")
    rows = [("back end", *(str(found.get("backend") or NONE) for found in others))]
    rows += [(key.replace("_", " "), *(count(found.get(key)) for found in others)) for key in keys]
    for kind, name in (("prompt", "tokens read"), ("completion", "tokens written")):
        rows.append((name, *(count((found.get("tokens") or {}).get(kind)) for found in others)))
    rows.append(("cost", *(NONE if found.get("cost") is None else f"{found['cost']:.2f}" for found in others)))
    return Sheet(
        "The pairs that were judged",
        ("what", *labels(others)),
        [row for row in rows if set(row[1:]) != {NONE}],
        "Identical answers tie without being asked about; an answer of the judge that cannot be read is counted as "
        "unparsable, never guessed.",
        "judging",
    )


def aspects(others: Sequence[Mapping[str, Any]]) -> Sheet:
    names = list(dict.fromkeys(name for found in others for name in found.get("aspects") or {}))
    rows = [(name, *(estimate((found.get("aspects") or {}).get(name)) for found in others)) for name in names]
    return Sheet("Win rate by aspect", ("aspect", *labels(others)), rows, "95 % intervals over prompts.", "aspects")


def agreement(others: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = [
        (label, str(other["with"]), number(other["kappa"]), count(other["pairs"]))
        for label, found in zip(labels(others), others, strict=True)
        for other in found.get("agreement") or []
    ]
    note = "Cohen's kappa of the verdicts on the same pairs: 1 always the same, 0 no more often than by chance."
    return Sheet("Agreement of the judges", ("judge", "with", "kappa", "pairs"), rows, note, "agreement")


def temperatures(others: Sequence[Mapping[str, Any]]) -> Sheet:
    """Win rate of each judgement at each sampling temperature."""
    found = [(label, o) for label, o in zip(labels(others), others, strict=True) if o.get("temperatures")]
    at = sorted({float(t) for _, o in found for t in o["temperatures"]})
    rates = [{float(t): rate for t, rate in o["temperatures"].items()} for _, o in found]
    return Sheet(
        "Win rate over sampling temperatures",
        ("temperature", *(label for label, _ in found)),
        [(f"{t:g}", *(estimate(rate.get(t)) for rate in rates)) for t in at],
        "95 % intervals over prompts.",
        "temperatures",
    )


def labels(others: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each judgement: its judge, the texts, and as much more as tells it from the others."""
    names = [f"{name_of(found)}, {texts_of(found)}" for found in others]
    for more in (
        lambda found: f"step {found.get('step')}",
        lambda found: f"{found['name_a']} over {found['name_b']}",
        lambda found: str(found["source"]),
    ):
        names = [
            name if names.count(name) == 1 else f"{name}, {more(found)}"
            for name, found in zip(names, others, strict=True)
        ]
    return names


def ifeval(results: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = []
    for name, found in with_temperatures(results):
        errors = found.get("standard_errors") or {}
        rows.append((name, *(percent_error(found[key], errors.get(key)) for key in IFEVAL), count(found.get("count"))))
    return Sheet(
        "IFEval: instructions followed",
        ("responses of", *(key.replace("_", " ") for key in IFEVAL), "responses"),
        rows,
        "Prompt: all instructions of a prompt are followed; instruction: of all instructions together. Loose counts "
        "also what is followed without asterisks, first line or last line. ± standard error over prompts.",
        "ifeval",
    )


def summaries(results: Sequence[Mapping[str, Any]]) -> Sheet:
    """ROUGE, length and novelty; beside them those of the posts' first sentences and of the references."""
    columns = with_temperatures(results)
    for key, name in (("lead", "first sentences"), ("reference", "references")):  # of the posts, the same for all
        columns += [(name, results[0][key])] if results[0].get(key) else []
    rows = []
    for name, path in MEASURES.items():
        found = [(part.get(path[0]) or {}).get(path[1]) if path[1:] else part.get(path[0]) for _, part in columns]
        rows.append((name, *(NONE if value is None else estimate_error(value) for value in found)))
    return Sheet(
        "ROUGE, length and novelty",
        ("mean over prompts", *(name for name, _ in columns)),
        [row for row in rows if set(row[1:]) != {NONE}],
        "ROUGE: F1 against the references. Compression: words of the summary / of the post. New n-grams: the share "
        "that is not in the post. ± standard error over prompts.",
        "summaries",
    )


def with_temperatures(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each result, followed by its parts where it has several temperatures."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for result in results:
        found.append((result["name"], result))
        parts = result.get("temperatures") or {}
        found += [(f"{result['name']}, temperature {t}", part) for t, part in parts.items() if len(parts) > 1]
    return found
