"""What the commands share: consoles, output folders, what is said at the end of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from curvlab import figures
from curvlab.errors import CurvlabError

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


def finish(ds: Any, folder: Path, figure: str, show: Callable[[Any], None]) -> None:
    """What every run ends with: figure files, table, and the names of what was written."""
    drawn = figures.draw(ds, figure)
    written = [folder / "run.h5"]
    for suffix in ("png", "svg"):
        drawn.savefig(folder / f"{figure}.{suffix}", dpi=150)
        written.append(folder / f"{figure}.{suffix}")
    show(ds)
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
