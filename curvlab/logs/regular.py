"""A log as figures and tables take it: what is odd is left out, and named.

A log may come from anyone. Here it is decided once what a coordinate and a variable must be;
whoever shows a log reads it from `regular` and meets numbers along known dimensions, labels that
are text and differ, steps that are finite.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xarray as xr

from curvlab.logs import attributes

_EPOCH = ("epoch",)
_PAIRS = ("epoch", "algorithm", "block", "pair", "stage")
_SPECTRUM = ("step", "matrix", "block")
_SEEN = ("step", "algorithm", "block")
_DIMS: dict[str, tuple[str, ...]] = (
    {
        "cosine": _SEEN,
        "gram": ("step", "algorithm", "other", "block"),
        "loss": ("step",),
        "seconds": ("step", "algorithm"),
    }
    | dict.fromkeys(
        ("train_loss", "val_loss", "train_error", "val_error", "steps", "wall_seconds"), _EPOCH
    )
    | dict.fromkeys(("train_bits_per_symbol", "val_bits_per_symbol"), _EPOCH)
    | dict.fromkeys(("evaluation_seconds", "warm_start_seconds", "probe_seconds"), _EPOCH)
    | dict.fromkeys(("pairs_within_mu1", "pairs_within_2mu1", "pair_curvature_mean"), _PAIRS)
    | dict.fromkeys(("tightness_low", "tightness_high"), (*_SEEN, "factor"))
    | dict.fromkeys(("update_norm_B", "update_bound_B", "update_norm_H", "update_bound_H"), _SEEN)
    | dict.fromkeys(("lowest", "highest", "trace", "negative", "unresolved"), _SPECTRUM)
    | dict.fromkeys(("lowest_error", "highest_error", "trace_error", "negative_error"), _SPECTRUM)
    | {"density": (*_SPECTRUM, "bin"), "order": ("block",), "lower": ("bin",), "upper": ("bin",)}
    | {"parameters": ("block",), "route": ("block",)}
)
"""{variable that a figure or a table asks for by name: its dimensions}; `step` stands for any axis
of steps.
"""

_WITH: dict[str, tuple[str, ...]] = {
    "train_loss": ("steps", "wall_seconds"),
    "cosine": ("parameters",),
    "density": ("lowest", "highest", "trace", "negative", "order", "lower", "upper"),
    "tightness_low": (
        "tightness_high",
        "update_norm_B",
        "update_bound_B",
        "update_norm_H",
        "update_bound_H",
    ),
    "pairs_within_mu1": ("pairs_within_2mu1", "pair_curvature_mean"),
}
"""{variable: those that stand beside it in every log}"""

_WORDS = ("parameters", "route")
_BESIDE = ("order", "lower", "upper", *_WORDS)
"""Coordinates beside the labels."""
_NUMBERED = ("step", "epoch", "seed", "index", "bin")
_GRID = ("lr", "damping")
"""Dimensions of every sweep; its further ones say by an attribute `grid` that they are numbers."""
_OF_SWEEPS = ("score", "state")
"""What figures and tables of a sweep show; its curves by epoch are for `open_log` alone."""
_MUST = (
    "step",
    "epoch",
    "seed",
    "algorithm",
    "other",
    "block",
    "matrix",
    "pair",
    "stage",
    "factor",
)
"""Dimensions that a log has labels of."""
_FURTHEST = 1e18
"""No step, epoch or seed lies beyond."""
_SAID = ("long_name", "units", "flag_values", "flag_meanings", "grid")


def regular(ds: xr.Dataset) -> tuple[xr.Dataset, list[str]]:
    """Return (the log without what is odd, in words what that was)."""
    odd = attributes.odd(ds)
    said = [f"attribute '{name}' is {what}" for name, what in odd.items()]
    coords: dict[str, xr.Variable] = {}
    data: dict[str, xr.Variable] = {}
    for dim in map(str, ds.sizes):
        labels, fault = _labelled(ds, dim)
        said += [fault] if fault else []
        coords |= {} if labels is None else {dim: labels}
    for name, values in ds.variables.items():
        if name in ds.sizes or (
            name in _MUST and not values.ndim
        ):  # of a log that was cut to one seed
            continue
        if set(_GRID) <= set(map(str, values.dims)) and name not in _OF_SWEEPS:
            continue
        fault = _fault(values, str(name))
        said += [f"variable '{name}' {fault}"] if fault else []
        if not fault:
            (coords if name in _BESIDE or name in ds.coords else data)[str(name)] = _plain(
                values, str(name)
            )
    beside = [name for main, names in _WITH.items() if main in data for name in names]
    said += [f"variable '{name}' is absent" for name in beside if name not in ds.variables]
    return xr.Dataset(data, coords, {k: v for k, v in ds.attrs.items() if k not in odd}), said


def unique(labels: Iterable[object]) -> list[str]:
    """Return labels as text; one that was there before gets a number."""
    found: dict[str, None] = {}
    for label in map(str, labels):
        again = 2
        name = label
        while name in found:
            name, again = f"{label} ({again})", again + 1
        found[name] = None
    return list(found)


def lines(said: list[str], most: int = 4) -> str:
    """Return all that is odd as one line."""
    more = f" and {len(said) - most} more" if len(said) > most else ""
    return "; ".join(said[:most]) + more


def _labelled(ds: xr.Dataset, dim: str) -> tuple[xr.Variable | None, str]:
    """Return labels along `dim` that can be used, and what those were that could not.

    The labels are None where the dimension needs none.
    """
    there = dim in ds.variables and ds.variables[dim].dims == (dim,)
    numbered = dim in (*_NUMBERED, *_GRID) or dim.endswith("_step")
    numbered = numbered or (there and ds.variables[dim].attrs.get("grid") == "number")
    if not there and dim not in _MUST and not numbered:
        return None, ""
    values = ds.variables[dim].values if there else np.arange(ds.sizes[dim])
    fault = "" if there or dim not in _MUST else f"coordinate '{dim}' is absent"
    if numbered and not (
        values.dtype.kind in "iuf" and (np.abs(values.astype(float)) < _FURTHEST).all()
    ):
        fault, values = (
            f"coordinate '{dim}' has values that are no numbers of it",
            np.arange(ds.sizes[dim]),
        )
    elif not numbered:
        words = unique(values.tolist())
        if there and (values.dtype.kind not in "UO" or words != values.tolist()):
            fault = f"coordinate '{dim}' has labels that are no texts that differ"
        values = np.asarray(words, dtype=object)
    return xr.Variable(dim, values, _said(ds.variables[dim]) if there else {}), fault


def _fault(values: xr.Variable, name: str) -> str:
    """Return what is wrong with a variable; empty: nothing."""
    wanted = _DIMS.get(name)
    if name not in _WORDS and values.dtype.kind not in "iufb":
        return "holds no numbers"
    if not values.size:
        return "is empty"
    if wanted is not None and sorted(_dims(values)) != sorted(wanted):
        return f"lies along ({', '.join(map(str, values.dims))}), not ({', '.join(wanted)})"
    return ""


def _dims(values: xr.Variable) -> list[str]:
    return ["step" if str(d).endswith("_step") else str(d) for d in values.dims if d != "seed"]


def _plain(values: xr.Variable, name: str) -> xr.Variable:
    """Return numbers in double precision, in the order of dimensions that the variable has."""
    if name in _DIMS:
        places = dict(zip(_dims(values), (d for d in values.dims if d != "seed"), strict=True))
        values = values.transpose(
            *(d for d in values.dims if d == "seed"), *(places[d] for d in _DIMS[name])
        )
    if name in _WORDS:
        plain = np.array([str(word) for word in values.values.flat], dtype=object).reshape(
            values.shape
        )
    else:
        plain = values.values.astype(float)
    return xr.Variable(values.dims, plain, _said(values))


def _said(values: xr.Variable) -> dict[str, str]:
    return {name: values.attrs[name] for name in _SAID if isinstance(values.attrs.get(name), str)}
