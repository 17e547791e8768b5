"""KFAC: Ω ⊗ Γ, a second moment of the inputs and one of the derivatives.

Thesis Alg. 12; Martens and Grosse 2015.

Alg. 12, line 12 passes over the last minibatch again after the weights have moved, so that every
direction is from statistics at its own weights. Here they are of its own minibatch too, whose
forward pass they share; losses agree with the printed order's to a percent. With statistics that
are a step older the MNIST autoencoder diverges within 13 steps at Table 4.3's values, on each of
three seeds.

Legend: I inputs incl. the bias column, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.curvature.large import guard_factor
from curvlab.errors import lookup
from curvlab.linalg.cholesky import damped_inverse, damped_reciprocal, shifted
from curvlab.linalg.kronecker import pi_split
from curvlab.linalg.operators import Diagonal, Kronecker, Operator
from curvlab.statistics import LayerStatistics, Reads

SPLITS: dict[str, Callable[[Tensor, Tensor, float], tuple[float, float]]] = {
    "pi": pi_split,
    "even": lambda A, G, damping: (math.sqrt(damping), math.sqrt(damping)),
}
"""Splits of λ, (A, G, λ) → the dampings of A and G.

Thesis Alg. 12, line 19; π = 1 of Alg. 7, line 11 and of 2021 Alg. 5, line 14.
"""


Factors = tuple[Tensor, Tensor]

SHARING: dict[str, Callable[[LayerStatistics], Factors]] = {
    "expand": lambda s: (s.A if s.diagonal_A is None else s.diagonal_A, s.G),
    "reduce": lambda s: (s.reduced_A, s.reduced_G),
}
"""Statistics of a minibatch → (A, G) where a weight is shared by T places.

"expand": every place counts as an example of its own, A = (1/N) Σ_n Σ_t a aᵀ, G = (1/NT) Σ g gᵀ:
exact where places do not mix and the loss is a sum over them. "reduce": of each example the mean of
a and the sum of g over places: exact where the outputs are pooled (Eschenhagen et al. 2023, in the
scale of thesis Alg. 12). A of an embedding is its diagonal, a vector.
"""

FACTOR_A, FACTOR_G = "the KFAC factor A (Ω)", "the KFAC factor G (Γ)"


class Kfac(BlockDefaults):
    """Inverse H = (Γ + √λ/π I)⁻¹ ⊗ (Ω + π√λ I)⁻¹ of moving averages Ω of A and Γ of G.

    Alg. 12, lines 14 and 19; with the split "even" Alg. 7, lines 9 and 11.
    """

    reads: Reads = "moments"
    memory: ClassVar[tuple[str, ...]] = ("A", "G")
    secant: Secant | None = None
    factored = True
    inverse: Operator

    def __init__(self, split: str = "pi", sharing: str = "expand") -> None:
        self.split = lookup(SPLITS, split, "split of the damping")
        self.sharing = lookup(SHARING, sharing, "sharing")
        self.A: Tensor | None = None  # a vector where it is diagonal
        self.G: Tensor | None = None

    def moments(self, statistics: LayerStatistics) -> dict[str, Tensor]:
        """Return {name: A and G of the minibatch}, which `update` folds in."""
        A, G = self._factors(statistics)
        return {FACTOR_A: A, FACTOR_G: G}

    def _factors(self, statistics: LayerStatistics) -> Factors:
        """Return A and G. Raises CurvlabError where one is too large for the memory."""
        block, like = statistics.block, statistics.like
        guard_factor(block, block.shape[0], like, FACTOR_G)
        if statistics.diagonal_A is None:
            guard_factor(block, block.shape[1], like, FACTOR_A)
        return self.sharing(statistics)

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the minibatch's A and G in (Alg. 12, line 14)."""
        A, G = self._factors(statistics)
        self.A = blend(self.A, A, weight)  # Alg. 12, line 14: Ω
        self.G = blend(self.G, G, weight)  # Alg. 12, line 14: Γ

    def refresh(self, damping: float) -> None:
        """Invert G and A, each with its part of the damping (Alg. 12, line 19; Alg. 7, line 11).

        Raises Diverged where one has no Cholesky factor (`damped_cholesky`).
        """
        assert self.A is not None
        assert self.G is not None
        # Alg. 12, line 19; Alg. 7, line 11
        damping_a, damping_g = self.split(self.A, self.G, damping)
        self.inverse = Kronecker(
            (
                damped_inverse(self.G, damping_g, FACTOR_G),
                damped_inverse(self.A, damping_a, FACTOR_A)
                if self.A.ndim == 2
                else Diagonal(damped_reciprocal(self.A, damping_a, FACTOR_A)),
            )
        )

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return Γ ⊗ Ω, damped by line 19, which approximates the Fisher matrix."""
        assert self.A is not None
        assert self.G is not None
        damping_a, damping_g = self.split(self.A, self.G, damping)
        A = shifted(self.A, damping_a) if self.A.ndim == 2 else Diagonal(self.A + damping_a)
        return Kronecker((shifted(self.G, damping_g), A))
