"""BFGS and its kin: the updates of a matrix, or of its inverse, by a pair.

Documents: thesis (chapters 2 and 3), and those of `pairs` and `pair_damping`, whose names can be
had from here too.

Legend: D order; s step, y change of the gradient [D]; B curvature, H its inverse [D, D]; ρ = 1/sᵀy.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.linalg.pair_damping import (
    DAMPINGS,
    MU1,
    PairDamping,
    damp,
    double_damping,
    identity_damping,
    levenberg_marquardt,
    powell,
    powell_factor,
    powell_levenberg,
    powell_on_b,
    scaled_identity_levenberg,
)
from curvlab.linalg.pairs import (
    SKIPS,
    Damping,
    Flag,
    Matrix,
    Pair,
    Products,
    Scalar,
    Skip,
    accept,
    action_pair,
    as_scalar,
    hessian_action,
    negated,
    ratio_to_sy,
    undamped,
)

__all__ = [
    "DAMPINGS",
    "MU1",
    "SKIPS",
    "Damping",
    "Flag",
    "Matrix",
    "Pair",
    "PairDamping",
    "Products",
    "Scalar",
    "Skip",
    "accept",
    "action_pair",
    "bfgs",
    "bfgs_inverse",
    "broyden_inverse",
    "damp",
    "double_damping",
    "hessian_action",
    "identity_damping",
    "levenberg_marquardt",
    "powell",
    "powell_factor",
    "powell_levenberg",
    "powell_on_b",
    "scaled_identity_levenberg",
    "sherman_morrison",
    "undamped",
    "updated_inverse",
]


def _largest(v: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    found: Tensor = torch.linalg.vector_norm(v, math.inf)
    return found


def bfgs_inverse(
    H: Float[Tensor, "D D"],
    s: Float[Tensor, " D"],
    y: Float[Tensor, " D"],
    Hy: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "D D"]:
    """Return H⁺ = (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ: thesis (2.6).

    Exactly symmetric where H is; H⁺ y = s. With s and y, H and B exchanged, ``bfgs_inverse(B, y,
    s)``, it is the DFP update of B.
    """
    Hy = H @ y if Hy is None else Hy
    return _plus_symmetric(H, s, _other_half(s, Hy, s @ y, y @ Hy))


def _other_half(
    s: Float[Tensor, " D"], Hy: Float[Tensor, " D"], sy: Scalar, yHy: Scalar
) -> Float[Tensor, " D"]:
    """Return w of H⁺ = H + s wᵀ + w sᵀ."""
    rho = ratio_to_sy(1.0, sy)  # NaN where sᵀy is 0, which `updated_inverse` then refuses
    return (rho * (rho * yHy + 1) / 2) * s - rho * Hy


def bfgs(
    B: Float[Tensor, "D D"], s: Float[Tensor, " D"], y: Float[Tensor, " D"]
) -> Float[Tensor, "D D"]:
    """Return B⁺ = B − B s sᵀ B / sᵀBs + ρ y yᵀ: thesis (2.6). B⁺ s = y."""
    Bs = B @ s
    return B - torch.outer(Bs, Bs) / (s @ Bs) + torch.outer(y, y) / (s @ y)


def broyden_inverse(
    H: Float[Tensor, "D D"], s: Float[Tensor, " D"], y: Float[Tensor, " D"], phi: float
) -> Float[Tensor, "D D"]:
    """Return H⁺ = H − σ H y yᵀ H + ρ s sᵀ + φ (yᵀHy) h hᵀ of Broyden's family: thesis (2.11).

    h = ρ s − σ H y. φ = 1 is BFGS, φ = 0 is DFP.
    """
    Hy = H @ y
    rho, sigma = 1 / (s @ y), 1 / (y @ Hy)
    h = rho * s - sigma * Hy
    return (
        H
        - sigma * torch.outer(Hy, Hy)
        + rho * torch.outer(s, s)
        + (phi / sigma) * torch.outer(h, h)
    )


def sherman_morrison(
    H: Float[Tensor, "D D"], a: Float[Tensor, " D"], c: float
) -> Float[Tensor, "D D"]:
    """Return (H⁻¹ + c a aᵀ)⁻¹ = H − H a (1/c + aᵀHa)⁻¹ aᵀ H: thesis 2.4, after Theorem 1."""
    Ha = H @ a
    return H - torch.outer(Ha, Ha) / (1 / c + a @ Ha)


def _plus_symmetric(
    H: Float[Tensor, "D D"], s: Float[Tensor, " D"], w: Float[Tensor, " D"]
) -> Float[Tensor, "D D"]:
    """Return H + s wᵀ + w sᵀ; the two are added first, so that rounding is symmetric."""
    half = torch.outer(s, w)
    return (half + half.mT).add_(H)


def updated_inverse(H: Float[Tensor, "D D"], pair: Pair) -> tuple[Float[Tensor, "D D"], Pair]:
    """Return (H⁺, pair) by BFGS, or H where the pair is refused.

    Where what is added is not finite H stays too, and the pair says so.
    """
    found, used = pair.damping.after, pair.used
    if not isinstance(used, Tensor) and not used:
        return H, pair
    w = _other_half(pair.s, pair.Hy, found.sy, found.yHy)
    # no entry of s wᵀ + w sᵀ is larger
    extent = 2 * as_scalar(_largest(pair.s)) * as_scalar(_largest(w))
    fits = extent <= torch.finfo(w.dtype).max
    overflows = used & negated(fits)
    pair = replace(
        pair,
        refused={
            **pair.refused,
            "not finite": pair.refused.get("not finite", overflows) | overflows,
        },
    )
    used = used & fits
    if isinstance(used, Tensor):
        return _plus_symmetric(H, torch.where(used, pair.s, 0.0), torch.where(used, w, 0.0)), pair
    return (_plus_symmetric(H, pair.s, w) if used else H), pair
