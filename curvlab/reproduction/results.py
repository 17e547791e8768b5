"""What came out of the runs of one method on one problem, and its mean over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from numpy.typing import NDArray

_Values = NDArray[np.float64]

AXES = ("epoch", "time")


def cut(ds: xr.Dataset, epochs: int | None, seconds: float | None) -> xr.Dataset:
    """Return the evaluated epochs of a log until a budget is spent, if the run has gone further."""
    ds = ds.dropna("epoch", subset=["train_loss"])
    if epochs is not None:
        ds = ds.sel(epoch=slice(0, epochs))
    if seconds is not None:
        ds = ds.isel(epoch=slice(0, int((ds["wall_seconds"] < seconds).sum()) + 1))
    return ds


@dataclass(frozen=True)
class Result:
    """What came out of the runs of one method on one problem.

    `runs` are the logs of the seeds that stayed finite; `failures` says what became of the others.
    """

    algorithm: str
    arguments: str
    runs: tuple[xr.Dataset, ...]
    failures: tuple[str, ...] = ()

    @cached_property
    def together(self) -> xr.Dataset:
        """The values of all seeds [seed, epoch], at the epochs that all of them have.

        Where time has ended them, each in a part of an epoch, their ends are one; also where some
        ended with an epoch, less than one epoch away.
        """
        names = [name for name in self.runs[0] if self.runs[0][name].dims == ("epoch",)]
        runs = [run[names] for run in self.runs]
        ends = [float(run["epoch"][-1]) for run in runs]
        near = any(end % 1 for end in ends) and max(ends) - min(ends) < 1
        if len(runs) > 1 and (near or all(end % 1 for end in ends)):
            end, least = sum(ends) / len(ends), min(ends)
            for k, run in enumerate(runs):
                *before, _ = run["epoch"].values.astype(float)
                kept = [i for i, epoch in enumerate(before) if epoch < least]
                shared = [before[i] for i in kept]
                runs[k] = run.isel(epoch=[*kept, -1]).assign_coords(epoch=[*shared, end])
        return xr.concat(runs, "seed", join="inner", combine_attrs="override")

    @property
    def clock(self) -> str:
        """The variable of time: that of the process; on a GPU, which works beside it, wall time."""
        return (
            "wall_seconds"
            if str(self.runs[0].attrs.get("device", "cpu")).startswith("cuda")
            else "cpu_seconds"
        )

    def along(self, axis: str) -> _Values:
        """Return epochs, or the mean time at which they ended."""
        ds = self.together
        return np.asarray(
            ds["epoch"] if axis == "epoch" else ds[self.clock].mean("seed"), dtype=float
        )

    def mean(self, measure: str) -> _Values:
        """Return a measure's mean over the seeds, at each epoch that all of them have."""
        return np.asarray(self.together[measure].mean("seed"), dtype=float)

    def spread(self, measure: str) -> _Values:
        """Return a measure's standard deviation over the seeds, at each epoch that all have."""
        return np.asarray(self.together[measure].std("seed"), dtype=float)

    def lowest(self, measure: str) -> float:
        """Return the lowest value of each seed's epochs, on average.

        The document has it so (2.8.2: "choosing the lowest of these values").
        """
        return float(self.together[measure].min("epoch").mean("seed"))

    def at(self, measure: str, axis: str, place: float) -> float:
        """Return the mean at a place, epoch or seconds, by linear interpolation along the axis."""
        return float(np.interp(place, self.along(axis), self.mean(measure)))

    def is_early(self, axis: str, place: float) -> bool:
        """Return whether a place lies between the start and the first record after it."""
        first, *later = self.along(axis)
        return bool(later) and first < place < later[0]

    def told(self, measure: str, epoch: int) -> str:
        """Return a measure's mean ± standard deviation over the seeds after an epoch, in words.

        "" where a seed has no such epoch.
        """
        if epoch not in self.together["epoch"]:
            return ""
        values = self.together[measure].sel(epoch=epoch)
        return f"{float(values.mean()):.4g} ± {float(values.std()):.2g}"


Results = dict[str, dict[str, Result]]
"""{problem: {label: result}}"""
