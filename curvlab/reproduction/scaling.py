"""Scaling: time and memory of one layer beyond SGD's, against the formulas of a document's table of complexity.

One layer on random numbers. Every axis varies one size and keeps the others. A formula's exponent is fitted to the formula's own
values at the sizes that were measured: sums of terms have no other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from curvlab.algorithms import optimizer
from curvlab.likelihoods import Gaussian
from curvlab.objective import Objective
from curvlab.reproduction.drawing import styles
from curvlab.reproduction.script import Options, Report
from curvlab.runs import clock_of

Formula = Callable[[SimpleNamespace], float]
"""Of the sizes, by their names."""


@dataclass(frozen=True)
class Row:
    """A line of the table: an algorithm, its formulas, its options at these sizes, and over how many steps its work comes round."""

    algorithm: str
    time: Formula
    memory: Formula
    options: Callable[[SimpleNamespace], Mapping[str, Any]] = lambda s: {}
    period: Callable[[SimpleNamespace], int] = lambda s: 1
    filled: Callable[[SimpleNamespace], int] = lambda s: 0


@dataclass(frozen=True)
class Axis:
    """The size `name`, from small to large; `sets` are the names that move with it."""

    name: str
    sizes: Sequence[int]
    sets: Sequence[str] = ()
    label: str = ""

    def at(self, base: Mapping[str, int], size: int) -> SimpleNamespace:
        return SimpleNamespace(**{**base, **dict.fromkeys(self.sets or (self.name,), size)})

    def until(self, budget: str) -> list[int]:
        """All sizes but the largest; `paper`: all; `smoke`: the first two."""
        return list(self.sizes[:2] if budget == "smoke" else self.sizes if budget == "paper" else self.sizes[:-1])


@dataclass(frozen=True)
class Measured:
    seconds: list[float]
    numbers: list[float]
    time: list[float]
    memory: list[float]


@dataclass(frozen=True)
class Scaling:
    """A table of complexity. `layer(sizes)` gives the layer and the shape of one input; `base` the sizes that an axis keeps."""

    shows: str
    claim: str
    layer: Callable[[SimpleNamespace], tuple[nn.Module, tuple[int, ...]]]
    base: Mapping[str, int]
    axes: Sequence[Axis]
    rows: Mapping[str, Row]
    repeats: int = 5
    extents: Mapping[str, str] = field(
        default_factory=lambda: {"smoke": "the two smallest sizes, once, which say nothing", "cpu": "all sizes but the largest", "paper": "all sizes"}
    )

    def run(self, report: Report) -> None:
        smoke = report.options.smoke
        base = {**self.base, **({name: axis.sizes[0] for axis in self.axes for name in axis.sets or (axis.name,)} if smoke else {})}
        found = {axis.name: self._axis(axis, base, report.options) for axis in self.axes}
        report.say("the axes keep " + ", ".join(f"{name} = {size}" for name, size in base.items()))
        report.say("fitted exponents, measured (of the formula), over the three largest sizes")
        for what, values, formula in (("time beyond SGD-m's", "seconds", "time"), ("numbers held between steps", "numbers", "memory")):
            report.say()
            columns = [axis.label or axis.name for axis in self.axes]
            rows = ([label, *(self._exponents(axis, found, label, values, formula, report.options) for axis in self.axes)] for label in self.rows)
            report.table([what, *columns], rows)
        report.draw(self._figure(found, report.options))

    def _axis(self, axis: Axis, base: Mapping[str, int], options: Options) -> dict[str, Measured]:
        found = {label: Measured([], [], [], []) for label in self.rows}
        for size in axis.until(options.budget):
            sizes = axis.at(base, size)
            plain, _ = self._step(Row("sgd-m", lambda s: 0, lambda s: 0), sizes, options)
            for label, row in self.rows.items():
                seconds, numbers = self._step(row, sizes, options)
                into = found[label]
                into.seconds.append(max(seconds - plain, math.nan if seconds <= plain else 0.0))
                into.numbers.append(numbers)
                into.time.append(row.time(sizes))
                into.memory.append(row.memory(sizes))
        return found

    def _step(self, row: Row, sizes: SimpleNamespace, options: Options) -> tuple[float, float]:
        """Least mean seconds of a step over `period` steps, and numbers that the curvature holds."""
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

    def _exponents(self, axis: Axis, found: Mapping[str, dict[str, Measured]], label: str, values: str, formula: str, options: Options) -> str:
        sizes, measured = axis.until(options.budget), found[axis.name][label]
        return f"{exponent(sizes, getattr(measured, values)):.2f} ({exponent(sizes, getattr(measured, formula)):.2f})"

    def _figure(self, found: Mapping[str, dict[str, Measured]], options: Options) -> Figure:
        """Time above, memory below; dashed the formulas, through the largest size."""
        figure = Figure(figsize=(1.6 + 2.9 * len(self.axes), 6.2), layout="constrained")
        panels = figure.subplots(2, len(self.axes), sharey="row", squeeze=False)
        looks = styles({label: row.algorithm for label, row in self.rows.items()})
        for j, axis in enumerate(self.axes):
            sizes = axis.until(options.budget)
            for label, measured in found[axis.name].items():
                for ax, values, formula in ((panels[0, j], measured.seconds, measured.time), (panels[1, j], measured.numbers, measured.memory)):
                    _line(ax, sizes, values, formula, label, looks[label])
            panels[1, j].set_xlabel(axis.label or axis.name)
        panels[0, 0].set_ylabel("seconds a step beyond SGD-m")
        panels[1, 0].set_ylabel("numbers held")
        handles = dict(pair for ax in panels.flat for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
        figure.suptitle(f"{self.shows}; dotted: the formula", fontsize=10)
        return figure


def _line(ax: Axes, sizes: Sequence[int], values: Sequence[float], formula: Sequence[float], label: str, look: dict[str, object]) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    if not any(v > 0 for v in values):
        return
    ax.plot(sizes, values, label=label, linewidth=1.3, markersize=4, **look)  # type: ignore[arg-type]  # styles are dictionaries
    last = max((i for i, v in enumerate(values) if v > 0), default=0)
    if formula[last] > 0:
        ax.plot(sizes, np.array(formula) * values[last] / formula[last], color=str(look["color"]), linestyle=":", linewidth=0.9)


def exponent(sizes: Sequence[float], values: Sequence[float], last: int = 3) -> float:
    """Slope of log(value) over log(size) through the `last` largest sizes; NaN where fewer than two values are positive."""
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0][-last:]
    if len(pairs) < 2:
        return math.nan
    x, y = np.log(np.array(pairs, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def tensors(state: object) -> Iterator[Tensor]:
    """All tensors of a state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)
