"""Units of the empirical Fisher matrix: whose gradient is squared, a sequence's or one place's.

Fisher and GGN are one matrix for either: scores of labels that are drawn independently at every
place are uncorrelated. The data's labels are not drawn, so that the empirical matrices differ.

Legend: N examples, C outputs of the model (flattened), P places of a loss in an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.errors import CurvlabError, unknown

Unit = Literal["sequence", "token"]
"""Whose gradient the empirical Fisher matrix squares: that of an example's whole loss, or that of
the loss at each place by itself.
"""

UNITS: tuple[Unit, ...] = get_args(Unit)


def kind_per(kind: str, unit: str) -> str:
    """Return the kind of matrix with its unit: "ef-token" for the empirical one per token.

    Raises:
        CurvlabError: an unknown unit, or one of another kind than "ef".
    """
    if unit not in UNITS:
        raise unknown("unit", unit, UNITS)
    if unit == "sequence" or kind == "ef-token":
        return kind
    if kind != "ef":
        raise CurvlabError(
            f"unit='token' is of kind 'ef' alone, not of {kind}: GGN and Fisher are one matrix for"
            " either unit, second derivatives have none; leave unit out"
        )
    return "ef-token"


@dataclass(frozen=True)
class ByPlace:
    """Derivatives of the losses of a minibatch in its outputs, apart for every place of a loss.

    Args:
        slopes: ∂ℓ/∂z of each example's loss at the data's labels, times the factor N/M.
        places: the number of the place of each output of an example, from 0.
        root: √(N/M), a number or that of every output.
    """

    slopes: Float[Tensor, "N *C"]
    places: Int[Tensor, " *C"]
    root: float | Float[Tensor, " C"]

    @property
    def where(self) -> Float[Tensor, "C P"]:
        """Which outputs are a place's: a one for each."""
        places = self.places.flatten().to(self.slopes.device)
        count = int(places.max()) + 1
        return (places[:, None] == torch.arange(count, device=places.device)).to(self.slopes)

    @property
    def scales(self) -> Float[Tensor, " P"]:
        """√(N/M) of every place."""
        root: Tensor = torch.ones_like(self.slopes[0]).flatten() * self.root
        return (self.where * root[:, None]).amax(0)

    def vectors(self) -> Float[Tensor, "P N *C"]:
        """Return the vectors that are sent back, one a place, times the root of N/M.

        Their second moment is (N/M) (1/N) Σ g gᵀ over places: the mean over the M counted ones
        where the loss is that mean, of each place's gradient as it is.
        """
        slopes = self.slopes.flatten(1) / self.root
        return (self.where.mT[:, None] * slopes).view(-1, *self.slopes.shape)

    def linear(self, z: Float[Tensor, "N *C"]) -> Float[Tensor, "N P"]:
        """Return functions of outputs, linear in them, whose derivatives are these vectors."""
        slopes = self.slopes.flatten(1) / self.root
        return (z.flatten(1) * slopes.to(z.dtype)) @ self.where.to(z.dtype)

    def some(self, examples: slice) -> ByPlace:
        """Return those of some of the examples."""
        return ByPlace(self.slopes[examples], self.places, self.root)
