"""FIGURES: Dataset → matplotlib Figure, one function a figure. They read only the log.

Colours, dashes and markers are those of `style`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import MaxNLocator, NullLocator

from curvlab.errors import CurvlabError, lookup
from curvlab.logs import attributes
from curvlab.logs.regular import regular, unique
from curvlab.show.axes import SymmetricLog, plain_numbers, symmetric_log
from curvlab.show.drawable import SHORT, drawable, heading
from curvlab.show.style import MATRICES, LineStyle, colours, look, looks
from curvlab.system.escape import for_matplotlib, for_terminal

Runs = Sequence[tuple[str, xr.Dataset]]
"""[(name, log)]"""

_MOST_PANELS, _MOST_LINES, _MOST_BARS = 64, 48, 400
"""Layers, algorithms of a panel and bars at most; of more so many are drawn, evenly, and it is
said.
"""


def _line(ax: Axes, values: xr.DataArray, style: dict[str, object], label: str) -> None:
    """Against the step, on whatever axis of steps; with several seeds the mean and a band of one
    standard deviation.
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
    """The steps along which they lie."""
    return values[next(d for d in values.dims if d != "seed")]


def _title(ds: xr.Dataset, text: str) -> str:
    seeds = f", mean ± standard deviation of {ds.sizes['seed']} seeds" if "seed" in ds.dims else ""
    return f"{text}{seeds}"


def _across(figure: Figure, labels: Sequence[str], most: int = 6) -> int:
    """Entries of a legend that stand beside each other."""
    room = int(13.6 * figure.get_figwidth()) // (max(map(len, labels), default=0) + 9)
    return max(1, min(len(labels), most, room))


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below the panels, which stay as high as they were where it has many lines."""
    across = _across(figure, labels)
    more = max(0, math.ceil(len(labels) / across) - 2)
    figure.set_figheight(figure.get_figheight() + 0.21 * more)
    figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)


def _run(ds: xr.Dataset) -> str:
    return f"{attributes.text(ds, 'model', 'model')} on {attributes.text(ds, 'data', 'data')}"


def _of(shown: int, there: int, what: str) -> str:
    return f", {shown} of {there} {what}" if shown < there else ""


def cosine(ds: xr.Dataset) -> Figure:
    """Cosine of every method's direction to the reference's, one panel for each inner layer (thesis
    Figure 4.1).
    """
    blocks = [str(b) for b in ds["block"].values]
    inner = blocks[1:-1] if len(blocks) > 4 else blocks
    shown = [inner[i] for i in _some(len(inner), _MOST_PANELS)]
    others = _others(ds)
    drawn = [others[i] for i in _some(len(others), _MOST_LINES)]
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
        parameters = f" ({ds['parameters'].sel(block=block).item()})" if "parameters" in ds else ""
        ax.set_title(f"layer {block}{parameters}", fontsize=10)
        ax.grid(alpha=0.3)
    axes.flat[0].set_ylim(top=1.0)  # of all, once all are drawn: it ends the search for the bottom
    for ax in axes.flat[max(len(shown) - columns, 0) : len(shown)]:  # the lowest of each column
        ax.set_xlabel("iteration")
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("cosine similarity")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        _legend(figure, handles, labels)
    left = _of(len(shown), len(inner), "layers") + _of(len(drawn), len(others), "algorithms")
    reference = attributes.text(ds, "reference", "the reference")
    heading(figure, _title(ds, f"Direction against {reference}, {_run(ds)}{left}"))
    return figure


def loss(ds: xr.Dataset) -> Figure:
    """Loss along the trajectory: of each minibatch, or of the examples of spectra."""
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
    ax.set_title(_title(ds, _run(ds)), fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def seconds(ds: xr.Dataset) -> Figure:
    """Median time of each algorithm's own update and direction."""
    median = ds["seconds"].median([d for d in ds["seconds"].dims if d != "algorithm"]) * 1e3
    there = median.sizes["algorithm"]
    median = median.isel(algorithm=_some(there, _MOST_BARS))
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
    ax.set_title(f"{_run(ds)}{_of(len(names), there, 'algorithms')}", fontsize=11)
    return figure


