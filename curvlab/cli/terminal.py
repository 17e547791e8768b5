"""What the commands share: consoles, output folders, what is said at the end of a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from curvlab.errors import CurvlabError, cause_of
from curvlab.show import pictures
from curvlab.show.text_table import draw_table
from curvlab.system import blame, paths
from curvlab.system.atomic import rewrite
from curvlab.system.blame import Saved
from curvlab.system.escape import for_rich, for_terminal
from curvlab.system.interrupt import LISTENER, behind, number_of, words
from curvlab.system.lock import exclusive_lock
from curvlab.system.torchrun import may_say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from curvlab.show.text_table import Table


DIVERGED = 1
"""Exit code of a run whose numbers left the finite range: a result, and no bad input."""

out = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)
err = Console(stderr=True, soft_wrap=True, highlight=False)


_BARE: ContextVar[bool] = ContextVar("bare", default=False)


@contextmanager
def bare() -> Iterator[None]:
    """Let a run inside end with its log alone: no figure, no table."""
    token = _BARE.set(True)
    try:
        yield
    finally:
        _BARE.reset(token)


@contextmanager
def says_what_is_saved(path: Path, remedy: str = "") -> Iterator[None]:
    """Let Ctrl-C and errors inside say where the log so far is."""
    try:
        yield
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        raise _interrupted(error, path, remedy) from None
    except CurvlabError as error:
        saved = f" (the log so far is saved in {path})" if path.exists() else ""
        raise CurvlabError(f"{error}{saved}") from error
    except BaseException as error:
        signal = behind(error)
        if signal is not None:
            LISTENER.deaf = True
            raise _interrupted(signal, path, remedy) from None
        if path.exists():
            error.add_note(Saved(f"the log so far is saved in {path}{remedy}"))
        raise


def _interrupted(error: KeyboardInterrupt, path: Path, remedy: str) -> typer.Exit:
    saved = (
        f"the log so far is saved in {path}{remedy}" if path.exists() else "nothing was logged yet"
    )
    say_interrupted(error, f"; {saved}")
    return typer.Exit(128 + number_of(error))


def say_interrupted(error: KeyboardInterrupt, more: str = "") -> None:
    """Say whereby a run was ended; before it the error that ended the step that it waited for."""
    cause = error.__cause__
    if cause is not None:
        foreign = not isinstance(cause, CurvlabError)
        if foreign:
            sys.stderr.write(for_terminal(blame.told(cause), lines=True))
        line = blame.verdict(cause, "")[0] if foreign else str(cause)
        say(line)
    say(f"{words(error)}{more}")


def say(line: str) -> None:
    """Print a line on standard error; of several processes that say it one prints it."""
    if may_say(line):
        err.print(for_rich(f"curvlab: {line}"))


def show(table: Table, title: str = "") -> None:
    """Print a table of a log."""
    out.print(draw_table(replace(table, caption=title or table.caption)))


def finish(ds: Any, folder: Path, figure: str, title: str = "") -> None:
    """Draw and print what every run ends with.

    It is figure files, tables, and the names of what was written; nothing of a point of a sweep
    (`bare`).

    Args:
        ds: the log.
        folder: of the run.
        figure: its name.
        title: of the first table.
    """
    if _BARE.get():
        return
    from curvlab.show import figures, tables

    written = [folder / "run.h5"]
    try:
        drawn = figures.draw(ds, figure)
        for suffix in ("png", "svg"):
            write_picture(drawn, folder / f"{figure}.{suffix}")
            written.append(folder / f"{figure}.{suffix}")
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        done = (
            f"the run is done and saved in {written[0]}; draw it with: curvlab plot"
            f" {shlex.quote(str(folder))}"
        )
        err.print(for_rich(f"curvlab: {words(error)}; {done}"))
        raise typer.Exit(128 + number_of(error)) from None
    for i, table in enumerate(tables.own(ds)):
        show(table, "" if i else title)
    for file in written:
        wrote(file)


def wrote(file: Path) -> None:
    """Say on standard output that a file was written."""
    out.print(for_rich(f"wrote {file}"), soft_wrap=True)


def write_picture(drawn: Figure, path: Path) -> None:
    """Write a figure; what is there is whole at any moment.

    Raises:
        CurvlabError: it cannot be drawn or written.
    """
    from curvlab.show import drawable

    held = drawable.picture(drawn, path.suffix[1:])
    try:
        rewrite(path, lambda aside: aside.write_bytes(held))
    except OSError as error:
        raise CurvlabError(f"{path} cannot be written: {cause_of(error)}") from error


def listed(text: str) -> tuple[str, ...]:
    """Return names with commas between as a tuple."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def check_output(chosen: Path | None, figure: str, *others: str) -> None:
    """Raise CurvlabError where the log, the figure or other files of a run cannot be written.

    It is seen before the run is prepared.
    """
    files = ("run.h5", *others, *pictures.names(figure)) if chosen is not None else ()
    paths.check_folder(
        Path("runs") if chosen is None else chosen,
        files,
        "output folder",
        "choose another with --out",
    )


def folder_for(chosen: Path | None, stem: str) -> Path:
    """Make the output folder and return it; a fresh one under runs/ where none was chosen.

    Whether it is free is seen by `writing`.

    Raises:
        CurvlabError: it cannot be made.
    """
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
    except OSError as error:
        raise CurvlabError(
            f"the output folder {chosen or 'runs'} cannot be written: {cause_of(error)}; choose"
            " another with --out"
        ) from error
    return chosen


def free(folder: Path) -> None:
    """Raise CurvlabError where a folder holds a run: none is overwritten."""
    for name in ("run.h5", "checkpoint.pt"):
        if (folder / name).exists():
            raise CurvlabError(f"{folder} already holds a {name}: choose another folder with --out")


@contextmanager
def writing(folder: Path, check: Callable[[Path], object] = free) -> Iterator[None]:
    """Hold a run's folder, so that no other one writes to it meanwhile.

    Before the run begins `check` looks at what is there.

    Raises:
        CurvlabError: another run writes there, the folder cannot be written; and as `check`.
    """
    with exclusive_lock(folder / "run.h5"):
        check(folder)
        yield
