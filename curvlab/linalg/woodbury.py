"""Solves through Gram matrices: R Rᵀ of few long rows, which for one layer are outer products and need never be formed.

Legend: R rows, D their length, O and I the block's outputs and inputs (D = O I), K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, guard_memory
from curvlab.linalg.factor import damped_cholesky, shifted


@dataclass(frozen=True)
class Rows:
    """The matrix with rows vec(g_r a_rᵀ), [R, O I]. Thesis 5.3.3: ⟨row_i, row_j⟩ = (g_iᵀ g_j)(a_iᵀ a_j).

    With ``a = None`` the rows are `g` itself, [R, D] (weights shared over several places: no outer products).
    """

    g: Float[Tensor, "R O"]
    a: Float[Tensor, "R I"] | None = None

    @property
    def width(self) -> int:
        return self.g.shape[1] * (1 if self.a is None else self.a.shape[1])

    def times(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "R *K"]:
        if self.a is None:
            return self.g @ v
        matrix = v.reshape(self.g.shape[1], self.a.shape[1], -1)
        if matrix.shape[2] == 1:  # row · v = gᵀ V a
            return ((self.g @ matrix[:, :, 0]) * self.a).sum(1).reshape(-1, *v.shape[1:])
        return torch.einsum("ro,oik,ri->rk", self.g, matrix, self.a)

    def transposed(self, w: Float[Tensor, "R *K"]) -> Float[Tensor, "D *K"]:
        if self.a is None:
            return self.g.mT @ w
        if w.ndim == 1:
            return ((self.g * w[:, None]).mT @ self.a).flatten()
        return torch.einsum("ro,rk,ri->oik", self.g, w, self.a).reshape(-1, w.shape[1])

    def gram(self) -> Float[Tensor, "R R"]:
        inner = self.g @ self.g.mT
        return inner if self.a is None else inner * (self.a @ self.a.mT)

    def dense(self) -> Float[Tensor, "R D"]:
        return self.g if self.a is None else (self.g[:, :, None] * self.a[:, None, :]).flatten(1)


def gram_cholesky(rows: Rows, damping: float, what: str = "the Gram matrix") -> tuple[Float[Tensor, "R R"], float]:
    """Lower Cholesky factor of damping·I + R Rᵀ (thesis (5.6): D_t), and the damping used."""
    if not damping > 0:
        raise CurvlabError(f"the Woodbury formula needs a positive damping, not {damping:g}")
    size = len(rows.g)
    guard_memory(3 * size**2 * rows.g.element_size(), f"a {size}×{size} Gram matrix", "use smaller minibatches")
    gram = rows.gram()
    return damped_cholesky(lambda d: shifted(gram, d), damping, what)
