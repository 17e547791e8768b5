"""Scaling: time and memory of one layer beyond SGD's, against a document's table of complexity.

One layer on random numbers. Every axis varies one size and keeps the others. A formula's exponent
is fitted to the formula's own values at the sizes that were measured: sums of terms have no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from curvlab.algorithms import optimizer
from curvlab.likelihoods import Gaussian
from curvlab.machine import clock_of
from curvlab.objective import Objective
from curvlab.reproduction.script import Options, ReproductionReport, say_progress
from curvlab.show.style import LineStyle, looks
from curvlab.system.memory import tensors

Formula = Callable[[SimpleNamespace], float]
"""A number of time or memory as a function of the sizes, by their names."""


@dataclass(frozen=True)
class Row:
    """A line of the table: an algorithm and its formulas.

    At given sizes: its `options`; the `period` of steps after which its work comes round; steps
    until its memory is `filled`.
    """

    algorithm: str
    time: Formula
    memory: Formula
    options: Callable[[SimpleNamespace], Mapping[str, Any]] = lambda s: {}
    period: Callable[[SimpleNamespace], int] = lambda s: 1
    filled: Callable[[SimpleNamespace], int] = lambda s: 0


PLAIN = Row("sgd-m", lambda s: 0, lambda s: 0)


@dataclass(frozen=True)
class Axis:
    """A size, from small to large.

    `sets` are the names that move with it, where it is not itself one.
    """

    name: str
    sizes: Sequence[int]
    sets: Sequence[str] = ()

    @property
    def moved(self) -> Sequence[str]:
        """Names of the sizes that change along the axis."""
        return self.sets or (self.name,)

    @property
    def heading(self) -> str:
        """The names that move, with equals signs between."""
        return " = ".join(self.moved)

    def at(self, base: Mapping[str, int], size: int) -> SimpleNamespace:
        """Return all sizes by name: those of `base`, with the moved ones at `size`."""
        return SimpleNamespace(**{**base, **dict.fromkeys(self.moved, size)})

    def until(self, budget: str) -> list[int]:
        """Return all sizes but the largest; for the budget `paper` all, for `smoke` two."""
        return list(
            self.sizes[:2]
            if budget == "smoke"
            else self.sizes
            if budget == "paper"
            else self.sizes[:-1]
        )


QUANTITIES = {"time": "seconds a step beyond SGD-m", "memory": "numbers held between steps"}


@dataclass(frozen=True)
class Curve:
    """Measured values of a quantity at the sizes of an axis, and the formula's."""

    values: list[float] = field(default_factory=list)
    formula: list[float] = field(default_factory=list)

    def exponents(self, sizes: Sequence[int]) -> str:
        """Return the fitted exponent of the values and, in brackets, that of the formula."""
        # no −0.00
        measured, told = (round(exponent(sizes, v), 2) + 0.0 for v in (self.values, self.formula))
        return f"{measured:.2f} ({told:.2f})"


Curves = dict[tuple[str, str, str], Curve]
"""{(axis, label, quantity): curve}"""


