"""`python -m eval generate`: what is drawn depends on what it says it depends on, and a killed run loses nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.texts import generate as module
from eval.texts.chat import TalkConfig
from eval.texts.generate import MAX_SAMPLES, GenerateConfig, generate, parse_generate
from eval.texts.resumable import GrowingFile
from models.lora import Lora
from train.config import PolicyConfig
from train.data.rows import load_rows
from train.loop import train_policy
from train.processes import LAUNCH_VARIABLES
from train.run.files import write_jsonl
from train.running import SetupError, setup_errors

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"max_prompt_length": 8, "max_completion_length": 8, "batch_prompts": 4, "limit": 10}


LOADED: dict[Any, Any] = {}
load_policy = module.load_policy


@pytest.fixture(autouse=True)
def loads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that make the same programs share them: nothing is compiled twice."""

    def load(config: GenerateConfig, *given: Any) -> Any:
        key = (config.checkpoint, config.max_prompt_length, config.max_completion_length, config.top_p, config.top_k)
        key += (config.min_p, config.repetition_penalty, *config.stop)
        LOADED[key] = LOADED.get(key) or load_policy(config, *given)
        return LOADED[key]

    monkeypatch.setattr(module, "load_policy", load)


@pytest.fixture
def draw(tiny_policy_dir: Path, prompts_file: Path, tmp_path: Path) -> Callable[..., bytes]:
    """draw(name, **settings): the bytes of tmp_path / name, made with two temperatures and n = 2."""

    def run(name: str = "out.jsonl", **settings: Any) -> bytes:
        given = {"checkpoint": str(tiny_policy_dir), "data": str(prompts_file), "out": str(tmp_path / name)}
        generate(GenerateConfig(**(given | SIZES | {"temperatures": [0.5, 1.5], "n": 2} | settings)))
        return (tmp_path / name).read_bytes()

    return run


def rows_of(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.decode().splitlines()]


def drawn_at(text: bytes) -> dict[tuple[int, float, int], str]:
    return {(row["prompt_id"], row["temperature"], row["sample"]): row["completion"] for row in rows_of(text)}


def test_a_row_says_where_it_comes_from_and_keeps_the_data(draw: Callable[..., bytes], tiny_policy_dir: Path) -> None:
    rows = rows_of(draw())
    places = [(row["temperature"], row["prompt_id"], row["sample"]) for row in rows]
    assert places == [(t, p, g) for t in (0.5, 1.5) for p in range(10) for g in range(2)]
    assert all(len(row["wanted"]) == 1 for row in rows), "a column of the data"
    assert {(row["seed"], row["checkpoint"]) for row in rows} == {(0, str(tiny_policy_dir))}
    for row in rows:
        assert row["stop_reason"] in ("stop", "length") and 1 <= row["length"] <= 8
        assert row["stop_reason"] == "stop" or row["length"] == 8
    names = ["prompt_id", "prompt", "completion", "length", "temperature", "sample", "stop_reason", "seed"]
    assert list(rows[0]) == [*names, "checkpoint", "wanted"]
    assert len({row["completion"] for row in rows}) > 20


def test_a_completion_depends_on_prompt_temperature_sample_and_seed_alone(draw: Callable[..., bytes]) -> None:
    whole = drawn_at(draw())
    fewer = drawn_at(draw("fewer.jsonl", n=1, temperatures=[1.5], batch_prompts=3, limit=7))
    assert len(fewer) == 7 and fewer.items() <= whole.items()
    other = drawn_at(draw("seed.jsonl", seed=1))
    assert sum(other[place] != text for place, text in whole.items()) > 20


def test_a_stop_string_ends_a_completion_and_the_row_says_which(draw: Callable[..., bytes], tmp_path: Path) -> None:
    """The texts are the beginnings of those without; a file without the settings is one of an older version."""
    free = drawn_at(draw())
    assert (
        not {"min_p", "repetition_penalty", "stop"}
        & json.loads((tmp_path / "out.jsonl.settings.json").read_text()).keys()
    )
    stop = next(text[3:5] for text in free.values() if re.fullmatch("[a-z ]{2}", text[3:5]))
    rows, cut = rows_of(draw("stop.jsonl", stop=[stop, "never"])), 0
    assert list(rows[0])[6:9] == ["stop_reason", "stop_string", "seed"]
    for row in rows:
        whole = free[row["prompt_id"], row["temperature"], row["sample"]]
        assert row["stop_string"] == (stop if stop in whole else None)
        assert (stop in row["completion"]) == (stop in whole) and whole.startswith(row["completion"].rstrip("\ufffd"))
        assert row["stop_reason"] == "stop" or stop not in whole
        cut += len(row["completion"]) < len(whole)
    assert cut > 0
    with pytest.raises(SetupError, match=r"other settings: stop \['.*', 'never'\], now None;"):
        draw("stop.jsonl")


