"""Diagonal curvature: Adam and RMSprop.

Adam: thesis 4.7.2; Kingma and Ba 2015. RMSprop: thesis 2.8.2; Hinton et al. 2012.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant
from curvlab.linalg.operators import Diagonal, Operator
from curvlab.statistics import LayerStatistics, Reads


class SecondMoment(BlockDefaults):
    """Moving average v of squared gradients, with H = diag(1 / (√v + ε)).

    Textbook Adam with the damping as ε, outside the root.

    The gradient is that of the objective, its L2 term included, as of the momentum: Kingma and Ba's
    g is of f, and so v is what `torch.optim.Adam(weight_decay=2μ)` has.

    RMSprop is the same with no bias correction of either moment (thesis 2.8.2) and v from a warm
    start. `torch.optim.RMSprop` differs in three ways: its v starts at zero, where ours is a
    running mean until it is a moving average; its momentum is of the preconditioned gradient, where
    ours is of the gradient, in the way of Adam, and an average; and its α is 0.99, where the thesis
    has 0.9. Its ε is outside the root too.
    """

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ("v",)
    secant: Secant | None = None
    squares_objective = True
    inverse: Operator

    def __init__(self) -> None:
        self.v: Tensor | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the squares of the minibatch's mean gradient into v, in place."""
        # its squares are finite: `soundness.check_gradients`, `base.check_squared`
        g = statistics.gradient
        if self.v is None:
            self.v = g.square().flatten()
        else:
            self.v.mul_(1 - weight).view(g.shape).addcmul_(g, g, value=weight)

    def refresh(self, damping: float) -> None:
        """Set `inverse` to diag(1 / (√v + ε)), ε the damping."""
        assert self.v is not None
        self.inverse = Diagonal(self.v.sqrt().add_(damping).reciprocal_())

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return diag((√v + ε)²), which approximates diag(Fisher) / N."""
        assert self.v is not None
        return Diagonal((self.v.sqrt() + damping).square())
