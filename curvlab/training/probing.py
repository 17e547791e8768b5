"""Probes along a training run: each every so many steps, on an axis of its own.

Over an epoch there is what follows from its samples. Samples stay on the device until the end of
the epoch, or the next checkpoint. What probes cost is timed apart from training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from curvlab.logs.log import Log
from curvlab.logs.log import Record as LogRecord
from curvlab.objective import Objective
from curvlab.observation import Observation
from curvlab.optim import Optimizer
from curvlab.probes.base import (
    PROBES,
    Frame,
    Moment,
    Sample,
    axis,
    begin_step,
    check_probes,
    empty,
    on_host,
    sample,
)

_ALWAYS = ("shift",)
"""Probes that every run takes in which there is something to see."""


class Sampler:
    """Takes the probes that are due.

    `start` is told of every step before it begins, `after` when it is done.

    Args:
        objective: whose blocks.
        optimizer: is asked for the passes that probes read, and shows its directions before it
            moves.
        algorithm: its name.
        wanted: {probe: steps between samples, None for the probe's own}.
        clock: seconds.

    Raises:
        CurvlabError: a probe with nothing to see in this algorithm.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        algorithm: str,
        wanted: Mapping[str, int | None],
        clock: Callable[[], float],
    ) -> None:
        curvature = optimizer.descent.curvature
        check_probes(list(wanted), {algorithm: curvature})
        always = {name: None for name in _ALWAYS if PROBES[name].fits(curvature)}
        self.every = {n: every or PROBES[n].every for n, every in {**always, **wanted}.items()}
        self.objective, self.optimizer, self.algorithm, self.clock = (
            objective,
            optimizer,
            algorithm,
            clock,
        )
        self.wall = self.cpu = 0.0  # seconds spent since `spent` was last called
        self.due: list[str] = []
        self._step = 0
        self._frame: Frame | None = None
        self._pending: dict[str, list[tuple[int, Sample]]] = {}

    def start(self, step: int) -> None:
        """Get ready for step number `step`, from 0: which probes are due, and their passes."""
        self._step, self._frame = step, None
        self.due = [name for name, every in self.every.items() if step % every == 0]
        begin_step(self.due, {self.algorithm: self.optimizer.descent.curvature})
        self.optimizer.also = frozenset().union(*(PROBES[n].needs for n in self.due))
        self.optimizer.look = self._before if self.due else None

    def _before(self, observation: Observation, direction: dict[str, Tensor]) -> None:
        lr = float(self.optimizer.param_groups[0]["lr"])
        curvatures = {self.algorithm: self.optimizer.descent.curvature}
        self._frame = Frame(
            self._step,
            observation,
            {self.algorithm: direction},
            self.algorithm,
            lr,
            curvatures=curvatures,
        )
        self._take(self._frame, "before")

    def after(self) -> None:
        """Take the probes that look after the step, which is done."""
        if self._frame is not None:
            self._take(self._frame, "after")
            self._frame = None

    def _take(self, frame: Frame, moment: Moment) -> None:
        wall, cpu = self.clock(), time.process_time()
        for name, found in sample(self.due, frame, moment).items():
            self._pending.setdefault(name, []).append((self._step, found))
        self.wall += self.clock() - wall
        self.cpu += time.process_time() - cpu

    def spent(self) -> tuple[float, float]:
        """Return the wall and CPU seconds since this was last asked."""
        found, self.wall, self.cpu = (self.wall, self.cpu), 0.0, 0.0
        return found

    def flush(self, log: Log) -> None:
        """Bring what is pending from the device into the log."""
        pending, self._pending = self._pending, {}
        for name, taken in pending.items():
            values = {
                v: (spec.dims, _stacked([found[v] for _, found in taken]))
                for v, spec in PROBES[name].variables.items()
            }
            log.extend(axis(name), [step for step, _ in taken], values)

    def names(self) -> list[str]:
        """Return the variables of `of_epoch`."""
        return [
            name
            for probe in self.every
            if PROBES[probe].reduce is not None
            for name in PROBES[probe].epoch
        ]

    def tracks(self) -> dict[str, list[str]]:
        """Return {axis: variables} of `flush`, from the first step on."""
        return {axis(probe): list(PROBES[probe].variables) for probe in self.every}

    def of_epoch(self, log: Log, first: int) -> LogRecord:
        """Return what the samples from step `first` on say of their epoch."""
        sizes = {"algorithm": 1, "block": len(self.objective.blocks)}
        found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
        for name in self.every:
            one = PROBES[name]
            if one.reduce is None:
                continue
            samples = log.since(axis(name), first)
            some = samples and len(next(iter(samples.values())))
            values = one.reduce(samples) if some else empty(name, sizes)
            found |= {v: (spec.dims, np.asarray(values[v])) for v, spec in one.epoch.items()}
        return found


def _stacked(values: list[np.ndarray | Tensor]) -> np.ndarray:
    """Stack values by one copy from the device."""
    if isinstance(values[0], Tensor):
        return on_host(torch.stack([v for v in values if isinstance(v, Tensor)]))
    return np.stack([on_host(v) for v in values])