def test_the_streams_of_all_completions_differ(draw: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []
    complete = module.Generator.complete

    def noting(self: Any, *given: Any) -> Any:
        streams.extend(given[-1].ravel().tolist())
        return complete(self, *given)

    monkeypatch.setattr(module.Generator, "complete", noting)
    draw(temperatures=[1.0])
    assert streams == [p * MAX_SAMPLES + g for p in range(10) for g in range(2)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("behind", [b"", b'{"prompt_id": 3, "pro', b'{"half": "a batch"}\n'])
@pytest.mark.parametrize("batch_prompts", [4, 3])
def test_interrupted_equals_uninterrupted(
    draw: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bytes, batch_prompts: int
) -> None:
    """Killed behind four batches of six, in the middle of a row or not; with the same batch size then or another."""
    expected = draw()
    append, left = GrowingFile.append, [4]

    def dying(self: GrowingFile, rows: Sequence[Any]) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        append(self, rows)

    monkeypatch.setattr(GrowingFile, "append", dying)
    with pytest.raises(Killed):
        draw("again.jsonl")
    partial = tmp_path / "again.jsonl.partial"
    assert partial.read_bytes() == b"".join(expected.splitlines(keepends=True)[:28])
    assert not (tmp_path / "again.jsonl").exists()
    with partial.open("ab") as file:
        file.write(behind)
    monkeypatch.setattr(GrowingFile, "append", append)
    assert draw("again.jsonl", batch_prompts=batch_prompts) == expected
    assert not partial.exists()


def test_a_complete_file_is_not_drawn_again(draw: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw()
    monkeypatch.setattr(module, "load_policy", lambda *_, **__: pytest.fail("the policy was loaded"))
    assert draw() == expected


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "other settings: seed 0, now 1;"),
        ({"n": 3, "top_p": 0.9}, "n 2, now 3; top_p 1.0, now 0.9;|top_p 1.0, now 0.9; n 2, now 3;"),
        ({"temperatures": [0.5]}, r"temperatures \[0.5, 1.5\], now \[0.5\];"),
        ({"limit": 9}, r"other settings: other data \(or another --limit\); name another file"),
    ],
)
def test_a_file_of_other_settings_is_refused(
    draw: Callable[..., bytes], tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    """Whether it is complete or not; --overwrite begins anew."""
    before = draw()
    for name in ("out.jsonl", "out.jsonl.partial"):
        with pytest.raises(SetupError, match=words):
            draw(**other)
        assert (tmp_path / name).read_bytes() == before
        if name == "out.jsonl":
            (tmp_path / name).rename(tmp_path / "out.jsonl.partial")
    again = draw(**other, overwrite=True)
    assert again != before and again == draw("fresh.jsonl", **other)


@pytest.mark.slow
def test_another_policy_under_the_same_name_is_refused(
    draw: Callable[..., bytes], tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(limit=1, temperatures=[1.0])
    monkeypatch.setattr(module, "weights_hash", lambda _: "other")
    with pytest.raises(SetupError, match="other settings: other weights; name another"):
        draw(limit=1, temperatures=[1.0])


def test_what_fails_before_the_first_row_leaves_the_old_file(
    draw: Callable[..., bytes], tmp_path: Path, tiny_reward_dir: Path
) -> None:
    before = draw(), (tmp_path / "out.jsonl.settings.json").read_bytes()
    with pytest.raises(SetupError, match="expected a policy"):
        draw(checkpoint=str(tiny_reward_dir), overwrite=True)
    assert before == ((tmp_path / "out.jsonl").read_bytes(), (tmp_path / "out.jsonl.settings.json").read_bytes())


def test_a_file_that_nobody_knows_is_not_overwritten(draw: Callable[..., bytes], tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(SetupError, match="without the settings"):
        draw()
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_settings_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.jsonl").write_text("{}\n")
    (tmp_path / "out.jsonl.settings.json").write_text(text)
    with pytest.raises(ValueError, match="out.jsonl.settings.json: expected the JSON .* start anew with --overwrite"):
        GrowingFile(str(tmp_path / "out.jsonl"), {"seed": 0})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "{data}", "overwrite": True}, "is the same file as"),
        ({"out": "{tmp}/link.jsonl", "overwrite": True}, "is the same file as"),
        ({"out": "{tmp}"}, "is a directory; expected the name of a file"),
        ({"out": "{data}/deep/o.jsonl"}, "prompts.jsonl is a file; expected a directory there"),
        ({"out": "{tmp}/o.jsonl.gz"}, "o.jsonl.gz: expected a name that ends in .jsonl"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_and_no_input_replaced(
    tiny_policy_dir: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(data)
    out = settings["out"].format(data=data, tmp=tmp_path)
    given = {"checkpoint": str(tiny_policy_dir), "data": str(data)} | SIZES | settings | {"out": out}
    with pytest.raises(SetupError, match=words):
        generate(GenerateConfig(**given))
    assert data.read_text() == '{"prompt": "a"}\n' and (tmp_path / "link.jsonl").is_symlink()


def test_an_error_of_the_operating_system_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"^{tmp_path}: Is a directory$"), setup_errors():
        tmp_path.open("rb")


def test_columns_of_the_same_name_give_way_and_can_be_renamed(
    draw: Callable[..., bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"question": f"q{i}", "completion": "human", "seed": 7, "key": i} for i in range(3)])
    settings = {"data": str(data), "prompt_column": "question", "temperatures": [1.0], "n": 1}
    rows = rows_of(draw(**settings))
    said = capsys.readouterr().out
    assert said.count("completion, seed are not carried along") == 1
    assert [row["key"] for row in rows] == [0, 1, 2] and {row["seed"] for row in rows} == {0}
    assert "question" not in rows[0] and [row["prompt"] for row in rows] == ["q0", "q1", "q2"]
    renamed = rows_of(draw("two.jsonl", **settings, columns={"reference": "completion"}))
    assert {row["reference"] for row in renamed} == {"human"}
    assert [row["completion"] for row in renamed] == [row["completion"] for row in rows]


@pytest.mark.slow
def test_the_row_number_is_that_of_the_data(draw: Callable[..., bytes], tmp_path: Path) -> None:
    """A prompt that is too long shifts no other one's numbers, random or not."""
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [{"prompt": text} for text in ("ab", "x" * 20, "cd")])
    with_gap = drawn_at(draw(data=str(data)))
    write_jsonl(data, [{"prompt": text} for text in ("ab", "x", "cd")])
    whole = drawn_at(draw("whole.jsonl", data=str(data)))
    assert {place[0] for place in with_gap} == {0, 2}
    assert with_gap == {place: text for place, text in whole.items() if place[0] != 1}


