"""Conditions on the refinement of a Kronecker factor: S2QN (Yang et al.), (19) and (20).

Legend: O outputs, k columns of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import Move
from curvlab.linalg.block_bfgs import parameter_secant, preactivation_secant
from curvlab.statistics import LayerStatistics

ColumnPair = tuple[Float[Tensor, "O k"], Float[Tensor, "O k"]]


@dataclass(frozen=True)
class Condition:
    """Secant condition: what a step gives, and the pairs (𝕌, 𝕍) that Λ̃ is to satisfy.

    Λ̃ 𝕌 = 𝕍 once Â and G̃ are known. `commutes`: whether the columns may be sketched before.
    """

    look: Callable[[LayerStatistics, LayerStatistics, Move], ColumnPair]
    pairs: Callable[[Tensor, Tensor, Tensor, Tensor], ColumnPair]
    commutes: bool


def _parameters(before: LayerStatistics, after: LayerStatistics, move: Move) -> ColumnPair:
    return move(), after.gradient - before.gradient


def _preactivations(before: LayerStatistics, after: LayerStatistics, move: Move) -> ColumnPair:
    """Return mat(s_k − s_{k−1}), mat(Ds_k − Ds_{k−1}) of each example's own loss.

    They have a column for each example and place.
    """
    return (after.h - before.h).flatten(0, 1).mT, (after.g[0] - before.g[0]).flatten(0, 1).mT


CONDITIONS: dict[str, Condition] = {
    "parameters": Condition(_parameters, parameter_secant, False),  # (19)
    "preactivations": Condition(
        _preactivations, lambda U, V, A, G: preactivation_secant(U, V, G), True
    ),  # (20)
}