def spectrum(ds: xr.Dataset) -> Figure:
    """Histogram of every block's eigenvalues, a row for each block and a column for each number of
    training steps.
    """
    ds = ds.isel(block=_some(ds.sizes["block"], 8), step=_some(ds.sizes["step"], 4))
    rows, columns = ds.sizes["block"], ds.sizes["step"]
    figure = Figure(figsize=(max(5.4, 3.3 * columns + 0.4), 1.6 * rows + 1.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    axis = symmetric_log(ds)
    for row, block in enumerate(ds["block"].values):
        for i, ax in enumerate(axes[row]):
            _histogram(ax, ds.isel(block=row, step=i), axis)
        axes[row, 0].set_ylim(0.5, 30 * axes[row, 0].get_ylim()[1])
        name = "whole" if block == "whole" else f"block {block}"
        axes[row, 0].set_ylabel(f"{name}\norder {float(ds['order'][row]):.0f}", fontsize=9)
    for i, ax in enumerate(axes[0]):
        loss = f", loss {float(ds['loss'][i]):.3g} nat" if "loss" in ds else ""
        ax.set_title(f"after {ds['step'].values[i]} steps{loss}", fontsize=10)
    unresolved = ", or not told from 0" if "unresolved" in ds and ds["unresolved"].any() else ""
    figure.supxlabel(
        f"eigenvalue (nat); grey: below 0; middle bar: within ±{axis.centre:.0e}{unresolved}",
        fontsize=10,
    )
    figure.supylabel("eigenvalues in half a decade", fontsize=10)
    algorithm = attributes.text(ds, "algorithm")
    how = [f"trained by {algorithm}"] if algorithm else []
    how += (
        ["stochastic Lanczos quadrature"]
        if "route" in ds and (ds["route"] == "lanczos").any()
        else []
    )
    heading(figure, f"Eigenvalues by block, {_run(ds)}", ", ".join(how))
    return figure


def _some(size: int, most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(size, most))})


def _histogram(ax: Axes, at: xr.Dataset, axis: SymmetricLog) -> None:
    """One panel: the first matrix filled, the others as lines; the legend says the lowest
    eigenvalue of each.
    """
    handles: list[StepPatch] = []
    labels: list[str] = []
    for kind in (k for k in MATRICES if k in at["matrix"].values):
        here, (name, colour) = at.sel(matrix=kind), MATRICES[kind]
        counts = float(at["order"]) * np.add.reduceat(here["density"].values, axis.first)
        style: dict[str, Any] = (
            {"linewidth": 1.2} if handles else {"fill": True, "alpha": 0.75, "linewidth": 0}
        )
        handles.append(
            ax.stairs(np.maximum(counts, 0.5), axis.edges, baseline=0.5, color=colour, **style)
        )
        lowest = f"{float(here['lowest']):.2g}".replace("-", "−")
        labels.append(f"{name}: lowest {lowest}{_share(here)}")
    ax.axvspan(-axis.top, -axis.centre, color="#f0f0f0", zorder=0, linewidth=0)
    axis.scale(ax)
    ax.set_yscale("log")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", alpha=0.25)
    legend = ax.legend(
        handles,
        labels,
        loc="upper left",
        fontsize=7,
        handlelength=1.3,
        borderaxespad=0.1,
        labelspacing=0.2,
    )
    legend.set_frame_on(False)
    legend.set_in_layout(False)


def _share(here: xr.Dataset) -> str:
    """Of negative eigenvalues, where there are any."""
    if "negative" not in here or not float(here["negative"]) > 0:
        return ""
    least = "at least " if here.get("unresolved") else ""
    return f", {least}{float(here['negative']):.0%} negative"


_PARTS: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.8},
    "val": {"linewidth": 1.4, "alpha": 0.5},
}
"""Style of the lines of training and validation."""


