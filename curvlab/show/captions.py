"""What figures have in common: titles, legends, and what is said of that which is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from curvlab.logs import attributes

Runs = Sequence[tuple[str, xr.Dataset]]
"""[(name, log)]"""

MOST_PANELS, MOST_LINES, MOST_BARS = 64, 48, 400
"""Layers, algorithms of a panel and bars at most; of more so many are drawn, evenly, and it is
said.
"""


def with_seeds(ds: xr.Dataset, text: str) -> str:
    """Return a title which says of how many seeds it is, where there are several."""
    seeds = f", mean ± standard deviation of {ds.sizes['seed']} seeds" if "seed" in ds.dims else ""
    return f"{text}{seeds}"


def across(figure: Figure, labels: Sequence[str], most: int = 6) -> int:
    """Return how many entries of a legend stand beside each other."""
    room = int(13.6 * figure.get_figwidth()) // (max(map(len, labels), default=0) + 9)
    return max(1, min(len(labels), most, room))


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend below the panels, which stay as high as they were where it has many lines."""
    beside = across(figure, labels)
    more = max(0, math.ceil(len(labels) / beside) - 2)
    figure.set_figheight(figure.get_figheight() + 0.21 * more)
    figure.legend(handles, labels, loc="outside lower center", ncols=beside, frameon=False)


def model_on_data(ds: xr.Dataset) -> str:
    """Return which model a log is of, and on which data."""
    return f"{attributes.text(ds, 'model', 'model')} on {attributes.text(ds, 'data', 'data')}"


def of_how_many(shown: int, there: int, what: str) -> str:
    """Return the end of a title: how many are drawn, where these are not all."""
    return f", {shown} of {there} {what}" if shown < there else ""


def evenly(size: int, most: int) -> list[int]:
    """Return at most so many places, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(size, most))})
