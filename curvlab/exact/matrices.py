"""Dense matrices of layers, parameters, pairs of blocks and the whole, by the route that fits.

The routes are `ROUTES`. Every layer's block is M = (1/N) Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ
(thesis Theorem 3), with G = Σ_v g gᵀ for second moments and the pre-activation Hessian for the
Hessian and Π. Scale: mean over examples of a per-example sum.

Legend: N examples, T places, V vectors sent back, I inputs incl. the bias column, O outputs, D = O
I.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from curvlab.closure import Closure
from curvlab.derivatives import derivatives
from curvlab.errors import CurvlabError, guard_memory, lookup, several, some_of, unknown
from curvlab.exact.batches import (
    PASS_OF_KIND,
    Kind,
    Minibatches,
    check_kind,
    few,
    say_general,
)
from curvlab.exact.route_table import ROUTES, Fold, Minibatch, Sum, fold_by_best, route_of
from curvlab.layers import Block, Layout
from curvlab.linalg.operators import Dense
from curvlab.linalg.packed import (
    accumulate_between_,
    mirror_,
)
from curvlab.linalg.products import Rectangular
from curvlab.objective import Objective
from curvlab.statistics import LayerStatistics
from curvlab.units import Unit


@derivatives()
def routes(
    objective: Objective, x: Any, y: Any = None, kind: Kind = "fisher", *, unit: Unit = "sequence"
) -> dict[str, str]:
    """Return {block: the route that `matrix` takes to it}, on data of this shape."""
    kind = check_kind(kind, unit=unit)
    first = next(few(Minibatches.of(objective, x, y), kind, objective.blocks))
    look = Minibatch(first, kind, 1, objective.blocks)
    return {block.name: route_of(block, first.form, kind, look=look) for block in objective.blocks}


@derivatives()
def matrices(
    objective: Objective,
    x: Any,
    y: Any = None,
    kind: Kind = "fisher",
    blocks: Sequence[str] | str | None = None,
    *,
    route: str = "auto",
    draws: int = 1,
    unit: Unit = "sequence",
) -> dict[str, Dense]:
    """Compute dense diagonal blocks, every pass shared.

    Args:
        objective: as for `matrix`.
        x: as for `matrix`.
        y: as for `matrix`.
        kind: as for `matrix`.
        blocks: names of blocks; all where None.
        route: as for `matrix`.
        draws: as for `matrix`.
        unit: as for `matrix`.

    Returns:
        {block name: Dense}, [D, D] on the row-major flattening of the block's [O, I].

    Raises:
        CurvlabError: as `matrix`.
    """
    kind = check_kind(kind, draws, unit)
    if route != "auto":
        lookup(ROUTES, route, "route")
    known = {b.name: b for b in objective.blocks}
    chosen = (
        list(known.values())
        if blocks is None
        else [lookup(known, name, "block") for name in several(blocks)]
    )
    _guard(
        objective,
        sum(b.numel**2 for b in chosen),
        f"the dense {kind} of {some_of(chosen)}",
        chosen,
    )
    sums: dict[str, Sum] = {}
    seen = 0
    for closure in few(Minibatches.of(objective, x, y), kind, chosen):
        look = Minibatch(closure, kind, draws, chosen)
        size = len(closure.x)
        if route == "auto" and not seen:
            say_general(chosen, kind, closure.form)
        fold = fold_by_best if route == "auto" else _by(route, chosen, closure, kind)
        fold(look, chosen, sums, seen / (seen + size), 1 / (seen + size))
        seen += size
    return {
        block.name: Dense(finite(sums.pop(block.name).dense(), f"{kind} of {block}"))
        for block in chosen
    }


def _by(route: str, chosen: Sequence[Block], closure: Closure, kind: Kind) -> Fold:
    """Return a route's fold; raises CurvlabError where it does not fit a block."""
    form = closure.form
    for block in chosen:
        if not ROUTES[route].fits(block, form, kind):
            why = form.ways[block.name].why
            raise CurvlabError(
                f"route '{route}' does not fit {block} for {kind} ({why or ROUTES[route].summary});"
                ' use route="auto"'
            )
    return ROUTES[route].fold


