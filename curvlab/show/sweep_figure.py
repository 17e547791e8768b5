"""The landscape of a sweep: the score over learning rate and damping, as thesis Figure 2.3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from curvlab.logs import swept
from curvlab.show.axes import plain_numbers
from curvlab.show.captions import MOST_PANELS, legend_below, model_on_data
from curvlab.show.drawable import heading
from curvlab.show.style import looks, shading

_NAMES = {"lr": "learning rate", "damping": "damping"}
_LEVELS = 12
STAR: Mapping[str, Any] = {
    "markersize": 13,
    "markerfacecolor": "#E69F00",
    "markeredgecolor": "black",
}
"""How the best place of a landscape is drawn."""


def landscape(ds: xr.Dataset) -> Figure:
    """Draw the score of every algorithm over learning rate and damping (thesis Figure 2.3).

    Contours lie between the points of the grid (dots); the best is a star, what has no score a
    cross. Further axes of the grid are at their best, seeds are a mean. Where one axis alone varies
    the score is drawn as lines against it.
    """
    mean = swept.mean_score(ds)
    further = [d for d in swept.axes(ds) if d not in ("lr", "damping")]
    varying = [d for d in ("lr", "damping", *further) if ds.sizes[d] > 1]
    if {"lr", "damping"} <= set(varying):
        flat = [name for name in ds["algorithm"].values if _spans(mean, name)]
        if flat:
            return _contours(ds, _at_best(ds, mean, further), flat[:MOST_PANELS])
    against = next(iter(varying), "algorithm")
    others = [d for d in swept.axes(ds) if d != against]
    return _lines(ds, _at_best(ds, mean, others), against)


def _spans(mean: xr.DataArray, name: str) -> bool:
    """Return whether an algorithm has places that differ in both."""
    of = mean.sel(algorithm=name).notnull()
    around = [d for d in of.dims if d not in ("lr", "damping")]
    there = of.any(around) if around else of
    return all(int(there.any(d).sum()) > 1 for d in ("lr", "damping"))


def _at_best(ds: xr.Dataset, mean: xr.DataArray, axes: list[str]) -> xr.DataArray:
    if not axes:
        return mean
    return mean.max(axes) if swept.most_is_best(ds) else mean.min(axes)


def _what(ds: xr.Dataset) -> str:
    unit = str(ds["score"].attrs.get("units", "1"))
    said = str(ds["score"].attrs.get("long_name", "score"))
    return f"{said}{'' if unit == '1' else f' ({unit})'}"


def _title(ds: xr.Dataset, drawn: int) -> list[str]:
    seeds = ds.sizes.get("seed", 1)
    more = f", mean of {seeds} seeds" if seeds > 1 else ""
    there = ds.sizes["algorithm"]
    some = f", {drawn} of {there} algorithms" if drawn < there else ""
    return [f"Landscape of {model_on_data(ds)}{more}{some}", _what(ds)]


def _contours(ds: xr.Dataset, score: xr.DataArray, names: list[str]) -> Figure:
    across = min(3, len(names))
    down = math.ceil(len(names) / across)
    figure = Figure(figsize=(3.4 * across + 1.3, 3.0 * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    known = score.values[np.isfinite(score.values)]
    norm = score_scale(known, swept.most_is_best(ds))
    shades = shading(swept.most_is_best(ds))
    best = {b.algorithm: b for b in swept.best_places(ds)}
    for ax, name in zip(panels.flat, names, strict=False):
        of = score.sel(algorithm=name)
        there = _there(ds, name)
        at = of.isel(
            lr=np.flatnonzero(there.any("damping")), damping=np.flatnonzero(there.any("lr"))
        )
        _panel(ax, at.transpose("damping", "lr"), norm, shades)
        if name in best:
            place = best[name].place
            ax.plot(place["lr"], place["damping"], "*", zorder=4, **STAR)
        ax.set_title(f"{name}: {best[name].score:.4g}" if name in best else name, fontsize=10)
    for ax in panels.flat[len(names) :]:
        ax.set_visible(False)
    for ax in panels[-1]:
        ax.set_xlabel(_NAMES["lr"])
    for row in panels:
        row[0].set_ylabel(_NAMES["damping"])
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=panels, shrink=0.8)
    if isinstance(norm, LogNorm):
        plain_numbers(bar.ax.yaxis)
    heading(figure, *_title(ds, len(names)))
    return figure


def _there(ds: xr.Dataset, name: str) -> xr.DataArray:
    """Return which places of (lr, damping) the sweep has of an algorithm."""
    state = ds["state"]
    of = state.sel(algorithm=name) if "algorithm" in state.dims else state
    around = [d for d in of.dims if d not in ("lr", "damping")]
    return of.notnull().any(around) if around else of.notnull()


def score_scale(known: NDArray[Any], most: bool = False) -> Normalize:
    """Return the scale of colours: of losses logarithmic, cut where they are far from the best.

    Args:
        known: the scores, all finite.
        most: whether the best is the largest.
    """
    if not known.size:
        return Normalize(0, 1)
    low, high = float(known.min()), float(known.max())
    if most or low <= 0:
        return Normalize(low, high if high > low else low + 1)
    # of a loss that has grown it matters that it has, not how far
    high = min(high, max(100 * low, float(np.quantile(known, 0.75))))
    return LogNorm(low, high if high > low else 2 * low)


def _panel(ax: Axes, at: xr.DataArray, norm: Normalize, shades: Colormap) -> None:
    """Draw one algorithm's contours over its own grid."""
    x, y, z = at["lr"].values, at["damping"].values, at.values
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    spread = (
        np.geomspace(low, high, _LEVELS + 1)
        if isinstance(norm, LogNorm)
        else np.linspace(low, high, _LEVELS + 1)
    )
    inside = np.ma.masked_invalid(np.clip(z, low, high))
    for axis, values in ((ax.xaxis, x), (ax.yaxis, y)):
        if (values > 0).all():
            (ax.set_xscale if axis is ax.xaxis else ax.set_yscale)("log")
    if int(np.isfinite(z).sum()) > 3 and min(z.shape) > 1:
        ax.contourf(x, y, inside, levels=spread, norm=norm, cmap=shades, extend="both")
        ax.contour(x, y, inside, levels=spread, colors="0.35", linewidths=0.4)
    columns, rows = np.meshgrid(x, y)
    good = np.isfinite(z)
    ax.plot(columns[good], rows[good], ".", color="0.25", markersize=3)
    ax.plot(columns[~good], rows[~good], "x", color="0.25", markersize=5, markeredgewidth=0.8)
    ax.use_sticky_edges = False  # what lies on the edge of the grid is seen whole
    ax.margins(0.06)
    _ticks(ax, x, y)


