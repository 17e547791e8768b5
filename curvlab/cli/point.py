"""What a worker of a sweep does with a point: the command, as by hand, in the worker's process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import xarray as xr

from curvlab.cli.terminal import bare
from curvlab.errors import CurvlabError, cause_of
from curvlab.sweeps import standing
from curvlab.sweeps.points import Outcome, Task

OUTPUT = "output.txt"
"""File of a point's folder with what the command has printed."""

SENT = 1 << 20
"""Bytes of a log at most that is sent with the outcome; a larger one is read from its file."""


def work(task: Task) -> Outcome:
    """Run a point where its log is not whole, and return how it ended.

    Where a worker has died of it too often it is not begun once more.

    Raises:
        CurvlabError: its folder cannot be written.
    """
    folder = Path(task.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with standing.alone(folder):
            return _worked(task, folder)
    except OSError as error:
        raise CurvlabError(f"the folder {folder} cannot be written: {cause_of(error)}") from error


def _worked(task: Task, folder: Path) -> Outcome:
    found = standing.finished(folder)
    if found is not None:
        standing.ended(folder)
        return _sent(*found)
    if standing.attempts(folder, task.start) >= standing.ATTEMPTS:
        return Outcome("killed", standing.KILLED)
    words = [*task.words, *standing.going_on(folder, task.words[0]), "--out", str(folder)]
    standing.begin_attempt(folder, task.start)
    line = _run_by_words(words, folder, task)
    standing.ended(folder)
    found = standing.finished(folder)
    return Outcome("failed", line) if found is None else _sent(*found)


def _sent(outcome: Outcome, log: xr.Dataset) -> Outcome:
    """Return the outcome with the log, unless that would be a burden for the scheduler."""
    return replace(outcome, log=log) if log.nbytes <= SENT else outcome


def _run_by_words(words: list[str], folder: Path, task: Task) -> str:
    """Run a command line; return the last line that it has said of what went wrong."""
    import torch

    from curvlab import datasets
    from curvlab.cli.app import run_here

    # each time: a new thread of the worker would begin with another number
    torch.set_num_threads(task.threads)
    if task.importable not in sys.path:
        sys.path.insert(0, task.importable)
    said, printed = io.StringIO(), io.StringIO()
    with datasets.keeping(), bare(), redirect_stderr(said), redirect_stdout(printed):
        code = run_here(words)
    text = said.getvalue()
    (folder / OUTPUT).write_text(printed.getvalue() + text, encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.startswith("curvlab: ")]
    return lines[-1].removeprefix("curvlab: ") if lines else f"it ended with exit code {code}"
