"""Tables of a sweep: each algorithm's best place, and how its points ended."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from curvlab.logs import swept
from curvlab.show.text_table import Table

_MOST_ROWS = 500


def best_of_sweep(ds: xr.Dataset) -> Table:
    """Tabulate the best place of each algorithm of a sweep."""
    axes, several = swept.axes(ds), ds.sizes.get("seed", 1) > 1
    rows = []
    for best in swept.best_places(ds):
        spread = f" ± {best.spread:.2g}" if several else ""
        place = (_label(best.place[axis]) for axis in axes)
        edge = ", ".join(best.edges) or "–"
        rows.append((best.algorithm, *place, f"{best.score:.5g}{spread}", edge))
    if not rows:
        return Table("No point has a score", ("",), ())
    said = str(ds["score"].attrs.get("long_name", "score"))
    unit = str(ds["score"].attrs.get("units", "1"))
    unit = "" if unit == "1" else f" ({unit})"
    seeds = f", mean ± standard deviation of {ds.sizes['seed']} seeds" if several else ""
    return Table(
        f"The best of each algorithm: {said}{seeds}",
        ("algorithm", *axes, f"score{unit}", "at the grid's edge"),
        tuple(rows),
    )


def points_of_sweep(ds: xr.Dataset) -> Table:
    """Tabulate how many points of a sweep ended how, and those that have no score with why."""
    found = swept.rows(ds)
    others = [row for row in found if row.get("state") != "done"]
    counts = {state: sum(row.get("state") == state for row in found) for state in swept.STATES}
    rows = [(f"{count} of {len(found)}", state, "") for state, count in counts.items() if count]
    rows += [
        (str(row.get("name", "")), str(row.get("state", "")), str(row.get("reason", "")))
        for row in others[:_MOST_ROWS]
    ]
    if len(others) > _MOST_ROWS:
        rows.append((f"and {len(others) - _MOST_ROWS} more", "", "in the log alone"))
    return Table("How the points ended", ("points", "state", "reason"), tuple(rows), 3)


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)
