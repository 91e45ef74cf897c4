"""Tables that stand in the terminal and, as Markdown, in pages of the docs."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from rrsq.cli.console import stdout

__all__ = ["Rows", "show_rows"]

Rows = list[tuple[str, ...]]
"""A header, and rows of as many cells."""


def show_rows(rows: Rows, *, markdown: bool) -> None:
    """Print a table to stdout; where not every word fits, each row as a list of its cells."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        typer.echo("\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]))
        return
    widths = _widths(rows, stdout.width)
    if widths is None:
        _show_lists(rows)
        return
    table = Table()
    for name, width in zip(rows[0], widths, strict=True):
        table.add_column(name, width=width)
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    stdout.print(table)


def _widths(rows: Rows, total: int) -> list[int] | None:
    """Widths of the columns so that no word is cut, wide ones getting what is to spare; None: too narrow."""
    columns = list(zip(*rows, strict=True))
    widths = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    wanted = [max(map(len, column)) for column in columns]
    spare = total - sum(width + 3 for width in widths) - 1
    if spare < 0:
        return None
    for _ in range(spare):
        short = max(range(len(widths)), key=lambda index: wanted[index] - widths[index])
        if widths[short] >= wanted[short]:
            break
        widths[short] += 1
    return widths


def _show_lists(rows: Rows) -> None:
    header, *body = rows
    for row in body:
        stdout.print(escape(row[0]), style="bold", soft_wrap=True)
        cells = Table.grid(padding=(0, 2, 0, 0))
        cells.add_column(no_wrap=True)
        cells.add_column(overflow="fold")
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell:
                cells.add_row(f"  {escape(name)}", escape(cell))
        stdout.print(cells)
    stdout.print()
