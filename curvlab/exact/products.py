"""Exact matrices as products with vectors, for models too large for dense blocks.

Nothing is formed but vectors.

Legend: N examples, T places, V vectors sent back, I inputs incl. the bias column, O outputs, D
parameters, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError
from curvlab.exact.batches import (
    PASS_OF_KIND,
    Kind,
    Minibatches,
    by_hessians,
    check_kind,
    few,
)
from curvlab.exact.matrices import select
from curvlab.exact.route_table import Minibatch
from curvlab.exact.torch_func import Function
from curvlab.fingerprint import numbers
from curvlab.layers import Block, Layout
from curvlab.linalg.products import Product, RectangularProduct
from curvlab.objective import Objective
from curvlab.statistics import LayerStatistics
from curvlab.units import Unit

_COLUMNS = 32  # vectors through the model at once


@derivatives()
def product(
    objective: Objective,
    x: Any,
    y: Any = None,
    kind: Kind = "fisher",
    block: str | tuple[str, str] | None = None,
    *,
    draws: int = 1,
    unit: Unit = "sequence",
) -> Product | RectangularProduct:
    """Return what `matrix` would hold as a product with vectors, by `torch.func`.

    One Jacobian or Hessian product a vector. Labels of fisher-mc are drawn once: every product is
    with the same matrix. A loader is read again at every product. What is no longer as it was is
    refused: the data (for fisher-mc their order too), weights, train or eval mode.

    Args:
        objective: as for `matrix`.
        x: as for `matrix`; no iterator in place of a loader.
        y: as for `matrix`.
        kind: as for `matrix`.
        block: as for `matrix`; by default the whole.
        draws: as for `matrix`.
        unit: as for `matrix`.

    Returns:
        Product (symmetric; `diag` and `trace` are exact and structured where layers have rules), or
        for a pair RectangularProduct.

    Raises:
        CurvlabError: as `matrix`; an iterator in place of a loader.
    """
    kind = check_kind(kind, draws, unit)
    if not (block is None or isinstance(block, str)):
        block = _pair(block)
    batches = Minibatches.of(objective, x, y, again=True, in_order=kind == "fisher-mc")
    if block is None:
        layout = objective.layout
        left = right = None
    else:
        names = (block, block) if isinstance(block, str) else block
        (first, left), (second, right) = (select(objective, name) for name in names)
        layout = Layout(tuple(dict.fromkeys([first, second])))
        left, right = (_entries(layout, b, some) for b, some in ((first, left), (second, right)))
    whole = _Whole(batches, layout, kind, draws)
    dtype, device = objective.dtype, objective.device
    if isinstance(block, tuple):
        assert left is not None
        assert right is not None
        forth, back = _between(whole, left, right), _between(whole, right, left)
        return RectangularProduct(forth, back, (len(left), len(right)), dtype, device, _COLUMNS)
    apply = whole if left is None else _between(whole, left, left)

    @derivatives()
    def diag() -> Tensor:
        whole.check()
        found = _diagonal(batches, layout, kind, draws)
        return found if left is None else found[left]

    return Product(apply, len(layout) if left is None else len(left), dtype, device, diag, _COLUMNS)


@derivatives()
def diagonal(
    objective: Objective,
    x: Any,
    y: Any = None,
    kind: Kind = "fisher",
    *,
    draws: int = 1,
    unit: Unit = "sequence",
) -> Float[Tensor, " D"]:
    """Compute the diagonal of the whole matrix, block after block, without forming a block.

    The order is that of `objective.layout`. Second moments cost one pass; the Hessian and Π one for
    every pre-activation of a layer that is no convolution with more places than inputs; blocks
    without structure D products.
    """
    kind = check_kind(kind, draws, unit)
    return _diagonal(Minibatches.of(objective, x, y), objective.layout, kind, draws)


def _pair(block: object) -> tuple[str, str]:
    if (
        not isinstance(block, tuple | list)
        or len(block) != 2
        or not all(isinstance(name, str) for name in block)
    ):
        raise CurvlabError(
            "block must be a name, a pair of names (rows, columns) or None for the whole, not"
            f" {block!r}"
        )
    return block[0], block[1]


def _entries(layout: Layout, block: Block, some: Tensor | None) -> Tensor:
    """Return entries of the layout's vector, in the order of the block or of the parameter."""
    part = layout.slices[block.name]
    entries = torch.arange(part.start, part.stop, device="cpu")
    return entries if some is None else entries.to(some.device)[some]


_Columns = Callable[[Float[Tensor, "D K"]], Float[Tensor, "D K"]]


def _between(whole: _Whole, left: Tensor, right: Tensor) -> _Columns:
    """Return the function of columns on the entries `right` that gives those on `left`."""

    def apply(v: Tensor) -> Tensor:
        full = v.new_zeros(len(whole.layout), v.shape[1])
        full[right.to(v.device)] = v
        return whole(full)[left.to(v.device)]

    return apply


