"""A table of text, in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table as it is shown; `best` holds the row and column numbers of what is printed bold."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def markdown(table: Table) -> str:
    """Return a table in Markdown, with what is best in bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    rows = [
        line([f"**{cell}**" if (n, m) in table.best else cell for m, cell in enumerate(row)])
        for n, row in enumerate(table.rows)
    ]
    return "\n".join([f"**{table.title}**", "", line(table.columns), line(["---"] * len(table.columns)), *rows])


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
}
"""Characters that LaTeX would not print as they are."""


def latex_text(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex(table: Table) -> str:
    """Return a table in LaTeX, for the package booktabs, with what is best in bold."""

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    rows = [
        line([f"\\textbf{{{latex_text(c)}}}" if (n, m) in table.best else latex_text(c) for m, c in enumerate(row)])
        for n, row in enumerate(table.rows)
    ]
    numbers = [all(row[m][:1] in "0123456789+-–" for row in table.rows) for m in range(len(table.columns))]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{latex_text(table.title)}}}",
            f"  \\begin{{tabular}}{{{''.join('r' if number else 'l' for number in numbers)}}}",
            r"    \toprule",
            line([latex_text(column) for column in table.columns]),
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )
