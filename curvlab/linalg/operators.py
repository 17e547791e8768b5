"""Small closed algebra of symmetric operators, frozen values that no method changes.

Every operator acts on vectors of length D (or on the columns of [D, K]); `inv` returns an operator
of the algebra again, and ``H.inv().inv()`` is H. Where a block is an [O, I] matrix, the vector is
its row-major flattening, so that ``Kronecker((H_g, H_a)).dense() == kron(H_g, H_a)``.

`Product` stands for a symmetric matrix of which only products are known, `Rectangular` and
`RectangularProduct` for matrices that are not symmetric. All of them have `shape`, `dtype`,
`device` and `T`: `Square` and `Placed` give them.

Legend: D order, K columns, R rows and C columns of a rectangular matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import Diverged
from curvlab.linalg.cholesky import solve_cholesky
from curvlab.linalg.kronecker import kronecker_product
from curvlab.linalg.operator_base import NOWHERE as NOWHERE
from curvlab.linalg.operator_base import Operator as Operator
from curvlab.linalg.operator_base import Placed as Placed
from curvlab.linalg.operator_base import Square as Square
from curvlab.linalg.operator_base import Symmetric as Symmetric
from curvlab.linalg.operator_base import placed as placed
from curvlab.linalg.operator_states import pack as pack
from curvlab.linalg.operator_states import packable as packable
from curvlab.linalg.operator_states import unpack as unpack
from curvlab.linalg.operator_states import unpack_operator as unpack_operator
from curvlab.linalg.spectral import eigvalsh
from curvlab.linalg.woodbury import Below, Beside, LayerRows, RowMatrix, Rows, gram_cholesky


@dataclass(frozen=True)
class Dense(Symmetric):
    """Operator of a dense matrix."""

    matrix: Float[Tensor, "D D"]

    def __len__(self) -> int:
        return len(self.matrix)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.matrix @ v

    def inv(self) -> Operator:
        """Return the inverse through Cholesky; raises Diverged where M is not positive definite."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if info:
            raise Diverged("the matrix is not positive definite: damp it before inverting")
        return Inverse(factor)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix itself, not a copy."""
        return self.matrix

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all eigenvalues, ascending, read from the lower triangle."""
        eigenvalues: Tensor = eigvalsh(self.matrix)
        return eigenvalues

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal, [D], a view of the matrix."""
        return self.matrix.diagonal()

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal."""
        return self.diag().sum()


@dataclass(frozen=True)
class Inverse(Symmetric):
    """Inverse M⁻¹, kept as the lower Cholesky factor of M."""

    factor: Float[Tensor, "D D"]

    def __len__(self) -> int:
        return len(self.factor)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return solve_cholesky(self.factor, v)

    def inv(self) -> Operator:
        """Return M = L Lᵀ as a new dense matrix."""
        return Dense(self.factor @ self.factor.mT)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return M⁻¹ from the Cholesky factor, [D, D]."""
        return torch.cholesky_inverse(self.factor)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the reciprocals of the eigenvalues of M, ascending."""
        return self.inv().eigvalsh().reciprocal().flip(0)

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal of M⁻¹ = L⁻ᵀ L⁻¹: the squared lengths of the columns of L⁻¹."""
        identity = torch.eye(len(self), dtype=self.factor.dtype, device=self.factor.device)
        root: Tensor = torch.linalg.solve_triangular(self.factor, identity, upper=False)
        return root.square().sum(0)

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of the diagonal of M⁻¹: all squares of L⁻¹."""
        return self.diag().sum()


