"""Landscapes of searched grids: a tile for each point, coloured by the loss."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from curvlab.reproduction.search import SearchedGrid
from curvlab.show.axes import plain_numbers
from curvlab.show.style import shading
from curvlab.show.sweep_figure import STAR, score_scale

SIGNS = {"momentum": "μ", "decay": "β"}
"""What an axis is called in few letters."""

_CHOICE = "#D55E00"
_ACROSS, _MOST_NUMBERS = 4, 6


def in_brackets(place: Mapping[str, float], axes: Iterable[str] = ()) -> str:
    """Return a place as the documents write it, "(0.3, 0.03)"; a dash where it has no such axis."""
    names = list(axes) or list(place)
    return f"({', '.join(f'{place[name]:g}' if name in place else '-' for name in names)})"


def draw_landscapes(found: Mapping[str, Mapping[str, SearchedGrid]], title: str) -> Figure:
    """Draw rows of panels for each problem, a panel for each method.

    Learning rates go to the right, dampings upwards, further axes being at their best; where the
    damping is one, the further axes go upwards. A star is at the lowest loss, a frame around the
    document's choice, hatches where a point diverged; a place that a method does not take is empty.

    Args:
        found: {problem: {label: grid}}.
        title: above the figure.
    """
    most = max(len(grids) for grids in found.values())
    down = math.ceil(most / _ACROSS)
    across = math.ceil(most / down)
    figure = Figure(
        figsize=(1.6 + 2.7 * across, 1.3 + (2.3 * down + 0.3) * len(found)), layout="constrained"
    )
    parts = figure.subfigures(len(found), 1, squeeze=False)
    for part, (problem, grids) in zip(parts.flat, found.items(), strict=True):
        panels = part.subplots(down, across, squeeze=False)
        losses = np.array([p.lowest for grid in grids.values() for p in grid.points])
        norm, shades = score_scale(losses[np.isfinite(losses)]), shading()
        for ax, (label, grid) in zip(panels.flat, grids.items(), strict=False):
            _panel(ax, grid, norm, shades)
            ax.set_title(label, fontsize=9)
        for ax in panels.flat[len(grids) :]:
            ax.set_visible(False)
        for ax in list(panels.flat)[max(0, len(grids) - across) : len(grids)]:
            ax.set_xlabel("learning rate", fontsize=8)
        bar = part.colorbar(ScalarMappable(norm, shades), ax=panels, shrink=0.9)
        bar.set_label("lowest training loss (nat)", fontsize=8)
        if isinstance(norm, LogNorm):
            plain_numbers(bar.ax.yaxis)
        bar.ax.tick_params(which="both", labelsize=7)
        part.suptitle(problem, fontsize=10)
    figure.legend(
        *zip(*_LEGEND, strict=True), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    width = int(13 * figure.get_figwidth())
    figure.suptitle(
        "\n".join(textwrap.fill(line, width) for line in title.splitlines()), fontsize=9
    )
    return figure


_LEGEND: list[tuple[Any, str]] = [
    (Line2D([], [], linestyle="", marker="*", **STAR), "lowest loss"),
    (Patch(fill=False, edgecolor=_CHOICE, linewidth=2), "the document's choice"),
    (Patch(facecolor="white", edgecolor="0.5", hatch="////"), "diverged"),
]


def _upwards(grid: SearchedGrid) -> list[str]:
    """Return the axes that go upwards: the damping, or where that is one, all that vary."""
    if "damping" in grid.choice and len(grid.values("damping")) > 1:
        return ["damping"]
    return [a for a in grid.choice if a not in ("lr", "damping") and len(grid.values(a)) > 1]


def _tiles(
    grid: SearchedGrid,
) -> tuple[list[str], list[tuple[float, ...]], NDArray[np.float64]]:
    """Return the axes upwards, their rows, and the lowest loss of each [row, learning rate].

    Infinite where all points there have diverged; NaN where there is none that the method takes.
    """
    names = _upwards(grid)
    rows = sorted({tuple(point.place[a] for a in names) for point in grid.points})
    rates = grid.values("lr")
    tiles = np.full((len(rows), len(rates)), np.nan)
    for point in grid.points:
        if point.refused:
            continue
        at = rows.index(tuple(point.place[a] for a in names)), rates.index(point.place["lr"])
        tiles[at] = np.fmin(tiles[at], point.lowest)
    return names, rows, tiles


def _panel(ax: Axes, grid: SearchedGrid, norm: Normalize, shades: Colormap) -> None:
    """Draw the tiles of one method, as wide as each other: the grids are even in logarithms."""
    names, rows, tiles = _tiles(grid)
    rates = grid.values("lr")
    ax.pcolormesh(
        np.ma.masked_invalid(tiles), norm=norm, cmap=shades, edgecolors="white", linewidth=0.8
    )
    few = len(rates) <= _MOST_NUMBERS
    for i, j in itertools.product(range(len(rows)), range(len(rates))):
        if np.isinf(tiles[i, j]):
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor="white", edgecolor="0.5", hatch="////"))
        elif few and np.isfinite(tiles[i, j]):
            dark = np.dot(shades(norm(tiles[i, j]))[:3], (0.2126, 0.7152, 0.0722)) < 0.5
            ax.text(
                j + 0.5, i + 0.42, f"{tiles[i, j]:.3g}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black",
            )  # fmt: skip

    def corner(place: Mapping[str, float]) -> tuple[int, int]:
        return rates.index(place["lr"]), rows.index(tuple(place[a] for a in names))

    ax.add_patch(
        Rectangle(corner(grid.choice), 1, 1, fill=False, edgecolor=_CHOICE, linewidth=2, zorder=3)
    )
    if grid.best is not None:
        x, y = corner(grid.best.place)
        ax.plot(x + 0.5, y + 0.8 if few else y + 0.5, "*", zorder=4, **{**STAR, "markersize": 9})
    ax.set(xlim=(0, len(rates)), ylim=(0, len(rows)))
    _ticks(ax, rates, rows, names)


def _ticks(
    ax: Axes, rates: Sequence[float], rows: Sequence[tuple[float, ...]], names: Sequence[str]
) -> None:
    every = math.ceil(len(rates) / 5)
    ax.set_xticks(
        [i + 0.5 for i in range(0, len(rates), every)],
        [f"{rate:g}" for rate in rates[::every]],
        fontsize=7,
    )
    if not names:
        ax.set_yticks([])
        return
    ax.set_yticks(
        [i + 0.5 for i in range(len(rows))],
        [", ".join(f"{value:g}" for value in row) for row in rows],
        fontsize=7,
    )
    ax.set_ylabel(", ".join(SIGNS.get(name, name) for name in names), fontsize=8)
