"""`eval device`: the arithmetic of its report, its time, what becomes of a part that fails, and its programs."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from eval.speed import device
from eval.speed.device import SIZES, Parts, last_line, make_report, parse_device, policy_arguments
from eval.speed.device_report import GIB, TORCH, Report, compared_figures, digits, markdown, planned_figures
from eval.speed.timed_programs import time_programs
from eval.speed.timing import median_seconds
from models.config import Qwen3Config
from models.flops import decode_bytes, forward_flops
from models.published import PUBLISHED
from train.config import PlanConfig, PolicyConfig
from train.parse import parse

TINY = replace(
    SIZES["tiny"], prompt=8, completion=8, prompts_per_step=2, num_generations=2, microbatch_prompts=1, dtype="float32",
    network=Qwen3Config(64, 16, 32, 1, 2, 1, 8, tie_word_embeddings=True),
)  # fmt: skip
MACHINE = {"platform": "gpu", "device": "NVIDIA H200", "devices": 1, "cpu_cores": 16, "versions": {"jax": "0.11.2"}}
MACHINE |= {"peak_source": "the maker's", "peak_flops": 989e12, "bandwidth": 4.8e12}
RUN = {"size": "qwen3-1.7b", "command": "python -m eval device", "date": "2030-01-01", "planned_for": "H200"}
FIGURES = {"sample_s": 8.0, "gradient_s": 0.5, "optimizer_s": 0.1, "update_s": 4.0}
FIGURES |= {"sample_peak_bytes": 30.0 * GIB, "step_peak_bytes": 40.0 * GIB}
# as `train plan` writes it, all but calls of one call
PROGRAMS = {
    "sample": {"calls": 1, "seconds": 4.0, "memory_bytes": 20 * GIB},
    "gradient": {"calls": 8, "seconds": 0.25, "memory_bytes": 32 * GIB},
    "optimizer": {"calls": 1, "seconds": 0.5, "memory_bytes": 25 * GIB},
}


def full_report(**changes: Any) -> Report:
    planned, notes = planned_figures({"programs": PROGRAMS, "step_seconds": 6.5}, "H200")
    figures = {name: FIGURES for name in device.IMPLEMENTATIONS} | {TORCH: FIGURES | {"sample_s": 16.0}}
    return replace(Report(MACHINE | RUN, asdict(SIZES["qwen3-1.7b"]), figures, planned, notes), **changes)


def test_the_work_is_that_of_the_published_model() -> None:
    network = PUBLISHED["Qwen/Qwen3-1.7B"]
    assert SIZES["qwen3-1.7b"].network == network and SIZES["qwen3-1.7b"].dtype == "bfloat16"
    for kind in (PolicyConfig, PlanConfig):
        config = parse(kind, policy_arguments(SIZES["qwen3-1.7b"]))
        sizes = (config.prompts_per_step, config.num_generations, config.microbatch_prompts)
        assert sizes == (16, 8, 2) and config.model.architecture == network
        assert config.max_prompt_length == config.max_completion_length == config.min_tokens == 512


def test_a_plan_counts_programs_of_a_word_together_and_seconds_by_calls() -> None:
    programs = PROGRAMS | {
        "sample tail": {"calls": 3, "seconds": 1.0, "memory_bytes": 21 * GIB},
        "logprobs": {"calls": 16, "seconds": 0.125, "memory_bytes": 1 * GIB},
        "score x": {"calls": 1, "seconds": 9.0, "memory_bytes": 1 * GIB},
    }
    planned, notes = planned_figures({"programs": programs, "step_seconds": 20.0, "compiler": "one"}, "H200")
    assert planned == {
        "sample_s": 4.0 + 3 * 1.0,
        "sample_peak_bytes": 21 * GIB,
        "gradient_s": 0.25,
        "optimizer_s": 0.5,
        "update_s": 8 * 0.25 + 0.5 + 16 * 0.125,
        "step_peak_bytes": 32 * GIB,
        "step_s": 20.0,
    }
    assert notes == ["plan: memory by one"]


@pytest.mark.parametrize("seconds", [{}, {"seconds": None}], ids=["absent", "null"])
def test_a_plan_without_seconds_has_memory_and_says_so(seconds: dict[str, None]) -> None:
    programs = {
        name: {"calls": program["calls"], "memory_bytes": program["memory_bytes"], **seconds}
        for name, program in PROGRAMS.items()
    }
    planned, notes = planned_figures({"programs": programs}, "H200")
    assert planned["sample_s"] is planned["update_s"] is planned["step_s"] is None
    assert planned["step_peak_bytes"] == 32 * GIB
    assert notes == ["plan: no seconds; it has them where a compiler for H200 is installed"]
    assert planned_figures({}, "H200") == ({}, [])


def test_every_figure_is_measured_planned_and_their_ratio() -> None:
    network, lengths = SIZES["qwen3-1.7b"].network, ([512] * 16, [[512] * 8] * 16)
    read, flops = decode_bytes(network, *lengths, itemsize=2), 4 * forward_flops(network, *lengths)
    found = {row.figure: row[1:] for row in compared_figures(full_report())}
    assert found == {
        "decode, ms per token": (8000 / 512, 4000 / 512, 2.0),
        "decode, share of the bandwidth": pytest.approx((read / 8 / 4.8e12, read / 4 / 4.8e12, 0.5)),
        "gradient of a micro-batch, s": (0.5, 0.25, 2.0),
        "optimizer, s": (0.1, 0.5, 0.2),
        "update, s": (4.0, 2.5, 1.6),
        "update, MFU": pytest.approx((flops / 4 / 989e12, flops / 2.5 / 989e12, 2.5 / 4)),
        "sampling and update, s": (12.0, 6.5, 12 / 6.5),
        "peak memory of sampling, GiB": (30.0, 20.0, 1.5),
        "peak memory of the step, GiB": (40.0, 32.0, 1.25),
    }


def test_the_form_is_the_same_with_everything_and_with_nothing() -> None:
    whole = markdown(full_report())
    nothing: dict[str, Any] = {name: {} for name in [*device.IMPLEMENTATIONS, TORCH]}
    empty = markdown(full_report(figures=nothing, planned={}, notes=["all: left out"]))
    first_column = lambda text: [line.split("|")[1].strip(" :-") for line in text.splitlines() if "|" in line]  # noqa: E731
    assert first_column(whole) == first_column(empty)
    assert "`python -m eval device`" in whole and "jax 0.11.2" in whole and "NVIDIA H200, 1 of 1; 16 CPU cores" in whole
    assert empty.endswith("\n- all: left out\n") and "nan" not in empty.lower() and "None" not in empty
    torch = next(line for line in whole.splitlines() if line.startswith(f"| {TORCH}"))
    assert [cell.strip() for cell in torch.split("|")[2:4]] == ["31.2", "2.00"]


def test_the_page_has_the_form_that_is_printed() -> None:
    heads = [line.split("|")[1].strip() for line in markdown(full_report()).splitlines() if line.startswith("|")]
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    lines = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    shown = lines[lines.index("hardware") :][: len(heads[2:])]
    is_rule = lambda cell: set(cell) <= set(":-")  # noqa: E731
    assert [cell for cell in shown if not is_rule(cell)] == [cell for cell in heads[2:] if not is_rule(cell)]


def test_a_plan_for_another_chip_has_no_ratio() -> None:
    report = full_report(machine=MACHINE | RUN | {"device": "CPU (x86_64)", "bandwidth": 1e9})
    rows = compared_figures(report)
    assert [row.ratio for row in rows] == [None] * len(rows)
    assert [row.planned for row in rows] == [row.planned for row in compared_figures(full_report())]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.000752, "0.000752"), (14.21, "14.2"), (999.9, "1,000"), (1234.5, "1,234")],
)
def test_three_digits_are_shown(value: float | None, text: str) -> None:
    assert digits(value) == text


def script(text: str) -> list[str]:
    return ["-c", f"import json, sys, time; from pathlib import Path\n{text}"]


def test_a_part_that_fails_is_a_note_with_its_last_line(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 1)
    assert parts.run("torch", script("print('out of memory\\n'); sys.exit(3)"), tmp_path / "x.json") == {}
    assert parts.notes == ["torch: failed (3): out of memory"]
    (tmp_path / "log").write_text("\n \n")
    assert last_line(tmp_path / "log") == "it printed nothing"


def test_a_part_that_outlasts_the_time_keeps_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "LEAST_SECONDS", 0.1)
    parts, out = Parts(tmp_path, 2 / 60), tmp_path / "x.json"
    slow = script(f"Path({str(out)!r}).write_text(json.dumps({{'sample_s': 2.0}})); time.sleep(60)")
    assert parts.run("step", slow, out) == {"sample_s": 2.0}
    assert parts.notes[0].startswith("step: ended unfinished after 2 s")
    assert parts.run("plan", slow, tmp_path / "y.json") == {}
    assert parts.notes[1] == "plan: left out, since 0 s of --minutes 0.0333333 are left"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], Mapping[str, str] | None]]:
    """The parts that are run, which all measure FIGURES on an H200."""
    runs: list[tuple[str, list[str], Mapping[str, str] | None]] = []

    def run(
        self: Parts, name: str, command: list[str], out: Path, env: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        runs.append((name, command, env))
        return MACHINE if name == "machine" else {"programs": PROGRAMS} if name.startswith("plan") else dict(FIGURES)

    monkeypatch.setattr(Parts, "run", run)
    parse_device([])  # imports what would ask for packages
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return runs


def test_parts_come_by_importance_and_the_plan_stays_off_the_device(started: list[Any], tmp_path: Path) -> None:
    report = make_report(parse_device([]), Parts(tmp_path, 10))
    others = ["step, attention by XLA", "step, unrolled, XLA", "step, scanned, XLA"]
    assert [name for name, _, _ in started] == ["machine", "step, default", "plan, H200", *others, TORCH]
    command, env = started[2][1:]
    assert env == {"JAX_PLATFORMS": "cpu"} and command[command.index("--chip") + 1] == "H200"
    assert report.machine["size"] == "qwen3-1.7b" and report.is_planned
    settings = [json.loads(Path(started[i][1][2]).read_text())["arguments"] for i in (1, 4, 5)]
    assert [[*settings[0], f"--mesh.decoding={name}"] for name in ("unrolled", "scanned")] == settings[1:]


def test_an_implementation_that_is_alone_is_compared_with_none(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "IMPLEMENTATIONS", {"default": ()})
    report = make_report(parse_device(["--size", "tiny"]), Parts(tmp_path, 10))
    assert [*report.figures] == ["default", TORCH]
    assert "implementations of attention and decoding: default alone, so none is compared with it" in report.notes


def test_without_torch_its_line_is_empty_and_a_note_says_why(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    report = make_report(parse_device([]), Parts(tmp_path, 10))
    assert report.figures[TORCH] == {} and f"{TORCH}: left out, torch not installed" in report.notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "minutes: expected a finite number above 0, got 0"),
        (["--minutes", ".inf"], "minutes: expected a finite number above 0, got inf"),
        (["--size", "8b"], "size: expected qwen3-1.7b|tiny"),
        (["--json", "x", "--out", "x"], "x: "),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], started: list[Any]) -> None:
    assert main(["device", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1 and started == []


def test_a_cpu_is_not_asked_for_the_whole_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "run", lambda *_: MACHINE | {"platform": "cpu", "device": "CPU"})
    assert main(["device", "--size", "qwen3-1.7b"]) == 2
    assert "size: expected tiny, for JAX finds no accelerator here" in capsys.readouterr().err


def test_a_step_that_was_not_measured_is_an_error_after_the_report(
    started: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FIGURES, "update_s")
    assert main(["device", "--out", str(tmp_path / "out.md")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: device: not everything was measured") and err.count("\n") == 1
    assert (tmp_path / "out.md").read_text() in out


def test_the_median_leaves_out_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0]), []
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert median_seconds(lambda: "result", 3, waited.append) == (2.0, "result")
    assert waited == ["result"] * 4


def test_the_programs_of_a_step_are_timed_one_after_the_other() -> None:
    reports: list[dict[str, float]] = []
    config = parse(PolicyConfig, policy_arguments(TINY))
    figures = time_programs(config, 1, lambda figures: reports.append(dict(figures)))
    names = ["sample_s", "sample_peak_bytes", "update_s", "step_peak_bytes", "gradient_s", "optimizer_s"]
    assert [*figures] == names and all(value > 0 for value in figures.values())
    assert [len(report) for report in reports] == [2, 4, 5, 6] and reports[-1] == figures
    assert figures["step_peak_bytes"] >= figures["sample_peak_bytes"]


@pytest.mark.parity
def test_a_step_in_torch_trains_on_completions_of_the_greatest_length() -> None:
    import torch

    from eval.speed import torch_step

    network = TINY.network.to_hf()
    policy, reference = (torch_step.make_policy(network, "float32", "cpu") for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    tokens = torch_step.generate_tokens(policy, torch.full((4, 8), 5), 8)
    assert tokens.shape == (4, 16) and not (tokens[:, 8:] == torch_step.END_ID).any()
    logprobs = torch_step.last_logprobs(policy, tokens, 8)
    expected = torch.log_softmax(policy(tokens).logits[:, 7:-1], -1).gather(-1, tokens[:, 8:, None])[..., 0]
    torch.testing.assert_close(logprobs, expected)
    torch_step.recompute_layers(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    torch_step.training_step(policy, reference, optimizer, tokens, torch.tensor([1.0, -1.0, 0.5, 0.0]), 8, 2, 0.04)
    for name, parameter in policy.named_parameters():
        assert not torch.equal(parameter, reference.get_parameter(name)), name


@pytest.mark.slow
def test_the_whole_program_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(device.SIZES, "tiny", TINY)
    files = (tmp_path / "out.json", tmp_path / "out.md")
    assert main(["device", "--size", "tiny", "--json", str(files[0]), "--out", str(files[1])]) == 0
    result, text = json.loads(files[0].read_text()), files[1].read_text()
    assert text in capsys.readouterr().out
    assert all(row["measured"] > 0 for row in result["table"]) and len(result["table"]) == 9
    assert result["machine"]["platform"] == "cpu" and result["machine"]["versions"]["Python"] in sys.version
    assert result["planned"]["step_peak_bytes"] > 0
    assert (result["figures"][TORCH] != {}) != any(note.startswith(TORCH) for note in result["notes"])
