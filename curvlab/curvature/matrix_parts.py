"""Methods of matrices: the weight of a layer by a method's own part, the rest by Adam's diagonal.

So the papers of Muon, SOAP, ASGO and KL-Shampoo have it: what is no matrix (biases, norms and other
vectors) goes by Adam, with its diagonal, at the same learning rate.

Legend: O outputs, I inputs without the bias column (filters flattened), D entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from curvlab.curvature.base import BlockDefaults, Secant, blend
from curvlab.curvature.mixing import Mix
from curvlab.layers import Block
from curvlab.linalg.direct_sum import ColumnSum
from curvlab.linalg.operators import Diagonal, Operator
from curvlab.statistics import LayerStatistics, Reads

_log = logging.getLogger(__name__)

_SHORT = 1 << 14  # numbers of a vector on which a call costs more than the arithmetic


class MatrixPart(Protocol):
    """A method's statistics of one weight [O, I], and its operator on the row-major flattening."""

    names: ClassVar[tuple[str, ...]]
    """Names of the tensors and numbers that a checkpoint must hold; each may be None."""
    inverse: Operator

    def update(self, gradient: Float[Tensor, "O I"], weight: float) -> None:
        """Fold the mean gradient of a minibatch in."""

    def refresh(self, damping: float) -> None:
        """Do what T₂ is for, and make `inverse`."""

    def settle(self, damping: float | None) -> None:
        """As of `BlockDefaults.settle`."""

    def heed(self, momentum: Float[Tensor, "O I"], damping: float | None) -> None:
        """As of `BlockDefaults.heed`."""

    def matrix(self, damping: float) -> Operator | None:
        """Return B as of `CurvatureBlock.matrix`, or None."""


class Mixing(Protocol):
    """A part that makes use of how the momentum heeded next is made."""

    def heed_mix(self, mix: Mix) -> None:
        """Take it that the gradient of the last `update` enters that momentum so."""


class Straight(Protocol):
    """A part that makes the direction of the momentum heeded last without its operator."""

    @property
    def direction(self) -> Float[Tensor, "O I"]:
        """The direction, which nobody writes into."""

    @staticmethod
    def together(parts: Sequence[Any]) -> None:
        """Do for several together what is cheaper so; `direction` is asked for after it."""


def is_vector(block: Block) -> bool:
    """Return whether a block has no matrix: norms and other vectors, one number an output."""
    if block.layer is None:
        return len(block.shape) < 2
    return block.shape[1] - block.biased == 1 and block.groups == block.shape[0]


def is_embedding(block: Block) -> bool:
    """Return whether a block is the table of an embedding."""
    return isinstance(block.module, nn.Embedding | nn.EmbeddingBag)


