"""``curvlab reproduce``: figures and tables of the documents by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from curvlab.cli.terminal import err, out
from curvlab.reproduction import Options, load, scripts
from curvlab.reproduction import reproduce as reproduce_it
from curvlab.system.interrupt import LISTENER, number_of, words

Option = typer.Option
_DEFAULT = Options()


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="As figure-2.2 or table-3.3; without it, all are listed.")
    ] = None,
    budget: Annotated[
        str, Option(help="smoke: seconds, without data; cpu: minutes on two cores; paper: the document's own, for a GPU.")
    ] = _DEFAULT.budget,
    out_folder: Annotated[
        Path, Option("--out", metavar="FOLDER", help="Gets NAME-BUDGET.png and NAME-BUDGET.txt.")
    ] = _DEFAULT.out,
    runs: Annotated[
        Path, Option(metavar="FOLDER", help="Training runs, shared by figures; what is there goes on, or is taken as it is.")
    ] = _DEFAULT.runs,
    device: Annotated[str, Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.")] = _DEFAULT.device,
    methods: Annotated[
        list[str] | None, Option("--method", help="Of the figure's legend; may be given again. All by default.")
    ] = None,
    problems: Annotated[
        list[str] | None, Option("--problem", help="Of the figure's networks and data; may be given again.")
    ] = None,
) -> None:
    """Make a figure or table of a document again: train, draw, print, and check what the document says of it.

    After Ctrl-C the same command goes on. The scripts are short: analyses/ of the repository.
    """
    if name is None:
        out.print(listing())
        raise typer.Exit
    options = Options(budget, out_folder, runs, device, tuple(methods or ()), tuple(problems or ()))
    try:
        reproduce_it(load(name), name, options)
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        err.print(f"curvlab: {words(error)}; the same command goes on", markup=False)
        raise typer.Exit(128 + number_of(error)) from None


COLUMNS = ("name", "what it shows", "cpu", "paper")


def rows() -> list[tuple[str, ...]]:
    """All names, what they show, and how far the budgets go."""
    found = ((name, load(name)) for name in scripts())
    return [(name, what.shows, what.extents["cpu"], what.extents["paper"]) for name, what in found]


def listing() -> Table:
    table = Table(*COLUMNS)
    for row in rows():
        table.add_row(*row)
    return table
