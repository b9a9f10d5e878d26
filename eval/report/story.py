"""What happened, in plain words made from the numbers, whichever way it went."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.judged import name_of
from eval.runs import PolicyRun
from eval.sheets import interval_text, missing, number, percent, signed, tenths

ENOUGH = 3.0  # paired standard errors that a gain must exceed to be called one
LONGER, SHORTER, REPEATING = 1.25, 0.8, 0.8  # changes of length and of distinct completions worth a warning
LAST = 10  # training steps over which the KL at the end is averaged

Result = Mapping[str, Any]
Described = Mapping[str, Mapping[str, Any]]  # of each run by name, as compare.json has it


def direction(gain: Mapping[str, Any]) -> int:
    """1 or -1 for a mean beyond `ENOUGH` paired standard errors, else 0."""
    mean, error = gain["mean"], gain["standard_error"]
    if missing(mean) or missing(error) or abs(mean) <= ENOUGH * error:
        return 0
    return 1 if mean > 0 else -1


def ahead(result: Result, rate: Mapping[str, Any]) -> str | None:
    """The run whose win rate's interval excludes one half, if one does."""
    if missing(rate["low"]) or rate["low"] <= 0.5 <= rate["high"]:
        return None
    return result["a"] if rate["low"] > 0.5 else result["b"]


def headline(result: Result, runs: Described) -> str:
    """One or two sentences."""
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
        learned = f"Only {listing(rose)} raised the reward it was trained on by more than {ENOUGH:.0f} standard errors."
    else:
        learned = f"No policy raised the reward it was trained on by more than {ENOUGH:.0f} standard errors."
    return f"{learned} {winner(result)}"


def winner(result: Result) -> str:
    last = result["win_rate"][-1]
    best = ahead(result, last)
    if best is None:
        return f"Between {result['a']} and {result['b']}: no difference that {last['prompts']} prompts can show."
    elsewhere = [text for found in result.get("judged") or [] for text in leads(result, found, but=best)]
    more = f" Not so where texts are drawn otherwise: {'; '.join(elsewhere)}." if elsewhere else ""
    return f"At the end {best} is ahead on the validation texts, by the judge.{more}"


def leads(result: Result, judged: Mapping[str, Any], but: str | None = None) -> list[str]:
    """Who is ahead at which temperatures, where the interval excludes one half; `but`: leave this run out."""
    names = {"a": judged["name_a"], "b": judged["name_b"]}
    found: dict[str, list[str]] = {}
    for temperature, rate in (judged.get("temperatures") or {}).items():
        best = ahead(names, rate)
        if best is not None and best != but:
            found.setdefault(best, []).append(f"{temperature} ({number(rate['mean'])})")
    model = name_of(judged)
    by = "" if model == result["judge"] else f", by {model}"
    return [f"{name} is ahead at temperature {listing(at)}{by}" for name, at in found.items()]


def what_happened(result: Result, described: Described, runs: Sequence[PolicyRun]) -> list[str]:
    """Paragraphs: one for each run, one for the comparison, one of what hints at reward hacking, one of limits."""
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
    gain = run["gain"]
    reward, judge = gain["reward"], gain["judge"]
    text = f"{name}: from step {gain['from_step']} to {gain['to_step']} mean validation reward {moved(run, 'reward')}"
    text += {
        1: f"It rose, by more than the {ENOUGH:.0f} standard errors asked for. ",
        0: f"That is within {ENOUGH:.0f} standard errors: no change is shown. ",
        -1: f"It fell, by more than {ENOUGH:.0f} standard errors. ",
    }[direction(reward)]
    if missing(judge["mean"]):
        return text + "The judge has not scored this run."
    rose = direction(reward) > 0
    verdict = {
        1: "The independent judge agrees: its score" if rose else "The independent judge saw it rise: its score",
        0: "The independent judge does not confirm it: its score" if rose else "The independent judge's score",
        -1: "The independent judge contradicts it: its score" if rose else "The independent judge's score fell too: it",
    }[direction(judge)]
    return f"{text}{verdict} {moved(run, 'judge')}".rstrip()


