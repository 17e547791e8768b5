"""Axes that matplotlib does not have.

They are a logarithm on either side of 0, and ticks of a narrow range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, LogFormatter
from numpy.typing import NDArray

from curvlab.errors import CurvlabError
from curvlab.logs import attributes


@dataclass(frozen=True)
class SymmetricLog:
    """A logarithmic axis on either side of 0.

    Args:
        edges: of the bars.
        first: the log's first bin in each bar.
        centre: |λ| where the middle bar ends.
        top: |λ| where the axis ends.
    """

    edges: NDArray[np.float64]
    first: NDArray[np.intp]
    centre: float
    top: float

    def scale(self, ax: Axes) -> None:
        """Give `ax` this horizontal axis: its scale, its limits ±`top`, its ticks."""
        low, high = round(math.log10(self.centre)), math.ceil(math.log10(self.top) - 0.01) - 1
        ax.set_xscale("symlog", linthresh=self.centre, linscale=0.5)
        ax.set_xlim(-self.top, self.top)
        labelled = [e for e in range(low + 3, high + 1) if e % 3 == 0] or [high]
        names = ["1" if e == 0 else f"$10^{{{e}}}$" for e in labelled]
        ticks = [*(-(10.0**e) for e in reversed(labelled)), 0.0, *(10.0**e for e in labelled)]
        ax.set_xticks(ticks, [*(f"−{name}" for name in reversed(names)), "0", *names], fontsize=7.5)
        ax.xaxis.set_minor_locator(
            FixedLocator([sign * 10.0**e for e in range(low, high + 1) for sign in (-1, 1)])
        )


def symmetric_log(ds: xr.Dataset) -> SymmetricLog:
    """Return the axis of all panels of spectra.

    It goes from the greatest |λ| down to 10⁻⁷ of the least panel's, or to where rounding begins;
    over at most 12 decades.

    Raises:
        CurvlabError: the bins of the log do not hold its eigenvalues.
    """
    largest = np.maximum(np.abs(ds["lowest"].values), np.abs(ds["highest"].values))
    largest = largest[np.isfinite(largest)]
    if not largest.size:
        raise CurvlabError(
            "no end of a spectrum in the log is a finite number, so there is no axis for"
            " eigenvalues"
        )
    top = math.ceil(math.log10(max(largest.max(), 1e-11)) * 2) / 2
    relative = min(max(1e-7, attributes.number(ds, "tolerance") or 0.0), 1.0)
    low = max(math.floor(math.log10(max(largest.min() * relative, 1e-12))), math.ceil(top) - 12)
    edges = np.concatenate([ds["lower"].values, ds["upper"].values[-1:]])
    if not (np.diff(edges) > 0).all():
        raise CurvlabError("the bins of the spectra in the log do not ascend")
    exponent = np.log10(np.maximum(np.abs(edges), 1e-300))
    half_decades = np.abs(2 * exponent - np.round(2 * exponent)) < 0.01
    shown = np.flatnonzero(half_decades & (exponent > low - 0.01) & (exponent < top + 0.01))
    if len(shown) < 2:
        raise CurvlabError(
            "the bins of the spectra in the log do not reach their eigenvalues, which end at"
            f" {largest.max():.3g}"
        )
    return SymmetricLog(edges[shown], shown[:-1], 10.0**low, 10.0**top)


class _Logarithmic(LogFormatter):
    """A formatter with the digits that tell ticks apart, where matplotlib's has one below 1."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.4g}" if super().__call__(x, pos) else ""


def plain_numbers(axis: Axis, decades: float = 2) -> None:
    """Write plain numbers on a logarithmic axis, also between the decades where there is room.

    Args:
        axis: of either direction.
        decades: that it spans at most, for numbers between them; side by side these take more room.
    """
    axis.set_major_formatter(_Logarithmic())
    axis.set_minor_formatter(_Logarithmic(labelOnlyBase=False, minor_thresholds=(decades, 0.5)))
