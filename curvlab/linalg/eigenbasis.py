"""Kronecker products plus a multiple of the identity, in the eigenbases of the factors.

There they are diagonal, and few rows may be added.

Legend: D order, K columns; k factors of orders d_i, D = Π d_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import Diverged
from curvlab.finite import all_finite
from curvlab.linalg.kronecker import kronecker_product
from curvlab.linalg.operators import Compact, Diagonal, Operator, Symmetric, packable
from curvlab.linalg.spectral import eigh

Basis = Float[Tensor, "_ _"] | Diagonal
"""An orthogonal matrix; as a `Diagonal` of ones, which is never formed, I."""


@packable
@dataclass(frozen=True)
class Rotated(Symmetric):
    """Matrix (⊗ᵢ Qᵢ) M (⊗ᵢ Qᵢ)ᵀ of orthogonal Qᵢ and an M that is nearly diagonal.

    M is diagonal, or diagonal with few rows added.
    """

    bases: tuple[Basis, ...]
    inside: Diagonal | Compact

    def __len__(self) -> int:
        return len(self.inside)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return kronecker_product(self.bases, self.inside @ self.rotated(v))

    def rotated(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        """Return (⊗ᵢ Qᵢ)ᵀ v, v in the eigenbases."""
        return kronecker_product([q.mT if isinstance(q, Tensor) else q for q in self.bases], v)

    def inv(self) -> Operator:
        """Return the inverse, that of M in the same bases.

        Raises Diverged where M is not positive definite.
        """
        return Rotated(self.bases, cast(Diagonal | Compact, self.inside.inv()))

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix, [D, D], with ⊗ᵢ Qᵢ formed."""
        basis: Tensor = reduce(torch.kron, [_formed(q).contiguous() for q in self.bases])
        if isinstance(self.inside, Diagonal):
            return (basis * self.inside.values) @ basis.mT
        return basis @ self.inside.dense() @ basis.mT

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the eigenvalues of M, ascending: a rotation leaves them as they are."""
        return self.inside.eigvalsh()

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal, [D]; no matrix of order D is formed."""
        if isinstance(self.inside, Diagonal):
            squares = [q.square() if isinstance(q, Tensor) else q for q in self.bases]
            return kronecker_product(squares, self.inside.values)
        rows = kronecker_product(self.bases, self.inside.rows.mT).mT
        base = Rotated(self.bases, cast(Diagonal, self.inside.base))
        return Compact(base, rows, self.inside.core).diag()

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace of M: a rotation leaves it as it is."""
        return self.inside.trace()


def _formed(basis: Basis) -> Tensor:
    return basis if isinstance(basis, Tensor) else basis.dense()


def eigenbasis(U: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Return eigenvalues and eigenvectors of a positive semi-definite U.

    What rounding leaves below 0 of the eigenvalues is taken as 0.

    Raises:
        Diverged: NaN or Inf in U.
    """
    if not all_finite(U):
        raise Diverged(
            "a Kronecker factor contains NaN or Inf: lower the learning rate or raise the damping"
        )
    values, vectors = eigh((U + U.mT) / 2)
    return values.clamp_min(0), vectors


def largest_eigenvalue(U: Float[Tensor, "D D"], steps: int = 10) -> float:
    """Return the largest eigenvalue of a positive semi-definite U from below, by power steps.

    They begin with the column of the greatest diagonal entry, which the result is never under.
    """
    x = U[:, int(U.diagonal().argmax())]
    for _ in range(steps):
        length = x.norm()
        if not 0 < float(length) < float("inf"):
            return 0.0
        x = U @ (x / length)
    return float(x.norm())


def shifted_kronecker(factors: tuple[Tensor, ...], shift: float) -> Rotated:
    """Return ⊗ᵢ Uᵢ + shift I of positive semi-definite Uᵢ, by their eigenvectors (`eigenbasis`).

    Raises:
        Diverged: NaN or Inf in a factor.
    """
    found = [eigenbasis(u) for u in factors]
    values = reduce(lambda e, f: torch.outer(e, f).flatten(), [e for e, _ in found])
    return Rotated(tuple(q for _, q in found), Diagonal(values + shift))
