"""Tables of text: bare columns against a formula of their own, and what is boxed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from curvlab.show.text_table import Table, draw_table, text_lines

ROWS = (("k-bfgs", "λ → ∞", "3 ± 1"), ("a [b]bold[/b] :smile:", "", "x" * 300), ("", "1", ""))
TABLE = Table("what it is", ("method", "damping", "loss"), ROWS)


def boxed(table: Table, left: int | None = None) -> list[str]:
    written = io.StringIO()
    Console(file=written, width=1000, color_system=None).print(draw_table(table, left=left))
    return written.getvalue().splitlines()


def test_bare_columns_are_as_wide_as_their_words_and_two_blanks_apart() -> None:
    cells = [TABLE.columns, *ROWS]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    expected = [
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2])])
        for row in cells
    ]
    assert text_lines(TABLE) == [line.rstrip() for line in expected]


@pytest.mark.parametrize(("left", "expected"), [(None, "│ k    │   1 │"), (2, "│ k    │ 1   │")])
def test_columns_that_name_a_row_are_left_and_others_right_unless_it_is_said(
    left: int | None, expected: str
) -> None:
    assert expected in boxed(Table("", ("name", "lr"), (("k", "1"), ("l", "100"))), left)


def test_a_box_has_a_caption_and_lines_between_groups() -> None:
    rows = (("a", "x", "1"), ("a", "y", "2"), ("b", "x", "3"))
    lines = boxed(Table("what it is", ("one", "two", "n"), rows, heads=2))
    assert lines[0].strip() == "what it is"
    assert [line[0] for line in lines[1:]] == list("┏┃┡││├│└")
    assert not boxed(Table("", ("one", "two", "n"), rows))[0].startswith(" ")
