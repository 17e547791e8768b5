"""The training runs of one problem: as they are kept, gone on with, or begun."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from curvlab.datasets import Dataset
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.logs.reading import open_log
from curvlab.reproduction import problems
from curvlab.reproduction.methods import Method
from curvlab.reproduction.results import Result, cut
from curvlab.reproduction.script import Options
from curvlab.training import checkpoint
from curvlab.training.run import train

if TYPE_CHECKING:
    from curvlab.reproduction.comparison import Comparison

FURTHER = 3
"""Seeds that are tried beyond those asked for, where some diverge."""


class ProblemRuns:
    """The runs of one problem in one budget, each in a folder of its own."""

    def __init__(self, comparison: Comparison, problem: str, options: Options) -> None:
        self.of, self.name, self.options = comparison, problem, options
        self.problem = problems.find_problem(problem)
        self.extent = comparison.extent(options.budget)

    @cached_property
    def data(self) -> tuple[Dataset, Dataset] | None:
        """Training and test examples; None in a smoke run.

        Raises:
            CurvlabError: they are not there.
        """
        if self.options.smoke:
            return None
        return self.problem.load(
            self.options.budget == "cpu", self.extent.examples, self.extent.tests
        )

    def result(self, method: Method, *, training: bool = True) -> Result:
        """Train as many seeds as the budget asks for; where one diverges the next is tried.

        Args:
            method: of the comparison.
            training: False takes the runs that are there.

        Raises:
            CurvlabError: not `training`, and a run is missing.
        """
        runs: list[xr.Dataset] = []
        failures = []
        for seed in range(self.extent.seeds + (0 if self.options.smoke else FURTHER)):
            run = self.quietly(method, seed) if training else self.finished(method, seed)
            if run is None:
                raise CurvlabError(
                    f"no finished run of {method.algorithm} with seed {seed} lies in"
                    f" {self.options.runs}"
                )
            if run.attrs.get("stopped"):
                failures.append(f"seed {seed}: {run.attrs['stopped']}")
            else:
                runs.append(run)
            if len(runs) == self.extent.seeds:
                break
        arguments = ", ".join(f"{value:g}" for value in method.on(self.name) or ())
        return Result(method.algorithm, f"({arguments})", tuple(runs), tuple(failures))

    def quietly(self, method: Method, seed: int) -> xr.Dataset:
        """Return `trained`, without the warnings of what is said below a table."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "diverged in epoch", CurvlabWarning)
            # thesis 3.4.3, 4.7.2
            warnings.filterwarnings("ignore", "parameters of layers without a rule", CurvlabWarning)
            return self.trained(method, seed)

    def trained(self, method: Method, seed: int) -> xr.Dataset:
        """Return the log of one run: as it is where long enough, else gone on with, else begun."""
        arguments, batch = method.arguments(self.name), method.batch or self.of.batch
        if self.data is None:
            objective, random = self.problem.smoke(seed, self.of.l2)
            return train(
                objective,
                random.batches(32, seed=seed),
                random,
                steps=2,
                progress=False,
                **arguments,
            ).dataset
        examples, tests = self.data
        done = self.finished(method, seed)
        if done is not None:
            return done
        epochs, seconds = self._ends(method)
        folder = self.folder(arguments, batch, seed)
        objective = self.problem.objective(examples, seed, str(self.options.where), self.of.l2)
        batches = examples.batches(min(batch, len(examples)), seed=seed)
        more: dict[str, Any] = {
            "epochs": epochs,
            "seconds": seconds,
            "evaluate_samples": self.extent.evaluated,
        }
        resume = (folder / checkpoint.FILE).exists()
        validation = tests if len(tests) else None
        run = train(
            objective, batches, validation, folder=folder, resume=resume, **more, **arguments
        )
        return cut(run.dataset, epochs, seconds)

    def finished(self, method: Method, seed: int) -> xr.Dataset | None:
        """Return the log of a run that is long enough or has stopped; None: there is none."""
        folder = self.folder(method.arguments(self.name), method.batch or self.of.batch, seed)
        if not (folder / "run.h5").exists():
            return None
        ds, (epochs, seconds) = open_log(folder), self._ends(method)
        last = ds.isel(epoch=-1)
        spent = any(
            end is not None and float(last[of]) >= end
            for of, end in (("epoch", epochs), ("wall_seconds", seconds))
        )
        return cut(ds, epochs, seconds) if spent or ds.attrs.get("stopped") else None

    def _ends(self, method: Method) -> tuple[int | None, float | None]:
        """Return (epochs, seconds) of a run, each None where it is no limit."""
        seconds = self.extent.seconds_on(self.name)
        epochs = self.extent.epochs_on(self.name, method.algorithm)
        return (method.epochs if seconds is None and epochs is None else epochs), seconds

    def folder(self, arguments: Mapping[str, Any], batch: int, seed: int) -> Path:
        """Return the folder of a run, in whose name is everything that decides the numbers."""
        extent = self.extent
        about = {
            "batch": batch,
            "l2": self.of.l2,
            "of": extent.examples,
            "tests": extent.tests,
            "loss-of": extent.evaluated,
        }
        told = {name: value for name, value in arguments.items() if name != "algorithm"}
        problem = "-".join(
            [_plain(self.name), *(f"{name}={value:g}" for name, value in about.items() if value)]
        )
        method = "-".join(
            [arguments["algorithm"], *(f"{name}={_plain(value)}" for name, value in told.items())]
        )
        budget = f"{self.options.budget}-{self.options.where.type}"
        return self.options.runs / budget / problem / method / f"seed-{seed}"


def _plain(value: object) -> str:
    """Return letters, digits, dots: what a folder may be called."""
    return re.sub(
        r"[^\w.=+]+", "-", f"{value:g}" if isinstance(value, float) else str(value).lower()
    ).strip("-")
