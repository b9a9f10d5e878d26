"""The command line of every program: one parser, whose help is the comments, and which knows the right key nearby."""

import dataclasses
import json
import math
import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import yaml

from eval.__main__ import COMMANDS
from eval.__main__ import main as eval_main
from eval.judges.command import parse_judge
from eval.report.compare import CompareConfig, parse_compare
from eval.report.reliability import ReliabilityConfig, parse_reliability
from eval.report.report import ReportConfig, parse_report
from eval.theory.command import parse_theory
from train.__main__ import KINDS, LEARNING, PREVIEWS
from train.__main__ import main as train_main
from train.config import MeshConfig, PolicyConfig
from train.parse import OPTIONS, parse
from train.settings import Setting, check_null, check_numbers, comments, form, settings, shown

PROGRAMS: dict[str, type[Any]] = {f"train {name}": kind for name, kind in KINDS.items()}
PROGRAMS |= {f"train inspect {name}": kind for name, kind in LEARNING.items()}
PROGRAMS |= {
    f"eval {name}": get_type_hints(getattr(import_module(module), parser))["return"]
    for name, (module, parser, _) in COMMANDS.items()
}


def run(program: str, *arguments: str) -> int:
    door, *command = program.split()
    return {"train": train_main, "eval": eval_main}[door]([*command, *arguments])


