"""``curvlab plot``, ``report`` and ``doctor``: what is done with runs that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvlab.cli.terminal import out, write_picture, wrote
from curvlab.errors import lookup
from curvlab.system import paths
from curvlab.system.escape import for_rich

Option = typer.Option


def plot(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…",
            help="A run's folder or its run.h5; of training runs several, in one figure.",
        ),
    ],
    figure: Annotated[
        str | None, Option(help="Of `curvlab list figures`; the command's own by default.")
    ] = None,
    output: Annotated[
        Path | None,
        Option(
            "-o",
            "--output",
            metavar="FILE",
            help="PNG, SVG or PDF; by default beside the log, as PNG.",
        ),
    ] = None,
) -> None:
    """Redraw a figure from the log alone."""
    from curvlab.logs.reading import open_log
    from curvlab.show import figures, pictures

    if figure is not None:
        lookup(figures.FIGURES, figure, "figure")
    if output is not None:
        output = pictures.check_picture(output, "choose another with -o")
    found = {path: open_log(paths.given(path, "run")) for path in run}
    figure = figure or figures.main_figure(found[run[0]])
    beside = run[0] if run[0].is_dir() else run[0].parent
    target = output or pictures.check_picture(beside / f"{figure}.png", "choose another with -o")
    write_picture(figures.draw_all([(str(path), ds) for path, ds in found.items()], figure), target)
    wrote(target)


def report(
    run: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN…", help="A run's folder or its run.h5; several, in the order of the page."
        ),
    ],
    output: Annotated[
        Path | None,
        Option(
            "-o", "--output", metavar="FILE", help="By default report.html beside the (first) log."
        ),
    ] = None,
) -> None:
    """Write one page of HTML that stands alone about runs.

    It has figures, tables, the exact call, versions, every attribute.
    """
    from curvlab.show import page

    first = paths.given(run[0], "run")
    target = output or (first if first.is_dir() else first.parent) / "report.html"
    page.report([str(path) for path in run], target)
    wrote(target)


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="A run's folder, which is then looked at too."),
    ] = None,
) -> None:
    """Say what a bug report asks for first: of the installation, and of a run.

    It says versions, threads, device and data, and of a run whether it is whole and how to go on.
    What is in the way of something is marked with an exclamation mark, and the exit code is 1.
    """
    from curvlab.doctor import examine

    found = examine(run)
    out.print(for_rich(found, lines=True), soft_wrap=True)
    if found.bad:
        raise typer.Exit(1)
