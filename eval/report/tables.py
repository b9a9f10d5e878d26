"""The tables of a comparison: reward models, policies, win rates, rewards by step, steps to reach."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.sheets import NONE, Sheet, count, interval_text, missing, number, percent, plus_minus, signed, tenths


def reward_models(models: Sequence[Mapping[str, Any]]) -> Sheet:
    """Returns the accuracy of each reward model beside that of preferring the longer answer."""
    return Sheet(
        "Reward models",
        ("reward model", "role", "step", "accuracy", "length alone", "ECE"),
        [
            (m["path"], m["role"], count(m["step"]), *map(percent, (m["accuracy"], m["length_baseline"], m["ece"])))
            for m in models
        ],
        "Accuracy: the share of held-out comparisons in which the chosen answer scores higher; length alone: if the "
        "longer answer were always preferred; ECE: how far accuracy and stated probability are apart, on average.",
        "reward_models",
    )


def policies(runs: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Returns reward and judge score of each policy before and after, with the paired gains."""
    rows = []
    for name, run in runs.items():
        first, last, gain = run["steps"][0], run["steps"][-1], run["gain"]
        steps = f"{gain['from_step']} to {gain['to_step']}"
        for score in ("reward", "judge"):
            change = gain[score]
            cells = (number(first[score]["mean"]), number(last[score]["mean"]), gain_text(change))
            rows.append((f"{name}, {score}", steps, *cells, tenths(change["in_standard_errors"])))
    return Sheet(
        "Policies, before and after",
        ("score of", "steps", "before", "after", "gain", "in s.e."),
        rows,
        "Reward: by the reward model trained against; judge: by the other one. Means over validation prompts; "
        "gain: paired over prompts, ± its standard error (s.e.).",
        "policies",
    )


def final_win_rate(result: Mapping[str, Any]) -> Sheet:
    """Returns the judge's win rate at the last common step."""
    last = result["win_rate"][-1]
    name = f"{result['a']} over {result['b']}"
    return Sheet(
        "Win rate at the last common step, by the judge",
        ("policies", "step", "win rate", "95 % interval", "prompts"),
        [(name, count(last["step"]), number(last["mean"]), interval_text(last), count(last["prompts"]))],
        f"Over all pairs of completions of a prompt, equal scores count one half. Interval: {result['interval']}.",
        "final_win_rate",
    )


def by_step(result: Mapping[str, Any]) -> Sheet:
    """Returns win rate and judge score at every common step."""
    a, b = result["a"], result["b"]
    rows = []
    for i, rate in enumerate(result["win_rate"]):
        judged = (plus_minus(result["runs"][name]["steps"][i]["judge"]) for name in (a, b))
        rows.append((count(rate["step"]), number(rate["mean"]), interval_text(rate), *judged))
    return Sheet(
        f"{a} over {b}, step by step, by the judge",
        ("step", "win rate", "95 % interval", f"score {a}", f"score {b}"),
        rows,
        "Scores: mean ± standard error over prompts.",
        "win_rate_by_step",
    )


def rewards_by_step(runs: Mapping[str, Mapping[str, Any]]) -> Sheet:
    """Returns the validation reward of every run at every step."""
    rewards = {name: {step["step"]: step["reward"] for step in run["steps"]} for name, run in runs.items()}
    steps = sorted({step for of_run in rewards.values() for step in of_run})
    cells = [[plus_minus(of_run[step]) if step in of_run else NONE for of_run in rewards.values()] for step in steps]
    return Sheet(
        "Validation reward, step by step",
        ("step", *rewards),
        [(count(step), *row) for step, row in zip(steps, cells, strict=True)],
        "By the reward model trained against; mean ± standard error over prompts.",
        "validation_reward",
    )


def steps_to_reach(result: Mapping[str, Any]) -> Sheet:
    """Returns the step at which each run reaches the other one's end."""
    rows = []
    for reach in result["steps_to_reach"]:
        at = "not reached" if reach["step"] is None else f"{tenths(reach['step'])} of {reach['final_step']}"
        between = f"[{tenths(reach['low'])}, {tenths(reach['high'])}]" if reach["low"] is not None else NONE
        times = NONE if reach["times_as_fast"] is None else f"{reach['times_as_fast']:.2f}"
        name = f"{reach['run']} to {reach['reaches']}, {reach['score']}"
        rows.append((name, number(reach["target"]), at, between, times))
    note = (
        "Target: the other run's mean at its last step. At step: where the validation curve first reaches it, on the "
        "straight line between validations; the interval is by percentiles of the bootstrap over prompts, – where "
        "resamples do not reach it. Times as fast: the other run's last step / at step."
    )
    if {reach["score"] for reach in result["steps_to_reach"]} == {"judge"}:
        note += " The runs were trained on different rewards, which cannot be compared."
    columns = ("run to other's end", "target", "at step", "95 % interval", "times as fast")
    return Sheet("Steps to the other run's final score", columns, rows, note, "steps_to_reach")


def gain_text(gain: Mapping[str, Any]) -> str:
    """ "+mean ± standard error"."""
    return NONE if missing(gain["mean"]) else f"{signed(gain['mean'])} ± {number(gain['standard_error'])}"
