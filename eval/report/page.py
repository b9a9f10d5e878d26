"""Renders a report as report.html, which stands alone, and as report.md: a list of sections, each a list of blocks.

page.html.jinja and page.md.jinja have a macro for each kind of block. In the page everything is escaped but the
pictures' SVG, which is Markup; in report.md every text but command lines, which stand in a fence of their own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from eval.pictures import Picture, text_of
from eval.sheets import Sheet, markdown_text, number
from train.console import visible

PHONE = 38  # letters of a table that fit side by side on a phone; of a wider one, each row becomes a card there
SHORT = 24  # letters of cells that are not broken in such a card


@dataclass(frozen=True)
class Gallery:
    """Pictures beside each other."""

    pictures: Sequence[Picture]
    narrow: bool = False


@dataclass(frozen=True)
class SampleAnswer:
    """One completion in a sample, with its scores."""

    label: str
    text: str
    reward: float | None
    judge: float | None


@dataclass(frozen=True)
class Sample:
    """Completions of one prompt, side by side."""

    prompt_id: int
    prompt: Any
    answers: Sequence[SampleAnswer]

    @property
    def heading(self) -> str:
        """The prompt to read: a text that the completion continues, or the messages that it answers."""
        return f"{self.prompt} …" if isinstance(self.prompt, str) else text_of(self.prompt)


@dataclass(frozen=True)
class Files:
    """Raw files by their path from the report: (content, path)."""

    files: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Downloads:
    """Texts that the page holds, to be saved: (content, file name, text)."""

    files: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Commands:
    """Command lines."""

    lines: Sequence[str]


Block = str | Sheet | Gallery | Sample | Files | Downloads | Commands  # str: a paragraph


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def id(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Content:
    """Everything a report shows."""

    title: str
    subtitle: str
    headline: str
    sections: Sequence[Section]


def page(content: Content) -> str:
    """Returns the whole report as one HTML file that loads nothing."""
    return _render("page.html.jinja", content)


def markdown(content: Content) -> str:
    """Returns the same report for a terminal or a repository's page; its pictures are the files in figures/."""
    text = _render("page.md.jinja", content)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _render(template: str, content: Content) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "data_url": data_url,
        "fence": fence,
        "kind": lambda block: type(block).__name__.lower(),  # of its macro
        "number": number,
        "link_target": lambda path: quote(path, safe="/~@+=,"),
        "link_text": lambda text: re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", markdown_text(text)),
        "md": markdown_text,
        "table_class": table_class,
        "visible": visible,
    }
    return environment.get_template(template).render(content=content)


def fence(lines: Sequence[str]) -> str:
    """Returns backticks around a block of code, more than the lines have side by side."""
    runs = re.findall("`+", "\n".join(lines))
    return "`" * max(3, 1 + max(map(len, runs), default=0))


def data_url(text: str, file: str) -> str:
    """Returns a link target that holds the text itself, of the media type of the file's name."""
    types = {"csv": "text/csv", "json": "application/json"}
    return f"data:{types.get(file.rpartition('.')[2], 'text/plain')};charset=utf-8,{quote(text, safe='')}"


def table_class(sheet: Sheet) -> str:
    """Returns the CSS classes of a table: "" if it fits on a phone, else "wide", with "short" if its cells are."""
    if sheet.letters() <= PHONE:
        return ""
    longest = max((len(cell) for row in sheet.rows for cell in row[1:]), default=0)
    return "wide short" if longest <= SHORT else "wide"
