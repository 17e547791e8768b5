"""A small closed algebra of symmetric operators. Values: frozen, no method changes one.

Every operator acts on vectors of length D (or on the columns of [D, K]); `inv` returns an operator of the algebra again, and
``H.inv().inv()`` is H. Where a block is an [O, I] matrix, the vector is its row-major flattening, so that
``Kronecker((H_g, H_a)).dense() == kron(H_g, H_a)``.

Legend: D order, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import CurvlabError
from curvlab.linalg.factor import solve_cholesky
from curvlab.linalg.kronecker import kronecker_product
from curvlab.linalg.woodbury import Rows, gram_cholesky


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of the vectors of length ``len(operator)``."""

    def __len__(self) -> int: ...
    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]: ...
    def inv(self) -> Operator: ...
    def dense(self) -> Float[Tensor, "D D"]: ...
    def eigvalsh(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending."""


@dataclass(frozen=True)
class Dense:
    """The matrix itself."""

    matrix: Float[Tensor, "D D"]

    def __len__(self) -> int:
        return len(self.matrix)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.matrix @ v

    def inv(self) -> Operator:
        """Through Cholesky. Raises CurvlabError where the matrix is not positive definite."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if info:
            raise CurvlabError("the matrix is not positive definite: damp it before inverting")
        return Inverse(factor)

    def dense(self) -> Float[Tensor, "D D"]:
        return self.matrix

    def eigvalsh(self) -> Float[Tensor, " D"]:
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.matrix)
        return eigenvalues


@dataclass(frozen=True)
class Inverse:
    """M⁻¹, kept as the lower Cholesky factor of M."""

    factor: Float[Tensor, "D D"]

    def __len__(self) -> int:
        return len(self.factor)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return solve_cholesky(self.factor, v)

    def inv(self) -> Operator:
        return Dense(self.factor @ self.factor.mT)

    def dense(self) -> Float[Tensor, "D D"]:
        return torch.cholesky_inverse(self.factor)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        return self.inv().eigvalsh().reciprocal().flip(0)


@dataclass(frozen=True)
class Diagonal:
    """A diagonal matrix."""

    values: Float[Tensor, " D"]

    def __len__(self) -> int:
        return len(self.values)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.values * v if v.ndim == 1 else self.values[:, None] * v

    def inv(self) -> Operator:
        """Raises CurvlabError where an entry is not positive."""
        if not bool((self.values > 0).all()):
            raise CurvlabError("the matrix is not positive definite: damp it before inverting")
        return Diagonal(self.values.reciprocal())

    def dense(self) -> Float[Tensor, "D D"]:
        return torch.diag(self.values)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        return self.values.sort().values


@dataclass(frozen=True)
class Kronecker:
    """⊗ᵢ Uᵢ of symmetric factors, applied by mode products (thesis Proposition 1)."""

    factors: tuple[Tensor, ...]

    def __len__(self) -> int:
        return reduce(lambda n, u: n * len(u), self.factors, 1)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return kronecker_product(self.factors, v)

    def inv(self) -> Operator:
        """Factor by factor. Raises CurvlabError where one is not positive definite."""
        return Kronecker(tuple(Dense(u).inv().dense() for u in self.factors))

    def dense(self) -> Float[Tensor, "D D"]:
        product: Tensor = reduce(torch.kron, [u.contiguous() for u in self.factors])  # kron fails on mixed layouts
        return product

    def eigvalsh(self) -> Float[Tensor, " D"]:
        each = [torch.linalg.eigvalsh(u) for u in self.factors]
        eigenvalues: Tensor = reduce(lambda e, f: torch.outer(e, f).flatten(), each)
        return eigenvalues.sort().values


@dataclass(frozen=True)
class LowRank:
    """λ I + Rᵀ R with few rows R."""

    rows: Rows
    damping: float

    def __len__(self) -> int:
        return self.rows.width

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return self.damping * v + self.rows.transposed(self.rows.times(v))

    def inv(self) -> Operator:
        """Through the Gram matrix (Sherman–Morrison–Woodbury). Needs λ > 0."""
        factor, used = gram_cholesky(self.rows, self.damping)
        return Woodbury(self.rows, used, factor)

    def dense(self) -> Float[Tensor, "D D"]:
        r = self.rows.dense()
        return self.damping * torch.eye(len(self), dtype=r.dtype, device=r.device) + r.mT @ r

    def eigvalsh(self) -> Float[Tensor, " D"]:
        nonzero = torch.linalg.eigvalsh(self.rows.gram()).clamp_min(0)[-len(self) :]
        return self.damping + torch.cat([nonzero.new_zeros(len(self) - len(nonzero)), nonzero])


@dataclass(frozen=True)
class Woodbury:
    """(λ I + Rᵀ R)⁻¹ = (I − Rᵀ (λ I + R Rᵀ)⁻¹ R) / λ: thesis (5.6); `factor` is the lower Cholesky factor of λ I + R Rᵀ."""

    rows: Rows
    damping: float
    factor: Float[Tensor, "R R"]

    def __len__(self) -> int:
        return self.rows.width

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        return (v - self.rows.transposed(solve_cholesky(self.factor, self.rows.times(v)))) / self.damping

    def inv(self) -> Operator:
        return LowRank(self.rows, self.damping)

    def dense(self) -> Float[Tensor, "D D"]:
        r = self.rows.dense()
        return self @ torch.eye(len(self), dtype=r.dtype, device=r.device)

    def eigvalsh(self) -> Float[Tensor, " D"]:
        return self.inv().eigvalsh().reciprocal().flip(0)


@dataclass(frozen=True)
class DirectSum:
    """Operators side by side: part k acts on the entries `indices[k]`; together they cover all entries once."""

    indices: tuple[Int[Tensor, " _"], ...]
    parts: tuple[Operator, ...]

    def __len__(self) -> int:
        return sum(len(p) for p in self.parts)

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        out = torch.empty_like(v)
        for index, part in zip(self.indices, self.parts, strict=True):
            out[index] = part @ v[index]
        return out

    def inv(self) -> Operator:
        return DirectSum(self.indices, tuple(p.inv() for p in self.parts))

    def dense(self) -> Float[Tensor, "D D"]:
        blocks = [p.dense() for p in self.parts]
        out = blocks[0].new_zeros(len(self), len(self))
        for index, block in zip(self.indices, blocks, strict=True):
            out[index[:, None], index] = block
        return out

    def eigvalsh(self) -> Float[Tensor, " D"]:
        return torch.cat([p.eigvalsh() for p in self.parts]).sort().values


def identity_like(value: Tensor) -> Diagonal:
    """I on the flattening of `value`."""
    return Diagonal(torch.ones_like(value).flatten())


_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Dense, Inverse, Diagonal, Kronecker, LowRank, Woodbury, DirectSum, Rows)
}


def pack(value: Any) -> Any:
    """An operator as nested dictionaries, lists and tensors: what a checkpoint without pickled code can hold."""
    if is_dataclass(value):
        return {"kind": type(value).__name__} | {f.name: pack(getattr(value, f.name)) for f in fields(value)}
    return [pack(v) for v in value] if isinstance(value, tuple) else value


def unpack(packed: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(packed, dict):
        kind = _KINDS[packed["kind"]]
        return kind(**{name: unpack(v) for name, v in packed.items() if name != "kind"})
    return tuple(unpack(v) for v in packed) if isinstance(packed, list) else packed


def unpack_operator(packed: Any) -> Operator:
    return cast(Operator, unpack(packed))
