"""A searched grid: the points of one method on one problem, among them the document's choice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainedPoint:
    """A place of a grid, {axis: value}, and the lowest loss there.

    Where it diverged the loss is infinite, and `reason` says why; likewise where the method does
    not take these values at all (`refused`).
    """

    place: Mapping[str, float]
    lowest: float = math.inf
    reason: str = ""
    refused: bool = False


@dataclass(frozen=True)
class SearchedGrid:
    """The points of one method on one problem; `choice` is the document's, {axis: value}."""

    points: tuple[TrainedPoint, ...]
    choice: Mapping[str, float]

    @property
    def best(self) -> TrainedPoint | None:
        """The point of the lowest loss; of equal ones the document's, then the first.

        None where all have diverged.
        """
        good = [point for point in self.points if math.isfinite(point.lowest)]
        return min(good, key=lambda p: (p.lowest, p.place != self.choice), default=None)

    def at(self, place: Mapping[str, float]) -> TrainedPoint:
        """Return the point at a place of the grid."""
        return next(point for point in self.points if point.place == place)

    def values(self, axis: str) -> list[float]:
        """Return the values of an axis, ascending."""
        return sorted({point.place[axis] for point in self.points})

    @property
    def steps(self) -> int | None:
        """The steps along the axes between the document's choice and the best; None without."""
        if self.best is None:
            return None
        ways = ((self.values(axis), axis) for axis in self.choice)
        return sum(
            abs(values.index(self.choice[axis]) - values.index(self.best.place[axis]))
            for values, axis in ways
        )

    @property
    def excess(self) -> float:
        """How far the loss at the document's choice is above the lowest, as a part of that."""
        return self.at(self.choice).lowest / self.best.lowest - 1 if self.best else math.inf

    @property
    def standing(self) -> str:
        """Where the document's choice stands, and how far above the lowest its loss is."""
        if self.best is None:
            return "all diverged"
        if not self.steps:
            return "best"
        where = "beside the best" if self.steps == 1 else f"{self.steps} steps off"
        return where + (f", +{self.excess:.1%}" if math.isfinite(self.excess) else "")

    def within(self, times: float) -> int:
        """Return how many points end at most at so many times the lowest loss."""
        best = self.best
        if best is None:
            return 0
        return sum(point.lowest <= times * best.lowest for point in self.points)
