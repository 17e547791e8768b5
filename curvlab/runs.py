"""The comparison: every descent sees the same observation, one of them moves the parameters."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from curvlab import datasets
from curvlab.algorithms import ALGORITHMS, check_rates, damping_for, descent
from curvlab.curvature.base import Curvature
from curvlab.errors import MOST_STEPS, CurvlabError, Diverged, lookup, several, warn, whole
from curvlab.logs.log import Log
from curvlab.logs.reading import late_cosine
from curvlab.machine import clock_of
from curvlab.objective import Objective, restore, weights
from curvlab.observation import Pass, Transition
from curvlab.optim import Batch, Descent, displacement, move, warm_start
from curvlab.probes.base import (
    PROBES,
    Frame,
    ProbeRecord,
    Sample,
    asked,
    axis,
    begin_step,
    check_probes,
    labels,
    on_host,
    sample,
    taken,
)
from curvlab.published import FIGURE_4_1 as FIGURE_4_1
from curvlab.show import figures
from curvlab.signatures import known_options, shows
from curvlab.system import paths
from curvlab.system.interrupt import shielded
from curvlab.system.lock import alone
from curvlab.system.progress import counted, length, progress_bar

ALWAYS = ("cosine", "gram", "loss", "norms", "time", "shift")
"""The probes of every comparison."""


@dataclass(frozen=True)
class Run:
    """A finished comparison."""

    log: Log

    @property
    def dataset(self) -> xr.Dataset:
        """All records of the log, with its attributes. Raises CurvlabError where there is none."""
        return self.log.dataset()

    @property
    def path(self) -> Path | None:
        """The file, where the run was given one."""
        return self.log.path

    @property
    def diverged(self) -> dict[str, list[dict[str, Any]]]:
        """{algorithm whose numbers left the finite range: [{seed, step, block, reason}, …]}: NaN
        from that step on.
        """
        found: dict[str, list[dict[str, Any]]] = json.loads(
            self.log.attributes.get("diverged", "{}")
        )
        return found

    def figure(self, name: str = "cosine") -> Figure:
        """Draw figure `name`. Raises CurvlabError if it is unknown or the log lacks its data."""
        return figures.draw(self.dataset, name)

    def table(self) -> xr.DataArray:
        """Mean cosine (algorithm, block[, seed]) over the last three quarters of the steps."""
        return late_cosine(self.dataset)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What a comparison does, beside objective and batches. Defaults: the published picture (thesis
    Figure 4.1, practice).

    `probes` are further ones beside `ALWAYS`, each as "name" or "name:every".

    `momentum` is every method's β; None gives each its document's. `decay` None gives each its
    document's (0.9; Adam's β₂ 0.999). `damping` is the overall λ, from which each method's own
    follows by one rule (`algorithms.damping_for`).
    """

    reference: str = "block-fisher"
    algorithms: tuple[str, ...] = FIGURE_4_1
    lr: float | None = None
    damping: float = 1e-3
    momentum: float | None = 0.9
    decay: float | None = None
    update_every: int = 1
    refresh_every: int = 1
    log_every: int = 1
    probes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The reference, then the others, each once."""
        return tuple(dict.fromkeys((self.reference, *self.algorithms)))

    def check(self) -> None:
        """Raises CurvlabError for an unknown name or a value out of range, before anything runs."""
        for name in (self.reference, *self.algorithms):
            lookup(ALGORITHMS, name, "algorithm")
        for name, every in asked(self.probes, "compare").items():
            if name in ALWAYS and every is not None:
                raise CurvlabError(
                    f"probe '{name}' is a part of every record of a comparison: say how often by"
                    " log_every"
                )
        for name in ("update_every", "refresh_every", "log_every"):
            whole(name, getattr(self, name))
        check_rates(self.lr, self.damping, self.momentum, self.decay)
        damping_for(self.reference, self.damping, 1)

    @property
    def every(self) -> dict[str, int]:
        """{probe: steps between samples}: its own, but that of the log where that is 1."""
        wanted = dict.fromkeys(ALWAYS) | asked(self.probes, "compare")
        own = {name: every or PROBES[name].every for name, every in wanted.items()}
        return {
            n: self.log_every if wanted[n] is None and every == 1 else every
            for n, every in own.items()
        }

    @property
    def rate(self) -> float:
        """The reference's learning rate: `lr`, or its document's where that is None."""
        return ALGORITHMS[self.reference].lr if self.lr is None else self.lr

    def dampings(self, size: int) -> dict[str, float]:
        """{algorithm: its document's own damping parameter} at batches of `size` examples."""
        return {name: damping_for(name, self.damping, size) for name in self.names}

    def descents(self, objective: Objective, size: int) -> dict[str, Descent]:
        """Build {algorithm: its descent}, each damped for batches of `size` examples."""
        return {
            name: descent(
                name,
                objective,
                damping=damping,
                momentum=self.momentum,
                decay=self.decay,
                update_every=self.update_every,
                refresh_every=self.refresh_every,
                **ALGORITHMS[name].fixed,
            )
            for name, damping in self.dampings(size).items()
        }

    def log(
        self,
        objective: Objective,
        size: int,
        path: Path | None,
        seeds: Sequence[int],
        about: dict[str, Any],
    ) -> Log:
        """Make the empty log of a comparison; its attributes are the settings' and `about`."""
        chosen = list(self.every)
        coordinates: dict[str, Any] = {
            "algorithm": self.names,
            "other": self.names,
            "block": [b.name for b in objective.blocks],
        }
        coordinates = {k: list(v) for k, v in (coordinates | labels(chosen)).items()}
        coordinates["parameters"] = ("block", [" ".join(b.params) for b in objective.blocks])
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        attributes = {
            "title": f"curvlab compare: directions against {self.reference}",
            "reference": self.reference,
            "settings": settings,
            "dampings": self.dampings(size),
            "lr": self.rate,
            "batch_size": size,
            "seed": list(seeds) if len(seeds) > 1 else seeds[0],
            "device": str(objective.device),
            "dtype": str(objective.dtype).removeprefix("torch."),
        }
        return Log(coordinates, taken(chosen), attributes | about, path, seeds)


@shows(CompareSettings)
def compare(
    objective: Objective,
    batches: Iterable[Batch],
    *,
    reference: str = "block-fisher",
    algorithms: Sequence[str] = FIGURE_4_1,
    lr: float | None = None,
    damping: float = 1e-3,
    steps: int | None = None,
    warm: Iterable[Batch] | None = None,
    path: str | Path | None = None,
    progress: bool | None = None,
    probes: Sequence[str] = (),
    **options: Any,
) -> Run:
    """Follow `reference` and compare with it, at every step, the directions of `algorithms`.

    Args:
        objective: your model and likelihood; its parameters are moved.
        batches: minibatches (x, y); the run ends with them, or after `steps`.
        reference: the algorithm that moves the parameters and to which cosines are taken.
        algorithms: the others.
        lr: of the reference; its document's where None.
        damping: overall λ; each method's own damping follows from it (`damping_for`).
        warm: minibatches of the warm start. None takes the first epoch of `batches` where they are
            a data set's (`Dataset.batches`), and no warm start otherwise; pass ``()`` for none.
        path: of the log's file; None keeps it in memory.
        progress: show a progress bar; None shows one where standard error is a terminal.
        probes: further ones, of `PROBES`, each as "name" or "name:every"; one with a number of
            steps that is not the log's has an axis of its own.
        options: the other fields of `CompareSettings`: momentum, decay, update_every (T₁),
            refresh_every (T₂), log_every.

    A method whose numbers leave the finite range is named in a warning, in `Run.diverged` and in
    the log's attribute `diverged`, and is NaN from there on; the others go on.

    Raises:
        CurvlabError: unknown names, values out of range, data that do not fit. What was logged
            until then is saved.
        Diverged: the numbers of the reference left the finite range; likewise, and `stopped` in the
            log says why.
        KeyboardInterrupt: Ctrl-C, or a signal of `interrupt.SIGNALS`, once the running step is in
            the log, which is saved.
    """
    settings = CompareSettings(
        reference=reference,
        algorithms=tuple(several(algorithms)),
        lr=lr,
        damping=damping,
        probes=tuple(several(probes)),
        **known_options(options, CompareSettings, "compare"),
    )
    settings.check()
    if steps is not None:
        whole("steps", steps, 1, MOST_STEPS)
    if path is not None:
        path = paths.check_file(path, "log", "choose another path")
    total = length(batches)
    steps = total if steps is None else steps if total is None else min(steps, total)
    if warm is None:
        warm = batches.one_pass() if isinstance(batches, datasets.Batches) else ()
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise CurvlabError("there are no minibatches to compare on")
    size = len(first[0])
    call = {
        "function": "curvlab.compare",
        "batches": _describe(batches),
        "steps": steps,
        "path": None if path is None else str(path),
    }
    about = {"call": call, "model": type(objective.model).__name__, "data": call["batches"]}
    if isinstance(batches, datasets.Batches):
        about["data_description"] = batches.data.description
    log = settings.log(
        objective, size, None if path is None else Path(path), [objective.seed], about
    )
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    with (
        nullcontext() if log.path is None else alone(log.path),
        progress_bar(console, shown) as bar,
    ):
        compare_one(
            objective,
            itertools.chain([first], iterator),
            settings,
            steps,
            warm,
            size,
            log,
            objective.seed,
            bar,
        )
    return Run(log)


def _describe(batches: object) -> str:
    if isinstance(batches, datasets.Batches):
        return (
            f"{batches.data.name}, batches of {batches.size}, {batches.epochs} epochs, seed"
            f" {batches.seed}"
        )
    return type(batches).__name__


def compare_one(
    objective: Objective,
    batches: Iterable[Batch],
    settings: CompareSettings,
    steps: int | None,
    warm: Iterable[Batch],
    size: int,
    log: Log,
    seed: int,
    bar: Progress,
    title: str = "compare",
) -> None:
    """One seed. Whatever ends it, what was logged is saved."""
    descents = settings.descents(objective, size)
    every = settings.every
    curvatures = {name: d.curvature for name, d in descents.items()}
    check_probes(list(asked(settings.probes, "compare")), curvatures)
    clock = clock_of(objective.device)
    reference = settings.reference
    alive, at = dict(descents), 0  # methods whose numbers are finite; the step
    nothing: dict[str, Tensor] = {}

    def lose(name: str, error: Diverged, first: int) -> None:
        """A method leaves the comparison, from step `first` on."""
        if name == reference:
            raise error
        del alive[name], curvatures[name]
        _tell_of_loss(log, name, seed, first, error)

    def lose_early(curvature: Curvature, error: Diverged) -> None:
        lose(next(name for name, c in curvatures.items() if c is curvature), error, 0)

    try:
        shown = counted(warm, bar, "warm start", length(warm))
        warm_start(objective, list(curvatures.values()), shown, lose_early)
        task = bar.add_task(title, total=steps, note="")
        learning: dict[
            str, float
        ] = {}  # seconds spent on learning from the last step, to be counted with the next
        with shielded() as shield:
            for step, (x, y) in enumerate(itertools.islice(batches, steps)):
                with shield:  # a signal waits until the step is in the log
                    at = step
                    due = [
                        name for name, steps_between in every.items() if step % steps_between == 0
                    ]
                    begin_step(due, curvatures)
                    needs = frozenset().union(
                        *(d.needs for d in alive.values()), *(PROBES[name].needs for name in due)
                    )
                    closure = objective.closure(x, y)
                    now = closure.observe(needs)
                    directions: dict[str, dict[str, Tensor]] = {}
                    seconds: dict[str, float] = {}
                    nothing = nothing or {
                        name: torch.full_like(g, torch.nan) for name, g in now.gradients.items()
                    }
                    for name, d in descents.items():
                        directions[name], seconds[name] = nothing, math.nan
                        if name not in alive:
                            continue
                        start = clock()
                        try:
                            directions[name] = d.direction(
                                now, rate=settings.rate if name == reference else 1.0
                            )
                            seconds[name] = clock() - start + learning.pop(name, 0.0)
                        except Diverged as error:
                            lose(name, error, step)
                    frame = Frame(
                        step, now, directions, reference, settings.rate, seconds, curvatures
                    )
                    seen = sample(due, frame, "before")
                    if step % settings.log_every == 0:
                        bar.update(task, note=f"loss {float(now.loss):.4g}")
                    saved = weights(objective) if descents[reference].curvature.rejects else []
                    move(objective, directions[reference], lambda _: settings.rate)
                    learners = {name: d for name, d in alive.items() if d.wants_step}
                    if learners:  # all see the same step, the reference's
                        wanted = frozenset[Pass]().union(*(d.step_needs for d in learners.values()))
                        after = closure.observe(wanted, move_buffers=False)
                        step_taken = partial(
                            displacement, objective, directions[reference], lambda _: settings.rate
                        )
                        transition = Transition(now, after, step_taken)
                        for name, d in learners.items():
                            start = clock()
                            try:
                                stands = d.learn(transition)
                            except Diverged as error:
                                lose(name, error, step + 1)
                                continue
                            learning[name] = clock() - start
                            d.say_left_out()
                            if name == reference and not stands:
                                restore(objective, saved)
                    seen |= sample(due, frame, "after")
                    _log(
                        log,
                        step,
                        {name: seen[name] for name in due},
                        every,
                        settings.log_every,
                        seed,
                    )
                    bar.advance(task)
        bar.remove_task(task)
    except Diverged as error:
        _note_loss(log, reference, seed, at, error)
        why = str(error).removeprefix(f"{reference}: ")
        line = f"the reference {reference} left the finite range at step {at}: {why}"
        log.attributes["stopped"] = line
        stopped = Diverged(line)
        stopped.block, stopped.method = error.block, reference
        raise stopped from error
    finally:
        log.save()


def _note_loss(log: Log, name: str, seed: int, step: int, error: Diverged) -> None:
    """In the log: which method, of which block, from which step and why."""
    found = json.loads(log.attributes.get("diverged", "{}"))
    found.setdefault(name, []).append(
        {"seed": seed, "step": step, "block": error.block, "reason": str(error)}
    )
    log.attributes["diverged"] = json.dumps(found, ensure_ascii=False)


def _tell_of_loss(log: Log, name: str, seed: int, step: int, error: Diverged) -> None:
    """In the log and in a warning."""
    _note_loss(log, name, seed, step, error)
    where = f"{name} (seed {seed})" if len(log.seeds) > 1 else name
    why = str(error).removeprefix(f"{name}: ")
    warn(
        f"{where} left the finite range and is NaN from step {step} on, while the others go on:"
        f" {why}"
    )


def _log(
    log: Log, step: int, seen: dict[str, Sample], every: dict[str, int], log_every: int, seed: int
) -> None:
    """What is taken as often as the log lies along its steps; the rest along axes of its own."""
    record: ProbeRecord = {}
    for name, found in seen.items():
        values = {v: (PROBES[name].variables[v].dims, on_host(x)) for v, x in found.items()}
        if every[name] == log_every:
            record |= values
        else:
            log.extend(
                axis(name), [step], {v: (dims, x[None]) for v, (dims, x) in values.items()}, seed
            )
    if record:
        log.append(step, record, seed)
