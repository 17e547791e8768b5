"""Distances of one matrix from another: norms and inner products in float64, spectra.

Legend: R rows, C columns; D order of a symmetric matrix; ‖·‖ is the Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab import moved
from curvlab.linalg.operators import Operator


def compare_to_exact(
    matrix: Operator,
    scale: float,
    exact: Float[Tensor, "D D"],
    eigenvalues: Float[Tensor, " D"] | None,
) -> dict[str, float]:
    """Compare an estimate, times `scale`, with the exact matrix.

    Args:
        matrix: the estimate.
        scale: what makes its scale that of the exact matrix.
        exact: the exact matrix.
        eigenvalues: of the exact matrix, ascending; where None, spectra are not compared.

    Returns:
        {measure: value}: "error" (‖scale · estimate − exact‖ / ‖exact‖), "error_scaled" (the same
            at the best scale there is), "cosine", "trace_ratio"; with eigenvalues "spectrum_error",
            "largest_ratio" and "smallest_ratio". NaN where a denominator is zero, or an eigenvalue
            no more than rounding.
    """
    dense = matrix.dense()
    size, own, both = norm(exact), norm(dense), inner(dense, exact)
    found = {
        "error": quotient(distance(dense, exact, scale), size),
        "error_scaled": quotient(distance(dense, exact, both / own**2 if own else 0.0), size),
        "cosine": quotient(both, own * size),
        "trace_ratio": quotient(
            scale * float(dense.diagonal().sum()), float(exact.diagonal().sum())
        ),
    }
    if eigenvalues is not None:
        spectrum = matrix.eigvalsh().double() * scale
        rounding = float(eigenvalues.abs().max()) * len(exact) * torch.finfo(exact.dtype).eps
        found["spectrum_error"] = quotient(
            float((spectrum - eigenvalues).norm()), float(eigenvalues.norm())
        )
        found["largest_ratio"] = quotient(float(spectrum[-1]), float(eigenvalues[-1]), rounding)
        found["smallest_ratio"] = quotient(float(spectrum[0]), float(eigenvalues[0]), rounding)
    return found


def quotient(above: float, below: float, least: float = 0.0) -> float:
    """Return above / below, or NaN where the denominator is not above `least` in size."""
    return above / below if abs(below) > least else float("nan")


def _rows(
    one: Float[Tensor, "R C"], other: Float[Tensor, "R C"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows of each matrix at a time, in float64."""
    for start in range(0, len(one), 256):
        yield one[start : start + 256].double(), other[start : start + 256].double()


def distance(
    one: Float[Tensor, "D D"], other: Float[Tensor, "D D"], multiple: float = 1.0
) -> float:
    """Return ‖multiple · one − other‖, summed in float64."""
    return math.sqrt(sum(float((multiple * a - b).square().sum()) for a, b in _rows(one, other)))


def inner(one: Float[Tensor, "R C"], other: Float[Tensor, "R C"]) -> float:
    """Return the sum over all entries of one · other, the entries and the sum in float64."""
    return sum(float((a * b).sum()) for a, b in _rows(one, other))


def norm(matrix: Float[Tensor, "R C"]) -> float:
    """Return ‖matrix‖, summed in float64."""
    return math.sqrt(inner(matrix, matrix))


if not TYPE_CHECKING:  # to a type checker the old names are gone
    __getattr__ = moved.old_names(__name__)
