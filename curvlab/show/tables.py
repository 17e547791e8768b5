"""Tables of a log alone: its numbers as text, one function a table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from curvlab.logs import attributes
from curvlab.logs.reading import late_cosine
from curvlab.logs.regular import regular
from curvlab.show.sweep_tables import best_of_sweep, points_of_sweep
from curvlab.show.text_table import Table as Table

MISSING = "–"
MOST_ROWS, MOST_CELLS = 500, 6000
"""Rows and cells of a table at most; what is longer stays in the log."""
WIDEST = 12
"""Columns of blocks at most; where there are more, blocks go down."""

ROUNDING = 1e-4
"""Part of itself by which an eigenvalue in single precision may lie outside its bound."""

SPECTRUM = ("lowest", "highest", "trace", "negative")
SCORES = (
    "train_loss",
    "val_loss",
    "train_error",
    "val_error",
    "train_bits_per_symbol",
    "val_bits_per_symbol",
)


def formatted(value: Any, form: str = ".4g") -> str:
    """Return a number as text; NaN and what is absent is a dash."""
    return MISSING if value is None or math.isnan(value) else f"{float(value):{form}}"


def _of_seeds(ds: xr.Dataset) -> xr.Dataset:
    """Return a log without the dimension of seeds where there is one seed alone."""
    return ds.squeeze("seed", drop=True) if ds.sizes.get("seed") == 1 else ds


def cosines(ds: xr.Dataset) -> Table:
    """Tabulate the mean cosine to the reference by layer; of several seeds mean and spread."""
    ds = _of_seeds(ds)
    late, reference = late_cosine(ds), attributes.text(ds, "reference")
    names = [str(name) for name in ds["algorithm"].values if name != reference]
    over = f", mean ± standard deviation of {ds.sizes['seed']} seeds" if "seed" in ds.dims else ""
    caption = (
        f"Mean cosine to {reference or 'the reference'} over the last three quarters of the"
        f" steps{over}"
    )
    shown = names[: max(1, MOST_CELLS // ds.sizes["block"])]
    notes: tuple[tuple[str, str], ...] = ()
    if len(shown) < len(names):
        notes = ((f"{len(names) - len(shown)} more", "algorithms, in the log alone"),)
    lost = {
        name: _lost(ds, places) for name, places in attributes.diverged(ds).items() if name in shown
    }
    notes += tuple(
        (name, f"{says}: {attributes.diverged(ds)[name][0].get('reason', '')}")
        for name, says in lost.items()
    )
    late = late.sel(algorithm=shown)
    return _grid(
        caption, late.assign_coords(algorithm=[_with(name, lost) for name in shown]), ".3f", notes
    )


def _lost(ds: xr.Dataset, places: Sequence[Mapping[str, Any]]) -> str:
    """Return that an algorithm diverged, from which step on, and in how many of several seeds."""
    first = min(int(place["step"]) for place in places)
    if ds.sizes.get("seed", 1) == 1:
        return f"diverged at step {first}"
    return f"diverged: {len(places)} of {ds.sizes['seed']} seeds, from step {first}"


def _with(name: str, lost: Mapping[str, str]) -> str:
    return f"{name} ({lost[name]})" if name in lost else name


def spectra(ds: xr.Dataset) -> Table:
    """Tabulate ends, trace and negative fraction of every spectrum, with the errors of Lanczos."""
    rows = []
    names = [name for name in SPECTRUM if name in ds]
    ds = ds[
        [
            name
            for name in (*names, *(f"{name}_error" for name in names), "unresolved", "density")
            if name in ds
        ]
    ]
    places = list(itertools.product(*(range(ds.sizes[dim]) for dim in ("block", "matrix", "step"))))
    for block, matrix, step in places[:MOST_ROWS]:
        at = ds.isel(block=block, matrix=matrix, step=step)
        rows.append(
            (
                *(str(at[dim].values) for dim in ("block", "matrix", "step")),
                *(_estimate(at, name) for name in names),
            )
        )
    columns = ("block", "matrix", "training steps", *names)
    notes = (
        ((f"{len(places) - len(rows)} more", "rows, in the log alone"),)
        if len(rows) < len(places)
        else ()
    )
    return Table(
        "Eigenvalues (nat; ± error where Lanczos estimates them)", columns, tuple(rows), 3, notes
    )


def _estimate(at: xr.Dataset, name: str) -> str:
    form, of_error = (".1%", ".1%") if name == "negative" else (".4g", ".1g")
    value, error = float(at[name]), float(at.get(f"{name}_error", math.nan))
    near = float(at.get("unresolved", math.nan)) if name == "negative" else 0.0
    some = f", {near:.1%} near 0" if near > 0 else ""
    return (
        (formatted(value, form) if value else "0")
        + (f" ± {error:{of_error}}" if error > 0 else "")
        + some
    )


def epochs(ds: xr.Dataset) -> Table:
    """Tabulate the first, the best and the last of the epochs that were evaluated."""
    seen = evaluated(ds)
    last, scores = seen.sizes["epoch"] - 1, [name for name in SCORES if name in seen]
    if last < 0:
        return Table("No epoch was evaluated", ("",), ())
    by = seen["val_loss" if "val_loss" in seen else "train_loss"]
    best = int(by.argmin("epoch")) if by.notnull().any() else last
    rows = []
    for i in dict.fromkeys((0, best, last)):
        at = seen.isel(epoch=i)
        what = ", ".join(
            word for word, place in (("first", 0), ("best", best), ("last", last)) if place == i
        )
        rows.append((what, *_of_epoch(at, scores)))
    return Table(
        "The first, the best and the last epoch", ("", *_epoch_columns(seen, scores)), tuple(rows)
    )


def last_epochs(runs: Sequence[tuple[str, xr.Dataset]]) -> Table:
    """Tabulate the last evaluated epoch of several training runs."""
    scores = [name for name in SCORES if any(name in ds for _, ds in runs)]
    rows = []
    for name, ds in runs:
        seen = evaluated(ds)
        cells = (
            _of_epoch(seen.isel(epoch=-1), scores)
            if seen.sizes["epoch"]
            else (MISSING,) * (len(scores) + 3)
        )
        rows.append((name, *cells))
    return Table(
        "The last epoch of each run", ("run", *_epoch_columns(runs[0][1], scores)), tuple(rows)
    )


def bounds(ds: xr.Dataset) -> Table:
    """Tabulate whether the theorems' bounds held at every step and layer that was probed.

    Where they did it says by how many orders of magnitude.
    """
    rows = []
    for algorithm in ds["algorithm"].values[:MOST_ROWS]:
        at = ds.sel(algorithm=algorithm)
        ratios = [
            (factor, end, at[f"tightness_{end}"].sel(factor=factor))
            for factor, end in itertools.product(at["factor"].values, ("low", "high"))
            if f"tightness_{end}" in at
        ]
        ratios += [
            ("one update", f"‖{which}‖", at[f"update_bound_{which}"] / at[f"update_norm_{which}"])
            for which in "BH"
            if {f"update_bound_{which}", f"update_norm_{which}"} <= set(at)
        ]
        for factor, end, ratio in ratios:
            known = ratio.values[~np.isnan(ratio.values)]
            if known.size:
                violated, orders = int((known < 1 - ROUNDING).sum()), np.log10(known)
                loose = map(_order, (orders.min(), np.median(orders), orders.max()))
                rows.append(
                    (str(algorithm), f"{factor}, {end}", str(known.size), str(violated), *loose)
                )
    if not rows:
        return Table("No theorem bounds these eigenvalues", ("",), ())
    columns = ("algorithm", "bound", "times", "violated", "least loose", "median", "loosest")
    notes = (
        ("violated", f"by more than {ROUNDING:g} of itself; less is rounding"),
        ("∞", "the bound is beyond double precision"),
    )
    return Table(
        "Bounds of the theorems: looseness in orders of magnitude (0: tight)",
        columns,
        tuple(rows),
        2,
        notes,
    )


def _order(value: float) -> str:
    if math.isfinite(value):
        return f"{round(value, 1) + 0.0:.1f}"
    return MISSING if math.isnan(value) else "∞" if value > 0 else "−∞"


def evaluated(ds: xr.Dataset) -> xr.Dataset:
    """Return a training log without the epochs at which no training loss is known."""
    return ds.dropna("epoch", subset=["train_loss"])


def _epoch_columns(ds: xr.Dataset, scores: Sequence[str]) -> list[str]:
    heads = [
        f"{score.replace('_', ' ')}{_unit(ds[score]) if score in ds else ''}" for score in scores
    ]
    return ["epoch", "steps", *heads, "training time (s)"]


def _of_epoch(at: xr.Dataset, scores: Sequence[str]) -> tuple[str, ...]:
    cells = (formatted(at.get(name), ".5g") for name in scores)
    return (
        f"{float(at['epoch']):g}",
        formatted(at.get("steps"), ".0f"),
        *cells,
        formatted(at.get("wall_seconds")),
    )


TABLES: dict[str, Callable[[xr.Dataset], Table]] = {
    "cosine": cosines,
    "train_loss": epochs,
    "density": spectra,
    "tightness_low": bounds,
    "score": best_of_sweep,
    "state": points_of_sweep,
}
"""{variable of the log: what tabulates it}"""


@np.errstate(all="ignore")
def own(ds: xr.Dataset) -> list[Table]:
    """Return the tables of TABLES that the log has numbers for.

    The first says what the run was for.
    """
    ds, _ = regular(ds)
    return [make(ds) for needs, make in TABLES.items() if needs in ds]


@np.errstate(all="ignore")
def at_the_end(ds: xr.Dataset) -> tuple[list[Table], list[tuple[str, str]]]:
    """Return what is known of each algorithm or block at the end.

    It is tables, and (variable, why it is in none). Variables of the same dimensions share a table,
    its rows their labels; one that is alone on two is a grid. `cosine` and spectra have tables of
    their own.
    """
    ds = _of_seeds(regular(ds)[0])
    found: dict[tuple[str, ...], list[str]] = {}
    left: list[tuple[str, str]] = []
    tabulated = {"cosine"} | (set(ds.data_vars) if "density" in ds else set())
    for name in (str(name) for name in ds.data_vars if name not in tabulated):
        axis, *dims = [str(d) for d in ds[name].dims if d != "seed"] or [""]
        if not {"long_name", "units"} <= ds[name].attrs.keys() or not {"block", "algorithm"} & set(
            dims
        ):
            continue
        values = ds[name].values[np.isfinite(ds[name].values)]
        if "other" in dims:
            left.append((name, f"{ds[name].attrs['long_name']}: in the log alone"))
        elif math.prod(ds.sizes[d] for d in dims) > MOST_CELLS:
            left.append(
                (name, f"{ds[name].attrs['long_name']}: {ds[name].size} numbers, in the log alone")
            )
        elif not values.size or (values == values.flat[0]).all():
            unit = _unit(ds[name]).replace("(", "").replace(")", "")
            everywhere = (
                f"{formatted(values.flat[0])}{unit} everywhere"
                if values.size
                else "not a number anywhere"
            )
            left.append((name, f"{ds[name].attrs['long_name']}: {everywhere}"))
        else:
            found.setdefault((axis, *dims), []).append(name)
    tables: list[Table] = []
    for key, names in found.items():
        table = _last(ds[names], key[0])
        if len(table.rows) <= MOST_ROWS:
            tables.append(table)
        else:
            left += [
                (name, f"{what}: {len(table.rows)} rows, in the log alone")
                for name, what in table.notes
            ]
    return tables, left


def _last(ds: xr.Dataset, axis: str) -> Table:
    """Tabulate variables of the same dimensions at the last place on `axis` known of any."""
    known = ds.to_array().notnull().any([d for d in ("variable", *ds.dims) if d != axis])
    place = int(np.flatnonzero(known.values)[-1])
    at = ds.isel({axis: place})
    at = at.squeeze([d for d in at.dims if d == "algorithm" and at.sizes[d] == 1], drop=True)
    names = [str(name) for name in ds.data_vars]
    dims = [str(d) for d in at[names[0]].dims if d != "seed"]
    several = (
        f", mean ± standard deviation of {ds.sizes['seed']} seeds" if "seed" in ds.dims else ""
    )
    label = ds[axis].values[place]
    when = f"at {axis} {label if isinstance(label, str) else f'{label:g}'}{several}"
    notes = tuple((name, str(ds[name].attrs["long_name"])) for name in names)
    if len(names) == 1 and len(dims) == 2:
        return _grid(f"{names[0]}{_unit(ds[names[0]])}, {when}", at[names[0]], ".4g", notes)
    rows = []
    for labels in itertools.product(
        *(at[d].values if d in at.coords else range(at.sizes[d]) for d in dims)
    ):
        here = at.sel(dict(zip(dims, labels, strict=True)))
        cells = [_cell(here[name], ".4g", _meanings(ds[name])) for name in names]
        if any(cell != MISSING for cell in cells):
            rows.append((*map(str, labels), *cells))
    columns = (*dims, *(f"{name}{_unit(ds[name])}" for name in names))
    caption = f"By {', '.join(dims)}, {when}" if dims else f"{when[0].upper()}{when[1:]}"
    return Table(caption, columns, tuple(rows), max(1, len(dims)), notes)


def _grid(
    caption: str, values: xr.DataArray, form: str, notes: tuple[tuple[str, str], ...] = ()
) -> Table:
    """Tabulate values of two dimensions, blocks across unless they are many."""
    down, across = (str(d) for d in values.dims if d != "seed")
    if (across == "block") == (values.sizes["block"] > WIDEST) if "block" in values.dims else False:
        down, across = across, down

    def lines() -> Iterator[tuple[str, ...]]:
        for row in values[down].values:
            cells = (
                _cell(values.sel({down: row, across: column}), form)
                for column in values[across].values
            )
            yield (str(row), *cells)

    heads = (
        f"layer {column}" if across == "block" else str(column) for column in values[across].values
    )
    return Table(caption, (down, *heads), tuple(lines()), notes=notes)


def _cell(values: xr.DataArray, form: str, meanings: dict[float, str] | None = None) -> str:
    """Return one number as text; of seeds their mean ± standard deviation; of a flag a word."""
    mean = float(values.mean())
    if meanings and mean in meanings:
        return meanings[mean] or formatted(mean, form)
    spread = (
        f" ± {formatted(values.std(), form if form.endswith('f') else '.2g')}"
        if "seed" in values.dims and not math.isnan(mean)
        else ""
    )
    return f"{formatted(mean, form)}{spread}"


def _meanings(values: xr.DataArray) -> dict[float, str]:
    """Return {value: meaning} of netCDF's flags (`flag_values`, `flag_meanings`)."""
    numbers = str(values.attrs.get("flag_values", "")).split()
    words = [word.strip() for word in str(values.attrs.get("flag_meanings", "")).split(";")]
    try:
        return {float(n): word for n, word in zip(numbers, words, strict=False)}
    except ValueError:  # no flags of ours
        return {}


def _unit(values: xr.DataArray) -> str:
    unit = str(values.attrs.get("units", "1"))
    return "" if unit == "1" else f" ({unit})"
