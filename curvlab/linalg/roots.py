"""Roots of order p of symmetric positive semi-definite matrices, their inverses by two routes.

Legend: D order, p the root.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import Diverged
from curvlab.linalg.spectral import eigh


def inverse_root_eigh(M: Float[Tensor, "D D"], p: int, floor: float = 0.0) -> Float[Tensor, "D D"]:
    """Return M^{−1/p} through the eigendecomposition.

    Eigenvalues that rounding put below `floor`, a known bound, are set to it. Raises Diverged where
    M is not positive definite.
    """
    e, q = eigh(M)
    e = e.clamp_min(floor)
    if not bool(e[0] > 0):
        raise Diverged(
            f"no inverse {p}-th root: the smallest eigenvalue is {float(e[0]):.3g}; raise the"
            " damping"
        )
    root: Tensor = (q * e ** (-1 / p)) @ q.mT
    return root


def root_eigh(M: Float[Tensor, "D D"], p: int, floor: float = 0.0) -> Float[Tensor, "D D"]:
    """Return M^{1/p} through the eigendecomposition.

    Eigenvalues that rounding put below `floor`, a known bound of at least 0, are set to it. For
    p = 1 it is M itself: only a root makes that rounding large, and the decomposition has its own.
    """
    if p == 1:
        return M
    e, q = eigh(M)
    root: Tensor = (q * e.clamp_min(floor) ** (1 / p)) @ q.mT
    return root


def inverse_root_newton(
    M: Float[Tensor, "D D"], p: int, iterations: int = 100, tolerance: float = 1e-6
) -> tuple[Float[Tensor, "D D"], float]:
    """Return M^{−1/p} by the coupled Newton iteration, and its error.

    The error is the largest entry of |X^p M − I| as the iteration sees it. X ← X T, M ← T^p M with
    T = ((p + 1) I − M) / p, from M scaled by (p + 1) / (2 ‖M‖_F) (Guo and Higham 2006, as used for
    Shampoo by Anil et al., thesis 4.7.2: at most 100 iterations, tolerance 1e-6). Stops at the
    tolerance, or where rounding keeps the error from falling any further.
    """
    eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
    # M is scaled into (0, (p + 1) / 2], since an eigenvalue μ becomes μ ((p + 1 − μ) / p)ᵖ, which
    # for μ in (0, p + 1) lies in (0, 1] and rises to 1 from there; beyond p + 1 it need not.
    z = (1 + p) / (2 * torch.linalg.matrix_norm(M))
    m, x = M * z, eye * z ** (1 / p)
    error = float((m - eye).abs().amax())
    for _ in range(iterations):
        if not error > tolerance:  # NaN stops as well
            break
        t = m * (-1 / p)
        t.diagonal().add_(1 + 1 / p)
        new_m = torch.linalg.matrix_power(t, p) @ m
        new_error = float((new_m - eye).abs().amax())
        if not new_error < 1.2 * error:  # Anil et al.: the error may rise a little before it falls
            break
        m, x, error = new_m, x @ t, new_error
    return (x + x.mT) / 2, error
