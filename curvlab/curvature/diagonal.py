"""Diagonal curvature: Adam's second moments (thesis 4.7.2; Kingma and Ba 2015)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from curvlab.capture import LayerStatistics
from curvlab.curvature.base import Reads, Secant, blend
from curvlab.linalg.operators import Diagonal, Operator


class SecondMoment:
    """v = average of g², H = diag(1 / (√v + ε)): textbook Adam with the damping as ε, outside the root."""

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ("v",)
    secant: Secant | None = None
    inverse: Operator

    def __init__(self) -> None:
        self.v: Tensor | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        self.v = blend(self.v, statistics.gradient.square().flatten(), weight)

    def refresh(self, damping: float) -> None:
        assert self.v is not None
        self.inverse = Diagonal((self.v.sqrt() + damping).reciprocal())

    def matrix(self, damping: float = 0.0) -> Operator:
        """diag((√v + ε)²): of diag(Fisher) / N."""
        assert self.v is not None
        return Diagonal((self.v.sqrt() + damping).square())
