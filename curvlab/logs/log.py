"""Records ⇄ xarray ⇄ netCDF-4/HDF5, whole on disk at any moment, and sealed (`atomic`).

A file is made in memory and reaches the disk as bytes, so that the HDF5 library never meets a full
one. The schema (dimensions, variables, attributes) stands in the documentation, "The log".
"""

from __future__ import annotations

import io
import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from curvlab.errors import CurvlabError, cause_of
from curvlab.system.atomic import rewrite_sealed

Record = Mapping[str, tuple[tuple[str, ...], NDArray[np.float64]]]

SCHEMA = 1
"""Attribute `schema` of what is written: it grows where something is no longer there, or means
another thing.
"""

SAVE_EVERY = 5.0
"""Seconds between saves …"""
SAVE_SHARE = 0.005
"""… unless saving would cost more than this share of the run: with records, whose cost is apart,
the log is within 1 %.
"""

Chunk = tuple[list[float], dict[str, tuple[tuple[str, ...], NDArray[np.float64]]]]
"""Places along an axis of its own, and {variable: (dimensions beside the axis, values [place,
…])}.
"""


class Log:
    """Gathers records in memory and rewrites one file.

    What is taken more rarely has an axis of its own (`extend`).

    Args:
        coordinates: {dimension: labels} of every dimension but `dimension`, with further
            coordinates as {name: (dim, labels)}; what is no text as an `xr.Variable`.
        variables: {variable: attributes} (long_name, units); the step's own are iterations unless
            they stand here.
        attributes: of the file; values that are not strings or numbers are stored as JSON.
        path: of the file, or None to keep the log in memory.
        seeds: the seeds that will come; with several the data set gets a dimension `seed`.
        dimension: along which records come.
    """

    def __init__(
        self,
        coordinates: Mapping[str, Sequence[str] | tuple[str, Sequence[str]] | xr.Variable],
        variables: Mapping[str, Mapping[str, str]],
        attributes: Mapping[str, Any],
        path: Path | None = None,
        seeds: Sequence[int] = (0,),
        dimension: str = "step",
    ) -> None:
        self.dimension = dimension
        self.coordinates, self.variables, self.path, self.seeds = (
            coordinates,
            variables,
            path,
            tuple(seeds),
        )
        self.attributes: dict[str, Any] = provenance() | {
            k: v if isinstance(v, str | int | float) else json.dumps(v)
            for k, v in attributes.items()
        }
        self._steps: dict[int, list[float]] = {}
        self._records: dict[int, list[Record]] = {}
        self._further: dict[int, dict[str, list[Chunk]]] = {}
        self._saved = 0.0
        self._cost = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._steps.values()))

    def append(
        self, step: float, record: Record, seed: int | None = None, *, save: bool | None = None
    ) -> None:
        """Add one step's record, and save if that is asked for or, by default, if it is due.

        It is due after the first record, then every few seconds.

        Args:
            step: the place along the log's dimension.
            record: {variable: (dimensions, values)} of the step.
            seed: of the run; the first one where None.
            save: whether to save; None: if it is due.
        """
        seed = self.seeds[0] if seed is None else seed
        self._steps.setdefault(seed, []).append(step)
        self._records.setdefault(seed, []).append(record)
        now = time.monotonic()
        if save is None:
            save = now - self._saved >= max(SAVE_EVERY, self._cost / SAVE_SHARE)
        if self.path and save:
            self.save()

    def extend(
        self,
        axis: str,
        places: Sequence[float],
        values: Mapping[str, tuple[tuple[str, ...], NDArray[np.float64]]],
        seed: int | None = None,
    ) -> None:
        """Add to variables that lie along an axis of their own, and save nothing.

        Args:
            axis: the axis.
            places: along it.
            values: {variable: (dimensions beside the axis, values [place, …])}.
            seed: of the run; the first one where None.
        """
        tracks = self._further.setdefault(self.seeds[0] if seed is None else seed, {})
        tracks.setdefault(axis, []).append((list(places), dict(values)))

    def since(self, axis: str, place: float) -> dict[str, NDArray[np.float64]]:
        """Return {variable: values along an axis of its own, from `place` on}.

        They are of the first seed; empty where there are none.
        """
        places, values = _whole(self._further.get(self.seeds[0], {}).get(axis, []))
        first = sum(p < place for p in places)
        return {name: v[first:] for name, (_, v) in values.items()}

    def dataset(self) -> xr.Dataset:
        """Return all records so far; steps that a seed has not reached are NaN.

        Raises:
            CurvlabError: there is no record yet.
        """
        parts = [self._of(seed) for seed in self._steps]
        if not parts:
            raise CurvlabError("the log has no record yet")
        if len(self.seeds) > 1:
            index = xr.DataArray(
                list(self._steps),
                dims="seed",
                name="seed",
                attrs={"long_name": "seed", "units": "1"},
            )
            ds = xr.concat(
                parts, dim=index, join="outer", data_vars="all", coords="minimal", compat="override"
            )
        else:
            ds = parts[0]
        ds.attrs = dict(self.attributes)
        return ds

    def _of(self, seed: int) -> xr.Dataset:
        records = self._records[seed]
        data = {
            name: (
                (self.dimension, *dims),
                np.stack([r[name][1] for r in records]),
                dict(self.variables.get(name, {})),
            )
            for name, (dims, _) in records[0].items()
        }
        places = {}
        for axis, chunks in self._further.get(seed, {}).items():
            places[axis], values = _whole(chunks)
            data |= {
                n: ((axis, *dims), v, dict(self.variables.get(n, {})))
                for n, (dims, v) in values.items()
            }
        used = {d for dims, *_ in data.values() for d in dims}
        of_step = self.variables.get(self.dimension, {"long_name": "iteration", "units": "1"})
        coords: dict[str, Any] = {
            self.dimension: (self.dimension, self._steps[seed], dict(of_step))
        }
        for axis, steps in places.items():
            coords[axis] = (
                axis,
                steps,
                dict(self.variables.get(axis, {"long_name": axis, "units": "1"})),
            )
        for name, value in self.coordinates.items():
            if isinstance(value, xr.Variable):
                if value.dims[0] in used:
                    coords[name] = value
                continue
            dim, labels = value if isinstance(value, tuple) else (name, value)
            if dim in used:
                coords[name] = (
                    dim,
                    np.asarray(labels, dtype=object),
                    {"long_name": name, "units": "1"},
                )
        return xr.Dataset(data, coords)

    def state_dict(self, until: float = math.inf) -> dict[str, Any]:
        """Return attributes, records up to step `until`, and all along other axes.

        They are tensors, numbers, strings, lists and dictionaries only.
        """
        steps = {
            seed: [step for step in steps if step <= until] for seed, steps in self._steps.items()
        }
        records = {
            seed: [
                {k: [list(d), v.tolist()] for k, (d, v) in r.items()}
                for r in self._records[seed][: len(kept)]
            ]
            for seed, kept in steps.items()
        }
        further = {
            seed: {axis: _packed(_whole(chunks)) for axis, chunks in tracks.items()}
            for seed, tracks in self._further.items()
        }
        return {
            "attributes": dict(self.attributes),
            "steps": steps,
            "records": records,
            "further": further,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take attributes and records from what `state_dict` returned, in place of its own."""
        self.attributes, self._steps = (
            dict(state["attributes"]),
            {k: list(v) for k, v in state["steps"].items()},
        )
        self._records = {
            s: [{k: (tuple(d), np.asarray(v)) for k, (d, v) in r.items()} for r in rs]
            for s, rs in state["records"].items()
        }
        self._further = {
            seed: {axis: [_unpacked(packed)] for axis, packed in tracks.items()}
            for seed, tracks in state.get("further", {}).items()
        }

    def save(self) -> None:
        """Rewrite the file, which is whole at any moment (`atomic`).

        Raises:
            CurvlabError: it cannot be written; the old file stays.
        """
        if self.path is None or not self._steps:
            return
        start = time.monotonic()
        contents = in_memory(self.dataset().assign_attrs(schema=SCHEMA))
        try:
            rewrite_sealed(self.path, lambda stream: stream.write(contents))
        except OSError as error:
            raise CurvlabError(
                f"the log {self.path} cannot be written: {cause_of(error)}"
            ) from error
        self._saved = time.monotonic()
        self._cost = self._saved - start


def in_memory(ds: xr.Dataset) -> memoryview:
    """Return the bytes of the netCDF-4 file of a data set."""
    held = io.BytesIO()
    with h5netcdf.File(held, "w") as file:
        ds.dump_to_store(xr.backends.H5NetCDFStore(file))
    return held.getbuffer()


def _whole(chunks: list[Chunk]) -> Chunk:
    """Return all chunks as one, which takes their place."""
    if len(chunks) > 1:
        dims = {name: d for name, (d, _) in chunks[0][1].items()}
        values = {
            name: (d, np.concatenate([c[1][name][1] for c in chunks])) for name, d in dims.items()
        }
        chunks[:] = [([place for c in chunks for place in c[0]], values)]
    return chunks[0] if chunks else ([], {})


def _packed(chunk: Chunk) -> dict[str, Any]:
    places, values = chunk
    return {
        "places": list(places),
        "values": {k: [list(dims), torch.from_numpy(v)] for k, (dims, v) in values.items()},
    }


def _unpacked(packed: dict[str, Any]) -> Chunk:
    return list(packed["places"]), {
        k: (tuple(dims), v.cpu().numpy()) for k, (dims, v) in packed["values"].items()
    }


def provenance() -> dict[str, str]:
    """Return versions, git commit of the checkout that curvlab runs from, time of creation."""
    versions = {"python": platform.python_version(), "h5netcdf": h5netcdf.__version__}
    versions |= {name: metadata.version(name) for name in ("curvlab", "torch", "numpy", "xarray")}
    return {
        "versions": json.dumps(versions),
        "git_commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str:
    """Return the commit of the checkout that curvlab runs from.

    It ends in "+changes" where files differ from it. Where curvlab is an installed copy it says so.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown (an installed copy, not a checkout)"

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown (git did not answer)"
