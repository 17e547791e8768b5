"""BFGS: the updates, the pairs they learn from, how pairs are damped and when they are refused.

Documents: 2020 (Goldfarb, Ren, Bahamou), thesis (chapters 2 and 3), 2021 (Ren, Goldfarb: its
algorithms are numbered apart), S2QN (Yang et al.). A function that damps takes a pair (s, y) and H,
and returns a `Pair`, which holds what a log needs.

Numbers of a pair stay on its device, as float64 tensors without axes: nothing here waits for a GPU
but `Pair.skipped`. Where to look is free (`finite.waits`), they are Python's own: a pair then takes
half the time, all of which is calls of tiny tensors.

Legend: D order; s step, y change of the gradient [D]; B curvature, H its inverse [D, D]; ρ = 1/sᵀy;
N examples, T places, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.errors import CurvlabError, lookup
from curvlab.finite import waits
from curvlab.linalg.operators import Operator

Matrix = Tensor | Operator
"""What is only multiplied with vectors."""

Scalar = Float[Tensor, ""] | float
Flag = Bool[Tensor, ""] | bool

MU1 = 0.2
"""μ₁ of every document."""

Skip = Literal["", "not finite", "curvature", "length", "double damping", "cosine"]
SKIPS: dict[Skip, str] = {
    "": "used",
    "not finite": "NaN or Inf in the pair or in the updated matrix (practice)",
    "curvature": "sᵀy ≤ 0 (practice)",
    "length": "sᵀy ≤ 1e-4 sᵀs ‖v‖ (practice)",
    "double damping": "sᵀy < μ₁ yᵀHy (thesis Alg. 5, line 17)",
    "cosine": "sᵀy < ε_B ‖s‖ ‖y‖ (S2QN 3.2)",
}
"""Why a pair was not used."""


@dataclass(frozen=True)
class Products:
    """Inner products of a pair. The documents bound three of their ratios: thesis (2.8), (2.10),
    Lemma 4.
    """

    sy: Scalar
    yHy: Scalar
    ss: Scalar
    yy: Scalar

    @property
    def curvature(self) -> Scalar:
        """yᵀHy / sᵀy, to be at most 1/μ₁."""
        return _ratio(self.yHy, self.sy)

    @property
    def step(self) -> Scalar:
        """sᵀs / sᵀy, to be at most 1/μ₂."""
        return _ratio(self.ss, self.sy)

    @property
    def change(self) -> Scalar:
        """yᵀy / sᵀy, to be at most 1/μ₃."""
        return _ratio(self.yy, self.sy)


def _ratio(numerator: Scalar, sy: Scalar) -> Scalar:
    if isinstance(sy, Tensor):
        return torch.where(sy == 0, math.nan, numerator / sy)
    return numerator / sy if sy else math.nan


@dataclass(frozen=True)
class Damping:
    """What a damping did: θ₁ of Powell's damping on H, which changes s; θ₂ of that on B or I, which
    changes y; 1: nothing.
    """

    before: Products
    after: Products
    theta1: Scalar
    theta2: Scalar


@dataclass(frozen=True)
class Pair:
    """A pair as it goes into an update, with the product Hy that damping and update share, and its
    record.
    """

    s: Float[Tensor, " D"]
    y: Float[Tensor, " D"]
    Hy: Float[Tensor, " D"]
    damping: Damping
    refused: Mapping[Skip, Flag] = field(default_factory=dict)

    @property
    def used(self) -> Flag:
        """Whether nothing speaks against it."""
        flags = list(self.refused.values())
        tensors = [f for f in flags if isinstance(f, Tensor)]
        return ~torch.stack(tensors).any() if tensors else not any(flags)

    @property
    def skipped(self) -> Skip:
        """The first of the reasons not to use it; "" where there is none. Waits for the device."""
        return next((reason for reason, holds in self.refused.items() if bool(holds)), "")


def _products(s: Float[Tensor, " D"], y: Float[Tensor, " D"], Hy: Float[Tensor, " D"]) -> Products:
    if waits(s):
        return Products(*torch.stack([s @ y, y @ Hy, s @ s, y @ y]).double().unbind())
    return Products((s @ y).item(), (y @ Hy).item(), (s @ s).item(), (y @ y).item())


def _number(value: Float[Tensor, ""]) -> Scalar:
    return value.double() if waits(value) else float(value)


def _largest(v: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    found: Tensor = torch.linalg.vector_norm(v, math.inf)
    return found


def _not(flag: Flag) -> Flag:
    return ~flag if isinstance(flag, Tensor) else not flag


def _all_finite(*numbers: Scalar) -> Flag:
    tensors = [n for n in numbers if isinstance(n, Tensor)]
    return (
        torch.isfinite(torch.stack(tensors)).all() if tensors else all(map(math.isfinite, numbers))
    )


# Updates.


def bfgs_inverse(
    H: Float[Tensor, "D D"],
    s: Float[Tensor, " D"],
    y: Float[Tensor, " D"],
    Hy: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "D D"]:
    """H⁺ = (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ: thesis (2.6). Exactly symmetric where H is; H⁺ y =
    s.

    With s and y, H and B exchanged, ``bfgs_inverse(B, y, s)``, it is the DFP update of B.
    """
    Hy = H @ y if Hy is None else Hy
    return _plus_symmetric(H, s, _other_half(s, Hy, s @ y, y @ Hy))


def _other_half(
    s: Float[Tensor, " D"], Hy: Float[Tensor, " D"], sy: Scalar, yHy: Scalar
) -> Float[Tensor, " D"]:
    """w of H⁺ = H + s wᵀ + w sᵀ."""
    rho = _ratio(1.0, sy)  # NaN where sᵀy is 0, which `updated_inverse` then refuses
    return (rho * (rho * yHy + 1) / 2) * s - rho * Hy


def bfgs(
    B: Float[Tensor, "D D"], s: Float[Tensor, " D"], y: Float[Tensor, " D"]
) -> Float[Tensor, "D D"]:
    """B⁺ = B − B s sᵀ B / sᵀBs + ρ y yᵀ: thesis (2.6). B⁺ s = y."""
    Bs = B @ s
    return B - torch.outer(Bs, Bs) / (s @ Bs) + torch.outer(y, y) / (s @ y)


def broyden_inverse(
    H: Float[Tensor, "D D"], s: Float[Tensor, " D"], y: Float[Tensor, " D"], phi: float
) -> Float[Tensor, "D D"]:
    """H⁺ = H − σ H y yᵀ H + ρ s sᵀ + φ (yᵀHy) h hᵀ, h = ρ s − σ H y: thesis (2.11). φ = 1 is BFGS,
    φ = 0 is DFP.
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
    """(H⁻¹ + c a aᵀ)⁻¹ = H − H a (1/c + aᵀHa)⁻¹ aᵀ H: thesis 2.4, after Theorem 1."""
    Ha = H @ a
    return H - torch.outer(Ha, Ha) / (1 / c + a @ Ha)


def _plus_symmetric(
    H: Float[Tensor, "D D"], s: Float[Tensor, " D"], w: Float[Tensor, " D"]
) -> Float[Tensor, "D D"]:
    """H + s wᵀ + w sᵀ; the two are added first, so that rounding is symmetric."""
    half = torch.outer(s, w)
    return (half + half.mT).add_(H)


# Pairs from products with the matrix whose inverse is sought ("Hessian action").


def hessian_action(H: Matrix, a: Float[Tensor, " D"], A: Matrix, damping: float = 0.0) -> Pair:
    """s = H a, y = A s + λ_A s: thesis 2.4; Alg. 4, lines 21 and 22."""
    s = H @ a
    return action_pair(H, s, A @ s, damping)


def action_pair(H: Matrix, s: Float[Tensor, " D"], As: Float[Tensor, " D"], damping: float) -> Pair:
    """The same where s = H ā and A s are there, A of a minibatch not formed: (3.14); Alg. 9, line
    16; 2021 (12), (13).
    """
    return undamped(s, As + damping * s, H)


# Damping. Each function says which line of which algorithm it is.


def powell_factor(sy: Scalar, q: Scalar, mu: float) -> Scalar:
    """θ = (1 − μ) q / (q − sᵀy) where sᵀy < μ q, else 1: thesis 2.3.1. Then θ sᵀy + (1 − θ) q ≥ μ
    q.

    q is yᵀHy, sᵀBs or sᵀs. Where rounding has cost H its definiteness (q ≤ 0) nothing is damped:
    the pair is to be refused.
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
    """θ here + (1 − θ) there; `here` itself where θ = 1, whatever `there` is."""
    if isinstance(theta, Tensor):
        return torch.where(theta < 1, theta * here + (1 - theta) * there, here)
    return theta * here + (1 - theta) * there if theta < 1 else here


def undamped(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix) -> Pair:
    """The pair as it is."""
    Hy = H @ y
    found = _products(s, y, Hy)
    one = torch.ones_like(found.sy) if isinstance(found.sy, Tensor) else 1.0
    return Pair(s, y, Hy, Damping(found, found, one, one))


def powell(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float) -> Pair:
    """D_P, Powell's damping on H: s̃ = θ₁ s + (1 − θ₁) H y (thesis 2.3.1; Alg. 3, lines 2 and 3).
    s̃ᵀy ≥ μ₁ yᵀHy.
    """
    pair = undamped(s, y, H)
    theta1 = powell_factor(pair.damping.before.sy, pair.damping.before.yHy, mu1)
    return _with_s(pair, _between(theta1, s, pair.Hy), theta1)


def powell_on_b(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], B: Matrix, H: Matrix, mu: float
) -> Pair:
    """Powell's damping on B: ỹ = θ y + (1 − θ) B s (thesis 2.3.1; its θ is `theta2` here). sᵀỹ ≥ μ
    sᵀBs.

    Both matrices are taken, since the record is of yᵀHy.
    """
    pair, Bs = undamped(s, y, H), B @ s
    theta2 = powell_factor(pair.damping.before.sy, _number(s @ Bs), mu)
    return _with_y(pair, _between(theta2, y, Bs), H, theta2)


def identity_damping(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu2: float) -> Pair:
    """D_I, Powell's damping with B = I: ỹ = θ₂ y + (1 − θ₂) s (thesis 2.3.1; Alg. 3, lines 4 and
    5). sᵀỹ ≥ μ₂ sᵀs.
    """
    return _identity_step(undamped(s, y, H), H, mu2)


def levenberg_marquardt(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu2: float
) -> Pair:
    """D_LM: ỹ = y + μ₂ s (thesis Alg. 8, line 8). sᵀỹ = sᵀy + μ₂ sᵀs."""
    return _levenberg_step(undamped(s, y, H), H, mu2)


def double_damping(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float, mu2: float
) -> Pair:
    """DD: D_P with μ₁, then D_I with μ₂, of s̃ (2020 and thesis, Alg. 3). s̃ᵀỹ ≥ μ₂ s̃ᵀs̃; s̃ᵀy ≥
    μ₁ yᵀHy, not so with ỹ.
    """
    return _identity_step(powell(s, y, H, mu1), H, mu2)


def powell_levenberg(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix, mu1: float, mu2: float
) -> Pair:
    """D_P D_LM: D_P with μ₁, then D_LM with μ₂, of s̃ (thesis Alg. 8; 2021 Alg. 1). s̃ᵀy ≥ μ₁ yᵀHy
    and s̃ᵀỹ ≥ μ₂ s̃ᵀs̃.
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
    """D_P(I) D_LM: as D_P D_LM, but Powell's damping with H₀ = h I in place of H: thesis Alg. 11,
    for the proofs of chapter 3.

    s̃ᵀỹ ≥ μ₂ s̃ᵀs̃ and s̃ᵀỹ ≥ μ₃ ỹᵀỹ (thesis Lemma 4, 2021 Lemma 1: `curvlab.linalg.bounds.mu3`). H
    only serves the record.

    Args:
        initial: h. By default 1/μ₂ (thesis Alg. 11); 2021 Alg. 4 has 1.
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
        pair, s=s, damping=replace(pair.damping, after=_products(s, pair.y, pair.Hy), theta1=theta1)
    )


def _with_y(pair: Pair, y: Float[Tensor, " D"], H: Matrix, theta2: Scalar) -> Pair:
    Hy = H @ y
    return replace(
        pair,
        y=y,
        Hy=Hy,
        damping=replace(pair.damping, after=_products(pair.s, y, Hy), theta2=theta2),
    )


def _check_mu2(mu2: float) -> None:
    if not (mu2 > 0 and math.isfinite(mu2)):
        raise CurvlabError(f"Levenberg-Marquardt damping needs a μ₂ above 0, not {mu2:g}")


PairDamping = Callable[[Tensor, Tensor, Matrix, float, float], Pair]
"""(s, y, H, μ₁, μ₂) → the pair, damped."""

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
    """By the name in DAMPINGS."""
    return lookup(DAMPINGS, name, "damping of pairs")(s, y, H, mu1, mu2)


# Acceptance.


def accept(
    pair: Pair,
    *,
    v: Float[Tensor, " D"] | None = None,
    mu1: float | None = None,
    cosine: float | None = None,
) -> Pair:
    """The pair, with what speaks against its use. Judged as it stands after damping.

    Always: every number finite, sᵀy > 0.

    Args:
        v: sᵀy > 1e-4 sᵀs ‖v‖ too, v the mean pre-activation gradient (for H_g) or the mean input
            (for H_a): practice.
        mu1: sᵀy ≥ μ₁ yᵀHy too: DD-skip of the variant with a proof, thesis Alg. 5, line 17.
            Powell's damping makes the two equal, so that they are compared up to √ε: rounding shall
            not decide. (Section 2.3.1 of the thesis says 2/μ₁ of the same test; that is ``mu1 /
            2``.)
        cosine: sᵀy ≥ ε_B ‖s‖ ‖y‖ too; S2QN 3.2 has 1e-8.
    """
    found = pair.damping.after
    refused: dict[Skip, Flag] = {
        "not finite": _not(_all_finite(found.sy, found.yHy, found.ss, found.yy)),
        "curvature": found.sy <= 0,
    }
    if v is not None:
        refused["length"] = _not(found.sy > 1e-4 * found.ss * _number(v.norm()))
    if mu1 is not None:
        slack = 1 - torch.finfo(pair.s.dtype).eps ** 0.5
        refused["double damping"] = found.sy < mu1 * slack * found.yHy
    if cosine is not None:
        refused["cosine"] = found.sy < cosine * (found.ss * found.yy) ** 0.5
    return replace(pair, refused=refused)


def updated_inverse(H: Float[Tensor, "D D"], pair: Pair) -> tuple[Float[Tensor, "D D"], Pair]:
    """(H⁺, pair) by BFGS; H where the pair is refused, or where what is added is not finite, which
    the pair then says.
    """
    found, used = pair.damping.after, pair.used
    if not isinstance(used, Tensor) and not used:
        return H, pair
    w = _other_half(pair.s, pair.Hy, found.sy, found.yHy)
    # no entry of s wᵀ + w sᵀ is larger
    extent = 2 * _number(_largest(pair.s)) * _number(_largest(w))
    fits = extent <= torch.finfo(w.dtype).max
    overflows = used & _not(fits)
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
