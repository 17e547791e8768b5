"""``curvlab reproduce``: figures and tables of the documents by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curvlab.cli import lists
from curvlab.cli.terminal import say_interrupted
from curvlab.system.interrupt import LISTENER, number_of

Option = typer.Option


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="As figure-2.2 or table-3.3; without it, all are listed."
        ),
    ] = None,
    budget: Annotated[
        str,
        Option(
            help=(
                "smoke: seconds, without data; cpu: minutes on two cores; paper: the document's"
                " own, for a GPU."
            )
        ),
    ] = "cpu",
    out_folder: Annotated[
        Path, Option("--out", metavar="FOLDER", help="Gets NAME-BUDGET.png and NAME-BUDGET.txt.")
    ] = Path("runs/figures"),
    runs: Annotated[
        Path,
        Option(
            metavar="FOLDER",
            help="Training runs, shared by figures; what is there goes on, or is taken as it is.",
        ),
    ] = Path("runs/reproduce"),
    device: Annotated[str, Option(help="auto (CUDA if there is one), cpu, cuda, cuda:N.")] = "auto",
    methods: Annotated[
        list[str] | None,
        Option("--method", help="Of the figure's legend; may be given again. All by default."),
    ] = None,
    problems: Annotated[
        list[str] | None,
        Option("--problem", help="Of the figure's networks and data; may be given again."),
    ] = None,
) -> None:
    """Make a figure or table of a document again, and check what the document says of it.

    It trains, draws and prints. After Ctrl-C the same command goes on. The scripts are short:
    analyses/ of the repository.
    """
    from curvlab.reproduction import Options, load_script
    from curvlab.reproduction import reproduce as reproduce_it

    if name is None:
        lists.list_("reproductions")
        raise typer.Exit
    options = Options(budget, out_folder, runs, device, tuple(methods or ()), tuple(problems or ()))
    try:
        reproduce_it(load_script(name), name, options)
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        say_interrupted(error, "; the same command goes on")
        raise typer.Exit(128 + number_of(error)) from None
