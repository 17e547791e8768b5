"""Cholesky factors with damping that is raised, and said to be raised, where they fail.

Legend: D order of a symmetric matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabWarning, Diverged
from curvlab.linalg.spectral import eigvalsh

_NOT_FINITE = "{} contains NaN or Inf: lower the learning rate or raise the damping"
_RAISED = "{} is not positive definite with damping {:g}: raised to {:g}"


def shifted(matrix: Float[Tensor, "D D"], damping: float) -> Float[Tensor, "D D"]:
    """Return M + damping I, a new matrix."""
    new = matrix.clone(memory_format=torch.contiguous_format)
    new.diagonal().add_(damping)
    return new


def damped_cholesky(
    build: Callable[[float], Float[Tensor, "D D"]], damping: float, what: str, tries: int = 6
) -> tuple[Float[Tensor, "D D"], float]:
    """Return the lower Cholesky factor of ``build(damping)`` and the damping used.

    That is ten times more, up to `tries` times, where the factorisation fails.

    Args:
        build: damping → a new symmetric matrix (the lower triangle is read).
        damping: the first to try; the one used is said in a CurvlabWarning where it is another.
        what: name of the matrix, for messages.
        tries: how many dampings to try, the first among them.

    Raises:
        Diverged: NaN or Inf in the matrix, or no factorisation within `tries`.
    """
    used = damping
    for _ in range(tries):
        matrix = build(used)
        if not bool(torch.isfinite(matrix.diagonal()).all()):
            raise Diverged(_NOT_FINITE.format(what))
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info) and bool(torch.isfinite(factor.diagonal()).all()):
            if used != damping:
                warnings.warn(_RAISED.format(what, damping, used), CurvlabWarning, stacklevel=2)
            return factor, used
        used = (
            10 * used
            if used > 0
            else torch.finfo(matrix.dtype).eps * max(1.0, float(build(0.0).diagonal().amax()))
        )
    raise Diverged(
        f"{what} is not positive definite, even with damping {used / 10:g}: raise the damping"
    )


def damped_inverse(matrix: Float[Tensor, "D D"], damping: float, what: str) -> Float[Tensor, "D D"]:
    """Return (M + damping I)⁻¹, the damping raised as by `damped_cholesky` where that fails."""
    return torch.cholesky_inverse(damped_cholesky(lambda d: shifted(matrix, d), damping, what)[0])


def damped_reciprocal(
    values: Float[Tensor, " D"], damping: float, what: str
) -> Float[Tensor, " D"]:
    """Return 1 / (values + damping) of a diagonal matrix, as `damped_inverse` of a dense one."""
    least, most = float(values.amin()), float(values.amax())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise Diverged(_NOT_FINITE.format(what))
    used = damping
    if least + used <= 0:  # of a second moment: 0 and no damping
        used = torch.finfo(values.dtype).eps * max(1.0, most) - min(0.0, least)
        warnings.warn(_RAISED.format(what, damping, used), CurvlabWarning, stacklevel=2)
    return (values + used).reciprocal()


def shift_to_definite(matrix: Float[Tensor, "D D"], least: float) -> float:
    """Return what to add to the diagonal so that the lowest eigenvalue is `least`.

    Or as far above 0 as rounding needs; 0 where there is a Cholesky factor.
    """
    if not bool(torch.linalg.cholesky_ex(matrix).info):
        return 0.0
    ends = eigvalsh(matrix)
    rounding = float(ends.abs().amax()) * torch.finfo(matrix.dtype).eps ** 0.5
    return max(least, float(rounding)) - float(ends[0])


def solve_cholesky(factor: Float[Tensor, "D D"], v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
    """Return M⁻¹ v for one or several v, from the lower Cholesky factor of M.

    Two triangular solves: `torch.cholesky_solve` copies the factor, 14 times as slow here.
    """
    columns = v[:, None] if v.ndim == 1 else v
    half = torch.linalg.solve_triangular(factor, columns, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution[:, 0] if v.ndim == 1 else solution
