"""Matrices of one side of a weight: ASGO (one-sided Shampoo) and Muon, which is it without memory.

An et al. 2025; Jordan et al. 2024. Both act on the smaller side of a weight G [O, I] alone: M H_a
with H_a [I, I] where I < O, else H_g M with H_g [O, O].

Legend: O outputs, I inputs without the bias column (filters flattened), K the smaller of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.curvature.base import blend
from curvlab.curvature.matrix_parts import (
    WithDiagonal,
    is_embedding,
    is_vector,
    ones,
    weight_shape,
)
from curvlab.errors import lookup
from curvlab.finite import waits
from curvlab.layers import Block
from curvlab.linalg.cholesky import shifted
from curvlab.linalg.operator_states import packable
from curvlab.linalg.operators import Kronecker, Operator, Symmetric
from curvlab.linalg.padded_products import second_moment
from curvlab.linalg.polar import POLAR, newton_schulz_bfloat16, newton_schulz_factor
from curvlab.linalg.roots import inverse_root_eigh

RMS = 0.2
"""Root mean square of an entry of AdamW's direction, which scaled directions are given."""

_TOGETHER = 1 << 19  # numbers of the weights of one shape whose polar factors are made together

SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda o, i: RMS * math.sqrt(max(o, i)),
    "original": lambda o, i: math.sqrt(max(1, o / i)),
    "none": lambda o, i: 1.0,
}
"""Scales of Muon's direction by (O, I), of the names that `torch.optim.Muon` has for them."""


def asgo(block: Block, *, normalized: bool = True) -> WithDiagonal:
    """Make H = c (V + εI)^{−1/2} on the smaller side of every weight, V = E[GᵀG] or E[GGᵀ].

    An et al. 2025. Biases, norms and other vectors go by diag(1 / (√v + √ε)). Of a weight of one
    output it is full-matrix AdaGrad (with an average for the sum), without averaging Muon's polar
    factor.

    Args:
        block: whose parameters.
        normalized: whether c makes the root mean square of the weight's direction 0.2, as the
            authors' code; c is then of the momentum that is preconditioned (`heed`). Else, and
            before a momentum, c = 1.
    """
    return WithDiagonal(
        block, None if is_vector(block) else Asgo(weight_shape(block), normalized), math.sqrt
    )


def muon(
    block: Block,
    *,
    polar: str = "newton-schulz",
    scale: str = "match_rms_adamw",
    apart: str = "head",
) -> WithDiagonal:
    """Make the direction O = s P(U), P(U) near the polar factor of the momentum U of every weight.

    Jordan et al. 2024. Newton-Schulz is an odd polynomial, O = p(UUᵀ) U: its iterates stay on the
    smaller side, and `inverse` is the operator s p(UUᵀ) / ‖U‖ of the momentum of the last direction
    (`heed`); before a momentum, of the last minibatch's gradient. There is no damping.

    Hidden weights alone: biases, norms and other vectors, embeddings and the head go by Adam's
    diagonal, at the same learning rate, which "match_rms_adamw" is for; their momentum is
    Nesterov's too. A head is known by its name.

    Args:
        block: whose parameters.
        polar: "newton-schulz", the five steps as published, in the model's precision; "bfloat16",
            these in bfloat16 on the momentum itself, as published and to the bit as in
            `torch.optim.Muon`: faster where a processor multiplies bfloat16, slower where it does
            not; "svd", the polar factor itself.
        scale: of the direction, as of `torch.optim.Muon` (`SCALES`).
        apart: words, with commas between, of parameters' names that go by Adam: "" is none.
    """
    way, factor = lookup(POLAR, polar, "polar"), lookup(SCALES, scale, "scale")
    words = [word.strip() for word in apart.split(",") if word.strip()]
    named = any(word in name for word in words for name in block.params)
    hidden = not (named or is_vector(block) or is_embedding(block))
    if not hidden:
        return WithDiagonal(block, None, estimating=False)
    part = Muon(way, factor, polar == "bfloat16")
    straight = part if polar == "bfloat16" else None
    return WithDiagonal(block, part, estimating=False, straight=straight)


def on_smaller_side(shape: tuple[int, int], factor: Float[Tensor, "K K"]) -> Kronecker:
    """Return the operator on the flattening of [O, I] that `factor` is on its smaller side."""
    outputs, inputs = shape
    if outputs <= inputs:
        return Kronecker((factor, ones(inputs, factor)))
    return Kronecker((ones(outputs, factor), factor))


def smaller_gram(G: Float[Tensor, "O I"]) -> Float[Tensor, "K K"]:
    """Return G Gᵀ or Gᵀ G, whichever is smaller; G Gᵀ of a square one."""
    return second_moment(G.mT if G.shape[0] <= G.shape[1] else G)


class Asgo:
    """Moving average V of the smaller Gram matrix of the mean gradient; see `asgo`."""

    names: ClassVar[tuple[str, ...]] = ("V",)
    inverse: Operator

    def __init__(self, shape: tuple[int, int], normalized: bool) -> None:
        self.normalized, self._shape = normalized, shape
        self.V: Tensor | None = None

    def update(self, gradient: Float[Tensor, "O I"], weight: float) -> None:
        """Fold the Gram matrix of the gradient in."""
        self.V = blend(self.V, smaller_gram(gradient), weight)

    def refresh(self, damping: float) -> None:
        """Take the inverse root, c = 1."""
        assert self.V is not None
        root = inverse_root_eigh(shifted(self.V, damping), 2, damping)
        self.inverse = on_smaller_side(self._shape, root)

    def settle(self, damping: float | None) -> None:
        """Do nothing: V alone moves between refreshes."""

    def heed(self, momentum: Float[Tensor, "O I"], damping: float | None) -> None:
        """Set c to 0.2 √(OI) / ‖(V + εI)^{−1/2} M‖ of this momentum M, where it is normalized."""
        if not self.normalized:
            return
        assert isinstance(self.inverse, Kronecker)
        length = (self.inverse @ momentum.flatten()).norm()
        c = RMS * math.sqrt(momentum.numel()) / torch.where(length > 0, length, 1.0)
        root = next(f for f in self.inverse.factors if isinstance(f, Tensor))
        self.inverse = on_smaller_side(self._shape, root * c)

    def matrix(self, damping: float) -> Operator:
        """Return V + εI on its side, I on the other: E[ḡ ḡᵀ] is at most that, of any mean ḡ."""
        assert self.V is not None
        return on_smaller_side(self._shape, shifted(self.V, damping))


