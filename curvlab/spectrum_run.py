"""Train, stop at the numbers of steps asked for, and log the spectra of the model there.

It is what `curvlab spectrum` runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console

from curvlab.algorithms import check_rates, find_algorithm, optimizer
from curvlab.closure import Closure
from curvlab.datasets import Dataset
from curvlab.errors import LARGEST, MOST_STEPS, CurvlabError, tell, whole
from curvlab.objective import Objective
from curvlab.optim import Optimizer
from curvlab.problem import Problem
from curvlab.spectra import Plan
from curvlab.system import random_state
from curvlab.system.interrupt import shielded
from curvlab.system.progress import counted, progress_bar
from curvlab.training.evaluation import evaluating, ready_to_train


@dataclass(frozen=True, kw_only=True)
class NamedSpectra:
    """Spectra of a problem of the tables.

    `lr` and `damping` are the algorithm's own; None: its document's.
    """

    problem: Problem
    plan: Plan
    samples: int = 1000
    after: tuple[int, ...] = (0, 100, 1000)
    algorithm: str = "adam"
    lr: float | None = None
    damping: float | None = None
    batch_size: int = 1000
    verbose: bool = False


@dataclass(frozen=True)
class PreparedSpectra:
    """Spectra that were checked, built and loaded; nothing is written or run yet."""

    named: NamedSpectra
    objective: Objective
    optimizer: Optimizer
    train: Dataset
    after: tuple[int, ...]


def prepare_spectra(named: NamedSpectra) -> PreparedSpectra:
    """Check, load and build spectra.

    Raises:
        CurvlabError: unknown names, values out of range, numbers that do not fit the data.
    """
    problem = named.problem
    problem.check()
    find_algorithm(named.algorithm)
    if not named.after:
        raise CurvlabError(
            "--after needs at least one number of training steps, 0 for the model as it is built"
        )
    for steps in named.after:
        whole("the number of training steps", steps, 0, MOST_STEPS)
    check_rates(named.lr, named.damping)
    train, _ = problem.parts
    objective = problem.objective(network=ready_to_train(problem.network()))
    objective.tell = tell if named.verbose else None
    named.plan.check(objective)
    options = {} if named.damping is None else {"damping": named.damping}
    stepper = optimizer(named.algorithm, objective, named.lr, **options)
    if not 1 <= whole("samples", named.samples, -LARGEST) <= len(train):
        raise CurvlabError(
            f"{named.samples} samples do not fit '{train.name}', which has {len(train)} training"
            f" examples: choose 1 to {len(train)}"
        )
    train.batches(named.batch_size)
    with evaluating(objective.model), random_state.kept(problem.place):
        Closure(objective, train.x[:2], train.y[:2], 0, factor=1.0).outputs()
    return PreparedSpectra(named, objective, stepper, train, tuple(sorted(set(named.after))))


def run(
    prepared: PreparedSpectra, path: Path, call: dict[str, Any], console: Console
) -> xr.Dataset:
    """Train and log spectra; whatever ends it, the log holds every state that was finished.

    Raises:
        CurvlabError: data that do not fit the model, NaN.
    """
    named, objective, train = prepared.named, prepared.objective, prepared.train
    group = prepared.optimizer.param_groups[0]
    about = {
        "title": f"curvlab spectrum: {', '.join(named.plan.matrices)} along {named.algorithm}",
        **named.problem.about(call),
        "data": train.name,
        "samples": named.samples,
        "algorithm": named.algorithm,
        "lr": group["lr"],
        "damping": group["damping"],
        "batch_size": named.batch_size,
    }
    log = named.plan.log(objective, about, path)
    x, y = train.x[: named.samples], train.y[: named.samples]
    last, kinds = prepared.after[-1], len(set(named.plan.matrices))
    per_epoch = train.batches(named.batch_size).per_epoch
    batches = train.batches(named.batch_size, max(1, -(-last // per_epoch)), named.problem.seed)
    stream = iter(batches)
    try:
        with progress_bar(console, console.is_terminal, 600) as bar:
            if last:
                prepared.optimizer.warm_start(
                    counted(batches.one_pass(), bar, "warm start", per_epoch)
                )
            training = bar.add_task("training", total=last, note="", visible=last > 0)
            spectra = bar.add_task("spectra", total=len(prepared.after) * kinds, note="")
            done = 0
            for steps in prepared.after:
                for _ in range(steps - done):
                    loss = prepared.optimizer.step(objective.closure(*next(stream)))
                    bar.update(training, advance=1, note=f"loss {float(loss):.4g}")
                prepared.optimizer.soundness.check()
                done = steps
                with evaluating(objective.model):
                    record = named.plan.record(
                        objective,
                        x,
                        y,
                        lambda note: bar.update(spectra, note=note),
                        lambda: bar.advance(spectra),
                    )
                with shielded() as shield, shield:
                    log.append(steps, record, save=True)
    finally:
        log.save()
    return log.dataset()
