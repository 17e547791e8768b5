"""What the log of a sweep says: the best place of each algorithm, and how every point ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from curvlab.logs import attributes

STATES = ("not run yet", "done", "diverged", "failed", "killed")
"""What the numbers of the variable `state` mean; NaN where the sweep has no such point."""


@dataclass(frozen=True)
class BestPlace:
    """The best place of an algorithm.

    Args:
        algorithm: its name.
        place: {axis: value}.
        score: the mean over seeds.
        spread: the standard deviation over seeds; NaN of one seed.
        edges: axes on whose first or last value the place lies.
    """

    algorithm: str
    place: Mapping[str, Any]
    score: float
    spread: float
    edges: tuple[str, ...]


def axes(ds: xr.Dataset) -> list[str]:
    """Return the axes of the grid: `lr`, `damping`, the others."""
    return [str(d) for d in ds["score"].dims if d not in ("algorithm", "seed")]


def most_is_best(ds: xr.Dataset) -> bool:
    """Return whether the score is to be large (a cosine), and not small (a loss)."""
    return attributes.text(ds, "sense") == "most"


def mean_score(ds: xr.Dataset) -> xr.DataArray:
    """Return the mean of the score over seeds; NaN where a seed has none."""
    score = ds["score"]
    return score.mean("seed", skipna=False, keep_attrs=True) if "seed" in score.dims else score


def best_places(ds: xr.Dataset) -> list[BestPlace]:
    """Return the best place of each algorithm that has one, in the order of the log."""
    mean, found = mean_score(ds), []
    for name in ds["algorithm"].values:
        of = mean.sel(algorithm=name)
        if not bool(of.notnull().any()):
            continue
        at = of.argmax(...) if most_is_best(ds) else of.argmin(...)
        assert isinstance(at, dict)
        place = {axis: of[axis].values[int(at[axis])] for axis in axes(ds)}
        seeds = ds["score"].sel(algorithm=name).isel(at)
        spread = float(seeds.std(ddof=1)) if seeds.size > 1 else np.nan
        edges = tuple(axis for axis in axes(ds) if _at_the_edge(ds, name, axis, int(at[axis])))
        found.append(BestPlace(str(name), place, float(of.isel(at)), spread, edges))
    return found


def _at_the_edge(ds: xr.Dataset, algorithm: str, axis: str, at: int) -> bool:
    """Return whether a place is the first or the last of an algorithm's own on a numbered axis."""
    if ds[axis].dtype.kind not in "iuf":
        return False
    state = ds["state"]
    of = state.sel(algorithm=algorithm) if "algorithm" in state.dims else state
    there = of.notnull().any([d for d in of.dims if d != axis])
    places = np.flatnonzero(there.values)
    return len(places) > 2 and at in (places[0], places[-1])


def rows(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return how the points ended: [{name, place, state, reason, score}, …]."""
    return attributes.records(ds, "points")


def best_points(ds: xr.Dataset) -> list[str]:
    """Return the names of the points at each algorithm's best place, of the first seed there."""
    found = []
    for best in best_places(ds):
        wanted = {"algorithm": best.algorithm} | {k: str(v) for k, v in best.place.items()}
        for row in rows(ds):
            place = row.get("place")
            if isinstance(place, dict) and all(
                _same(value, wanted[name]) for name, value in place.items() if name in wanted
            ):
                found.append(str(row.get("name")))
                break
    return list(dict.fromkeys(found))


def _same(value: Any, wanted: str) -> bool:
    """Return whether a value of a point is a label of an axis, of which numbers may be floats."""
    if isinstance(value, bool | str):
        return str(value).lower() == wanted.lower()
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return False
