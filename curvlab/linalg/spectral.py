"""Eigenvalues and singular values, in double precision where LAPACK fails in single.

In float32 it failed to converge on singular second moments of order 500 and more: squares of what
is rounded from 0 are subnormal. The same numbers in double precision are not.

Legend: D order of a symmetric matrix; R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # not exported by name

_Found = TypeVar("_Found")


def eigh(matrix: Float[Tensor, "D D"]) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Return eigenvalues, ascending, and eigenvectors of a positive semi-definite matrix.

    It is shifted by its mean eigenvalue meanwhile, so that single precision mostly suffices.
    """
    mean = matrix.diagonal().mean()
    moved = matrix + mean * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    values, vectors = symmetric_eigh(moved)
    return values - mean, vectors


def symmetric_eigh(
    matrix: Float[Tensor, "*N D D"],
) -> tuple[Float[Tensor, "*N D"], Float[Tensor, "*N D D"]]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix, or of several."""
    values, vectors = _converging(torch.linalg.eigh, matrix)
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def eigvalsh(matrix: Float[Tensor, "*N D D"]) -> Float[Tensor, "*N D"]:
    """Return the eigenvalues of a symmetric matrix, or of several, ascending."""
    values: Tensor = _converging(torch.linalg.eigvalsh, matrix)
    return values.to(matrix.dtype)


def thin_svd(
    matrix: Float[Tensor, "R C"],
) -> tuple[Float[Tensor, "R K"], Float[Tensor, " K"], Float[Tensor, "K C"]]:
    """Return U, the singular values, descending, and Vᵀ, with K = min(R, C)."""
    u, s, v = _converging(lambda m: torch.linalg.svd(m, full_matrices=False), matrix)
    return u.to(matrix.dtype), s.to(matrix.dtype), v.to(matrix.dtype)


def _converging(function: Callable[[Tensor], _Found], matrix: Tensor) -> _Found:
    try:
        return function(matrix)
    except LinAlgError:  # alone: memory that runs out is no matter of precision
        if matrix.dtype == torch.float64:
            raise
        return function(matrix.double())