@dataclass(frozen=True)
class Diagonal(Symmetric):
    """Diagonal matrix, kept as its values."""

    values: Float[Tensor, " D"]

    def __len__(self) -> int:
        return len(self.values)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.values * v if v.ndim == 1 else self.values[:, None] * v

    def inv(self) -> Operator:
        """Return the inverse; raises Diverged where an entry is not positive."""
        if not bool((self.values > 0).all()):
            raise Diverged("the matrix is not positive definite: damp it before inverting")
        return Diagonal(self.values.reciprocal())

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix with `values` on its diagonal, [D, D]."""
        return torch.diag(self.values)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return `values`, sorted to ascend."""
        return self.values.sort().values

    def diag(self) -> Float[Tensor, " D"]:
        """Return `values` itself, not a copy."""
        return self.values

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of `values`."""
        return self.values.sum()


@dataclass(frozen=True)
class Kronecker(Symmetric):
    """Kronecker product ⊗ᵢ Uᵢ of symmetric factors, matrices or operators.

    It is applied by mode products (thesis Proposition 1).
    """

    factors: tuple[Tensor | Operator, ...]

    def __len__(self) -> int:
        return reduce(lambda n, u: n * len(u), self.factors, 1)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return kronecker_product(self.factors, v)

    def inv(self) -> Operator:
        """Return the inverse, factor by factor; raises Diverged where one is not definite."""
        return Kronecker(
            tuple(
                Dense(u).inv().dense() if isinstance(u, Tensor) else u.inv() for u in self.factors
            )
        )

    def dense(self) -> Float[Tensor, "D D"]:
        """Return ⊗ᵢ Uᵢ as one matrix, [D, D]."""
        # kron fails on mixed layouts
        product: Tensor = reduce(torch.kron, [u.dense().contiguous() for u in self._each])
        return product

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all products of one eigenvalue of each factor, ascending."""
        return _products_of_entries([u.eigvalsh() for u in self._each]).sort().values

    def diag(self) -> Float[Tensor, " D"]:
        """Return the Kronecker product of the factors' diagonals, [D]."""
        return _products_of_entries([u.diag() for u in self._each])

    def trace(self) -> Float[Tensor, ""]:
        """Return the product of the factors' traces."""
        return torch.stack([u.trace() for u in self._each]).prod()

    @property
    def _each(self) -> list[Operator]:
        return [Dense(u) if isinstance(u, Tensor) else u for u in self.factors]


def _products_of_entries(each: list[Tensor]) -> Float[Tensor, " D"]:
    """Return ⊗ᵢ eᵢ of vectors."""
    return reduce(lambda e, f: torch.outer(e, f).flatten(), each)


@dataclass(frozen=True)
class LowRank(Symmetric):
    """Sum λ I + Rᵀ R with few rows R."""

    rows: RowMatrix
    damping: float

    def __len__(self) -> int:
        return self.rows.width

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.damping * v + self.rows.transposed(self.rows.times(v))

    def inv(self) -> Operator:
        """Return the inverse through the Gram matrix (Sherman–Morrison–Woodbury). Needs λ > 0."""
        factor, used = gram_cholesky(self.rows, self.damping)
        return Woodbury(self.rows, used, factor)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return λ I + Rᵀ R, [D, D], from rows that are formed."""
        r = self.rows.dense()
        return self.damping * torch.eye(len(self), dtype=r.dtype, device=r.device) + r.mT @ r

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all D eigenvalues, ascending: λ plus those of R Rᵀ, λ for the rest."""
        nonzero = eigvalsh(self.rows.gram()).clamp_min(0)[-len(self) :]
        return self.damping + torch.cat([nonzero.new_zeros(len(self) - len(nonzero)), nonzero])

    def diag(self) -> Float[Tensor, " D"]:
        """Return λ plus the squared lengths of the columns of R, [D]."""
        return self.damping + self.rows.squares()

    def trace(self) -> Float[Tensor, ""]:
        """Return λ D plus the squares of all entries of R."""
        return self.damping * len(self) + self.rows.total()


@dataclass(frozen=True)
class Woodbury(Symmetric):
    """Inverse (λ I + Rᵀ R)⁻¹ = (I − Rᵀ (λ I + R Rᵀ)⁻¹ R) / λ: thesis (5.6).

    `factor` is the lower Cholesky factor of λ I + R Rᵀ.
    """

    rows: RowMatrix
    damping: float
    factor: Float[Tensor, "R R"]

    def __len__(self) -> int:
        return self.rows.width

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return (
            v - self.rows.transposed(solve_cholesky(self.factor, self.rows.times(v)))
        ) / self.damping

    def inv(self) -> Operator:
        """Return λ I + Rᵀ R, a `LowRank` of the same rows; nothing is computed."""
        return LowRank(self.rows, self.damping)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the inverse, [D, D], as its product with the identity."""
        r = self.rows.dense()
        return self @ torch.eye(len(self), dtype=r.dtype, device=r.device)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the reciprocals of the eigenvalues of λ I + Rᵀ R, ascending."""
        return self.inv().eigvalsh().reciprocal().flip(0)

    def diag(self) -> Float[Tensor, " D"]:
        """Return (1 − ‖L⁻¹ R e_d‖²) / λ for every d.

        Of outer products the rows of one output at a time.
        """
        parts = self.rows.columns()
        squares = [
            torch.linalg.solve_triangular(self.factor, part, upper=False).square().sum(0)
            for part in parts
        ]
        return (1 - torch.cat(squares)) / self.damping

    def trace(self) -> Float[Tensor, ""]:
        """Return (D − R) / λ + tr (λ I + R Rᵀ)⁻¹."""
        return Inverse(self.factor).trace() + (len(self) - len(self.factor)) / self.damping


