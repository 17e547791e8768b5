"""Bounds that are proven of the eigenvalues of the inverses H: one theorem, one function.

Documents: thesis (chapters 2 and 3); 2021 (Ren, Goldfarb), whose lemmas are numbered apart.

Legend: [d_1, …, d_k] shape of a variable with k ways, ε damping of TNT; μ₁, μ₂ of the damping; p
pairs in an L-BFGS matrix; φ bound of a layer's inputs, I their number with the bias column, T
places; λ_A, λ_G the dampings of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Bounds:
    """Bounds of a symmetric matrix H: lower · I ≤ H ≤ upper · I."""

    lower: float
    upper: float

    def hold(self, least: float, greatest: float, slack: float = 1e-9) -> bool:
        """Return whether a spectrum from `least` to `greatest` lies within, but for rounding."""
        return self.lower * (1 - slack) <= least and greatest <= self.upper * (1 + slack)

    @property
    def inverse(self) -> Bounds:
        """Bounds of the inverse of a positive definite matrix within these."""
        return Bounds(1 / self.upper, 1 / self.lower if self.lower else math.inf)

    def __mul__(self, other: Bounds) -> Bounds:
        """Return the bounds of the Kronecker product of two matrices (thesis Lemma 3; Lemma 7)."""
        return Bounds(self.lower * other.lower, self.upper * other.upper)


_SLACK = float(np.finfo(np.float32).eps) ** 0.5
"""Slack of comparisons: Powell's damping makes both sides equal, and rounding shall not decide."""


