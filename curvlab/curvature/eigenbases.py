"""Methods in the eigenbases of a weight's contracted gradients: SOAP and KL-Shampoo.

Vyas et al. 2024; Lin et al. 2025. Bases follow their matrices by one power step and a QR a refresh.

Legend: O outputs, I inputs without the bias column (filters flattened); a the side of the outputs,
b that of the inputs, as KL-Shampoo has them; D order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.curvature.base import blend
from curvlab.curvature.matrix_parts import WithDiagonal, is_vector, ones, weight_shape
from curvlab.curvature.mixing import Mix
from curvlab.errors import real, whole
from curvlab.layers import Block
from curvlab.linalg.eigenbasis import Rotated
from curvlab.linalg.kronecker import kronecker_product
from curvlab.linalg.matrix_normal import flip_flop_step
from curvlab.linalg.operators import Diagonal, Operator
from curvlab.linalg.padded_products import second_moment
from curvlab.linalg.spectral import eigh


def soap(block: Block, *, largest: int = 10_000) -> WithDiagonal:
    """Make H = Q diag(1 / (√V + ε)) Qᵀ of every weight: Adam in Shampoo's eigenbasis.

    Vyas et al. 2024. Biases, norms and other vectors go by Adam itself.

    Args:
        block: whose parameters.
        largest: a side of more entries has the basis I, and no matrix.
    """
    whole("largest", largest, least=0)
    part = None if is_vector(block) else Soap(weight_shape(block), largest)
    return WithDiagonal(block, part, straight=part, mixing=part)


def kl_shampoo(block: Block, *, start: float = 0.1, clamp: bool = True) -> WithDiagonal:
    """Make H = (S_a ⊗ S_b)^{−1/2} of every weight, S_a ⊗ S_b fitted by maximum likelihood.

    Lin et al. 2025, in the practical form of the authors' code. Biases, norms and other vectors,
    which it does not take, go by Adam's diagonal without a bias correction.

    Args:
        block: whose parameters.
        start: λ₀, all eigenvalues of S_a and S_b before the first minibatch after the first, which
            makes the bases alone.
        clamp: whether 1/√λ is at most max(10, min(d, 4000)) on a side of d entries.
    """
    real("start", start, "above 0", lambda v: v > 0)
    part = None if is_vector(block) else KlShampoo(weight_shape(block), start, clamp)
    return WithDiagonal(block, part)


def first_basis(S: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Return eigenvectors of S by descending eigenvalue."""
    return eigh(S)[1].flip(1)


def _sorted_step(
    S: Float[Tensor, "D D"], Q: Float[Tensor, "D D"]
) -> tuple[Float[Tensor, "D D"], Int[Tensor, " D"]]:
    """Return the power step of columns sorted by diag(QᵀSQ), descending, and their order.

    The product with S that sorts them is the power step's own.
    """
    product = S @ Q
    order = (Q * product).sum(0).argsort(descending=True)
    return torch.linalg.qr(product[:, order]).Q, order


