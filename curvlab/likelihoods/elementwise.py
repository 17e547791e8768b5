"""Likelihoods whose outputs are drawn one by one: Bernoulli on logits, Gaussian.

Legend: N examples, C outputs, V columns of the root.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from curvlab.errors import CurvlabError, shown
from curvlab.likelihoods.outputs import as_numbers, check_targets, guard_root, over_outputs, units


class Bernoulli:
    """Binary cross-entropy on logits, summed over units: ℓ = Σ_c softplus(z_c) − y_c z_c.

    Targets are in [0, 1], shaped as z. With weights ℓ = Σ_c w_c (p_c y_c softplus(−z_c) +
    (1 − y_c) softplus(z_c)), as `torch.nn.BCEWithLogitsLoss` with reduction="sum".

    Args:
        weight: w ≥ 0, of one number or as many as broadcast to the outputs of one example [*C].
        pos_weight: p ≥ 0 of the targets 1, likewise. Where a weight is not 0 or 1, or a p not 1, ℓ
            is no −log of a law: kind "fisher" is refused, and "ggn" has them.
        ignore_value: a unit whose target is this number (NaN is one) has no loss, no gradient, no
            curvature, and targets drawn there are this number.

    Raises:
        CurvlabError: a weight that is negative or not finite; an `ignore_value` that is no number.
    """

    # a subclass whose constructor is its own has these
    _weight: Tensor | None = None
    _pos_weight: Tensor | None = None
    ignore_value: float | None = None

    def __init__(
        self, weight: Any = None, pos_weight: Any = None, ignore_value: float | None = None
    ) -> None:
        if weight is not None:
            self._weight = as_numbers("weight", weight)
        if pos_weight is not None:
            self._pos_weight = as_numbers("pos_weight", pos_weight)
        if ignore_value is not None:
            if isinstance(ignore_value, bool) or not isinstance(ignore_value, int | float):
                raise CurvlabError(
                    f"ignore_value must be a number, not {shown(ignore_value)}: of several take one"
                )
            self.ignore_value = float(ignore_value)

    @property
    def unlike(self) -> str:
        """Reason why labels drawn do not follow the loss, so that Fisher and GGN are two; or ""."""
        w, p = self._weight, self._pos_weight
        if (w is None or bool(((w == 0) | (w == 1)).all())) and (p is None or bool((p == 1).all())):
            return ""
        return "a weighted Bernoulli loss is no −log of a law that labels are drawn from"

    def check(self, z: Float[Tensor, "N *C"], y: Tensor) -> None:
        """Raise CurvlabError unless y is floating, finite, shaped as z and within [0, 1].

        What is ignored may be anything; the weights must fit.
        """
        masked = self._masked(y) if y.is_floating_point() else None
        check_targets(z, y, "Bernoulli", masked)
        y = y if masked is None else y.masked_fill(masked, 0.0)
        if bool((y < 0).any()) or bool((y > 1).any()):
            raise CurvlabError("Bernoulli targets must lie in [0, 1]: rescale the data")
        self._factors(z)

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        """Return the binary cross-entropy of each example, in nats, summed over its units."""
        weight, positive = self._factors(z)
        masked = self._masked(y)
        y = y if masked is None else y.masked_fill(masked, 0.0)
        losses = F.binary_cross_entropy_with_logits(
            z, y, weight, reduction="none", pos_weight=positive
        )
        losses = losses if masked is None else losses.masked_fill(masked, 0.0)
        return losses.reshape(len(z), -1).sum(1)

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Tensor | None = None
    ) -> Float[Tensor, "N *C"]:
        """Draw targets 0 and 1, each 1 with probability sigmoid(z), ignored where y is."""
        drawn = torch.bernoulli(z.sigmoid(), generator=generator)
        masked = None if y is None else self._masked(y)
        if masked is None:
            return drawn
        assert self.ignore_value is not None
        return drawn.masked_fill(masked, self.ignore_value)

    def root(self, z: Float[Tensor, "N *C"], y: Tensor | None = None) -> Float[Tensor, "V N *C"]:
        """Return C columns √(w_c (p_c y_c + 1 − y_c) σ_c (1 − σ_c)) e_c, σ = sigmoid(z).

        They are zero where y is ignored; without weights and a mask y plays no part.

        Raises:
            CurvlabError: they would take more than 80 % of the memory; `pos_weight` without y.
        """
        guard_root(z)
        s = z.sigmoid()  # ∂²ℓ/∂z² = diag(σ(1 − σ)); the thesis's 1.2.2 misprints it as diag(σ)
        curved = s * (1 - s)
        weight, positive = self._factors(z)
        masked = None if y is None else self._masked(y)
        if weight is not None:
            curved = curved * weight
        if positive is not None:
            if y is None:
                raise CurvlabError("with pos_weight the root depends on the targets: root(z, y)")
            y = y if masked is None else y.masked_fill(masked, 0.0)
            curved = curved * (positive * y + 1 - y)
        if masked is not None:
            curved = curved.masked_fill(masked, 0.0)
        return units(z) * curved.sqrt()

    def _factors(self, z: Float[Tensor, "N *C"]) -> tuple[Tensor | None, Tensor | None]:
        """Return (weight, pos_weight), to stand beside the outputs of one example."""
        w, p = self._weight, self._pos_weight
        return (
            None if w is None else over_outputs(w, z, "weight"),
            None if p is None else over_outputs(p, z, "pos_weight"),
        )

    def _masked(self, y: Shaped[Tensor, "N *C"]) -> Bool[Tensor, "N *C"] | None:
        """Return where targets are ignored; None where none can be."""
        if self.ignore_value is None:
            return None
        return y.isnan() if math.isnan(self.ignore_value) else y == self.ignore_value


class Gaussian:
    """Half squared error, summed over units: ℓ = ½ Σ_c (z_c − y_c)² / σ_c².

    Targets are shaped as z. It is −log of a normal density up to the constant
    Σ_c log(σ_c √(2π)), which is left out.

    Args:
        variance: σ² > 0, one number or as many as broadcast to the outputs of one example [*C].

    Raises:
        CurvlabError: a variance that is not finite and positive.
    """

    _variance: Tensor | None = None  # None is 1
    unlike = ""  # labels drawn follow the loss

    def __init__(self, variance: Any = 1.0) -> None:
        found = as_numbers("variance", variance, positive=True)
        if not bool((found == 1).all()) or found.ndim:
            self._variance = found

    def check(self, z: Float[Tensor, "N *C"], y: Tensor) -> None:
        """Raise CurvlabError unless y is floating, finite, shaped as z, and the variance fits."""
        check_targets(z, y, "Gaussian")
        self._spread(z)

    def loss(self, z: Float[Tensor, "N *C"], y: Float[Tensor, "N *C"]) -> Float[Tensor, " N"]:
        """Return half the squared error over the variance of each example, summed over units."""
        variance = self._spread(z)
        squares = (z - y).square()
        squares = squares if variance is None else squares / variance
        return 0.5 * squares.reshape(len(z), -1).sum(1)

    def sample(
        self, z: Float[Tensor, "N *C"], generator: torch.Generator, y: Tensor | None = None
    ) -> Float[Tensor, "N *C"]:
        """Draw targets of mean z and the variance; y plays no part."""
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        variance = self._spread(z)
        return z + (noise if variance is None else noise * variance.sqrt())

    def root(self, z: Float[Tensor, "N *C"], y: Tensor | None = None) -> Float[Tensor, "V N *C"]:
        """Return C columns e_c / σ_c: ∂²ℓ/∂z² = diag(1/σ²); y plays no part.

        Raises:
            CurvlabError: they would take more than 80 % of the memory.
        """
        guard_root(z)
        variance = self._spread(z)
        return units(z) if variance is None else units(z) / variance.sqrt()

    def _spread(self, z: Float[Tensor, "N *C"]) -> Tensor | None:
        return None if self._variance is None else over_outputs(self._variance, z, "variance")
