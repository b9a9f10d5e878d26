"""Texts of models and names of runs are data in Markdown, tables and pictures: shown as they are, never obeyed."""

import io
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from eval.pictures import Studio
from eval.report.page import Commands, Content, Files, Sample, SampleAnswer, Section, fence, markdown
from eval.sheets import Sheet, markdown_text
from train.console import visible

NASTY = {
    "html": "<script>alert(1)</script> <b>x</b> <!-- y -->",
    "entity": "&lt;b&gt; &amp; &#60; a & b",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ snake_case_name 2*3*4",
    "code": "`a` ``b`` ```\nc\n```",
    "link": "[x](javascript:alert(1)) ![i](http://evil/p.png) [a][b] [r]: http://evil",
    "autolink": "<http://evil> <a@b.c>",
    "table": "a | b || c \\| d",
    "heading": "# not a heading",
    "quote": "> not a quote",
    "list": "- not a list",
    "plus": "+ not a list",
    "number": "1. not a list",
    "rule": "---",
    "setext": "a\n===",
    "backslash": "\\*a\\* C:\\new \\",
    "math": "$x^2$ and $$y$$ costs $5",
    "interval": "0.649 [0.607, 0.688]",
    "control": "a\x1b[31mb\x07\rc",
    "brackets": "[ ] [x] ]( ][ ]:",
    "fence": "~~~\n````",
}
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
PLAIN = {"text", "text_special", "inline", "heading_open", "heading_close", "paragraph_open", "paragraph_close"}
TABLE = {f"{name}_{end}" for name in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")}


def one_line(text: str) -> str:
    shown = " ".join(text.split())
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], shown)


def tokens_of(source: str) -> list[Token]:
    return [token for block in PARSER.parse(source) for token in [block, *(block.children or [])]]


def text_of(tokens: list[Token]) -> str:
    return "".join(token.content for token in tokens if token.type in ("text", "text_special"))


@pytest.mark.parametrize("where", ["{}", "# {}", "- label: {} (reward 1)", "**{}**"])
@pytest.mark.parametrize("name", NASTY)
def test_escaped_text_is_text_in_markdown(name: str, where: str) -> None:
    tokens = tokens_of(where.format(markdown_text(NASTY[name])))
    allowed = PLAIN | {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"}
    allowed |= {"strong_open", "strong_close"} if "**" in where else set()
    assert [token.type for token in tokens if token.type not in allowed] == []
    assert one_line(NASTY[name]) in text_of(tokens)
    assert not re.search(r"(?<!\\)\$", markdown_text(NASTY[name]))  # a page of a repository would read a formula


@pytest.mark.parametrize("name", NASTY)
def test_a_table_has_its_cells_and_no_more(name: str) -> None:
    sheet = Sheet("t", (NASTY[name], "b"), [(NASTY[name], "1"), ("x", NASTY[name])], NASTY[name])
    tokens = tokens_of(sheet.markdown())
    assert [token.type for token in tokens if token.type not in PLAIN | TABLE] == []
    assert [token.type for token in tokens].count("td_open") == 4
    assert text_of(tokens).count(one_line(NASTY[name])) >= 4


@pytest.mark.parametrize("name", NASTY)
def test_a_report_has_no_html_and_no_link_but_its_own(name: str) -> None:
    text = NASTY[name]
    blocks = [text, Sheet(text, (text, "b"), [(text, text)], text, "t"), Files([(text, text)]), Commands([text])]
    blocks += [Sample(0, text, [SampleAnswer(text, text, None, None)])]
    tokens = tokens_of(markdown(Content(text, text, text, [Section(text, blocks)])))
    assert [t.type for t in tokens if t.type in ("html_inline", "html_block", "image", "em_open", "s_open")] == []
    assert [t.type for t in tokens].count("link_open") == 1  # of Files
    assert [t.content.strip() for t in tokens if t.type == "fence"] == [visible(text).strip()]
    assert sum(t.tag == "h1" for t in tokens) == 2  # open and close


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fence(["a"]) == "```" and fence(["a ```` b", "`"]) == "`````"


@pytest.mark.parametrize("name", NASTY)
def test_the_terminals_table_reads_no_markup(name: str) -> None:
    for markup in (True, False):  # of the console that prints it
        console = Console(width=500, markup=markup, emoji=markup, record=True, file=io.StringIO())
        sheet = Sheet(f"[bold]{NASTY[name]}", (f"[red]{NASTY[name]}", "b"), [(f"[/x] :smile: {NASTY[name]}", "1")])
        console.print(sheet.rich())
        shown = console.export_text(styles=True)
        assert all(words in shown for words in ("[bold]", "[red]", "[/x] :smile:"))
        assert "\x1b[31m" not in shown.replace("\\x1b", "") and "\x07" not in shown


@pytest.mark.parametrize("name", ["a$b$c", "$x^2$", "$\\frac$", "_hidden", "a_b", "x\x1b[0m", "<b>&amp;", "{x}", "%s"])
def test_a_name_is_drawn_as_it_is(name: str, tmp_path: Path) -> None:
    texts: list[str] = []

    def paint(axes: object) -> None:
        axes.plot([0, 1], [0, 1], **studio.look(name))  # type: ignore[attr-defined]
        axes.set(xlabel="step", ylabel=f"win rate of {name}")  # type: ignore[attr-defined]
        axes.text(0, 0, f"{name} ahead")  # type: ignore[attr-defined]
        texts.append(axes)  # type: ignore[arg-type]

    studio = Studio(tmp_path, [name])
    picture = studio.draw("p", name, name, paint)
    axes: object = texts[0]
    legend = [text for text in axes.get_legend().get_texts()]  # type: ignore[attr-defined]
    drawn = [axes.yaxis.label, *axes.texts, *legend]  # type: ignore[attr-defined]
    assert len(legend) == 1 and not any(text.get_parse_math() for text in drawn)
    assert all(name.replace("\x1b", "\\x1b") in text.get_text() for text in drawn)
    assert (tmp_path / "p.png").stat().st_size and "<b>" not in str(picture.svg)
