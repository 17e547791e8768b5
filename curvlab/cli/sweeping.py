"""`curvlab.sweep`, and what the command `curvlab sweep` shares with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from curvlab.cli.point import work
from curvlab.cli.sweep_options import Asked, AskedGrid, words_of
from curvlab.cli.terminal import folder_for, listed
from curvlab.show.page import report
from curvlab.sweeps.engine import Dask, Engine, distributed_module
from curvlab.sweeps.points import KEPT, claim, unclaim
from curvlab.sweeps.walk import SweepRun, carry_out
from curvlab.system import paths
from curvlab.system.lock import exclusive_lock


def swept(
    asked: Asked,
    folder: Path | None,
    scheduler: str | None,
    console: Console,
    shown_: bool,
    say: Callable[[str], None],
    engine: Engine | None = None,
) -> SweepRun:
    """Check what is asked for, run what is left of it, write result and page.

    Args:
        asked: the sweep.
        folder: that holds it; None: a fresh one under runs/.
        scheduler: of an existing cluster; None: the cores of this machine.
        console: of the progress bar.
        shown_: whether there is one.
        say: is told a line for each point.
        engine: in the place of dask's.

    Raises:
        CurvlabError: as `sweep`.
    """
    settings, call = asked.settings()
    if engine is None:
        distributed_module()  # what is not installed is said before a folder is made
        workers = min(asked.processes, len(settings.points()))
        engine = Dask(workers, settings.threads, scheduler, say)
    paths.check_folder(
        Path("runs") if folder is None else folder,
        () if folder is None else ("run.h5", KEPT, "report.html"),
        "output folder",
        "choose another with --out",
    )
    stem = f"sweep-{call['model'].replace(':', '-')}"
    with (
        paths.made(folder, lambda: folder_for(folder, stem)) as place,
        exclusive_lock(place / "run.h5"),
    ):
        claim(place, settings)
        try:
            run = carry_out(settings, place, engine, work, call, console, shown_, say)
        except BaseException:
            unclaim(place)
            raise
        report([place, *run.best()], place / "report.html", progress=False)
    return run


def sweep(
    command: str = "train",
    *,
    grid: AskedGrid = (),
    algorithms: str | Sequence[str] = (),
    seed: int = 0,
    seeds: int = 1,
    best: str | None = None,
    folder: str | Path | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> SweepRun:
    """Run a grid of settings × algorithms × seeds of `curvlab train` or `compare`.

    Every point is a run of that command in a folder of its own, on a worker of dask.distributed
    (the extra `sweep`). A point whose log is whole is not run again: the same call with the same
    folder goes on. The workers are new processes, which import the script that calls this: there
    the call stands under ``if __name__ == "__main__":``.

    Args:
        command: "train" or "compare".
        grid: {option: values}, or as on the command line: "NAME=VALUE,VALUE", or a name of
            `DOCUMENT_GRIDS`, or a list of these.
        algorithms: each a point of `train`; all of them in every point of `compare`.
        seed: the first.
        seeds: how many.
        best: the variable that is best where it is least at the end of any epoch; None: the
            document's choice, else the training loss. Of `compare` always the mean cosine.
        folder: that holds the sweep; None: a fresh one under runs/.
        scheduler: address of a dask scheduler, or its file; None: workers on this machine's cores.
        workers: on this machine; None: as many as it has cores.
        threads: of torch in each worker; None: a worker's share of the cores.
        progress: show a progress bar; None shows one where standard error is a terminal.
        options: of the command, by their names there (`model`, `epochs`, `batch_size`, …); `set`
            and `schedule_set` are {name: value}.

    Raises:
        CurvlabError: bad input, for any point; dask.distributed is not installed; no scheduler
            answers; a folder that holds another sweep. A point that diverges, fails or kills its
            worker is no error but a row.
    """
    names = listed(algorithms) if isinstance(algorithms, str) else tuple(algorithms)
    words = words_of(options)
    if command == "compare" and names:
        words += ["--algorithms", ",".join(names)]
    asked = Asked(command, words, grid, names, seed, seeds, best, threads, workers)
    console = Console(stderr=True)
    place = None if folder is None else paths.given(folder, "folder")
    bar = console.is_terminal if progress is None else progress
    return swept(asked, place, scheduler, console, bar, lambda line: None)
