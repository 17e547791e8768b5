"""Base of TNT and Shampoo: E[G^(i)] of every variable of a block, a Kronecker factor for every way.

A block per variable, W and b apart (thesis 4.3.1); inside a layer's block they are a direct sum, so
that directions carry the same labels as everyone's. Filters have three ways, outputs, inputs and
pixels (thesis 4.7.2).

Legend: k ways of a variable of shape [d_1, …, d_k]; O outputs, C channels, P pixels of a filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, FactorBounds, Secant, blend
from curvlab.curvature.large import guard_factor
from curvlab.curvature.moments import check_moments
from curvlab.layers import Block
from curvlab.linalg.direct_sum import ColumnSum
from curvlab.linalg.kronecker import mode_contraction
from curvlab.linalg.operators import Kronecker, Operator
from curvlab.linalg.pairs import Matrix
from curvlab.statistics import LayerStatistics, Reads

Contractions = Sequence[Tensor]
"""Contractions [d_i, d_i] for the ways of one variable."""


def with_pixels(block: Block, weight: Float[Tensor, "*O CP"]) -> Float[Tensor, "*O C *P"]:
    """Return a weight with the pixels of a layer's filters as a way of their own (thesis 4.7.2).

    One pixel is no way: a 1×1 convolution has the two of a linear layer.
    """
    pixels = 1 if block.layer is None else math.prod(block.weight_shape[2:])
    return weight.reshape(*weight.shape[:-1], -1, pixels) if pixels > 1 else weight


def batch_contractions(block: Block, statistics: LayerStatistics) -> list[list[Tensor]]:
    """Return G^(i) of the batch-mean gradient of every variable, [variable][way].

    Alg. 15, line 7; Alg. 16, line 9. A parameter without a rule has a way for each axis, but those
    after the second that are of length one.
    """
    variables = block.scatter(statistics.gradient).values()
    if block.layer is None:
        ways = [v.reshape((*v.shape[:2], *(d for d in v.shape[2:] if d > 1))) for v in variables]
    else:
        ways = [with_pixels(block, v.flatten(1)) if v.ndim > 1 else v for v in variables]
    for v in ways:
        for order in v.shape:
            guard_factor(block, order, v, "a Kronecker factor")
    found = [[mode_contraction(v, i) for i in range(max(v.ndim, 1))] for v in ways]
    # A block lies as [O, I], so that its factors are in that order: of a weight that is stored as
    # [I, O] the last way comes first.
    return [each[::-1] for each in found] if block.layer and block.layer.transposed else found


class Contracted(BlockDefaults):
    """Moving averages Ĝ^(i) of every variable, with H = ⊗ᵢ factorᵢ(Ĝ^(1), …, Ĝ^(k); damping).

    Args:
        block: whose variables.
        contractions: statistics → [variable][way] contractions.
        factors: contractions of one variable, damping → inverse factors.
        reads: what `contractions` needs.
        forward: contractions of one variable, damping → the factors of `matrix`, where it has one.
        theorem: inverses of the variables, weight first, damping → what is proven of them; None:
            nothing is.
    """

    memory: ClassVar[tuple[str, ...]] = ("means",)
    factored = True
    secant: Secant | None = None
    inverse: Operator

    def __init__(
        self,
        block: Block,
        contractions: Callable[[Block, LayerStatistics], list[list[Tensor]]],
        factors: Callable[[Contractions, float], tuple[Tensor, ...]],
        reads: Reads = "gradient",
        forward: Callable[[Contractions, float], tuple[Tensor, ...]] | None = None,
        theorem: Callable[[Sequence[Kronecker], float], FactorBounds] | None = None,
    ) -> None:
        self.block, self.reads = block, reads
        self._contractions, self._factors, self._forward = contractions, factors, forward
        self._theorem = theorem
        self.means: list[list[Tensor]] | None = None

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the minibatch's contractions into `means`.

        Raises Diverged as `check_moments`, unless gradients are read, which are looked at before.
        """
        new = self._contractions(self.block, statistics)
        if (
            self.reads != "gradient"
        ):  # its squares are known to be finite, and so are its contractions
            check_moments(
                (self.block.name, "a contraction of the gradients", c)
                for variable in new
                for c in variable
            )
        if self.means is None:
            self.means = new
            return
        self.means = [
            [blend(m, n, weight) for m, n in zip(*pair, strict=True)]
            for pair in zip(self.means, new, strict=True)
        ]

    def refresh(self, damping: float) -> None:
        """Set `inverse`, of each variable's `means`, by `factors` at this damping."""
        self.inverse = self._of_variables(self._factors, damping)

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return the product of the factors whose inverses, or inverse roots, `refresh` takes.

        None where the method has none.
        """
        return None if self._forward is None else self._of_variables(self._forward, damping)

    def variables(self) -> list[Kronecker]:
        """Return the inverses of the block's variables, weight first; [] before a `refresh`."""
        parts = self.held.parts if isinstance(self.held, ColumnSum) else (self.held,)
        return [part for part in parts if isinstance(part, Kronecker)]

    def kronecker_factors(self) -> tuple[Matrix, Matrix] | None:
        """Return (H_g, H_a) of a matrix of weights, where a theorem speaks of them; else None."""
        first = self.variables()[:1] if self._theorem is not None else []
        if not first or len(first[0].factors) != 2:
            return None
        return first[0].factors[0], first[0].factors[1]

    def bounds(self, damping: float | None, phi: float) -> FactorBounds:
        """Return the bounds by the theorem of the method.

        From `inverse` and the damping it was made with.
        """
        parts = self.variables()
        if self._theorem is None or damping is None or not parts:
            return FactorBounds()
        return self._theorem(parts, damping)

    def _of_variables(
        self, factors: Callable[[Contractions, float], tuple[Tensor, ...]], damping: float
    ) -> Operator:
        assert self.means is not None
        parts = tuple(Kronecker(factors(means, damping)) for means in self.means)
        if len(parts) == 1:
            return parts[0]
        outputs, inputs = self.block.shape
        return ColumnSum(outputs, (inputs - 1, 1), parts)
