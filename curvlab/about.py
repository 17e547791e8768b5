"""What a log says of its run in words: facts, the calls as they are typed, what a reader should know."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from curvlab.tables import MISSING, number

STEPS_OF_COMPARE = 300
"""Of `curvlab compare` where its call names no length."""

_SPELLED = {"own": "--set", "schedule_own": "--schedule-set"}
_BY_RESUME = ("resume", "out", "epochs", "steps", "seconds", "checkpoint_seconds")
"""What a run may go on with: any other option of that call said again what the run was, or was left out."""
_WIDTH = 92


def title(ds: xr.Dataset) -> str:
    return str(ds.attrs.get("title", f"curvlab {command(ds) or 'log'}"))


def attribute(ds: xr.Dataset, name: str) -> Any:
    """An attribute as it was before the log made text of it; None where it is absent."""
    return _read(ds.attrs.get(name))


def _read(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value
    except json.JSONDecodeError:
        return value


def _resumed(ds: xr.Dataset) -> list[dict[str, Any]]:
    """When, by which versions, commit and call the run went on; each time's attributes are text as the log's own."""
    return [{name: _read(value) for name, value in again.items()} for again in attribute(ds, "resumed") or []]


def command(ds: xr.Dataset) -> str:
    """compare, train, spectrum."""
    call = attribute(ds, "call") or {}
    return str(call.get("command") or call.get("function", "")).rpartition(".")[2]


def text(ds: xr.Dataset, name: str) -> str:
    value = ds.attrs.get(name)
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return MISSING if value is None else str(value)


def facts(ds: xr.Dataset) -> dict[str, str]:
    """{what: text} of a run, the same names in the same order for all kinds."""
    data, description = text(ds, "data"), ds.attrs.get("data_description")
    seed = attribute(ds, "seed")
    settings = attribute(ds, "settings") or {}
    reference = ds.attrs.get("reference")
    damping = f"{settings['damping']:g} overall" if reference and "damping" in settings else text(ds, "damping")
    versions = attribute(ds, "versions") or {}
    return {
        "model": text(ds, "model"),
        "data": f"{data} ({description})" if description else data,
        "algorithm": _algorithms(ds),
        "learning rate": text(ds, "lr"),
        "damping": damping,
        "batch size": text(ds, "batch_size"),
        "seed": ", ".join(map(str, seed)) if isinstance(seed, list) else text(ds, "seed"),
        "length": _length(ds),
        "loss": _loss(ds),
        "time": _time(ds),
        "device": ", ".join(text(ds, name) for name in ("device", "dtype") if name in ds.attrs) or MISSING,
        "date": date(ds.attrs.get("created", MISSING)),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("curvlab", "torch", "python") if name in versions),
        "git commit": text(ds, "git_commit"),
    }


def _algorithms(ds: xr.Dataset) -> str:
    reference = ds.attrs.get("reference")
    if reference is None or "algorithm" not in ds.coords:
        return text(ds, "algorithm")
    others = ", ".join(str(name) for name in ds["algorithm"].values if name != reference)
    return f"{reference} leads; {others}" if others else f"{reference} leads"


def _length(ds: xr.Dataset) -> str:
    if "train_loss" in ds:
        return f"{_count(float(ds['epoch'][-1]), 'epoch')}, {_count(int(ds['steps'][-1]), 'step')}"
    if "density" in ds:
        return f"spectra after {', '.join(map(str, ds['step'].values))} steps"
    return _count(int(ds["step"][-1]) + 1, "step") if "step" in ds.coords else MISSING


def _count(number: float, of: str) -> str:
    return f"{number:.6g} {of}{'s' * (number != 1)}"


def _loss(ds: xr.Dataset) -> str:
    """The last known; of a training run those of training and validation."""
    known = {"training": "train_loss", "validation": "val_loss"} if "train_loss" in ds else {"": "loss"}
    said = []
    for what, name in known.items():
        if name in ds:
            axis = next(str(d) for d in ds[name].dims if d != "seed")
            seen = ds[name].dropna(axis, how="all")
            if seen.sizes[axis]:
                said.append(f"{what} {number(float(seen.isel({axis: -1}).mean()), '.5g')}".strip())
    unit = next((ds[name].attrs.get("units", "") for name in known.values() if name in ds), "")
    mean = ", mean of the seeds" if ds.sizes.get("seed", 1) > 1 else ""
    return f"{', '.join(said)} {unit}{mean}" if said else MISSING


def _time(ds: xr.Dataset) -> str:
    if "wall_seconds" in ds:
        apart = [f"{float(ds[f'{name}_seconds'][-1]):.3g} s {name.replace('_', ' ')}"
                 for name in ("evaluation", "warm_start", "probe") if f"{name}_seconds" in ds]  # fmt: skip
        return ", ".join([f"{float(ds['wall_seconds'][-1]):.4g} s training", *apart])
    if "seconds" in ds:
        return f"{float(ds['seconds'].sum()):.4g} s in the algorithms, over the steps logged"
    return MISSING


def date(created: object) -> str:
    return str(created).replace("T", " ").replace("+00:00", " UTC")


# ---- calls


def calls(ds: xr.Dataset) -> list[tuple[str, str]]:
    """[(what, text to copy)]: the call of the run, and of every time that it went on."""
    call = attribute(ds, "call")
    if not isinstance(call, dict):
        return []
    found = [("" if "command" in call else "from Python", shell(call))]
    for again in _resumed(ds):
        own = again.get("call", {})
        kept = {k: v for k, v in own.items() if k in ("command", *_BY_RESUME)} if "command" in own else own
        found.append((f"and to go on, at {date(again.get('created', MISSING))}", shell(kept)))
    return found


def shell(call: Mapping[str, Any]) -> str:
    """A call as the log holds it → what a shell takes, or, of a Python function, how it reads there. Every option is named."""
    if "command" not in call:
        said = ", ".join(f"{name}={value!r}" for name, value in call.items() if name != "function")
        return f"{call.get('function', 'unknown')}({said})"
    lines = [f"curvlab {call['command']}"]
    for name, value in call.items():
        for words in _words(name, value):
            if len(lines[-1]) + 1 + len(words) + 2 <= _WIDTH:
                lines[-1] += f" {words}"
            else:
                lines.append(f"    {words}")
    return " \\\n".join(lines)


def _words(name: str, value: Any) -> list[str]:
    """An option as it is typed; none where it was not given. `out` is empty where the folder was a fresh one."""
    option = _SPELLED.get(name, "--" + name.replace("_", "-"))
    if name == "command" or value is None or (name == "out" and value == ""):
        return []
    if isinstance(value, bool):
        return [option] if value else [] if name == "resume" else [option.replace("--", "--no-", 1)]
    return [f"{option} {shlex.quote(str(one))}" for one in (value if isinstance(value, list) else [value])]


# ---- what a reader should know


def notes(ds: xr.Dataset) -> list[str]:
    """Where the run was stopped, went on, did not reach its end or ran from files that no commit holds."""
    found = [f"Stopped: {ds.attrs['stopped']}."] if "stopped" in ds.attrs else []
    missing = "" if found else unfinished(ds)
    if missing:
        found.append(f"Not complete: {missing}.")
    versions = attribute(ds, "versions")
    for again in _resumed(ds):
        changed = [f"{k} {v}" for k, v in again.get("versions", {}).items() if (versions or {}).get(k) != v]
        changed += [f"commit {again['git_commit']}"] if again.get("git_commit") != ds.attrs.get("git_commit") else []
        by = f", by {', '.join(changed)}" if changed else ""
        found.append(f"Went on at {date(again.get('created', MISSING))}{by}.")
    if str(ds.attrs.get("git_commit", "")).endswith("+changes"):
        found.append("Ran from a checkout with changes that no commit holds.")
    return found


def unfinished(ds: xr.Dataset) -> str:
    """What is missing of what the run was asked for, as far as its log can tell; empty: nothing."""
    call = attribute(ds, "call") or {}
    budget = attribute(ds, "budget")
    if isinstance(budget, dict) and "train_loss" in ds:
        reached = {"epochs": float(ds["epoch"][-1]), "steps": float(ds["steps"][-1]), "seconds": float(ds["wall_seconds"][-1])}
        asked = {name: limit for name, limit in budget.items() if limit is not None}
        if asked and all(reached[name] < limit for name, limit in asked.items()):
            return ", ".join(f"{reached[name]:.4g} of {limit:g} {name}" for name, limit in asked.items())
        return ""
    if "density" in ds:
        after = call.get("after", "")
        asked_after = {int(word) for word in str(after).split(",") if word.strip()}
        absent = sorted(asked_after - {int(step) for step in ds["step"].values})
        return f"no spectra after {', '.join(map(str, absent))} steps" if absent else ""
    return _unfinished_comparison(ds, call) if "reference" in ds.attrs else ""


def _unfinished_comparison(ds: xr.Dataset, call: Mapping[str, Any]) -> str:
    seeds, found = attribute(ds, "seed"), []
    if isinstance(seeds, list):
        known = {int(seed) for seed in ds["seed"].values} if "seed" in ds.coords else set()
        absent = [str(seed) for seed in seeds if seed not in known]
        found += [f"no record of seed {', '.join(absent)}"] if absent else []
        if "loss" in ds and ds["loss"].isnull().any():
            found.append("not every seed reached the last step")
    asked = call.get("steps")
    if asked is None and call.get("epochs") is None and "command" in call:
        asked = STEPS_OF_COMPARE
    if asked is not None and call.get("epochs") is None:
        every = int((attribute(ds, "settings") or {}).get("log_every", 1))
        last = int(ds["step"][-1])
        found += [f"{last + 1} of {asked} steps"] if last + every < asked else []
    return "; ".join(found)
