"""report.html (stands alone) and report.md from the same content."""

import html
from dataclasses import dataclass
from typing import Any

from eval.plots import Picture, text_of
from eval.tables import Sheet, number

escape = html.escape


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
    prompt_id: int
    prompt: Any
    answers: list[Answer]


@dataclass(frozen=True)
class Content:
    """Everything a report shows."""

    title: str
    subtitle: str
    headline: str
    story: list[str]
    sheets: list[Sheet]  # the result
    calibration: list[Picture]  # of the reward models
    steps: list[Sheet]
    pictures: list[Picture]
    advantages: list[Picture]
    about_advantages: str
    samples: list[Sample]
    about_samples: str
    differences: Sheet
    sources: list[tuple[str, str]]  # what is in it, relative path
    commands: list[str]


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
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } a { color: var(--link); }
.subtitle, .note, figcaption, .scores { color: var(--muted); font-size: .875rem; } .subtitle { margin: 0; }
.note { margin: .4rem 0 0; } .headline { font-size: 1.15rem; margin: 1.2rem 0; padding: .9rem 1.1rem;
  border-left: 4px solid var(--s0); background: var(--card); }
.story { max-width: 48rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top; }
th:first-child { text-align: left; } thead th { color: var(--muted); font-weight: 600; font-size: .875rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; }
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
  thead { position: absolute; clip-path: inset(50%); height: 1px; overflow: hidden; }
  table, tbody { display: block; } tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--grid); }
  th, td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .12rem 0; }
  td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  tbody th { display: block; } tbody th::before { content: attr(data-label) " "; font-weight: 400; } }
"""


def page(content: Content) -> str:
    """The whole report as one HTML file that needs nothing from anywhere."""
    links = "".join(
        f'<li><a href="{escape(path)}">{escape(path)}</a>: {escape(what)}</li>' for what, path in content.sources
    )
    sections = [
        ("The result", "".join(sheet.html() for sheet in content.sheets) + figures(content.calibration)),
        ("What happened", '<div class="story">' + "".join(f"<p>{escape(p)}</p>" for p in content.story) + "</div>"),
        ("Over the training", figures(content.pictures) + "".join(sheet.html() for sheet in content.steps)),
        (
            "The same rewards as ranks and as z-scores",
            f"<p>{escape(content.about_advantages)}</p>{figures(content.advantages, 'grid narrow')}",
        )
        if content.advantages
        else None,
        ("Samples", f"<p>{escape(content.about_samples)}</p>" + "".join(map(sample_html, content.samples))),
        (
            "Where the numbers come from",
            f"{content.differences.html()}<h3>Files</h3><ul>{links}</ul><h3>Commands</h3>"
            f"<pre>{escape(chr(10).join(content.commands))}</pre>",
        ),
    ]
    body = "".join(f"<section><h2>{escape(s[0])}</h2>{s[1]}</section>\n" for s in sections if s is not None)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.title)}</title><style>{STYLE}</style></head>\n<body>\n"
        f'<header><h1>{escape(content.title)}</h1><p class="subtitle">{escape(content.subtitle)}</p></header>\n'
        f'<p class="headline">{escape(content.headline)}</p>\n{body}</body></html>\n'
    )


def figures(pictures: list[Picture], layout: str = "grid") -> str:
    drawn = "".join(
        f"<figure><h3>{escape(p.title)}</h3>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    return f'<div class="{layout}">{drawn}</div>'


def heading(prompt: Any) -> str:
    """A prompt to read; a text that goes on, or messages that are answered."""
    return f"{prompt} …" if isinstance(prompt, str) else text_of(prompt)


def sample_html(sample: Sample) -> str:
    answers = "".join(
        f"<div><b>{escape(a.label)}</b><p>{escape(a.text) or '<i>(empty)</i>'}</p>"
        f'<p class="scores">{escape(a.scores)}</p></div>'
        for a in sample.answers
    )
    return f'<div class="sample"><h3>{escape(heading(sample.prompt))}</h3><div class="answers">{answers}</div></div>'


def markdown(content: Content) -> str:
    """The same report for a terminal or a repository's page; pictures are files beside it."""
    parts = [f"# {content.title}", content.subtitle, f"**{content.headline}**", "## The result"]
    parts += [f"### {sheet.title}\n\n{sheet.markdown()}" for sheet in content.sheets]
    parts += [picture_markdown(p) for p in content.calibration]
    parts += ["## What happened", *content.story, "## Over the training"]
    parts += [picture_markdown(p) for p in content.pictures]
    parts += [f"### {sheet.title}\n\n{sheet.markdown()}" for sheet in content.steps]
    if content.advantages:
        parts += ["## The same rewards as ranks and as z-scores", content.about_advantages]
        parts += [picture_markdown(p) for p in content.advantages]
    parts += ["## Samples", content.about_samples, *map(sample_markdown, content.samples)]
    parts += ["## Where the numbers come from", f"### {content.differences.title}\n\n{content.differences.markdown()}"]
    parts += ["\n".join(f"- [{path}]({path}): {what}" for what, path in content.sources)]
    parts += ["```\n" + "\n".join(content.commands) + "\n```"]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def picture_markdown(p: Picture) -> str:
    return f"### {p.title}\n\n![{p.title}](figures/{p.name}.png)\n\n{p.caption}"


def sample_markdown(sample: Sample) -> str:
    flat = " ".join(heading(sample.prompt).split())
    lines = [f"- {a.label}: {' '.join(a.text.split()) or '(empty)'} ({a.scores})" for a in sample.answers]
    return f"### {flat}\n\n" + "\n".join(lines)
