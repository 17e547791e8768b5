"""Polar factors U (UᵀU)^{−1/2} as a symmetric matrix on the smaller side: P with P U, or U P.

Legend: O rows, I columns, K the smaller of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.linalg.padded_products import second_moment
from curvlab.linalg.spectral import thin_svd

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of a step x ← a x + b x³ + c x⁵ of the Newton-Schulz iteration: Jordan et al. 2024."""


def newton_schulz_factor(
    U: Float[Tensor, "O I"], coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5
) -> Float[Tensor, "K K"]:
    """Return P with P U (U P where I < O) the Newton-Schulz iteration of X = U / ‖U‖_F.

    X ← (a + b S + c S²) X with S = X Xᵀ: all steps are polynomials of the first S, so that P is
    their product, and S ← (a + b S + c S²)² S; no iterate is [O, I]. Singular values of X from 0.02
    to 1 go to 0.68 to 1.13. P is positive definite, and U of zeros has one too.
    """
    a, b, c = coefficients
    largest = U.abs().amax()
    X = U / torch.where(largest > 0, largest, 1.0)  # the squares of U itself may overflow
    length = X.norm()
    length = torch.where(length > 0, length, 1.0)
    X = X / length
    S = second_moment(X.mT if X.shape[0] <= X.shape[1] else X)
    P: Tensor | None = None
    for step in range(steps):
        q = torch.addmm(S, S, S, beta=b, alpha=c)
        q.diagonal().add_(a)
        P = q if P is None else q @ P
        if step < steps - 1:
            S = q @ S @ q
    assert P is not None
    P = (P + P.mT) / 2
    return P / (length * torch.where(largest > 0, largest, 1.0))


def polar_factor(U: Float[Tensor, "O I"]) -> Float[Tensor, "K K"]:
    """Return (U Uᵀ)^{−1/2} or (UᵀU)^{−1/2}, whichever is smaller, by the singular values of U.

    Where U is singular P has 1/σ₁ in the place of 1/0 (and 1 for U of zeros): it is positive
    definite, and P U has the singular values 1 and 0.
    """
    left, s, right = thin_svd(U)
    basis = left if U.shape[0] <= U.shape[1] else right.mT
    first = torch.where(s[0] > 0, s[0], 1.0)
    rounding = first * max(U.shape) * torch.finfo(U.dtype).eps
    return (basis / torch.where(s > rounding, s, first)) @ basis.mT


def newton_schulz_bfloat16(
    Us: Sequence[Float[Tensor, "O I"]],
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    steps: int = 5,
) -> Float[Tensor, "M O I"]:
    """Return the Newton-Schulz iterations of M matrices U / ‖U‖_F of one shape, of bfloat16.

    As published, Jordan et al. 2024: to the bit what `torch.optim.Muon` has. It is within two per
    cent of `newton_schulz_factor(U)`'s product, and faster where a processor multiplies bfloat16;
    small matrices go faster together.
    """
    a, b, c = coefficients
    turned = Us[0].shape[0] > Us[0].shape[1]
    each = [(U.mT if turned else U).bfloat16() for U in Us]
    each = [X / X.norm().clamp(min=1e-7) for X in each]
    X, add = (each[0], torch.addmm) if len(each) == 1 else (torch.stack(each), torch.baddbmm)
    for _ in range(steps):
        S = X @ X.mT
        X = add(X, add(S, S, S, beta=b, alpha=c), X, beta=a)
    X = X.mT if turned else X
    return X if X.ndim == 3 else X[None]


POLAR: dict[str, Callable[[Tensor], Tensor]] = {
    "newton-schulz": newton_schulz_factor,
    "bfloat16": newton_schulz_factor,
    "svd": polar_factor,
}
"""Ways to the matrix whose product with U is its polar factor, or near it.

That of "bfloat16" is for others than U itself, whose own is `newton_schulz_bfloat16`.
"""
