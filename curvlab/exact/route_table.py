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
from curvlab.exact.batches import PASS_OF_KIND, Kind, by_hessians
from curvlab.exact.second_order import preactivation_gauss_newton, preactivation_hessians
from curvlab.exact.sequences import exact_statistics, groups_that_fit, statistics_together
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
from curvlab.linalg.places import (
    accumulate_pairs_,
    reach_of,
    symmetrize_,
    work_of_pairs,
    work_of_rows,
)
from curvlab.statistics import LayerStatistics
from curvlab.system.memory import in_huge_pages


class Minibatch:
    """Minibatch as the structured routes read it; every pass is run once, whoever asks."""

    def __init__(
        self, closure: Closure, kind: Kind, draws: int, blocks: Sequence[Block] = ()
    ) -> None:
        self.closure, self.kind, self.draws, self.blocks = closure, kind, draws, blocks
        self._exact: dict[str, LayerStatistics] = {}
        closure.check_kind(kind)

    def each(self, blocks: Sequence[Block]) -> Iterator[LayerStatistics]:
        """Yield statistics of some blocks, in any order, for sums over all vectors and no less.

        Where places share a weight, the vectors of the exact pass are as few as they can be
        (`sequences`), and each is sent once for all blocks (`blocks`) that fit into memory.
        """
        form = self.closure.form
        if not self._shared:
            yield from (self.statistics[block.name] for block in blocks)
            return
        missing = [b for b in blocks if b.name not in self._exact]
        if missing:
            every = [b for b in self.blocks if b.name in form.shaped and b not in blocks]
            some, *more = groups_that_fit([*blocks, *every], form, len(self.closure.x))
            for group in [some] if not more else groups_that_fit(blocks, form, len(self.closure.x)):
                self._exact = exact_statistics(
                    self.closure, [b.name for b in group], PASS_OF_KIND[self.kind]
                )
                yield from (self._exact[b.name] for b in group if b in blocks)
            return
        yield from (self._exact[b.name] for b in blocks)

    def together(self, names: Sequence[str]) -> list[dict[str, LayerStatistics]]:
        """Return statistics of some blocks under the same vectors, for products between them.

        They are in parts, over which such products are summed (`statistics_together`).
        """
        if not self._shared:
            return [self.statistics]
        return statistics_together(self.closure, names, PASS_OF_KIND[self.kind])

    @property
    def _shared(self) -> bool:
        """Whether places share weights, and there are many vectors."""
        several = max(self.closure.form.places.values(), default=1) > 1
        return several and PASS_OF_KIND.get(self.kind) in ("exact", "token")

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Statistics of each block, {name: …}, with the vectors of a second moment sent back."""
        needs = PASS_OF_KIND[self.kind]
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

    def __init__(self, matrix: Float[Tensor, "D D"]) -> None:
        self.matrix = matrix

    def dense(self) -> Tensor:
        return mirror_(self.matrix)


class _Half:
    """Sum M of a block as pairs of places give it, the matrix being M + Mᵀ."""

    def __init__(self, matrix: Float[Tensor, "D D"]) -> None:
        self.matrix = matrix

    def dense(self) -> Tensor:
        return symmetrize_(self.matrix)


def _fold_pairs(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    def into(block: Block) -> _Packed:
        found = sums.setdefault(block.name, _Packed(block))
        assert isinstance(found, _Packed)
        return found

    form = look.closure.form
    twice = [b.name for b in blocks if by_hessians(look.kind, b, form)]
    for s in look.each([b for b in blocks if b.name not in twice]):
        into(s.block).add(s.a[:, 0], output_pairs(s.g[:, :, 0]), old, new)
    for s, hessians in look.hessians(twice) if twice else ():
        into(s.block).add(s.a[:, 0], pack_pairs(hessians[0, :, :, 0].permute(1, 0, 2)), old, new)


def whole_of(
    sums: dict[str, Sum], name: str, size: int, like: Tensor, old: float
) -> Float[Tensor, "D D"]:
    """Return old · the sum of a block as a dense matrix, whose lower triangle is to be added to.

    One that was packed until now is unpacked: a minibatch with several places has come.
    """
    found = sums.get(name)
    if not isinstance(found, _Whole):
        matrix = like.new_zeros(size, size) if found is None else found.dense()
        sums[name] = found = _Whole(matrix)
    return found.matrix.mul_(old) if old else found.matrix


def _fold_places(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    if look.kind in PASS_OF_KIND:
        for s in look.each(blocks):
            _add_pairs(s, sums, old, new)
        return
    for s, hessians in look.hessians([b.name for b in blocks]):
        matrix = whole_of(sums, s.block.name, s.block.numel, s.a, old)
        accumulate_places_(matrix, hessians, s.a, new)


def _add_pairs(s: LayerStatistics, sums: dict[str, Sum], old: float, new: float) -> None:
    """Add second moments by pairs of places."""
    name, size = s.block.name, s.block.numel
    found = sums.get(name)
    if not isinstance(found, _Half):
        matrix = (
            in_huge_pages(s.like.new_empty(size, size)) if found is None else found.dense() * 0.5
        )
        sums[name] = found = _Half(matrix)
    accumulate_pairs_(found.matrix, s.g, s.a, reach_of(s.g), old, new)


def _fold_rows(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    for s in look.each(blocks):
        _add_rows(s, sums, old, new)


def _add_rows(s: LayerStatistics, sums: dict[str, Sum], old: float, new: float) -> None:
    matrix = whole_of(sums, s.block.name, s.block.numel, s.like, old)
    for rows in s.some_rows(max(1, s.block.numel // 16)):
        accumulate_second_moment_(matrix, rows, new)


def _fold_shared(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    """Add second moments of weights that places share, each by the cheaper route."""
    for s in look.each(blocks):
        add_shared(s, sums, old, new)


def add_shared(s: LayerStatistics, sums: dict[str, Sum], old: float, new: float) -> None:
    """Add second moments of one block to its sum by the cheaper route: old · sum + new · they."""
    (_add_pairs if by_pairs(s) else _add_rows)(s, sums, old, new)


def by_pairs(s: LayerStatistics) -> bool:
    """Return whether pairs of places have fewer floating-point operations than rows.

    A product of `_PACE` more is as fast by rows.
    """
    if not s.used:
        return False
    (outputs, inputs), places = s.block.shape, s.places
    rows = work_of_rows(s.vectors, places, outputs, inputs) / _PACE
    if work_of_pairs([(0, 0)] * places, outputs, inputs) > rows:  # without the pairs themselves
        return False
    return work_of_pairs(reach_of(s.g), outputs, inputs) < rows


_PACE = 1.4  # of the large products of rows, over those of pairs of places


def _fold_general(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    for block in blocks:
        function = look.function(Layout((block,)))
        matrix = whole_of(sums, block.name, block.numel, function.at, old)
        if look.kind in PASS_OF_KIND:
            for left, right in function.rows(look.kind, look.draws):
                matrix.addmm_(left.mT, right, alpha=new)
        else:
            for columns, value in function.columns(look.kind, look.draws):
                matrix[:, columns].add_(value, alpha=new)


Fold = Callable[[Minibatch, Sequence[Block], dict[str, Sum], float, float], None]
"""Adds a minibatch to the sums of some blocks, which are scaled first: old · sum + new · it."""


@dataclass(frozen=True)
class Route:
    """One way to a diagonal block: what it does, which blocks it fits, and how it adds."""

    summary: str
    fits: Callable[[Block, Form, Kind], bool]
    fold: Fold


def _one_place(block: Block, form: Form, kind: Kind) -> bool:
    names = form.plain if kind in PASS_OF_KIND else form.direct
    return block.name in names and block.groups == 1 and form.places.get(block.name) == 1


def _several_places(block: Block, form: Form, kind: Kind) -> bool:
    if kind in PASS_OF_KIND:
        shared = form.places.get(block.name, 1) > 1
        return shared and block.name in form.plain and block.groups == 1
    return by_hessians(kind, block, form)


ROUTES: dict[str, Route] = {
    "pairs": Route(
        "T = 1: pairs of outputs times pairs of inputs, one packed symmetric product",
        _one_place,
        _fold_pairs,
    ),
    "places": Route(
        "T > 1: pairs of places (Theorem 3), two products; of second moments where these have fewer"
        " operations than rows, of Hessian and Π where pre-activations are fewer than parameters",
        _several_places,
        _fold_places,
    ),
    "rows": Route(
        "second moments: per-sample gradients of every vector, one symmetric product",
        lambda block, form, kind: block.name in form.shaped and kind in PASS_OF_KIND,
        _fold_rows,
    ),
    "func": Route(
        "torch.func over the block's parameters, plain autograd where that cannot: any model",
        lambda block, form, kind: True,
        _fold_general,
    ),
}
"""Routes in order of preference: a block goes by the first that fits. All agree."""


def route_of(
    block: Block,
    form: Form,
    kind: Kind,
    grown: Sum | None = None,
    look: Minibatch | None = None,
) -> str:
    """Return the first route that fits, and that can add to what has grown of other minibatches.

    Of second moments at several places the cheaper one, which `look` shows; "places" without.
    """
    fitting = [name for name, route in ROUTES.items() if route.fits(block, form, kind)]
    found = next(
        name for name in fitting if name != "pairs" or grown is None or isinstance(grown, _Packed)
    )
    if found == "places" and kind in PASS_OF_KIND and look is not None:
        return "places" if by_pairs(next(look.each([block]))) else "rows"
    return found


def fold_by_best(
    look: Minibatch, blocks: Sequence[Block], sums: dict[str, Sum], old: float, new: float
) -> None:
    """Add a minibatch to the sums of all blocks, each by its own best route."""
    found: dict[str, list[Block]] = {}
    for block in blocks:
        name = route_of(block, look.closure.form, look.kind, sums.get(block.name))
        shared = name == "places" and look.kind in PASS_OF_KIND
        found.setdefault("shared" if shared else name, []).append(block)
    for name, some in found.items():
        (_fold_shared if name == "shared" else ROUTES[name].fold)(look, some, sums, old, new)
