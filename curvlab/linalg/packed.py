"""Sums Σₙ Gₙ ⊗ aₙ aₙᵀ as one packed symmetric product, at a quarter of the work.

They are the exact second moment of outer products. The matrix is symmetric in the pair of outputs
and, separately, in the pair of inputs, so that P · Q numbers hold all of it, and they are **one**
matrix product of pairs: 2 N P Q floating-point operations against 2 N (OI)² in full.

Legend: N examples, O outputs, I inputs, P = O(O+1)/2 pairs of outputs, Q = I(I+1)/2 pairs of
inputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from curvlab.system.memory import in_huge_pages

# of pairs of inputs at a time, so that they stay in the cache: 47 ms against 93 ms for all at once
_CHUNK_BYTES = 6 << 20

_SMALL = 1 << 20  # numbers of a matrix, of which a copy costs less than many calls


def output_pairs(g: Float[Tensor, "V N O"]) -> Float[Tensor, "P N"]:
    """Return Σ_v g_o g_o' of each example for o ≥ o', pairs row by row, [P, N].

    It is the lower triangle of Gₙ.
    """
    # a contiguous copy first takes twice as long
    return pack_pairs(g.permute(1, 2, 0) @ g.permute(1, 0, 2))


def accumulate_(
    packed: Float[Tensor, "P Q"],
    pairs: Float[Tensor, "P N"],
    a: Float[Tensor, "N I"],
    old: float,
    new: float,
) -> Float[Tensor, "P Q"]:
    """Set packed ← old · packed + new · Σₙ pairsₙ ⊗ lower(aₙ aₙᵀ), in place.

    Both scales are fused into the matrix products.
    """
    columns = a.T.contiguous()  # [I, N]
    inputs, size = columns.shape
    buffer = columns.new_empty(max(inputs, _CHUNK_BYTES // (columns.element_size() * size)), size)
    start = filled = 0
    # The pairs (i, ·) of an input are never cut, and every column of `packed` is written by one
    # product: so `beta=old` scales each number once, and no pass over `packed` goes to that alone.
    for i in range(inputs):
        torch.mul(columns[: i + 1], columns[i], out=buffer[filled : filled + i + 1])
        filled += i + 1
        if i + 1 == inputs or filled + i + 2 > len(buffer):
            packed[:, start : start + filled].addmm_(pairs, buffer[:filled].T, beta=old, alpha=new)
            start, filled = start + filled, 0
    return packed


@lru_cache(maxsize=64)
def _places(inputs: int, device: torch.device) -> Int[Tensor, " II"]:
    """Return, for every entry of an [I, I] symmetric matrix, its place among the pairs."""
    i = torch.arange(inputs, device=device)
    high, low = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
    return (high * (high + 1) // 2 + low).flatten()


def unpack_lower(
    packed: Float[Tensor, "P Q"], outputs: int, inputs: int, damping: float = 0.0
) -> Float[Tensor, "D D"]:
    """Return the dense [OI, OI] matrix plus damping · I, written in its lower triangle only.

    Blocks (o, o') with o < o' are **not written**: the lower triangle is whole.
    """
    matrix = packed.new_empty(outputs * inputs, outputs * inputs)
    blocks = matrix.view(outputs, inputs, outputs, inputs)
    places = _places(inputs, packed.device)
    for o in range(outputs):
        first = o * (o + 1) // 2
        row = packed[first : first + o + 1].index_select(1, places).view(o + 1, inputs, inputs)
        blocks[o, :, : o + 1].copy_(row.transpose(0, 1))
    matrix.diagonal().add_(damping)
    return matrix


def unpack_full(
    packed: Float[Tensor, "P Q"], outputs: int, inputs: int, active: Int[Tensor, " J"] | None = None
) -> Float[Tensor, "D D"]:
    """Return the dense symmetric [OI, OI] matrix.

    `active`: the inputs that `packed` is on, the rest being zero.
    """
    matrix = in_huge_pages(packed.new_empty(outputs * inputs, outputs * inputs))
    blocks = matrix.view(outputs, inputs, outputs, inputs)
    places = _places(inputs, packed.device)
    idle = active is not None and len(active) < inputs
    if active is not None and idle:
        places = _places_among(active, inputs, packed.shape[1])
    if matrix.numel() < _SMALL:  # three calls in all, where the loop below has six for every output
        if idle:
            packed = torch.cat([packed, packed.new_zeros(len(packed), 1)], 1)
        every = packed.index_select(1, places).index_select(0, _places(outputs, packed.device))
        blocks.copy_(every.view(outputs, outputs, inputs, inputs).transpose(1, 2))
        return matrix
    for o in range(outputs):
        first = o * (o + 1) // 2
        row = packed[first : first + o + 1]
        if idle:
            row = torch.cat([row, row.new_zeros(o + 1, 1)], 1)
        # block (o, o') is symmetric, and block (o', o) too
        row = row.index_select(1, places).view(o + 1, inputs, inputs)
        blocks[o, :, : o + 1].copy_(row.transpose(0, 1))
        blocks[:o, :, o].copy_(row[:o])
    return matrix


def _places_among(active: Int[Tensor, " J"], inputs: int, last: int) -> Int[Tensor, " II"]:
    """Return the places as `_places` does where only some inputs have pairs.

    The others' place is `last`.
    """
    places = torch.full((inputs, inputs), last, device=active.device)
    places[active[:, None], active] = _places(len(active), active.device).view(
        len(active), len(active)
    )
    return places.flatten()


def accumulate_second_moment_(
    matrix: Float[Tensor, "D D"], rows: Float[Tensor, "R D"], new: float
) -> None:
    """Add new · rowsᵀ rows to the lower triangle of `matrix`, in place, panel by panel.

    That is half the work; `mirror_` fills the upper triangle.
    """
    order = len(matrix)
    panel = max(64, order // 16)  # narrower ones lose more to the product than they save
    for start in range(0, order, panel):
        stop = min(start + panel, order)
        matrix[start:, start:stop].addmm_(rows[:, start:].mT, rows[:, start:stop], alpha=new)


@lru_cache(maxsize=64)
def _lower(order: int, device: torch.device) -> Bool[Tensor, "D D"]:
    return torch.ones(order, order, dtype=torch.bool, device=device).tril()


def mirror_(matrix: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Copy the lower triangle onto the upper one, in place, and return the matrix."""
    order, panel = len(matrix), 128
    if order <= 2 * panel:  # in the cache: one pass over all of it, in place of eight calls
        return matrix.copy_(torch.where(_lower(order, matrix.device), matrix, matrix.mT))
    for start in range(0, order, panel):
        stop = min(start + panel, order)
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].mT
    return matrix


