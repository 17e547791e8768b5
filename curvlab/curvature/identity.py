"""The identity in the place of an inverse: the gradient itself, or over the damping."""

from __future__ import annotations

from typing import ClassVar

import torch

from curvlab.curvature.base import BlockDefaults, Secant
from curvlab.errors import CurvlabError
from curvlab.linalg.operators import Diagonal, Operator, identity_like
from curvlab.statistics import LayerStatistics, Reads


class IdentityBlock(BlockDefaults):
    """Identity in place of an inverse, which leaves the gradient itself: SGD.

    Also where there is no structure (thesis 4.7.2: BatchNorm in KFAC).

    Args:
        over_damping: the gradient over λ: the rate α/λ (thesis 3.4.3: BatchNorm in K-BFGS).
    """

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ()
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, over_damping: bool = False) -> None:
        self.over_damping = over_damping

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Make `inverse` the identity at the first statistics; nothing is folded in."""
        if not hasattr(self, "inverse"):
            self.inverse = identity_like(statistics.like.new_empty(statistics.block.shape))

    def refresh(self, damping: float) -> None:
        """Set `inverse` to I/λ with `over_damping`; CurvlabError where λ is not above 0."""
        if self.over_damping:
            if not damping > 0:
                raise CurvlabError(
                    "the rate of the gradient is that of the method over its damping, not over"
                    f" {damping:g}"
                )
            self.inverse = Diagonal(torch.full_like(self.inverse.diag(), 1 / damping))

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return None: no matrix is estimated."""
        return None
