"""Block Hessian matrix itself: dense, per layer, bias included.

Thesis 4.3.4, with the Hessian in place of Fisher.

Legend: I inputs incl. the bias column, O outputs, D = O I.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab import exact
from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.errors import Diverged
from curvlab.finite import all_finite, waits
from curvlab.linalg.cholesky import damped_cholesky, shifted
from curvlab.linalg.krylov import extremes
from curvlab.linalg.operators import Dense, Inverse, Operator
from curvlab.linalg.spectral import eigvalsh
from curvlab.observation import Observation
from curvlab.statistics import Reads


def hessians(observation: Observation) -> dict[str, Dense]:
    """Compute {block: exact Hessian of the minibatch's mean loss} of the layers with a rule."""
    closure = observation.closure
    ruled = [b.name for b in closure.objective.blocks if b.layer is not None]
    objective = closure.objective
    objective.may_freeze = True
    try:
        return exact.matrices(objective, closure.x, closure.y, "hessian", ruled) if ruled else {}
    finally:
        objective.may_freeze = False


def least_eigenvalue(matrix: Float[Tensor, "D D"], direct: int = 1000) -> float:
    """Return λ_min(M) by all eigenvalues up to order `direct`, above it by Lanczos.

    From a fixed random start. There it is the least Ritz value, which is not below λ_min, less the
    length of its residual, where that is at most 1e-6 ‖M‖; or else all eigenvalues are taken.
    """
    if len(matrix) > direct:
        found = extremes(
            Dense(matrix), steps=200, generator=torch.Generator(matrix.device).manual_seed(0)
        )
        if found.lowest_error <= 1e-6 * max(abs(found.lowest), abs(found.highest)):
            return found.lowest - found.lowest_error
    return float(eigvalsh(matrix)[0])


class DenseHessian(BlockDefaults):
    """Inverse H = (M + τI + λI)⁻¹ of the moving average M of the exact Hessian blocks.

    M may be indefinite. τ = max(0, −λ_min(M)), `shift`, is the least that makes M + τI positive
    semi-definite, so that the matrix that is inverted is at least λI, as that of the block Fisher
    method is. Where M has no negative eigenvalue, nothing is shifted.
    """

    reads: Reads = "rows"
    memory: ClassVar[tuple[str, ...]] = ("M", "shift")
    secant: Secant | None = None
    inverse: Operator

    def __init__(self) -> None:
        self.M: Tensor | None = None
        self.shift: float = 0.0

    def update(self, statistics: Dense, weight: float) -> None:
        """Fold a minibatch's exact Hessian block into M.

        Raises Diverged where it is not finite; not on a GPU, which would have to wait.
        """
        new = statistics.dense()
        if not waits(new) and not all_finite(new):  # M would keep it
            raise Diverged(
                "the block Hessian matrix contains NaN or Inf: lower the learning rate or raise the"
                " damping"
            )
        self.M = blend(self.M, new, weight)

    def refresh(self, damping: float) -> None:
        """Take τ from M as it stands, and `inverse` by Cholesky of M + τI + λI.

        Raises Diverged where it has no factor (`damped_cholesky`).
        """
        assert self.M is not None
        matrix = self.M
        self.shift = max(0.0, -least_eigenvalue(matrix))
        factor, _ = damped_cholesky(
            lambda d: shifted(matrix, self.shift + d), damping, "the shifted block Hessian matrix"
        )
        self.inverse = Inverse(factor)

    def matrix(self, damping: float = 0.0) -> Operator:
        """Return M + τI + λI, dense, τ of the last refresh."""
        assert self.M is not None
        return Dense(shifted(self.M, self.shift + damping))
