"""A config from a command line: YAML files first, then a variant, then what is typed; mistakes in one clear line.

An option is `--key value` or `--key=value`, with the dotted key of a setting. The values behind an option whose setting
is a list are its items. Values without an option are the program's positional settings.
"""

import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.settings import Setting, check_key, check_null, check_numbers, check_values, form, help_text, settings
from train.strict_yaml import load_yaml

VARIANTS = Path(__file__).parent.parent / "configs" / "variants"  # other trainers' algorithms, by name
OPTIONS = {
    "config": "YAML file with settings; the rest of the command line overrides it",
    "print_config": "print every setting with its value, and exit",
    "help": "print this text, and exit",
}
VARIANT = {"variant": "an algorithm of configs/variants, e.g. dapo; overrides the file"}

Known = Mapping[str, Setting]


def parse(
    kind: type[Any],
    arguments: Sequence[str],
    program: str = "python -m train",
    *,
    positional: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> Any:
    """The config that a command line makes.

    Args:
      kind: the dataclass of the program's settings.
      arguments: the command line behind `program`.
      positional: keys of the settings that are given without their names, in this order; a list takes all the rest.
      options: options that the caller has taken off the command line already, with their help.

    Raises:
      ValueError: a missing file, an unknown key (with the nearest right one), a wrong type, an impossible value.
      SystemExit: with 0, after --help or --print_config.
    """
    import jsonargparse

    known = settings(kind)
    options = {**(options or {}), **(VARIANT if "advantage" in known else {}), **OPTIONS}
    if "--help" in arguments or "-h" in arguments:
        print(help_text(kind, program, positional, options))
        raise SystemExit(0)
    line = _ordered_options(known, arguments, positional, options)
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind)
    try:
        given = parser.parse_args(line)
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(_one_line(error, known, program, positional)) from error
    check_null(known, given, ("number", "choice", "section"))
    try:
        try:
            values = parser.instantiate(given)
        except (jsonargparse.ArgumentError, ValueError) as error:
            raise ValueError(_one_line(error, known, program, positional)) from error
        config = kind(**{item.name: values[item.name] for item in dataclasses.fields(kind)})
    except (TypeError, AttributeError, ArithmeticError):  # a check of the config's own met null, or infinity
        check_null(known, given)
        check_numbers(known, given)
        raise
    check_null(known, given, ("list",))  # last: the config's own checks know better what is expected
    check_numbers(known, given)
    return config


def _ordered_options(
    known: Known, arguments: Sequence[str], positional: Sequence[str], options: Mapping[str, str]
) -> list[str]:
    """The command line as `--key=value` alone, in the order in which values override each other."""
    files: list[str] = []  # they go first, wherever they stand: a file would override what stands before it
    variants: list[str] = []  # after the files, which write out what a variant changes
    values: list[str] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        given = [value] if equals else []
        if not argument.startswith("--"):
            values.append(argument)
        elif key == "print_config":
            others.append(argument)
        elif key == "config":
            file = _only_value(key, given, rest)
            files += [option for name in _checked_file(known, file) for option in _emptied(known, str(name))]
            files.append(f"--config={file}")
        elif key == "variant" and key in options:
            # all start from GOPO's file, which sets everything, so that nothing of another algorithm stays
            names = ("gopo", _only_value(key, given, rest))
            variants = [f"--config={_variant_file(name)}" for name in names]
        elif (setting := check_key(known, key, "command line", options)).item:
            while rest and not rest[0].startswith("--") and not equals and _goes_on(setting, given, rest[0]):
                given.append(rest.pop(0))
            others += _list_option(known, setting, given)
        else:
            others += _option(known, setting, key, _only_value(key, given, rest))
    return [*files, *variants, *_positional_options(known, values, positional), *others]


def _goes_on(setting: Setting, given: Sequence[str], value: str) -> bool:
    """Whether a value belongs to the option before it: where that may be a text instead, the first one or an item."""
    return not setting.takes_text or not given or (given[0].startswith("{") and value.startswith("{"))


def _only_value(key: str, given: list[str], rest: list[str]) -> str:
    """The value of an option: given behind `=`, or taken off the rest of the command line."""
    if not given and (not rest or rest[0].startswith("--")):
        raise ValueError(f"--{key}: expected a value behind it")
    return given[0] if given else rest.pop(0)


def _option(known: Known, setting: Setting, key: str, value: str) -> list[str]:
    if key == "mesh" and not value.startswith("{"):
        return [f"--mesh.{size}" for size in _mesh_sizes(value)]
    if "[]" in setting.key:
        raise ValueError(f"--{key}: expected all items together, as --{key.partition('[')[0]} '[{{...}}, {{...}}]'")
    if setting.inner is not None:
        _check_nested(known, key, value)
    elif form(setting.hint).startswith("{"):
        load_yaml(value, f"--{key}")  # a key that stands twice is refused
    if value.lstrip().startswith("#") and form(setting.hint) == "text|null":
        raise ValueError(f"--{key}: YAML takes a text that begins with # for a comment; put it in a file, in quotes")
    return [f"--{key}={value}"]


def _mesh_sizes(text: str) -> list[str]:
    """The parts of `data=1,fsdp=64`."""
    for size in (sizes := text.split(",")):
        if not re.fullmatch(r"(data|fsdp|tensor)=-?\d+", size):
            raise ValueError(f"--mesh: expected sizes such as data=1,fsdp=64,tensor=4, got {size!r}")
    return sizes


