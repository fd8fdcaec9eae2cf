"""Where jobs print results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
"""What is printed is data, in which [a] is no markup and :a: no picture."""

console = Console(soft_wrap=True, **AS_IT_IS)
"""Prints to stdout; its width is that of the terminal."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], footer: int = 0) -> None:
    """Print a table; the last `footer` rows stand apart (means, unions)."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if number >= len(rows) - footer else None)
    wide = Console(width=max(console.width, 160), **AS_IT_IS) if not console.is_terminal else console
    wide.print(table)
