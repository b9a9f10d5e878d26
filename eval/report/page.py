"""report.html (stands alone) and report.md from the same content: a list of sections, each a list of blocks."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.pictures import Picture, text_of
from eval.sheets import Sheet, download, number

escape = html.escape


@dataclass(frozen=True)
class Gallery:
    """Pictures beside each other."""

    pictures: Sequence[Picture]
    narrow: bool = False

    def html(self) -> str:
        drawn = "".join(
            f"<figure><h3>{escape(p.title)}</h3>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>"
            for p in self.pictures
        )
        return f'<div class="grid{" narrow" if self.narrow else ""}">{drawn}</div>' if drawn else ""

    def markdown(self) -> str:
        return "\n\n".join(f"### {p.title}\n\n![{p.title}](figures/{p.name}.png)\n\n{p.caption}" for p in self.pictures)


@dataclass(frozen=True)
class Answer:
    """One completion in a sample, with its scores."""

    label: str
    text: str
    reward: float | None
    judge: float | None

    @property
    def scores(self) -> str:
        return f"reward {number(self.reward)}, judge {number(self.judge)}"


@dataclass(frozen=True)
class Sample:
    """Completions of one prompt, side by side."""

    prompt_id: int
    prompt: Any
    answers: Sequence[Answer]

    def heading(self) -> str:
        """The prompt to read; a text that goes on, or messages that are answered."""
        return f"{self.prompt} …" if isinstance(self.prompt, str) else text_of(self.prompt)

    def html(self) -> str:
        answers = "".join(
            f"<div><b>{escape(a.label)}</b><p>{escape(a.text) or '<i>(empty)</i>'}</p>"
            f'<p class="scores">{escape(a.scores)}</p></div>'
            for a in self.answers
        )
        return f'<div class="sample"><h3>{escape(self.heading())}</h3><div class="answers">{answers}</div></div>'

    def markdown(self) -> str:
        lines = [f"- {a.label}: {' '.join(a.text.split()) or '(empty)'} ({a.scores})" for a in self.answers]
        return f"### {' '.join(self.heading().split())}\n\n" + "\n".join(lines)


@dataclass(frozen=True)
class Files:
    """Raw files by their path from the report: (what is in it, path)."""

    files: Sequence[tuple[str, str]]

    def html(self) -> str:
        links = "".join(
            f'<li><a href="{escape(path)}">{escape(path)}</a>: {escape(what)}</li>' for what, path in self.files
        )
        return f"<h3>Files</h3><ul>{links}</ul>"

    def markdown(self) -> str:
        return "\n".join(f"- [{path}]({path}): {what}" for what, path in self.files)


@dataclass(frozen=True)
class Downloads:
    """Texts that the page holds, to be saved: (what is in it, file name, text)."""

    files: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        links = "".join(f"<li>{download(file, text, file)}: {escape(what)}</li>" for what, file, text in self.files)
        return f"<h3>Downloads from this page</h3><ul>{links}</ul>"

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Commands:
    lines: Sequence[str]

    def html(self) -> str:
        return f'<h3>Commands</h3><pre tabindex="0">{escape(chr(10).join(self.lines))}</pre>'

    def markdown(self) -> str:
        return "```\n" + "\n".join(self.lines) + "\n```"


Block = str | Sheet | Gallery | Sample | Files | Downloads | Commands  # str: a paragraph


@dataclass(frozen=True)
class Section:
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


STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1f; --muted: #5c5c67; --grid: #dedee4; --paper: #ffffff; --card: #f6f6f8;
  --link: #0b5cad; --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #a8457f; --s4: #6b5bc2; --s5: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --muted: #a9a9b5; --grid: #3a3a44; --paper: #16161a;
  --card: #202027; --link: #7cb8ff; --s0: #56b4e9; --s1: #ff9e4a; --s2: #3fcf9f; --s3: #e58fc4; --s4: #ab9ff2;
  --s5: #e3c34d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } a { color: var(--link); } a[download] { white-space: nowrap; }
.subtitle, .note, figcaption, .scores { color: var(--muted); font-size: .875rem; } .subtitle { margin: 0; }
.note { margin: .4rem 0 0; } .headline { font-size: 1.15rem; margin: 1.2rem 0; padding: .9rem 1.1rem;
  border-left: 4px solid var(--s0); background: var(--card); }
section > p { max-width: 48rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; margin: 0; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
th:first-child { text-align: left; } thead th { color: var(--muted); font-weight: 600; font-size: .875rem; }
.grid { margin-top: 1.2rem; display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
figure { margin: 0; padding: .9rem; background: var(--card); border-radius: 6px; }
figure h3 { margin: 0 0 .3rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: .3rem; }
.sample { padding: .9rem; background: var(--card); border-radius: 6px; margin-bottom: 1rem; }
.sample h3 { margin: 0 0 .6rem; white-space: pre-line; } .answers { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); }
.answers p { margin: .1rem 0; white-space: pre-line; } .answers b { font-size: .875rem; }
pre { background: var(--card); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
@media (max-width: 44rem) {
  table.wide thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  .wide, .wide tbody { display: block; } .wide tr { display: block; padding: .6rem 0;
    border-bottom: 1px solid var(--grid); }
  .wide th, .wide td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0; }
  .short td { white-space: nowrap; } .short td::before { white-space: normal; }
  .wide td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  .wide tbody th { display: block; } .wide tbody th::before { content: attr(data-label) " "; font-weight: 400; } }
"""


def page(content: Content) -> str:
    """The whole report as one HTML file that needs nothing from anywhere."""
    body = "".join(
        f'<section id="{section.id}"><h2>{escape(section.title)}</h2>'
        + "".join(f"<p>{escape(b)}</p>" if isinstance(b, str) else b.html() for b in section.blocks)
        + "</section>\n"
        for section in content.sections
    )
    links = "".join(f'<li><a href="#{section.id}">{escape(section.title)}</a></li>' for section in content.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f'<header><h1>{escape(content.title)}</h1><p class="subtitle">{escape(content.subtitle)}</p></header>\n'
        f'<main><p class="headline">{escape(content.headline)}</p>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n{body}</main></body></html>\n'
    )


def markdown(content: Content) -> str:
    """The same report for a terminal or a repository's page; pictures are files beside it."""
    parts = [f"# {content.title}", content.subtitle, f"**{content.headline}**"]
    for section in content.sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Sheet):
                parts.append(f"### {block.title}\n\n{block.markdown()}")
            else:
                parts.append(block if isinstance(block, str) else block.markdown())
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"
