"""The comparison as it is called: `compare`, and the `Run` that it returns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console

from curvlab import datasets
from curvlab.comparison_loop import Course, compare_one
from curvlab.comparison_settings import ALWAYS as ALWAYS
from curvlab.comparison_settings import CompareSettings as CompareSettings
from curvlab.derivatives import derivatives
from curvlab.errors import MOST_STEPS, CurvlabError, several, whole
from curvlab.logs.log import Log
from curvlab.logs.reading import late_cosine
from curvlab.nests import copied
from curvlab.objective import Objective
from curvlab.optim import Batch
from curvlab.published import FIGURE_4_1 as FIGURE_4_1
from curvlab.show import figures
from curvlab.signatures import known_options, shows
from curvlab.system import paths
from curvlab.system.lock import exclusive_lock
from curvlab.system.progress import length, progress_bar


@dataclass(frozen=True)
class Run:
    """A finished comparison."""

    log: Log

    @property
    def dataset(self) -> xr.Dataset:
        """All records of the log, with its attributes.

        Raises:
            CurvlabError: there is none.
        """
        return self.log.dataset()

    @property
    def path(self) -> Path | None:
        """The file, where the run was given one."""
        return self.log.path

    @property
    def diverged(self) -> dict[str, list[dict[str, Any]]]:
        """Places where an algorithm's numbers left the finite range.

        It is {algorithm: [{seed, step, block, reason}, …]}.

        They are NaN from that step on.
        """
        found: dict[str, list[dict[str, Any]]] = json.loads(
            self.log.attributes.get("diverged", "{}")
        )
        return found

    def figure(self, name: str = "cosine") -> Figure:
        """Draw figure `name`.

        Raises:
            CurvlabError: the figure is unknown, or the log lacks its data.
        """
        return figures.draw(self.dataset, name)

    def table(self) -> xr.DataArray:
        """Return the mean cosine over the last three quarters of steps, by algorithm and block."""
        return late_cosine(self.dataset)


@shows(CompareSettings)
def compare(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    reference: str = "block-fisher",
    algorithms: Sequence[str] = FIGURE_4_1,
    lr: float | None = None,
    damping: float = 1e-3,
    steps: int | None = None,
    warm: Iterable[Batch] | None = None,
    path: str | Path | None = None,
    progress: bool | None = None,
    probes: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Follow `reference` and compare with it, at every step, the directions of `algorithms`.

    Args:
        objective: your model and likelihood; its parameters are moved.
        batches: minibatches (x, y); the run ends with them, or after `steps`.
        reference: the algorithm that moves the parameters and to which cosines are taken.
        algorithms: the others.
        lr: of the reference; its document's where None.
        damping: overall λ; each method's own damping follows from it (`damping_for`).
        steps: at most so many; None: as many as there are minibatches.
        warm: minibatches of the warm start. None takes the first epoch of `batches` where they are
            a data set's (`Dataset.batches`), and no warm start otherwise; pass ``()`` for none.
        path: of the log's file; None keeps it in memory.
        progress: show a progress bar; None shows one where standard error is a terminal.
        probes: further ones, of `PROBES`, each as "name" or "name:every"; one with a number of
            steps that is not the log's has an axis of its own.
        options: the other fields of `CompareSettings`: momentum, decay, update_every (T₁),
            refresh_every (T₂), log_every, unit (of empirical Fisher matrices).

    A method whose numbers leave the finite range is named in a warning, in `Run.diverged` and in
    the log's attribute `diverged`, and is NaN from there on; the others go on.

    Raises:
        CurvlabError: unknown names, values out of range, data that do not fit. What was logged
            until then is saved.
        Diverged: the numbers of the reference left the finite range; likewise, and `stopped` in the
            log says why.
        KeyboardInterrupt: Ctrl-C, or a signal of `interrupt.SIGNALS`, once the running step is in
            the log, which is saved.
    """
    settings = CompareSettings(
        reference=reference,
        algorithms=tuple(several(algorithms)),
        lr=lr,
        damping=damping,
        probes=tuple(several(probes)),
        **known_options(options, CompareSettings, compare),
    )
    settings.check()
    if steps is not None:
        whole("steps", steps, 1, MOST_STEPS)
    if path is not None:
        path = paths.check_file(path, "log", "choose another path")
    total = length(batches)
    steps = total if steps is None else steps if total is None else min(steps, total)
    if warm is None:
        warm = batches.one_pass() if isinstance(batches, datasets.Batches) else ()
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise CurvlabError("there are no minibatches to compare on")
    size = len(objective.batch(first)[0])
    call = {
        "function": "curvlab.compare",
        "batches": _describe(batches),
        "steps": steps,
        "path": None if path is None else str(path),
    }
    about = {"call": call, "model": type(objective.model).__name__, "data": call["batches"]}
    if isinstance(batches, datasets.Batches):
        about["data_description"] = batches.data.description
    log = settings.log(
        objective,
        size,
        Path(path) if path is not None and objective.ranks.first else None,
        [objective.seed],
        about,
    )
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    with (
        derivatives(),
        nullcontext() if log.path is None else exclusive_lock(log.path),
        progress_bar(console, shown) as bar,
    ):
        # a copy: the warm start goes through the data, which may fill the same tensors
        every = itertools.chain([copied(first)], iterator)
        course = Course(every, steps, warm, size, objective.seed)
        compare_one(objective, settings, course, log, bar)
    return Run(log)


def _describe(batches: object) -> str:
    if isinstance(batches, datasets.Batches):
        return (
            f"{batches.data.name}, batches of {batches.size}, {batches.epochs} epochs, seed"
            f" {batches.seed}"
        )
    return type(batches).__name__
