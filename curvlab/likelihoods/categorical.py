"""Softmax cross-entropy over classes, at one place or many.

Legend: N examples, C classes, P the axes of places where a class is told apart, V columns of the
    root, M counted places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError, check_values, fitting, shown, unknown
from curvlab.likelihoods.base import ratio
from curvlab.likelihoods.outputs import as_numbers, guard_root, units
from curvlab.likelihoods.targets import both_fit, wrong_targets

ClassAxis = Literal[1, -1]
Per = Literal["sequence", "token"]


@dataclass(eq=False)
class Categorical:
    """Softmax cross-entropy, ℓ = −Σ_places log softmax(z)_y (thesis (1.7)).

    Outputs are [N, C], [N, C, *P] or [N, *P, C]. Targets are class numbers [N, *P], or
    probabilities q shaped as the outputs: then ℓ = −Σ q_c log softmax(z)_c. Losses are sums over
    the places P; with `weight` those of `torch.nn.CrossEntropyLoss(weight=…, reduction="none")`,
    added up.

    Args:
        ignore_index: a place with this class number has no loss, no gradient, no curvature, and
            labels drawn there have none.
        label_smoothing: ε in [0, 1]; class numbers stand for (1 − ε) e_y + ε/C. Probabilities are
            taken as they are.
        weight: w_c ≥ 0 by class [C]; the loss of a place is w_y times as large, of probabilities
            −Σ w_c q_c log softmax(z)_c. Unless all are 1, ℓ is no −log of a law: kind "fisher" is
            refused, and "ggn" has them.
        axis: of the classes, 1 or −1. None: the one at which class numbers fit the outputs' shape;
            axis 1 for probabilities, and where there are no targets. Where classes are last and
            drawn labels are probabilities (`sample`), it must be given.
        per: "sequence" leaves the objective the mean over examples of the sum over places; "token"
            makes it the mean over all counted places of the minibatch (torch's reduction="mean"),
            by `factor`, which multiplies loss, gradient and every matrix: the empirical Fisher
            matrix, of squared gradients, by its square. `loss` itself is of the sequence.

    Raises:
        CurvlabError: an argument out of range.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    weight: Any = None
    axis: ClassAxis | None = None
    per: Per = "sequence"
    # of what `weight` holds; a subclass whose constructor is its own has none
    _weights: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        fitting("ignore_index", self.ignore_index, int)
        fitting("label_smoothing", self.label_smoothing, float)
        check_values(
            (
                "label_smoothing",
                self.label_smoothing,
                0 <= self.label_smoothing <= 1,
                "between 0 and 1",
            )
        )
        if self.axis is not None and (isinstance(self.axis, bool) or self.axis not in (1, -1)):
            raise CurvlabError(f"axis must be 1, -1 or None, not {shown(self.axis)}")
        if self.per not in ("sequence", "token"):
            raise unknown("mean per", self.per, ("sequence", "token"))
        if self.weight is not None:
            self._weights = as_numbers("weight", self.weight)
            if self._weights.ndim != 1:
                shape = tuple(self._weights.shape)
                raise CurvlabError(f"weight must be one number a class, [C], not of shape {shape}")

    @property
    def unlike(self) -> str:
        """Reason why labels drawn do not follow the loss, so that Fisher and GGN are two; or ""."""
        if self._weights is None or bool((self._weights == 1).all()):
            return ""
        return "a cross-entropy with class weights is no −log of a law that labels are drawn from"

    def check(
        self, z: Float[Tensor, "N *CP"], y: Shaped[Tensor, "N *P"] | Float[Tensor, "N *CP"]
    ) -> None:
        """Raise CurvlabError unless y is classes [N, *P], or probabilities shaped as z.

        Also where they fit at both axes, or the class weights are not as many as the classes.
        """
        if z.ndim < 2:
            raise CurvlabError(
                f"categorical outputs must be [N, C], [N, C, …] or [N, …, C], not {list(z.shape)}:"
                " of one number an example take Bernoulli"
            )
        axis = self.axis_of(z, y)
        if self._weights is not None and len(self._weights) != z.shape[axis]:
            raise CurvlabError(
                f"there are {len(self._weights)} class weights, but the model has"
                f" {z.shape[axis]} outputs"
            )
        wrong = wrong_targets(z, y, self.ignore_index, axis if z.ndim == 2 else self.axis)
        if wrong is None:
            self._check_draws(z, axis)
            return
        what, remedy = wrong
        if (
            z.shape[1] == 1 and y.numel() == z.numel()
        ):  # whatever is wrong with them: softmax of one output is 1
            as_z = "" if y.shape == z.shape else f".reshape{tuple(z.shape)}"
            remedy = (
                "of one output take Bernoulli with"
                f" y{'' if y.is_floating_point() else '.float()'}{as_z}"
            )
        raise CurvlabError(f"{what}: {remedy}")

    def axis_of(self, z: Float[Tensor, "N *CP"], y: Tensor | None = None) -> ClassAxis:
        """Return the axis of the classes in outputs z with targets y, 1 or −1.

        Raises:
            CurvlabError: class numbers fit at both.
        """
        if self.axis is not None and z.ndim > 2:
            return self.axis
        if z.ndim <= 2 or y is None or y.is_floating_point() or y.shape != z.shape[:-1]:
            return 1
        if y.shape == z.shape[:1] + z.shape[2:]:
            raise CurvlabError(both_fit(z, f"class numbers of shape {tuple(y.shape)}"))
        return -1

    def loss(
        self, z: Float[Tensor, "N *CP"], y: Shaped[Tensor, "N *P"] | Float[Tensor, "N *CP"]
    ) -> Float[Tensor, " N"]:
        """Return the cross-entropy of each example, in nats, summed over its places."""
        weights = None if self._weights is None else self._weights.to(z)
        n, soft = len(z), y.is_floating_point()
        if self.axis_of(z, y) == -1:  # as it lies: places are examples
            z = z.reshape(-1, z.shape[-1])
            y = y.reshape(z.shape) if soft else y.reshape(-1)
        if soft:
            losses = F.cross_entropy(z, y, weights, reduction="none")
        else:
            losses = F.cross_entropy(
                z,
                y.long(),
                weights,
                reduction="none",
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
            )
        return losses if losses.shape == (n,) else losses.reshape(n, -1).sum(1)

    def count(self, y: Shaped[Tensor, "N *P"] | Float[Tensor, "N *CP"]) -> float:
        """Return M, the number of places whose loss is counted.

        With class weights it is the sum of w_y over them, and of probabilities the number of
        places, as in torch's mean.
        """
        if y.is_floating_point():
            return y.numel() / (y.shape[self.axis or 1] if y.ndim > 1 else 1)
        counted = y.long() != self.ignore_index
        if self._weights is None:
            return float(counted.sum())
        # labels out of range are for `check` to refuse
        weights = self._weights.to(y.device).double()
        return float((weights[y.long().clamp(0, len(weights) - 1)] * counted).sum())

    def places(self, z: Float[Tensor, "N *CP"], y: Tensor | None = None) -> Int[Tensor, " *CP"]:
        """Return the number of the place of each output of an example, [C, *P] or [*P, C]."""
        axis = self.axis_of(z, y)
        shape = z.shape[2:] if axis == 1 else z.shape[1:-1]
        numbers = torch.arange(shape.numel(), device=z.device).view(shape)
        return numbers.unsqueeze(0 if axis == 1 else -1).expand(z.shape[1:])

    def factor(self, y: Shaped[Tensor, "N *P"] | Float[Tensor, "N *CP"]) -> float:
        """Return N/M: times it, a mean over examples is one over counted places. 1 per sequence.

        Raises:
            CurvlabError: per="token", and no place is counted.
        """
        return 1.0 if self.per == "sequence" else ratio(len(y), self.count(y))

    def sample(
        self, z: Float[Tensor, "N *CP"], generator: torch.Generator, y: Tensor | None = None
    ) -> Shaped[Tensor, "N *P"] | Float[Tensor, "N *CP"]:
        """Draw class numbers [N, *P] at every place, ignored where y is.

        One-hot probabilities shaped as z where a class number would not say the same: with label
        smoothing (the law is over classes, so that the score is p − e_ŷ), and if the ignored number
        is a class. They are zero, without a loss, where y is ignored.
        """
        # the class that comes first in a race of exponential clocks: torch.multinomial, but without
        # its waits
        axis = self.axis_of(z, y)
        self._check_draws(z, axis)
        p = z.softmax(axis)
        drawn = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(axis)
        ignored = self._ignored(y)
        if not self._draws_probabilities(z.shape[axis]):
            return drawn if ignored is None else drawn.masked_fill(ignored, self.ignore_index)
        hot = torch.zeros_like(z).scatter_(axis, drawn.unsqueeze(axis), 1.0)
        return hot if ignored is None else hot.masked_fill(ignored.unsqueeze(axis), 0.0)

    def root(self, z: Float[Tensor, "N *CP"], y: Tensor | None = None) -> Float[Tensor, "V N *CP"]:
        """Return column (c, place) of V = C · |P|: √(m p_c) (p − e_c) at that place.

        m is 1, or 0 where y is ignored; with class weights it is w_y. With m = 1 that is the
        gradient at label c weighted by its probability.

        Raises:
            CurvlabError: they would take more than 80 % of the memory; class weights without y.
        """
        guard_root(z)
        axis = self.axis_of(z, y)
        z = z if axis == 1 else z.movedim(-1, 1)
        if axis == -1 and y is not None and y.is_floating_point():
            y = y.movedim(-1, 1)
        found = self._root(z, y)
        return found if axis == 1 else found.movedim(2, -1)

    def _root(self, z: Float[Tensor, "N C *P"], y: Tensor | None) -> Float[Tensor, "V N C *P"]:
        p = z.softmax(1)
        weight, ignored, mass = p.sqrt(), self._ignored(y), self._mass(z, y)
        if mass is not None:
            weight = weight * mass.unsqueeze(1).sqrt()
        if ignored is not None:
            weight = weight.masked_fill(ignored.unsqueeze(1), 0.0)
        if z.ndim == 2:
            return (p[None] - units(z)) * weight.T[:, :, None]
        p, weight = p.flatten(2), weight.flatten(2)
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        # [C, N, C, P]
        columns = (p[None] - eye[:, None, :, None]) * weight.transpose(0, 1)[:, :, None]
        # from column c of place q to (c, q)
        return torch.diag_embed(columns, dim1=1, dim2=4).reshape(-1, *z.shape)

    def _mass(self, z: Float[Tensor, "N C *P"], y: Tensor | None) -> Float[Tensor, "N *P"] | None:
        """Return Σ_c w_c q_c of every place, q what y stands for; None where that is 1."""
        weights = None if self._weights is None else self._weights.to(z)
        if y is not None and y.is_floating_point():
            # 1, up to the rounding of the data
            q = y.to(z.dtype)
            return q.sum(1) if weights is None else torch.einsum("nc...,c->n...", q, weights)
        if weights is None:
            return None
        if y is None:
            raise CurvlabError("with class weights the root depends on the targets: root(z, y)")
        own = weights[y.long().clamp(0, len(weights) - 1)]  # what is ignored is no class
        smooth = self.label_smoothing
        return (1 - smooth) * own + smooth * weights.mean() if smooth else own

    def _ignored(self, y: Tensor | None) -> Bool[Tensor, "N *P"] | None:
        """Return where class numbers are ignored; None where y is none or probabilities."""
        return None if y is None or y.is_floating_point() else y.long() == self.ignore_index

    def _draws_probabilities(self, classes: int) -> bool:
        """Return whether a class number would not say what was drawn."""
        return bool(self.label_smoothing) or 0 <= self.ignore_index < classes

    def _check_draws(self, z: Float[Tensor, "N *CP"], axis: ClassAxis) -> None:
        """Raise CurvlabError where the axis was inferred, and drawn labels would not show it."""
        if self.axis is None and axis == -1 and self._draws_probabilities(z.shape[-1]):
            raise CurvlabError(
                "labels drawn with label_smoothing, or where ignore_index is a class, are"
                " probabilities, which do not show their axis: say Categorical(axis=-1)"
            )


@dataclass(eq=False)
class Tokens(Categorical):
    """Softmax cross-entropy of sequences, the mean over all counted tokens of the minibatch.

    It is `Categorical` with per="token": what `torch.nn.CrossEntropyLoss()` gives, in nat a token.
    """

    per: Per = "token"