@derivatives()
def matrix(
    objective: Objective,
    x: Any,
    y: Any = None,
    kind: Kind = "fisher",
    block: str | tuple[str, str] | None = "1",
    *,
    route: str = "auto",
    draws: int = 1,
    unit: Unit = "sequence",
) -> Dense | Rectangular:
    """Compute a dense matrix of second derivatives or second moments.

    Scale: mean over examples of a per-example sum.

    >>> import torch
    >>> import curvlab as cl
    >>> objective = cl.Objective(torch.nn.Linear(2, 1, bias=False), cl.likelihoods.Gaussian())
    >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 1)
    >>> cl.exact.matrix(objective, x, y, kind="ggn", block=None).dense()
    tensor([[2., 0.],
            [0., 8.]])

    Args:
        objective: model and likelihood.
        x: inputs [N, …]; or a loader of (x, y) pairs, over all of which the exact mean is taken at
            bounded memory.
        y: targets (of ggn, fisher and fisher-mc only checked); None with a loader.
        kind: hessian | ggn | pi (hessian − ggn, thesis (1.4)) | fisher (all labels) | fisher-mc
            (`draws` sampled labels for each example) | ef (the data's labels).
        block: a block ("2": layer with its bias, on the row-major flattening of its [O, I]), a
            parameter ("2.weight", in its own order), a pair of either (rows, columns), or None for
            the whole matrix, block after block (`objective.layout`).
        route: of `ROUTES`; by default the first that fits. Pairs and the whole matrix take "rows"
            or "func".
        draws: labels drawn for each example (fisher-mc).
        unit: of ef: whose gradients g are squared, (1/N) Σ g gᵀ: those of every example's loss,
            "sequence", or those of the loss at each of its places, "token" (the other kinds are the
            same for both). Of a mean per token they are the M places' own, and the sum is over M.

    Returns:
        Dense [D, D], or for a pair Rectangular [D₁, D₂].

    Raises:
        CurvlabError: unknown kind, block or route; data that do not fit, NaN, an empty loader;
            BatchNorm or dropout in training mode; a matrix larger than the machine's memory (use
            `product`).
    """
    kind = check_kind(kind, draws, unit)
    if isinstance(block, str):
        found, places = select(objective, block)
        whole = matrices(objective, x, y, kind, [found.name], route=route, draws=draws)[found.name]
        return whole if places is None else Dense(whole.matrix[places[:, None], places])
    return _across(objective, x, y, kind, block, route, draws)


def select(objective: Objective, name: str) -> tuple[Block, Tensor | None]:
    """Return a block by its name, or the block of a parameter by the parameter's.

    With the parameter's entries in the block; None for all of them.
    """
    known = {b.name: b for b in objective.blocks}
    if name in known:
        return known[name], None
    for block in objective.blocks:
        if name in block.params:
            places = Layout((block,)).places()[name].flatten().to(objective.device)
            return block, None if block.layer is None else places
    raise unknown("block", name, [*known, *objective.parameters])


def _across(
    objective: Objective,
    x: Any,
    y: Any,
    kind: Kind,
    block: tuple[str, str] | None,
    route: str,
    draws: int,
) -> Dense | Rectangular:
    """Compute the whole matrix, or that of one pair of blocks."""
    if route not in ("auto", "rows", "func"):
        lookup(ROUTES, route, "route")
        raise CurvlabError(f"route '{route}' leads to diagonal blocks only: use auto, rows or func")
    if route == "rows" and kind not in PASS_OF_KIND:
        raise CurvlabError(
            f"route 'rows' is for second moments ({', '.join(PASS_OF_KIND)}), not for {kind}: use"
            " auto or func"
        )
    if block is None:
        rows = columns = list(objective.blocks)
        places: tuple[Tensor | None, Tensor | None] = (None, None)
        what = f"the whole {kind}"
    else:
        (first, left), (second, right) = select(objective, block[0]), select(objective, block[1])
        rows, columns, places = [first], [second], (left, right)
        what = f"the dense {kind} between {first} and {second}"
    layout = Layout(tuple(dict.fromkeys([*rows, *columns])))
    height, width = (sum(b.numel for b in some) for some in (rows, columns))
    _guard(objective, height * width, what)
    found = torch.zeros(height, width, dtype=objective.dtype, device=objective.device)
    seen, any_structured = 0, False
    for closure in few(Minibatches.of(objective, x, y), kind, layout.blocks):
        look = Minibatch(closure, kind, draws)
        size = len(closure.x)
        loose = [b for b in layout.blocks if b.name not in closure.form.shaped]
        if route == "rows" and loose:
            why = closure.form.ways[loose[0].name].why
            raise CurvlabError(
                f"route 'rows' does not fit {loose[0]} ({why or ROUTES['rows'].summary}): use auto"
                " or func"
            )
        if route == "auto" and not seen:
            say_general(layout.blocks, kind, closure.form)
        found.mul_(seen / (seen + size))
        structured = kind in PASS_OF_KIND and not loose and route != "func"
        any_structured |= structured
        if structured:
            _add_rows(found, look, rows, columns, 1 / (seen + size))
        else:
            _add_general(found, look, layout, rows, columns, 1 / (seen + size))
        seen += size
    finite(found, what)
    if block is None:
        return Dense(mirror_(found) if any_structured else found)
    for axis, some in enumerate(places):
        found = found if some is None else found.index_select(axis, some)
    return Rectangular(found)


