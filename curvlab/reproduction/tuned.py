"""Tuned tables: the documents' searches for hyper-parameters, run at every point of a grid.

A point that a figure has trained already is taken as it is.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xarray as xr

from curvlab.errors import CurvlabError
from curvlab.reproduction.comparison import Comparison
from curvlab.reproduction.landscapes import SIGNS, draw_landscapes, in_brackets
from curvlab.reproduction.methods import Extent, Method
from curvlab.reproduction.problem_runs import ProblemRuns
from curvlab.reproduction.script import ReproductionReport, say_progress
from curvlab.reproduction.search import SearchedGrid, TrainedPoint
from curvlab.reproduction.settings import TUNED
from curvlab.sweeps.documents import DOCUMENT_GRIDS

Spec = int | Sequence[float]
"""How many values of the document's axis, around its choice; or which."""

_SMOKE: Mapping[str, Spec] = {"lr": 2, "damping": 2}
_LEVEL, _NEAR, _FAIR = 0.01, 1.25, 2.0


def neighbouring(values: Sequence[float], value: float, count: int) -> tuple[float, ...]:
    """Return `count` neighbours on an axis, `value` among them, in the middle where it can be.

    Args:
        values: of the axis; a value that is not among them is taken in.
        value: the document's choice.
        count: how many; all where there are no more.
    """
    ordered = sorted({*values, value})
    first = max(0, min(ordered.index(value) - count // 2, len(ordered) - count))
    return tuple(ordered[first : first + count])


def lowest_loss(log: xr.Dataset, epochs: int | None, seconds: float | None) -> tuple[float, str]:
    """Return the lowest training loss at the end of any epoch, and why there is none.

    The document has it so (thesis 2.8.2). A log that goes on for longer than `seconds` is read at
    that time by linear interpolation; one that diverged before its end has none: infinity.

    Args:
        log: of a training run.
        epochs: the run's end; None: no limit.
        seconds: of training, likewise.
    """
    log = log.dropna("epoch", subset=["train_loss"])
    ends = math.inf if epochs is None else epochs, math.inf if seconds is None else seconds
    count, times, losses = (
        np.asarray(log[name], dtype=float) for name in ("epoch", "wall_seconds", "train_loss")
    )
    stopped = str(log.attrs.get("stopped", ""))
    if stopped and count[-1] < ends[0] and times[-1] < ends[1]:
        return math.inf, stopped
    inside = (count > 0) & (count <= ends[0]) & (times <= ends[1])
    found = losses[inside].tolist()
    if times[-1] > ends[1]:
        found.append(float(np.interp(ends[1], times, losses)))
    return min(found, default=float(losses[0])), ""


@dataclass(frozen=True)
class TunedTable:
    """A document's search: the best point of a grid for every method, beside the document's own.

    `of` has the methods at the document's values, and its problems, minibatches and L2; `grid` is a
    name of `DOCUMENT_GRIDS`, of whose axes `as_if` names another algorithm's for a label that has
    none. In the `cpu` budget an axis has the values of `coarse`, of single labels those of
    `coarser`; in `paper` all, and the document's choice where its own range lacks that. `cpu` is
    the extent of a point there, in epochs: of one method they take the same time at every point,
    and no other work on the machine decides which is best; it has the problems `quick` where none
    is named. `robust`: what the document says of the whole landscape.
    """

    shows: str
    claim: str
    of: Comparison
    grid: str
    coarse: Mapping[str, Spec] = field(default_factory=lambda: {"lr": 3, "damping": 3})
    coarser: Mapping[str, Mapping[str, Spec]] = field(default_factory=dict)
    as_if: Mapping[str, str] = field(default_factory=dict)
    cpu: Extent = TUNED
    quick: Sequence[str] = ("MNIST", "CURVES")
    robust: str = ""

    @property
    def methods(self) -> Mapping[str, Method]:
        """The methods by their labels."""
        return self.of.methods

    @property
    def problems(self) -> Sequence[str]:
        """The document's problems."""
        return self.of.problems

    @cached_property
    def comparison(self) -> Comparison:
        """What the runs are of: one seed a point."""
        return replace(self.of, cpu=self.cpu, paper=replace(self.of.paper, seeds=1))

    @property
    def extents(self) -> dict[str, str]:
        """Lengths of the budgets in words, ``{budget: words}``."""
        words = {"smoke": "two by two points of one problem; two steps of narrow networks on random"
                 " numbers, which say nothing"}  # fmt: skip
        extents: dict[str, Extent] = {"cpu": self.comparison.cpu, "paper": self.comparison.paper}
        for budget, extent in extents.items():
            problems = self.chosen(budget)
            counts = {self.count(problem, budget) for problem in problems}
            points = " or ".join(f"{n:,}" for n in sorted(counts))
            words[budget] = f"{', '.join(problems)}: {points} points each, {extent.on(problems)}"
        return words

    def chosen(self, budget: str, named: Sequence[str] = ()) -> list[str]:
        """Return the problems of a budget: those named, else its own."""
        own = {"cpu": self.quick, "smoke": self.problems[:1]}.get(budget, self.problems)
        found = [problem for problem in self.problems if problem in (named or own)]
        return found or list(self.problems)

    def count(self, problem: str, budget: str) -> int:
        """Return how many points a problem has in a budget."""
        return sum(len(self.places(label, problem, budget)) for label in self.methods)

    # ---- the grid

    def choice(self, label: str, problem: str) -> dict[str, float]:
        """Return the document's choice for a method on a problem, {axis: value}."""
        method = self.methods[label]
        lr, *_, damping = method.on(problem) or (math.nan, math.nan)
        told = {"lr": lr, "damping": damping, **method.options, **method.further.get(problem, {})}
        return {axis: float(told[axis]) for axis in self._stated(label)}

    def places(self, label: str, problem: str, budget: str) -> list[dict[str, float]]:
        """Return the places of a budget's grid, {axis: value} each; none where none is published.

        Args:
            label: of a method.
            problem: of the document.
            budget: smoke, cpu or paper.
        """
        if self.methods[label].on(problem) is None:
            return []
        choice, stated = self.choice(label, problem), self._stated(label)
        axes: dict[str, Sequence[float]] = dict(stated)
        if budget != "paper":
            specs = {**self.coarse, **self.coarser.get(label, {})}
            specs = {**dict.fromkeys(stated, 1), **(_SMOKE if budget == "smoke" else specs)}
            for axis, values in stated.items():
                spec = specs[axis]
                axes[axis] = (
                    neighbouring(values, choice[axis], spec) if isinstance(spec, int) else spec
                )
        found = [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]
        return found if choice in found else [*found, choice]

    def _stated(self, label: str) -> Mapping[str, Sequence[float]]:
        algorithm = self.as_if.get(label, self.methods[label].algorithm)
        return {
            axis.name: [float(v) for v in axis.values]
            for axis in DOCUMENT_GRIDS[self.grid].of(algorithm)
        }

    def method_at(self, label: str, problem: str, place: Mapping[str, float]) -> Method:
        """Return a method at a place of its grid."""
        method = self.methods[label]
        further = {axis: v for axis, v in place.items() if axis not in ("lr", "damping")}
        return replace(
            method,
            values=(place["lr"], place.get("damping", 0.0)),
            further={problem: {**method.further.get(problem, {}), **further}},
        )

    # ---- it runs

    def run(self, report: ReproductionReport) -> None:
        """Train the points that are not there yet, say the table, and draw the landscapes."""
        found = self.results(report)
        budget = report.options.budget
        report.draw(draw_landscapes(found, f"{self.shows}\n{budget}: {self.extents[budget]}"))

    def results(self, report: ReproductionReport) -> dict[str, dict[str, SearchedGrid]]:
        """Train the points that are not there yet and say the table; {problem: {label: grid}}."""
        options = report.options
        chosen = self.chosen(options.budget, options.problems)
        labels = [label for label in self.methods if label in (options.methods or self.methods)]
        places = {
            (problem, label): self.places(label, problem, options.budget)
            for problem in chosen
            for label in labels
        }
        total, done, started = sum(map(len, places.values())), 0, time.monotonic()
        found: dict[str, dict[str, SearchedGrid]] = {}
        missing = ""
        for problem in chosen:
            runs = ProblemRuns(self.comparison, problem, options)
            try:
                _ = runs.data
            except CurvlabError as error:
                missing = str(error)
                report.say(f"{problem}: not run: {missing}")
                total -= sum(len(places[problem, label]) for label in labels)
                continue
            found[problem] = {}
            for label in labels:
                points = []
                for place in places[problem, label]:
                    left = (time.monotonic() - started) / done * (total - done) if done else None
                    say_progress(
                        f"{done + 1} of {total}: {label} on {problem} at {in_brackets(place)}", left
                    )
                    points.append(self._point(runs, label, place))
                    done += 1
                if points:
                    choice = self.choice(label, problem)
                    found[problem][label] = SearchedGrid(tuple(points), choice)
            self._say(report, problem, found[problem])
        if not found:
            raise CurvlabError(f"{report.name}: {missing}")
        for line in self._verdicts(found):
            report.say(line)
        return found

    def _point(self, runs: ProblemRuns, label: str, place: Mapping[str, float]) -> TrainedPoint:
        try:
            log = runs.quietly(self.method_at(label, runs.name, place), 0)
        except CurvlabError as error:
            if place == self.choice(label, runs.name):  # what the document ran must run
                raise
            return TrainedPoint(place, reason=str(error), refused=True)
        algorithm, extent = self.methods[label].algorithm, runs.extent
        ends = extent.epochs_on(runs.name, algorithm), extent.seconds_on(runs.name)
        return TrainedPoint(place, *lowest_loss(log, *ends))

    # ---- what is said

    def _say(
        self, report: ReproductionReport, problem: str, found: Mapping[str, SearchedGrid]
    ) -> None:
        """Say the table of one problem."""
        axes = list(dict.fromkeys(axis for grid in found.values() for axis in grid.choice))
        report.say(problem)
        signs = ", ".join(SIGNS.get(axis, axis) for axis in axes)
        report.table(
            ["method", f"best ({signs})", "its loss", "document's choice", "its loss", "its place",
             "points", f"within {_NEAR - 1:.0%}", "diverged"],
            ([label, *self._cells(grid, axes)] for label, grid in found.items()),
        )  # fmt: skip
        for label, grid in found.items():
            for refused, what in ((False, "diverged at"), (True, "does not take")):
                lost = [p for p in grid.points if p.reason and p.refused is refused]
                if lost:
                    where = ", ".join(in_brackets(point.place, axes) for point in lost)
                    report.say(f"  {label} {what} {where}; the first: {lost[0].reason}")
        report.say()

    @staticmethod
    def _cells(grid: SearchedGrid, axes: Sequence[str]) -> list[str]:
        best, there = grid.best, grid.at(grid.choice)
        return [
            in_brackets(best.place, axes) if best else "all diverged",
            f"{best.lowest:.4g}" if best else "",
            in_brackets(grid.choice, axes),
            "diverged" if there.reason else f"{there.lowest:.4g}",
            grid.standing,
            f"{len(grid.points)}",
            f"{grid.within(_NEAR)}",
            f"{sum(bool(point.reason) and not point.refused for point in grid.points)}",
        ]

    def _verdicts(self, found: Mapping[str, Mapping[str, SearchedGrid]]) -> Iterator[str]:
        """Yield what becomes of the document's choices, and of its word on the landscape."""
        yield (
            "claim: the document's choice is the best of the grid (here: or beside the best, or"
            f" within {_LEVEL:.0%} of its loss)"
        )
        for problem, grids in found.items():
            good = [k for k, grid in grids.items() if grid.steps in (0, 1) or grid.excess <= _LEVEL]
            others = [
                f"{label} {grid.standing}" for label, grid in grids.items() if label not in good
            ]
            said = "holds" if not others else f"holds for {len(good)} of {len(grids)}"
            yield f"  {problem}: {said}" + (f"; {', '.join(others)}" if others else "")
        if self.robust:
            yield (
                f"claim: {self.robust} (here: half of the points or more end within"
                f" {_FAIR:g} times the lowest loss)"
            )
            for problem, grids in found.items():
                wide = {k: (grid.within(_FAIR), len(grid.points)) for k, grid in grids.items()}
                said = "holds" if all(2 * n >= of for n, of in wide.values()) else "does not hold"
                numbers = ", ".join(f"{k} {n} of {of}" for k, (n, of) in wide.items())
                yield f"  {problem}: {said}: {numbers}"
