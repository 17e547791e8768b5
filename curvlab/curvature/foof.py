"""FOOF: I ⊗ Ω, the second moment of the inputs alone; KFAC with I in the place of Γ.

Benzing 2022. It separates what A buys in KFAC from what G buys.

Legend: I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.errors import lookup
from curvlab.layers import Block
from curvlab.linalg.cholesky import damped_inverse, damped_reciprocal, shifted
from curvlab.linalg.operators import Diagonal, Kronecker, Operator
from curvlab.statistics import LayerStatistics, Reads

INPUT_MOMENTS: dict[str, Callable[[LayerStatistics], Tensor]] = {
    "expand": lambda s: s.A if s.diagonal_A is None else s.diagonal_A,
    "reduce": lambda s: s.reduced_A,
}
"""Statistics of a minibatch → A, in the two ways of `curvature.kfac.SHARING`."""

FOOF_FACTOR = "the FOOF factor A"


class Foof(BlockDefaults):
    """Inverse H = I ⊗ (Ω + λI)⁻¹ of the moving average Ω of A: the direction Ḡ (Ω + λI)⁻¹.

    A step of length 1 minimises the layer's squared change of outputs: with one linear layer, the
    squared error and λ = 0 it solves least squares. λ is of A alone. Its matrix I ⊗ Ω is the
    Gauss-Newton matrix of the loss ½‖z − y‖² of one linear layer, and no estimate of the Fisher
    matrix of any other.

    Args:
        block: whose outputs.
        sharing: how places of one weight enter A, as of KFAC (`INPUT_MOMENTS`).
    """

    reads: Reads = "moments"
    memory: ClassVar[tuple[str, ...]] = ("A",)
    secant: Secant | None = None
    factored = True
    inverse: Operator

    def __init__(self, block: Block, *, sharing: str = "expand") -> None:
        self.outputs = block.shape[0]
        self.sharing = lookup(INPUT_MOMENTS, sharing, "sharing")
        self.A: Tensor | None = None  # a vector where it is diagonal, as of an embedding

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A of the minibatch}, which `update` folds in."""
        return {FOOF_FACTOR: self.sharing(statistics)}

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the minibatch's A in."""
        self.A = blend(self.A, self.sharing(statistics), weight)

    def refresh(self, damping: float) -> None:
        """Invert A + λI; Diverged where it has no Cholesky factor (`damped_cholesky`)."""
        assert self.A is not None
        inverse = (
            damped_inverse(self.A, damping, FOOF_FACTOR)
            if self.A.ndim == 2
            else Diagonal(damped_reciprocal(self.A, damping, FOOF_FACTOR))
        )
        self.inverse = Kronecker((self._identity(), inverse))

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return I ⊗ (Ω + λI)."""
        assert self.A is not None
        A = shifted(self.A, damping) if self.A.ndim == 2 else Diagonal(self.A + damping)
        return Kronecker((self._identity(), A))

    def _identity(self) -> Diagonal:
        assert self.A is not None
        return Diagonal(self.A.new_ones(self.outputs))