def _marker(of: LineStyle, epochs: int) -> dict[str, Any]:
    """A marker on some of the epochs, a small one at each where they are few."""
    return {"marker": of.marker, "markersize": 4, "markevery": max(1, epochs // 12)}


def training(runs: Runs) -> Figure:
    """Loss and error of training runs, against epochs and against training time (thesis Figures
    2.2, 4.2, 4.3).
    """
    first = runs[0][1]
    rows = [kind for kind in ("loss", "error") if f"train_{kind}" in first]
    against = [name for name in ("epoch", "wall_seconds") if any(name in ds for _, ds in runs)]
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    axes = figure.subplots(len(rows), len(against), sharey="row", sharex="col", squeeze=False)
    seen_as = looks({label: attributes.text(ds, "algorithm") for label, ds in runs})
    for label, ds in runs:
        for row, kind in zip(axes, rows, strict=True):
            for part in ("train", "val"):  # validation: paler, of the same colour and dashes
                if f"{part}_{kind}" not in ds:
                    continue
                seen = ds.dropna("epoch", subset=[f"{part}_{kind}"])
                style = (
                    seen_as[label].line
                    | _PARTS[part]
                    | _marker(seen_as[label], seen.sizes["epoch"])
                )
                name = f"{label}, {'training' if part == 'train' else 'validation'}"
                for ax, x in zip(row, against, strict=True):
                    if x in seen:
                        ax.plot(seen[x], seen[f"{part}_{kind}"], label=name, **style)
    units = first["train_loss"].attrs.get("units", "nat")
    for row, kind in zip(axes, rows, strict=True):
        row[0].set_ylabel(
            f"mean loss ({units})"
            if kind == "loss"
            else _wrapped(attributes.text(first, "error", "error"))
        )
        if all(len(line.get_ydata()) and float(min(line.get_ydata())) > 0 for line in row[0].lines):
            row[0].set_yscale("log")
            plain_numbers(row[0].yaxis)
        for ax in row:
            ax.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(ds.sizes["epoch"] == 1 for _, ds in runs):  # nothing but what was before training
        for ax in axes[-1]:
            ax.set_xlim(-0.5, 1.0)
    axes[-1, 0].set_xlabel("epoch")
    if "wall_seconds" in against:
        axes[-1, 1].set_xlabel("training time (s), evaluation and warm start apart")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    across = _across(figure, labels, 4)
    figure.set_size_inches(9.2, 3.1 * len(rows) + 0.7 + 0.21 * math.ceil(len(labels) / across))
    figure.legend(handles, labels, loc="outside lower center", ncols=across, frameon=False)
    what = f"{_run(first)}, {len(runs)} runs" if len(runs) > 1 else _run(first)
    heading(figure, f"Training of {what}")
    return figure


def damping(ds: xr.Dataset) -> Figure:
    """Thesis Figure 2.1: by layer, the fraction of an epoch's pairs with yᵀHy ≤ 2 sᵀy/μ₁ (dotted:
    1/μ₁), and the mean ratio.
    """
    if "after" not in ds["stage"].values:
        raise CurvlabError("figure 'damping' needs pairs of the stage 'after' in the log")
    ds = ds.isel(algorithm=0).sel(stage="after")
    names = ("pairs_within_2mu1", "pair_curvature_mean")
    kinds = [
        str(p)
        for p in ds["pair"].values
        if np.isfinite(ds["pair_curvature_mean"].sel(pair=p)).any()
    ][:_MOST_PANELS]
    shown = ds["block"].values[_some(ds.sizes["block"], _MOST_LINES)]
    figure = Figure(figsize=(4.6 * max(1, len(kinds)), 6.0), layout="constrained")
    axes = figure.subplots(2, max(1, len(kinds)), sharex=True, sharey="row", squeeze=False)
    what = {"a": "pairs of H_a", "g": "pairs of H_g", "step": "pairs of steps"}
    for column, kind in zip(axes.T, kinds, strict=False):
        shades = colours(len(shown))
        for i, block in enumerate(shown):
            at = ds.sel(pair=kind, block=block)
            style = {
                "color": shades[i],
                "linewidth": 1.4,
                "marker": "." if ds.sizes["epoch"] < 25 else "",
            }
            for ax, name in zip(column, names, strict=True):
                ax.plot(ds["epoch"], at[name], label=f"layer {block}", **style)
            column[0].plot(ds["epoch"], at["pairs_within_mu1"], linestyle=":", **style)
        column[0].set_title(what.get(kind, f"pairs of {kind}"), fontsize=10)
        column[1].set_xlabel("epoch")
        column[0].set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("fraction of pairs with yᵀHy / sᵀy\nat most 2/μ₁ (dotted: 1/μ₁)")
    axes[1, 0].set_ylabel("mean of yᵀHy / sᵀy")
    for ax in axes.flat:
        ax.grid(alpha=0.3, linewidth=0.5)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    _legend(figure, handles, labels)
    title = f"Pairs after damping: {attributes.text(ds, 'algorithm', 'run')}, {_run(ds)}"
    title += _of(len(shown), ds.sizes["block"], "layers")
    heading(figure, title)
    return figure


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 24))


