"""What a sweep is asked for, read and checked.

A point's command line is read by the same parser as by hand, so that bad input is found before the
first point begins, and a point is what the command by hand is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

import typer

from curvlab import datasets, models
from curvlab.algorithms import find_algorithm
from curvlab.cli.assignments import assigned
from curvlab.cli.compare import checked_comparison, compare
from curvlab.cli.train import checked_training, train
from curvlab.errors import CurvlabError, fitting, lookup, shown, unknown, whole
from curvlab.show.tables import SCORES
from curvlab.sweeps.documents import DOCUMENT_GRIDS
from curvlab.sweeps.grid import GridAxis, Value, merged
from curvlab.sweeps.points import SweepSettings
from curvlab.sweeps.warm import cores

_COMMANDS: dict[str, Any] = {"train": train, "compare": compare}
MOST_WORKERS = 4096

_NOT_ON_A_GRID = (
    *("algorithm", "algorithms", "checkpoint_seconds", "context", "data", "device", "model"),
    *("out_folder", "own", "probe", "resume", "schedule_own", "seed", "seeds", "verbose"),
)
"""Options that are the sweep's own, or of which several make no axis."""

_NOT_OF_A_POINT = {"resume": "a sweep goes on by itself", "seeds": "each seed is a point"}

AskedGrid = Mapping[str, Sequence[Value]] | str | Sequence[str]


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for.

    Args:
        command: `train` or `compare`.
        words: of the command line of every point.
        grid: "NAME=VALUE,VALUE" or a name of DOCUMENT_GRIDS, each; or {name: values}.
        algorithms: each a point of `train`; all in every point of `compare`.
        seed: the first.
        seeds: how many.
        best: what is made least; None: the document's, else the training loss.
        threads: of torch, in each worker; None: the cores that a worker has.
        workers: of this machine; None: its cores.
    """

    command: str
    words: Sequence[str] = ()
    grid: AskedGrid = ()
    algorithms: Sequence[str] = ()
    seed: int = 0
    seeds: int = 1
    best: str | None = None
    threads: int | None = None
    workers: int | None = None

    @property
    def processes(self) -> int:
        """Workers of this machine.

        Raises:
            CurvlabError: out of range.
        """
        return cores() if self.workers is None else whole("workers", self.workers, 1, MOST_WORKERS)

    def settings(self) -> tuple[SweepSettings, dict[str, Any]]:
        """Return the settings of the sweep, and the log's attribute of what was asked for.

        Raises:
            CurvlabError: unknown names, values out of range, axes that are no grid; for any point.
        """
        if self.command not in _COMMANDS:
            raise unknown("command of a sweep", self.command, _COMMANDS)
        whole("the seed", self.seed, 0)
        whole("seeds", self.seeds, 1, 10_000)
        threads = max(1, cores() // self.processes)
        threads = threads if self.threads is None else whole("threads", self.threads, 1, 4096)
        given = _read(self.command, self.words)
        for name, why in _NOT_OF_A_POINT.items():
            if name in given:
                raise CurvlabError(f"a sweep takes no --{name}: {why}")
        if "model" not in given:
            raise CurvlabError("Missing option '--model'.")
        models_checked(given)
        document, axes = self._axes()
        grids = self._grids(given, document, axes)
        best = self._best(document)
        clash = [a.name for each in grids.values() for a in each if a.name in given and not a.own]
        if clash:
            raise CurvlabError(
                f"{clash[0]} is on the grid and an option of every point too: leave one out"
            )
        found = SweepSettings(
            command=self.command,  # type: ignore[arg-type]  # one of _COMMANDS
            words=tuple(_spelled(self.command, given)),
            grids=grids,
            seeds=tuple(range(self.seed, self.seed + self.seeds)),
            best=best,
            threads=threads,
            defaults={name: _defaults(name, given) for name in grids},
        )
        points = found.points()
        if len(points) == 1:
            raise CurvlabError(
                "the grid is empty, the sweep has one point: give --grid NAME=VALUE,VALUE,…,"
                " several algorithms or --seeds"
            )
        check = checked_training if self.command == "train" else checked_comparison
        for point in points:
            check(_params(self.command, point.words[1:]))
        said = [self.grid] if isinstance(self.grid, str) else self.grid
        grid = (
            [f"{name}={GridAxis(name, tuple(values)).said}" for name, values in said.items()]
            if isinstance(said, Mapping)
            else list(said)
        )
        call: dict[str, Any] = {"command": f"sweep {self.command}", "grid": grid}
        call |= {"algorithms": ",".join(name for name in grids if name) or None}
        call |= {"seed": self.seed, "seeds": self.seeds, "best": best, "threads": threads}
        return found, call | {_named(k): v for k, v in given.items() if k != "algorithm"}

    def _axes(self) -> tuple[str | None, list[GridAxis]]:
        """Return the name of a document's grid, if one is asked for, and the axes given."""
        document, found = None, []
        grid = [self.grid] if isinstance(self.grid, str) else self.grid
        if isinstance(grid, Mapping):
            found = [_axis(name, values) for name, values in grid.items()]
            grid = ()
        for word in grid:
            name, equals, values = str(word).partition("=")
            if not equals:
                lookup(DOCUMENT_GRIDS, name, "grid of a document")
                if document is not None:
                    raise CurvlabError(f"two documents' grids are given, {document} and {name}")
                document = name
                continue
            read = [assigned([f"{name}={v.strip()}"], "--grid") for v in values.split(",")]
            found.append(_axis(next(iter(read[0])), [next(iter(one.values())) for one in read]))
        names = [axis.name for axis in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise CurvlabError(f"the grid of {twice} is given twice")
        return document, found

    def _grids(
        self, given: Mapping[str, Any], document: str | None, axes: list[GridAxis]
    ) -> dict[str, tuple[GridAxis, ...]]:
        """Return {algorithm: its axes}."""
        if self.command == "compare":
            if document is not None:
                raise CurvlabError(f"the grid {document} is of training: sweep over train")
            return {"": tuple(self._fitted(axis, []) for axis in axes)}
        names = list(self.algorithms) or ([given["algorithm"]] if "algorithm" in given else [])
        if not names:
            names = ["adam"] if document is None else list(DOCUMENT_GRIDS[document].axes)
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise CurvlabError(f"the algorithm {twice} is given twice")
        for name in names:
            find_algorithm(name)
        fitted = [self._fitted(axis, names) for axis in axes]
        return {
            name: merged(() if document is None else DOCUMENT_GRIDS[document].of(name), fitted)
            for name in names
        }

    def _fitted(self, axis: GridAxis, algorithms: Sequence[str]) -> GridAxis:
        """Return an axis as its option wants the values: an option of the command, or `own`."""
        hints = get_type_hints(_COMMANDS[self.command])
        options = {k: v for k, v in hints.items() if k not in (*_NOT_ON_A_GRID, "return")}
        if axis.name in options:
            if float in (options[axis.name], *get_args(options[axis.name])):
                numbers = (
                    float(v) if isinstance(v, int) and not isinstance(v, bool) else v
                    for v in axis.values
                )
                axis = GridAxis(axis.name, tuple(numbers))
            axis.check()
            return axis
        entries = [find_algorithm(name) for name in algorithms]
        if entries and all(e.foreign or axis.name in e.defaults for e in entries):
            own = GridAxis(axis.name, axis.values, own=True)
            own.check()
            return own
        known = sorted({*map(str, options), *(n for e in entries for n in e.defaults)})
        raise unknown("option of a grid", axis.name, known)

    def _best(self, document: str | None) -> str:
        if self.command == "compare":
            if self.best not in (None, "cosine"):
                raise CurvlabError(f"the best of comparisons is by cosine, not {shown(self.best)}")
            return "cosine"
        chosen = self.best or (DOCUMENT_GRIDS[document].best if document else "train_loss")
        if chosen not in SCORES:
            raise unknown("score", chosen, SCORES)
        return chosen


def models_checked(given: Mapping[str, Any]) -> None:
    """Check the names of model and data; of the user's own code the module is imported alone.

    Raises:
        CurvlabError: an unknown name; a module that cannot be imported.
    """
    if ":" in given["model"]:
        models.imported(given["model"])
    else:
        lookup(models.MODELS, given["model"], "model")
    if "data" in given:
        lookup(datasets.DATASETS, given["data"], "data set")


def _axis(name: str, values: Sequence[Value]) -> GridAxis:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise CurvlabError(f"the grid of {name} must be a list of values, not {shown(values)}")
    for value in values:
        fitting(f"a value of {name}", value, bool | int | float | str)
    axis = GridAxis(name.replace("-", "_"), tuple(values))
    axis.check()
    return axis


def _defaults(algorithm: str, given: Mapping[str, Any]) -> dict[str, float]:
    """Return learning rate and damping of an algorithm where the grid has none."""
    if algorithm:
        entry = find_algorithm(algorithm)
        found = {"lr": entry.lr, "damping": entry.damping}
    else:
        entry = find_algorithm(given.get("reference", "block-fisher"))
        model = models.MODELS.get(given["model"])
        own = (models.ComparisonDefaults() if model is None else model.comparison).damping
        found = {"lr": entry.lr, "damping": own}
    return {name: float(given.get(name, value)) for name, value in found.items()}


# ---- command lines


@cache
def _parser(command: str) -> Any:
    """Return typer's command, which takes longer to make than to parse with."""
    from curvlab.cli.app import app

    return typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]  # a group


