"""Figures of a comparison: cosines by layer, the loss along the trajectory, times."""

from __future__ import annotations

import math

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvlab.logs import attributes
from curvlab.show.captions import (
    MOST_BARS,
    MOST_LINES,
    MOST_PANELS,
    evenly,
    legend_below,
    model_on_data,
    of_how_many,
    with_seeds,
)
from curvlab.show.drawable import heading
from curvlab.show.style import look, looks


def _line(ax: Axes, values: xr.DataArray, style: dict[str, object], label: str) -> None:
    """Draw values against the step, on whatever axis of steps.

    With several seeds it is the mean and a band of one standard deviation.
    """
    steps = _axis(values)
    if "seed" in values.dims:
        mean, spread = values.mean("seed"), values.std("seed")
        ax.fill_between(
            steps, mean - spread, mean + spread, color=str(style["color"]), alpha=0.18, linewidth=0
        )
        values = mean
    ax.plot(steps, values, label=label, **{"marker": "." if steps.size == 1 else ""} | style)  # type: ignore[arg-type]  # styles are dictionaries


def _others(ds: xr.Dataset) -> list[str]:
    reference = attributes.text(ds, "reference")
    return [str(a) for a in ds["algorithm"].values if a != reference]


def _axis(values: xr.DataArray) -> xr.DataArray:
    """Return the steps along which values lie."""
    return values[next(d for d in values.dims if d != "seed")]


def one_of_each_kind(ds: xr.Dataset) -> list[str]:
    """Return the middle block of each kind; none where blocks do not repeat by name.

    Kinds are modules of one name but for the numbers in it: `layers.0.mlp.in`, `layers.1.mlp.in`.
    Blocks of which all directions are the reference's, as far as is seen, are left out.
    """
    if "parameters" not in ds:
        return []
    kinds: dict[str, list[str]] = {}
    for block in ds["block"].values:
        module = _module(ds, str(block))
        parts = module.split(".")
        if not parts[-1] or parts[-1].isdigit():
            return []
        kind = ".".join("*" if part.isdigit() else part for part in parts)
        kinds.setdefault(kind, []).append(str(block))
    if len(kinds) < 4 or max(map(len, kinds.values())) < 2:
        return []
    found = [of[len(of) // 2] for of in kinds.values()]
    return [b for b in found if _differs(ds, b)] or found


def _differs(ds: xr.Dataset, block: str) -> bool:
    """Return whether some method's direction of a block is seen to differ."""
    return bool((abs(ds["cosine"].sel(block=block) - 1) > 0.01).any())


def _module(ds: xr.Dataset, block: str) -> str:
    """Return the module of a block's first parameter, "" of the model's own."""
    return str(ds["parameters"].sel(block=block).item()).split()[0].rpartition(".")[0]


def _title(ds: xr.Dataset, block: str) -> str:
    if "parameters" not in ds:
        return f"layer {block}"
    names = str(ds["parameters"].sel(block=block).item())
    short = _module(ds, block) if len(names) > 40 else names
    return f"layer {block} ({short or names})"


def cosine(ds: xr.Dataset) -> Figure:
    """Draw the cosine of every method's direction to the reference's (thesis Figure 4.1).

    There is a panel for each inner layer; where layers of several kinds repeat, as in a
    transformer, for each kind the middle one.
    """
    blocks = [str(b) for b in ds["block"].values]
    inner = one_of_each_kind(ds) or (blocks[1:-1] if len(blocks) > 4 else blocks)
    shown = [inner[i] for i in evenly(len(inner), MOST_PANELS)]
    others = _others(ds)
    drawn = [others[i] for i in evenly(len(others), MOST_LINES)]
    seen = looks({name: name for name in drawn})
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    for ax, block in zip(axes.flat, shown, strict=False):
        for name in drawn:
            _line(ax, ds["cosine"].sel(algorithm=name, block=block), seen[name].line, name)
        ax.set_title(_title(ds, block), fontsize=10)
        ax.grid(alpha=0.3)
    axes.flat[0].xaxis.set_major_locator(MaxNLocator(integer=True))  # steps; of all, they share
    axes.flat[0].set_ylim(top=1.0)  # of all, once all are drawn: it ends the search for the bottom
    for ax in axes.flat[max(len(shown) - columns, 0) : len(shown)]:  # the lowest of each column
        ax.set_xlabel("iteration")
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("cosine similarity")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        legend_below(figure, handles, labels)
    left = of_how_many(len(shown), len(inner), "layers") + of_how_many(
        len(drawn), len(others), "algorithms"
    )
    reference = attributes.text(ds, "reference", "the reference")
    heading(figure, with_seeds(ds, f"Direction against {reference}, {model_on_data(ds)}{left}"))
    return figure


def loss(ds: xr.Dataset) -> Figure:
    """Draw the loss along the trajectory: of each minibatch, or of the examples of spectra."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    ax = figure.subplots()
    leader = attributes.text(ds, "reference") or attributes.text(ds, "algorithm")
    steps = _axis(ds["loss"])
    style = look(leader).line | {"linestyle": "-", "marker": "." if steps.size < 25 else ""}
    _line(ax, ds["loss"], style, f"steps of {leader}" if leader else "loss")
    ax.set_xlabel(
        str(steps.attrs.get("long_name", "iteration")) if steps.name == "step" else "iteration"
    )
    ax.set_ylabel(
        f"{ds['loss'].attrs.get('long_name', 'mean loss')} ({ds['loss'].attrs.get('units', 'nat')})"
    )
    ax.set_title(with_seeds(ds, model_on_data(ds)), fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def seconds(ds: xr.Dataset) -> Figure:
    """Draw the median time of each algorithm's own update and direction."""
    median = ds["seconds"].median([d for d in ds["seconds"].dims if d != "algorithm"]) * 1e3
    there = median.sizes["algorithm"]
    median = median.isel(algorithm=evenly(there, MOST_BARS))
    names = [str(n) for n in median["algorithm"].values]
    width = 6.0 + 0.08 * max(0, max(map(len, names)) - 24)
    figure = Figure(figsize=(width, 0.32 * len(names) + 1.2), layout="constrained")
    ax = figure.subplots()
    ax.barh(range(len(names)), median.values, color=[look(name).colour for name in names])
    ax.set_yticks(range(len(names)), names)
    ax.bar_label(ax.containers[0], fmt="%.3g", padding=3)  # type: ignore[arg-type]  # barh made a BarContainer
    if (median > 0).any():
        ax.set_xscale("log")
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.set_xlabel("median time of update and direction (ms)")
    ax.set_title(f"{model_on_data(ds)}{of_how_many(len(names), there, 'algorithms')}", fontsize=11)
    return figure
