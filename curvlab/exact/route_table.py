"""ROUTES: the ways to a diagonal block, one line each.

Every way folds minibatches into a sum as they come.

Legend: N examples, T places, V vectors sent back, P pairs of outputs, O outputs, I inputs, D = O I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.exact.batches import PASSES, Kind, by_hessians
from curvlab.exact.second_order import preactivation_gauss_newton, preactivation_hessians
from curvlab.exact.torch_func import Function
from curvlab.forms import Form
from curvlab.layers import Block, Layout
from curvlab.linalg.kronecker import accumulate_places_
from curvlab.linalg.packed import (
    accumulate_second_moment_,
    fold,
    mirror_,
    output_pairs,
    pack_pairs,
    unpack_full,
)
from curvlab.statistics import LayerStatistics


class Minibatch:
    """Minibatch as the structured routes read it; every pass is run once, whoever asks."""

    def __init__(self, closure: Closure, kind: Kind, draws: int) -> None:
        self.closure, self.kind, self.draws = closure, kind, draws
        closure.check_kind(kind)

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Statistics of each block, {name: …}, with the vectors of a second moment sent back."""
        needs = PASSES[self.kind]
        return self.closure.observe({needs}, move_buffers=False, draws=self.draws).passes[needs]

    def hessians(
        self, names: Sequence[str]
    ) -> Iterator[tuple[LayerStatistics, Float[Tensor, "T O N T O"]]]:
        """Yield (inputs, pre-activation Hessians) of one block after the other.

        Hessians are of ℓ; for Π of ⟨∂ℓ/∂z, z⟩ with ∂ℓ/∂z held fixed; for the GGN JᵀHJ.
        """
        z, losses, capture = self.closure.look()
        with derivatives():
            total = losses.sum()
        if self.kind == "ggn":
            return preactivation_gauss_newton(capture, z, total, names)
        if self.kind == "pi":
            (slope,) = torch.autograd.grad(total, z, retain_graph=True)
            with derivatives():
                total = (z * slope.detach()).sum()
        return preactivation_hessians(capture, total, len(z), names)

    def function(self, layout: Layout) -> Function:
        """Return the model and its losses as a `Function` of `layout`.

        Raises CurvlabError, by a look at the minibatch, for targets that do not fit or a loss that
        is not finite.
        """
        # the checks of data, targets and loss
        self.closure.observe(frozenset(), move_buffers=False)
        return Function(self.closure, layout)


class Sum(Protocol):
    """Matrix of a block as it grows, minibatch by minibatch."""

    def dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix summed so far, [D, D]. Ask once: the sum may be given up for it."""


class _Packed:
    """Sum of a block with T = 1: pairs of outputs times pairs of inputs, one symmetric product."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.packed: Tensor | None = None
        self.active: Tensor | None = None

    def add(
        self, a: Float[Tensor, "N I"], pairs: Float[Tensor, "P N"], old: float, new: float
    ) -> None:
        self.packed, self.active = fold(self.packed, self.active, pairs, a, old, new)

    def dense(self) -> Tensor:
        assert self.packed is not None
        packed, self.packed = self.packed, None
        outputs, inputs = self.block.shape
        return unpack_full(packed, outputs, inputs, self.active)


class _Whole:
    """Sum of any block as the dense matrix, of which the lower triangle alone counts.

    It is mirrored when the sum is asked for.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.matrix = like.new_zeros(size, size)

    def dense(self) -> Tensor:
        return mirror_(self.matrix)


def _fold_pairs(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    def into(block: Block) -> _Packed:
        found = sums.setdefault(block.name, _Packed(block))
        assert isinstance(found, _Packed)
        return found

    form = look.closure.form
    twice = [b.name for b in blocks if by_hessians(look.kind, b, form)]
    for block in blocks:
        if block.name not in twice:
            s = look.statistics[block.name]
            into(block).add(s.a[:, 0], output_pairs(s.g[:, :, 0]), old, new)
    for s, hessians in look.hessians(twice) if twice else ():
        into(s.block).add(s.a[:, 0], pack_pairs(hessians[0, :, :, 0].permute(1, 0, 2)), old, new)


def _whole(sums: dict[str, Sum], name: str, size: int, like: Tensor) -> Float[Tensor, "D D"]:
    """Return the sum of a block as a dense matrix, to be added to.

    One that was packed until now is unpacked: a minibatch with several places has come.
    """
    found = sums.get(name)
    if not isinstance(found, _Whole):
        sums[name] = whole = _Whole(size, like)
        if found is not None:
            whole.matrix.copy_(found.dense())
        return whole.matrix
    return found.matrix


def _fold_places(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    for s, hessians in look.hessians([b.name for b in blocks]):
        matrix = _whole(sums, s.block.name, s.block.numel, s.a).mul_(old)
        accumulate_places_(matrix, hessians, s.a, new)


def _fold_rows(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    for block in blocks:
        s = look.statistics[block.name]
        matrix = _whole(sums, block.name, block.numel, s.like).mul_(old)
        for rows in s.some_rows(max(1, block.numel // 16)):
            accumulate_second_moment_(matrix, rows, new)


def _fold_general(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    for block in blocks:
        function = look.function(Layout((block,)))
        matrix = _whole(sums, block.name, block.numel, function.at).mul_(old)
        if look.kind in PASSES:
            for left, right in function.rows(look.kind, look.draws):
                matrix.addmm_(left.mT, right, alpha=new)
        else:
            for columns, value in function.columns(look.kind, look.draws):
                matrix[:, columns].add_(value, alpha=new)


@dataclass(frozen=True)
class Route:
    """One way to a diagonal block: what it does, which blocks it fits, and how it adds."""

    summary: str
    fits: Callable[[Block, Form, Kind], bool]
    fold: Callable[[Minibatch, Sequence[Block], dict[str, Sum], float, float], None]


def _one_place(block: Block, form: Form, kind: Kind) -> bool:
    names = form.plain if kind in PASSES else form.direct
    return block.name in names and block.groups == 1 and form.places.get(block.name) == 1


def _few_places(block: Block, form: Form, kind: Kind) -> bool:
    return kind not in PASSES and by_hessians(kind, block, form)


ROUTES: dict[str, Route] = {
    "pairs": Route(
        "T = 1: pairs of outputs times pairs of inputs, one packed symmetric product",
        _one_place,
        _fold_pairs,
    ),
    "places": Route(
        "T > 1, Hessian and Π: pre-activation Hessians between inputs, Theorem 3, where they are"
        " fewer than the parameters",
        _few_places,
        _fold_places,
    ),
    "rows": Route(
        "second moments: per-sample gradients of every vector, one symmetric product",
        lambda block, form, kind: block.name in form.shaped and kind in PASSES,
        _fold_rows,
    ),
    "func": Route(
        "torch.func over the block's parameters, plain autograd where that cannot: any model",
        lambda block, form, kind: True,
        _fold_general,
    ),
}
"""Routes in order of preference: a block goes by the first that fits. All agree."""


def route_of(block: Block, form: Form, kind: Kind, grown: Sum | None = None) -> str:
    """Return the first route that fits, and that can add to what has grown of other minibatches."""
    fitting = (name for name, route in ROUTES.items() if route.fits(block, form, kind))
    return next(
        name for name in fitting if name != "pairs" or grown is None or isinstance(grown, _Packed)
    )