def _ticks(ax: Axes, x: NDArray[Any], y: NDArray[Any]) -> None:
    """Put ticks where the grid is, so many as have room."""
    for axis, values, most in ((ax.xaxis, x, 6), (ax.yaxis, y, 8)):
        some = values[:: max(1, math.ceil(len(values) / most))]
        axis.set_major_locator(FixedLocator(some.tolist()))
        axis.set_minor_locator(NullLocator())
        axis.set_ticklabels([f"{v:g}" for v in some], fontsize=7.5)


def _lines(ds: xr.Dataset, score: xr.DataArray, against: str) -> Figure:
    """Draw a line for each algorithm against one axis; its seeds' spread as bars."""
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    ax = figure.subplots()
    names = [str(name) for name in ds["algorithm"].values]
    styles = looks({name: name for name in names})
    if against == "algorithm":
        values = score.values.reshape(len(names), -1)
        best = np.nanmax(values, 1) if swept.most_is_best(ds) else np.nanmin(values, 1)
        for i, name in enumerate(names):
            ax.plot(i, best[i], styles[name].marker, color=styles[name].colour, markersize=7)
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    else:
        number = ds[against].dtype.kind in "iuf"
        x = ds[against].values if number else np.arange(ds.sizes[against])
        for name in names:
            of = score.sel(algorithm=name).values
            seen = np.isfinite(of)
            style = styles[name]
            ax.plot(x[seen], of[seen], marker=style.marker, markersize=5, label=name, **style.line)
        if number and (x > 0).all():
            ax.set_xscale("log")
            _ticks_of(ax, x)
        elif not number:
            ax.set_xticks(x, [str(v) for v in ds[against].values])
        ax.set_xlabel(_NAMES.get(against, against.replace("_", " ")))
        handles, labels = ax.get_legend_handles_labels()
        legend_below(figure, handles, labels)
    known = score.values[np.isfinite(score.values)]
    if known.size and known.min() > 0 and not swept.most_is_best(ds):
        ax.set_yscale("log")
        plain_numbers(ax.yaxis)
    ax.set_ylabel(str(ds["score"].attrs.get("units", "")).replace("1", "") or "score")
    ax.grid(alpha=0.3, linewidth=0.5)
    heading(figure, *_title(ds, len(names)))
    return figure


def _ticks_of(ax: Axes, x: NDArray[Any]) -> None:
    some = x[:: max(1, math.ceil(len(x) / 10))]
    ax.xaxis.set_major_locator(FixedLocator(some.tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_ticklabels([f"{v:g}" for v in some])
