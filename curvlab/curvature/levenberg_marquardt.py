"""Levenberg–Marquardt rule: λ from the reduction ratio ρ (thesis 5.2.3, (5.5)).

The quadratic model is m(p) = f + gᵀp + ½ pᵀ B p with B undamped; f and g of the minibatch S₁, B of
S₂ ⊂ S₁ (Alg. 23, line 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.whole_vector import flat, loss_at, rounding, unflat
from curvlab.errors import CurvlabError, unknown
from curvlab.layers import Block, Layout
from curvlab.linalg.operators import Operator
from curvlab.observation import Transition

Ratio = Literal["direction", "step"]
"""Where ρ is taken: at p = −H g, whatever the learning rate (Alg. 23, lines 6 and 7); at the step
that was taken."""

# of λ_LM / τ: below, it would be lost in the rounding of λ_LM + τ, and no boost would raise it
# again
_SMALLEST = 2.0**-26


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """Rule that moves λ = λ_LM + τ: λ_LM · boost where ρ < ε, λ_LM · drop where ρ > 1 − ε.

    Values: thesis 5.8, "same as in Kiros". λ is never below τ: a smaller one that was given stands
    until the rule first changes it. Martens 2010 has boost 3/2, drop 2/3 and τ = 0.

    Args:
        boost: factor of λ_LM where the model foresaw too much.
        drop: factor where it foresaw well.
        epsilon: ε.
        tau: τ.

    Raises:
        CurvlabError: a value out of its range.
    """

    boost: float = 1.01
    drop: float = 0.99
    epsilon: float = 0.25
    tau: float = 0.001

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("boost", 1 < self.boost < math.inf, "a number above 1"),
            ("drop", 0 < self.drop < 1, "between 0 and 1"),
            ("epsilon", 0 < self.epsilon < 0.5, "between 0 and ½"),
            ("tau", 0 <= self.tau < math.inf, "0 or positive"),
        ):
            if not good:
                raise CurvlabError(
                    f"{name} of the Levenberg-Marquardt rule must be {wanted}, not"
                    f" {getattr(self, name):g}"
                )

    def adapted(self, damping: float, rho: float) -> float:
        """Return the next λ; NaN (no step, so no ratio) changes nothing."""
        factor = self.boost if rho < self.epsilon else self.drop if rho > 1 - self.epsilon else 1.0
        if factor == 1:
            return damping
        return self.tau + factor * max(damping - self.tau, _SMALLEST * self.tau)


def reduction_ratio(actual: float, predicted: float, slack: float = 0.0) -> float:
    """Return ρ = (f(θ) − f(θ + p)) / (m(0) − m(p)), (5.5).

    −∞ where the model foresees no reduction or the loss is not finite, NaN where nothing moved.

    Args:
        actual: f(θ) − f(θ + p).
        predicted: m(0) − m(p).
        slack: where both are within it, ρ is 1; the thesis has none (curvlab).
    """
    if actual == predicted == 0:
        return math.nan
    # both are rounding: the model is as exact as can be seen, and their ratio is noise, which would
    # raise λ for ever at a minimum
    if abs(actual) <= slack and abs(predicted) <= slack:
        return 1.0
    return actual / predicted if predicted > 0 and not math.isnan(actual) else -math.inf


def predicted_reduction(
    g: Float[Tensor, " D"], p: Float[Tensor, " D"], Bp: Float[Tensor, " D"]
) -> float:
    """Return m(0) − m(p) = −gᵀp − ½ pᵀ B p."""
    return -float(g @ p + (p @ Bp) / 2)


def ratio_at(
    transition: Transition, layout: Layout, p: Float[Tensor, " D"], Bp: Float[Tensor, " D"]
) -> float:
    """Return ρ of moving by p from where the transition started.

    It takes one forward pass more where p is not the step that was taken. Reductions within
    `rounding` of the loss are as foreseen.
    """
    before = transition.before
    ahead = p - flat(layout, transition.step)
    after = (
        transition.after.loss
        if not bool(ahead.any())
        else loss_at(before.closure, unflat(layout, ahead))
    )
    predicted = predicted_reduction(flat(layout, before.gradients), p, Bp)
    actual = float(before.loss) - float(after)
    return reduction_ratio(actual, predicted, rounding(before.loss))


def ratio_by_block(
    transition: Transition,
    partition: Mapping[str, Block],
    inverse: Mapping[str, Operator],
    matrices: Mapping[str, Operator | None],
    shift: float,
) -> float:
    """Return ρ at p = −H g of all blocks together (thesis Alg. 23, line 6, by block).

    Args:
        transition: the step that was taken, with its loss before and after.
        partition: all blocks, by name.
        inverse: H of each.
        matrices: B of each, of the likelihood alone; None of a block that estimates no matrix: the
            identity stands for its part of the whole objective's Hessian.
        shift: 2μ of the L2 term, beside every B that is estimated.
    """
    p = {name: -(inverse[name] @ g.flatten()) for name, g in transition.before.gradients.items()}
    Bp = [
        p[name] if (B := matrices[name]) is None else torch.add(B @ p[name], p[name], alpha=shift)
        for name in p
    ]
    layout = Layout(tuple(partition.values()))
    return ratio_at(transition, layout, torch.cat(list(p.values())), torch.cat(Bp))


def check_ratio(ratio: str) -> None:
    """Raise CurvlabError for an unknown place at which ρ is to be taken."""
    if ratio not in get_args(Ratio):
        raise unknown("ratio", ratio, get_args(Ratio))