def _list_option(known: Known, setting: Setting, values: Sequence[str]) -> list[str]:
    """`--key a b` as `--key=["a", "b"]`; numbers may have commas between them; a list in brackets stays as it is."""
    key, text = setting.key, " ".join(values)
    if not values:
        raise ValueError(f"--{key}: expected a value behind it")
    if setting.takes_text and not re.fullmatch(r"\[\s*\{.*\}\s*\]|\{.*\}", text):
        return [f"--{key}={text}"]
    if re.fullmatch(r"\[.*\]", text) or (text == "null" and form(setting.hint).endswith("|null")):
        pass
    elif setting.inner is not None:
        text = f"[{', '.join(values)}]"
    elif setting.item in (int, float):
        numbers = [number for value in values for number in value.split(",")]
        if not all(map(_reads_as_number, numbers)):
            raise ValueError(f"{key}: expected numbers such as 0.1,0.5,0.9, got {text}")
        text = f"[{','.join(numbers)}]"
    else:
        text = json.dumps(values, ensure_ascii=False)
    if setting.inner is not None:
        _check_nested(known, key, text)
    return [*_emptied(known, key), f"--{key}={text}"]


def _emptied(known: Known, key: str) -> list[str]:
    """What empties a list of dataclasses before it is set: else jsonargparse merges old and new items of one place."""
    setting = known.get(key)
    return [f"--{key}=[]"] if setting and setting.item and setting.inner else []


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _positional_options(known: Known, values: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Positional values as options."""
    line: list[str] = []
    rest = list(values)
    for key in positional:
        if rest and known[key].item:
            line += _list_option(known, known[key], rest)
            rest = []
        elif rest:
            line.append(f"--{key}={rest.pop(0)}")
    if rest:
        places = " ".join(map(str.upper, positional))
        raise ValueError(f"unexpected {rest[0]!r}; expected {places and places + ' and '}options such as --key value")
    return line


def _variant_file(name: str) -> str:
    """The settings of a variant of the algorithm, by its name."""
    known = sorted(file.stem for file in VARIANTS.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"--variant: expected one of {', '.join(known)}, got {name!r}")
    return str(VARIANTS / f"{name}.yaml")


def _one_line(error: Exception, known: Known, program: str, positional: Sequence[str]) -> str:
    """An error of jsonargparse in our words: the key, what it allows, what came."""
    text, key = str(error), ""
    for inner in re.findall(r'Parser key "([^"]+)"', text):  # from the outermost to the innermost
        if not key or inner.startswith(f"{key}."):
            key = inner
        else:
            key += f"[].{inner}" if key in known and known[key].item else f".{inner}"
    if required := re.search(r"arguments are required: (.*)", text):
        outer = f"{key}[]." if key in known and known[key].item else f"{key}." if key else ""
        names = [f"{outer}{name}" for name in required[1].split(", ")]
        places = [name.upper() if name in positional else f"--{name}" for name in names]
        return f"expected {', '.join(places)}; {program} --help explains them"
    innermost = text[max(text.rfind("Parser key"), 0) :]
    came = next(filter(None, (re.search(r"(?:Got|Given) value: (.*)", part) for part in (innermost, text))), None)
    if key in known and came:
        return f"{key}: expected {form(known[key].hint)}, got {came[1]}"
    return " ".join(text.split())


def _checked_file(known: Known, file: str) -> dict[str, Any]:
    """The settings in a file of --config."""
    values = _read_yaml("config", file)
    check_values(known, values, file)
    return values


def _check_nested(known: Known, key: str, text: str) -> None:
    """Checks the keys in what is typed for a dataclass: YAML such as `[{model: x}]`, or a YAML file's name."""
    value = load_yaml(text, f"--{key}", dotted=True)
    if isinstance(value, str):
        check_values(known, {key: _read_yaml(key, value)}, value)
    else:
        check_values(known, {key: value}, "command line")


def _read_yaml(option: str, file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"--{option} {file}: no such file")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not YAML: expected UTF-8 text ({error})") from error
    values = load_yaml(text, file, dotted=True)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected 'key: value' lines, got {type(values).__name__}")
    return values


def take(arguments: list[str], name: str, alone: str | None = None) -> tuple[list[str], str | None]:
    """Takes `name VALUE` or `name=VALUE` off the arguments.

    Returns:
      The other arguments, and the value: None without the option, `alone` where no value stands behind it.

    Raises:
      ValueError: it has none and needs one.
    """
    others, found, rest = [], None, list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if key != name:
            others.append(argument)
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            if alone is None:
                raise ValueError(f"{name}: expected a value behind it")
            value = alone
        elif not equals:
            value = rest.pop(0)
        found = value
    return others, found


def no_command(arguments: Sequence[str], commands: Collection[str], usage: str) -> int:
    """Prints how a program is used, and the nearest command to a wrong one; returns the exit status."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    print(usage, file=sys.stderr)
    if arguments:
        near = difflib.get_close_matches(arguments[0], commands, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(commands)}"
        print(f"error: unknown command {arguments[0]!r}; {meant}", file=sys.stderr)
    return 2