def accumulate_between_(
    matrix: Float[Tensor, "D D2"],
    g: tuple[Float[Tensor, "V N O"], Float[Tensor, "V N O2"]],
    a: tuple[Float[Tensor, "N I"], Float[Tensor, "N I2"]],
    new: float,
) -> None:
    """Add new · Σₙ (Σ_v g g'ᵀ) ⊗ (a a'ᵀ) between two layers to `matrix`, in place.

    It takes 1/V of the work of the rows.
    """
    outputs, others = g[0].shape[2], g[1].shape[2]
    pairs = torch.einsum("vno,vnp->opn", *g).reshape(outputs * others, -1)
    size, inputs = a[0].shape
    width = a[1].shape[1]
    target = matrix.view(outputs, inputs, others, width)
    at_once = max(1, _CHUNK_BYTES // (matrix.element_size() * size * width))
    for start in range(0, inputs, at_once):
        some = a[0][:, start : start + at_once]
        products = (some[:, :, None] * a[1][:, None, :]).flatten(1)
        found = (pairs @ products).view(outputs, others, -1, width)
        target[:, start : start + at_once].add_(found.transpose(1, 2), alpha=new)


def pack_pairs(G: Float[Tensor, "N O O"]) -> Float[Tensor, "P N"]:
    """Return the lower triangles of all Gₙ, pairs row by row, [P, N]."""
    rows, cols = torch.tril_indices(G.shape[1], G.shape[1], device=G.device)
    return G.flatten(1).index_select(1, rows * G.shape[1] + cols).T


def fold(
    packed: Float[Tensor, "P Q"] | None,
    active: Int[Tensor, " J"] | None,
    pairs: Float[Tensor, "P N"],
    a: Float[Tensor, "N I"],
    old: float,
    new: float,
) -> tuple[Float[Tensor, "P Q2"], Int[Tensor, " K"]]:
    """Return `accumulate_` on those inputs alone that have ever been non-zero.

    The others' rows and columns are zero, exactly.

    Returns:
        (packed, active): the sum, and the numbers of its inputs, ascending.
    """
    seen = (a != 0).any(0)
    if packed is None or active is None:
        active = seen.nonzero()[:, 0]
        packed = a.new_zeros(len(pairs), len(active) * (len(active) + 1) // 2)
    else:
        seen[active] = True
        union = seen.nonzero()[:, 0]
        if len(union) > len(active):
            packed, active = grow(packed, active, union), union
    return accumulate_(packed, pairs, a[:, active], old, new), active


def grow(
    packed: Float[Tensor, "P Q"], old: Int[Tensor, " J"], new: Int[Tensor, " I"]
) -> Float[Tensor, "P Q2"]:
    """Return the same packed matrix on more inputs; the new pairs are zero.

    `old` and `new` are ascending input numbers, old within new.
    """
    place = torch.searchsorted(new, old)
    rows, cols = torch.tril_indices(len(old), len(old), device=packed.device)
    high, low = place[rows], place[cols]  # ascending, so high ≥ low
    out = packed.new_zeros(len(packed), len(new) * (len(new) + 1) // 2)
    out[:, high * (high + 1) // 2 + low] = packed
    return out
