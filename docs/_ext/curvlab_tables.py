"""Sphinx extension: the directive `table-of`, whose argument names a table of `tables.TABLES`."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from shutil import copyfile
from typing import Any

import tables
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective

NOTEBOOKS = "tutorials"
"""Folder of `docs/` that gets copies of the notebooks of `analyses/`, where they are kept and
tested.
"""


class TableOf(SphinxDirective):
    """```{table-of} algorithms```"""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in tables.TABLES:
            raise self.error(f"there is no table '{name}'; there are {', '.join(tables.TABLES)}")
        table = tables.TABLES[name]()
        group = nodes.tgroup(cols=len(table.columns))
        group += [nodes.colspec(colwidth=1) for _ in table.columns]
        group += nodes.thead("", self._row(table.columns))
        group += nodes.tbody("", *[self._row(row) for row in table.rows])
        kind = "gallery" if name in tables.GALLERIES else "generated"
        drawn = nodes.table("", group, classes=[kind, f"table-{name}", "colwidths-auto"])
        return [nodes.paragraph("", table.caption), drawn] if table.caption else [drawn]

    def _row(self, cells: Any) -> nodes.row:
        return nodes.row("", *[nodes.entry("", *self._cell(cell)) for cell in cells])

    def _cell(self, cell: tables.Cell) -> list[nodes.Node]:
        if isinstance(cell, tables.Pictures):
            up = posixpath.relpath(".", posixpath.dirname(self.env.docname) or ".")
            return [
                nodes.image(
                    "",
                    uri=posixpath.join(up, tables.PICTURES, file),
                    width="180px",
                    alt=f"The figure {Path(file).stem}",
                )
                for file in cell
            ]
        if isinstance(cell, tables.Markdown):
            parent = nodes.Element()
            self.state.nested_parse(
                StringList([cell], self.env.docname), self.content_offset, parent
            )
            return parent.children
        inside = (
            nodes.literal("", cell) if isinstance(cell, tables.Code) and cell else nodes.Text(cell)
        )
        return [nodes.paragraph("", "", inside)]


def copy_notebooks(app: Sphinx, config: Config) -> None:
    """Sphinx reads only what lies in its own folder."""
    there = Path(app.srcdir) / NOTEBOOKS
    there.mkdir(exist_ok=True)
    for notebook in (tables.ROOT / "analyses").glob("*.ipynb"):
        copy = there / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            copyfile(notebook, copy)


def plain(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Docstrings are plain text with code in backticks and **strong** words: other marks of
    reStructuredText are letters.
    """
    lines[:] = escaped("\n".join(lines)).split("\n")

    if what in ("attribute", "data", "property"):
        _as_written[name] = list(lines)


def restored(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Napoleon reads what stands before a colon as the type of an attribute; here it is a sentence,
    or {key: value}.
    """
    if name in _as_written:
        lines[:] = [*_as_written.pop(name), ""]


_as_written: dict[str, list[str]] = {}


def escaped(text: str) -> str:
    """|a|, [*shape] and x_ outside of code and examples as they stand."""
    parts = re.split(
        r"(^\s*(?:>>>|\.\.\.).*$|``.*?``|`[^`]*`|\*\*[^*\s][^*]*\*\*)", text, flags=re.MULTILINE
    )
    return "".join(
        part if i % 2 else _LETTERS.sub(r"\\\g<0>", part) for i, part in enumerate(parts)
    )


_LETTERS = re.compile(r"\||\*|(?<=\w)_(?=[\s.,;:)\]]|$)")


def readable(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None] | None:
    """Signatures of dataclasses: a default that is made anew has no text that Sphinx reads."""
    if signature is None:
        return None
    return re.sub(r": '([^']*)'", r": \1", re.sub(r"=\s?<factory>", "=...", signature)), returns


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("table-of", TableOf)
    app.connect("config-inited", copy_notebooks)
    # before napoleon, which adds marks
    app.connect("autodoc-process-docstring", plain, priority=400)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", restored, priority=600)
    return {"parallel_read_safe": True}
