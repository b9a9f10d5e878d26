"""The settings of a program, read from its tree of dataclasses: dotted keys, types, defaults, and comments as help."""

import ast
import dataclasses
import functools
import inspect
import io
import json
import math
import textwrap
import tokenize
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any, Literal, NamedTuple, Union

COLUMN = 36  # where the texts of the help begin
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
KINDS = ("number", "choice", "section", "list", "other")  # of settings, see `_kind`
WORDS = {str: "text", int: "integer", float: "number", bool: "true|false", type(None): "null", Any: "value"}


class Setting(NamedTuple):
    """A field of a dataclass in the tree."""

    key: str  # dotted: optimizer.learning_rate; in the items of a list: rewards[].weight
    owner: type[Any]  # the dataclass whose field it is
    hint: Any  # its type
    default: Any  # dataclasses.MISSING: required
    inner: type[Any] | None  # the dataclass in its type, if there is one

    @property
    def comment(self) -> str:
        """The field's comment in the source."""
        name = self.key.rpartition(".")[2]
        return next((comments(kind)[name] for kind in self.owner.__mro__[:-1] if name in comments(kind)), "")

    @property
    def item(self) -> Any:
        """The type of the items if the setting is a list or a tuple, else None."""
        hints = [hint for hint in typing.get_args(self.hint) or () if hint not in (type(None), str)]
        only = hints[0] if _is_union(self.hint) and len(hints) == 1 else self.hint
        return typing.get_args(only)[0] if typing.get_origin(only) in (list, tuple) else None

    @property
    def takes_text(self) -> bool:
        """Whether the setting is a text or, instead, a list of dataclasses."""
        return self.inner is not None and _is_union(self.hint) and str in typing.get_args(self.hint)


def settings(kind: type[Any]) -> dict[str, Setting]:
    """Every setting of a dataclass by its dotted key: its plain fields first, then each dataclass in it."""
    return {setting.key: setting for setting in _tree(kind)}  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _tree(kind: type[Any]) -> tuple[Setting, ...]:
    return tuple(_walk(kind, ""))


def _walk(kind: type[Any], outer: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(kind)
    own = []
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        own.append(Setting(outer + field.name, kind, hints[field.name], default, _dataclass_in(hints[field.name])))
    yield from (setting for setting in own if setting.inner is None or setting.takes_text)
    for setting in own:
        if setting.inner is not None:
            if not setting.takes_text:
                yield setting
            yield from _walk(setting.inner, setting.key + ("[]." if setting.item else "."))


def _dataclass_in(hint: Any) -> type[Any] | None:
    """The dataclass in a type like X, X | None or list[X]."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next(filter(None, map(_dataclass_in, typing.get_args(hint))), None)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def form(hint: Any) -> str:
    """The values that a type allows, in words: `integer|null`, `text ...`, `server|likelihood`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, arguments))
    if _is_union(hint):
        return "|".join(map(form, arguments))
    if typing.get_origin(hint) in (list, tuple):
        return f"{form(arguments[0])} ..."
    if typing.get_origin(hint) is dict:
        return f"{{{form(arguments[0])}: {form(arguments[1])}}}"
    return WORDS.get(hint, "{key: value}")


