"""Kronecker products plus a multiple of the identity: diagonal in the eigenbases of the factors.

Legend: D order, K columns; k factors of orders d_i, D = Π d_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.kronecker import kronecker_product
from curvlab.linalg.operators import Diagonal, Operator, packable


@packable
@dataclass(frozen=True)
class KroneckerEigen:
    """(⊗ᵢ Qᵢ) diag(values) (⊗ᵢ Qᵢ)ᵀ of orthogonal Qᵢ."""

    bases: tuple[Float[Tensor, "d_i d_i"], ...]
    values: Float[Tensor, " D"]

    def __len__(self) -> int:
        return len(self.values)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        inside = kronecker_product([q.mT for q in self.bases], v)
        return kronecker_product(self.bases, Diagonal(self.values) @ inside)

    def inv(self) -> Operator:
        """Raises CurvlabError where an eigenvalue is not positive."""
        if not bool((self.values > 0).all()):
            raise CurvlabError("the matrix is not positive definite: damp it before inverting")
        return KroneckerEigen(self.bases, self.values.reciprocal())

    def dense(self) -> Float[Tensor, "D D"]:
        basis: Tensor = reduce(torch.kron, [q.contiguous() for q in self.bases])
        return (basis * self.values) @ basis.mT

    def eigvalsh(self) -> Float[Tensor, " D"]:
        return self.values.sort().values

    def diag(self) -> Float[Tensor, " D"]:
        return kronecker_product([q.square() for q in self.bases], self.values)

    def trace(self) -> Float[Tensor, ""]:
        return self.values.sum()


def shifted_kronecker(factors: tuple[Tensor, ...], shift: float) -> KroneckerEigen:
    """⊗ᵢ Uᵢ + shift I, Uᵢ positive semi-definite: what rounding leaves below 0 of their eigenvalues is taken as 0.

    Raises:
        CurvlabError: NaN or Inf in a factor.
    """
    if not all(bool(torch.isfinite(u).all()) for u in factors):
        raise CurvlabError("a Kronecker factor contains NaN or Inf: lower the learning rate or raise the damping")
    found = [_eigh((u + u.mT) / 2) for u in factors]
    values = reduce(lambda e, f: torch.outer(e, f).flatten(), [e.clamp_min(0) for e, _ in found])
    return KroneckerEigen(tuple(q for _, q in found), values + shift)


def _eigh(matrix: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Of a positive semi-definite matrix, shifted by its mean eigenvalue meanwhile.

    In float32 LAPACK failed to converge on singular second moments of order 1000 (squares of what is rounded from 0 underflow);
    shifted they are no trouble. Double precision where it fails still.
    """
    mean = matrix.diagonal().mean()
    moved = matrix + mean * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    try:
        values, vectors = torch.linalg.eigh(moved)
    except torch.linalg.LinAlgError:
        values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(moved.double()))
    return values - mean, vectors
