"""The spectrum of one matrix: every eigenvalue, or a density and both ends by Lanczos.

The grid of the density is the same in every log. Bins are tenths of a decade of |λ|, from 10⁻¹² to
10⁸, on either side of one bin for all of |λ| < 10⁻¹²; the outermost two also count what lies beyond
them.

Legend: D order of the matrix, P bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from curvlab.linalg.krylov import lanczos
from curvlab.linalg.operators import Dense, Operator
from curvlab.linalg.traces import average, gaussian

_MAGNITUDES = 10.0 ** (np.arange(-120, 81) / 10)

EDGES: NDArray[np.float64] = np.concatenate([-_MAGNITUDES[::-1], _MAGNITUDES])
"""[P + 1] edges of the bins, ascending: bin p counts EDGES[p] ≤ λ < EDGES[p + 1]."""


@dataclass(frozen=True)
class Spectrum:
    """The things that the log holds of one matrix; pairs are (value, error)."""

    density: Float[NDArray[np.float64], " P"]
    lowest: tuple[float, float]
    highest: tuple[float, float]
    trace: tuple[float, float]
    negative: tuple[float, float]
    unresolved: float = 0.0
    eigenvalues: Float[NDArray[np.float64], " D"] | None = None


def tolerance(dtype: torch.dtype) -> float:
    """Return the value of −λ / max |λ| above which an eigenvalue counts as negative.

    It is 1e-10, or 100 times the rounding error if that is more.
    """
    return max(1e-10, 100 * torch.finfo(dtype).eps)


def eigenvalues(matrix: Dense) -> Float[Tensor, " D"]:
    """Return all eigenvalues, ascending.

    Rows (and columns) that are entirely zero are left out and their zeros put back: exact.
    """
    m = matrix.matrix
    active = (m != 0).any(1).nonzero()[:, 0]
    if len(active) == len(m):
        return matrix.eigvalsh()
    found = Dense(m[active[:, None], active]).eigvalsh()
    return torch.cat([found, found.new_zeros(len(m) - len(active))]).sort().values


def of_matrix(matrix: Dense) -> Spectrum:
    """Return the spectrum from every eigenvalue."""
    found: NDArray[np.float64] = eigenvalues(matrix).double().cpu().numpy()
    below = found < -tolerance(matrix.matrix.dtype) * np.abs(found).max()
    lowest, highest, trace, negative = (
        (float(v), 0.0) for v in (found[0], found[-1], found.sum(), below.mean())
    )
    return Spectrum(
        _binned(found, np.full(len(found), 1 / len(found))),
        lowest,
        highest,
        trace,
        negative,
        eigenvalues=found,
    )


def of_products(
    operator: Operator, dtype: torch.dtype, draws: int, steps: int, generator: torch.Generator
) -> Spectrum:
    """Return the spectrum by stochastic Lanczos quadrature (`krylov.density`).

    A Ritz value whose residual is longer than its magnitude cannot be told from 0, and is counted
    there. The ends are the outermost Ritz values of all runs, each with its residual; the other
    errors are standard errors over the draws. What cannot be told from 0 may all be negative:
    `negative` may be too small by `unresolved`, which its error therefore contains.
    """
    runs = [
        lanczos(operator, gaussian(operator, 1, generator)[:, 0], steps).ritz()
        for _ in range(draws)
    ]
    lowest = min((float(theta[0]), float(residual[0])) for theta, residual, _ in runs)
    highest = max((float(theta[-1]), float(residual[-1])) for theta, residual, _ in runs)
    bound = -tolerance(dtype) * max(abs(lowest[0]), abs(highest[0]))
    histogram, samples = np.zeros(len(EDGES) - 1), []
    for theta, residual, s in runs:
        weight, near = s[0].square(), residual > theta.abs()
        below = (theta < bound) & ~near
        samples.append(
            torch.stack([weight @ theta, weight @ below.to(dtype), weight @ near.to(dtype)])
        )
        nodes = theta.where(~near, 0).double().cpu().numpy()
        histogram += _binned(nodes, weight.double().cpu().numpy()) / draws
    found = average(torch.stack(samples), draws * steps)
    (trace, negative, unresolved), (trace_error, negative_error, _) = (
        found.value.tolist(),
        found.error.tolist(),
    )
    total = len(operator) * trace, len(operator) * trace_error
    return Spectrum(
        histogram, lowest, highest, total, (negative, negative_error + unresolved), unresolved
    )


def _binned(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.bincount(np.digitize(values, EDGES[1:-1]), weights, len(EDGES) - 1).astype(np.float64)