@functools.cache
def comments(kind: type[Any]) -> dict[str, str]:
    """The comment of each field that a class defines: the lines directly above it and what stands behind it."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            rows = range(first, (node.end_lineno or first) + 1)
            texts[node.target.id] = " ".join(found[row] for row in rows if row in found)
    return texts


# Mistakes


def check_key(known: Mapping[str, Setting], key: str, source: str, options: Collection[str] = ()) -> Setting:
    """The setting of a dotted key; of a key inside a dictionary, where any is right, the dictionary.

    Raises:
      ValueError: there is none; says the nearest right key anywhere in the tree, or option of the command line.
    """
    parts = key.split(".")
    for count in range(1, len(parts)):
        setting = known.get(".".join(parts[:count]))
        if setting is not None and typing.get_origin(setting.hint) is dict:
            return setting
    if key in known:
        return known[key]
    if near := _nearest(key, {**known, **dict.fromkeys(options)}):
        names = [repr(name if name in known else f"--{name}") for name in near]
        raise ValueError(f"{source}: unknown key {key!r}; did you mean {' or '.join(names)}?")
    outer = key
    while outer and outer not in known:
        outer = outer.rpartition(".")[0].removesuffix("[]")
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0].removesuffix("[]") == outer]
    if not beside:  # a key behind a setting that has none
        raise ValueError(f"{source}: unknown key {key!r}; {outer} is a single value")
    raise ValueError(f"{source}: unknown key {key!r}; expected one of {', '.join(beside)}")


def _nearest(key: str, names: Collection[str]) -> list[str]:
    """The names most like a wrong key by their last part; as a whole too, if no name has the key's outer part.

    A name beside the key counts more; one elsewhere whose last part is still more alike is returned too.
    """
    outer, _, last = key.rpartition(".")
    known_outer = not outer or any(name.rpartition(".")[0] == outer for name in names)
    likeness_of = {part: _likeness(last, part) for part in {name.rpartition(".")[2] for name in names}}

    def likeness_of_last(name: str) -> float:
        return likeness_of[name.rpartition(".")[2]]

    def likeness(name: str) -> float:
        is_there = outer.replace("[]", "") == name.rpartition(".")[0].replace(
            "[]", ""
        )  # rewards.weight: rewards[].weight
        by_last = likeness_of_last(name) + (0.1 if is_there else 0.0)
        return by_last if known_outer else max(by_last, _likeness(key, name))

    scores = {name: likeness(name) for name in sorted(names)}
    best = max(scores.values(), default=0.0)
    near = [name for name, score in scores.items() if score == best] if best > 0.7 else []
    last_parts = {name: likeness_of_last(name) for name in scores}
    closest = max(last_parts.values(), default=0.0)
    is_closer = near and closest > max(last_parts[name] for name in near) and known_outer
    return near + ([name for name, score in last_parts.items() if score == closest] if is_closer else [])


def _likeness(text: str, other: str) -> float:
    """The ratio of `SequenceMatcher`; 0 where their letters allow less than 0.5, which makes no name a near one."""
    most = sum(min(text.count(letter), other.count(letter)) for letter in set(text))  # in any order
    return SequenceMatcher(None, text, other).ratio() if 4 * most >= len(text) + len(other) else 0.0


def check_values(known: Mapping[str, Setting], values: Mapping[Any, Any], source: str, outer: str = "") -> None:
    """Refuses a key that no dataclass has, anywhere in the values of a file."""
    for name, value in values.items():
        key = f"{outer}{name}"
        setting = check_key(known, key, source)
        if setting.inner is None or (setting.takes_text and not isinstance(value, list)):
            continue  # what is neither a text nor a list is refused later
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                check_values(known, item, source, f"{key}[]." if setting.item else f"{key}.")
            elif item is not None:
                raise ValueError(f"{source}: {key}: expected 'key: value' lines, got {item!r}")


def check_null(known: Mapping[str, Setting], values: Any, kinds: Collection[str] = KINDS) -> None:
    """Refuses null where a setting's type has none, and a list for a section: files may hold them anywhere.

    Args:
      known: the settings.
      values: jsonargparse's namespace of them.
      kinds: the kinds of settings to look at, see `_kind`.

    Raises:
      ValueError: a setting of these kinds is null, or a list, and may not be.
    """
    for setting in known.values():
        kind = _kind(setting)
        if kind not in kinds or _contains(setting.hint, type(None)):
            continue
        for value in _values_at(values, setting.key):
            if value is None or (kind == "section" and isinstance(value, list)):
                raise ValueError(f"{setting.key}: expected {form(setting.hint)}, got {json.dumps(value, default=str)}")


def check_numbers(known: Mapping[str, Setting], values: Any) -> None:
    """Refuses numbers that are not finite, or not in float32, and integers that no array could count.

    A setting whose comment names .inf may be infinite.

    Args:
      known: the settings.
      values: jsonargparse's namespace of them.

    Raises:
      ValueError: a number is NaN, infinite, or too large.
    """
    for setting in known.values():
        for number in filter(_is_number, _each(_values_at(values, setting.key))):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{setting.key}: expected an integer from -2**63 to 2**63 - 1, got {number}")
            if math.isnan(number) or (abs(number) > FLOAT32_MAX and ".inf" not in setting.comment):
                why = ", which is infinite in float32" if math.isfinite(number) else ""
                raise ValueError(f"{setting.key}: expected a finite number, got {number}{why}")


def _kind(setting: Setting) -> str:
    """Returns which of `KINDS` a setting is."""
    if setting.item is not None:
        return "list"
    if setting.inner is not None:
        return "section"
    hints = typing.get_args(setting.hint) if _is_union(setting.hint) else (setting.hint,)
    if any(hint in (int, float) for hint in hints):
        return "number"
    return "choice" if typing.get_origin(setting.hint) is Literal else "other"


def _values_at(values: Any, key: str) -> Iterator[Any]:
    """The values of a dotted key, one for each item where it goes through a list; none inside what is no section."""
    outer, items, inner = key.partition("[].")
    *sections, last = outer.split(".")
    for section in sections:
        values = values.get(section) if hasattr(values, "get") else None
    if not hasattr(values, "get") or last not in values:
        return
    if not items:
        yield values[last]
    for item in (values[last] or []) if items else []:
        yield from _values_at(item, inner)


def _each(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and the items of those that are lists."""
    for value in values:
        yield from value if isinstance(value, list | tuple) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _contains(hint: Any, kind: Any) -> bool:
    return hint in (kind, Any) or (_is_union(hint) and any(_contains(part, kind) for part in typing.get_args(hint)))