class WithDiagonal(BlockDefaults):
    """A weight by a part of its own, and beside it what is no matrix by diag(1 / (√v + ε)).

    Args:
        block: whose weight and bias, or whose one parameter.
        part: of the weight; None: all goes by the diagonal, which is said at the level "info" of
            Python's logging.
        beside: the method's damping → ε of the diagonal.
        estimating: whether the method estimates a matrix.
        straight: the part itself, of a method that makes directions without its operator.
        mixing: the part itself, of one that makes use of how a momentum is made.
    """

    reads: Reads = "gradient"
    memory: ClassVar[tuple[str, ...]] = ("rest", "part_state")
    secant: Secant | None = None
    squares_objective = True

    def __init__(
        self,
        block: Block,
        part: MatrixPart | None,
        beside: Callable[[float], float] = lambda damping: damping,
        estimating: bool = True,
        straight: Straight | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        self.block, self.part, self._beside = block, part, beside
        self._estimating, self._straight, self._mixing = estimating, straight, mixing
        self._folded: Tensor | None = None  # the gradient of the last update
        self._heeded: Tensor | None = None  # the momentum, where there is a straight way
        self._along: Tensor | None = None  # its direction, made together with others'
        self.rest: Tensor | None = None  # v of what is no matrix
        self._of_rest: Operator | None = None  # diag(1 / (√v + ε)), unless it is still to be made
        self._to_invert: tuple[Tensor, float] | None = None  # of these v and λ
        if part is None:
            _log.info("%s goes by Adam's diagonal", block)

    @property
    def part_state(self) -> dict[str, Tensor | int | None]:
        """Statistics of the weight, for a checkpoint; {} where it has none."""
        return {} if self.part is None else {n: getattr(self.part, n) for n in self.part.names}

    @part_state.setter
    def part_state(self, state: Mapping[str, Tensor | int | None]) -> None:
        """Take a checkpoint's."""
        for name, value in state.items():
            setattr(self.part, name, value)

    def update(self, statistics: LayerStatistics, weight: float) -> None:
        """Fold the minibatch's mean gradient in: the weight's into its part, other squares in v."""
        self._folded = statistics.gradient
        matrix, rest = self._apart(self._folded)
        if self.part is not None and matrix is not None:
            self.part.update(matrix, weight)
        if rest is not None:
            self.rest = blend(self.rest, rest.square(), weight)

    def refresh(self, damping: float) -> None:
        """Refresh the weight's part and the diagonal."""
        if self.part is not None:
            self.part.refresh(damping)
        self._invert_rest(damping)

    def settle(self, damping: float | None) -> None:
        """Let the weight's part finish; what moves at every step enters `inverse`."""
        if self.part is not None:
            self.part.settle(damping)
        if damping is not None:
            self._invert_rest(damping)

    def heed_mix(self, gradient: Tensor, mix: Mix) -> None:
        """Tell the weight's part how that momentum is made, of the gradient that it has seen."""
        if self._mixing is not None and gradient is self._folded:
            self._mixing.heed_mix(mix)

    def heed(self, momentum: Tensor, damping: float | None) -> None:
        """Tell the weight's part of the momentum that is preconditioned next."""
        if self.part is not None:
            matrix, _ = self._apart(momentum)
            assert matrix is not None
            self.part.heed(matrix, damping)
        short = self.part is None and momentum.numel() <= _SHORT
        self._heeded = momentum if short or self._straight is not None else None
        self._folded = self._along = None

    def direction_of(self, momentum: Tensor) -> Tensor | None:
        """Return the direction of the momentum heeded last, the weight's by its straight way."""
        if momentum is not self._heeded or self._straight is None:
            return self._along if momentum is self._heeded else None
        weight = self._straight.direction
        if not self.block.biased:
            return weight if weight.shape == momentum.shape else weight.reshape(momentum.shape)
        diagonal = self._inverse_of_rest()
        assert diagonal is not None
        return torch.cat([weight, (diagonal @ momentum[:, -1])[:, None]], 1)

    @staticmethod
    def together(blocks: Sequence[Any]) -> None:
        """Let straight parts of one class, and short vectors, do their work together."""
        _follow_diagonals([b for b in blocks if b.part is None and b._heeded is not None])
        by_class: dict[type[Straight], list[Straight]] = {}
        for block in blocks:
            if block._straight is not None:
                by_class.setdefault(type(block._straight), []).append(block._straight)
        for kind, parts in by_class.items():
            kind.together(parts)

    @property
    def inverse(self) -> Operator:
        """The part's operator beside the diagonal; AttributeError before the first refresh."""
        if self.part is not None:
            return self._beside_each_other(self.part.inverse, self._inverse_of_rest())
        diagonal = self._inverse_of_rest()
        if diagonal is None:
            raise AttributeError("inverse")
        return diagonal

    @inverse.setter
    def inverse(self, value: Operator) -> None:
        """Take a checkpoint's: the weight's operator is the part's again."""
        self._to_invert = self._along = None
        if self.part is None:
            self._of_rest = value
        elif self.block.biased:
            assert isinstance(value, ColumnSum)
            self.part.inverse, self._of_rest = value.parts
        else:
            self.part.inverse = value

    @inverse.deleter
    def inverse(self) -> None:
        """Forget it, as before the first data."""
        self._of_rest = self._to_invert = self._along = None
        if self.part is not None:
            del self.part.inverse

    def matrix(self, damping: float = 0.0) -> Operator | None:
        """Return the part's matrix beside diag((√v + ε)²), of Fisher / N; None where none is."""
        if not self._estimating:
            return None
        of_rest = None
        if self.rest is not None:
            of_rest = Diagonal((self.rest.sqrt() + self._beside(damping)).square())
        if self.part is None:
            return of_rest
        found = self.part.matrix(damping)
        return None if found is None else self._beside_each_other(found, of_rest)

    def estimates(self) -> bool:
        """Return whether the method estimates a matrix."""
        return self._estimating

    def _apart(self, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (weight [O, I], the rest flattened) of a block's tensor; None: there is none."""
        if self.part is None:
            return None, value.flatten()
        if not self.block.biased:
            return value if value.ndim == 2 else value.flatten(1), None
        return value[:, :-1], value[:, -1]

    def _invert_rest(self, damping: float) -> None:
        self._along = None
        if self.rest is not None:
            self._to_invert = self.rest, damping

    def _inverse_of_rest(self) -> Operator | None:
        if self._to_invert is not None:
            v, damping = self._to_invert
            self._of_rest = Diagonal(v.sqrt().add_(self._beside(damping)).reciprocal_())
            self._to_invert = None
        return self._of_rest

    def _beside_each_other(self, weight: Operator, rest: Operator | None) -> Operator:
        if rest is None:
            return weight
        outputs, inputs = self.block.shape
        return ColumnSum(outputs, (inputs - 1, 1), (weight, rest))


def _follow_diagonals(blocks: Sequence[WithDiagonal]) -> None:
    """Make the directions of blocks without a part, each to the bit as by its own diagonal."""
    to_invert: dict[float, list[WithDiagonal]] = {}
    for block in blocks:
        if block._to_invert is not None:
            to_invert.setdefault(block._beside(block._to_invert[1]), []).append(block)
    for epsilon, some in to_invert.items():
        roots = torch._foreach_sqrt([b._to_invert[0] for b in some if b._to_invert is not None])
        torch._foreach_add_(roots, epsilon)
        torch._foreach_reciprocal_(roots)
        for block, root in zip(some, roots, strict=True):
            block._of_rest, block._to_invert = Diagonal(root), None
    known = [(b, b._of_rest.values, b._heeded) for b in blocks if isinstance(b._of_rest, Diagonal)]
    momenta = [m for _, _, m in known if m is not None]
    if known:
        made = torch._foreach_mul([m.flatten() for m in momenta], [d for _, d, _ in known])
        for (block, _, _), m, direction in zip(known, momenta, made, strict=True):
            block._along = direction.view(m.shape)


def weight_shape(block: Block) -> tuple[int, int]:
    """Return (O, I) of a block's weight as a matrix: without the bias column, filters flattened."""
    outputs = block.shape[0]
    return outputs, block.numel // outputs - block.biased


def ones(size: int, like: Tensor) -> Diagonal:
    """Return I of this order, of the dtype and device of `like`, never formed."""
    return Diagonal(torch.ones(size, dtype=like.dtype, device=like.device))
