"""Seconds of training, with evaluation, warm start and probes apart."""

from __future__ import annotations

import time
from collections.abc import Callable

from curvlab.training.probing import Sampler
from curvlab.training.settings import Position


class Stopwatch:
    """A watch of what a run's steps take, added to its position whenever they pause.

    Args:
        clock: seconds, once the device has done what it was asked.
        sampler: whose probes' time is taken off.
    """

    def __init__(self, clock: Callable[[], float], sampler: Sampler) -> None:
        self.clock, self.sampler = clock, sampler
        self._since: tuple[float, float] | None = None  # wall and CPU seconds; None: it stands

    def resume(self) -> None:
        """Go on measuring."""
        self._since = (self.clock(), time.process_time())

    def pause(self, at: Position) -> None:
        """Stop measuring, and add what was measured; nothing where it stands."""
        if self._since is not None:
            wall, cpu = self.sampler.spent()
            at.wall += self.clock() - self._since[0] - wall
            at.cpu += time.process_time() - self._since[1] - cpu
            at.probes += wall
            self._since = None

    def gone(self, at: Position) -> float:
        """Return the seconds of training so far; wait for no device."""
        return at.wall + (
            0.0 if self._since is None else time.perf_counter() - self._since[0] - self.sampler.wall
        )
