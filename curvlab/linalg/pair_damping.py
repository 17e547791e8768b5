"""DAMPINGS: how pairs are damped. Each function says which line of which algorithm it is.

Documents: 2020 (Goldfarb, Ren, Bahamou), thesis (chapters 2 and 3), 2021 (Ren, Goldfarb: its
algorithms are numbered apart). A function takes a pair (s, y) and H, and returns a `Pair`.

Legend: D order; s step, y change of the gradient [D]; B curvature, H its inverse [D, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.errors import CurvlabError, lookup
from curvlab.linalg.pairs import Matrix, Pair, Scalar, as_scalar, inner_products, undamped

MU1 = 0.2
"""Bound μ₁ of every document."""


def powell_factor(sy: Scalar, q: Scalar, mu: float) -> Scalar:
    """Return θ = (1 − μ) q / (q − sᵀy) where sᵀy < μ q, else 1: thesis 2.3.1.

    Then θ sᵀy + (1 − θ) q ≥ μ q; q is yᵀHy, sᵀBs or sᵀs. Where rounding has cost H its definiteness
    (q ≤ 0) nothing is damped: the pair is to be refused.
    """
    if not 0 < mu <= 1:
        raise CurvlabError(
            f"Powell's damping takes a μ in (0, 1], not {mu:g}: a μ₂ above 1 needs"
            " Levenberg-Marquardt damping"
        )
    damped = (q > 0) & (sy < mu * q)
    if isinstance(damped, Tensor):
        return torch.where(damped, (1 - mu) * q / (q - sy), 1.0)
    return (1 - mu) * q / (q - sy) if damped else 1.0


def _between(
    theta: Scalar, here: Float[Tensor, " D"], there: Float[Tensor, " D"]
) -> Float[Tensor, " D"]:
    """Return θ here + (1 − θ) there; `here` itself where θ = 1, whatever `there` is."""
    if isinstance(theta, Tensor):
        return torch.where(theta < 1, theta * here + (1 - theta) * there, here)
    return theta * here + (1 - theta) * there if theta < 1 else here


def powell(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float) -> Pair:
    """Damp a pair by D_P, Powell's damping on H: s̃ = θ₁ s + (1 − θ₁) H y.

    Thesis 2.3.1; Alg. 3, lines 2 and 3. Then s̃ᵀy ≥ μ₁ yᵀHy.
    """
    pair = undamped(s, y, H)
    theta1 = powell_factor(pair.damping.before.sy, pair.damping.before.yHy, mu1)
    return _with_s(pair, _between(theta1, s, pair.Hy), theta1)


def powell_on_b(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], B: Matrix, H: Matrix, mu: float
) -> Pair:
    """Damp a pair by Powell's damping on B: ỹ = θ y + (1 − θ) B s.

    Thesis 2.3.1; its θ is `theta2` here. Then sᵀỹ ≥ μ sᵀBs. Both matrices are taken, since the
    record is of yᵀHy.
    """
    pair, Bs = undamped(s, y, H), B @ s
    theta2 = powell_factor(pair.damping.before.sy, as_scalar(s @ Bs), mu)
    return _with_y(pair, _between(theta2, y, Bs), H, theta2)


def identity_damping(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu2: float) -> Pair:
    """Damp a pair by D_I, Powell's damping with B = I: ỹ = θ₂ y + (1 − θ₂) s.

    Thesis 2.3.1; Alg. 3, lines 4 and 5. Then sᵀỹ ≥ μ₂ sᵀs.
    """
    return _identity_step(undamped(s, y, H), H, mu2)


def levenberg_marquardt(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu2: float
) -> Pair:
    """Damp a pair by D_LM: ỹ = y + μ₂ s (thesis Alg. 8, line 8). Then sᵀỹ = sᵀy + μ₂ sᵀs."""
    return _levenberg_step(undamped(s, y, H), H, mu2)


def double_damping(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float, mu2: float
) -> Pair:
    """Damp a pair by DD: D_P with μ₁, then D_I with μ₂, of s̃ (2020 and thesis, Alg. 3).

    Then s̃ᵀỹ ≥ μ₂ s̃ᵀs̃; s̃ᵀy ≥ μ₁ yᵀHy, not so with ỹ.
    """
    return _identity_step(powell(s, y, H, mu1), H, mu2)


def powell_levenberg(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float, mu2: float
) -> Pair:
    """Damp a pair by D_P D_LM: D_P with μ₁, then D_LM with μ₂, of s̃ (thesis Alg. 8; 2021 Alg. 1).

    Then s̃ᵀy ≥ μ₁ yᵀHy and s̃ᵀỹ ≥ μ₂ s̃ᵀs̃.
    """
    return _levenberg_step(powell(s, y, H, mu1), H, mu2)


def scaled_identity_levenberg(
    s: Float[Tensor, " D"],
    y: Float[Tensor, " D"],
    H: Matrix,
    mu1: float,
    mu2: float,
    initial: float | None = None,
) -> Pair:
    """Damp a pair by D_P(I) D_LM: as D_P D_LM, but Powell's damping with H₀ = h I in place of H.

    Thesis Alg. 11, for the proofs of chapter 3. Then s̃ᵀỹ ≥ μ₂ s̃ᵀs̃ and s̃ᵀỹ ≥ μ₃ ỹᵀỹ (thesis
    Lemma 4, 2021 Lemma 1: `curvlab.linalg.bounds.mu3`).

    Args:
        s: the step.
        y: the change of the gradient.
        H: only serves the record.
        mu1: μ₁ of Powell's damping.
        mu2: μ₂ of D_LM, above 0.
        initial: h. By default 1/μ₂ (thesis Alg. 11); 2021 Alg. 4 has 1.

    Raises:
        CurvlabError: a μ₂ that is not above 0, a μ₁ outside (0, 1].
    """
    _check_mu2(mu2)
    h = 1 / mu2 if initial is None else initial
    pair = undamped(s, y, H)
    found = pair.damping.before
    theta1 = powell_factor(found.sy, h * found.yy, mu1)
    return _levenberg_step(_with_s(pair, _between(theta1, s, h * y), theta1), H, mu2)


def _identity_step(pair: Pair, H: Matrix, mu2: float) -> Pair:
    theta2 = powell_factor(pair.damping.after.sy, pair.damping.after.ss, mu2)
    return _with_y(pair, _between(theta2, pair.y, pair.s), H, theta2)


def _levenberg_step(pair: Pair, H: Matrix, mu2: float) -> Pair:
    _check_mu2(mu2)
    return _with_y(pair, pair.y + mu2 * pair.s, H, pair.damping.theta2)


def _with_s(pair: Pair, s: Float[Tensor, " D"], theta1: Scalar) -> Pair:
    return replace(
        pair,
        s=s,
        damping=replace(pair.damping, after=inner_products(s, pair.y, pair.Hy), theta1=theta1),
    )


def _with_y(pair: Pair, y: Float[Tensor, " D"], H: Matrix, theta2: Scalar) -> Pair:
    Hy = H @ y
    return replace(
        pair,
        y=y,
        Hy=Hy,
        damping=replace(pair.damping, after=inner_products(pair.s, y, Hy), theta2=theta2),
    )


def _check_mu2(mu2: float) -> None:
    if not (mu2 > 0 and math.isfinite(mu2)):
        raise CurvlabError(f"Levenberg-Marquardt damping needs a μ₂ above 0, not {mu2:g}")


PairDamping = Callable[[Tensor, Tensor, Matrix, float, float], Pair]
"""Damping of a pair, (s, y, H, μ₁, μ₂) → the pair, damped."""

DAMPINGS: dict[str, PairDamping] = {
    "none": lambda s, y, H, mu1, mu2: undamped(s, y, H),
    "p": lambda s, y, H, mu1, mu2: powell(s, y, H, mu1),
    "i": lambda s, y, H, mu1, mu2: identity_damping(s, y, H, mu2),
    "lm": lambda s, y, H, mu1, mu2: levenberg_marquardt(s, y, H, mu2),
    "dd": double_damping,  # 2020 and thesis Alg. 3
    "p-lm": powell_levenberg,  # thesis Alg. 8, 2021 Alg. 1
    "pi-lm": scaled_identity_levenberg,  # thesis Alg. 11
    "pi-lm-2021": lambda s, y, H, mu1, mu2: scaled_identity_levenberg(
        s, y, H, mu1, mu2, initial=1.0
    ),  # 2021 Alg. 4
}


def damp(
    name: str,
    s: Float[Tensor, " D"],
    y: Float[Tensor, " D"],
    H: Matrix,
    *,
    mu1: float = MU1,
    mu2: float,
) -> Pair:
    """Damp a pair by the damping of this name in DAMPINGS."""
    return lookup(DAMPINGS, name, "damping of pairs")(s, y, H, mu1, mu2)
