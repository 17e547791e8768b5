"""What the commands share: consoles, output folders, what is said at the end of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.table
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column

from curvlab import figures, tables
from curvlab.errors import CurvlabError
from curvlab.tables import Table

out = Console(width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def says_what_is_saved(path: Path, remedy: str = "") -> Iterator[None]:
    """Around a run: Ctrl-C and errors say where the log so far is."""
    try:
        yield
    except KeyboardInterrupt:
        saved = f"the log so far is saved in {path}{remedy}" if path.exists() else "nothing was logged yet"
        err.print(f"curvlab: interrupted; {saved}", markup=False)
        raise typer.Exit(130) from None
    except CurvlabError as error:
        saved = f" (the log so far is saved in {path})" if path.exists() else ""
        raise CurvlabError(f"{error}{saved}") from error


def show(table: Table, title: str = "") -> None:
    """A table of a log. Names may hold what rich would take for markup."""
    heads = [Column(escape(name), justify="left" if i < table.heads else "right") for i, name in enumerate(table.columns)]
    drawn = rich.table.Table(*heads, title=escape(title or table.caption))
    for rows in table.groups:
        for row in rows:
            drawn.add_row(*map(escape, row))
        drawn.add_section()
    out.print(drawn)


def finish(ds: Any, folder: Path, figure: str, title: str = "") -> None:
    """What every run ends with: figure files, tables (`title` of the first), and the names of what was written."""
    drawn = figures.draw(ds, figure)
    written = [folder / "run.h5"]
    for suffix in ("png", "svg"):
        drawn.savefig(folder / f"{figure}.{suffix}", dpi=150)
        written.append(folder / f"{figure}.{suffix}")
    for i, table in enumerate(tables.own(ds)):
        show(table, "" if i else title)
    for file in written:
        out.print(f"wrote {file}", highlight=False, soft_wrap=True)


def listed(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def folder_for(chosen: Path | None, stem: str, *, resume: bool = False) -> Path:
    """The output folder, made; a fresh one under runs/ where none was chosen. No run is overwritten, unless it goes on."""
    try:
        if chosen is None:
            for number in range(1, 100_000):
                folder = Path("runs") / f"{stem}-{number:03d}"
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    continue
                return folder
        assert chosen is not None
        chosen.mkdir(parents=True, exist_ok=True)
        held = [name for name in ("run.h5", "checkpoint.pt") if (chosen / name).exists() and not resume]
        if held:
            raise CurvlabError(f"{chosen} already holds a {held[0]}: choose another folder with --out")
        probe = chosen / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CurvlabError(
            f"the output folder {chosen or 'runs'} cannot be written: {error.strerror}; choose another with --out"
        ) from error
    return chosen
