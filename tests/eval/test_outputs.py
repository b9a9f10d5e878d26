"""A law of all programs that write what they have computed: its place is looked at before anything is read."""

import pytest

from eval.__main__ import main

RESPONSES = ["--responses", "none.jsonl"]
PROGRAMS = {
    "generate": ["--checkpoint", "none", "--data", "none.jsonl", "--out", "{}.jsonl"],
    "reward": [*RESPONSES, "--reward_model", "none", "--out", "{}.jsonl"],
    "reward, best of n": [*RESPONSES, "--reward_model", "none", "--out", "s.jsonl", "--best_of", "{}.jsonl"],
    "ifeval": [*RESPONSES, "--out", "{}.json"],
    "summaries": [*RESPONSES, "--out", "{}.json"],
    "judge": ["a.jsonl", "b.jsonl", "--backend", "likelihood", "--model", "none", "--out", "{}"],
    "judge, cache": ["a.jsonl", "b.jsonl", "--backend", "server", "--model", "m", "--out", "j", "--cache", "{}"],
    "compare": ["a", "b", "--judge", "none", "--out", "{}"],
    "report": ["a", "--reward_models", "none", "--compare", "none", "--out", "{}"],
    "theory": ["--out", "{}"],
    "lab": ["--out", "{}"],
    "speed": ["--workload", "w1", "--json", "{}.json"],
    "device": ["--out", "{}.md"],
    "device, json": ["--json", "{}.json"],
    "speed, sweep": ["--workload", "w1", "--sweep", "{}.png"],
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/proc/nowhere/out", "/proc does not permit it"),  # root may write there, the kernel may not
        ("gs://bucket/out", "is an address; expected a name on a disk"),
        ("~/out", "~ means something to a shell alone"),
    ],
)
def test_the_place_is_looked_at_first(
    program: str, place: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.speed.speed.run_program", lambda *_, **__: pytest.fail("it computes"))
    monkeypatch.setattr("eval.speed.device.Parts.run", lambda *_, **__: pytest.fail("it computes"))
    arguments = [argument.replace("{}", place) for argument in PROGRAMS[program]]
    assert main([program.partition(",")[0], *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
