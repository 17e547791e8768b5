"""The page of `curvlab doctor` about an installation and, with a folder, about a run.

It is what a bug report asks for first. Nothing is run, written or downloaded.
"""

from __future__ import annotations

import fcntl
import json
import locale
import os
import platform
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import h5py
import torch
import xarray as xr

from curvlab.datasets import files
from curvlab.errors import CurvlabError, CurvlabWarning, cause_of
from curvlab.logs import attributes
from curvlab.logs.log import SCHEMA, git_commit
from curvlab.logs.reading import open_log
from curvlab.machine import device_of
from curvlab.show import about
from curvlab.system.paths import given
from curvlab.training import checkpoint, contents
from curvlab.training.begun import anew, stepless

State = Literal["", "good", "bad"]
"""The state of a finding: a fact, as it should be, or in the way of something."""

_SPEAK = (
    "CURVLAB_DATA",
    "CURVLAB_CACHE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MPLBACKEND",
    "PYTHONUTF8",
    "PYTHONIOENCODING",
    "LC_ALL",
    "LANG",
    "TERM",
    "SLURM_JOB_ID",
)
"""Variables of the environment that change what curvlab does."""
_ROOM = 100e6
"""Free bytes on a disk, below which it counts as full."""


@dataclass(frozen=True)
class Finding:
    """A line of a page: what was looked at, what it says, and whether that is good or bad."""

    what: str
    says: str
    state: State = ""


@dataclass(frozen=True)
class Page:
    """A page of findings under their headings."""

    sections: dict[str, list[Finding]]

    @property
    def bad(self) -> list[Finding]:
        """Findings in the way of something, of all sections in their order."""
        return [
            found for section in self.sections.values() for found in section if found.state == "bad"
        ]

    def __str__(self) -> str:
        marks = {"": " ", "good": "✓", "bad": "!"}
        lines: list[str] = []
        for title, findings in self.sections.items():
            width = max(len(found.what) for found in findings)
            lines += ["", title] if lines else [title]
            lines += [
                f"{marks[found.state]} {found.what:<{width}}  {found.says}".rstrip()
                for found in findings
            ]
        return "\n".join(lines)


def examine(folder: str | os.PathLike[str] | None = None) -> Page:
    """Return what there is to say of this installation, and of a run's folder where one is given.

    Args:
        folder: of the run, or a file in it; None: of no run.

    Raises:
        CurvlabError: no such folder.
    """
    sections = {
        "installation": list(_installation()),
        "libraries": list(_libraries()),
        "machine": list(_machine()),
        "surroundings": list(_surroundings()),
        "data": list(_data()),
    }
    return Page(sections if folder is None else sections | {"run": list(_run(_folder(folder)))})


def _folder(folder: str | os.PathLike[str]) -> Path:
    found = given(folder, "run")
    if found.is_file():
        found = found.parent
    if not found.is_dir():
        raise CurvlabError(f"there is no folder {found}: give a run's folder")
    return found


# ---- the installation


def _installation() -> Iterator[Finding]:
    yield Finding(
        "curvlab",
        f"{metadata.version('curvlab')}, schema {SCHEMA} of logs, format {checkpoint.FORMAT} of"
        " checkpoints",
    )
    yield Finding("from", str(Path(__file__).parent))
    yield Finding("git commit", git_commit())
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", platform.platform())


def _libraries() -> Iterator[Finding]:
    """Yield what the package asks for, as installed."""
    for wanted in metadata.requires("curvlab") or []:
        if "extra ==" in wanted:
            continue
        name = re.split(r"[^A-Za-z0-9_.-]", wanted, maxsplit=1)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, f"missing: pip install '{wanted}'", "bad")
            continue
        more = {
            "torch": (
                ", built for"
                f" {'CUDA ' + str(torch.version.cuda) if torch.version.cuda else 'the CPU'}"
            ),
            "h5py": f", HDF5 {h5py.version.hdf5_version}",
        }
        outside = _outside(wanted, version)
        yield Finding(
            name,
            version + more.get(name, "") + (f", but {outside} is wanted" if outside else ""),
            "bad" if outside else "",
        )


