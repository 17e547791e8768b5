"""Kronecker factors that are kept for some steps, while a refinement of them goes on at each.

Document: S2QN (Yang et al.), (17), (18), Alg. 1.

Legend: I inputs incl. the bias column, O outputs; e eigenvalues.
"""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.curvature.kfac import FACTOR_A, FACTOR_G, Kfac
from curvlab.linalg.eigenbasis import eigenbasis
from curvlab.linalg.operators import Operator
from curvlab.statistics import LayerStatistics, Reads

Eigen = tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]
"""Eigenvalues of a factor, none below 0, and its eigenvectors."""

BASE: tuple[str, ...] = ("A", "G", "kept_A", "kept_G", "U", "V", "left_out")
"""What a checkpoint holds of every such block."""


class KeptFactors(BlockDefaults):
    """Averages A and G, and G̃ ⊗ Â, those of the last refresh: the base of Alg. 1, line 2.

    T₂, the steps between two refreshes, is how long the base is kept. What a step has left becomes
    a pair against the base that the next direction is of, at every step (`refine`).
    """

    reads: Reads = "factors"
    memory: ClassVar[tuple[str, ...]] = BASE
    factored = learns_pairs = True
    inverse: Operator

    def __init__(self) -> None:
        self.A: Tensor | None = None  # averages
        self.G: Tensor | None = None
        self.kept_A: Tensor | None = None  # Â, G̃
        self.kept_G: Tensor | None = None
        self.U: Tensor | None = None  # what a step gave, no pair yet
        self.V: Tensor | None = None
        self.left_out: int = 0  # pairs, or blocks of them, so far, since they were not finite
        self.secant: Secant | None = None
        self.refine = self._refine
        self._eigen: dict[str, tuple[Tensor, Eigen]] = {}

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A and G of the minibatch}, which `update` folds in."""
        return {FACTOR_A: statistics.A, FACTOR_G: statistics.G}

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold A and G in; the base stands until the next `refresh`."""
        self.A, self.G = blend(self.A, statistics.A, weight), blend(self.G, statistics.G, weight)

    def refresh(self, damping: float) -> None:
        """Take A and G as the base from here on, and refine it."""
        self.kept_A, self.kept_G = self.A, self.G  # which `blend` writes nothing into
        self._refine(damping)

    def _refine(self, damping: float) -> None:
        """Learn from what the last step has left (Alg. 1, line 3), and make `inverse` (line 4).

        Raises Diverged where a matrix is not positive definite.
        """
        raise NotImplementedError

    @property
    def base(self) -> tuple[Float[Tensor, "I I"], Float[Tensor, "O O"]]:
        """Â and G̃; before the first refresh the averages themselves."""
        A, G = (self.A, self.G) if self.kept_A is None else (self.kept_A, self.kept_G)
        assert A is not None
        assert G is not None
        return A, G

    def _kfac(self, G: Float[Tensor, "O O"]) -> Kfac:
        """Return KFAC of Â and G."""
        kfac = Kfac()
        kfac.A, kfac.G = self.base[0], G
        return kfac

    def _eigen_of(self, name: str, factor: Tensor) -> Eigen:
        """Return the eigenbasis of a factor, which is computed once while that is kept."""
        held = self._eigen.get(name)
        if held is None or held[0] is not factor:
            held = self._eigen[name] = (factor, eigenbasis(factor))
        return held[1]