def moved(run: Mapping[str, Any], score: str) -> str:
    first, last, gain = run["steps"][0][score]["mean"], run["steps"][-1][score]["mean"], run["gain"][score]
    times = "" if missing(gain["in_standard_errors"]) else f", {gain['in_standard_errors']:.1f} paired standard errors"
    change = f"{signed(gain['mean'])} ± {number(gain['standard_error'])}{times}, {gain['prompts']} prompts"
    return f"went from {number(first)} to {number(last)} ({change}). "


def comparison(result: Result) -> str:
    a, b, rates = result["a"], result["b"], result["win_rate"]
    last = rates[-1]
    text = (
        f"Against each other: at step {last['step']} the judge prefers {a} to {b} in {percent(last['mean'])} of pairs "
        f"(95 % interval {interval_text(last)} over {last['prompts']} prompts). "
    )
    best = ahead(result, last)
    if best is None:
        text += f"The interval contains 0.5: no difference that {last['prompts']} prompts can show."
    else:
        text += f"The interval excludes 0.5: {best} is ahead at the end."
    on_the_way = {name: [str(r["step"]) for r in rates[:-1] if ahead(result, r) == name] for name in (a, b)}
    seen = [f"{name} was ahead at step {', '.join(steps)}" for name, steps in on_the_way.items() if steps]
    if len(rates) > 1:
        earlier = f"Of the {len(rates) - 1} earlier comparisons"
        text += f" {earlier}, {' and '.join(seen)}." if seen else f" {earlier}, none excludes 0.5."
    return text


def sooner(result: Result) -> str:
    """Which run was where the other one ended before that one's end, by each score; not where chance may say so."""
    parts = []
    for found in result.get("steps_to_reach") or []:
        if found["times_as_fast"] is None or found["high"] is None or found["high"] >= found["final_step"]:
            continue
        what = "validation reward" if found["score"] == "reward" else "judge's score"
        between = f"95 % interval [{tenths(found['low'])}, {tenths(found['high'])}] over prompts"
        parts.append(
            f"{found['run']} had {found['reaches']}'s final {what} ({number(found['target'])}) at step "
            f"{found['step']:.1f} of {found['final_step']} ({between}), {found['times_as_fast']:.2f} times as fast."
        )
    return "Speed: " + " ".join(parts) if parts else ""


def verdicts(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A paragraph for each judge."""
    paragraphs = []
    for found in judged:
        step = "" if found.get("step") is None else f" at step {found['step']}"
        rate = found["win_rate"]
        text = (
            f"{name_of(found)}{step}: {found['name_a']} wins {percent(rate['mean'])} of {found['pairs']} pairs against "
        )
        text += f"{found['name_b']}, ties as halves (95 % interval {interval_text(rate)} over {rate['prompts']} prompts)"
        equal = found.get("length_controlled")
        if equal is not None and not missing(equal["mean"]):
            text += f", and {percent(equal['mean'])} {interval_text(equal)} at equal length"
        if not missing(found.get("consistent")):
            text += f". Both orders gave the same verdict in {percent(found['consistent'])} of pairs"
        ahead_at = leads({"judge": name_of(found)}, found)
        text += f". {'; '.join(ahead_at)}" if ahead_at else ""
        lost = [f"{found[key]} {key}" for key in ("unparsable", "failed") if found.get(key)]
        text += f". No verdict: {', '.join(lost)}." if lost else "."
        paragraphs.append(text)
    return paragraphs


def hints(run: PolicyRun, described: Mapping[str, Any]) -> str:
    """KL, length, variety and the judge's peak: what changes when a policy learns to please a reward model."""
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
    """The step at which the judge's mean score was highest, if that is 2 standard errors above the last."""
    scored = [step for step in steps if not missing(step["judge"]["mean"])]
    best, last = max(scored, key=lambda step: step["judge"]["mean"]), scored[-1]
    errors = [step["judge"]["standard_error"] for step in (best, last)]
    if any(missing(error) for error in errors):
        return None
    return best["step"] if best["judge"]["mean"] - last["judge"]["mean"] > 2 * math.hypot(*errors) else None


def listing(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
