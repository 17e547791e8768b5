"""Read a run's file into xarray: whole, of a schema that is known.

Nothing in it reaches outside of it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from curvlab.errors import CurvlabError, guard_memory, unknown, warn
from curvlab.logs import attributes
from curvlab.logs.log import SCHEMA
from curvlab.logs.regular import lines, regular
from curvlab.system.atomic import read_sealed
from curvlab.system.escape import for_terminal
from curvlab.system.paths import given


def open_log(path: str | os.PathLike[str]) -> xr.Dataset:
    """Return the data set of a run, loaded whole; no file stays open.

    What of it figures and tables cannot use is named in a CurvlabWarning. The file's attribute
    `schema` stays with the file: what is changed and written elsewhere is no longer as curvlab
    wrote it.

    Args:
        path: the run's `run.h5`, or the folder that holds it.

    Raises:
        CurvlabError: no such file, or one that is damaged, no curvlab log, of a later schema, or
            that links to other files.
    """
    found = _file(path)
    place = for_terminal(found)
    contents, sealed = read_sealed(found)
    try:
        with h5py.File(io.BytesIO(contents), "r") as file:
            _check_structure(file, place)
            schema = file.attrs.get("schema")
        ds = xr.load_dataset(
            io.BytesIO(contents), engine="h5netcdf", decode_times=False, decode_timedelta=False
        )
    except CurvlabError:
        raise
    except Exception as error:  # h5py, h5netcdf and xarray raise a dozen kinds for a damaged file
        reason = for_terminal(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CurvlabError(
            f"the log {place} cannot be read, it is damaged or no HDF5 file ({reason}): restore or"
            " rerun it"
        ) from error
    if "curvlab" not in attributes.mapping(ds, "versions"):
        raise CurvlabError(
            f"{place} is an HDF5 file but no curvlab log, whose attribute 'versions' names"
            " curvlab's: give a run's folder or its run.h5"
        )
    if schema is not None:
        _check_schema(attributes.number(ds, "schema"), sealed, place)
    ds.attrs.pop("schema", None)
    _, odd = regular(ds)
    if odd:
        warn(
            f"in the log {place} some is odd, which figures and tables leave out:"
            f" {for_terminal(lines(odd))}"
        )
    return ds


def open_quickly(path: Path) -> xr.Dataset:
    """Return the data set of a run of this version's, in a fifth of `open_log`'s time.

    It has the numbers, their labels, names and units, and the attributes; it is for who reads
    thousands of logs that it has seen written. What is odd is not looked for.

    Args:
        path: the run's `run.h5`.

    Raises:
        CurvlabError: as `open_log`, and a file without a seal, or of another schema.
    """
    contents, sealed = read_sealed(path)
    place = for_terminal(path)
    try:
        with h5py.File(io.BytesIO(contents), "r") as file:
            _check_structure(file, place)
            attrs = _plain_attributes(file.attrs)
            if not sealed or attrs.pop("schema", None) != SCHEMA:
                raise CurvlabError(f"the log {place} is not as this version of curvlab wrote it")
            found = {
                name: xr.Variable(_dims(each), _plain_values(each), _named(each.attrs))
                for name, each in file.items()
                if isinstance(each, h5py.Dataset) and not _is_bare(each)
            }
    except CurvlabError:
        raise
    except Exception as error:  # as in `open_log`
        raise CurvlabError(f"the log {place} cannot be read: {error}") from error
    labels = {name for name, each in found.items() if each.dims == (name,)}
    return xr.Dataset(
        {name: each for name, each in found.items() if name not in labels},
        {name: found[name] for name in labels},
        attrs,
    )


def _dims(of: h5py.Dataset) -> list[str]:
    """Return the names of a variable's dimensions; a dimension's labels lie along itself."""
    if of.is_scale:
        return [of.name.rpartition("/")[2]]
    return [scales[0].name.rpartition("/")[2] for scales in of.dims]


def _is_bare(of: h5py.Dataset) -> bool:
    """Return whether it stands for a dimension that has no labels."""
    return b"not a netCDF variable" in bytes(of.attrs.get("NAME", b""))


def _plain_values(of: h5py.Dataset) -> Any:
    return of.asstr()[...] if h5py.check_string_dtype(of.dtype) else of[...]


def _named(of: h5py.AttributeManager) -> dict[str, Any]:
    return {name: of[name] for name in ("long_name", "units") if name in of}


def _plain_attributes(of: h5py.AttributeManager) -> dict[str, Any]:
    """Return attributes without those of the formats, numbers as Python's."""
    return {
        name: value.item()
        if isinstance(value, np.generic | np.ndarray) and value.size == 1
        else value
        for name, value in of.items()
        if name not in _OF_THE_FORMAT
    }


