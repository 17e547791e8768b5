"""Matrices of which only products are known, rectangular ones, and what any operator takes.

Legend: D order, R rows, C columns, K vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, Diverged, guard_memory
from curvlab.finite import all_finite
from curvlab.linalg.operators import NOWHERE, Dense, Operator, Placed, Square, placed


@dataclass(frozen=True)
class Product(Square):
    """Symmetric matrix of which only products with columns are known."""

    apply: Callable[[Float[Tensor, "D K"]], Float[Tensor, "D K"]]
    size: int
    dtype: torch.dtype
    device: torch.device
    diagonal: Callable[[], Float[Tensor, " D"]] | None = (
        None  # exact, where there is a cheaper way than D products
    )
    chunk: int = 64  # columns at once

    def __post_init__(self) -> None:
        self._from_both_sides()

    def __len__(self) -> int:
        return self.size

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        """Return the product with v.

        Raises CurvlabError where `v` does not fit, or what `apply` returns does not.
        """
        return self._from_both_sides() @ v

    def inv(self) -> Operator:
        """Return the inverse of `dense`.

        Raises Diverged where that is not positive definite, CurvlabError where it is too large.
        """
        return Dense(self.dense()).inv()

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix, [D, D], by D products.

        They are taken as they come: it is symmetric only as far as `apply` is. Raises CurvlabError
        where it is too large.
        """
        return self._from_both_sides().dense()

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return all eigenvalues of `dense`, ascending.

        Raises CurvlabError where that is too large.
        """
        return Dense(self.dense()).eigvalsh()

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal, [D]: by `diagonal`, else by D products, `chunk` of them at once."""
        if self.diagonal is not None:
            return self.diagonal()
        parts = self._from_both_sides().columns()
        return torch.cat([part[start : start + part.shape[1]].diagonal() for start, part in parts])

    def trace(self) -> Float[Tensor, ""]:
        """Return the sum of `diag`, a scalar."""
        return self.diag().sum()

    def _from_both_sides(self) -> RectangularProduct:
        return RectangularProduct(
            self.apply, self.apply, (self.size, self.size), self.dtype, self.device, self.chunk
        )


@dataclass(frozen=True)
class Rectangular(Placed):
    """Dense matrix that need not be symmetric or square."""

    matrix: Float[Tensor, "R C"]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns, (R, C)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def T(self) -> Rectangular:
        """Transpose, [C, R], a view of the same numbers."""
        return Rectangular(self.matrix.mT)

    def __matmul__(self, v: Float[Tensor, "C *K"]) -> Float[Tensor, "R *K"]:
        return self.matrix @ v

    def dense(self) -> Float[Tensor, "R C"]:
        """Return the matrix itself, not a copy."""
        return self.matrix


@dataclass(frozen=True)
class RectangularProduct:
    """Matrix, symmetric or not, of which only products with columns are known.

    They are its own and its transpose's.
    """

    apply: Callable[[Float[Tensor, "C K"]], Float[Tensor, "R K"]]
    apply_transposed: Callable[[Float[Tensor, "R K"]], Float[Tensor, "C K"]]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    chunk: int = 64  # columns at once

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise CurvlabError(f"a product takes at least 1 column at once: chunk is {self.chunk}")

    @property
    def T(self) -> RectangularProduct:
        """Transpose, C×R, with the two functions exchanged; no product is taken."""
        return replace(
            self, apply=self.apply_transposed, apply_transposed=self.apply, shape=self.shape[::-1]
        )

    def __matmul__(self, v: Float[Tensor, "C *K"]) -> Float[Tensor, "R *K"]:
        """Return the product with v.

        Raises CurvlabError where `v` does not fit, or what `apply` returns does not.
        """
        if v.ndim not in (1, 2) or len(v) != self.shape[1] or v.dtype != self.dtype:
            raise CurvlabError(
                f"a {self.shape[0]}×{self.shape[1]} product got {list(v.shape)} of {v.dtype}: "
                f"pass a vector [{self.shape[1]}], or columns [{self.shape[1]}, K], of {self.dtype}"
            )
        if v.ndim == 1:
            return self._apply(v[:, None])[:, 0]
        parts = [
            self._apply(v[:, start : start + self.chunk])
            for start in range(0, v.shape[1], self.chunk)
        ]
        return torch.cat([v.new_empty(self.shape[0], 0), *parts], dim=1)

    def dense(self) -> Float[Tensor, "R C"]:
        """Return the matrix, [R, C], by products with the identity, from the side that needs fewer.

        Raises CurvlabError where it is too large.
        """
        rows, columns = self.shape
        if rows < columns:
            return self.T.dense().mT
        guard_memory(
            rows * columns * self.dtype.itemsize,
            f"a dense {rows}×{columns} matrix",
            "use products with vectors",
        )
        out = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        for start, part in self.columns():
            out[:, start : start + part.shape[1]] = part
        return out

    def columns(self) -> Iterator[tuple[int, Float[Tensor, "R K"]]]:
        """Yield the matrix `chunk` columns at a time, with the number of the first."""
        for start in range(0, self.shape[1], self.chunk):
            unit = torch.zeros(
                self.shape[1],
                min(self.chunk, self.shape[1] - start),
                dtype=self.dtype,
                device=self.device,
            )
            unit[start : start + unit.shape[1]].fill_diagonal_(1)
            yield start, self._apply(unit)

    def _apply(self, v: Float[Tensor, "C K"]) -> Float[Tensor, "R K"]:
        out = self.apply(v)
        if out.shape != (self.shape[0], v.shape[1]) or out.dtype != self.dtype:
            raise CurvlabError(
                f"the function behind a product returned {list(out.shape)} of {out.dtype}: from"
                f" {v.shape[1]} columns it is to make [{self.shape[0]}, {v.shape[1]}] of"
                f" {self.dtype}"
            )
        return out


def placement(operator: Any) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and the device of the vectors that an operator takes.

    Its own, or those of its first floating tensor; float64 on the CPU where it has neither.
    """
    return placed(operator) or NOWHERE


def finite_product(operator: Operator, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
    """Return ``operator @ v``. Raises Diverged where it contains NaN or Inf."""
    product = operator @ v
    if not all_finite(product):
        raise Diverged(
            "a product with the operator contains NaN or Inf: check the parameters and the batch it"
            " was made from"
        )
    return product
