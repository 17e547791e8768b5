"""What a log says of its run in words.

It is facts, the calls as they are typed, and what a reader should know.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from curvlab.logs import attributes
from curvlab.show.tables import MISSING, formatted

STEPS_OF_COMPARE = 300
"""Steps of `curvlab compare` where its call names no length."""

MOST_NAMES = 40
"""Algorithms of a comparison that are listed one by one, at most."""

_SPELLED = {"own": "--set", "schedule_own": "--schedule-set"}
_BY_RESUME = ("resume", "out", "epochs", "steps", "seconds", "checkpoint_seconds")
"""What a run may go on with: any other option of that call said again what the run was, or was left
out.
"""
_WIDTH = 92


def title(ds: xr.Dataset) -> str:
    """Return the title that the log has, else `curvlab` and the run's command."""
    return attributes.text(ds, "title") or f"curvlab {command(ds) or 'log'}"


def command(ds: xr.Dataset) -> str:
    """Return the command of a run: compare, train or spectrum."""
    call = attributes.mapping(ds, "call")
    return str(call.get("command") or call.get("function") or "").rpartition(".")[2]


@np.errstate(all="ignore")
def facts(ds: xr.Dataset) -> dict[str, str]:
    """Return {what: text} of a run, the same names in the same order for all kinds."""
    data, description = _shown(ds, "data"), attributes.text(ds, "data_description")
    seeds = attributes.seeds(ds)
    overall = attributes.entry(attributes.mapping(ds, "settings"), "damping")
    led = "reference" in ds.attrs and overall is not None
    versions = attributes.mapping(ds, "versions")
    return {
        "model": _shown(ds, "model"),
        "data": f"{data} ({description})" if description else data,
        "algorithm": _algorithms(ds),
        "learning rate": _shown(ds, "lr"),
        "damping": f"{overall:g} overall" if led else _shown(ds, "damping"),
        "batch size": _shown(ds, "batch_size"),
        "seed": ", ".join(map(str, seeds)) or MISSING,
        "length": _length(ds),
        "loss": _loss(ds),
        "time": _time(ds),
        "device": (
            ", ".join(_shown(ds, name) for name in ("device", "dtype") if name in ds.attrs)
            or MISSING
        ),
        "date": date(attributes.text(ds, "created", MISSING)),
        "versions": ", ".join(
            f"{name} {versions[name]}"
            for name in ("curvlab", "torch", "python")
            if name in versions
        ),
        "git commit": _shown(ds, "git_commit"),
    }


def _shown(ds: xr.Dataset, name: str) -> str:
    return attributes.text_or_number(ds, name, MISSING)


def _algorithms(ds: xr.Dataset) -> str:
    reference = attributes.text(ds, "reference")
    if not reference or "algorithm" not in ds.coords:
        return _shown(ds, "algorithm")
    others = [str(name) for name in ds["algorithm"].values if name != reference]
    more = f", … {len(others)} in all" if len(others) > MOST_NAMES else ""
    return (
        f"{reference} leads; {', '.join(others[:MOST_NAMES])}{more}"
        if others
        else f"{reference} leads"
    )


def _length(ds: xr.Dataset) -> str:
    if "train_loss" in ds:
        steps = f", {_count(float(ds['steps'][-1]), 'step')}" if "steps" in ds else ""
        return f"{_count(float(ds['epoch'][-1]), 'epoch')}{steps}"
    if "density" in ds:
        return f"spectra after {', '.join(map(str, ds['step'].values))} steps"
    return (
        _count(float(ds["step"][-1]) + 1, "step")
        if ds.sizes.get("step") and "step" in ds.coords
        else MISSING
    )


def _count(number: float, of: str) -> str:
    return f"{number:.6g} {of}{'s' * (number != 1)}"


def _loss(ds: xr.Dataset) -> str:
    """Return the last loss that is known; of a training run those of training and validation."""
    known = (
        {"training": "train_loss", "validation": "val_loss"} if "train_loss" in ds else {"": "loss"}
    )
    said = []
    for what, name in known.items():
        if name in ds:
            axis = next(str(d) for d in ds[name].dims if d != "seed")
            seen = ds[name].dropna(axis, how="all")
            if seen.sizes[axis]:
                said.append(
                    f"{what} {formatted(float(seen.isel({axis: -1}).mean()), '.5g')}".strip()
                )
    unit = next((ds[name].attrs.get("units", "") for name in known.values() if name in ds), "")
    mean = ", mean of the seeds" if ds.sizes.get("seed", 1) > 1 else ""
    return f"{', '.join(said)} {unit}{mean}" if said else MISSING


def _time(ds: xr.Dataset) -> str:
    if "wall_seconds" in ds:
        apart = [
            f"{float(ds[f'{name}_seconds'][-1]):.3g} s {name.replace('_', ' ')}"
            for name in ("evaluation", "warm_start", "probe")
            if f"{name}_seconds" in ds
        ]
        return ", ".join([f"{float(ds['wall_seconds'][-1]):.4g} s training", *apart])
    if "seconds" in ds:
        return f"{float(ds['seconds'].sum()):.4g} s in the algorithms, over the steps logged"
    return MISSING


def date(created: object) -> str:
    """Return an ISO 8601 time as it is shown: a blank for its T, UTC for +00:00."""
    return str(created).replace("T", " ").replace("+00:00", " UTC")


