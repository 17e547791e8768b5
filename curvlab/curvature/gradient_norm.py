"""Gradient-norm rule of the damping: S2QN (Yang et al.), (8).

α_k⁻¹ is what curvlab calls the damping of a method that has this rule; a schedule of it is a
schedule of α_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvlab.errors import CurvlabError


@dataclass(frozen=True, kw_only=True)
class GradientNorm:
    """Rule that makes λ_k of α_k⁻¹ and ‖g_{k−1}‖: S2QN (8).

    α_k⁻¹ for norms from r₁ to r₂, up to 2 α_k⁻¹ for smaller and for larger ones.

    Continuous, and never below α_k⁻¹. The document gives no values; r₁ = 0.1, r₂ = 1 and a constant
    α are curvlab's.

    Args:
        r1: r₁; None, together with r₂: λ_k = α_k⁻¹, whatever the norm.
        r2: r₂.
        shrink: α_{k+1}⁻¹ = shrink · α_k⁻¹.

    Raises:
        CurvlabError: a value out of its range, or one of r₁ and r₂ alone.
    """

    r1: float | None = 0.1
    r2: float | None = 1.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        if (self.r1 is None) != (self.r2 is None):
            raise CurvlabError("the gradient-norm rule (8) needs both r1 and r2, or neither")
        if self.r1 is not None and self.r2 is not None and not 0 < self.r1 < self.r2:
            raise CurvlabError(
                f"the gradient-norm rule needs 0 < r₁ < r₂, not {self.r1:g} and {self.r2:g}"
            )
        if not 0 < self.shrink <= 1:
            raise CurvlabError(f"shrink must be above 0 and at most 1, not {self.shrink:g}")

    def __call__(self, damping: float, norm: float | None) -> float:
        """Return λ_k.

        Args:
            damping: α_k⁻¹.
            norm: ‖g_{k−1}‖ of the last minibatch's mean gradient, all parameters together; None
                before there is one.
        """
        if norm is None or self.r1 is None or self.r2 is None or self.r1 <= norm <= self.r2:
            return damping
        ratio = norm / self.r1 if norm < self.r1 else self.r2 / norm
        return 2 / (1 + ratio) * damping  # (8): 2 r₁ / (‖g‖ + r₁) and 2 ‖g‖ / (‖g‖ + r₂), no ∞ / ∞


def total_norm(gradients: Mapping[str, Tensor]) -> float:
    """Return ‖g‖ of all blocks together."""
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())
