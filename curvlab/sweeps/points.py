"""The points of a sweep: which they are, what a command line says of each, where it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from curvlab.errors import CurvlabError, cause_of, shown
from curvlab.sweeps.grid import GridAxis, Value, in_folder
from curvlab.system.atomic import rewrite
from curvlab.system.paths import NAME

SweptCommand = Literal["train", "compare"]
PointState = Literal["done", "diverged", "failed", "killed"]

KEPT = "sweep.json"
"""File of a sweep's folder that says which sweep it holds."""

POINTS = "points"
"""Folder in a sweep's folder that has a folder for each point."""

MOST_POINTS = 1_000_000
"""Points of a sweep at most."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Args:
        name: of its folder, unlike any other's.
        place: {dimension of the result: value}.
        words: of the command line that runs it, but for its folder.
    """

    name: str
    place: Mapping[str, Value]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a point has ended: its row.

    Args:
        state: `done`; `diverged`, its numbers left the finite range; `failed`, with an error;
            `killed`, with its worker.
        reason: of anything but `done`, one line.
        log: the data set that the worker has read from the point's log, where it is small; who
            asked then need not read the file once more. It takes no part in comparisons.
    """

    state: PointState
    reason: str = ""
    log: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """What a worker is sent of a point.

    Args:
        words: of the command line, but for the folder.
        folder: the point's, absolute.
        threads: of torch.
        start: of this start of the sweep's command, unlike any other's.
        importable: folder in which the user's modules are looked for too.
    """

    words: tuple[str, ...]
    folder: str
    threads: int
    start: str
    importable: str


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What a sweep computes: where and by how many workers makes no difference to it.

    Args:
        command: what every point runs.
        words: of its command line, the same for all points.
        grids: {algorithm: its axes}; of `compare` under the name "".
        seeds: each a point.
        best: the variable that is made least at the end of any epoch; of `compare` "cosine".
        threads: of torch, in every worker.
        defaults: {algorithm: {"lr": …, "damping": …}}: where an axis of the result has an
            algorithm that the grid leaves alone.
    """

    command: SweptCommand
    words: tuple[str, ...]
    grids: Mapping[str, tuple[GridAxis, ...]]
    seeds: tuple[int, ...]
    best: str
    threads: int
    defaults: Mapping[str, Mapping[str, float]]

    @property
    def axes(self) -> list[str]:
        """The names of all axes beside algorithm and seed: `lr`, `damping`, the others."""
        named = (axis.name for axes in self.grids.values() for axis in axes)
        return list(dict.fromkeys(["lr", "damping", *named]))

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain values, by which a folder is known again."""
        grids = {name: {a.name: list(a.values) for a in axes} for name, axes in self.grids.items()}
        found = asdict(self) | {"grids": grids, "words": list(self.words)}
        return found | {"seeds": list(self.seeds)}

    def points(self) -> list[Point]:
        """Return all points, by algorithm, then by the grid, the seed last.

        Raises:
            CurvlabError: values that cannot be on a grid, two points of one folder, or too many.
        """
        for axes in self.grids.values():
            for axis in axes:
                axis.check()
        count = sum(
            len(self.seeds) * _product(len(axis.values) for axis in axes)
            for axes in self.grids.values()
        )
        if count > MOST_POINTS:
            raise CurvlabError(f"the sweep has {count} points, of at most {MOST_POINTS}")
        found = [
            self._point(name, dict(zip([a.name for a in axes], values, strict=True)), seed)
            for name, axes in self.grids.items()
            for values in itertools.product(*(axis.values for axis in axes))
            for seed in self.seeds
        ]
        known: dict[str, Point] = {}
        for point in found:
            if point.name in known:
                raise CurvlabError(
                    f"two points of the sweep would share the folder '{point.name}': give names"
                    " and values that differ"
                )
            if len(point.name.encode()) > NAME - 20:
                raise CurvlabError(
                    f"a point's folder would have a name of {len(point.name.encode())} bytes, of at"
                    f" most {NAME - 20}: give fewer axes, or shorter words"
                )
            known[point.name] = point
        return found

    def _point(self, algorithm: str, chosen: Mapping[str, Value], seed: int) -> Point:
        axes = {axis.name: axis for axis in self.grids[algorithm]}
        parts = [f"{name}-{in_folder(value)}" for name, value in chosen.items()]
        head = [in_folder(algorithm)] if algorithm else []
        words = [self.command, *self.words]
        words += ["--algorithm", algorithm] if algorithm else []
        for name, value in chosen.items():
            words += axes[name].words(value)
        words += ["--seed", str(seed)]
        place: dict[str, Value] = {"algorithm": algorithm} if algorithm else {}
        place |= dict(self.defaults.get(algorithm, {})) | dict(chosen) | {"seed": seed}
        return Point("_".join([*head, *parts, f"seed-{seed}"]), place, tuple(words))


def _product(numbers: Any) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found


def claim(folder: Path, settings: SweepSettings) -> None:
    """Write into a folder which sweep it holds, or see that it is this one.

    Raises:
        CurvlabError: it holds another sweep or another run, which is named; it cannot be written.
    """
    mine = json.loads(json.dumps(settings.plain()))
    path = folder / KEPT
    try:
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            _check_kept(folder, kept, mine)
            (folder / POINTS).mkdir(exist_ok=True)
            return
        if (folder / "run.h5").exists() or (folder / "checkpoint.pt").exists():
            raise CurvlabError(
                f"{folder} already holds a run that is no sweep: choose another folder with --out"
            )
        text = json.dumps(mine, indent=1, ensure_ascii=False) + "\n"
        rewrite(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        (folder / POINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise CurvlabError(f"{path} cannot be written: {cause_of(error)}") from error
    except (ValueError, AttributeError) as error:
        if isinstance(error, CurvlabError):
            raise
        raise CurvlabError(
            f"{path} is damaged: restore it, or choose another folder with --out"
        ) from error


def unclaim(folder: Path) -> None:
    """Leave nothing of a sweep of which no point was begun."""
    with suppress(OSError):  # there are points
        (folder / POINTS).rmdir()
        (folder / KEPT).unlink()


def _check_kept(folder: Path, kept: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise CurvlabError, which names what differs, where a folder holds another sweep."""
    differing = [k for k in dict(kept) | dict(mine) if kept.get(k) != mine.get(k)]
    if differing:
        said = "; ".join(f"{k} {shown(kept.get(k))}, not {shown(mine.get(k))}" for k in differing)
        raise CurvlabError(
            f"{folder} holds another sweep ({said}): give the same, or choose another folder with"
            " --out"
        )
