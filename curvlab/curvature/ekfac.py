"""EKFAC: KFAC's eigenvectors, with the second moments of the gradients in that basis.

George et al. 2018.

Legend: V vectors, N examples, T places, I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.curvature.kfac import FACTOR_A, FACTOR_G, SHARING
from curvlab.errors import lookup
from curvlab.linalg.cholesky import damped_reciprocal
from curvlab.linalg.eigenbasis import Basis, Rotated
from curvlab.linalg.operators import Diagonal, Operator
from curvlab.linalg.spectral import eigh
from curvlab.statistics import LayerStatistics, Reads

AT_ONCE = 2**22
"""Entries of rotated rows that are held at once where a weight is shared by several places."""


def rotated_squares(
    statistics: LayerStatistics, Q_G: Float[Tensor, "O O"], Q_A: Float[Tensor, "I I"] | None
) -> Float[Tensor, "O I"]:
    """Return D = (1/N) Σ_n Σ_v (Q_Gᵀ (Σ_t g aᵀ) Q_A)², the diagonal of QᵀFQ, Q = Q_G ⊗ Q_A.

    The sum over places stands inside the square: a row is an example's whole gradient. At one place
    it is a product of squares, and no row is formed.

    Args:
        statistics: of the pass whose second moment F is.
        Q_G: of the outputs.
        Q_A: of the inputs; None is I.
    """
    g, a = statistics.g @ Q_G, statistics.a if Q_A is None else statistics.a @ Q_A
    if a.shape[1] == 1:
        return g[:, :, 0].square().sum(0).mT @ a[:, 0].square() / statistics.size
    outputs, inputs = g.shape[3], a.shape[2]
    found = a.new_zeros(outputs, inputs)
    examples = max(1, AT_ONCE // (outputs * inputs))
    for vector in g:
        for some in range(0, len(a), examples):
            rows = vector[some : some + examples].mT @ a[some : some + examples]
            found += rows.square().sum(0)
    return found / statistics.size


class Ekfac(BlockDefaults):
    """Inverse H = Q diag(1 / (D + λ)) Qᵀ, Q = Q_G ⊗ Q_A of the eigenvectors of KFAC's G and A.

    D is the diagonal of QᵀFQ, a moving average as A and G are. Of all matrices that are diagonal
    in the basis Q, Q diag(D) Qᵀ is the nearest to F in the Frobenius norm, KFAC's among them:
    ‖F − E‖² = ‖F‖² − ‖D‖² ≤ ‖F − K‖².

    Q is made anew at every refresh (T₂), D at every update. At a refresh the minibatch that is
    folded in is taken in the new basis; what older ones have left of D is carried over as the
    diagonal in the new basis of what it was in the old.

    Args:
        sharing: as of KFAC, of the basis alone; D has the sum over places inside the square.
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = ("A", "G", "Q_A", "Q_G", "D")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, sharing: str = "expand") -> None:
        self.sharing = lookup(SHARING, sharing, "sharing")
        self.A: Tensor | None = None  # a vector where it is diagonal, and then Q_A is I
        self.G: Tensor | None = None
        self.Q_A: Tensor | None = None
        self.Q_G: Tensor | None = None
        self.D: Tensor | None = None  # [O, I]
        self._pending: tuple[LayerStatistics, float] | None = None

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A and G of the minibatch}, which `update` folds in."""
        A, G = self.sharing(statistics)
        return {FACTOR_A: A, FACTOR_G: G}

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the minibatch's A and G in; D waits for the basis, which a refresh may change."""
        self.settle(None)
        A, G = self.sharing(statistics)
        self.A, self.G = blend(self.A, A, weight), blend(self.G, G, weight)
        self._pending = (statistics, weight)

    def refresh(self, damping: float) -> None:
        """Make the basis of A and G as they stand, D in it, and the inverse.

        Where several ranks share the minibatch that waits, and one alone refreshes the block, it
        enters D in `settle`, which all come to.
        """
        self._turn()
        if self._pending is not None and self._pending[0].shared:
            return
        self._fold()
        assert self.D is not None
        values = damped_reciprocal(self.D.flatten(), damping, "the diagonal of EKFAC")
        self.inverse = Rotated(self._bases(), Diagonal(values))

    def settle(self, damping: float | None) -> None:
        """Fold the minibatch into D in the basis that stands, and make the inverse of it anew."""
        if self._pending is None:
            return
        if self.Q_G is None:
            self._turn()
        self._fold()
        if damping is not None:
            assert self.D is not None
            least = torch.finfo(self.D.dtype).eps * self.D.amax().clamp_min(1.0)  # where λ is 0
            values = torch.maximum(self.D.flatten() + damping, least)
            self.inverse = Rotated(self._bases(), Diagonal(values.reciprocal()))

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return Q diag(D + λ) Qᵀ, which approximates the Fisher matrix."""
        assert self.D is not None
        return Rotated(self._bases(), Diagonal(self.D.flatten() + damping))

    def _bases(self) -> tuple[Basis, Basis]:
        assert self.A is not None
        assert self.Q_G is not None
        inputs = Diagonal(torch.ones_like(self.A)) if self.Q_A is None else self.Q_A
        return self.Q_G, inputs

    def _turn(self) -> None:
        """Make Q_G and Q_A anew, and D the diagonal in them of Q diag(D) Qᵀ of the old ones."""
        assert self.A is not None
        assert self.G is not None
        Q_G, Q_A = eigh(self.G)[1], eigh(self.A)[1] if self.A.ndim == 2 else None
        if self.D is not None:
            assert self.Q_G is not None
            self.D = (Q_G.mT @ self.Q_G).square() @ self.D
            if Q_A is not None:
                assert self.Q_A is not None
                self.D = self.D @ (self.Q_A.mT @ Q_A).square()
        self.Q_G, self.Q_A = Q_G, Q_A

    def _fold(self) -> None:
        """Fold the minibatch that waits into D."""
        if self._pending is not None:
            statistics, weight = self._pending
            assert self.Q_G is not None
            Q_G, Q_A = self.Q_G, self.Q_A
            (squares,) = statistics.averaged(lambda s: [rotated_squares(s, Q_G, Q_A)])
            self.D = blend(self.D, squares, weight)
            self._pending = None
