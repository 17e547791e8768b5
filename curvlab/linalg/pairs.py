"""Pairs that quasi-Newton updates learn from: what is kept of one, and when one is refused.

A pair is (s, y) with the product H y, and holds what a log needs. Numbers of a pair stay on its
device, as float64 tensors without axes: nothing here waits for a GPU but `Pair.skipped`. Where to
look is free (`finite.waits`), they are Python's own: a pair then takes half the time, all of which
is calls of tiny tensors.

Documents: 2020 (Goldfarb, Ren, Bahamou), thesis (chapters 2 and 3), 2021 (Ren, Goldfarb: its
algorithms are numbered apart), S2QN (Yang et al.).

Legend: D order; s step, y change of the gradient [D]; B curvature, H its inverse [D, D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from curvlab.finite import waits
from curvlab.linalg.operators import Operator

Matrix = Tensor | Operator
"""Matrix that is only multiplied with vectors."""

Scalar = Float[Tensor, ""] | float

Flag = Bool[Tensor, ""] | bool

Skip = Literal["", "not finite", "curvature", "length", "double damping", "cosine"]

SKIPS: dict[Skip, str] = {
    "": "used",
    "not finite": "NaN or Inf in the pair or in the updated matrix (practice)",
    "curvature": "sᵀy ≤ 0 (practice)",
    "length": "sᵀy ≤ 1e-4 sᵀs ‖v‖ (practice)",
    "double damping": "sᵀy < μ₁ yᵀHy (thesis Alg. 5, line 17)",
    "cosine": "sᵀy < ε_B ‖s‖ ‖y‖ (S2QN 3.2)",
}
"""Reasons why a pair was not used."""


@dataclass(frozen=True)
class Products:
    """Inner products of a pair, of which the documents bound three ratios.

    Thesis (2.8), (2.10), Lemma 4.
    """

    sy: Scalar
    yHy: Scalar
    ss: Scalar
    yy: Scalar

    @property
    def curvature(self) -> Scalar:
        """Ratio yᵀHy / sᵀy, to be at most 1/μ₁."""
        return ratio_to_sy(self.yHy, self.sy)

    @property
    def step(self) -> Scalar:
        """Ratio sᵀs / sᵀy, to be at most 1/μ₂."""
        return ratio_to_sy(self.ss, self.sy)

    @property
    def change(self) -> Scalar:
        """Ratio yᵀy / sᵀy, to be at most 1/μ₃."""
        return ratio_to_sy(self.yy, self.sy)


def ratio_to_sy(numerator: Scalar, sy: Scalar) -> Scalar:
    """Return the ratio of a number to sᵀy; NaN where that is 0."""
    if isinstance(sy, Tensor):
        return torch.where(sy == 0, math.nan, numerator / sy)
    return numerator / sy if sy else math.nan


@dataclass(frozen=True)
class Damping:
    """Record of what a damping did to a pair; a θ of 1 did nothing.

    θ₁ of Powell's damping on H, which changes s; θ₂ of that on B or I, which changes y.
    """

    before: Products
    after: Products
    theta1: Scalar
    theta2: Scalar


@dataclass(frozen=True)
class Pair:
    """Curvature pair (s, y) as it goes into an update, with its record.

    `Hy` is the product that damping and update share.
    """

    s: Float[Tensor, " D"]
    y: Float[Tensor, " D"]
    Hy: Float[Tensor, " D"]
    damping: Damping
    refused: Mapping[Skip, Flag] = field(default_factory=dict)

    @property
    def used(self) -> Flag:
        """Whether nothing speaks against the pair."""
        flags = list(self.refused.values())
        tensors = [f for f in flags if isinstance(f, Tensor)]
        return ~torch.stack(tensors).any() if tensors else not any(flags)

    @property
    def skipped(self) -> Skip:
        """First of the reasons not to use the pair, or "". Waits for the device."""
        return next((reason for reason, holds in self.refused.items() if bool(holds)), "")


def inner_products(
    s: Float[Tensor, " D"], y: Float[Tensor, " D"], Hy: Float[Tensor, " D"]
) -> Products:
    """Return the inner products of a pair, of its device where reading them would wait."""
    if waits(s):
        return Products(*torch.stack([s @ y, y @ Hy, s @ s, y @ y]).double().unbind())
    return Products((s @ y).item(), (y @ Hy).item(), (s @ s).item(), (y @ y).item())


def as_scalar(value: Float[Tensor, ""]) -> Scalar:
    """Return a number as a pair keeps it.

    On its device in double precision, or as Python's own.
    """
    return value.double() if waits(value) else float(value)


def negated(flag: Flag) -> Flag:
    """Return the opposite of a flag, wherever it is."""
    return ~flag if isinstance(flag, Tensor) else not flag


def _all_finite(*numbers: Scalar) -> Flag:
    tensors = [n for n in numbers if isinstance(n, Tensor)]
    return (
        torch.isfinite(torch.stack(tensors)).all() if tensors else all(map(math.isfinite, numbers))
    )


def hessian_action(H: Matrix, a: Float[Tensor, " D"], A: Matrix, damping: float = 0.0) -> Pair:
    """Make the pair s = H a, y = A s + λ_A s: thesis 2.4; Alg. 4, lines 21 and 22."""
    s = H @ a
    return action_pair(H, s, A @ s, damping)


def action_pair(H: Matrix, s: Float[Tensor, " D"], As: Float[Tensor, " D"], damping: float) -> Pair:
    """Make the pair of `hessian_action` where s = H ā and A s are there.

    A of a minibatch is then not formed: (3.14); Alg. 9, line 16; 2021 (12), (13).
    """
    return undamped(s, As + damping * s, H)


def undamped(s: Float[Tensor, " D"], y: Float[Tensor, " D"], H: Matrix) -> Pair:
    """Make a pair as it is, with its products."""
    Hy = H @ y
    found = inner_products(s, y, Hy)
    one = torch.ones_like(found.sy) if isinstance(found.sy, Tensor) else 1.0
    return Pair(s, y, Hy, Damping(found, found, one, one))


def accept(
    pair: Pair,
    *,
    v: Float[Tensor, " D"] | None = None,
    mu1: float | None = None,
    cosine: float | None = None,
) -> Pair:
    """Return the pair with what speaks against its use, judged as it stands after damping.

    Always: every number finite, sᵀy > 0.

    Args:
        pair: the pair, damped.
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
        "not finite": negated(_all_finite(found.sy, found.yHy, found.ss, found.yy)),
        "curvature": found.sy <= 0,
    }
    if v is not None:
        refused["length"] = negated(found.sy > 1e-4 * found.ss * as_scalar(v.norm()))
    if mu1 is not None:
        slack = 1 - torch.finfo(pair.s.dtype).eps ** 0.5
        refused["double damping"] = found.sy < mu1 * slack * found.yHy
    if cosine is not None:
        refused["cosine"] = found.sy < cosine * (found.ss * found.yy) ** 0.5
    return replace(pair, refused=refused)