def power_step(S: Float[Tensor, "D D"], Q: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Return the Q factor of S Q: one step of orthogonal iteration, signs as LAPACK has them."""
    found: Tensor = torch.linalg.qr(S @ Q).Q
    return found


class Soap:
    """Moving averages L of GGᵀ, R of GᵀG, their bases, and V of (Q_LᵀGQ_R)²; see `soap`.

    The direction of a minibatch is of the bases before it and of the V that it has entered; L and
    R, and at a refresh the bases, follow after. The first minibatch makes the bases and a V of its
    own, which the next one replaces: V counts from there, as in the authors' code, where the first
    call makes no step. At a refresh columns are sorted by diag(QᵀLQ), and V with them.

    Between refreshes the momentum in the bases follows from that of the minibatch before and the
    gradient in them, which V takes anyhow: two products of six less, to rounding the same.
    """

    names: ClassVar[tuple[str, ...]] = (
        *("L", "R", "Q_L", "Q_R", "squares", "last_weight"),
        *("rotated", "rotated_at"),
    )
    inverse: Operator

    def __init__(self, shape: tuple[int, int], largest: int) -> None:
        self._sides = tuple(size <= largest for size in shape)  # which have a matrix
        self.L: Tensor | None = None
        self.R: Tensor | None = None
        self.Q_L: Tensor | None = None
        self.Q_R: Tensor | None = None
        self.squares: Tensor | None = None  # V, [O, I]
        self.last_weight: Tensor | None = None  # of the last minibatch: V's is one behind
        self._after: tuple[Tensor, float] | None = None  # what L and R follow with
        # whether the bases are to follow; whether they have, since a momentum was heeded
        self._renew = self._turned = False
        self.rotated: Tensor | None = None  # m of `Mix`, in the bases as they stand
        self.rotated_at: int | None = None  # its number
        self._gradient: Tensor | None = None  # of the last update, in the bases before it
        self._mix: Mix | None = None  # told of the momentum that is heeded next
        self._momentum: Tensor | None = None  # heeded last, in the bases of `inverse`

    def update(self, gradient: Float[Tensor, "O I"], weight: float) -> None:
        """Fold the minibatch's squares in the bases as they stand into V."""
        if self.squares is None:
            self._contract(gradient, weight)
            self.Q_L = None if self.L is None else first_basis(self.L)
            self.Q_R = None if self.R is None else first_basis(self.R)
            self._gradient = self._rotated(gradient)
            self.squares = self._gradient.square()
        else:
            assert self.last_weight is not None
            self._gradient = self._rotated(gradient)
            self.squares = self.squares.lerp(self._gradient.square(), self.last_weight)
            self._after = (gradient, weight)
        self.last_weight = gradient.new_full((), weight)

    def refresh(self, damping: float) -> None:
        """Let the bases follow their matrices once this minibatch has entered them (`settle`)."""
        self._renew = self._after is not None
        if not self._renew:  # else `settle` does it
            self._invert(damping)
        elif self._turned:  # and no momentum has been heeded in the bases before
            self.rotated = None
        self._turned = self._turned or self._renew

    def settle(self, damping: float | None) -> None:
        """Make `inverse` of V; then let L and R, and the bases where they are due, follow."""
        if self._after is None:
            return
        if damping is not None:
            self._invert(damping)
        self._contract(*self._after)
        if self._renew:
            self._turn()
        self.settled()

    def settled(self) -> None:
        """Note that L, R and the bases are those after the minibatch."""
        self._after, self._renew = None, False

    def heed_mix(self, mix: Mix) -> None:
        """Take it that the gradient of the last `update` enters the momentum heeded next so."""
        self._mix = mix

    def heed(self, momentum: Float[Tensor, "O I"], damping: float | None) -> None:
        """Bring the momentum into the bases of `inverse`, which is of statistics alone."""
        mix, gradient = self._mix, self._gradient
        self._mix = self._gradient = None
        m = None if mix is None or gradient is None else self._mixed(mix, gradient)
        if m is None:
            m = self._operator.rotated(momentum.flatten()).view_as(momentum)
            m = m if mix is None else m * mix.divisor
        self._momentum = m if mix is None else m / mix.divisor
        stands, self._turned = not self._turned, False  # whether the next one is of these bases
        self.rotated, self.rotated_at = (m, mix.number) if mix and stands else (None, None)

    def _mixed(self, mix: Mix, gradient: Tensor) -> Tensor | None:
        """Return m in the bases by that of the minibatch before; None: it is not known."""
        if not mix.keep:
            return gradient * mix.take
        if self.rotated is None or self.rotated_at != mix.number - 1:
            return None
        return (gradient * mix.take).add_(self.rotated, alpha=mix.keep)

    @property
    def direction(self) -> Float[Tensor, "O I"]:
        """Product of `inverse` with the momentum heeded last."""
        assert self._momentum is not None
        inside = self._operator.inside @ self._momentum.flatten()
        return kronecker_product(self._operator.bases, inside).view_as(self._momentum)

    @staticmethod
    def together(parts: Sequence[Soap]) -> None:
        """Do nothing: each is as fast alone."""

    @property
    def _operator(self) -> Rotated:
        assert isinstance(self.inverse, Rotated)
        return self.inverse

    def matrix(self, damping: float) -> Operator:
        """Return Q diag((√V + ε)²) Qᵀ, which approximates Fisher / N."""
        return self._diagonal_in_basis(self._root(damping).square_())

    def _contract(self, gradient: Tensor, weight: float) -> None:
        if self._sides[0]:
            self.L = blend(self.L, second_moment(gradient.mT), weight)
        if self._sides[1]:
            self.R = blend(self.R, second_moment(gradient), weight)

    def _rotated(self, gradient: Tensor) -> Tensor:
        found = gradient if self.Q_L is None else self.Q_L.mT @ gradient
        return found if self.Q_R is None else found @ self.Q_R

    def _turn(self) -> None:
        assert self.squares is not None
        if self.L is not None and self.Q_L is not None:
            self.Q_L, order = _sorted_step(self.L, self.Q_L)
            self.squares = self.squares[order]
        if self.R is not None and self.Q_R is not None:
            self.Q_R, order = _sorted_step(self.R, self.Q_R)
            self.squares = self.squares[:, order]

    def _root(self, damping: float) -> Tensor:
        """Return √V + ε, a tensor of nobody else's."""
        assert self.squares is not None
        return self.squares.sqrt().add_(damping)

    def _invert(self, damping: float) -> None:
        self.inverse = self._diagonal_in_basis(self._root(damping).reciprocal_())

    def _diagonal_in_basis(self, values: Float[Tensor, "O I"]) -> Rotated:
        outputs, inputs = values.shape
        left = ones(outputs, values) if self.Q_L is None else self.Q_L
        right = ones(inputs, values) if self.Q_R is None else self.Q_R
        return Rotated((left, right), Diagonal(values.flatten()))


class KlShampoo:
    """Moving averages S_a of G S_b⁻¹ Gᵀ / I, S_b of Gᵀ S_a⁻¹ G / O; see `kl_shampoo`.

    Each with the other's old value. S⁻¹ = Q diag(1/λ) Qᵀ of the bases Q and of λ, the average of
    the same contraction's diagonal in Q; S itself gives the bases alone. The direction is of the
    statistics before the minibatch. ε is beside the root: 1 / (√λ_a √λ_bᵀ + ε).
    """

    names: ClassVar[tuple[str, ...]] = ("S_a", "S_b", "Q_a", "Q_b", "lam_a", "lam_b")
    inverse: Operator

    def __init__(self, shape: tuple[int, int], start: float, clamp: bool) -> None:
        self._start = start
        # the least λ on each side
        self._least = [max(10, min(d, 4000)) ** -2.0 if clamp else 0.0 for d in shape]
        self.S_a: Tensor | None = None
        self.S_b: Tensor | None = None
        self.Q_a: Tensor | None = None
        self.Q_b: Tensor | None = None
        self.lam_a: Tensor | None = None
        self.lam_b: Tensor | None = None
        self._fresh = False  # whether a minibatch has come since the bases were made

    def update(self, gradient: Float[Tensor, "O I"], weight: float) -> None:
        """Fold the minibatch in; the first one makes the bases, of averages from zero."""
        outputs, inputs = gradient.shape
        if self.S_a is None or self.S_b is None:
            self.S_a = second_moment(gradient.mT, weight / inputs)
            self.S_b = second_moment(gradient, weight / outputs)
            self.Q_a, self.Q_b = first_basis(self.S_a), first_basis(self.S_b)
            self.lam_a = gradient.new_full((outputs,), self._start)
            self.lam_b = gradient.new_full((inputs,), self._start)
            return
        assert self.Q_a is not None
        assert self.Q_b is not None
        assert self.lam_a is not None
        assert self.lam_b is not None
        basis_a, basis_b = (self.Q_a, self.lam_a), (self.Q_b, self.lam_b)
        S_a, S_b = flip_flop_step(gradient, basis_a, basis_b)
        rotated = (self.Q_a.mT @ gradient @ self.Q_b).square()
        on_a, on_b = (rotated / self.lam_b).mean(1), (rotated / self.lam_a[:, None]).mean(0)
        self.S_a, self.S_b = self.S_a.lerp(S_a, weight), self.S_b.lerp(S_b, weight)
        self.lam_a = self.lam_a.lerp(on_a, weight).clamp_min(self._least[0])
        self.lam_b = self.lam_b.lerp(on_b, weight).clamp_min(self._least[1])
        self._fresh = True

    def refresh(self, damping: float) -> None:
        """Let the bases follow their matrices by a power step, and make `inverse`."""
        if self._fresh:
            assert self.S_a is not None
            assert self.S_b is not None
            assert self.Q_a is not None
            assert self.Q_b is not None
            self.Q_a = power_step(self.S_a, self.Q_a)
            self.Q_b = power_step(self.S_b, self.Q_b)
            self._fresh = False
        self._invert(damping)

    def settle(self, damping: float | None) -> None:
        """Make `inverse` of λ, which moves at every update."""
        self._fresh = False
        if damping is not None and self.lam_a is not None:  # a minibatch may not reach the layer
            self._invert(damping)

    def heed(self, momentum: Float[Tensor, "O I"], damping: float | None) -> None:
        """Do nothing: the operator is of statistics alone."""

    def matrix(self, damping: float) -> Operator:
        """Return Q diag((√λ_a √λ_bᵀ + ε)²) Qᵀ, S_a ⊗ S_b at ε = 0: an estimate of Fisher / N."""
        return self._diagonal_in_basis(self._root(damping).square())

    def _root(self, damping: float) -> Tensor:
        assert self.lam_a is not None
        assert self.lam_b is not None
        return torch.outer(self.lam_a.sqrt(), self.lam_b.sqrt()) + damping

    def _invert(self, damping: float) -> None:
        self.inverse = self._diagonal_in_basis(self._root(damping).reciprocal())

    def _diagonal_in_basis(self, values: Float[Tensor, "O I"]) -> Rotated:
        assert self.Q_a is not None
        assert self.Q_b is not None
        return Rotated((self.Q_a, self.Q_b), Diagonal(values.flatten()))
