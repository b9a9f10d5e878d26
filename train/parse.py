"""A config from a command line: YAML files first, then a variant, then what is typed; mistakes in one clear line."""

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml

VARIANTS = Path(__file__).parent.parent / "configs" / "variants"  # other trainers' algorithms, by name
# Before every list of rewards: jsonargparse would fill what an item leaves out from the item that stood in its place.
_NO_REWARDS = ("--rewards=[]",)


def parse(kind: type[Any], arguments: list[str], program: str = "python -m train") -> Any:
    """The config that a command line makes.

    Raises:
      ValueError: a missing file, an unknown key (with the nearest right one), a wrong type, an impossible value.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; what else is on the command line overrides it")
    parser.add_class_arguments(kind)
    files: list[str] = []  # they go first, wherever they stand: a file would override what stands before it
    variants: list[str] = []  # after the files, which write out what a variant changes
    others: list[str] = []
    following = iter(arguments)
    for argument in following:
        key, equals, value = argument.partition("=")
        if key == "--config":
            value = value if equals else next(following, "")
            files += [*(_NO_REWARDS if "rewards" in _check_file(kind, value) else ()), f"--config={value}"]
            continue
        if key == "--variant":
            value = _variant_file(value if equals else next(following, ""))
            _check_file(kind, value)
            # all start from GOPO's file, which sets everything, so that nothing of another algorithm stays
            variants = [f"--config={_variant_file('gopo')}", f"--config={value}"]
            continue
        if key.startswith("--") and key not in ("--help", "--print_config"):
            _check_keys(kind, key[2:].split("."), "command line")
        others += [*(_NO_REWARDS if key == "--rewards" else ()), argument]
    try:
        values = parser.instantiate(parser.parse_args([*files, *variants, *others]))
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(_one_line(error)) from error
    return kind(**{item.name: values[item.name] for item in dataclasses.fields(kind)})


def _variant_file(name: str) -> str:
    """The settings of a variant of the algorithm, by its name."""
    known = sorted(file.stem for file in VARIANTS.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"--variant: expected one of {', '.join(known)}, got {name!r}")
    return str(VARIANTS / f"{name}.yaml")


def _one_line(error: Exception) -> str:
    """The message; of an optional value's, which lists all that was tried and given, what matters."""
    text = " ".join(str(error).split())
    start, optional, rest = text.partition("Does not validate against any of the Union subtypes")
    if not optional:
        return text
    problems = rest.partition("Errors: - ")[2].partition(" Given value type:")[0].split(" - ")
    return start + "; ".join(problem for problem in problems if "NoneType" not in problem)


def _check_file(kind: type[Any], file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"--config {file}: no such file")
    try:
        values = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected 'key: value' lines, got {type(values).__name__}")
    _check_nested(kind, values, file)
    return values


def _check_nested(kind: type[Any], values: dict[str, Any], source: str) -> None:
    for key, value in values.items():
        inner = _check_keys(kind, [str(key)], source)
        for item in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(item, dict):
                _check_nested(inner, item, source)
            elif inner is not None and item is not None:
                raise ValueError(f"{source}: {key}: expected 'key: value' lines, got {item!r}")


def _check_keys(kind: type[Any], keys: list[str], source: str) -> type[Any] | None:
    """Refuse a key that no dataclass has; returns the dataclass that the last key holds, if it holds one."""
    inner: type[Any] | None = kind
    for key in keys:
        if inner is None:
            return None  # inside a dict: any key is right
        hints = typing.get_type_hints(inner)
        if key not in hints or key not in inner.__dataclass_fields__:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ValueError(
                f"{source}: unknown key {key!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(inner.__dataclass_fields__)}")
            )
        inner = _dataclass_in(hints[key])
    return inner


def _dataclass_in(hint: Any) -> type[Any] | None:
    """The dataclass in a type like X, X | None or list[X]."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint
    found = [_dataclass_in(argument) for argument in typing.get_args(hint)]
    return next((item for item in found if item is not None), None)


def take(arguments: list[str], name: str, alone: str | None = None) -> tuple[list[str], str | None]:
    """The other arguments, and the value of `name VALUE` or `name=VALUE`: None without it, `alone` if it has none.

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


def spread_mesh(arguments: list[str]) -> list[str]:
    """`--mesh data=1,fsdp=64` as `--mesh.data=1 --mesh.fsdp=64`."""
    rest, mesh = take(arguments, "--mesh")
    for size in mesh.split(",") if mesh is not None else ():
        if not re.fullmatch(r"(data|fsdp|tensor)=-?\d+", size):
            raise ValueError(f"--mesh: expected sizes such as data=1,fsdp=64,tensor=4, got {size!r}")
        rest.append(f"--mesh.{size}")
    return rest
