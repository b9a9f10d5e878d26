"""Texts of models, names and paths are printed as they are: no markup, and control characters are shown."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from models.tokenizer import Tokenizer
from train.console import PlainConsole, console, print_plain, visible
from train.plan.inspect import add_length_rows, length_table
from train.plan.show import show_tokens
from train.running import SetupError, exit_code

NASTY = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "hyperlink": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "bell": "\x07",
    "backspace": "good\b\b\b\bevil",
    "return": "good\revil",
    "C1": "\x9b31m",
    "delete": "\x7f",
    "NUL": "\x00",
    "form feed": "a\x0cb\x0bc",
    "direction": "\u202eevil\u202c \u2066x\u2069",
    "surrogate": "\udc80",
    "markup": "[bold red]x[/] [link=http://evil]y[/link] [/nothing]",
    "emoji": ":smile: :boom:",
    "braces": "{task.description} {0} {nothing} %s %(x)s",
    "long": "a" * 3000,
}
OBEYED = [chr(i) for i in (*range(32), 127, *range(128, 160)) if chr(i) not in "\n\t"] + ["\u202e", "\u2066"]


def printed(show: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a call prints, on a console whose file is kept."""
    file = io.StringIO()
    monkeypatch.setattr(console, "_file", file)  # None again afterwards: wherever the standard output is
    show()
    return file.getvalue()


@pytest.mark.parametrize("name", NASTY)
def test_a_printed_text_is_shown_and_not_obeyed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = NASTY[name]
    for show in (lambda: console.print(text), lambda: print_plain(text), lambda: console.print("a", text, sep="\n")):
        output = printed(show, monkeypatch)
        assert visible(text) in output and not [sign for sign in OBEYED if sign in output]
        output.encode()  # a terminal's encoding takes it


@pytest.mark.parametrize("name", NASTY)
def test_visible_is_idempotent_and_leaves_ordinary_text_alone(name: str) -> None:
    shown = visible(NASTY[name])
    assert visible(shown) == shown and shown.isascii()
    for text in ("two\nlines\tand a tab", "héllo 世界 👩‍👩‍👧 ü ßæ – “x”", "שלום עולם"):
        assert visible(text) == text


def test_colours_of_the_console_are_its_own() -> None:
    file = io.StringIO()
    own = PlainConsole(file=file, force_terminal=True, color_system="standard", markup=False)
    own.print(Text("red", style="red"), "\x1b[32mgreen")
    assert "\x1b[31mred" in file.getvalue() and "\x1b[32m" not in file.getvalue()


@pytest.mark.parametrize("name", ["colour", "return", "direction", "markup", "C1"])
def test_show_and_inspect_print_rows_as_data(
    name: str, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids = tokenizer.hf.encode(NASTY[name], add_special_tokens=False)
    output = printed(lambda: show_tokens(f"prompt of {NASTY[name]}", ids, tokenizer), monkeypatch)
    table = length_table("x")
    add_length_rows(table, NASTY[name], {"prompts": [1, 2]}, {})
    output += printed(lambda: console.print(table), monkeypatch)
    assert not [sign for sign in OBEYED if sign in output]
    if name == "markup":
        assert "[bold red]x" in output


def test_a_path_in_a_bracket_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "[red]:smile:"
    assert printed(lambda: console.print(f"{path}: done"), monkeypatch) == f"{path}: done\n"


def test_an_error_shows_what_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise SetupError("no file \x1b[2J\r")

    assert exit_code(refuse, own_devices=True, several=False) == 2
    assert capsys.readouterr().err == "error: no file \\x1b[2J\\r\n"


def test_an_output_that_takes_no_more_ends_the_printing_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full:
        full_console = PlainConsole(file=full)
        full_console.print("one")
        full_console.print("two")
        assert full_console.quiet
    assert capfd.readouterr().err == (
        "warning: the standard output takes no more (No space left on device); nothing is printed\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        PlainConsole(file=pipe).print("no reader")
    assert capfd.readouterr().err == ""


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise SetupError("columns: a\nb\u2028c")

    assert exit_code(refuse, own_devices=True, several=False) == 2
    assert capsys.readouterr().err == "error: columns: a\\nb\\u2028c\n"
