"""docs/errors.md has a row for every refusal in the sources, and no row without one."""

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "errors.md"
FOLDERS = ("gopo_jax", "models", "train", "eval", "bench")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
HOLE = "\0"  # a value in a message
LEAST_LETTERS = 6  # a text with fewer is no message, but joins others, as in f"{file}: {error}"

# Functions that return a message, which is raised elsewhere.
TELLERS = {"_checkpoints_problem", "_file_problem", "_name_problem", "_place_problem", "_refusal", "problem"}
# What is raised with a message that another row or the page's first lines have, as Python writes it.
MADE_ELSEWHERE = {
    "str(error)",
    "str(error) if error.filename is None else f'{error.filename}: {error.strerror}'",
    "f'{self.path}: {error}'",
    "f'{source}: {error}'",
    "f'{file}: {error}'",
    "f'{where}: {error}'",
    "f'{where}: {failure.why}'",
    "f'{source}: row {number}: {error}'",
    "f'{file}: row {number}: {error}'",
    "f'{source}: row {number}: {column!r}: {error}'",
    "found",  # of TELLERS
    "refusal",
    "status['refused']",
    "result['refused']",
}
# No input of a user's causes these.
INTERNAL = {
    "lengths and ids do not belong together": "a damaged cache, which is written again",
    "unbalanced brackets: \0": "the text is XLA's",
    "\0 is not JSON": "a judge's reply, which then is unparsable",
    "expected a chat completion, got \0": "a server's reply, which is asked for again",
    "the body of a reply is broken (\0)": "the question is counted as one without an answer",
    "the reply is longer than \0 bytes": "asked again; the client says that the connection failed",
    "expected chat messages before an answer of chat messages, got plain text": "callers render both alike",
    "\0: this task has no second question": "asked of tasks that have one",
}


class Message(NamedTuple):
    place: str
    text: str  # with a HOLE for each value


class Source:
    """The messages to users in one Python file.

    Args:
      constants: texts with a name in capitals, from all files.
    """

    def __init__(self, code: str, path: str, constants: Mapping[str, str]) -> None:
        self.path, self.constants = path, constants
        self.tree = ast.parse(code)
        functions = [node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)]
        self.returns = {function.name: [node.value for node in returns(function)] for function in functions}
        self.assigned: Mapping[str, list[ast.expr]] = {}
        self.messages: list[Message] = []
        self.opaque: list[Message] = []  # raised expressions that have no text
        self._read(self.tree, "")

    def _read(self, node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function, self.assigned = node.name, assignments(node)
        for value in message_values(node, function):
            texts = [text for text in self._texts(value) if len(re.findall(r"\w", text)) >= LEAST_LETTERS]
            place = f"{self.path}:{value.lineno}"
            self.messages += [Message(place, text) for text in dict.fromkeys(texts)]
            if not texts and isinstance(node, ast.Raise):
                self.opaque.append(Message(place, ast.unparse(value)))
        for child in ast.iter_child_nodes(node):
            self._read(child, function)

    def _texts(self, node: ast.expr, depth: int = 0) -> list[str]:
        """Every text that an expression may have; what is not known is a HOLE."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self._joined(parts, depth)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return self._joined([left, right], depth)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self._texts(value, depth)
            case ast.IfExp(body=one, orelse=other):
                return [*self._texts(one, depth), *self._texts(other, depth)]
            case ast.BoolOp(values=values):
                return [text for value in values for text in self._texts(value, depth)]
            case ast.Name(id=name) if name in self.constants:
                return [self.constants[name]]
            case ast.Name(id=name) if name in self.assigned and depth < 2:
                return [text for value in self.assigned[name] for text in self._texts(value, depth + 1)]
            case ast.Call(func=ast.Name(id=name)) if self.returns.get(name) and depth < 2:
                return [text for value in self.returns[name] for text in self._texts(value, depth + 1)]
        return [HOLE]

    def _joined(self, parts: Sequence[ast.expr], depth: int) -> list[str]:
        choices = [dict.fromkeys(self._texts(part, depth)) for part in parts]
        return [re.sub(f"{HOLE}+", HOLE, "".join(texts)) for texts in itertools.islice(itertools.product(*choices), 64)]


def returns(function: ast.AST) -> Iterator[ast.Return]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None)


def assignments(function: ast.AST) -> dict[str, list[ast.expr]]:
    """The expressions that a function assigns to its names."""
    assigned = defaultdict(list)
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                assigned[name].append(value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(names) == len(values):
                for name, value in zip(names, values, strict=True):
                    assigned[ast.unparse(name)].append(value)
    return assigned


def message_values(node: ast.AST, function: str) -> list[ast.expr]:
    """The expressions at a node that become messages to a user."""
    match node:
        case ast.Raise(exc=ast.Call(func=kind, args=[value, *_])) if ast.unparse(kind).endswith("Error"):
            return [value]
        case ast.Return(value=ast.Call(func=ast.Name(id=name), args=[value])) if name.endswith("Error"):
            return [value]
        case ast.Return(value=ast.expr() as value) if function in TELLERS:
            return [value]
        case ast.Call(func=ast.Name("print"), args=[value], keywords=[ast.keyword(value=stream)]):
            return [value] if ast.unparse(stream) == "sys.stderr" else []
    return []


def read_sources() -> list[Source]:
    codes = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in FILES}
    constants: dict[str, str] = {}
    for code in codes.values():
        for name, values in assignments(ast.parse(code)).items():
            if name.isupper() and isinstance(values[0], ast.Constant):
                constants[name] = str(values[0].value)
    return [Source(code, path, constants) for path, code in codes.items()]


class Row(NamedTuple):
    line: int
    cells: list[str]

    @property
    def messages(self) -> list[str]:
        return [text for _, text in re.findall(r"(`+)(.+?)\1", self.cells[0])]


def read_rows(page: str) -> list[Row]:
    """The rows of the page's tables, without their heads."""
    rows = []
    for number, line in enumerate(page.splitlines(), 1):
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] != "message" and not set(cells[0]) <= set("-"):
            rows.append(Row(number, cells))
    return rows