class _Whole:
    """Mean over all batches of N · M v; one minibatch is linearised once and kept."""

    def __init__(self, batches: Minibatches, layout: Layout, kind: Kind, draws: int) -> None:
        self.batches, self.layout, self.kind, self.draws = batches, layout, kind, draws
        self._modes = self._training()
        self._names = [name for name, _ in self._state()]
        self._versions, self._numbers = self._weights()

    def _training(self) -> list[bool]:
        return [module.training for module in self.batches.objective.model.modules()]

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        model = self.batches.objective.model
        yield from model.named_parameters()
        yield from model.named_buffers()

    def _weights(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Return the state of the weights and buffers that there were.

        Which tensors, how often each has been written to, and, since `.data` is written to without
        being counted, a checksum.
        """
        now = dict(self._state())
        state = [now[name] for name in self._names if name in now]
        return [(t.data_ptr(), t._version) for t in state], numbers(state)

    def check(self) -> None:
        """Raise CurvlabError where the model is not as it was."""
        versions, found = self._weights()
        if versions != self._versions or not torch.equal(found, self._numbers):
            raise CurvlabError(
                "the model's weights have moved since this product was made: make it again"
            )
        if self._training() != self._modes:
            raise CurvlabError(
                "modules have gone from train to eval mode, or back, since this product was made:"
                " make it again"
            )

    @derivatives()
    def __call__(self, v: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        self.check()
        v = v.clone() if v.is_inference() else v.detach()
        total, size = torch.zeros_like(v), 0
        for apply, n in self._fresh() if self.batches.kept is None else self._kept():
            total += apply(v.mT).mT
            size += n
        return total / size

    @cached_property
    def _linear(self) -> list[tuple[_Columns, int]]:
        return list(self._fresh())

    def _kept(self) -> list[tuple[_Columns, int]]:
        if "_linear" in self.__dict__ and self.batches.kept is not None:
            self.batches.kept.check()
        return self._linear

    def _fresh(self) -> Iterator[tuple[_Columns, int]]:
        for closure in self.batches:
            closure.observe(frozenset(), move_buffers=False)  # the checks of data, targets and loss
            function = Function(closure, self.layout)
            yield function.product(self.kind, self.draws, often=True), len(closure.x)


def _diagonal(batches: Minibatches, layout: Layout, kind: Kind, draws: int) -> Float[Tensor, " D"]:
    total: Tensor | None = None
    size = 0
    for closure in few(batches, kind, layout.blocks):
        found = _summed_diagonal(closure, layout, kind, draws)
        total = found if total is None else total + found
        size += len(closure.x)
    assert total is not None
    return total / size


def _summed_diagonal(
    closure: Closure, layout: Layout, kind: Kind, draws: int
) -> Float[Tensor, " D"]:
    """Return the diagonal of N · M on one minibatch."""
    look = Minibatch(closure, kind, draws)
    parts: dict[str, Tensor] = {}
    ruled = [b for b in layout.blocks if b.name in closure.form.shaped]
    if kind in PASS_OF_KIND:
        parts |= {s.block.name: _second_moment_diagonal(s) for s in look.each(ruled)}
    elif ruled:
        fits = [b.name for b in ruled if by_hessians(kind, b, closure.form)]
        if fits:
            parts |= {
                s.block.name: _structured_diagonal(s, hessians)
                for s, hessians in look.hessians(fits)
            }
    for block in layout.blocks:
        if block.name not in parts:
            function = look.function(Layout((block,)))
            if kind in PASS_OF_KIND:
                parts[block.name] = sum(
                    (left * right).sum(0) for left, right in function.rows(kind, draws)
                )  # type: ignore[assignment]  # never empty
            else:
                each = [
                    value[columns].diagonal() for columns, value in function.columns(kind, draws)
                ]
                parts[block.name] = torch.cat(each)
    return torch.cat([parts[b.name].flatten() for b in layout.blocks])


def _second_moment_diagonal(s: LayerStatistics) -> Float[Tensor, "*W"]:
    """Return Σₙ Σ_v row²; at one place (Σ_v g²)ᵀ a².

    Where that has fewer operations, by pairs of places: Σ_tt' (Σ_v g_t g_t')[o] a_t[i] a_t'[i].
    """
    simple = s.provides("factors") and s.used
    if simple and s.places == 1:
        return s.g[:, :, 0].square().sum(0).mT @ s.a[:, 0].square()
    places, inputs = (s.places, s.block.shape[1]) if simple else (0, 0)
    if simple and places * (s.vectors + inputs) < s.vectors * inputs:
        g = s.g.permute(1, 3, 2, 0).contiguous()  # [N, O, T, V]
        pairs = (g @ g.mT).transpose(0, 1)
        return _over_pairs(s.a, pairs)
    return sum(rows.square().sum(0) for rows in s.some_rows(4096))  # type: ignore[return-value]  # never empty


def _structured_diagonal(
    s: LayerStatistics, hessians: Float[Tensor, "T O N T O"]
) -> Float[Tensor, "O I"]:
    """Return Σₙ Σ_tt' G_{n,tt'}[o, o] a_{n,t}[i] a_{n,t'}[i]."""
    return _over_pairs(s.a, hessians.diagonal(dim1=1, dim2=4).permute(3, 1, 0, 2))


def _over_pairs(a: Float[Tensor, "N T I"], pairs: Float[Tensor, "O N T T"]) -> Float[Tensor, "O I"]:
    """Return Σₙ Σ_tt' G_{n,tt'}[o, o] a_{n,t}[i] a_{n,t'}[i]."""
    return torch.stack([(a * (g @ a)).sum((0, 1)) for g in pairs])
