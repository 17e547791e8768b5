"""Comparison: every method on every problem at the document's values.

A run is trained once for all figures that share it.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from curvlab.algorithms import ALGORITHMS
from curvlab.datasets import Dataset
from curvlab.errors import CurvlabError, CurvlabWarning
from curvlab.logs.reading import open_log
from curvlab.reproduction import problems
from curvlab.reproduction.claims import Claim, Reported, verdicts
from curvlab.reproduction.drawing import training_curves
from curvlab.reproduction.results import Result, Results, cut
from curvlab.reproduction.script import Options, ReproductionReport, say_progress
from curvlab.training import checkpoint
from curvlab.training.run import train

TableValues = tuple[float, ...]
"""(learning rate, damping) or (learning rate, weight decay, damping), as the documents' tables have
them; 0 for their dash.
"""

FURTHER = 3
"""Seeds that are tried beyond those asked for, where some diverge."""

SMOKE = "two steps of narrow networks on random numbers, which say nothing"


@dataclass(frozen=True)
class Method:
    """A line of a document's table.

    `values` are those of one problem, or of each by its name; `options` what else `curvlab.train`
    takes, `further` that of one problem alone; `batch` the size of minibatches and `epochs` the
    length, where they are not the comparison's.
    """

    algorithm: str
    values: TableValues | Mapping[str, TableValues]
    options: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch: int | None = None
    epochs: int | None = None

    def on(self, problem: str) -> TableValues | None:
        """Return the values for a problem; None where the table has none."""
        return self.values.get(problem) if isinstance(self.values, Mapping) else self.values

    def arguments(self, problem: str) -> dict[str, Any]:
        """Return the arguments of `curvlab.train` on a problem.

        What is the algorithm's own anyway is left out, so that equal runs have equal names.
        """
        lr, *decay, damping = self.on(problem) or ()
        table = ALGORITHMS[self.algorithm].read(self.options.get("reading"))
        usual = dict(table.own)
        usual |= {
            name: getattr(table, name)
            for name in (
                "momentum",
                "momentum_kind",
                "weight_decay",
                "decay",
                "update_every",
                "refresh_every",
            )
        }
        given = (
            dict(zip(("weight_decay",), decay, strict=False))
            | dict(self.options)
            | dict(self.further.get(problem, {}))
        )
        told = {
            name: value
            for name, value in given.items()
            if name not in usual or usual[name] != value
        }
        return {"algorithm": self.algorithm, "lr": lr, "damping": damping} | told


@dataclass(frozen=True)
class Extent:
    """The extent of a budget: how far its runs go.

    It is seconds of training or epochs, whichever come first (None: the methods' own epochs),
    seeds, and how many of the training and test examples; the training loss is of the first
    `evaluated`. `at_most`: epochs of algorithms that are to stop earlier.
    """

    seconds: float | Mapping[str, float] | None = None
    epochs: int | Mapping[str, int] | None = None
    seeds: int = 1
    examples: int | None = None
    tests: int | None = None
    evaluated: int | None = None
    at_most: Mapping[str, int] = field(default_factory=dict)

    def seconds_on(self, problem: str) -> float | None:
        """Return the seconds of training that a run of a problem has; None: no limit."""
        return self.seconds[problem] if isinstance(self.seconds, Mapping) else self.seconds

    def epochs_on(self, problem: str, algorithm: str = "") -> int | None:
        """Return the lower of the problem's and the algorithm's epochs; None: no limit."""
        ends = (
            self.epochs[problem] if isinstance(self.epochs, Mapping) else self.epochs,
            self.at_most.get(algorithm),
        )
        return min((n for n in ends if n is not None), default=None)

    def on(self, problems: Sequence[str]) -> str:
        """Return the extent on some problems in words."""
        seconds = [f"{s:g}" for s in dict.fromkeys(map(self.seconds_on, problems)) if s is not None]
        epochs = [f"{n}" for n in dict.fromkeys(map(self.epochs_on, problems)) if n is not None]
        words = [f"{' or '.join(seconds)} s of training a run"] if seconds else []
        words += [f"{' or '.join(epochs)} epoch{'s' * (epochs != ['1'])}"] if epochs else []
        words = words or ["the document's epochs"]
        words += (
            [f"of {len(self.at_most)} methods at most {max(self.at_most.values())}"]
            if self.at_most
            else []
        )
        words += [f"{self.seeds} seed{'s' * (self.seeds > 1)}"]
        words += [f"{self.examples:,} training examples"] if self.examples else []
        words += [f"training loss of {self.evaluated:,} examples"] if self.evaluated else []
        return ", ".join(words)


@dataclass(frozen=True)
class Comparison:
    """A figure of training curves.

    `measures` are variables of a training log, a row of panels each; `spread` says what is shaded;
    `told_after` are epochs after which the tables have the training loss, with its standard
    deviation over the seeds; `reported` are the document's numbers. `l2` is μ of μ ‖θ‖², in the
    gradients and not in the loss that is drawn.
    """

    shows: str
    claim: str
    problems: Sequence[str]
    methods: Mapping[str, Method]
    batch: int
    cpu: Extent
    paper: Extent
    claims: Sequence[Claim] = ()
    measures: Sequence[str] = ("train_loss", "val_error")
    spread: Literal["std", "error of the mean"] = "std"
    reported: Reported = field(default_factory=Reported)
    l2: float = 0.0
    told_after: Sequence[int] = ()

    @property
    def extents(self) -> dict[str, str]:
        """Lengths of the budgets in words, ``{budget: words}``."""
        return {
            "smoke": SMOKE,
            "cpu": self.cpu.on(self.problems),
            "paper": self.paper.on(self.problems),
        }

    def run(self, report: ReproductionReport) -> None:
        """Train what is not there yet, say what came out, and draw the curves."""
        found = self.results(report)
        budget = report.options.budget
        report.draw(
            training_curves(
                found, self.measures, f"{self.shows}\n{budget}: {self.extents[budget]}", self.spread
            )
        )

    def results(self, report: ReproductionReport) -> Results:
        """Train what is not there yet; say what came out, and which claims hold."""
        options = report.options
        chosen = [
            problem for problem in self.problems if problem in (options.problems or self.problems)
        ]
        labels = [label for label in self.methods if label in (options.methods or self.methods)]
        plan = [
            (p, label) for p in chosen for label in labels if self.methods[label].on(p) is not None
        ]
        found: Results = {}
        missing = ""
        done, started = 0, time.monotonic()
        for problem in chosen:
            mine = [label for p, label in plan if p == problem]
            try:
                runs = ProblemRuns(self, problem, options)
                _ = runs.data
            except CurvlabError as error:
                missing = str(error)
                report.say(f"{problem}: not run: {missing}")
                done += len(mine)
                continue
            found[problem] = {}
            for label in mine:
                left = (time.monotonic() - started) / done * (len(plan) - done) if done else None
                say_progress(f"{done + 1} of {len(plan)}: {label} on {problem}", left)
                found[problem][label] = runs.result(self.methods[label])
                done += 1
            self._say(report, problem, found[problem])
        if not found:
            raise CurvlabError(f"{report.name}: {missing}")
        if len(found) > 1 and self.reported.numbers:
            self._averages(report, found)
        for line in verdicts(self.claims, found):
            report.say(line)
        return found

    def _averages(self, report: ReproductionReport, found: Results) -> None:
        """Say the document's own table, its numbers in brackets."""

        def cell(label: str, problem: str) -> str:
            r, told = found[problem].get(label), self.reported.numbers.get(problem, {}).get(label)
            if r is None:
                return ""
            value = "diverged" if not r.runs else f"{self.reported.best(r):.2f}"
            return value if told is None else f"{value} ({told:.2f})"

        report.table(
            [f"{self.reported.what} (document)", *found],
            ([label, *(cell(label, p) for p in found)] for label in self.methods),
        )
        report.say()

    def _say(self, report: ReproductionReport, problem: str, found: Mapping[str, Result]) -> None:
        """Say the table of one problem."""
        report.say(problem)
        told = self.reported.numbers.get(problem, {})
        columns = ["loss before", "last", "lowest", "test error", "epochs", "s/epoch"]
        columns = [*columns, *(f"epoch {n}" for n in self.told_after)] + ["document"] * bool(told)
        rows = ([label, r.arguments, *self._cells(label, r, told)] for label, r in found.items())
        report.table(
            ["method", "lr, damping" if not self.decayed else "lr, decay, damping", *columns], rows
        )
        for label, r in found.items():
            for failure in r.failures:
                report.say(f"  {label}, {failure}")
        report.say()

    @property
    def decayed(self) -> bool:
        """Whether a method's values include a weight decay on one of the problems."""
        return any(
            len(method.on(p) or ()) == 3 for method in self.methods.values() for p in self.problems
        )

    def _cells(self, label: str, r: Result, told: Mapping[str, float]) -> list[str]:
        unit = " %" * self.reported.accuracies
        document = ([f"{told[label]:g}{unit}"] if label in told else [""]) if told else []
        if not r.runs:
            return ["diverged", *[""] * (5 + len(self.told_after)), *document]
        loss, epochs = r.mean("train_loss"), float(r.along("epoch")[-1])
        each = float(r.along("time")[-1]) / epochs if epochs else 0.0
        error = f"{r.lowest('val_error'):.4f}" if "val_error" in r.together else ""
        return [
            f"{loss[0]:.4g}",
            f"{loss[-1]:.4g}",
            f"{r.lowest('train_loss'):.4g}",
            error,
            f"{epochs:.3g}",
            f"{each:.3g}",
            *(r.told("train_loss", after) for after in self.told_after),
            *document,
        ]


class ProblemRuns:
    """The runs of one problem in one budget, each in a folder of its own."""

    def __init__(self, comparison: Comparison, problem: str, options: Options) -> None:
        self.of, self.name, self.options = comparison, problem, options
        self.problem = problems.find_problem(problem)
        self.extent = {"smoke": Extent(), "cpu": comparison.cpu, "paper": comparison.paper}[
            options.budget
        ]

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

    def result(self, method: Method) -> Result:
        """Train as many seeds as the budget asks for; where one diverges the next is tried."""
        runs: list[xr.Dataset] = []
        failures = []
        for seed in range(self.extent.seeds + (0 if self.options.smoke else FURTHER)):
            run = self.quietly(method, seed)
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
        seconds, epochs = (
            self.extent.seconds_on(self.name),
            self.extent.epochs_on(self.name, method.algorithm),
        )
        if seconds is None and epochs is None:
            epochs = method.epochs
        folder = self.folder(arguments, batch, seed)
        if (folder / "run.h5").exists():
            ds = open_log(folder)
            last = ds.isel(epoch=-1)
            spent = any(
                end is not None and float(last[of]) >= end
                for of, end in (("epoch", epochs), ("wall_seconds", seconds))
            )
            if spent or ds.attrs.get("stopped"):
                return cut(ds, epochs, seconds)
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