def named(runs: Runs) -> Runs:
    """By their algorithms; where two runs share one, by what differs: seed, learning rate, damping,
    or else their place.
    """
    about = [attributes.text(ds, "algorithm", "run") for _, ds in runs]
    for key in ("lr", "damping", "seed"):
        if len(set(about)) == len(about):
            break
        said = [
            ds.attrs.get(key) if attributes.number(ds, key) is not None else None for _, ds in runs
        ]
        if len(set(said)) > 1:
            about = [f"{name}, {key} {value}" for name, value in zip(about, said, strict=True)]
    if len(set(about)) < len(about):
        about = [f"{name} ({place})" for name, (place, _) in zip(about, runs, strict=True)]
    return [(name, ds) for name, (_, ds) in zip(about, runs, strict=True)]


@dataclass(frozen=True)
class Entry:
    """`needs`: the variable of the log that is drawn, `beside` what it is not drawn without;
    `several`: it takes [(name, log)] of several runs.
    """

    summary: str
    needs: str
    draw: Callable[..., Figure]
    several: bool = False
    beside: tuple[str, ...] = ()


FIGURES: dict[str, Entry] = {
    "cosine": Entry(
        "cosine to the reference by layer against the iteration (thesis Figure 4.1)",
        "cosine",
        cosine,
    ),
    "loss": Entry("loss along the trajectory", "loss", loss),
    "seconds": Entry("time of each algorithm's own work", "seconds", seconds),
    "spectrum": Entry(
        "eigenvalues of each layer's curvature block, negative ones apart",
        "density",
        spectrum,
        beside=("lowest", "highest", "order", "lower", "upper"),
    ),
    "training": Entry(
        "loss and error of one or several training runs against epochs and time",
        "train_loss",
        training,
        several=True,
    ),
    "damping": Entry(
        "pairs of a training run by layer and epoch (thesis Figure 2.1)",
        "pairs_within_mu1",
        damping,
        beside=("pairs_within_2mu1", "pair_curvature_mean"),
    ),
}


def draw(ds: xr.Dataset, name: str) -> Figure:
    """Figure `name` of a log. Raises CurvlabError for an unknown name or a log that lacks what it
    needs.
    """
    return draw_all([("", ds)], name)


def draw_all(runs: Runs, name: str) -> Figure:
    """Figure `name` of one or several logs [(place, log)]. Raises CurvlabError likewise, or where
    it shows one run alone.
    """
    entry = lookup(FIGURES, name, "figure")
    if len(runs) > 1 and not entry.several:
        raise CurvlabError(
            f"figure '{name}' is of one run: give one (of several: {', '.join(_of_several())})"
        )
    places = unique(for_matplotlib(place, SHORT) for place, _ in runs)
    ready = [(place, drawable(ds)) for place, (_, ds) in zip(places, runs, strict=True)]
    for (place, _), (_, at) in zip(runs, ready, strict=True):
        for needed in (entry.needs, *entry.beside):
            if needed not in at:
                known = (
                    for_terminal(", ".join(map(str, at.data_vars))) or "nothing that can be drawn"
                )
                where = f"the log{' ' * bool(place)}{for_terminal(place)}"
                raise CurvlabError(
                    f"figure '{name}' needs '{needed}' in {where}, which has {known}"
                )
    with np.errstate(all="ignore"):
        return entry.draw(named(ready) if entry.several else ready[0][1])


def _of_several() -> list[str]:
    return [name for name, entry in FIGURES.items() if entry.several]


def main(ds: xr.Dataset) -> str:
    """The figure that stands for a log: the first that it has what it needs for, but for the
    loss.
    """
    return next((name for name in applying(ds) if name != "loss"), "loss")


def applying(ds: xr.Dataset) -> list[str]:
    """Of FIGURES those that the log has the main variable for."""
    has, _ = regular(ds)
    return [name for name, entry in FIGURES.items() if entry.needs in has]
