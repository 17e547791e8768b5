"""The result of a sweep as one data set: variables by (algorithm, lr, damping, …, seed, epoch).

All in it follows from the settings and from the numbers of the points. What is of the moment
(seconds, the date) is a data set apart, in the group `times` of the same file.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import xarray as xr

from curvlab.errors import CurvlabError, cause_of
from curvlab.logs.log import SCHEMA, provenance
from curvlab.logs.reading import late_cosine
from curvlab.logs.swept import STATES
from curvlab.sweeps.points import Outcome, Point, SweepSettings
from curvlab.system.atomic import rewrite_sealed

Series = Mapping[str, xr.DataArray]

_RENAMED = {"lr": "lr_of_epoch", "damping": "damping_of_epoch"}
"""Variables of a training log that are dimensions here."""

_SHARED = (
    *("model", "data", "data_description", "error", "device", "dtype", "batch_size"),
    *("loss_per", "ef_unit"),
)
"""Attributes of the points that are the sweep's where all have the same."""


@dataclass
class Gathered:
    """What is known of the points so far.

    Args:
        settings: of the sweep.
        points: all of them.
        call: the log's attribute of what was asked for.
    """

    settings: SweepSettings
    points: list[Point]
    call: Mapping[str, Any] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    scores: dict[str, xr.DataArray] = field(default_factory=dict)
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    shared: list[dict[str, Any]] = field(default_factory=list)

    def add(self, point: Point, outcome: Outcome, ds: xr.Dataset | None) -> None:
        """Take in how a point ended, and its log where that is whole."""
        name = point.name
        self.outcomes[name] = outcome
        if ds is None:
            return
        compared = self.settings.command == "compare"
        self.series[name] = _compared(ds) if compared else _trained(ds)
        self.times[name] = _times(ds)
        self.shared.append({k: ds.attrs[k] for k in _SHARED if k in ds.attrs})
        if compared:
            self.scores[name] = late_cosine(ds).mean("block").reset_coords(drop=True)
        elif outcome.state == "done" and self.settings.best in ds:
            self.scores[name] = ds[self.settings.best].min().reset_coords(drop=True)

    def said(self, name: str) -> str:
        """Return in a few words how a point ended."""
        outcome = self.outcomes[name]
        if outcome.state != "done":
            return f"{outcome.state}: {outcome.reason}"
        if self.settings.command == "train" and name in self.scores:
            return f"{self.settings.best.replace('_', ' ')} {float(self.scores[name]):.5g}"
        return outcome.state


def _trained(ds: xr.Dataset) -> Series:
    """Return the variables of a training log by epoch alone, without times."""
    return {
        _RENAMED.get(str(name), str(name)): values.rename(_RENAMED.get(str(name), str(name)))
        for name, values in ds.data_vars.items()
        if values.dims == ("epoch",) and not str(name).endswith("_seconds")
    }


def _compared(ds: xr.Dataset) -> Series:
    found = {name: ds[name].reset_coords(drop=True) for name in ("loss", "cosine") if name in ds}
    return found | {"late_cosine": late_cosine(ds).reset_coords(drop=True)}


def _times(ds: xr.Dataset) -> dict[str, float]:
    if "epoch" in ds.dims:
        names = [str(name) for name in ds.data_vars if str(name).endswith("_seconds")]
        return {name: float(ds[name][-1]) for name in names}
    return {"seconds": float(ds["seconds"].sum())} if "seconds" in ds else {}


def gather(of: Gathered) -> tuple[xr.Dataset, xr.Dataset]:
    """Return the data set of a sweep, and that of its times."""
    coords = _coordinates(of)
    data: dict[str, xr.Variable] = {}
    names = list(dict.fromkeys(name for series in of.series.values() for name in series))
    for name in names:
        values = {point: series[name] for point, series in of.series.items() if name in series}
        data[name] = _filled(of, coords, values, next(iter(values.values())).attrs)
    least = of.settings.command == "train"
    said = (
        f"least {of.settings.best.replace('_', ' ')} at the end of an epoch"
        if least
        else "mean cosine to the reference over blocks and the last three quarters of the steps"
    )
    units = next((s[of.settings.best].attrs.get("units", "1") for s in of.series.values()
                  if of.settings.best in s), "1")  # fmt: skip
    about = {"long_name": said, "units": str(units) if least else "1"}
    empty = xr.DataArray(np.nan) if least else xr.DataArray(np.empty(0), dims="algorithm")
    scores: dict[str, xr.DataArray] = of.scores or {of.points[0].name: empty}
    data["score"] = _filled(of, coords, scores, about)
    states = {p.name: xr.DataArray(float(_number(of, p.name))) for p in of.points}
    flags = {
        "long_name": "how the point ended",
        "units": "1",
        "flag_values": " ".join(str(i) for i in range(len(STATES))),
        "flag_meanings": "; ".join(STATES),
    }
    data["state"] = _filled(of, coords, states, flags)
    used = {d for values in data.values() for d in values.dims}
    ds = xr.Dataset(data, {k: v for k, v in coords.items() if k in used}, _attributes(of))
    return ds, _of_times(of, coords)


def _number(of: Gathered, name: str) -> int:
    return STATES.index(of.outcomes[name].state) if name in of.outcomes else 0


