"""Base matrices H_k of structured quasi-Newton methods, of a sample of the minibatch.

As products, or as rows where there are few (S2QN (4), (5), (14)).

Legend: D parameters, K columns, r rows of a low-rank base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from curvlab.closure import Closure
from curvlab.curvature.whole_vector import part, subset
from curvlab.exact.batches import Kind
from curvlab.exact.torch_func import Function
from curvlab.observation import Pass

Base = Literal["hessian", "fisher", "none"]
"""Kinds of base matrix.

Subsampled Hessian, (4); second moment of the gradients at `labels`: exact (GGN = Fisher, (5)),
model, data (EFIM); none.
"""

_KINDS: dict[Pass, Kind] = {
    "exact": "fisher",
    "model": "fisher-mc",
    "data": "ef",
    "token": "ef-token",
}

_ROWS = 1 << 26  # numbers in Q: beyond, products with the base take less time and room


@dataclass(frozen=True)
class Subsample:
    """Base matrix H_k: the mean over S_H of a kind of matrix, as products.

    Where it has few rows, these are kept as Q.
    """

    size: int
    product: Callable[[Float[Tensor, "D K"]], Float[Tensor, "D K"]]
    Q: Float[Tensor, "D r"] | None = None


def sampled(closure: Closure, wanted: int) -> Closure:
    """Return S_H: so many examples, drawn from the minibatch.

    By a generator that depends on the objective's seed and the closure alone; the closure itself
    where it has no more.
    """
    return part(closure, subset(closure, wanted)) if wanted < len(closure.x) else closure


def subsampled(
    closure: Closure, base: Base, labels: Pass, rows: bool, seen: Callable[[int], None]
) -> Subsample:
    """Return H_k of all examples of a closure.

    Args:
        closure: S_H.
        base: "hessian", or "fisher" at `labels`.
        labels: of a base "fisher".
        rows: whether to look for rows, and to take them where that is worth it.
        seen: told of the examples that products with the base, and its rows, have seen.
    """
    size = len(closure.x)
    kind: Kind = "hessian" if base == "hessian" else _KINDS[labels]
    Q = _rows(closure, labels) if rows else None
    if Q is not None:
        seen(size)
        return Subsample(size, lambda v: Q @ (Q.mT @ v), Q)
    apply = Function(closure, closure.objective.layout).product(kind, 1)

    def product(v: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        seen(size * v.shape[1])
        return apply(v.mT.contiguous()).mT / size

    return Subsample(size, product)


def _rows(closure: Closure, labels: Pass) -> Float[Tensor, "D r"] | None:
    """Return Q of H = Q Qᵀ, (14), where it is worth it; else None."""
    blocks, width = closure.objective.blocks, len(closure.objective.layout)
    statistics = closure.observe({labels}, move_buffers=False).passes[labels]
    if not all(b.name in statistics and statistics[b.name].structured for b in blocks):
        return None
    count = statistics[blocks[0].name].vectors * len(closure.x)
    if count >= width or count * width > _ROWS:
        return None
    rows = [statistics[b.name].rows.flatten(2).flatten(0, 1) for b in blocks]
    return torch.cat(rows, 1).mT / math.sqrt(len(closure.x))
