"""Block Fisher matrix itself: dense, per layer, bias included (thesis 4.3.4).

It is damped as F + λI and solved by Cholesky.

Legend: V vectors, N examples, T places, I inputs incl. the bias column, J of them ever non-zero, O
    outputs, D = O I.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import BlockDefaults, Secant
from curvlab.curvature.kept_rows import LEFT_OUT, KeptRows
from curvlab.curvature.large import by_rows
from curvlab.errors import Diverged, guard_memory, warn
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
from curvlab.linalg.woodbury import Rows
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

    Of a layer that is too large for that, and has few examples a minibatch for its size
    (`large.by_rows`), the rows of the minibatches are kept instead (`kept_rows`), which is said.
    """

    reads: Reads = "rows"
    memory: ClassVar[tuple[str, ...]] = ("F", "active")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self, block: Block) -> None:
        self.block = block
        # packed [P, Q] on the active inputs; dense [D, D] where T > 1; None where rows are kept
        self._F: Tensor | None = None
        self.kept: KeptRows | None = None
        self.active: Tensor | None = None  # ascending input numbers; None where T > 1

    @property
    def F(self) -> Any:
        """The matrix, or, for a checkpoint, the rows that are kept in its place."""
        return self._F if self.kept is None else self.kept.state()

    @F.setter
    def F(self, value: Any) -> None:
        """Take a matrix, or a checkpoint's rows."""
        rows = isinstance(value, dict)
        self._F, self.kept = (None, KeptRows.of_state(value)) if rows else (value, None)

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold a minibatch's block Fisher matrix into F.

        F is packed at one place, dense once there are several. Raises Diverged as `check_outer`,
        CurvlabError where F is too large for the memory, and rows are no way out.
        """
        if self._F is None and (self.kept is not None or by_rows(statistics)):
            self._keep(statistics, weight)
            return
        shared = not statistics.provides("factors") or statistics.places > 1
        if shared or (self._F is not None and self.active is None):
            self._update_dense(statistics, weight)
            return
        a, g = statistics.a, statistics.g
        check_outer(g, a)
        if self._F is None:
            size = self.block.numel**2 * a.element_size()
            guard_memory(2 * size, f"a dense {self.block}", _REMEDY)
        self._F, self.active = fold(
            self._F, self.active, output_pairs(g[:, :, 0]), a[:, 0], 1 - weight, weight / len(a)
        )

    def _update_dense(self, statistics: LayerStatistics, weight: float) -> None:
        if self._F is None and self.active is None:
            size = self.block.numel**2 * statistics.like.element_size()
            guard_memory(2 * size, f"a dense {self.block}", _REMEDY)
        pairs = statistics.provides("factors") and by_pairs(statistics)
        if pairs:
            check_outer(statistics.g, statistics.a, terms=statistics.places)
        else:
            check_outer(statistics.rows)
        if self.active is not None:  # one place until now, several from here on
            self._F, self.active = self._dense(), None
        if self._F is None:
            self._F = statistics.like.new_zeros(self.block.numel, self.block.numel)
        (_blend_pairs_ if pairs else _blend_rows_)(self._F, statistics, weight)

    def _keep(self, statistics: LayerStatistics, weight: float) -> None:
        if self.kept is None:
            self.kept = KeptRows()
            dense = self.block.numel**2 * statistics.like.element_size()
            warn(
                f"{self.block}: a dense matrix would be {dense / 1e9:.1f} GB, so the rows of the"
                " minibatches are kept, and the inverse is Woodbury's; of the moving average's"
                f" weight the last {LEFT_OUT:g} is left out"
            )
        root = math.sqrt(statistics.size)
        if statistics.provides("factors") and statistics.places == 1:
            g, a = statistics.g[:, :, 0].flatten(0, 1) / root, statistics.a[:, 0]
            rows = Rows(g, a.repeat(statistics.vectors, 1) if statistics.vectors > 1 else a)
        else:
            rows = Rows(statistics.rows.flatten(2).flatten(0, 1) / root)
        check_outer(*(rows.g, rows.a) if rows.a is not None else (rows.g,))
        self.kept.fold(rows, weight, str(self.block))

    def refresh(self, damping: float) -> None:
        """Set `inverse` by Cholesky of F + λI; inputs that were always zero have 1/λ there.

        Raises Diverged where there is no factor, or such inputs and no damping; CurvlabError where
        rows are kept and there is none.
        """
        if self.kept is not None:
            self.inverse = self.kept.inverse(damping, "the block Fisher matrix")
            return
        assert self._F is not None
        outputs, inputs = self.block.shape
        what = "the block Fisher matrix"
        if self.active is None:
            dense = self._F
            self.inverse = Inverse(damped_cholesky(lambda d: shifted(dense, d), damping, what)[0])
            return
        packed, active = self._F, self.active
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
        """Return F + λI, dense; by its rows where these are kept."""
        if self.kept is not None:
            return self.kept.matrix(damping)
        return Dense(shifted(self._dense(), damping))

    def _dense(self) -> Tensor:
        assert self._F is not None
        if self.active is None:
            return self._F
        outputs, inputs = self.block.shape
        return unpack_full(self._F, outputs, inputs, self.active)