def _of_times(of: Gathered, coords: Mapping[str, xr.Variable]) -> xr.Dataset:
    names = list(dict.fromkeys(name for times in of.times.values() for name in times))
    data = {
        name: _filled(
            of,
            coords,
            {p: xr.DataArray(times[name]) for p, times in of.times.items() if name in times},
            {"long_name": name.replace("_", " ").replace("seconds", "time"), "units": "s"},
        )
        for name in names
    }
    used = {d for values in data.values() for d in values.dims}
    return xr.Dataset(
        data,
        {k: v for k, v in coords.items() if k in used},
        {"created": provenance()["created"]},
    )


def _coordinates(of: Gathered) -> dict[str, xr.Variable]:
    """Return the labels of all dimensions: numbers ascend, words are in the order of the sweep."""
    found = {}
    for name in ("algorithm", *of.settings.axes, "seed"):
        labels = [p.place[name] for p in of.points if name in p.place]
        if labels:
            found[name] = _axis(name, labels)
    for dim in ("algorithm", "epoch", "step", "block"):
        arrays = [a for series in of.series.values() for a in series.values() if dim in a.dims]
        if arrays and dim not in found:
            found[dim] = _axis(dim, [label for a in arrays for label in a[dim].values.tolist()])
    return found


def _axis(name: str, labels: Iterable[Any]) -> xr.Variable:
    kept = list(dict.fromkeys(labels))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in kept)
    attrs = {"long_name": "learning rate" if name == "lr" else name, "units": "1"}
    if not numbers:
        words = [str(v).lower() if isinstance(v, bool) else str(v) for v in kept]
        return xr.Variable(name, np.asarray(words, dtype=object), attrs)
    whole = all(isinstance(v, int) for v in kept) and name not in ("lr", "damping", "epoch", "step")
    if name not in ("epoch", "step", "seed"):
        attrs |= {"grid": "number"}
    return xr.Variable(name, np.asarray(sorted(kept), dtype=int if whole else float), attrs)


def _filled(
    of: Gathered,
    coords: Mapping[str, xr.Variable],
    values: Mapping[str, xr.DataArray],
    attrs: Mapping[str, Any],
) -> xr.Variable:
    """Return values of points as one array along all dimensions, NaN where there is none."""
    order = ["algorithm", *of.settings.axes, "seed", "epoch", "step", "block"]
    own = next(iter(values.values())).dims if values else ()
    places = [p.place for p in of.points if p.name in values]
    dims = [d for d in order if d in own or (places and d in places[0])]
    numbers = {d: {v: i for i, v in enumerate(coords[d].values.tolist())} for d in dims}
    array = np.full([len(numbers[d]) for d in dims], np.nan)
    for point in of.points:
        if point.name not in values:
            continue
        value = values[point.name]
        at = [
            [_found(numbers[d], label) for label in value[d].values.tolist()]
            if d in value.dims
            else [_found(numbers[d], point.place[d])]
            for d in dims
        ]
        inside = value.transpose(*(d for d in dims if d in value.dims)).values.astype(float)
        array[np.ix_(*at)] = inside.reshape([len(places) for places in at])
    return xr.Variable(dims, array, dict(attrs))


def _found(numbers: Mapping[Any, int], label: Any) -> int:
    return numbers[str(label).lower() if isinstance(label, bool) else label]


def _attributes(of: Gathered) -> dict[str, Any]:
    settings = of.settings
    said = " × ".join(["algorithm", *settings.axes, "seed"])
    known = provenance()
    found: dict[str, Any] = {"versions": known["versions"], "git_commit": known["git_commit"]}
    found |= {
        "title": f"curvlab sweep: {settings.command} over {said}",
        "call": json.dumps(dict(of.call)),
        "best": settings.best,
        "sense": "least" if settings.command == "train" else "most",
        "threads": settings.threads,
        "seed": json.dumps(list(settings.seeds)),
        "algorithm": ", ".join(name for name in settings.grids if name) or "see each point's log",
        "sweep": json.dumps(settings.plain()),
        "points": json.dumps([_row(of, point) for point in of.points]),
    }
    for name in _SHARED:
        said_by = [one.get(name) for one in of.shared]
        if said_by and said_by[0] is not None and all(v == said_by[0] for v in said_by):
            found[name] = said_by[0]
    return found


def _row(of: Gathered, point: Point) -> dict[str, Any]:
    outcome = of.outcomes.get(point.name)
    row: dict[str, Any] = {"name": point.name, "place": dict(point.place)}
    row |= {
        "state": STATES[_number(of, point.name)],
        "reason": outcome.reason if outcome is not None else "",
    }
    if of.settings.command == "train" and point.name in of.scores:
        row["score"] = float(of.scores[point.name])
    return row


def write(path: Path, ds: xr.Dataset, times: xr.Dataset) -> None:
    """Write both data sets into one sealed file, whole or not at all.

    Raises:
        CurvlabError: it cannot be written.
    """
    held = io.BytesIO()
    with h5netcdf.File(held, "w") as file:
        ds.assign_attrs(schema=SCHEMA).dump_to_store(xr.backends.H5NetCDFStore(file))
        times.dump_to_store(xr.backends.H5NetCDFStore(file, group="times"))
    try:
        rewrite_sealed(path, lambda stream: stream.write(held.getbuffer()))
    except OSError as error:
        raise CurvlabError(f"the log {path} cannot be written: {cause_of(error)}") from error