def _context(command: str, words: Sequence[str]) -> Any:
    try:
        return _parser(command).make_context(command, list(words))
    except Exception as error:
        said = getattr(error, "format_message", None)  # click's; typer may carry one of its own
        if said is None:
            raise
        raise CurvlabError(" ".join(said().split())) from error


def _params(command: str, words: Sequence[str]) -> dict[str, Any]:
    """Return {option: value} of a command line, all options among them."""
    return dict(_context(command, words).params)


def _read(command: str, words: Sequence[str]) -> dict[str, Any]:
    """Return {option: value} of those that a command line says, but for the folder."""
    context = _context(command, words)
    source = context.get_parameter_source
    return {
        name: list(value) if isinstance(value, tuple | list) else value
        for name, value in context.params.items()
        if getattr(source(name), "name", "") != "DEFAULT" and name != "out_folder"
    }


def _named(option: str) -> str:
    return {"own": "set", "schedule_own": "schedule_set"}.get(option, option)


def _spelled(command: str, given: Mapping[str, Any]) -> list[str]:
    """Return options as a command line says them, but for the algorithm."""
    words: list[str] = []
    for name, value in given.items():
        option = f"--{_named(name).replace('_', '-')}"
        if name == "algorithm" or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [option, str(one)]
    return words


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Return keyword options as a command line says them; `set` and `schedule_set` are {…: …}."""
    spread = {
        name: [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
        for name, value in options.items()
    }
    return _spelled("", spread)