def refused(capsys: pytest.CaptureFixture[str], program: str, *arguments: str) -> str:
    assert run(program, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error.removeprefix("error: ").strip()


def words(text: str) -> str:
    return " ".join(text.split())


# Help


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_setting_has_a_comment(program: str) -> None:
    assert [key for key, setting in settings(PROGRAMS[program]).items() if not setting.comment] == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_says_what_every_setting_means_and_its_default(
    program: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(program, flag)
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == "" and out.startswith(f"usage: python -m {program} ")
    assert max(map(len, out.splitlines())) <= 120
    text = words(out)
    for key, setting in settings(PROGRAMS[program]).items():
        assert words(setting.comment) in text, key
        if setting.default is dataclasses.MISSING:
            assert words(f"{setting.comment} (required)") in text, key
        elif "default:" not in setting.comment and not dataclasses.is_dataclass(setting.default):
            assert words(f"{setting.comment} (default: {shown(setting.default)})") in text, key
        if setting.inner is None and "[]" not in key and f"--{key} " not in text:
            assert f" {key.upper()} " in text.partition("[--key value ...]")[0], "a positional one"
    assert all(f"--{option}" in text for option in OPTIONS)
    assert all(f"--{option}" in text for option in PREVIEWS) == (program.removeprefix("train ") in LEARNING)


@pytest.mark.parametrize("door", ["train", "eval", "train inspect"])
def test_help_of_a_door_is_its_usage(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(door, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: python -m {door.split()[0]} ") and err == ""
    assert run(door) == 2
    assert capsys.readouterr() == ("", out)


@pytest.mark.parametrize(
    ("door", "wrong", "right"),
    [("train", "polcy", "policy"), ("eval", "juge", "judge"), ("train inspect", "stf", "sft")],
)
def test_a_misspelt_command(door: str, wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(door, wrong) == 2
    assert capsys.readouterr().err.endswith(f"error: unknown command {wrong!r}; did you mean {right!r}?\n")


@dataclass(frozen=True, kw_only=True)
class Above:
    # of two
    # lines
    first: int = 1
    second: str = "a # b"  # behind it
    third: dict[str, str] = field(
        default_factory=dict,  # within
    )  # and behind

    # far away

    fourth: int = 0


@dataclass(frozen=True, kw_only=True)
class Below(Above):
    second: str = "c"  # another one
    fifth: Literal["x", "y"] = "x"


def test_a_comment_stands_above_or_behind_its_field() -> None:
    assert comments(Above) == {
        "first": "of two lines",
        "second": "behind it",
        "third": "within and behind",
        "fourth": "",
    }
    inherited = {key: setting.comment for key, setting in settings(Below).items()}
    assert inherited == comments(Above) | {"second": "another one", "fifth": ""}


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (str, "text"),
        (int | None, "integer|null"),
        (Literal["a", "b"], "a|b"),
        (list[float], "number ..."),
        (tuple[str, ...] | None, "text ...|null"),
        (dict[str, list[str]], "{text: text ...}"),
        (list[MeshConfig], "{key: value} ..."),
        (dict[str, Any], "{text: value}"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert form(hint) == words


# Numbers


def nested(key: str, value: Any) -> Any:
    """The value as a setting of this dotted key alone."""
    for name in reversed(key.split(".")):
        value = {name.removesuffix("[]"): [value] if name.endswith("[]") else value}
    return value


@pytest.mark.parametrize("kind", dict.fromkeys(PROGRAMS.values()))
def test_every_number_is_finite_or_may_be_infinite_by_its_comment(kind: type[Any]) -> None:
    known = settings(kind)
    for key, setting in known.items():
        if not re.search("integer|number", form(setting.hint)):
            continue
        values = [math.nan, 10**25, -(10**25), *([] if ".inf" in setting.comment else [math.inf, -math.inf, 1e39])]
        for value in values:
            with pytest.raises(ValueError, match=f"^{re.escape(key)}: expected (a finite number|an integer from)"):
                check_numbers(known, nested(key, [0, value] if setting.item else value))
        for value in (0, -1, 2**40, 1e-300, None, True, *([math.inf] if ".inf" in setting.comment else [])):
            check_numbers(known, nested(key, value))


def may_be_empty(setting: Setting) -> bool:
    """Whether null is, or means, something: `columns:` without any, a switch that is off, a text that is not given."""
    is_plain = setting.inner is None and setting.item is None and not re.search("integer|number", form(setting.hint))
    return form(setting.hint).endswith("|null") or (is_plain and get_origin(setting.hint) is not Literal)


@pytest.mark.parametrize("kind", dict.fromkeys(PROGRAMS.values()))
def test_null_is_for_settings_whose_type_has_it(kind: type[Any]) -> None:
    known = settings(kind)
    for key, setting in known.items():
        with (
            nullcontext()
            if may_be_empty(setting)
            else pytest.raises(
                ValueError, match=f"^{re.escape(key)}: expected {re.escape(form(setting.hint))}, got null"
            )
        ):
            check_null(known, nested(key, None), ("number", "choice", "section", "list"))


@dataclass(frozen=True, kw_only=True)
class Nulls:
    number: int = 1
    switch: bool = True
    texts: dict[str, str] = field(default_factory=dict)
    word: str = "a"
    words: list[str] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    choice: Literal["x", "y"] = "x"
    other: int = 1

    def __post_init__(self) -> None:
        if "far" in self.word:
            raise ValueError("word: expected one that is near")
        if self.words is not None and "none" in self.words:
            raise ValueError("words: expected none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number:", "number: expected integer, got null"),
        ("choice: null", "choice: expected x|y, got null"),
        ("word: null", "word: expected text, got null"),  # its own check would end with a traceback
        ("words: null", "words: expected text ..., got null"),
        ("numbers: [1.0, null]", "numbers: expected number ..., got None"),
        ("words: [none]\nnumbers: [.inf]", "words: expected none"),  # the check that knows the setting speaks first
        ("numbers: [.nan]", "numbers: expected a finite number, got nan"),
        ("switch:\ntexts:", None),
    ],
)
def test_null_and_infinity_in_a_file_are_one_line(tmp_path: Path, text: str, message: str | None) -> None:
    (tmp_path / "x.yaml").write_text(f"{text}\nother: 2\n")
    with nullcontext() if message is None else pytest.raises(ValueError, match=f"^{re.escape(message or '')}"):
        parse(Nulls, ["--config", str(tmp_path / "x.yaml")])


# Wrong keys


def named(error: str) -> list[str]:
    """The keys that an error proposes."""
    return [name.strip("'?") for name in error.partition("did you mean ")[2].split(" or ")]


def without_a_letter(name: str) -> list[str]:
    return [name[:i] + name[i + 1 :] for i in range(1, len(name))]


@pytest.mark.parametrize("kind", dict.fromkeys(PROGRAMS.values()))  # some programs have the same settings
def test_a_key_without_one_of_its_letters_is_recognized_wherever_it_stands(kind: type[Any]) -> None:
    known = settings(kind)
    for key in known:
        outer, _, last = key.rpartition(".")
        for wrong in without_a_letter(last) if len(last) >= 5 else []:
            for place in {outer, ""}:
                typed = f"{place}.{wrong}" if place else wrong
                beside = f"{place}.{last}" if place else last  # a setting of this name is nearer to what was typed
                if typed not in known:
                    with pytest.raises(ValueError, match="^command line: unknown key") as caught:
                        parse(kind, [f"--{typed}=1"])
                    assert {key, beside} & set(named(str(caught.value))), typed


@pytest.mark.parametrize("kind", dict.fromkeys(PROGRAMS.values()))
def test_a_right_key_at_the_wrong_level_names_the_whole_key(kind: type[Any], tmp_path: Path) -> None:
    known, file = settings(kind), tmp_path / "x.yaml"
    for key in known:
        last = key.rpartition(".")[2]
        if last not in known:
            file.write_text(yaml.safe_dump({last: 1}))
            for arguments, source in ((["--config", str(file)], str(file)), ([f"--{last}", "1"], "command line")):
                with pytest.raises(ValueError) as caught:
                    parse(kind, arguments)
                assert str(caught.value).startswith(f"{source}: unknown key {last!r}; did you mean '")
                assert key in named(str(caught.value))


@pytest.mark.parametrize(
    ("program", "typed", "message"),
    [
        ("train policy", "--learning_rte", "'learning_rte'; did you mean 'optimizer.learning_rate'?"),
        ("train sft", "--learning_rate", "'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("train policy", "--optimiser.learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("train policy", "--model.learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("train policy", "--rewards.weight", "did you mean 'rewards[].weight'?"),
        ("train policy", "--every", "did you mean 'checkpoint.every' or 'validation.every'?"),
        ("train policy", "--dry_rn", "did you mean '--dry_run'?"),
        ("train sft", "--sho", "did you mean '--show'?"),
        ("train policy", "--variant_", "did you mean '--variant'?"),
        ("train inspect reward", "--rowz", "did you mean '--rows'?"),
        ("train plan", "--confg", "did you mean '--config'?"),
        ("eval judge", "--tempurature", "did you mean 'temperature'?"),
        ("eval compare", "--jugde", "did you mean 'judge'?"),
        ("eval report", "--reward_model", "did you mean 'reward_models'?"),
        ("eval lab", "--comparison", "did you mean 'world.comparisons'?"),
        ("eval generate", "--system_promt", "did you mean 'chat.system_prompt'?"),
        ("eval chat", "--fsdq", "did you mean 'mesh.fsdp'?"),
        ("train export", "--zzz", "expected one of checkpoint, out, dtype, max_shard_size, adapters"),
        ("train policy", "--optimizer.zzz", "expected one of learning_rate, adam_beta1,"),
        ("train sft", "--variant", "unknown key 'variant'"),
    ],
)
def test_wrong_keys(program: str, typed: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, program, typed, "1e-6")
    assert error.startswith("command line: unknown key ") and message in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'; did you mean 'optimizer.learning_rate'?"),
        ({"optimizer": {"clip_low": 1}}, "unknown key 'optimizer.clip_low'; did you mean 'loss.clip_low'?"),
        ({"rewards": [{"wieght": 1}]}, "unknown key 'rewards[].wieght'; did you mean 'rewards[].weight'?"),
        ({"rewards": [{"zzz": 1}]}, "unknown key 'rewards[].zzz'; expected one of model, function, options, weight,"),
        ({"rewards": {"zzz": 1}}, "unknown key 'rewards[].zzz'; expected one of model, function,"),
        ({"dry_rn": True}, "unknown key 'dry_rn'; expected one of output_dir, max_steps, seed,"),
        ({"model": {"architecture": {"hiden_size": 1}}}, "did you mean 'model.architecture.hidden_size'?"),
    ],
)
def test_wrong_keys_in_a_file(
    values: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(values))
    error = refused(capsys, "train policy", "--config", str(file))
    assert error.startswith(f"{file}: ") and message in error
    for key, value in values.items():
        if isinstance(value, list | dict):
            error = refused(capsys, "train policy", f"--{key}", json.dumps(value))
            assert error.startswith("command line: ") and message in error


def test_any_key_is_right_inside_a_dictionary() -> None:
    with pytest.raises(ValueError, match="^expected --output_dir, --data.train,"):
        parse(PolicyConfig, ["--advantage_options.ties=ordinal", "--mesh.rules={prompt: [data]}"])


# Values


@dataclass(frozen=True, kw_only=True)
class Everything:
    """One setting of each kind."""

    place: str
    more: list[str] = field(default_factory=list)
    text: str | None = "x"
    texts: tuple[str, ...] = ()
    numbers: list[float] = field(default_factory=list)
    counts: list[int] | None = None
    rate: float | None = 0.5
    count: int = 1
    flag: bool = False
    choice: Literal["a", "b"] = "a"
    mesh: MeshConfig = field(default_factory=MeshConfig)


def read(*arguments: str) -> Everything:
    return parse(Everything, list(arguments), "python -m it", positional=("place", "more"))


HARD = [
    "a b",
    "a,b",
    "1",
    "1e-3",
    "null",
    "true",
    "a: b",
    "{a}",
    "#",
    "",
    "'",
    '"',
    "\\",
    "é",
    "a=b",
    "-1",
    "~",
    "a\nb",
]


@pytest.mark.parametrize("hard", HARD)
def test_a_text_is_taken_as_it_is(hard: str) -> None:
    assert read("x", "--texts", hard, "y").texts == (hard, "y")
    assert read(hard, hard, hard) == Everything(place=hard, more=[hard, hard])
    assert read(f"--place={hard}").place == hard
    if hard != "#":
        assert read("x", "--text", hard).text == (None if hard in ("null", "~") else hard)


def test_lists_are_what_stands_behind_an_option() -> None:
    assert read("x", "--numbers", "1", "2.5", "-3e-1").numbers == [1, 2.5, -0.3]
    for written in (["0.1,0.5,2"], ["0.1", "0.5", "2"], ["[0.1, 0.5, 2]"], ["0.1,0.5", "2"]):
        assert read("x", "--numbers", *written, "--count", "3") == Everything(
            place="x", numbers=[0.1, 0.5, 2.0], count=3
        )
    assert read("x", "--numbers=0.1,0.5").numbers == [0.1, 0.5]
    assert read("x", "--numbers", "[]").numbers == []
    assert read("x", "--counts", "null").counts is None
    assert read("x", "--counts", "1,2").counts == [1, 2]
    assert read("x", "--texts", "[a, b]").texts == ("a", "b")
    assert read("x", "--texts", "a", "--texts", "b").texts == ("b",), "as of all options, the last one counts"


def test_positional_values_stand_before_between_or_behind_options() -> None:
    whole = Everything(place="x", more=["y", "z"], count=3)
    assert read("x", "y", "z", "--count", "3") == read("--count", "3", "x", "y", "z") == whole
    assert read("x", "--count", "3", "y", "z") == whole
    assert read("--place", "x", "--more", "y", "z", "--count=3") == whole, "they have names too"


def test_a_file_may_hold_what_is_positional(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("place: x\nmore: [y]\ncount: 3\n")
    assert read("--config", str(file)) == Everything(place="x", more=["y"], count=3)
    assert read("w", "--config", str(file)).place == "w", "the command line overrides it"


@pytest.mark.parametrize("sizes", ["data=1,fsdp=4", "fsdp=4,data=1"])
def test_a_mesh_is_written_in_one_word(sizes: str) -> None:
    assert read("x", "--mesh", sizes).mesh == read("x", f"--mesh={sizes}").mesh == MeshConfig(data=1, fsdp=4)
    assert read("x", "--mesh", sizes, "--mesh.tensor", "2").mesh == MeshConfig(data=1, fsdp=4, tensor=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected PLACE; python -m it --help explains them"),
        (["x", "--count"], "--count: expected a value behind it"),
        (["x", "--count", "--flag", "true"], "--count: expected a value behind it"),
        (["x", "--texts"], "--texts: expected a value behind it"),
        (["x", "--count", "many"], "count: expected integer, got many"),
        (["x", "--count", "2.5"], "count: expected integer, got 2.5"),
        (["x", "--rate", "fast"], "rate: expected number|null, got fast"),
        (["x", "--text", "# x"], "--text: YAML takes a text that begins with # for a comment"),
        (["x", "--flag", "maybe"], "flag: expected true|false, got maybe"),
        (["x", "--choice", "c"], "choice: expected a|b, got c"),
        (["x", "--numbers", "0.5,abc"], "numbers: expected numbers such as 0.1,0.5,0.9, got 0.5,abc"),
        (["x", "--numbers", "0.5", "nan"], "numbers: expected numbers such as 0.1,0.5,0.9, got 0.5 nan"),
        (["x", "--numbers", "[0.5, abc]"], "numbers: expected number ..., got abc"),
        (["x", "--counts", "2.5"], "counts: expected integer ...|null, got"),
        (["x", "--mesh", "data:1"], "--mesh: expected sizes such as data=1,fsdp=64,tensor=4, got 'data:1'"),
        (["x", "--mesh.data", "one"], "mesh.data: expected integer, got one"),
    ],
)
def test_wrong_values(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_dataclass_is_typed_as_yaml_or_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    assert read("x", "--mesh", "{data: 1, fsdp: 4}").mesh == MeshConfig(data=1, fsdp=4)
    data = ["--data.train", "x", "--output_dir", "x", "--max_steps", "1", "--rewards", "[{model: m}]"]
    file.write_text("learning_rate: 1e-3\n")
    assert parse(PolicyConfig, [*data, "--model.path", "m", "--optimizer", str(file)]).optimizer.learning_rate == 1e-3
    for arguments, message in (
        (["--optimizer", str(tmp_path / "none.yaml")], f"--optimizer {tmp_path}/none.yaml: no such file"),
        (["--model", f"{{path: {file}"], "--model: not YAML"),
        (["--loss", str(file)], f"{file}: unknown key 'loss.learning_rate'; did you mean 'optimizer.learning_rate'?"),
        (
            ["--model.architecture", "{vocab_size: 3}"],
            "expected --model.architecture.hidden_size, --model.architecture.",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            parse(PolicyConfig, [*data, *arguments])
        assert str(caught.value).startswith(message)


def test_a_value_that_belongs_to_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--judge", "j", "--out", "o")
    assert refused(capsys, "eval compare", "a", "b", "c", *options) == (
        "unexpected 'c'; expected RUN_A RUN_B and options such as --key value"
    )
    assert refused(capsys, "eval generate", "a").startswith("unexpected 'a'; expected options such as --key value")


def test_what_belongs_to_a_dry_run_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--devices", "--chip"):
        assert "are for --dry_run" in refused(capsys, "train policy", option, "8")


def test_the_commands_that_have_positional_values_and_lists() -> None:
    judged = parse_judge(shlex.split("A B --out o --backend server --model m --agree_with D1 D2 --temperature null"))
    assert (judged.a, judged.b, judged.agree_with, judged.temperature) == ("A", "B", ["D1", "D2"], None)
    compared = parse_compare(shlex.split("A B --judge j --judged x y --out o --name_a GOPO"))
    assert compared == CompareConfig(run_a="A", run_b="B", judge="j", out="o", judged=("x", "y"), name_a="GOPO")
    reported = parse_report(shlex.split("A B --reward_models r s --compare c --out o --ifeval f"))
    assert reported == ReportConfig(runs=["A", "B"], reward_models=["r", "s"], compare="c", out="o", ifeval=("f",))
    assert parse_reliability(["r", "s@3"]) == ReliabilityConfig(runs=["r", "s@3"])
    assert parse_theory(["--out", "o", "--beta", "0.5,1", "--noise", "0", "2"]).noise == [0.0, 2.0]


def test_print_config_of_a_command_of_eval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run("eval compare", "A", "B", "--judge", "j", "--judged", "x", "--out", "o", "--print_config")
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["run_a"] == "A" and printed["judged"] == ["x"] and printed["max_length"] == 4096