# Help


def help_text(
    kind: type[Any], program: str, positional: Collection[str] = (), options: Mapping[str, str] | None = None
) -> str:
    """What `--help` prints: every setting with its type, its comment and its default."""
    known = settings(kind)
    places = [f"{name.upper()} ..." if known[name].item else name.upper() for name in positional]
    lines = [f"usage: {' '.join([program, *places, '[--key value ...]'])}", "", inspect.getdoc(kind) or "", ""]
    for setting in known.values():
        text = f"{setting.comment} {_default(setting)}".rstrip()
        if setting.inner is not None and not setting.takes_text:
            lines += ["", *textwrap.wrap(f"{setting.key}: {text}", 110)]
        elif setting.key in positional:
            lines += _entry(places[list(positional).index(setting.key)], text)
        else:
            lines += _entry(f"{'' if '[]' in setting.key else '--'}{setting.key} {form(setting.hint)}", text)
    lines += ["", "other options:"]
    for name, text in (options or {}).items():
        lines += _entry(f"--{name}", text)
    return "\n".join(lines)


def _entry(name: str, text: str) -> list[str]:
    """Lines of `  NAME   TEXT`, with the text in its own column."""
    rows = textwrap.wrap(text, 120 - COLUMN)
    first = f"  {name}".ljust(COLUMN)
    if len(first) == COLUMN and first.endswith(" ") and rows:
        first += rows.pop(0)
    return [first.rstrip(), *(" " * COLUMN + row for row in rows)]


def _default(setting: Setting) -> str:
    """`(default: 8)`; nothing where the comment says it in words, or where the settings inside have their own."""
    value = setting.default
    if value is dataclasses.MISSING:
        return "(required)"
    if "default:" in setting.comment or dataclasses.is_dataclass(value):
        return ""
    return f"(default: {shown(value)})"


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value)) or "none"
    names: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value) or '""'
