"""A moving average of second moments as the rows it is made of, where the matrix is too large.

F = Σ_b w_b R_bᵀ R_b over the minibatches b so far, R_b their rows over √N: F itself is never
formed, and its damped inverse is Woodbury's (thesis (5.6)) through the Gram matrix of all rows,
of which each minibatch adds its own.

Legend: R rows, N examples, V vectors sent back, O outputs, I inputs incl. the bias column, D = O I.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.linalg.cholesky import damped_cholesky, shifted
from curvlab.linalg.operators import LowRank, Operator, Woodbury
from curvlab.linalg.woodbury import Below, Rows, products_of_rows

LEFT_OUT = 1e-4
"""Share of the whole weight that the oldest minibatches may have together to be left out: after 88
minibatches of a moving average of 0.9. Sampled labels move F by far more."""


@dataclass
class KeptRows:
    """Rows of the minibatches that count, oldest first, with their weights.

    Args:
        parts: R_b, of each minibatch.
        weights: w_b.
        gram: inner products of all rows with each other, without the weights, [R, R].
    """

    parts: list[Rows] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    gram: Tensor | None = None

    def fold(self, rows: Rows, weight: float, what: str) -> None:
        """Set F ← (1 − w) F + w RᵀR, and leave out the oldest that hardly count any more.

        Raises:
            CurvlabError: the Gram matrix would not fit into the memory; `what` names the block.
        """
        weights = [*(w * (1 - weight) for w in self.weights), weight]
        parts, gone = [*self.parts, rows], 0
        while 1 - math.fsum(weights[gone + 1 :]) < LEFT_OUT:  # all weights together are 1
            gone += 1
        first = sum(len(p) for p in parts[:gone])
        parts, weights = parts[gone:], weights[gone:]
        count = sum(len(p) for p in parts)
        guard_memory(  # before anything is taken
            4 * count**2 * rows.g.element_size(),
            f"the Gram matrix of {count} rows of {what}, and its factor,",
            "use smaller minibatches, a shorter moving average, or smw-ng-bd",
        )
        new = torch.cat([products_of_rows(p, rows) for p in parts])
        if self.gram is None:
            self.gram = new
        else:
            old = self.gram[first:, first:]
            self.gram = torch.cat([torch.cat([old, new[: len(old)]], 1), new.mT])
        self.parts, self.weights = parts, weights

    def rows(self) -> Below:
        """Return the rows times the roots of their weights, so that F = RᵀR; nothing is copied."""
        return Below(tuple(self.parts), tuple(math.sqrt(w) for w in self.weights))

    def inverse(self, damping: float, what: str) -> Operator:
        """Return (F + λI)⁻¹.

        Raises:
            CurvlabError: λ is not above 0.
            Diverged: there is no factor, as `damped_cholesky`.
        """
        if not damping > 0:
            raise CurvlabError(f"{what} by its rows needs a positive damping, not {damping:g}")
        assert self.gram is not None
        rows = self.rows()
        scale = rows.row_scales()
        gram = self.gram * scale * scale[:, None]
        factor, used = damped_cholesky(lambda d: shifted(gram, d), damping, what)
        return Woodbury(rows, used, factor)

    def matrix(self, damping: float) -> Operator:
        """Return F + λI by its rows."""
        return LowRank(self.rows(), damping)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "rows_g": [p.g for p in self.parts],
            "rows_a": [p.a for p in self.parts],
            "weights": list(self.weights),
            "gram": self.gram,
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> KeptRows:
        """Return what `state` was of."""
        parts = [Rows(g, a) for g, a in zip(state["rows_g"], state["rows_a"], strict=True)]
        return cls(parts, list(state["weights"]), state["gram"])