@packable
@dataclass(frozen=True)
class RememberedPolar(Symmetric):
    """Operator s p(UUᵀ) / ‖U‖ on the smaller side, of which one product is known: that with U.

    Args:
        U: the momentum.
        direction: the product with it, which has another rounding.
        scale: s.
    """

    U: Float[Tensor, "O I"]
    direction: Float[Tensor, "O I"]
    scale: float

    @cached_property
    def general(self) -> Operator:
        """The operator itself, made where it is asked for."""
        return on_smaller_side(
            (self.U.shape[0], self.U.shape[1]), newton_schulz_factor(self.U) * self.scale
        )

    def __len__(self) -> int:
        return self.U.numel()

    def __matmul__(self, v: Float[Tensor, "D *K"]) -> Float[Tensor, "D *K"]:
        if v.ndim != 1:
            return self.general @ v
        if waits(v):  # nothing may wait for what the comparison finds
            same = (v == self.U.flatten()).all()
            return torch.where(same, self.direction.flatten(), self.general @ v)
        if torch.equal(v, self.U.flatten()):
            return self.direction.flatten()
        return self.general @ v

    def inv(self) -> Operator:
        """Return the inverse of `general`."""
        return self.general.inv()

    def dense(self) -> Float[Tensor, "D D"]:
        """Return `general` as a matrix, [O I, O I]."""
        return self.general.dense()

    def eigvalsh(self) -> Float[Tensor, " D"]:
        """Return the eigenvalues of `general`, ascending."""
        return self.general.eigvalsh()

    def diag(self) -> Float[Tensor, " D"]:
        """Return the diagonal of `general`."""
        return self.general.diag()

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace of `general`."""
        return self.general.trace()


class Muon:
    """The momentum, or gradient, whose polar factor is the direction; see `muon`."""

    names: ClassVar[tuple[str, ...]] = ("U",)

    def __init__(
        self,
        polar: Callable[[Tensor], Tensor],
        scale: Callable[[int, int], float],
        bfloat16: bool = False,
    ) -> None:
        self._polar, self._scale, self._bfloat16 = polar, scale, bfloat16
        self.U: Tensor | None = None
        self._made: Operator | None = None  # of U, when it was asked for
        self._rounded: Tensor | None = None  # likewise s p(U), of bfloat16

    def update(self, gradient: Float[Tensor, "O I"], weight: float) -> None:
        """Take the gradient in the place of a momentum, until one is heeded."""
        self.U, self._made, self._rounded = gradient, None, None

    def refresh(self, damping: float) -> None:
        """Do nothing: there are no statistics to invert."""

    def settle(self, damping: float | None) -> None:
        """Do nothing."""

    def heed(self, momentum: Float[Tensor, "O I"], damping: float | None) -> None:
        """Take the momentum whose polar factor is to be the direction."""
        self.U, self._made, self._rounded = momentum, None, None

    @property
    def direction(self) -> Float[Tensor, "O I"]:
        """Product s p(U), of bfloat16, in the precision of U."""
        if self._rounded is None and isinstance(self._made, RememberedPolar):  # another rank's
            return self._made.direction
        assert self.U is not None
        if self._rounded is None:
            self.together([self])
        assert self._rounded is not None
        return self._rounded

    @staticmethod
    def together(parts: Sequence[Muon]) -> None:
        """Iterate weights of one shape, or of that turned, together: as many as fit a cache."""
        alike: dict[tuple[Callable[[int, int], float], tuple[int, ...]], list[Muon]] = {}
        for part in parts:
            if part.U is not None:
                alike.setdefault((part._scale, tuple(sorted(part.U.shape))), []).append(part)
        for (scale, shape), all_of in alike.items():
            some = max(1, _TOGETHER // math.prod(shape))
            for group in (all_of[i : i + some] for i in range(0, len(all_of), some)):
                momenta = [part.U for part in group if part.U is not None]
                found = newton_schulz_bfloat16(momenta, scale=scale)
                for part, rounded in zip(group, found, strict=True):
                    part._rounded = rounded

    @property
    def inverse(self) -> Operator:
        """Return s p(UUᵀ) / ‖U‖ on the smaller side, made where it is asked for."""
        if self._made is None:
            if self.U is None:
                raise AttributeError("inverse")
            outputs, inputs = self.U.shape
            scale = self._scale(outputs, inputs)
            if self._bfloat16:
                self._made = RememberedPolar(self.U, self.direction, scale)
            else:
                self._made = on_smaller_side((outputs, inputs), self._polar(self.U) * scale)
        return self._made

    @inverse.setter
    def inverse(self, value: Operator) -> None:
        """Take a checkpoint's."""
        self._made = value

    @inverse.deleter
    def inverse(self) -> None:
        """Forget it, as before the first data."""
        self.U = self._made = self._rounded = None

    def matrix(self, damping: float) -> None:
        """Return None: no matrix is estimated."""
