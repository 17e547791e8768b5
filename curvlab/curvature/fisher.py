"""Block Fisher matrix itself: dense, per layer, bias included (thesis 4.3.4).

It is damped as F + λI and solved by Cholesky.

Legend: V vectors, N examples, T places, I inputs incl. the bias column, J of them ever non-zero, O
    outputs, D = O I.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant
from curvlab.errors import Diverged, guard_memory
from curvlab.exact.route_table import by_pairs
from curvlab.finite import waits
from curvlab.layers import Block
from curvlab.linalg.cholesky import damped_cholesky, shifted
from curvlab.linalg.direct_sum import DirectSum
from curvlab.linalg.operators import Dense, Diagonal, Inverse, Operator
from curvlab.linalg.packed import (
    accumulate_second_moment_,
    fold,
    mirror_,
    output_pairs,
    unpack_full,
    unpack_lower,
)
from curvlab.linalg.places import accumulate_pairs_, reach_of, symmetrize_
from curvlab.statistics import LayerStatistics, Reads

_REMEDY = "use smw-ng-bd, whose system is N×N, or a Kronecker method"


def check_outer(*factors: Tensor, terms: int = 1) -> None:
    """Raise Diverged where second moments of sums of products of their entries would not be finite.

    They overflow, or an entry is not finite. F is added to in place, so that what is added is
    looked at before. On a GPU `refresh` sees it.
    """
    if any(map(waits, factors)):
        return
    norms = [float(torch.linalg.vector_norm(f, math.inf)) for f in factors if f.numel()]
    largest = max(1, terms) * math.prod(norms)
    if not largest < math.sqrt(torch.finfo(factors[0].dtype).max / len(factors[-1])):
        raise Diverged(
            "the block Fisher matrix contains NaN or Inf: lower the learning rate or raise the"
            " damping"
        )


def _blend_pairs_(F: Float[Tensor, "D D"], s: LayerStatistics, weight: float) -> None:
    """Set F ← (1 − w) F + w/N Σ by pairs of places: P + Pᵀ, so that half of F takes part in P."""
    accumulate_pairs_(F, s.g, s.a, reach_of(s.g), (1 - weight) / 2, weight / s.size)
    symmetrize_(F)


def _blend_rows_(F: Float[Tensor, "D D"], s: LayerStatistics, weight: float) -> None:
    """Set F ← (1 − w) F + w/N Σ by rows, one triangle of it."""
    F.mul_(1 - weight)
    accumulate_second_moment_(F, s.rows.flatten(2).flatten(0, 1), weight / s.size)
    mirror_(F)


class DenseFisher(BlockDefaults):
    """Moving average of F = (1/N) Σ_v Σ_n vec(D W) vec(D W)ᵀ, one dense block.

    Where a weight is used at one place (T = 1) F = Σₙ Gₙ ⊗ aₙaₙᵀ is kept packed (`linalg.packed`),
    on those inputs alone that have ever been non-zero: the rows and columns of the others are zero
    in F, and λI in the damped matrix, exactly. On the first layer of mlp-256-20 over MNIST that is
    3780² in place of 5140².
    """

    reads: Reads = "rows"
    memory: ClassVar[tuple[str, ...]] = ("F", "active")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, block: Block) -> None:
        self.block = block
        self.F: Tensor | None = None  # packed [P, Q] on the active inputs; dense [D, D] where T > 1
        self.active: Tensor | None = None  # ascending input numbers; None where T > 1

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold a minibatch's block Fisher matrix into F.

        F is packed at one place, dense once there are several. Raises Diverged as `check_outer`,
        CurvlabError where F is too large for the memory.
        """
        shared = not statistics.provides("factors") or statistics.places > 1
        if shared or (self.F is not None and self.active is None):
            self._update_dense(statistics, weight)
            return
        a, g = statistics.a, statistics.g
        check_outer(g, a)
        if self.F is None:
            size = self.block.numel**2 * a.element_size()
            guard_memory(2 * size, f"a dense {self.block}", _REMEDY)
        self.F, self.active = fold(
            self.F, self.active, output_pairs(g[:, :, 0]), a[:, 0], 1 - weight, weight / len(a)
        )

    def _update_dense(self, statistics: LayerStatistics, weight: float) -> None:
        if self.F is None and self.active is None:
            size = self.block.numel**2 * statistics.like.element_size()
            guard_memory(2 * size, f"a dense {self.block}", _REMEDY)
        pairs = statistics.provides("factors") and by_pairs(statistics)
        if pairs:
            check_outer(statistics.g, statistics.a, terms=statistics.places)
        else:
            check_outer(statistics.rows)
        if self.active is not None:  # one place until now, several from here on
            self.F, self.active = self._dense(), None
        if self.F is None:
            self.F = statistics.like.new_zeros(self.block.numel, self.block.numel)
        (_blend_pairs_ if pairs else _blend_rows_)(self.F, statistics, weight)

    def refresh(self, damping: float) -> None:
        """Set `inverse` by Cholesky of F + λI; inputs that were always zero have 1/λ there.

        Raises Diverged where there is no factor, or such inputs and no damping.
        """
        assert self.F is not None
        outputs, inputs = self.block.shape
        what = "the block Fisher matrix"
        if self.active is None:
            dense = self.F
            self.inverse = Inverse(damped_cholesky(lambda d: shifted(dense, d), damping, what)[0])
            return
        packed, active = self.F, self.active
        factor, used = damped_cholesky(
            lambda d: unpack_lower(packed, outputs, len(active), d), damping, what
        )
        if len(active) == inputs:
            self.inverse = Inverse(factor)
            return
        if not used > 0:
            raise Diverged(
                "some inputs are always zero, so the block Fisher matrix is singular: use a"
                " positive damping"
            )
        idle = torch.ones(inputs, dtype=torch.bool, device=active.device)
        idle[active] = False
        first = torch.arange(outputs, device=active.device)[:, None] * inputs
        kept, dropped = (first + active).flatten(), (first + idle.nonzero()[:, 0]).flatten()
        constant = Diagonal(
            torch.full((len(dropped),), 1 / used, dtype=packed.dtype, device=packed.device)
        )
        self.inverse = DirectSum((kept, dropped), (Inverse(factor), constant))

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return F + λI, dense."""
        return Dense(shifted(self._dense(), damping))

    def _dense(self) -> Tensor:
        assert self.F is not None
        if self.active is None:
            return self.F
        outputs, inputs = self.block.shape
        return unpack_full(self.F, outputs, inputs, self.active)