def _add_rows(
    matrix: Tensor, look: Minibatch, rows: Sequence[Block], columns: Sequence[Block], scale: float
) -> None:
    """Add second moments between blocks to `matrix`.

    Where neither shares its weight, (Σ_v g g'ᵀ) ⊗ a a'ᵀ at 1/V of the work of rows.
    """
    top = Layout(tuple(rows)).slices
    left = Layout(tuple(columns)).slices
    pairs = [(0, 0)]
    if len(rows) > 1:  # i ≥ j: the lower triangle
        pairs = list(combinations_with_replacement(range(len(rows)), 2))
    names = list(dict.fromkeys(b.name for b in (*rows, *columns)))
    for part, (j, i) in ((part, pair) for part in look.together(names) for pair in pairs):
        if rows[i].name not in part or columns[j].name not in part:
            continue
        one, other = part[rows[i].name], part[columns[j].name]
        target = matrix[top[rows[i].name], left[columns[j].name]]
        if _thin(one) and _thin(other):
            accumulate_between_(
                target, (one.g[:, :, 0], other.g[:, :, 0]), (one.a[:, 0], other.a[:, 0]), scale
            )
            continue
        at_once = max(1, max(target.shape) // 8)
        for r, s in zip(one.some_rows(at_once), other.some_rows(at_once), strict=True):
            target.addmm_(r.mT, s, alpha=scale)


def _thin(s: LayerStatistics) -> bool:
    """Return whether a row of the block is one outer product."""
    return s.provides("factors") and s.used and s.places == 1


def _add_general(
    matrix: Tensor,
    look: Minibatch,
    layout: Layout,
    rows: Sequence[Block],
    columns: Sequence[Block],
    scale: float,
) -> None:
    function = look.function(layout)
    numbers = torch.arange(len(layout), device="cpu")
    top = torch.cat([numbers[layout.slices[b.name]] for b in rows]).to(matrix.device)
    if look.kind in PASS_OF_KIND:
        left = torch.cat([numbers[layout.slices[b.name]] for b in columns]).to(matrix.device)
        for r, s in function.rows(look.kind, look.draws):
            matrix.addmm_(r[:, top].mT, s[:, left], alpha=scale)
        return
    part = None if rows == columns and len(rows) > 1 else layout.slices[columns[0].name]
    for some, value in function.columns(look.kind, look.draws, part):
        matrix[:, some].add_(value[top], alpha=scale)


def finite(matrix: Tensor, what: str) -> Tensor:
    """Return a matrix. Raises CurvlabError where its diagonal holds NaN or Inf."""
    if not bool(torch.isfinite(matrix.diagonal()).all()):
        raise CurvlabError(
            f"{what} contains NaN or Inf although the loss is finite: an operation of the model has"
            " no finite derivative at these weights (a root or a norm at 0, an overflow)"
        )
    return matrix


def _guard(objective: Objective, numbers: int, what: str, chosen: Sequence[Block] = ()) -> None:
    size = numbers * torch.finfo(objective.dtype).bits // 8
    remedy = "take smaller blocks, or its product form: curvlab.exact.product"
    if any(isinstance(block.module, nn.Embedding) for block in chosen):
        remedy = f"an embedding's on the symbols that occur is curvlab.exact.occurring; {remedy}"
    guard_memory(int(1.3 * size), what, remedy)
