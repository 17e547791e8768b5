"""Natural gradient through Sherman–Morrison–Woodbury: an N×N system for a block (thesis 5.3, Alg. 23, block-diagonal)."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from curvlab.capture import LayerStatistics
from curvlab.curvature.base import Reads, Secant
from curvlab.linalg.operators import LowRank, Operator
from curvlab.linalg.woodbury import Rows


class SmwFisher:
    """H = (λI + (1/N) Σₙ vec(D W) vec(D W)ᵀ)⁻¹ on one minibatch, no moving average: (5.6) with the D_t of one layer.

    The same inverse as `DenseFisher` on the same minibatch, through an N×N Gram matrix and without forming a gradient.
    """

    reads: Reads = "rows"
    memory: ClassVar[tuple[str, ...]] = ("g", "a")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self) -> None:
        self.g: Tensor | None = None
        self.a: Tensor | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        scale = 1 / math.sqrt(statistics.size)
        if statistics.block.groups == 1 and len(statistics.g) == 1 and statistics.g.shape[2] == 1:
            self.g, self.a = statistics.g[0, :, 0] * scale, statistics.a[:, 0]
        else:
            self.g, self.a = statistics.rows.flatten(2).flatten(0, 1) * scale, None

    def refresh(self, damping: float) -> None:
        assert self.g is not None
        self.inverse = self.matrix(damping).inv()

    def matrix(self, damping: float = 0.0) -> Operator:
        """λI + F of the last minibatch."""
        assert self.g is not None
        return LowRank(Rows(self.g, self.a), damping)
