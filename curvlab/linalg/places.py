"""Second moments of rows Σ_t g_t a_tᵀ by pairs of places, Σ_ts (Σ_v g_t g_sᵀ) ⊗ a_t a_sᵀ.

That is thesis Theorem 3. The pairs (t, s) and (s, t) are each other's transposes, so that those
with s ≤ t are summed, s = t at half: M, and the matrix is M + Mᵀ. Where vector v has no derivative
at place t, as causality has it for the later places of a sequence, it takes no part in the pairs of
t.

Floating-point operations: 2 N O² Σ_t (t+1) V_t for the pairs of outputs, V_t the vectors that reach
place t (N V T² O² where all do, a third of it in a causal model); N T (T+7) O² I to bring the
inputs of s to them, and 2 N T D² those of t. By rows it is N V D² and 2 N V T D to form them. In
memory: the sum, and `_BYTES` (or the pairs of 8 places t in one example).

Legend: V vectors, N examples, T places, O outputs, I inputs, D = O I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_WIDTH = 128  # outputs of the places whose pairs are one product
_PLACES = 8  # t of the pairs that are there at once
_BYTES = 64 << 20  # in these pairs

Reach = Sequence[tuple[int, int]]
"""For every place the first of the vectors that reach it, and the one behind the last."""


def reached(g: Float[Tensor, "V N T O"]) -> Bool[Tensor, "V T"]:
    """Return whether a vector has any derivative at a place that is not exactly zero."""
    if not g.numel():
        return g.new_zeros(g.shape[0], g.shape[2], dtype=torch.bool)
    # two reductions that are vectorised, where `any` is not: 1.3 ms against 3.6 ms for 67 MB
    return ((g.amax(3) != 0) | (g.amin(3) != 0)).any(1)


def reach_of(g: Float[Tensor, "V N T O"]) -> Reach:
    """Return the range of vectors that reach each place; (0, 0) where none does."""
    some = reached(g)
    count = len(some)
    order = torch.arange(count, device=g.device)[:, None]
    first = torch.where(some, order, count).amin(0).tolist() if count else [0] * some.shape[1]
    stop = torch.where(some, order + 1, 0).amax(0).tolist() if count else [0] * some.shape[1]
    return [(a, b) if a < b else (0, 0) for a, b in zip(first, stop, strict=True)]


def everywhere(vectors: int, places: int) -> Reach:
    """Return the reach of vectors of which nothing is known: all reach all places."""
    return [(0, vectors)] * places


def work_of_pairs(reach: Reach, outputs: int, inputs: int) -> float:
    """Return the floating-point operations of `accumulate_pairs_` for one example."""
    places = len(reach)
    pairs = sum(2 * (t + 1) * (stop - first) for t, (first, stop) in enumerate(reach))
    return (
        outputs**2 * pairs
        + places * (places + 7) * outputs**2 * inputs
        + 2 * places * (outputs * inputs) ** 2
    )


def work_of_rows(vectors: int, places: int, outputs: int, inputs: int) -> float:
    """Return the floating-point operations of the same by rows, for one example."""
    numbers = outputs * inputs
    return vectors * numbers * (numbers + 2.0 * places)


def accumulate_pairs_(
    matrix: Float[Tensor, "D D"],
    g: Float[Tensor, "V N T O"],
    a: Float[Tensor, "N T I"],
    reach: Reach,
    old: float,
    new: float,
) -> Float[Tensor, "D D"]:
    """Set M ← old · M + new · Σₙ Σ_{s≤t} (Σ_v g_t g_sᵀ) ⊗ a_t a_sᵀ, s = t at half, in place.

    The second moment is M + Mᵀ (`symmetrize_`). With `old` 0 the memory need not be filled.
    """
    size, places, inputs = a.shape
    outputs = g.shape[3]
    target = matrix.view(outputs, inputs, outputs * inputs)
    started = False
    for start in range(0, places, _PLACES):
        stop = min(start + _PLACES, places)
        if all(first == last for first, last in reach[start:stop]):
            continue
        own = (stop - start) * stop * outputs**2
        at_once = min(size, max(1, _BYTES // (g.element_size() * own)))
        for n in range(0, size, at_once):
            some = slice(n, n + at_once)
            left = a[some, start:stop].flatten(0, 1).mT  # [I, N T]
            pairs = _pairs(g[:, some], reach, start, stop).flatten(0, 1)  # [N T, O, S, O]
            weighted = _earlier(a[some], start, stop).flatten(0, 1)  # [N T, S, I]
            right = g.new_empty(len(pairs), outputs, inputs)
            for o in range(outputs):  # so few numbers at a time that they stay in the cache
                torch.bmm(pairs[:, o].mT, weighted, out=right)
                target[o].addmm_(left, right.flatten(1), beta=1.0 if started else old, alpha=new)
            started = True
    if not started:
        return matrix.mul_(old) if old else matrix.zero_()
    return matrix


def _pairs(
    g: Float[Tensor, "V N T O"], reach: Reach, start: int, stop: int
) -> Float[Tensor, "N T2 O S O"]:
    """Return Σ_v g_t g_sᵀ for the places t from `start` on, s before `stop`.

    Where s > t they are not always formed, and zero.
    """
    size, outputs = g.shape[1], g.shape[3]
    found = g.new_zeros(size, stop - start, outputs, stop, outputs)
    step = max(1, _WIDTH // outputs)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        alive = [r for r in reach[low:high] if r[0] < r[1]]
        if not alive:
            continue
        some = g[min(first for first, _ in alive) : max(last for _, last in alive)]
        for n in range(size):
            out = found[n, low - start : high - start].flatten(0, 1).flatten(1)
            left = some[:, n, low:high].flatten(1).mT
            torch.mm(left, some[:, n, :high].flatten(1), out=out[:, : high * outputs])
    return found


def _earlier(a: Float[Tensor, "N T I"], start: int, stop: int) -> Float[Tensor, "N T2 S I"]:
    """Return the inputs a_s for each place t from `start` on: all with s < t, half of s = t."""
    t = torch.arange(start, stop, device=a.device)[:, None]
    s = torch.arange(stop, device=a.device)
    weight = (s < t).to(a.dtype) + 0.5 * (s == t).to(a.dtype)
    return a[:, None, :stop] * weight[:, :, None]


def symmetrize_(matrix: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Set M ← M + Mᵀ, in place, and return it."""
    order, panel = len(matrix), 128
    for start in range(0, order, panel):
        stop = min(start + panel, order)
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner + corner.mT)
        right, below = matrix[start:stop, stop:], matrix[stop:, start:stop]
        # transposed into memory of their own, which is blocked: 1.6 times as fast
        right += below.mT.contiguous()
        below.copy_(right.mT.contiguous())
    return matrix
