"""Comparison: every method on every problem at the document's values.

A run is trained once for all figures that share it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from curvlab.errors import CurvlabError
from curvlab.reproduction.claims import Claim, Reported, verdicts
from curvlab.reproduction.drawing import training_curves
from curvlab.reproduction.methods import Extent, Method
from curvlab.reproduction.problem_runs import ProblemRuns
from curvlab.reproduction.results import Result, Results
from curvlab.reproduction.script import ReproductionReport, say_progress

SMOKE = "two steps of narrow networks on random numbers, which say nothing"


@dataclass(frozen=True)
class Comparison:
    """A figure of training curves.

    `measures` are variables of a training log, a row of panels each; `spread` says what is shaded;
    `reported` are the document's numbers. `l2` is μ of μ ‖θ‖², in the gradients and not in the loss
    that is drawn.
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

    @property
    def extents(self) -> dict[str, str]:
        """Lengths of the budgets in words, ``{budget: words}``."""
        return {
            "smoke": SMOKE,
            "cpu": self.cpu.on(self.problems),
            "paper": self.paper.on(self.problems),
        }

    def extent(self, budget: str) -> Extent:
        """Return the extent of a budget; that of `smoke` has no ends."""
        return {"cpu": self.cpu, "paper": self.paper}.get(budget, Extent())

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
        after = self.extent(report.options.budget).told_after
        columns = [*columns, *(f"epoch {n}" for n in after)] + ["document"] * bool(told)
        rows = (
            [label, r.arguments, *self._cells(label, r, after, told)] for label, r in found.items()
        )
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

    def _cells(
        self, label: str, r: Result, after: Sequence[int], told: Mapping[str, float]
    ) -> list[str]:
        unit = " %" * self.reported.accuracies
        document = ([f"{told[label]:g}{unit}"] if label in told else [""]) if told else []
        if not r.runs:
            return ["diverged", *[""] * (5 + len(after)), *document]
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
            *(r.told("train_loss", epoch) for epoch in after),
            *document,
        ]
