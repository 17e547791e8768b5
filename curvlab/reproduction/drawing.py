"""Training curves as the documents draw them: against epochs and against time.

Their looks are those of `curvlab.show.style`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvlab.reproduction.claims import MEASURES
from curvlab.reproduction.results import AXES, Result, Results
from curvlab.show.axes import plain_numbers
from curvlab.show.style import LineStyle, looks

# times the median run's end, beyond which the longest would squeeze all others on a linear axis of
# time
_APART = 5


def training_curves(
    found: Results, measures: Sequence[str], title: str, spread: str = "std"
) -> Figure:
    """Draw a column for each problem; of one problem a column each for epochs and time.

    Args:
        found: the results of every problem.
        measures: a row of panels each.
        title: above the figure.
        spread: what is shaded: "std", or the mean's error.
    """
    seen_as = looks(
        {label: r.algorithm for results in found.values() for label, r in results.items()}
    )
    if len(found) == 1:
        (problem,) = found
        grid = [[(problem, m, axis) for axis in AXES] for m in measures]
    else:
        grid = [[(problem, m, axis) for problem in found] for m in measures for axis in AXES]
    figure = Figure(figsize=(1.8 + 3.9 * len(grid[0]), 1.0 + 2.8 * len(grid)), layout="constrained")
    axes = figure.subplots(len(grid), len(grid[0]), squeeze=False)
    for i, row in enumerate(grid):
        for j, (problem, measure, axis) in enumerate(row):
            panel(axes[i, j], found[problem], measure, axis, seen_as, spread)
            if i == 0 and len(found) > 1:
                axes[i, j].set_title(problem, fontsize=10)
    handles = dict(
        pair
        for ax in axes.flat
        for pair in zip(*reversed(ax.get_legend_handles_labels()), strict=True)
    )
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9
        )
    width = int(11 * figure.get_figwidth())
    figure.suptitle(
        "\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=10
    )
    return figure


def panel(
    ax: Axes,
    results: dict[str, Result],
    measure: str,
    axis: str,
    seen_as: dict[str, LineStyle],
    spread: str,
) -> None:
    """Draw means over seeds, with a band of their standard deviation or of the mean's error."""
    drawn, ends = [], []
    for label, result in results.items():
        if not result.runs or measure not in result.together:
            continue
        x, y, band = result.along(axis), result.mean(measure), result.spread(measure)
        seeds = len(result.runs)
        band = band if spread == "std" else band / math.sqrt(seeds)
        every = max(1, len(x) // 12)
        own = seen_as[label]
        ax.plot(
            x,
            y,
            label=label,
            linewidth=1.4,
            marker=own.marker,
            markersize=4,
            markevery=every,
            **own.line,
        )
        if seeds > 1:
            ax.fill_between(x, y - band, y + band, color=own.colour, alpha=0.15, linewidth=0)
        drawn.append(y)
        ends.append(float(x[-1]))
    time = (
        "process time (s)"
        if all(r.clock == "cpu_seconds" for r in results.values() if r.runs)
        else "time (s)"
    )
    ax.set_xlabel("epoch" if axis == "epoch" else time)
    if axis == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    elif ends and max(ends) > _APART * float(np.median(ends)):
        ax.set_xscale("log", nonpositive="mask")
        plain_numbers(ax.xaxis, decades=1)
    ax.set_ylabel(MEASURES[measure] + (" (nat)" if measure.endswith("loss") else ""))
    logarithmic(ax, drawn)
    ax.grid(alpha=0.3, which="both", linewidth=0.5)


def logarithmic(ax: Axes, drawn: Iterable[object]) -> None:
    """Make an axis logarithmic where everything is positive.

    It has plain numbers where it spans less than two decades.
    """
    values = np.concatenate([np.asarray(y, dtype=float).ravel() for y in drawn] or [np.ones(1)])
    if not (np.isfinite(values).all() and values.min() > 0):
        return
    ax.set_yscale("log")
    if values.max() < 100 * values.min():
        plain_numbers(ax.yaxis)
        ax.tick_params(axis="y", which="minor", labelsize=7)
