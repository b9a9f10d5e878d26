"""Tables, made once: for the terminal by rich, as CSV, LaTeX and Markdown by pandas; and numbers as text for them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from train.console import visible

NONE = "–"
# pandas' own escape leaves the signs that the OT1 encoding prints as others, and [ and *, which \\ takes as arguments.
TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "]": "{]}", "*": "{*}", '"': "''",
    "–": "--", "−": "$-$", "±": r"$\pm$", "×": r"$\times$", "→": r"$\rightarrow$", "…": r"\ldots{}",
    "“": "``", "”": "''", "’": "'",
} | {sign: "\\" + sign for sign in "&%$#_{}"}  # fmt: skip
LATEX_RULES: Any = [{"selector": rule, "props": ":hline"} for rule in ("toprule", "midrule", "bottomrule")]


@dataclass(frozen=True)
class Sheet:
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    name: str = ""  # of its files, without suffix

    def first(self, columns: int) -> "Sheet":
        """Returns the first columns of the table."""
        return self.select(self.columns[:columns])

    def select(self, columns: Sequence[str]) -> "Sheet":
        """Returns some columns of the table."""
        at = [self.columns.index(column) for column in columns]
        return replace(self, columns=tuple(columns), rows=[tuple(row[i] for i in at) for row in self.rows])

    def rich(self) -> Table:
        """Returns the table for the terminal."""
        title = Text(visible(self.title), style="table.title")
        table = Table(title=title, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(Text(visible(column)), justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*(Text(visible(cell)) for cell in row))  # as it is: "[not reached]" is no markup
        return table

    def frame(self) -> Any:
        """Returns the rows as a pandas.DataFrame."""
        import pandas as pd  # slow to import

        return pd.DataFrame(self.rows, columns=list(self.columns))

    def csv(self) -> str:
        """Returns the cells as they are shown."""
        return str(self.frame().to_csv(index=False, lineterminator="\n"))

    def markdown(self) -> str:
        """Returns a pipe table and the note, their texts as text; white space in a cell is one blank."""
        frame = self.frame().map(markdown_cell).rename(columns=markdown_cell)
        align = ("left", *["right"] * (len(self.columns) - 1))
        text = frame.to_markdown(index=False, tablefmt="pipe", disable_numparse=True, colalign=align)
        return f"{text}\n" + (f"\n{markdown_text(self.note)}\n" if self.note else "")

    def latex(self) -> str:
        """Returns a tabular for \\input that needs no package; title and note are comments."""
        style = (
            self.frame().style.hide(axis="index").format(tex).format_index(tex, axis=1).set_table_styles(LATEX_RULES)
        )
        table = style.to_latex(column_format="l" + "r" * (len(self.columns) - 1))
        comments = [f"% {line}\n" for text in (self.title, self.note) for line in text.splitlines()]
        return "".join([*comments[:1], table, *comments[1:]])

    def letters(self) -> int:
        """Returns the table's width: the longest cell of each column, and two between columns."""
        return sum(2 + max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True))


def tex(text: str) -> str:
    """Escapes a text for LaTeX; white space becomes one blank."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def markdown_cell(text: str) -> str:
    """Escapes a text for a cell of a Markdown table, which shows it as it is; white space becomes one blank.

    Brackets stay but where they would be a link, and "_" within words, where it means nothing.
    """
    line = re.sub(r"[\\`*<&|~$]", r"\\\g<0>", visible(" ".join(text.split())))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    return re.sub(r"\](?=[(\[:])", r"\\]", line)


def markdown_text(text: str) -> str:
    """Escapes a text for a line of Markdown, which begins no heading, quotation, list or rule."""
    line = re.sub(r"^(?=#|>|[-+](?: |$)|[-=]+$)", r"\\", markdown_cell(text))
    return re.sub(r"^(\d+)(?=[.)](?: |$))", r"\1\\", line)


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


def tenths(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.1f}"


def interval_text(rate: Mapping[str, Any]) -> str:
    """ "[low, high]"."""
    return f"[{number(rate['low'])}, {number(rate['high'])}]"


def rate_text(rate: Mapping[str, Any] | None) -> str:
    """ "mean [low, high]"."""
    return NONE if rate is None or missing(rate["mean"]) else f"{number(rate['mean'])} {interval_text(rate)}"


def plus_minus(estimate: Mapping[str, Any]) -> str:
    """ "mean ± standard error"; the mean alone where there is no error."""
    error = estimate.get("standard_error")
    return number(estimate["mean"]) + ("" if missing(error) or missing(estimate["mean"]) else f" ± {number(error)}")


def percent_error(value: float, error: float | None) -> str:
    """ "share ± standard error %"."""
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"
