"""How good are the assumptions? Approximations, and the steps to them, against the exact block.

`errors` takes the way from the exact block M to one Kronecker product apart, step by step, on one
minibatch::

    M  = (1/N) Σₙ Σ_tt' G_{n,tt'} ⊗ a_{n,t} a_{n,t'}ᵀ            thesis Theorem 3
    M₁ = (1/N) Σₙ Σ_t G_{n,tt} ⊗ a_{n,t} a_{n,t}ᵀ                (3.4): G_tt' = 0 between places
    M₂ = (1/N) Σₙ ((1/T) Σ_t G_{n,tt}) ⊗ (Σ_t a_{n,t} a_{n,t}ᵀ)  (3.5), (3.7): over places, mean of
                                                                 products = product of means
    M₃ = E[(1/T) Σ_t G_tt] ⊗ E[Σ_t a_t a_tᵀ]                     (2.3), (3.8): over examples too

`quality` compares what the algorithms estimate with M. Both report the **floor**, the error of the
nearest Kronecker product. (No bound for TNT and Shampoo, which have a product for the weight and
another for the bias.)

Legend: N examples, T places, I inputs incl. the bias column, O outputs, D = O I; ‖·‖ is the
Frobenius norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.base import check_damping
from curvlab.errors import CurvlabError, guard_memory, lookup, several, unknown
from curvlab.estimates import Estimate, Labels, fold_data
from curvlab.exact.batches import PASS_OF_KIND, Kind, check_kind
from curvlab.exact.kronecker_sum import (
    KroneckerSum,
    guard_preactivation_hessians,
    one_minibatch,
    sums,
    unfit,
)
from curvlab.exact.route_table import Minibatch
from curvlab.layers import Block, Layout
from curvlab.linalg.distances import compare_to_exact, distance, norm, quotient
from curvlab.linalg.kronecker import nearest_kronecker
from curvlab.linalg.spectral import eigvalsh
from curvlab.objective import Objective

__all__ = ["ASSUMPTIONS", "Columns", "Estimate", "Labels", "errors", "quality"]

ASSUMPTIONS: dict[str, tuple[str, Callable[[KroneckerSum], Float[Tensor, "D D"]]]] = {
    "places apart": ("(3.4)", KroneckerSum.same_place),
    "averaged over places": ("(3.5), (3.7)", KroneckerSum.averaged),
    "averaged over examples": ("(2.3), (3.8)", lambda terms: terms.single().dense()),
}
"""Assumptions in their order, each with (thesis, the matrix that it and those before it leave)."""


Columns = dict[str, list[float] | float]
"""Values of variables in one block, with or without a further dimension."""


def errors(
    objective: Objective,
    x: Tensor,
    y: Tensor,
    kind: Kind = "fisher",
    blocks: Sequence[str] | None = None,
) -> xr.Dataset:
    """Compute what each assumption of a Kronecker approximation costs, against the exact block.

    Both are of the same minibatch.

    Args:
        objective: as for `curvlab.exact.matrix`.
        x: inputs of one minibatch [N, …].
        y: its targets.
        kind: of matrix.
        blocks: names; all where None. Layers without a rule and those with groups of outputs are
            skipped.

    Returns:
        Over (assumption, block), in the order in which they are made: `error` ‖M_k − M‖ / ‖M‖ of
        all assumptions so far and `step` ‖M_k − M_{k−1}‖ / ‖M‖ of this one. Over block: `total`,
        the last error; `floor`, the error of the nearest Kronecker product. The first two errors
        are 0 where T = 1; all are NaN where M is 0. Attribute `skipped` names blocks.

    Raises:
        CurvlabError: as `curvlab.exact.matrix`; no block that fits; dense matrices larger than the
            memory.
    """
    check_kind(kind)
    closure = one_minibatch(objective, x, y)
    chosen, skipped = _chosen(closure, kind, blocks)
    _guard(chosen, closure, kind, 4)
    found: dict[str, Columns] = {}
    for block, terms in sums(Minibatch(closure, kind, 1), chosen):
        exact = terms.dense()
        size = norm(exact)
        before = exact
        error, step = [], []
        for name, (_, reduce) in ASSUMPTIONS.items():
            same = terms.places == 1 and name != "averaged over examples"
            after = exact if same else reduce(terms)
            error.append(quotient(0.0 if same else distance(after, exact), size))
            step.append(quotient(0.0 if same else distance(after, before), size))
            before = after
        floor = nearest_kronecker(exact, *block.shape).error if size else np.nan
        found[block.name] = {"error": error, "step": step, "total": error[-1], "floor": floor}
    table = {
        "error": "relative Frobenius error of this assumption and those before it",
        "step": "relative Frobenius norm of the change by this assumption alone",
        "total": "relative Frobenius error of all assumptions",
        "floor": "relative Frobenius error of the nearest Kronecker product",
    }
    labels = {"assumption": list(ASSUMPTIONS)}
    ds = _dataset(found, chosen, table, labels, closure, {"kind": kind, "skipped": skipped})
    return ds.assign_coords(
        equation=("assumption", [equation for equation, _ in ASSUMPTIONS.values()])
    )


COMPARED_ALGORITHMS = ("kfac", "tnt", "tnt-per-sample", "shampoo")
"""Algorithms whose matrices `quality` holds against the exact block where none are named."""


def quality(
    objective: Objective,
    x: Tensor,
    y: Tensor,
    algorithms: Sequence[str] | None = None,
    kind: Kind = "fisher",
    blocks: Sequence[str] | None = None,
    *,
    damping: float = 0.0,
    labels: Labels = "kind",
    minibatches: int = 10,
    passes: int = 10,
    spectra: bool = True,
) -> xr.Dataset:
    """Compare the matrices that algorithms estimate with the exact block on the same data.

    Nothing is tuned, no model is moved.

    Methods that read each example (KFAC, TNT per sample, block Fisher) see the data as one batch.
    Methods that read the mean gradient of a minibatch (TNT, Shampoo, Adam) see them in `passes`
    shuffled passes of `minibatches` each, with new labels where labels are drawn. Mean gradients of
    m examples give Fisher / m, so their matrices are taken times m (variable `scale`; Σ m² / N
    where parts differ in size, each counted m² times, which leaves no bias). Shampoo's matrix is
    the square of what it preconditions by (`CurvatureBlock.matrix`); it bounds Fisher / m up to the
    gradient's rank, so that its size says little, `error_scaled` and `cosine` much.

    Any kind may be asked for: against the Hessian it is reported how far an estimate of the Fisher
    is from it.

    Args:
        objective: as for `curvlab.exact.matrix`.
        x: inputs of one minibatch [N, …].
        y: its targets.
        algorithms: of `ALGORITHMS`, those that estimate a matrix. None: the usual ones, and
            kfac-reduce where a weight is shared by several places.
        kind: of matrix.
        blocks: names; all where None. Layers without a rule and those with groups of outputs are
            skipped.
        damping: overall λ. Above 0 the matrices are compared as they are inverted: M + λI, and each
            method's own with λ in its document's own place by the one rule of `compare`.
        labels: "kind": of the exact matrix, whatever the algorithm's own (hessian, ggn, pi, fisher:
            all labels, of a mean gradient drawn ones; fisher-mc: drawn; ef: the data's); "own": the
            algorithm's.
        minibatches: m = N / minibatches; at most N.
        passes: passes through the data, for mean gradients.
        spectra: whether to compute eigenvalues, O(D³).

    Returns:
        Over (algorithm, block), B the algorithm's matrix in the units of M: `error` ‖B − M‖ / ‖M‖;
        `error_scaled`, the same for the best multiple of B; `cosine` ⟨B, M⟩ / ‖B‖ ‖M‖;
        `trace_ratio` tr B / tr M; and of the spectra `spectrum_error` ‖λ(B) − λ(M)‖ / ‖λ(M)‖
        (sorted; at most `error`, by Hoffman and Wielandt), `largest_ratio` and `smallest_ratio` of
        the extreme eigenvalues. Over block: `floor`, the error of the nearest Kronecker product;
        `between`, the relative norm of what M has between weight and bias: the least error of
        methods that take them apart (TNT, Shampoo). Over algorithm: `scale`. NaN where a ratio has
        no denominator (or one below rounding). Attribute `skipped` names blocks.

    Raises:
        CurvlabError: as `curvlab.exact.matrix`; an algorithm that estimates no matrix; no block
            that fits; dense matrices larger than the memory.
    """
    check_kind(kind)
    check_damping(damping)
    if labels not in get_args(Labels):
        raise unknown("choice of labels", labels, get_args(Labels))
    algorithms = None if algorithms is None else several(algorithms)
    if algorithms is not None and not algorithms:
        raise CurvlabError("there is no algorithm to compare: name one or more")
    for name, value in (("minibatches", minibatches), ("passes", passes)):
        if value < 1:
            raise CurvlabError(f"{name} must be 1 or more, not {value}")
    closure = one_minibatch(objective, x, y)
    chosen, skipped = _chosen(closure, kind, blocks)
    _guard(chosen, closure, kind, 6)
    if algorithms is None:
        shared = any(closure.form.places[b.name] > 1 for b in chosen)
        algorithms = [*COMPARED_ALGORITHMS, *(["kfac-reduce"] if shared else [])]
    count = len(closure.x)
    sizes = [
        len(part)
        for part in torch.arange(count, device="cpu").tensor_split(min(minibatches, count))
    ]
    estimates = {name: Estimate.of(name, kind, labels, sizes, chosen) for name in algorithms}
    fold_data(estimates.values(), closure, sizes, passes)
    found: dict[str, Columns] = {}
    for block, terms in sums(Minibatch(closure, kind, 1), chosen):
        matrices = [estimate.matrix(block.name, damping) for estimate in estimates.values()]
        exact = terms.dense()
        exact.diagonal().add_(damping)
        eigenvalues = eigvalsh(exact).double() if spectra else None
        each = [
            compare_to_exact(m, e.scale, exact, eigenvalues)
            for m, e in zip(matrices, estimates.values(), strict=True)
        ]
        found[block.name] = {key: [values[key] for values in each] for key in each[0]}
        found[block.name]["floor"] = (
            nearest_kronecker(exact, *block.shape).error if bool(exact.any()) else np.nan
        )
        found[block.name]["between"] = quotient(_between(exact, block), norm(exact))
    table = {
        "error": "relative Frobenius error",
        "error_scaled": "relative Frobenius error of the best multiple",
        "cosine": "cosine between the matrices",
        "trace_ratio": "ratio of the traces",
        "spectrum_error": "relative ℓ2 distance of the sorted eigenvalues",
        "largest_ratio": "ratio of the largest eigenvalues",
        "smallest_ratio": "ratio of the smallest eigenvalues",
        "floor": "relative Frobenius error of the nearest Kronecker product",
        "between": "relative Frobenius norm of the entries between weight and bias",
    }
    attributes: dict[str, str | float] = {
        "kind": kind,
        "skipped": skipped,
        "damping": damping,
        "labels": labels,
    }
    attributes |= {"minibatches": len(sizes), "passes": passes}
    ds = _dataset(found, chosen, table, {"algorithm": algorithms}, closure, attributes)
    what = {
        "long_name": (
            "factor on the method's own matrix: examples in a minibatch, for mean gradients"
        ),
        "units": "1",
    }
    return ds.assign(scale=("algorithm", [e.scale for e in estimates.values()], what))


def _between(matrix: Float[Tensor, "D D"], block: Block) -> float:
    """Return the norm of the entries between weight and bias."""
    weight, *bias = (
        places.flatten().to(matrix.device) for places in Layout((block,)).places().values()
    )
    return math.sqrt(2) * norm(matrix[weight[:, None], bias[0]]) if bias else 0.0


def _chosen(
    closure: Closure, kind: Kind, blocks: Sequence[str] | str | None
) -> tuple[list[Block], str]:
    """Return (the blocks that are Kronecker sums, the names of the others and why)."""
    known = {b.name: b for b in closure.objective.blocks}
    asked = (
        list(known.values())
        if blocks is None
        else [lookup(known, name, "block") for name in several(blocks)]
    )
    faults = {b.name: unfit(b, closure.form, kind) for b in asked}
    fit = [b for b in asked if not faults[b.name]]
    skipped = "; ".join(f"{b} {faults[b.name]}" for b in asked if faults[b.name])
    if not fit:
        raise CurvlabError(
            f"no block is a sum of Kronecker products: {skipped or 'none was named'}"
        )
    return fit, skipped


def _guard(chosen: Sequence[Block], closure: Closure, kind: Kind, matrices: int) -> None:
    """Refuse blocks of which `matrices` dense ones do not fit in memory."""
    objective = closure.objective
    places = closure.form.places
    remedy = 'leave it out: blocks=["' + '", "'.join(b.name for b in chosen[1:3]) + '", …]'
    for block in chosen:
        needed = matrices * block.numel**2 * objective.dtype.itemsize
        guard_memory(needed, f"comparing dense matrices of {block}", remedy)
        if kind not in PASS_OF_KIND:
            guard_preactivation_hessians(block, len(closure.x), places[block.name], objective.dtype)


def _dataset(
    found: dict[str, Columns],
    chosen: Sequence[Block],
    table: dict[str, str],
    dimension: dict[str, list[str]],
    closure: Closure,
    attributes: dict[str, str | float],
) -> xr.Dataset:
    (other,) = dimension
    names = [b.name for b in chosen]
    data = {}
    for variable, long_name in table.items():
        if variable not in found[names[0]]:
            continue
        values = np.array([found[name][variable] for name in names])
        dims = ("block",) if values.ndim == 1 else (other, "block")
        data[variable] = (dims, values.T, {"long_name": long_name, "units": "1"})
    places = closure.form.places
    coords = {
        other: (other, dimension[other], {"long_name": other}),
        "block": ("block", names, {"long_name": "block"}),
        "parameters": (
            "block",
            [", ".join(b.params) for b in chosen],
            {"long_name": "parameters of the block"},
        ),
        "order": (
            "block",
            [b.numel for b in chosen],
            {"long_name": "order D = O I of the block's matrix", "units": "1"},
        ),
        "places": (
            "block",
            [places[b.name] for b in chosen],
            {"long_name": "places T of the shared weight", "units": "1"},
        ),
    }
    size = {
        "examples": len(closure.x),
        "dtype": str(closure.objective.dtype).removeprefix("torch."),
    }
    return xr.Dataset(data, coords, attributes | size)
