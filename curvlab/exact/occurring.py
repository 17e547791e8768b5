"""Blocks of embeddings on the symbols that occur: rows and columns of all others are zero.

Legend: N examples, T places, R rows and P places as a call has them, V symbols of the table, S of
them that occur, W width of the table (the block's outputs O), K = W S.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from curvlab.arrangements import ARRANGEMENTS
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, guard_memory, lookup
from curvlab.exact.batches import PASS_OF_KIND, Kind, Minibatches, by_hessians, check_kind, few
from curvlab.exact.matrices import finite
from curvlab.exact.route_table import Minibatch, Sum, add_shared, whole_of
from curvlab.layers import Block, Layout
from curvlab.linalg.kronecker import accumulate_places_
from curvlab.linalg.operators import Dense
from curvlab.objective import Objective
from curvlab.statistics import LayerStatistics
from curvlab.units import Unit
from curvlab.uses import Part, Slice

_COLUMNS = 64  # products at once


class Occurring(NamedTuple):
    """The part of an embedding's block that is not zero.

    Args:
        matrix: [K, K], row-major on [W, S] as the block is on [W, V].
        symbols: the numbers of the symbols that occur, ascending, [S].
        entries: where they lie in the block, so that `matrix(…).dense()[entries][:, entries]` is
            `matrix`, [K].
    """

    matrix: Dense
    symbols: Int[Tensor, " S"]
    entries: Int[Tensor, " K"]


@derivatives()
def occurring(
    objective: Objective,
    x: Any,
    y: Any = None,
    kind: Kind = "fisher",
    block: str = "1",
    *,
    draws: int = 1,
    unit: Unit = "sequence",
) -> Occurring:
    """Compute the dense block of an embedding on the symbols that occur in the data.

    A symbol that does not occur has no derivative, so that its rows and columns are zero. Neither
    the block [W V, W V] nor one-hot rows of length V are formed; memory is that of (W S)² numbers.

    >>> import torch
    >>> import curvlab as cl
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50_000, 2), torch.nn.Flatten())
    >>> objective = cl.Objective(model, cl.likelihoods.Gaussian())
    >>> x, y = torch.tensor([[7], [40_000]]), torch.zeros(2, 2)
    >>> found = cl.exact.occurring(objective, x, y, "ggn")
    >>> found.symbols, found.matrix.dense().shape
    (tensor([    7, 40000]), torch.Size([4, 4]))

    Args:
        objective: as for `matrix`.
        x: as for `matrix`; a loader is read twice, first for its symbols.
        y: as for `matrix`.
        kind: as for `matrix`.
        block: name of the block of an `nn.Embedding`.
        draws: as for `matrix`.
        unit: as for `matrix`.

    Returns:
        Matrix, symbols, and where they lie in the block.

    Raises:
        CurvlabError: as `matrix`; a block that is no embedding, one that is a head too, or that
            goes the general way; more symbols than the memory holds.
    """
    kind = check_kind(kind, draws, unit)
    chosen = lookup({b.name: b for b in objective.blocks}, block, "block")
    batches = Minibatches.of(objective, x, y, again=True, in_order=kind == "fisher-mc")
    symbols = _symbols(batches, chosen)
    width, inputs = chosen.shape
    what = f"the dense {kind} of {chosen} on the {len(symbols)} symbols that occur"
    guard_memory(
        int(1.3 * (width * len(symbols)) ** 2 * objective.dtype.itemsize),
        what,
        "take fewer examples, or its product form: curvlab.exact.product",
    )
    entries = (torch.arange(width, device=symbols.device)[:, None] * inputs + symbols).flatten()
    sums: dict[str, Sum] = {}
    seen = 0
    for closure in few(batches, kind, [chosen]):
        look = Minibatch(closure, kind, draws, [chosen])
        size = len(closure.x)
        old, new = seen / (seen + size), 1 / (seen + size)
        if kind in PASS_OF_KIND:
            for s in look.each([chosen]):
                add_shared(_narrowed(s, symbols), sums, old, new)
        elif by_hessians(kind, chosen, closure.form):
            for s, hessians in look.hessians([chosen.name]):
                a = _hot(s.parts[0], symbols)
                matrix = whole_of(sums, chosen.name, len(entries), a, old)
                accumulate_places_(matrix, hessians, a, new)
        else:
            function = look.function(Layout((chosen,)))
            product = function.product(kind, draws)
            matrix = whole_of(sums, chosen.name, len(entries), function.at, old)
            for part in torch.split(torch.arange(len(entries), device="cpu"), _COLUMNS):
                units = function.at.new_zeros(len(part), len(function.at))
                units[torch.arange(len(part), device="cpu"), entries[part]] = 1
                matrix[:, part].add_(product(units)[:, entries].mT, alpha=new)
        seen += size
    if not len(symbols):
        none = torch.zeros(0, 0, dtype=objective.dtype, device=objective.device)
        return Occurring(Dense(none), symbols, entries)
    return Occurring(Dense(finite(sums[chosen.name].dense(), what)), symbols, entries)


def _symbols(batches: Minibatches, block: Block) -> Int[Tensor, " S"]:
    """Return the numbers of the symbols that occur, but for that of padding.

    Raises CurvlabError where a use of the block is no look-up.
    """
    found: Tensor | None = None
    for closure in batches:
        way = closure.form.ways[block.name]
        _, capture = closure.forward()
        uses = capture.uses.get(block.name, [])
        if any(use.swapped for use in uses):
            raise CurvlabError(
                f"{block} is a head too, so that every symbol has a derivative and not those alone"
                " that occur: take its product form, curvlab.exact.product"
            )
        if block.layer is None or any(use.rule.counts is None for use in uses):
            raise CurvlabError(
                f"{block} is no table of symbols: take curvlab.exact.matrix, or its product form,"
                " curvlab.exact.product"
            )
        if block.name not in closure.form.shaped:
            raise CurvlabError(
                f"{block} {way.why}, so that its symbols are not seen: take its product form,"
                " curvlab.exact.product"
            )
        for use in uses:
            assert use.rule.counts is not None
            own = use.rule.counts(use.call, use.x.value) > 0
            found = own if found is None else found | own
    if found is None:
        return torch.zeros(0, dtype=torch.long, device=batches.objective.device)
    return found.nonzero()[:, 0]


def _hot(part: Part, symbols: Int[Tensor, " S"]) -> Float[Tensor, "N T S"]:
    """Return one-hot rows on the symbols alone; zero at the symbol of padding."""
    rule, call, inputs = part.own
    assert rule.response is not None
    number = torch.zeros(len(call.weight), dtype=torch.float64, device=symbols.device)
    number[symbols] = torch.arange(
        1.0, len(symbols) + 1, dtype=torch.float64, device=symbols.device
    )
    where = rule.response(call, inputs.raw, number).long()
    hot = F.one_hot(where, len(symbols) + 1)[..., 1:].to(inputs.dtype)
    return ARRANGEMENTS[inputs.how](hot, 0, inputs.size)


def _narrowed(s: LayerStatistics, symbols: Int[Tensor, " S"]) -> LayerStatistics:
    """Return the statistics of a table that has these symbols alone."""
    width, count = s.block.shape[0], len(symbols)
    block = replace(s.block, shape=(width, count), weight_shape=(count, width))
    parts = [Part(block, Slice(_hot(p, symbols)), p.g) for p in s.parts]
    return LayerStatistics(block, s.size, parts=parts, like=s.like, vectors=s.vectors)