@pytest.mark.parametrize("given", [["0.1,0.5"], ["[0.1, 0.5]"], None])
def test_temperatures_from_the_command_line_and_from_a_file(given: list[str] | None, tmp_path: Path) -> None:
    rest = ["--checkpoint", "c", "--data", "d", "--out", "o", "--mesh", "data=1,tensor=2"]
    (tmp_path / "c.yaml").write_text("temperatures: [0.1, 0.5]\nn: 3\n")
    config = parse_generate([*rest, *(["--temperatures", *given] if given else ["--config", f"{tmp_path}/c.yaml"])])
    assert config.temperatures == [0.1, 0.5] and (config.mesh.data, config.mesh.tensor) == (1, 2)
    assert parse_generate([*rest, "--temperatures=0.7"]).temperatures == [0.7]


@pytest.mark.parametrize("given", ["0.5,abc", "0.5,nan", "[]", "0.5,,1"])
def test_temperatures_that_are_no_numbers_are_shown_as_given(given: str) -> None:
    with pytest.raises(ValueError, match=f"^temperatures: expected numbers .*such as .*, got {re.escape(given)}$"):
        parse_generate(["--checkpoint", "c", "--data", "d", "--out", "o", "--temperatures", given])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": 2**32}, "seed: expected a number from 0 to .*, which would draw the same as 0"),
        ({"seed": -1}, "seed: expected a number from 0 to .*, which would draw the same as 4294967295"),
        ({"temperatures": [0.5, 0.5 + 1e-9]}, "temperatures: expected numbers from 0, each once"),
        ({"temperatures": [1e-60], "n": 2}, "temperatures: at 0 the 2 completions of a prompt would be one and the"),
    ],
)
def test_what_would_be_drawn_twice_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerateConfig(checkpoint="c", data="d", out="o", **settings)
    if "seed" in settings:
        with pytest.raises(ValueError, match=words):
            TalkConfig(checkpoint="c", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"reference": "nosuch"}}, "has no 'nosuch', which columns takes as 'reference'"),
        ({"prompt_column": "question"}, "name the right one in --prompt_column"),
    ],
)
def test_an_error_names_the_setting_of_this_command(draw: Callable[..., bytes], settings: Any, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        draw(**settings)


def start(
    arguments: Sequence[object],
    devices: int = 1,
    index: int = 0,
    count: int = 1,
    port: int = 0,
    command: str = "generate",
) -> Any:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    several = (
        dict(zip(LAUNCH_VARIABLES, (f"localhost:{port}", str(count), str(index)), strict=True)) if count > 1 else {}
    )
    line, pipe = [sys.executable, "-m", "eval", command, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(line, cwd=ROOT, env=environment | several, stdout=pipe, stderr=pipe, text=True)


def finished(process: Any) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.fixture
def arguments(tiny_policy_dir: Path, prompts_file: Path) -> list[object]:
    sizes = ("--max_prompt_length", 8, "--max_completion_length", 8, "--batch_prompts", 8)
    return ["--checkpoint", tiny_policy_dir, "--data", prompts_file, "--temperatures", "0.5,1.0", "--n", 2, *sizes]


@pytest.mark.slow
def test_eight_devices_and_two_processes_write_what_one_device_writes(arguments: list[object], tmp_path: Path) -> None:
    finished(start([*arguments, "--out", tmp_path / "1.jsonl"]))
    finished(start([*arguments, "--out", tmp_path / "8.jsonl", "--mesh", "data=8"], devices=8))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rest = [*arguments, "--out", tmp_path / "2.jsonl"]
    both = [start(rest, devices=2, index=index, count=2, port=port) for index in range(2)]
    said = [finished(process) for process in both]
    assert "tokens/s" in said[0] and "tokens/s" not in said[1]
    texts = [(tmp_path / f"{count}.jsonl").read_bytes() for count in (1, 2, 8)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0].splitlines()) == 24 * 2 * 2


@pytest.mark.slow
def test_two_processes_score_as_one(tiny_reward_dir: Path, tmp_path: Path) -> None:
    """Groups of several sizes, of one of them a single prompt."""
    sizes = (2, 1, 2, 1, 2, 3)
    rows = [
        {"prompt_id": p, "prompt": f"p{p}", "completion": f"a{p * g}"} for p, n in enumerate(sizes) for g in range(n)
    ]
    write_jsonl(tmp_path / "r.jsonl", rows)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = ["--responses", tmp_path / "r.jsonl", "--reward_model", tiny_reward_dir, "--batch_prompts", 4]

    def rest(count: int) -> list[object]:
        return [*given, "--out", tmp_path / f"{count}.jsonl", "--best_of", tmp_path / f"best{count}.jsonl"]

    finished(start(rest(1), command="reward"))
    for process in [start(rest(2), index=i, count=2, port=port, command="reward") for i in range(2)]:
        finished(process)
    for name in ("", "best"):
        one, two = (load_rows(str(tmp_path / f"{name}{count}.jsonl")) for count in (1, 2))
        assert [row | {"reward": 0} for row in one] == [row | {"reward": 0} for row in two]
        assert [row["reward"] for row in one] == pytest.approx([row["reward"] for row in two], abs=1e-5)


@pytest.mark.slow
def test_two_processes_are_refused_together(arguments: list[object], tmp_path: Path) -> None:
    (tmp_path / "o.jsonl").write_text("mine\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = [start([*arguments, "--out", tmp_path / "o.jsonl"], index=i, count=2, port=port) for i in range(2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and "without the settings" in err


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(arguments: list[object], tmp_path: Path) -> None:
    """SIGKILL, several times, wherever it happens to be."""
    small = [*arguments, "--batch_prompts", 1]
    finished(start([*small, "--out", tmp_path / "whole.jsonl"]))
    out, partial, sizes = tmp_path / "killed.jsonl", tmp_path / "killed.jsonl.partial", [0]
    while len(sizes) < 4 and not out.is_file():
        process = start([*small, "--out", out])
        while process.poll() is None and not (partial.is_file() and partial.stat().st_size > sizes[-1]):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if not out.is_file():
            sizes.append(partial.stat().st_size)
    assert len(sizes) > 1
    finished(start([*small, "--out", out]))
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4.0)])
def test_any_step_of_a_run(
    draw: Callable[..., bytes], policy_config: Callable[..., PolicyConfig], tmp_path: Path, lora: Lora | None
) -> None:
    config = policy_config(tmp_path, **({"lora": lora} if lora else {}))
    train_policy(config)
    run = config.output_dir
    texts = {step: drawn_at(draw(f"{step}.jsonl", checkpoint=f"{run}@{step}")) for step in (1, 3)}
    assert texts[1] != texts[3]
    assert drawn_at(draw("last.jsonl", checkpoint=run)) == texts[3]
    assert rows_of(draw("last.jsonl", checkpoint=run))[0]["checkpoint"] == f"{run}@3"
