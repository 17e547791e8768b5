"""How a point stands, by its files alone: whichever worker, start or machine wrote them.

A point is done when its log is whole. Its folder has a count of the attempts of this start, so that
a point which ends its worker ends as a row, whoever starts the workers anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import xarray as xr

from curvlab.errors import CurvlabError
from curvlab.logs import attributes
from curvlab.logs.reading import open_quickly
from curvlab.show.about import unfinished
from curvlab.sweeps.points import Outcome
from curvlab.system.atomic import rewrite
from curvlab.system.lock import InUse, exclusive_lock

ATTEMPTS = 3
"""Runs of a point at most: the first, and two more where its worker has died."""

KILLED = f"its worker ended {ATTEMPTS} times (a signal, its memory, or a crash of native code)"

_COUNT = "attempts.json"


def finished(folder: Path) -> tuple[Outcome, xr.Dataset] | None:
    """Return how a point ended and its log; None where its log is absent, damaged or not whole."""
    if not (folder / "run.h5").is_file():
        return None
    try:
        ds = open_quickly(folder / "run.h5")
    except CurvlabError:
        return None
    stopped = attributes.text(ds, "stopped")
    if stopped:
        return Outcome("diverged", stopped), ds
    if unfinished(ds):
        return None
    lost = attributes.diverged(ds)
    if lost:
        said = "; ".join(f"{name}: {places[0].get('reason', '')}" for name, places in lost.items())
        return Outcome("diverged", said), ds
    return Outcome("done"), ds


def going_on(folder: Path, command: str) -> list[str]:
    """Return the words by which the run in a point's folder goes on, if it can.

    A log that no run can go on with is removed.
    """
    if command == "train" and (folder / "checkpoint.pt").is_file():
        return ["--resume"]
    (folder / "run.h5").unlink(missing_ok=True)
    return []


def attempts(folder: Path, start: str) -> int:
    """Return how often a point was begun since this start of the sweep."""
    try:
        found = json.loads((folder / _COUNT).read_text(encoding="utf-8"))
        return int(found["attempts"]) if found["start"] == start else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def begin_attempt(folder: Path, start: str) -> None:
    """Count an attempt before it begins."""
    text = json.dumps({"start": start, "attempts": attempts(folder, start) + 1})
    rewrite(folder / _COUNT, lambda aside: aside.write_text(text, encoding="utf-8"))


def ended(folder: Path) -> None:
    """Forget the attempts: the point has ended, in whatever way, and its worker is alive."""
    (folder / _COUNT).unlink(missing_ok=True)


@contextmanager
def alone(folder: Path, period: float = 0.2) -> Iterator[None]:
    """Hold a point inside.

    Where another worker holds it, of an earlier start whose command is gone, wait until it has
    ended: its log is then as good as ours.

    Args:
        folder: the point's.
        period: seconds between looks.

    Raises:
        CurvlabError: the folder cannot be written.
    """
    with ExitStack() as held:
        while not _entered(held, folder):
            time.sleep(period)
        yield


def _entered(held: ExitStack, folder: Path) -> bool:
    try:
        held.enter_context(exclusive_lock(folder / "point"))
    except InUse:
        return False
    return True