@dataclass(frozen=True)
class Compact(Symmetric):
    """Sum base + Rᵀ C⁻¹ R with few rows R: the compact form of quasi-Newton matrices.

    Byrd, Nocedal, Schnabel 1994; `lbfgs`. Closed under inversion by the Sherman–Morrison–Woodbury
    formula, with no inverse of C: (M + Rᵀ C⁻¹ R)⁻¹ = M⁻¹ − (R M⁻¹)ᵀ (C + R M⁻¹ Rᵀ)⁻¹ (R M⁻¹). C may
    be of a higher precision than the rest: it is small, and mostly worse conditioned than the
    matrix.
    """

    base: Operator
    rows: Float[Tensor, "R D"]
    core: Float[Tensor, "R R"]  # symmetric, invertible, mostly indefinite

    def __len__(self) -> int:
        return len(self.base)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.base @ v + self.rows.mT @ self._solve(self.rows @ v)

    def inv(self) -> Operator:
        """Return the inverse; raises Diverged where base or matrix is not positive definite."""
        base = self.base.inv()
        through = base @ self.rows.mT  # M⁻¹ Rᵀ
        core = self.core + self.rows.to(self.core.dtype) @ through.to(self.core.dtype)
        core = -(core + core.mT) / 2
        # the inertia of [[M, Rᵀ], [R, −C]] by either Schur complement: the matrix is definite where
        # these two numbers agree
        if _positive_eigenvalues(core) != _positive_eigenvalues(-self.core):
            raise Diverged("the matrix is not positive definite: damp it before inverting")
        return Compact(base, through.mT.contiguous(), core)

    def dense(self) -> Float[Tensor, "D D"]:
        """Return base + Rᵀ C⁻¹ R, [D, D], what is added made symmetric."""
        base = self.base.dense()
        added = self.rows.mT @ self._solve(self.rows)
        return base + (added + added.mT) / 2

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all eigenvalues, ascending, of the dense matrix.

        Where the base is a multiple of I, of a matrix of the order of the core.
        """
        if isinstance(self.base, Diagonal) and bool(
            (self.base.values == self.base.values[0]).all()
        ):
            basis, triangle = torch.linalg.qr(self.rows.mT)
            small = triangle @ self._solve(triangle.mT)
            moved: Tensor = eigvalsh((small + small.mT) / 2)
            added = torch.cat([moved, moved.new_zeros(len(self) - basis.shape[1])])
            return self.base.values[0] + added.sort().values
        return Dense(self.dense()).eigvalsh()

    def diag(self) -> Float[Tensor, " D"]:
        """Return the base's diagonal plus that of Rᵀ C⁻¹ R, [D]."""
        return self.base.diag() + (self.rows * self._solve(self.rows)).sum(0)

    def trace(self) -> Float[Tensor, ""]:
        """Return the base's trace plus that of Rᵀ C⁻¹ R."""
        return self.base.trace() + (self.rows * self._solve(self.rows)).sum()

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        lu, pivots, _ = torch.linalg.lu_factor_ex(self.core)
        return lu, pivots

    def _solve(self, v: Float[Tensor, "R *K"]) -> Float[Tensor, "R *K"]:
        """Return C⁻¹ v, in the dtype of v."""
        columns = (v[:, None] if v.ndim == 1 else v).to(self.core.dtype)
        solution: Tensor = torch.linalg.lu_solve(*self._factors, columns).to(v.dtype)
        return solution[:, 0] if v.ndim == 1 else solution


def _positive_eigenvalues(core: Float[Tensor, "R R"]) -> int:
    return int((eigvalsh(core) > 0).sum())


def identity_like(value: Tensor) -> Diagonal:
    """Return I on the flattening of `value`."""
    return Diagonal(torch.ones_like(value).flatten())


for kind in (
    Dense,
    Inverse,
    Diagonal,
    Kronecker,
    LowRank,
    Woodbury,
    Compact,
    Rows,
    LayerRows,
    Beside,
    Below,
):
    packable(kind)
