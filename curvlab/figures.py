"""FIGURES: Dataset → matplotlib Figure, one function a figure. They read only the log.

Colours are Okabe and Ito's, told apart by colour-blind readers; each algorithm also has a dash pattern, for print.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvlab.errors import CurvlabError, lookup

_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C6D31",
    "#666666",
    "#AA0000",
    "#7F3C8D",
)
_DASHES = ((0, ()), (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (1, 1)))
_ORDER = (
    "kfac", "tnt", "shampoo", "adam", "sgd-m", "tnt-ef", "kfac-ef", "tnt-per-sample", "block-ef", "smw-ng-bd", "block-fisher",
)  # fmt: skip


def _style(name: str, index: int) -> dict[str, object]:
    """Colour and dashes of an algorithm: the same in every figure."""
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER) + index
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _DASHES[place % len(_DASHES)], "linewidth": 1.6}


def _line(ax: Axes, values: xr.DataArray, style: dict[str, object], label: str) -> None:
    """Against the step; with several seeds the mean and a band of one standard deviation."""
    if "seed" in values.dims:
        mean, spread = values.mean("seed"), values.std("seed")
        ax.fill_between(values["step"], mean - spread, mean + spread, color=str(style["color"]), alpha=0.18, linewidth=0)
        values = mean
    ax.plot(values["step"], values, label=label, **style)  # type: ignore[arg-type]


def _others(ds: xr.Dataset) -> list[str]:
    reference = ds.attrs.get("reference", "")
    return [str(a) for a in ds["algorithm"].values if a != reference]


def _title(ds: xr.Dataset, text: str) -> str:
    seeds = f", mean ± standard deviation of {ds.sizes['seed']} seeds" if "seed" in ds.dims else ""
    return f"{text}{seeds}"


def _run(ds: xr.Dataset) -> str:
    model, data = ds.attrs.get("model", "model"), ds.attrs.get("data", "data")
    return f"{model} on {data}"


def cosine(ds: xr.Dataset) -> Figure:
    """Cosine of every method's direction to the reference's, one panel for each inner layer (thesis Figure 4.1)."""
    blocks = [str(b) for b in ds["block"].values]
    shown = blocks[1:-1] if len(blocks) > 4 else blocks
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.6 * columns, 2.9 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    for ax, block in zip(axes.flat, shown, strict=False):
        for i, name in enumerate(_others(ds)):
            _line(ax, ds["cosine"].sel(algorithm=name, block=block), _style(name, i), name)
        ax.set_title(f"layer {block} ({ds['parameters'].sel(block=block).item()})", fontsize=10)
        ax.grid(alpha=0.3)
        ax.set_ylim(top=1.0)
    for ax in axes.flat[max(len(shown) - columns, 0) : len(shown)]:  # the lowest of each column
        ax.set_xlabel("iteration")
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("cosine similarity")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    figure.suptitle(_title(ds, f"Direction against {ds.attrs.get('reference')}, {_run(ds)}"), fontsize=11)
    return figure


def loss(ds: xr.Dataset) -> Figure:
    """Minibatch loss along the reference's trajectory."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    ax = figure.subplots()
    reference = str(ds.attrs.get("reference", "reference"))
    _line(ax, ds["loss"], _style("kfac", 0) | {"linestyle": "-"}, f"steps of {reference}")
    ax.set_xlabel("iteration")
    ax.set_ylabel(f"mean minibatch loss ({ds['loss'].attrs.get('units', 'nat')})")
    ax.set_title(_title(ds, _run(ds)), fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def seconds(ds: xr.Dataset) -> Figure:
    """Median time of each algorithm's own update and direction."""
    over = [d for d in ("step", "seed") if d in ds["seconds"].dims]
    median = ds["seconds"].median(over) * 1e3
    names = [str(n) for n in median["algorithm"].values]
    figure = Figure(figsize=(6.0, 0.32 * len(names) + 1.2), layout="constrained")
    ax = figure.subplots()
    ax.barh(names, median.values, color=_COLOURS[0])
    ax.bar_label(ax.containers[0], fmt="%.3g", padding=3)  # type: ignore[arg-type]
    ax.set_xscale("log")
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.set_xlabel("median time of update and direction (ms)")
    ax.set_title(_run(ds), fontsize=11)
    return figure


@dataclass(frozen=True)
class Entry:
    summary: str
    draw: Callable[[xr.Dataset], Figure]


FIGURES: dict[str, Entry] = {
    "cosine": Entry("cosine to the reference by layer against the iteration (thesis Figure 4.1)", cosine),
    "loss": Entry("minibatch loss along the trajectory", loss),
    "seconds": Entry("time of each algorithm's own work", seconds),
}


def draw(ds: xr.Dataset, name: str) -> Figure:
    """Figure `name` of a log. Raises CurvlabError for an unknown name or a log that lacks what it needs."""
    entry = lookup(FIGURES, name, "figure")
    try:
        return entry.draw(ds)
    except KeyError as error:
        raise CurvlabError(
            f"figure '{name}' needs {error} in the log, which has {', '.join(map(str, ds.data_vars))}"
        ) from error