_OF_THE_FORMAT = ("_NCProperties", "coordinates", "_nc3_strict")


def _file(path: str | os.PathLike[str]) -> Path:
    """Return the file of a log that is named by itself or by its folder."""
    found = given(path, "log")
    try:
        found = found / "run.h5" if found.is_dir() else found
        there = found.is_file()
    except (OSError, ValueError) as error:  # a name of over 255 bytes, or with a zero byte in it
        raise CurvlabError(f"no log at {for_terminal(os.fspath(path))}: {error}") from error
    if not there:
        raise CurvlabError(f"no log at {for_terminal(found)}: give a run's folder or its run.h5")
    return found


def _check_schema(schema: float | None, sealed: bool, place: str) -> None:
    """Raise CurvlabError for a schema that is none or later, and for a file without its seal."""
    if schema is None or schema != int(schema) or schema < 1:
        raise CurvlabError(
            f"the log {place} has a schema that is no positive number: restore or rerun it"
        )
    if schema > SCHEMA:
        raise CurvlabError(
            f"the log {place} is of schema {schema:.0f}, which a later curvlab wrote; this one"
            f" reads up to {SCHEMA}: update it"
        )
    if not sealed:
        raise CurvlabError(
            f"the log {place} is not as curvlab wrote it, its checksum is absent: restore or rerun"
            " it (or, if another program changed it as you meant, take its attribute 'schema' out)"
        )


def _check_structure(file: h5py.File, place: str) -> None:
    """Raise CurvlabError where a file holds anything by reference, before anything of it is read.

    What it refers to may be any file of this machine.
    """
    size = 0
    for name, what in _entries(file):
        reason = ""
        if isinstance(what, h5py.SoftLink | h5py.ExternalLink):
            reason = "is a link to another place"
        elif isinstance(what, h5py.Dataset) and what.external:
            reason = "keeps its values in other files"
        elif isinstance(what, h5py.Dataset) and what.is_virtual:
            reason = "is put together from other data sets"
        elif isinstance(what, h5py.Dataset):
            size += what.size * what.dtype.itemsize if what.size else 0
        if reason:
            raise CurvlabError(
                f"the log {place} is refused: '{for_terminal(name)}' in it {reason}, which no"
                " curvlab log does"
            )
    guard_memory(size, f"the log {place}", "it is damaged, or no log of a run")


def _entries(
    group: h5py.Group, seen: frozenset[object] = frozenset()
) -> Iterator[tuple[str, object]]:
    """Yield (name, what it is) of all that a file holds; links as they are, none is followed."""
    seen |= {group.id}
    for name in group:
        link = group.get(name, getlink=True)
        what = group[name] if isinstance(link, h5py.HardLink) else link
        yield f"{group.name.rstrip('/')}/{name}", what
        if isinstance(what, h5py.Group) and what.id not in seen:
            yield from _entries(what, seen)


def late_cosine(ds: xr.Dataset) -> xr.DataArray:
    """Return the mean cosine over the last three quarters of the logged steps.

    Its dimensions are (algorithm, block[, seed]). Steps where a direction is zero have none. NaN of
    a method whose numbers left the finite range on the way (`diverged`).
    """
    late = ds["cosine"].isel(step=slice(ds.sizes["step"] // 4, None))
    mean = late.mean("step", keep_attrs=True)
    for name, places in attributes.diverged(ds).items():
        for place in places:
            lost = mean["algorithm"] == name
            if "seed" in mean.dims:
                lost = lost & (mean["seed"] == place["seed"])
            mean = mean.where(~lost)
    return mean


def cosine_to(ds: xr.Dataset, other: str) -> xr.DataArray:
    """Return the cosine of every direction of a comparison to that of `other`, whichever moved.

    Its dimensions are (step, algorithm, block[, seed]).

    Raises:
        CurvlabError: the log has no such algorithm.
    """
    if "gram" not in ds or other not in ds["other"].values:
        known = ds["other"].values.tolist() if "gram" in ds else []
        raise unknown("algorithm of this log", other, known)
    gram = ds["gram"]
    squares = [
        gram.sel(algorithm=a, other=a).drop_vars(["algorithm", "other"])
        for a in gram["algorithm"].values
    ]
    lengths = xr.concat(squares, gram["algorithm"]) ** 0.5
    cosine: xr.DataArray = gram.sel(other=other) / (
        lengths * lengths.sel(algorithm=other).drop_vars("algorithm")
    )
    cosine = cosine.transpose(*(d for d in gram.dims if d != "other")).rename("cosine")
    return cosine.assign_attrs(
        long_name=f"cosine similarity to the direction of {other}", units="1"
    )
