"""Damped matrices known by their products, and their inverses by conjugate gradients.

Nothing is formed but vectors.

Legend: D order, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import Diverged
from curvlab.linalg.cholesky import damped_inverse
from curvlab.linalg.krylov import conjugate_gradients
from curvlab.linalg.operators import Operator, Symmetric
from curvlab.linalg.spectral import eigvalsh


@dataclass(frozen=True)
class Damped(Symmetric):
    """Sum M + λ I of a positive semi-definite M and its damping."""

    operator: Operator
    damping: float

    def __len__(self) -> int:
        return len(self.operator)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return torch.add(self.operator @ v, v, alpha=self.damping)

    def inv(self) -> Operator:
        """Return (M + λ I)⁻¹, a `Solve`; nothing is computed before a product is asked for."""
        return Solve(self)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return M + λ I, [D, D], with M made symmetric."""
        m = self.operator.dense()
        new = (m + m.mT) / 2
        new.diagonal().add_(self.damping)
        return new

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all eigenvalues of `dense`, ascending."""
        eigenvalues: Tensor = eigvalsh(self.dense())
        return eigenvalues

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal of M plus λ, [D]."""
        return self.operator.diag() + self.damping

    def trace(self) -> Float[Tensor, ""]:
        """Return tr M + λ D."""
        return self.operator.trace() + len(self) * self.damping


@dataclass(frozen=True)
class Solve(Symmetric):
    """Inverse M⁻¹ of a `Damped` M, each product a run of conjugate gradients.

    They run to a residual of ε^¾ (2e-12 in double precision). As many columns as M has, or more,
    take the dense matrix, which costs fewer products.
    """

    matrix: Damped

    def __len__(self) -> int:
        return len(self.matrix)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        """Return M⁻¹ v. Raises Diverged where conjugate gradients do not get there."""
        if v.ndim == 2:
            each = [self @ column for column in v.mT] if v.shape[1] < len(self) else []
            return torch.stack(each, 1) if each else self.dense() @ v
        tolerance = torch.finfo(v.dtype).eps ** 0.75
        found = conjugate_gradients(self.matrix, v, tolerance=tolerance)
        if found.residual > 1e3 * tolerance:
            raise Diverged(
                f"conjugate gradients ended at a relative residual of {found.residual:.1g} "
                f"after {found.iterations} iterations: raise the damping"
            )
        return found.x

    def inv(self) -> Operator:
        """Return the damped matrix itself."""
        return self.matrix

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the inverse, [D, D], by Cholesky of the dense matrix.

        Where that fails it is damped, with a CurvlabWarning, or Diverged is raised
        (`damped_cholesky`).
        """
        return damped_inverse(self.matrix.dense(), 0.0, "the damped matrix")

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the reciprocals of the eigenvalues of the damped matrix, ascending."""
        return self.matrix.eigvalsh().reciprocal().flip(0)

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal of `dense`, [D]."""
        return self.dense().diagonal()

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal of `dense`."""
        return self.diag().sum()