# ---- calls


def calls(ds: xr.Dataset) -> list[tuple[str, str]]:
    """Return [(what, text to copy)]: the call of the run, and of every time that it went on."""
    call = attributes.mapping(ds, "call")
    if not call:
        return []
    found = [("" if "command" in call else "from Python", shell(call))]
    for again in attributes.resumed(ds):
        own = attributes.nested(again, "call")
        kept = (
            {k: v for k, v in own.items() if k in ("command", *_BY_RESUME)}
            if "command" in own
            else own
        )
        found.append((f"and to go on, at {date(again.get('created', MISSING))}", shell(kept)))
    return found


def shell(call: Mapping[str, Any]) -> str:
    """Return a call, as the log holds it, as a shell takes it; every option is named.

    A Python function's call is returned as it reads there.
    """
    if "command" not in call:
        said = ", ".join(f"{name}={value!r}" for name, value in call.items() if name != "function")
        return f"{call.get('function', 'unknown')}({said})"
    lines = [f"curvlab {shlex.join(str(call['command']).split())}"]
    for name, value in call.items():
        for words in _words(name, value):
            if len(lines[-1]) + 1 + len(words) + 2 <= _WIDTH:
                lines[-1] += f" {words}"
            else:
                lines.append(f"    {words}")
    return " \\\n".join(lines)


def _words(name: str, value: Any) -> list[str]:
    """Return an option as it is typed; nothing where it was not given.

    `out` is empty where the folder was a fresh one.
    """
    option = shlex.quote(_SPELLED.get(name, "--" + name.replace("_", "-")))
    if name == "command" or value is None or (name == "out" and value == ""):
        return []
    if isinstance(value, bool):
        return [option] if value else [] if name == "resume" else [option.replace("--", "--no-", 1)]
    return [
        f"{option} {shlex.quote(str(one))}"
        for one in (value if isinstance(value, list) else [value])
    ]


# ---- what a reader should know


def notes(ds: xr.Dataset) -> list[str]:
    """Return where the run was stopped, went on, or did not reach its end.

    It is said too where it ran from files that no commit holds.
    """
    stopped, commit = attributes.text(ds, "stopped"), attributes.text(ds, "git_commit")
    found = [f"Stopped: {stopped}."] if stopped else []
    missing = "" if found else unfinished(ds)
    if missing:
        found.append(f"Not complete: {missing}.")
    versions = attributes.mapping(ds, "versions")
    for again in attributes.resumed(ds):
        changed = [
            f"{k} {v}"
            for k, v in attributes.nested(again, "versions").items()
            if versions.get(k) != v
        ]
        changed += (
            [f"commit {again['git_commit']}"] if again.get("git_commit", commit) != commit else []
        )
        by = f", by {', '.join(changed)}" if changed else ""
        found.append(f"Went on at {date(again.get('created', MISSING))}{by}.")
    if commit.endswith("+changes"):
        found.append("Ran from a checkout with changes that no commit holds.")
    return found


def unfinished(ds: xr.Dataset) -> str:
    """Return what is missing of what the run was asked for; empty: nothing.

    It is known as far as the log can tell.
    """
    call = attributes.mapping(ds, "call")
    budget = attributes.mapping(ds, "budget")
    if "train_loss" in ds:
        counted = {"epochs": "epoch", "steps": "steps", "seconds": "wall_seconds"}
        reached = {name: float(ds[of][-1]) for name, of in counted.items() if of in ds}
        limits = {name: attributes.entry(budget, name) for name in reached}
        asked = {name: limit for name, limit in limits.items() if limit is not None}
        if asked and all(reached[name] < limit for name, limit in asked.items()):
            return ", ".join(
                f"{reached[name]:.4g} of {limit:g} {name}" for name, limit in asked.items()
            )
        return ""
    if "density" in ds:
        asked_after = {int(word) for word in str(call.get("after", "")).split(",") if _whole(word)}
        absent = sorted(asked_after - {int(step) for step in ds["step"].values})
        return f"no spectra after {', '.join(map(str, absent))} steps" if absent else ""
    return _unfinished_comparison(ds, call) if "reference" in ds.attrs else ""


def _whole(word: str) -> bool:
    return word.strip().isdecimal() and len(word) < 20


def _unfinished_comparison(ds: xr.Dataset, call: dict[str, Any]) -> str:
    seeds, found = attributes.seeds(ds), []
    if len(seeds) > 1:
        known = {int(seed) for seed in ds["seed"].values} if "seed" in ds.coords else set()
        absent = [str(seed) for seed in seeds if seed not in known]
        found += [f"no record of seed {', '.join(absent)}"] if absent else []
        if "loss" in ds and ds["loss"].isnull().any():
            found.append("not every seed reached the last step")
    asked = attributes.entry(call, "steps")
    if call.get("steps") is None and call.get("epochs") is None and "command" in call:
        asked = STEPS_OF_COMPARE
    if asked is not None and call.get("epochs") is None and ds.sizes.get("step"):
        every = attributes.entry(attributes.mapping(ds, "settings"), "log_every") or 1
        last = int(ds["step"][-1])
        found += [f"{last + 1} of {asked:g} steps"] if last + every < asked else []
    return "; ".join(found)
