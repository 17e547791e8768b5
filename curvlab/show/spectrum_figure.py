"""The figure of spectra: histograms of every block's eigenvalues, negative ones apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.ticker import NullLocator

from curvlab.logs import attributes
from curvlab.show.axes import SymmetricLog, symmetric_log
from curvlab.show.captions import (
    evenly,
    model_on_data,
)
from curvlab.show.drawable import heading
from curvlab.show.style import MATRICES


def spectrum_histograms(ds: xr.Dataset) -> Figure:
    """Draw a histogram of every block's eigenvalues.

    There is a row for each block and a column for each number of training steps.
    """
    ds = ds.isel(block=evenly(ds.sizes["block"], 8), step=evenly(ds.sizes["step"], 4))
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
    heading(figure, f"Eigenvalues by block, {model_on_data(ds)}", ", ".join(how))
    return figure


def _histogram(ax: Axes, at: xr.Dataset, axis: SymmetricLog) -> None:
    """Draw one panel: the first matrix filled, the others as lines.

    The legend says the lowest eigenvalue of each.
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
    """Return the share of negative eigenvalues in words, where there are any."""
    if "negative" not in here or not float(here["negative"]) > 0:
        return ""
    least = "at least " if here.get("unresolved") else ""
    return f", {least}{float(here['negative']):.0%} negative"