@dataclass(frozen=True)
class Scaling:
    """A table of complexity.

    `layer(sizes)` gives the layer and the shape of one input; `base` the sizes that an axis keeps;
    `quantities` are what the table is of.
    """

    shows: str
    claim: str
    layer: Callable[[SimpleNamespace], tuple[nn.Module, tuple[int, ...]]]
    base: Mapping[str, int]
    axes: Sequence[Axis]
    rows: Mapping[str, Row]
    quantities: Sequence[str] = tuple(QUANTITIES)
    repeats: int = 5
    extents: Mapping[str, str] = field(
        default_factory=lambda: {
            "smoke": "the two smallest sizes, once, which say nothing",
            "cpu": "all sizes but the largest",
            "paper": "all sizes",
        }
    )

    @property
    def methods(self) -> Sequence[str]:
        """Labels of the rows, of which a user may choose."""
        return list(self.rows)

    @property
    def problems(self) -> Sequence[str]:
        """The problems to choose from, of which there are none, as the data are random numbers."""
        return ()

    def run(self, report: ReproductionReport) -> None:
        """Measure the rows that the user chose, or all where none was chosen."""
        chosen = {label: row for label, row in self.rows.items() if label in report.options.methods}
        (replace(self, rows=chosen) if chosen else self).measure(report)

    def measure(self, report: ReproductionReport) -> None:
        """Measure all rows, say the fitted exponents, and draw the curves."""
        options = report.options
        base = dict(self.base)
        if options.smoke:
            base |= {name: axis.sizes[0] for axis in self.axes for name in axis.moved}
        found: Curves = {}
        for number, axis in enumerate(self.axes, 1):
            say_progress(
                f"{number} of {len(self.axes)}: {axis.heading} ="
                f" {', '.join(map(str, axis.until(options.budget)))}"
            )
            self._measure(axis, base, options, found)
        report.say("fitted exponents, measured (of the formula), over the three largest sizes")
        report.say("the axes keep " + ", ".join(f"{name} = {size}" for name, size in base.items()))
        for what in self.quantities:
            report.say()
            rows = (
                [
                    label,
                    *(
                        found[axis.name, label, what].exponents(axis.until(options.budget))
                        for axis in self.axes
                    ),
                ]
                for label in self.rows
            )
            report.table([QUANTITIES[what], *(axis.heading for axis in self.axes)], rows)
        report.draw(self._figure(found, options))

    def _measure(self, axis: Axis, base: Mapping[str, int], options: Options, into: Curves) -> None:
        for size in axis.until(options.budget):
            sizes = axis.at(base, size)
            plain, _ = self._step(PLAIN, sizes, options)
            for label, row in self.rows.items():
                seconds, numbers = self._step(row, sizes, options)
                beyond = seconds - plain if seconds > plain else math.nan
                for what, value, formula in (
                    ("time", beyond, row.time),
                    ("memory", numbers, row.memory),
                ):
                    curve = into.setdefault((axis.name, label, what), Curve())
                    curve.values.append(value)
                    curve.formula.append(formula(sizes))

    def _step(self, row: Row, sizes: SimpleNamespace, options: Options) -> tuple[float, float]:
        """Return the least mean seconds of a step, and the numbers that the curvature holds.

        The mean is over `period` steps.
        """
        device = options.where
        clock = time.process_time if device.type == "cpu" else clock_of(device)
        chance = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layer, shape = self.layer(sizes)
        objective = Objective(layer.to(device), Gaussian())
        x = torch.randn(sizes.m, *shape, generator=chance).to(device)
        with torch.no_grad():
            y = torch.randn(layer(x).shape, generator=chance).to(device)
        stepper = optimizer(row.algorithm, objective, 1e-6, **row.options(sizes))
        period = row.period(sizes)
        for _ in range(max(2, period, row.filled(sizes))):
            stepper.step(objective.closure(x, y))
        least = math.inf
        for _ in range(1 if options.smoke else self.repeats):
            start = clock()
            for _ in range(period):
                stepper.step(objective.closure(x, y))
            least = min(least, (clock() - start) / period)
        return least, float(sum(t.numel() for t in tensors(stepper.descent.curvature.state_dict())))

    def _figure(self, found: Curves, options: Options) -> Figure:
        """Draw a row for each quantity; dotted the formulas, through the largest size."""
        figure = Figure(
            figsize=(1.8 + 2.9 * len(self.axes), 0.8 + 2.8 * len(self.quantities)),
            layout="constrained",
        )
        panels = figure.subplots(len(self.quantities), len(self.axes), sharey="row", squeeze=False)
        seen_as = looks({label: row.algorithm for label, row in self.rows.items()})
        for (i, what), (j, axis) in product(enumerate(self.quantities), enumerate(self.axes)):
            for label in self.rows:
                _line(
                    panels[i, j],
                    axis.until(options.budget),
                    found[axis.name, label, what],
                    label,
                    seen_as[label],
                )
            panels[i, 0].set_ylabel(QUANTITIES[what])
            panels[-1, j].set_xlabel(axis.heading)
        handles = dict(
            pair
            for ax in panels.flat
            for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True)
        )
        figure.legend(
            handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9
        )
        figure.suptitle(f"{self.shows}; {options.budget}; dotted: the formulas", fontsize=10)
        return figure


def _line(ax: Axes, sizes: Sequence[int], curve: Curve, label: str, of: LineStyle) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    seen = [i for i, value in enumerate(curve.values) if value > 0]
    if not seen:
        return
    ax.plot(
        sizes, curve.values, label=label, linewidth=1.3, marker=of.marker, markersize=4, **of.line
    )
    last = seen[-1]
    if curve.formula[last] > 0:
        through = np.array(curve.formula) * (curve.values[last] / curve.formula[last])
        ax.plot(sizes, through, color=of.colour, linestyle=":", linewidth=0.9)


def exponent(sizes: Sequence[float], values: Sequence[float], last: int = 3) -> float:
    """Return the slope of log(value) over log(size) through the `last` largest sizes.

    NaN where fewer than two values are positive.
    """
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0][-last:]
    if len(pairs) < 2:
        return math.nan
    x, y = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])
