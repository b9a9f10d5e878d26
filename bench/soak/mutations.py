"""Inputs that are almost valid: one to three places of a valid one are changed, in its values or in its text."""

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st


def _deep(levels: int) -> Any:
    """Returns so many lists and dictionaries in each other."""
    value: Any = None
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


DEEP = _deep(400)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, math.inf, -math.inf, math.nan),
    *("", " ", "x", "null", "true", "nan", ".inf", "1e9", "-1", "0x10", "1_000", "é" * 40, "word " * 400),
    *("\u202e", "\x00", "\x1b[31m", "\ud800", "\ufdd0", "\ufeff", "\r\n", "a\tb"),
    *("<|im_end|>", "<think>", "</think>", "{{ x }}", "[red]", "~/x", "a/b", "x@3", "../x", "*", "[1]"),
    *(DEEP, [], {}, [None], [[]], [1, "a"], {"a": 1}, {"": None}, [{}], {"role": "user"}, [[[[[[]]]]]]),
    *([{"role": "user", "content": "hi"}], [{"role": "assistant", "content": None}], {"content": ["x"]}),
)
NUMBERS = tuple(value for value in VALUES if isinstance(value, int | float) and not isinstance(value, bool))
PIECES = (
    *('"', "'", "\\", "{", "}", "[", "]", ",", ":", ": ", "\n", "\t", " ", "#", "- ", "%", "|", ">", "\r", "-"),
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!python ",
        "---\n",
        "\x00",
        "\ufeff",
        "\u2028",
        "\ud83d",
        "é",
        "[" * 3000,
        "[" * 900 + "]" * 900,
    ),
    *("1e999", "NaN", "null", "true", "0", "<|im_end|>", "{{", "}}", "{%", "%}", "{% endfor %}", "{% if"),
    *("loop.", "messages", "raise_exception('x')"),
)


class TreeMutation(NamedTuple):
    """A change of one value in nested lists and dictionaries."""

    kind: str  # one of TREE_KINDS
    place: int  # which value, of all in their order, modulo their number
    value: Any

    def __repr__(self) -> str:
        return f"{self.kind} {self.place} {ascii(self.value)!s:.60}"


class TextMutation(NamedTuple):
    """A change of a text, or of bytes read as Latin-1."""

    kind: str  # one of TEXT_KINDS
    place: int  # which character, modulo their number
    length: int
    piece: str

    def __repr__(self) -> str:
        return f"{self.kind} {self.place} {self.length} {ascii(self.piece)!s:.60}"


SPREAD = 2_654_435_761  # hypothesis likes small numbers, which would all be places at the beginning
TREE_KINDS = ("replace", "replace", "number", "number", "delete", "wrap", "nest", "rename", "add", "double", "swap")
TEXT_KINDS = ("insert", "insert", "delete", "replace", "cut", "repeat line", "repeat pair", "value", "flip")

values = st.one_of(
    st.sampled_from(VALUES), st.floats(), st.integers(), st.text(max_size=6), st.integers(-3, 40), st.floats(-2, 2)
)
tree_mutations = st.lists(
    st.builds(TreeMutation, st.sampled_from(TREE_KINDS), st.integers(0, 10_000), values), min_size=1, max_size=3
)
text_mutations = st.lists(
    st.builds(
        TextMutation,
        st.sampled_from(TEXT_KINDS),
        st.integers(0, 100_000),
        st.integers(1, 12),
        st.one_of(st.sampled_from(PIECES), st.text(max_size=3)),
    ),
    min_size=1,
    max_size=2,
)
# trees three times as often as texts; what is changed in both finds little more
mutations = st.one_of(
    *[st.tuples(tree_mutations, st.just([]))] * 3,
    st.tuples(st.just([]), text_mutations),
)
Mutations = tuple[Sequence[TreeMutation], Sequence[TextMutation]]


def change_tree(tree: Any, changes: Sequence[TreeMutation]) -> Any:
    """Returns a copy with the changes."""
    tree = copy.deepcopy(tree)
    for change in changes:
        spots = list(_spots(tree))
        if change.kind == "number":  # of a number, another
            spots = [spot for spot in spots if _is_number(spot[0][spot[1]])]
        if spots:
            container, key = spots[change.place * SPREAD % len(spots)]
            _change(container, key, change, spots)
    return tree


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spots(tree: Any) -> Any:
    """Yields (container, key) of every value in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _spots(value)


def _change(container: Any, key: Any, change: TreeMutation, spots: Sequence[tuple[Any, Any]]) -> None:
    value = copy.deepcopy(change.value)
    if change.kind == "replace":
        container[key] = value
    elif change.kind == "number":
        container[key] = value if _is_number(value) else NUMBERS[change.place % len(NUMBERS)]
    elif change.kind == "delete":
        del container[key]
    elif change.kind == "wrap":
        container[key] = [container[key]]
    elif change.kind == "nest":
        container[key] = {"x": container[key]}
    elif change.kind == "double" and isinstance(container[key], list | str):
        container[key] = container[key] * 2
    elif change.kind == "swap":
        other, place = spots[(change.place * SPREAD + 1 + len(f"{value}")) % len(spots)]
        container[key] = copy.deepcopy(other[place])
    elif isinstance(container, list):
        container.insert(key, value)
    elif change.kind == "rename":
        container[f"{value}"[:20]] = container.pop(key)
    else:
        container[f"{key}x"] = value


def change_text(text: str, changes: Sequence[TextMutation]) -> str:
    """Returns a text with the changes."""
    for change in changes:
        at = change.place * SPREAD % (len(text) + 1)
        end = at + change.length
        if change.kind == "insert":
            text = text[:at] + change.piece + text[at:]
        elif change.kind == "delete":
            text = text[:at] + text[end:]
        elif change.kind == "replace":
            text = text[:at] + change.piece + text[end:]
        elif change.kind == "cut":
            text = text[:at]
        elif change.kind == "flip":
            text = text[:at] + "".join(chr(ord(c) ^ 1 << change.length % 7) for c in text[at : at + 1]) + text[at + 1 :]
        elif change.kind == "repeat line":
            lines = text.splitlines(keepends=True) or [""]
            lines.insert(at % len(lines), lines[change.place % len(lines)])
            text = "".join(lines)
        elif pairs := list(re.finditer(r'"?\w+"?: *("[^"]*"|[\w.+-]+)', text)):
            pair = pairs[change.place % len(pairs)]
            if change.kind == "value":
                text = text[: pair.start(1)] + change.piece + text[pair.end(1) :]
            else:
                text = f"{text[: pair.end()]}, {pair[0]}{text[pair.end() :]}"
    return text
