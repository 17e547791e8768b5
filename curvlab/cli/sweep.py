"""``curvlab sweep``: its options, and what it prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from curvlab.cli.options import MACHINE, out_option
from curvlab.cli.terminal import err, finish, listed, say_interrupted, wrote
from curvlab.system.escape import for_rich
from curvlab.system.interrupt import LISTENER, number_of

Option = typer.Option

_GRID = "Grid"

NOTHING = 1
"""Exit code of a sweep of which no point came to its end."""


def sweep(
    context: typer.Context,
    command: Annotated[
        str, typer.Argument(help="train or compare; its options may follow, for every point.")
    ] = "train",
    grid: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUES",
            help=(
                "An option, or one of the algorithm's own, and its values with commas between; or"
                " a document's grid, of `curvlab list grids`. May be given again."
            ),
            rich_help_panel=_GRID,
        ),
    ] = None,
    algorithms: Annotated[
        str,
        Option(
            help=(
                "With commas between. Of train each is a point (of a document's grid all, if none"
                " is named); of compare all are in every point."
            ),
            rich_help_panel=_GRID,
        ),
    ] = "",
    seed: Annotated[int, Option(help="The first.", rich_help_panel=_GRID)] = 0,
    seeds: Annotated[
        int, Option(help="So many seeds, from --seed on, each a point.", rich_help_panel=_GRID)
    ] = 1,
    best: Annotated[
        str | None,
        Option(
            help=(
                "What is best where it is least at the end of any epoch: train_loss, val_loss,"
                " train_error, val_error. The document's choice by default, else train_loss; of"
                " compare the mean cosine."
            ),
            rich_help_panel=_GRID,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Of a dask scheduler that is there, or its file; by default a cluster of this"
            " machine's cores.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Option(help="Processes on this machine; its cores by default.", rich_help_panel=MACHINE),
    ] = None,
    threads: Annotated[
        int | None,
        Option(
            help="Of torch in each worker; its share of the cores by default.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        out_option("run.h5, report.html, landscape.png, landscape.svg and a folder for each point"),
    ] = None,
) -> None:
    """Run a grid of settings × algorithms × seeds, a point at a time, on all cores or a cluster.

    Every point is a run of `curvlab train` or `curvlab compare` in a folder of its own; options of
    that command follow, the same for all points. A point is done when its log is whole: the same
    command with the same --out goes on. A point that diverges, fails or kills its worker is a row
    with its reason. Needs the extra `sweep` (dask.distributed).

    The result is one data set (algorithm, lr, damping, …, seed, epoch), the landscape of thesis
    Figure 2.3 and one page. Exit code 1: no point came to its end.
    """
    from curvlab.cli.sweep_options import Asked
    from curvlab.cli.sweeping import swept

    words = list(context.args)
    if command.startswith("-"):  # an option of every point: the command was left out
        command, words = "train", [command, *words]
    names = listed(algorithms)
    if command == "compare" and names:
        words += ["--algorithms", ",".join(names)]
    asked = Asked(command, words, grid or (), names, seed, seeds, best, threads, workers)
    try:
        run = swept(
            asked,
            out_folder,
            scheduler,
            err,
            err.is_terminal,
            lambda line: err.print(for_rich(line)),
        )
    except KeyboardInterrupt as error:
        LISTENER.deaf = True
        where = "FOLDER" if out_folder is None else shlex.quote(str(out_folder))
        say_interrupted(
            error, f"; what is done stays: the same command, with --out {where}, goes on"
        )
        raise typer.Exit(128 + number_of(error)) from None
    finish(run.dataset, run.folder, "landscape")
    wrote(run.folder / "report.html")
    if not any(outcome.state == "done" for outcome in run.outcomes.values()):
        raise typer.Exit(NOTHING)
