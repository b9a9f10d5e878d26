"""Tables, made once: shown in the terminal, in Markdown, LaTeX, CSV and HTML; and numbers as they stand in them."""

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from rich.table import Table
from rich.text import Text

NONE = "–"
PHONE = 38  # letters of a table that fit side by side on a phone; of a wider one, each row becomes a card there
SHORT = 24  # letters of cells that are not broken in such a card
TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': "''",
    "–": "--", "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "→": r"$\rightarrow$", "…": r"\ldots{}",
    "“": "``", "”": "''", "’": "'", "\u00a0": "~",
} | {sign: "\\" + sign for sign in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    name: str = ""  # of its files, without suffix

    def first(self, columns: int) -> "Sheet":
        """The same with the first columns alone."""
        return replace(self, columns=self.columns[:columns], rows=[row[:columns] for row in self.rows])

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))  # as it is: "[not reached]" is no markup
        return table

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{text}\n" + (f"\n{self.note}\n" if self.note else "")

    def latex(self) -> str:
        """A plain tabular for \\input, which needs no package; title and note are comments."""
        lines = [[tex(cell) for cell in line] for line in (self.columns, *self.rows)]
        head, *body = (" & ".join(line) + r" \\" for line in lines)
        frame = [
            r"\begin{tabular}{l" + "r" * (len(self.columns) - 1) + "}",
            r"\hline",
            head,
            r"\hline",
            *body,
            r"\hline",
        ]
        said = [f"% {line}" for text in (self.title, self.note) for line in text.splitlines()]
        return "\n".join([*said[:1], *frame, r"\end{tabular}", *said[1:]]) + "\n"

    def csv(self) -> str:
        """The cells as they are shown."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((self.columns, *self.rows))
        return text.getvalue()

    def html(self) -> str:
        escape = html.escape
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in self.columns)
        body = "".join(
            f'<tr><th scope="row" data-label="{escape(self.columns[0])}">{escape(row[0])}</th>'
            + "".join(
                f'<td data-label="{escape(column)}">{escape(cell)}</td>'
                for column, cell in zip(self.columns[1:], row[1:], strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        links = " ".join(
            download(f"{self.name}.{kind}", text, label)
            for kind, text, label in (("csv", self.csv(), "CSV"), ("tex", self.latex(), "LaTeX"))
            if self.name
        )
        note = f'<p class="note">{" ".join(part for part in (escape(self.note), links) if part)}</p>'
        longest = max((len(cell) for row in self.rows for cell in row[1:]), default=0)
        kind = f' class="wide{" short" if longest <= SHORT else ""}"' if self.letters() > PHONE else ""
        table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<h3>{escape(self.title)}</h3>{table}{note}"

    def letters(self) -> int:
        """How wide it is: the longest cell of each column, and two between columns."""
        return sum(2 + max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True))


def download(file: str, text: str, label: str) -> str:
    """A link that saves a text which the page itself holds."""
    kind = {"csv": "text/csv", "json": "application/json"}.get(file.rpartition(".")[2], "text/plain")
    return (
        f'<a download="{html.escape(file)}" href="data:{kind};charset=utf-8,{quote(text, safe="")}">'
        f"{html.escape(label)}</a>"
    )


def tex(text: str) -> str:
    """A text in LaTeX: signs with a meaning there are escaped, white space is one blank."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


def number(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.3f}"


def signed(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:+.3f}"


def percent(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.0f}"


def plus_minus(estimate: Mapping[str, Any]) -> str:
    if missing(estimate["mean"]):
        return NONE
    return f"{number(estimate['mean'])} ± {number(estimate['standard_error'])}"


def interval(estimate: Mapping[str, Any]) -> str:
    return f"[{number(estimate['low'])}, {number(estimate['high'])}]"


def tenths(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.1f}"


def estimate(rate: Mapping[str, Any] | None) -> str:
    return NONE if rate is None or missing(rate["mean"]) else f"{number(rate['mean'])} {interval(rate)}"


def estimate_error(value: Mapping[str, Any]) -> str:
    error = value.get("standard_error")
    return number(value["mean"]) + ("" if missing(error) else f" ± {number(error)}")


def percent_error(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def step_text(step: float | None) -> str:
    return NONE if step is None else f"{step:.1f}"