def pattern_of(message: str) -> re.Pattern[str]:
    """A regular expression of a message in a row: `{name}` is a value, and `...` any text.

    At the beginning a value may also be a word: `{name}: expected` is that of every setting.
    """
    pattern = ""
    for part in re.split(r"(\{\w+\}|\.\.\.)", message):
        if part == "...":
            pattern += r"[\s\S]*"
        elif re.fullmatch(r"\{\w+\}", part):
            pattern += rf"(\S*{HOLE}\S*|[\d.]+|\{{\w+\}})" if pattern else r"\S*"
        else:
            pattern += re.escape(part)
    return re.compile(pattern)


def faults(sources: Sequence[Source], page: str) -> list[str]:
    """What the page lacks, and what it has that the sources do not, one line each."""
    rows = [(row.line, message, pattern_of(message)) for row in read_rows(page) for message in row.messages]
    messages = [message for source in sources for message in source.messages if message.text not in INTERNAL]
    found, used = [], set()
    for place, text in messages:
        fitting = [message for _, message, pattern in rows if pattern.fullmatch(text)]
        used.update(fitting)
        if not fitting:
            found.append(f"{place}: docs/errors.md has no row for {text.replace(HOLE, '{...}')!r}")
    found += [f"docs/errors.md:{line}: no message is {text!r}" for line, text, _ in rows if text not in used]
    opaque = [message for source in sources for message in source.opaque if message.text not in MADE_ELSEWHERE]
    return found + [f"{place}: raises {text}, whose text is not known here" for place, text in opaque]


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return read_sources()


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_page_and_sources_have_the_same_messages(sources, page):
    assert faults(sources, page) == []
    assert len([message for source in sources for message in source.messages]) > 400  # the reader reads


def test_row_has_message_cause_and_remedy(page):
    rows = read_rows(page)
    assert [row.line for row in rows if len(row.cells) != 3 or not all(row.cells) or not row.messages] == []
    messages = [message for row in rows for message in row.messages]
    assert sorted({message for message in messages if messages.count(message) > 1}) == []
    literal = {message: re.sub(r"\{\w+\}|\W", "", message) for message in messages}
    assert [message for message, text in literal.items() if len(text) < LEAST_LETTERS] == []


@pytest.mark.parametrize(
    "code",
    [
        'def f(x):\n    raise ValueError(f"brand new message: expected noodles, got {x}")',
        'def f(x):\n    raise FileNotFoundError("brand new message: " + (f"{x} noodles" if x else "no noodles"))',
        'def f(x):\n    text = f"{x}: brand new message, expected noodles"\n    raise ValueError(text)',
        'def g(x):\n    return f"{x}: brand new message"\ndef f(x):\n    raise errors.SetupError(g(x))',
        'def _refusal(x):\n    return f"{x}: brand new message"',
        'def error(x):\n    return ValueError(f"{x}: brand new message")',
        'def f(x):\n    print(f"error: {x}: brand new message", file=sys.stderr)',
        "def f(x):\n    raise ValueError(NEW[x])",
    ],
)
def test_new_message_needs_a_row(sources, page, code):
    assert len(faults([*sources, Source(code, "new.py", {})], page)) >= 1
    assert all(fault.startswith("new.py:") for fault in faults([*sources, Source(code, "new.py", {})], page))


def test_row_without_a_message_is_refused(sources, page):
    row = "| `{name}: brand new message, got {value}` | none | none |"
    assert "no message is '{name}: brand new message" in faults(sources, f"{page}{row}\n")[0]


def test_exceptions_are_in_the_sources(sources):
    texts = {message.text for source in sources for message in source.messages}
    assert INTERNAL.keys() - texts == set()
    assert MADE_ELSEWHERE - {message.text for source in sources for message in source.opaque} == set()
    assert TELLERS - {name for source in sources for name in source.returns} == set()
