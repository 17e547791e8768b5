"""Folders in which a run was begun and has nothing to go on with.

It was killed between its first log and its first checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from curvlab.errors import CurvlabError
from curvlab.logs.reading import open_log
from curvlab.training import checkpoint


def stepless(folder: Path) -> bool:
    """Return whether a folder holds the log of a run that has taken no step, and no checkpoint."""
    if (folder / checkpoint.FILE).exists() or not (folder / "run.h5").exists():
        return False
    try:
        ds = open_log(folder)
    except CurvlabError:
        return False
    return ds.sizes.get("epoch") == 1 and "steps" in ds and float(ds["steps"].max()) == 0


def anew(folder: Path) -> str:
    """Return what is said where a `stepless` run begins again."""
    return (
        f"{folder} holds a log without a step and no checkpoint, of a run that was killed at its"
        " beginning: it starts anew"
    )
