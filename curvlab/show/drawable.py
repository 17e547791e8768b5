"""What matplotlib is given, and the file it makes.

It is given a log whose numbers have a place on an axis, its texts as plain letters.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from curvlab.errors import CurvlabError
from curvlab.logs.regular import regular, unique
from curvlab.system.escape import LONGEST, for_matplotlib, for_terminal

SHORT = 60
"""Letters of what a legend, an axis or a panel is called."""
_LARGEST = 1e150
"""What lies beyond is no number: axes reach no further."""


def drawable(ds: xr.Dataset) -> xr.Dataset:
    """Return a log as matplotlib is given it.

    It is without what is odd, a seed that is alone, or numbers that have no place on an axis; every
    text that came with the log is plain letters.
    """
    ds, _ = regular(ds)
    ds = ds.squeeze("seed", drop=True) if ds.sizes.get("seed") == 1 else ds  # no spread
    numbers = [name for name in ds.variables if name not in ds.sizes and ds[name].dtype == float]
    data = {name: ds[name].where(np.abs(ds[name]) < _LARGEST) for name in numbers}
    coords = {name: _plain(values) for name, values in ds.coords.items() if values.dtype == object}
    drawable = ds.assign(data).assign_coords(coords)
    for values in drawable.variables.values():
        values.attrs = _letters(values.attrs, tuple(values.attrs))
    return drawable.assign_attrs(_letters(ds.attrs, ("algorithm", "reference")))


def _plain(labels: xr.DataArray) -> xr.DataArray:
    words = [for_matplotlib(label, SHORT) for label in labels.values]
    return labels.copy(
        data=np.asarray(unique(words) if labels.name in labels.dims else words, dtype=object)
    )


def _letters(said: Mapping[Any, Any], short: Container[Any]) -> dict[Any, Any]:
    return {
        name: (
            for_matplotlib(value, SHORT if name in short else LONGEST)
            if isinstance(value, str)
            else value
        )
        for name, value in said.items()
    }


def heading(figure: Figure, *lines: str) -> None:
    """Write the title of a figure within its width."""
    across = int(10 * figure.get_figwidth())
    figure.suptitle(
        "\n".join(part for line in lines for part in textwrap.wrap(line, across)), fontsize=11
    )


def picture(figure: Figure, form: str, **options: Any) -> bytes:
    """Return the bytes of a figure's file, so that nothing is written where it cannot be drawn.

    Args:
        figure: what is drawn.
        form: of the file, as matplotlib names it.
        options: of `Figure.savefig`.

    Raises:
        CurvlabError: the figure cannot be drawn.
    """
    held = io.BytesIO()
    try:
        with np.errstate(all="ignore"):  # axes of numbers that are nearly beyond all
            figure.savefig(held, format=form, **{"dpi": 150} | options)
    except Exception as error:  # matplotlib raises what its axes and fonts, Pillow and LaTeX do
        reason = for_terminal(str(error).partition("\n")[0] or type(error).__name__)
        raise CurvlabError(f"the figure cannot be drawn as {form}: {reason}") from error
    return held.getvalue()
