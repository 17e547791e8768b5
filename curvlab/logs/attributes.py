"""Attributes of a log by their types: the one place that reads them.

What is empty or of another type reads as absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    """Return an attribute, or what stands in one, if it is a real number that is finite."""
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, int | float | np.integer | np.floating
    ):
        return None
    try:
        return value if math.isfinite(value) else None  # type: ignore[return-value]  # of numpy's kinds as it is
    except OverflowError:  # a whole number beyond every float
        return None


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else None
    except (
        ValueError,
        RecursionError,
    ):  # also numbers of 5,000 digits; brackets nested 100,000 deep
        return None


def _mapping(value: Any) -> dict[str, Any] | None:
    found = value if isinstance(value, dict) else _parsed(value)
    return found if isinstance(found, dict) else None


def _records(value: Any) -> list[dict[str, Any]] | None:
    found = value if isinstance(value, list) else _parsed(value)
    return (
        found if isinstance(found, list) and all(isinstance(one, dict) for one in found) else None
    )


def _seeds(value: Any) -> list[int] | None:
    found = [value] if _number(value) is not None else _parsed(value)
    whole = isinstance(found, list) and all(
        _number(one) is not None and one == int(one) for one in found
    )
    return [int(one) for one in found] if whole else None


_TEXT, _NUMBER, _OBJECT = (
    (_text, "no text"),
    (_number, "no finite number"),
    (_mapping, "no JSON object"),
)
_KINDS: dict[str, tuple[Callable[[Any], Any], str]] = (
    dict.fromkeys(
        ("versions", "call", "settings", "budget", "dampings", "probes", "diverged"), _OBJECT
    )
    | dict.fromkeys(
        ("lr", "batch_size", "samples", "tolerance", "lanczos_draws", "lanczos_steps", "threads"),
        _NUMBER,
    )
    | dict.fromkeys(
        (
            "title",
            "model",
            "data",
            "data_description",
            "algorithm",
            "reference",
            "error",
            "stopped",
        ),
        _TEXT,
    )
    | dict.fromkeys(
        ("git_commit", "created", "device", "dtype", "method", "loss_per", "ef_unit"), _TEXT
    )
    | {
        "damping": _NUMBER,
        "resumed": (_records, "no JSON list of objects"),
        "points": (_records, "no JSON list of objects"),
        "seed": (_seeds, "no seed, nor a list of them"),
    }
)
"""{attribute: (how it is read, what is said of one that cannot be)}"""


def text(ds: xr.Dataset, name: str, default: str = "") -> str:
    """Return a text; `default` where it is absent, empty or no text."""
    return _text(ds.attrs.get(name)) or default


def number(ds: xr.Dataset, name: str) -> float | None:
    """Return a finite number; None where it is absent or is none."""
    return _number(ds.attrs.get(name))


def mapping(ds: xr.Dataset, name: str) -> dict[str, Any]:
    """Return a JSON object as a dictionary; empty where it is absent or is none."""
    return _mapping(ds.attrs.get(name)) or {}


def diverged(ds: xr.Dataset) -> dict[str, list[dict[str, Any]]]:
    """Return where the numbers of a comparison's algorithms left the finite range.

    It is {algorithm: [{seed, step, block, reason}, …]}.
    """
    found = {name: _records(places) or [] for name, places in mapping(ds, "diverged").items()}
    kept = {
        name: [
            p
            for p in places
            if _number(p.get("seed")) is not None and _number(p.get("step")) is not None
        ]
        for name, places in found.items()
    }
    return {name: places for name, places in kept.items() if places}


def seeds(ds: xr.Dataset) -> list[int]:
    """Return the seeds of the run: one, a comparison's, or none where the log does not say."""
    return _seeds(ds.attrs.get("seed")) or []


def resumed(ds: xr.Dataset) -> list[dict[str, Any]]:
    """Return when, by which versions, commit and call the run went on.

    Each time's attributes are text as the log's own.
    """
    return _records(ds.attrs.get("resumed")) or []


def records(ds: xr.Dataset, name: str) -> list[dict[str, Any]]:
    """Return a JSON list of objects; empty where it is absent or is none."""
    return _records(ds.attrs.get(name)) or []


def entry(of: dict[str, Any], name: str) -> float | None:
    """Return a number that stands in an attribute."""
    return _number(of.get(name))


def nested(of: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object that stands in an attribute, as itself or as its text."""
    return _mapping(of.get(name)) or {}


def text_or_number(ds: xr.Dataset, name: str, default: str) -> str:
    """Return a text, or a number in few digits."""
    value = number(ds, name)
    return text(ds, name, default) if value is None else f"{value:g}"


def odd(ds: xr.Dataset) -> dict[str, str]:
    """Return {attribute that is there and cannot be read: what it is not}."""
    return {
        name: what
        for name, (read, what) in _KINDS.items()
        if name in ds.attrs and read(ds.attrs[name]) is None
    }
