"""Sophia-G: the diagonal of the Gauss-Newton matrix by drawn labels, and a clipped direction.

Liu et al. 2023.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant
from curvlab.errors import real
from curvlab.linalg.operators import Diagonal, Operator
from curvlab.statistics import LayerStatistics, Reads

_LEAST = 1e-15
"""What the authors' code adds to the denominator; here the least that it is."""


class SophiaG(BlockDefaults):
    """Moving average h of N ĝ ⊙ ĝ, with the direction clip(m / (ρ (h + λ)), ±1).

    ĝ is the mean gradient of the minibatch's N examples at labels drawn from the model, so that the
    expectation of N ĝ ⊙ ĝ over labels is the diagonal of the Gauss-Newton matrix exactly (N is what
    the authors call the number of label draws). h starts at zero and is not corrected for that.

    The clip depends on the momentum m, and is written as a matrix that does: H(m) =
    diag(1 / max(ρ (h + λ), |m|)), H(m) m = clip(m / (ρ (h + λ)), ±1). `heed` is told of m, so that
    `inverse` is H(m) of the last direction, positive definite and linear as any other's; before a
    momentum it is diag(1 / (ρ (h + λ))). ρ → 0 is sign descent, ρ → ∞ damped diagonal Newton.

    Args:
        rho: ρ, above 0 (authors' code: 0.04).
    """

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ("h", "mass")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, rho: float = 0.04) -> None:
        self.rho = real("rho", rho, "above 0", lambda v: v > 0)
        self.h: Tensor | None = None  # [D]
        self.mass: Tensor | None = None  # the same average of 1, which `matrix` divides by

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold N ĝ ⊙ ĝ in, N the number of examples."""
        squares = statistics.gradient.square().flatten() * statistics.size
        if self.h is None:
            self.h, self.mass = torch.zeros_like(squares), squares.new_zeros(())
        assert self.mass is not None
        self.h = self.h.lerp(squares, weight)
        self.mass = self.mass * (1 - weight) + weight

    def refresh(self, damping: float) -> None:
        """Set `inverse` to diag(1 / (ρ (h + λ)))."""
        self.inverse = Diagonal(self._denominator(damping).clamp_min(_LEAST).reciprocal())

    def heed(self, momentum: Tensor, damping: float | None) -> None:
        """Set `inverse` to H(m) of the momentum that is preconditioned next."""
        if damping is not None:
            least = momentum.flatten().abs().clamp_min(_LEAST)
            self.inverse = Diagonal(torch.maximum(self._denominator(damping), least).reciprocal())

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return diag(h + λ), h over its weights' sum: it approximates the Fisher matrix itself."""
        assert self.h is not None
        assert self.mass is not None
        return Diagonal(self.h / self.mass + damping)

    def _denominator(self, damping: float) -> Tensor:
        assert self.h is not None
        return (self.h + damping) * self.rho