def _outside(wanted: str, version: str) -> str:
    """Return the range of a requirement that a version is not in; empty: none that is known."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    specifier = Requirement(wanted).specifier
    return "" if specifier.contains(version, prereleases=True) else str(specifier)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{cores} for this process, of {os.cpu_count()}")
    yield Finding(
        "torch's threads",
        f"{torch.get_num_threads()}, {torch.get_num_interop_threads()} between operations",
    )
    if hasattr(os, "sysconf"):
        total, free = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
            for pages in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
        )
        yield Finding("memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free")
    yield Finding("device", f"{device_of('auto')} by --device auto")
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        yield Finding(
            f"cuda:{i}",
            f"{of.name}, {of.total_memory / 1e9:.0f} GB, capability {of.major}.{of.minor}",
        )


def _surroundings() -> Iterator[Finding]:
    encoding = getattr(sys.stdout, "encoding", None) or "none"
    yield Finding(
        "output",
        f"{encoding}, {'a terminal' if sys.stdout and sys.stdout.isatty() else 'no terminal'}; "
        f"the system's encoding is {locale.getpreferredencoding(False)}",
    )
    yield _written("this folder", Path.cwd)
    for name in _SPEAK:
        if name in os.environ:
            yield Finding(name, os.environ[name])


def _written(what: str, where: Callable[[], Path]) -> Finding:
    """Return whether a folder can be written to and how much room there is.

    Where it is not there, this is of the one that it would be in.
    """
    try:
        place = where()
        there = next(p for p in (place, *place.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
    except (OSError, CurvlabError) as error:
        return Finding(what, cause_of(error), "bad")
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(what, f"{place}: not yours to write to", "bad")
    room = f"{place}, {free / 1e9:.1f} GB free"
    return Finding(what, room, "bad" if free < _ROOM else "good")


def _data() -> Iterator[Finding]:
    """Yield where files are looked for; those that are there, and whether they are whole."""
    try:
        folders = files.folders()
    except CurvlabError as error:
        yield Finding("folders", str(error), "bad")
        return
    yield Finding(
        "folders", ", ".join(f"{f}{'' if f.is_dir() else ' (not there)'}" for f in folders)
    )
    yield _written("cache", files.cache)
    absent = []
    for name, known in files.FILES.items():
        path = files.find_file(name)
        try:
            kept = files.cache() / name
        except CurvlabError:
            kept = None
        path = path or (kept if kept is not None and kept.is_file() else None)
        if path is None:
            absent.append(name)
            continue
        try:
            if known.sums:
                files.verify(path, name, known.sums)
            yield Finding(
                name,
                f"{path}{', whole' if known.sums else ', no checksum is known'}",
                "good" if known.sums else "",
            )
        except CurvlabError as error:
            yield Finding(name, str(error), "bad")
    if absent:
        short = dict.fromkeys(
            name.partition("/")[0] + ("/…" if "/" in name else "") for name in absent
        )
        yield Finding(
            "not here",
            f"{', '.join(short)}: each is for its own data sets alone (curvlab list datasets)",
        )


# ---- a run


def _run(folder: Path) -> Iterator[Finding]:
    yield _written("folder", lambda: folder)
    writer = _writer(folder)
    if writer:
        yield Finding("in use", f"another run ({writer}) writes here now")
    log, state = folder / "run.h5", folder / checkpoint.FILE
    ds, held = None, None
    if log.exists():
        ds, findings = _log(folder)
        yield from findings
    else:
        yield Finding("log", "none: no run, or one that was ended before its first record")
    if state.exists():
        held, findings = _checkpoint(state, ds)
        yield from findings
    left = sorted(str(p.name) for p in folder.glob(".*.part"))
    if left and not writer:
        yield Finding(
            "left over",
            f"{', '.join(left)}: of a run that was killed while it saved; the next one"
            " overwrites it",
        )
    yield Finding("to go on", _going_on(folder, ds, held, state.exists(), writer))


def _log(folder: Path) -> tuple[xr.Dataset | None, list[Finding]]:
    with warnings.catch_warnings(record=True) as odd:
        warnings.simplefilter("always", CurvlabWarning)
        try:
            ds = open_log(folder)
        except CurvlabError as error:
            return None, [Finding("log", str(error), "bad")]
    found = [Finding("log", f"{folder / 'run.h5'}, whole", "good")]
    found += [Finding("odd", str(one.message), "bad") for one in odd]
    found += [Finding(what, says) for what, says in about.facts(ds).items() if says]
    found += [Finding("note", line) for line in about.notes(ds)]
    return ds, [
        *found,
        Finding("call", about.shell(attributes.mapping(ds, "call")).replace(" \\\n   ", "")),
    ]


def _checkpoint(path: Path, ds: xr.Dataset | None) -> tuple[dict[str, Any] | None, list[Finding]]:
    try:
        state = checkpoint.load_state(path)
        contents.check(state)
    except CurvlabError as error:
        return None, [Finding("checkpoint", str(error), "bad")]
    at, begun = state["position"], state["log"]["attributes"].get("created", "unknown")
    where = f"after {at['steps']} steps, {at['step']} of them in epoch {at['epoch'] + 1}"
    found = [Finding("checkpoint", f"{path}, whole: {where}", "good")]
    if ds is not None and not _same_run(ds, state):
        created = attributes.text(ds, "created", "unknown")
        found.append(
            Finding(
                "together",
                f"the log is of a run begun {created}, the checkpoint of one begun {begun}",
                "bad",
            )
        )
    elif ds is not None:
        found.append(Finding("together", "log and checkpoint are of one run", "good"))
    return state, found


def _same_run(ds: xr.Dataset, state: dict[str, Any]) -> bool:
    """Return whether two were begun together: a run that goes on keeps what its first log said."""
    kept = state["log"]["attributes"]
    return all(kept.get(name) == attributes.text(ds, name) for name in ("created", "git_commit"))


def _going_on(
    folder: Path, ds: xr.Dataset | None, state: dict[str, Any] | None, held: bool, writer: str
) -> str:
    place = shlex.quote(str(folder))
    if writer:
        return "wait for the run that writes here"
    if held and state is None:
        return "restore the checkpoint, or start again in another folder"
    if state is not None:
        if "command" not in _call(state):
            return (
                f"by the script that began it: curvlab.train(…, folder={str(folder)!r},"
                " resume=True)"
            )
        model = str(state["settings"].get("model", ""))
        words = (
            f"curvlab train --resume{f' --model {shlex.quote(model)}' if ':' in model else ''}"
            f" --out {place}"
        )
        missing = about.unfinished(ds) if ds is not None else "some"
        return words if missing else f"it has reached its end; for a longer run: {words} --epochs N"
    if stepless(folder):
        return f"{anew(folder)} by the same command"
    if ds is None:
        return (
            "start it"
            if not (folder / "run.h5").exists()
            else "restore the log, or start again in another folder"
        )
    missing = about.unfinished(ds)
    return (
        f"start it again in another folder ({missing})"
        if missing
        else f"it has reached its end: curvlab report {place}"
    )


def _call(state: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(state["log"]["attributes"]["call"])
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _writer(folder: Path) -> str:
    """Return who writes to a folder now; empty where nobody does."""
    try:
        with (folder / ".run.h5.lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ""
    except BlockingIOError:
        return " ".join((folder / ".run.h5.lock").read_text(errors="replace").split())
    except OSError:
        return ""
