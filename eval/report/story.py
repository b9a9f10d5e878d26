"""Says in words what no table does: the headline, verdicts, warnings and limits, whichever way the numbers went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.judged import name_of
from eval.runs import PolicyRun
from eval.sheets import missing, number, percent

ERRORS = 3.0  # paired standard errors that a gain must exceed to be called one
LONGER, SHORTER, REPEATING = 1.25, 0.8, 0.8  # changes of length and of distinct completions worth a warning
LAST = 10  # training steps over which the KL at the end is averaged

Result = Mapping[str, Any]
Described = Mapping[str, Mapping[str, Any]]  # of each run by name, as compare.json has it


def direction(gain: Mapping[str, Any]) -> int:
    """Returns 1 or -1 for a mean beyond `ERRORS` paired standard errors, else 0."""
    mean, error = gain["mean"], gain["standard_error"]
    if missing(mean) or missing(error) or abs(mean) <= ERRORS * error:
        return 0
    return 1 if mean > 0 else -1


def ahead(result: Result, rate: Mapping[str, Any]) -> str | None:
    """Returns the run that is ahead: its win rate's interval excludes one half. None if neither is."""
    if missing(rate["low"]) or rate["low"] <= 0.5 <= rate["high"]:
        return None
    return result["a"] if rate["low"] > 0.5 else result["b"]


def headline(result: Result, runs: Described) -> str:
    """Returns whether the policies learned, by reward and judge, and which one is ahead: two or three sentences."""
    improved = {name: direction(run["gain"]["reward"]) > 0 for name, run in runs.items()}
    confirmed = {name: improved[name] and direction(run["gain"]["judge"]) > 0 for name, run in runs.items()}
    if all(confirmed.values()):
        learned = f"{listing(list(runs))} raised the reward they were trained on, and the independent judge agrees."
    elif all(improved.values()):
        agree = [name for name, yes in confirmed.items() if yes]
        learned = f"{listing(list(runs))} raised the reward they were trained on; the independent judge confirms it "
        learned += f"for {listing(agree)} alone." if agree else "for none."
    elif any(improved.values()):
        rose = [name for name, yes in improved.items() if yes]
        learned = f"Only {listing(rose)} raised the reward it was trained on by more than {ERRORS:.0f} standard errors."
    else:
        learned = f"No policy raised the reward it was trained on by more than {ERRORS:.0f} standard errors."
    return f"{learned} {winner(result)}"


def winner(result: Result) -> str:
    """Returns who is ahead at the end, and where the other one is."""
    last = result["win_rate"][-1]
    best = ahead(result, last)
    if best is None:
        return f"Between {result['a']} and {result['b']}: no difference that {last['prompts']} prompts can show."
    elsewhere = [text for judged in result.get("judged") or [] for text in leads(result, judged, besides=best)]
    more = f" Not so where texts are drawn otherwise: {'; '.join(elsewhere)}." if elsewhere else ""
    return f"At the end {best} is ahead on the validation texts, by the judge.{more}"


def leads(result: Result, judged: Mapping[str, Any], besides: str | None = None) -> list[str]:
    """Returns who is ahead at which temperatures, where the interval excludes one half.

    Args:
      besides: a run to leave out; the other one's win rates are then in the text.
    """
    names = {"a": judged["name_a"], "b": judged["name_b"]}
    temperatures: dict[str, list[str]] = {}
    for temperature, rate in (judged.get("temperatures") or {}).items():
        best = ahead(names, rate)
        if best is not None and best != besides:
            shown = temperature if besides is None else f"{temperature} ({number(rate['mean'])})"
            temperatures.setdefault(best, []).append(shown)
    model = name_of(judged)
    by = "" if model == result["judge"] else f", by {model}"
    return [f"{name} is ahead at temperature {listing(at)}{by}" for name, at in temperatures.items()]


def what_happened(result: Result, described: Described, runs: Sequence[PolicyRun]) -> list[str]:
    """Returns paragraphs: one for each run, for the comparison, for each run's signs of reward hacking, and limits."""
    paragraphs = [gains(name, run) for name, run in described.items()]
    paragraphs.append(comparison(result))
    paragraphs += [text for text in (sooner(result),) if text]
    paragraphs += [hints(run, described[run.name]) for run in runs]
    paragraphs.append(
        "Limits: one run of each method with one seed. The standard errors and intervals are over prompts; they say "
        "nothing about how another seed would come out."
    )
    return paragraphs


def gains(name: str, run: Mapping[str, Any]) -> str:
    """Returns whether the reward changed beyond chance, and whether the judge says the same."""
    gain = run["gain"]
    reward, judge = direction(gain["reward"]), direction(gain["judge"])
    change = {1: "rose by more than", 0: "shows no change: it stayed within", -1: "fell by more than"}[reward]
    text = f"{name}: the mean validation reward {change} {ERRORS:.0f} paired standard errors "
    text += f"from step {gain['from_step']} to {gain['to_step']}."
    if missing(gain["judge"]["mean"]):
        return f"{text} The judge has not scored this run."
    if reward > 0:
        verdict = {1: " agrees", 0: " does not confirm it", -1: " contradicts it: its score fell"}[judge]
    else:
        verdict = {1: " saw it rise", 0: " saw no change", -1: "'s score fell" + (" too" if reward < 0 else "")}[judge]
    return f"{text} The independent judge{verdict}."


