"""A sweep from its folder to its result: what is left is carried out, the rest is read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console

from curvlab.logs import swept
from curvlab.show import figures
from curvlab.sweeps import standing
from curvlab.sweeps.engine import Engine, Work, new_start
from curvlab.sweeps.points import POINTS, Outcome, Point, SweepSettings, Task
from curvlab.sweeps.result import Gathered, gather, write
from curvlab.system.progress import progress_bar


@dataclass(frozen=True)
class SweepRun:
    """A sweep that has ended.

    Args:
        folder: that holds it.
        dataset: variables by (algorithm, lr, damping, …, seed, epoch), `score` and `state`; the
            same to the bit however often the sweep was stopped and its points begun again.
        times: what is of the moment: seconds of every point by the same dimensions.
        outcomes: {point: how it ended}.
    """

    folder: Path
    dataset: xr.Dataset
    times: xr.Dataset
    outcomes: Mapping[str, Outcome]

    def figure(self, name: str = "landscape") -> Figure:
        """Draw figure `name`.

        Raises:
            CurvlabError: the figure is unknown, or the sweep lacks its data.
        """
        return figures.draw(self.dataset, name)

    def best(self) -> list[Path]:
        """Return the folders of each algorithm's best point, of its first seed."""
        return [self.folder / POINTS / name for name in swept.best_points(self.dataset)]


def place_of(folder: Path, point: Point) -> Path:
    """Return the folder of a point."""
    return folder / POINTS / point.name


def carry_out(
    settings: SweepSettings,
    folder: Path,
    engine: Engine,
    work: Work,
    call: Mapping[str, Any],
    console: Console,
    shown: bool,
    say: Callable[[str], None],
) -> SweepRun:
    """Run the points that are left, and write the result.

    Args:
        settings: of the sweep.
        folder: that holds it, claimed (`points.claim`).
        engine: carries points out.
        work: what a worker does with a task.
        call: the log's attribute of what was asked for.
        console: of the progress bar.
        shown: whether there is one.
        say: is told a line for each point.

    Raises:
        CurvlabError: of the engine; of files that cannot be written.
    """
    points = {point.name: point for point in settings.points()}
    gathered = Gathered(settings, list(points.values()), call)
    for point in points.values():
        found = standing.finished(place_of(folder, point))
        if found is not None:
            gathered.add(point, *found)
    if gathered.outcomes:
        say(f"{len(gathered.outcomes)} of {len(points)} points are done already")
    left = [point for name, point in points.items() if name not in gathered.outcomes]
    start, here = new_start(), os.getcwd()
    tasks = {
        point.name: Task(
            point.words, str(place_of(folder, point).resolve()), settings.threads, start, here
        )
        for point in left
    }
    try:
        with progress_bar(console, shown, period=3600.0) as bar:
            line = bar.add_task(
                "sweep", total=len(points), completed=len(points) - len(left), note=""
            )
            for said in _gone_through(tasks, engine, work, points, gathered, folder):
                say(said)
                bar.update(line, advance=1, note=said.partition(" ")[2])
    finally:
        if gathered.outcomes:
            ds, times = gather(gathered)
            write(folder / "run.h5", ds, times)
    return SweepRun(folder, ds, times, dict(gathered.outcomes))


def _gone_through(
    tasks: Mapping[str, Task],
    engine: Engine,
    work: Work,
    points: Mapping[str, Point],
    gathered: Gathered,
    folder: Path,
) -> Iterator[str]:
    """Have points carried out, take in how each ended, and yield a line of each."""
    begun = first = time.monotonic()
    before = len(points) - len(tasks)
    for done, (name, outcome) in enumerate(engine.outcomes(tasks, work) if tasks else (), 1):
        ended, log = replace(outcome, log=None), outcome.log
        if log is None:  # large, or of a point that failed before its log was whole
            ended, log = standing.finished(place_of(folder, points[name])) or (ended, None)
        gathered.add(points[name], ended, log)
        now, rest = time.monotonic(), len(tasks) - done
        # the first point's time has the start of the workers in it
        first = now if done == 1 else first
        each = now - begun if done == 1 else (now - first) / (done - 1)
        left = f" ({_duration(each * rest)} left)" if rest else ""
        yield f"{before + done}/{len(points)} {name}: {gathered.said(name)}{left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
