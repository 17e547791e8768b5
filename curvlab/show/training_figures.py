"""Figures of training runs: loss and error against epochs and time, pairs and their damping."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvlab.errors import CurvlabError
from curvlab.logs import attributes
from curvlab.show.axes import plain_numbers
from curvlab.show.captions import (
    MOST_LINES,
    MOST_PANELS,
    Runs,
    across,
    evenly,
    legend_below,
    model_on_data,
    of_how_many,
)
from curvlab.show.drawable import heading
from curvlab.show.style import LineStyle, colours, looks

_PARTS: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.8},
    "val": {"linewidth": 1.4, "alpha": 0.5},
}
"""Style of the lines of training and validation."""


def _marker(of: LineStyle, epochs: int) -> dict[str, Any]:
    """Return a marker on some of the epochs, a small one at each where they are few."""
    return {"marker": of.marker, "markersize": 4, "markevery": max(1, epochs // 12)}


def training(runs: Runs) -> Figure:
    """Draw loss and error of training runs, against epochs and against training time.

    They are those of thesis Figures 2.2, 4.2 and 4.3.
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
    beside = across(figure, labels, 4)
    figure.set_size_inches(9.2, 3.1 * len(rows) + 0.7 + 0.21 * math.ceil(len(labels) / beside))
    figure.legend(handles, labels, loc="outside lower center", ncols=beside, frameon=False)
    what = f"{model_on_data(first)}, {len(runs)} runs" if len(runs) > 1 else model_on_data(first)
    heading(figure, f"Training of {what}")
    return figure


def damping(ds: xr.Dataset) -> Figure:
    """Draw thesis Figure 2.1, by layer and epoch: how pairs fulfil the bound of the damping.

    It is the fraction of an epoch's pairs with yᵀHy ≤ 2 sᵀy/μ₁ (dotted: 1/μ₁), and the mean ratio.
    """
    if "after" not in ds["stage"].values:
        raise CurvlabError("figure 'damping' needs pairs of the stage 'after' in the log")
    ds = ds.isel(algorithm=0).sel(stage="after")
    names = ("pairs_within_2mu1", "pair_curvature_mean")
    kinds = [
        str(p)
        for p in ds["pair"].values
        if np.isfinite(ds["pair_curvature_mean"].sel(pair=p)).any()
    ][:MOST_PANELS]
    shown = ds["block"].values[evenly(ds.sizes["block"], MOST_LINES)]
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
    legend_below(figure, handles, labels)
    title = f"Pairs after damping: {attributes.text(ds, 'algorithm', 'run')}, {model_on_data(ds)}"
    title += of_how_many(len(shown), ds.sizes["block"], "layers")
    heading(figure, title)
    return figure


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 24))
