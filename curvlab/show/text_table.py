"""A table of text, and how it is drawn: boxed for a terminal, as bare columns for a text file."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass

import rich.table
from rich.console import Console
from rich.table import Column

from curvlab.system.escape import for_rich

_WIDE = 1 << 16  # letters, so that no column of a text file is broken


@dataclass(frozen=True)
class Table:
    """The first `heads` cells of a row name it; `notes`: (name, what it is)."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """Rows that belong together: where several cells name a row, those of the same first."""
        if self.heads == 1:
            return [list(self.rows)]
        return [list(rows) for _, rows in itertools.groupby(self.rows, lambda row: row[0])]


def draw_table(table: Table, *, left: int | None = None, boxed: bool = True) -> rich.table.Table:
    """Draw a table.

    Args:
        table: its letters are shown as they are.
        left: so many columns are set to the left, the others to the right; by default those that
            name a row.
        boxed: with a caption, and lines around cells and between groups of rows; else two blanks
            stand between columns.
    """
    left = table.heads if left is None else left
    heads = [
        Column(for_rich(name), justify="left" if i < left else "right")
        for i, name in enumerate(table.columns)
    ]
    found = (
        rich.table.Table(*heads, title=for_rich(table.caption))
        if boxed
        else rich.table.Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    )
    for rows in table.groups:
        for row in rows:
            found.add_row(*map(for_rich, row))
        if boxed:
            found.add_section()
    return found


def text_lines(table: Table) -> list[str]:
    """Return the bare columns of a table, a line each, as wide as their words."""
    written = io.StringIO()
    console = Console(file=written, width=_WIDE, color_system=None, force_terminal=False)
    console.print(draw_table(table, boxed=False))
    return [line.rstrip() for line in written.getvalue().splitlines()]