def comparison(result: Result) -> str:
    """Returns which run the judge prefers in the end, and which one it preferred on the way."""
    a, b, rates = result["a"], result["b"], result["win_rate"]
    last = rates[-1]
    text = f"{a} against {b}, by the judge, at step {last['step']}: the interval of the win rate "
    best = ahead(result, last)
    if best is None:
        text += f"contains 0.5, no difference that {last['prompts']} prompts can show."
    else:
        text += f"excludes 0.5, {best} is ahead at the end."
    on_the_way = {name: [str(r["step"]) for r in rates[:-1] if ahead(result, r) == name] for name in (a, b)}
    leading = [f"{name} was ahead at step {', '.join(steps)}" for name, steps in on_the_way.items() if steps]
    if len(rates) > 1:
        earlier = f"Of the {len(rates) - 1} earlier comparisons"
        text += f" {earlier}, {' and '.join(leading)}." if leading else f" {earlier}, none excludes 0.5."
    return text


def sooner(result: Result) -> str:
    """Returns which run was at the other one's end before that one, by each score; "" where chance may say so."""
    parts = []
    for reach in result.get("steps_to_reach") or []:
        if reach["times_as_fast"] is None or reach["high"] is None or reach["high"] >= reach["final_step"]:
            continue
        score = "validation reward" if reach["score"] == "reward" else "judge's score"
        parts.append(f"{reach['run']} had {reach['reaches']}'s final {score} sooner, by more than chance over prompts.")
    return "Speed: " + " ".join(parts) if parts else ""


def verdicts(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a paragraph for each judge: who is ahead, at which temperatures, and pairs without a verdict."""
    paragraphs = []
    for other in judged:
        step = "" if other.get("step") is None else f" at step {other['step']}"
        best = ahead({"a": other["name_a"], "b": other["name_b"]}, other["win_rate"])
        if best is None:
            text = f"no difference that {other['win_rate']['prompts']} prompts can show"
        else:
            text = f"the interval of the win rate excludes 0.5, {best} is ahead"
        ahead_at = leads({"judge": name_of(other)}, other)
        text = f"{name_of(other)}{step}: {text}." + (f" {'; '.join(ahead_at)}." if ahead_at else "")
        lost = [f"{other[key]} {key}" for key in ("unparsable", "failed") if other.get(key)]
        paragraphs.append(text + (f" Pairs without a verdict: {', '.join(lost)}." if lost else ""))
    return paragraphs


def hints(run: PolicyRun, described: Mapping[str, Any]) -> str:
    """Returns KL, length and variety on the way, and those of them and of the judge's that hint at reward hacking."""
    first, last = described["steps"][0], described["steps"][-1]
    length, variety = last["mean_length"] / first["mean_length"], last["distinct_completions"]
    facts = [
        f"mean length {first['mean_length']:.1f} → {last['mean_length']:.1f} tokens",
        f"different completions {percent(first['distinct_completions'])} → {percent(variety)}",
    ]
    kl = run.series("kl")[1][-LAST:]
    if kl.size:
        facts.insert(0, f"KL to the start {kl.mean():.3f} nats per token (mean of the last {kl.size} steps)")
    signs = []
    if length > LONGER or length < SHORTER:
        signs.append(f"completions got {'longer' if length > 1 else 'shorter'} by {100 * abs(length - 1):.0f} %")
    if variety < REPEATING * first["distinct_completions"]:
        signs.append("the policy repeats itself more than at the start")
    if direction(described["gain"]["reward"]) > 0 and not missing(described["gain"]["judge"]["mean"]):
        if direction(described["gain"]["judge"]) <= 0:
            signs.append("the reward rose and the judge's score did not")
        elif (best := judge_peak(described["steps"])) is not None:
            signs.append(f"the judge's score was higher at step {best} than at the end")
    verdict = (
        f"Worth a look for reward hacking: {'; '.join(signs)}." if signs else "None of this hints at reward hacking."
    )
    return f"{run.name}, on the way: {', '.join(facts)}. {verdict}"


def judge_peak(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns the step of the judge's highest mean score, if that is 2 standard errors above the last."""
    scored = [step for step in steps if not missing(step["judge"]["mean"])]
    best, last = max(scored, key=lambda step: step["judge"]["mean"]), scored[-1]
    errors = [step["judge"]["standard_error"] for step in (best, last)]
    if any(missing(error) for error in errors):
        return None
    return best["step"] if best["judge"]["mean"] - last["judge"]["mean"] > 2 * math.hypot(*errors) else None


def listing(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
