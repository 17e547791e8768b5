"""Settings of every curvature: its labels, its damping, and when it updates and inverts."""

from __future__ import annotations

from dataclasses import dataclass

from curvlab.curvature.base import check_damping
from curvlab.errors import whole
from curvlab.observation import Pass


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Steps at which a method updates its statistics and refreshes its inverse, counted from 1.

    Args:
        update_every: T₁, steps between updates.
        refresh_every: T₂, steps between refreshes.

    Raises:
        CurvlabError: a number of steps that is not 1 or more.
    """

    update_every: int = 1
    refresh_every: int = 1

    def __post_init__(self) -> None:
        whole("update_every", self.update_every)
        whole("refresh_every", self.refresh_every)

    def updates(self, step: int) -> bool:
        """Return whether statistics are updated at this step: the first, and every T₁-th."""
        return step == 1 or step % self.update_every == 0

    def refreshes(self, step: int, changed: bool = True) -> bool:
        """Return whether the inverse is refreshed at this step.

        At every T₂-th, and at each of the first T₂ that has something new: "every T₁ during the
        first T₂" (practice). With T₁ = 1 at each of them (Alg. 7, line 10: k ≤ T).

        Args:
            step: counted from 1.
            changed: whether statistics or damping are others than at the last refresh.
        """
        new = changed or self.update_every == 1
        return step % self.refresh_every == 0 or (new and step <= self.refresh_every)


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings:
    """Settings that every method is told beside its own options.

    Args:
        labels: the pass that its curvature is of.
        damping: in the document's own place.
        cadence: T₁ and T₂.
        name: of the algorithm; a checkpoint of another is refused.

    Raises:
        CurvlabError: a damping that is negative or not finite.
    """

    labels: Pass
    damping: float
    cadence: Cadence = Cadence()
    name: str = ""

    def __post_init__(self) -> None:
        check_damping(self.damping)
