"""A comparison by the names of the tables: what `curvlab compare` runs.

`runs.compare` is the one on a user's own objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from curvlab.closure import Closure
from curvlab.comparison_loop import Course, compare_one
from curvlab.comparison_settings import CompareSettings
from curvlab.datasets import Batches
from curvlab.errors import MOST_STEPS, CurvlabError, tell, whole
from curvlab.logs.log import Log
from curvlab.objective import Objective
from curvlab.probes.base import asked, check_probes
from curvlab.problem import Problem
from curvlab.runs import Run
from curvlab.system import random_state
from curvlab.system.progress import progress_bar

SEEDS = 10_000
"""Seeds of a comparison at most."""


@dataclass(frozen=True, kw_only=True)
class NamedComparison:
    """A comparison on a problem of the tables: what the command line runs.

    `warm`: minibatches of the warm start at most; None: one pass over the data. `seeds`: the
    problem's own first.
    """

    settings: CompareSettings
    problem: Problem
    steps: int | None = 300
    epochs: int | None = None
    batch_size: int = 1000
    warm: int | None = None
    seeds: tuple[int, ...] = (0,)
    verbose: bool = False

    def check(self) -> None:
        """Check names and ranges, before anything is loaded.

        Raises:
            CurvlabError: an unknown name or a value out of range.
        """
        _ = self.problem.entry  # first: a module of the user's may enter algorithms and probes
        self.settings.check()
        self.problem.check()
        for name in ("steps", "epochs", "warm"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1, MOST_STEPS)
        if self.steps is None and self.epochs is None:
            raise CurvlabError("the comparison needs an end: give steps or epochs")
        whole("seeds", len(self.seeds), 1, SEEDS)
        for seed in self.seeds:
            whole("the seed", seed, 0)


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that was checked, loaded, and seen to fit; nothing is written or run yet."""

    named: NamedComparison
    first: Objective
    steps: int

    def objective(self, seed: int) -> Objective:
        """Return the objective of a seed."""
        return self.first if seed == self.first.seed else self.named.problem.objective(seed)


def prepare_comparison(named: NamedComparison) -> PreparedComparison:
    """Check, load and build a comparison.

    Raises:
        CurvlabError: as `NamedComparison.check`, and for data that do not fit the model or the size
            of the minibatches, and options that a method does not take.
    """
    named.check()
    problem = named.problem
    train, _ = problem.parts
    per_epoch = train.batches(named.batch_size).per_epoch
    steps = min(
        v for v in (named.steps, named.epochs and named.epochs * per_epoch) if v is not None
    )
    first = problem.objective(named.seeds[0])
    first.ranks.check_size(named.batch_size)
    with random_state.kept(first.device):
        Closure(
            first, train.x[:2], train.y[:2], 0, factor=1.0
        ).losses()  # on cloned buffers: the model is the run's own
    curvatures = {
        name: d.curvature for name, d in named.settings.descents(first, named.batch_size).items()
    }
    check_probes(list(asked(named.settings.probes, "compare")), curvatures)
    return PreparedComparison(named, first, steps)


def _some_of(batches: Batches, most: int) -> list[Any]:
    """Return the first `most` minibatches of the first pass."""
    return list(islice(batches.one_pass(), most))


def compare_named(
    prepared: PreparedComparison, path: Path | None, call: dict[str, Any], console: Console
) -> Run:
    """Compare what was prepared, one seed after another, into one log; None keeps it in memory.

    Raises:
        CurvlabError: as `compare`.
    """
    named, steps = prepared.named, prepared.steps
    settings, (train, _) = named.settings, named.problem.parts
    per_epoch = train.batches(named.batch_size).per_epoch
    log: Log | None = None
    with progress_bar(console, console.is_terminal) as bar:
        for i, seed in enumerate(named.seeds, 1):
            objective = prepared.objective(seed)
            objective.tell = tell if named.verbose and i == 1 else None
            batches = train.batches(named.batch_size, -(-steps // per_epoch), seed)
            if log is None:
                log = settings.log(
                    objective, named.batch_size, path, named.seeds, named.problem.about(call)
                )
            title = (
                "compare"
                if len(named.seeds) == 1
                else f"compare, seed {seed} ({i} of {len(named.seeds)})"
            )
            warm = batches.one_pass() if named.warm is None else _some_of(batches, named.warm)
            course = Course(batches, steps, warm, named.batch_size, seed, title)
            compare_one(objective, settings, course, log, bar)
    assert log is not None
    return Run(log)