def within(ratio: NDArray[np.float64], most: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether 0 < ratio ≤ most, but for rounding, entry by entry.

    The ratios are to sᵀy, such as yᵀHy / sᵀy ≤ 1/μ₁. A pair with sᵀy < 0 does not satisfy yᵀHy ≤
    sᵀy/μ₁.
    """
    with np.errstate(invalid="ignore"):
        return np.asarray((ratio > 0) & (ratio <= most * (1 + _SLACK)))


def input_factor(inputs: int, phi: float, damping: float, places: int = 1) -> Bounds:
    """Return the bounds of H_A = (A + λ_A I)⁻¹ where every input has |a| ≤ φ.

    Thesis Lemma 1 (T = 1) and (3.17) in Lemma 7; 2021 (15): ‖A‖ ≤ ((I − 1) φ² + 1) T.

    The moving average of such A, and the mean over examples, are bounded alike.

    >>> input_factor(inputs=4, phi=1.0, damping=1.0)
    Bounds(lower=0.2, upper=1.0)
    """
    return Bounds(1 / (((inputs - 1) * phi**2 + 1) * places + damping), 1 / damping)


def double_damping_step(
    norm_B: float, norm_H: float, mu1: float, mu2: float
) -> tuple[float, float]:
    """Return upper bounds of (‖B⁺‖, ‖H⁺‖) after one BFGS update by a pair of double damping.

    Such a pair has yᵀHy ≤ sᵀy/μ₁ and sᵀs ≤ sᵀy/μ₂: thesis (2.8), (2.10).
    """
    return norm_B * (1 + 1 / mu1), (math.sqrt(norm_H) + 1 / math.sqrt(mu1 * mu2)) ** 2 + 1 / mu2


def double_damping_lbfgs(p: int, mu1: float, mu2: float) -> Bounds:
    """Return the bounds of L-BFGS from H₀ = I by p pairs of double damping: thesis Lemma 2.

    Pairs are skipped where yᵀHy > sᵀy/μ₁. Proven **as long as no pair was dropped**.

    The proof takes ‖B_i‖ ≤ ‖B_{i−1}‖ (1 + 1/μ₁) from (2.8), which asks for yᵀH_{i−1}y ≤ sᵀy/μ₁. The
    test was made with the H of its time. That is H_{i−1} until the memory is full; then there is no
    such bound: with p = 1, y = e and s = μ₁ (eᵀHe) e, accepted at every step, multiply an
    eigenvalue of H by μ₁ each time. D_P(I) D_LM of chapter 3 is free of this.
    """
    lower = (1 + 1 / mu1) ** -p
    return Bounds(lower, _grown(1.0, p, (1 + 1 / math.sqrt(mu1 * mu2 * lower)) ** 2, mu2))


def mu3(mu1: float, mu2: float, initial: float | None = None) -> float:
    """Return μ₃ of ỹᵀỹ ≤ s̃ᵀỹ/μ₃, which holds after D_P(I) D_LM with H₀ = h I.

    Thesis Lemma 4 (h = 1/μ₂), 2021 Lemma 1 (h = 1).

    ỹᵀỹ ≤ yᵀy + 2 μ₂ s̃ᵀỹ and s̃ᵀy ≥ μ₁ h yᵀy give 1/μ₃ = 1/(μ₁ h) + 2 μ₂; h = 1/μ₂ by default: μ₃ =
    μ₁ / (μ₂ (1 + 2 μ₁)).
    """
    h = 1 / mu2 if initial is None else initial
    return 1 / (1 / (mu1 * h) + 2 * mu2)


def damped_step(norm_B: float, norm_H: float, mu2: float, mu3: float) -> tuple[float, float]:
    """Return upper bounds of (‖B⁺‖, ‖H⁺‖) after one BFGS update with sᵀs ≤ sᵀy/μ₂, yᵀy ≤ sᵀy/μ₃.

    Thesis Lemma 5, 2021 Lemma 2.
    """
    return norm_B + 1 / mu3, (1 + 1 / math.sqrt(mu2 * mu3)) ** 2 * norm_H + 1 / mu2


def damped_lbfgs(p: int, mu1: float, mu2: float, initial: float | None = None) -> Bounds:
    """Return the bounds of L-BFGS from H₀ = h I by any p pairs of D_P(I) D_LM.

    Thesis Lemma 6 (h = 1/μ₂, the default), 2021 Lemma 3 (h = 1).
    """
    h = 1 / mu2 if initial is None else initial
    third = mu3(mu1, mu2, initial)
    return Bounds(1 / (1 / h + p / third), _grown(h, p, (1 + 1 / math.sqrt(mu2 * third)) ** 2, mu2))


def _grown(start: float, p: int, factor: float, mu2: float) -> float:
    """Return what p times x ← factor · x + 1/μ₂ makes of `start`; infinite beyond a float."""
    try:
        power = factor**p
    except OverflowError:
        return math.inf
    return start * power + (power - 1) / (factor - 1) / mu2


def contraction(shape: Sequence[int], way: int, norm: float) -> float:
    """Return a bound of ‖E[G^(i)]‖ where ‖E[vec G vec Gᵀ]‖ is at most `norm`: thesis Lemma 9.

    `way` is i, counted from 0.
    """
    return math.prod(shape) / shape[way] * norm


def tensor_normal_factor(shape: Sequence[int], way: int, norm: float, damping: float) -> Bounds:
    """Return the bounds of one factor Ũ_i + εI of TNT where ‖E[vec G vec Gᵀ]‖ is at most `norm`.

    Thesis, proof of Lemma 10, by (4.10) and Lemma 9.
    """
    d, k = shape[way], len(shape)
    return Bounds(damping, d ** (1 - 1 / k) * norm ** (1 / k) + damping)


def tensor_normal(shape: Sequence[int], norm: float, damping: float) -> Bounds:
    """Return the bounds of ⊗ᵢ (Ũ_i + εI) of TNT where ‖E[vec G vec Gᵀ]‖ is at most `norm`.

    Thesis Lemma 10. H is bounded by the `inverse` of them.
    """
    return math.prod(
        (tensor_normal_factor(shape, i, norm, damping) for i in range(len(shape))),
        start=Bounds(1, 1),
    )
