"""Packed second moments of outer products against sums of Kronecker products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import total
from problems import assert_near, normal
from torch import Tensor

from curvlab.linalg import packed as pk

FEW = settings(deadline=None, max_examples=25)
SIZE = st.integers(1, 4)
SEEDS = st.integers(0, 999)


def dense(g: Tensor, a: Tensor) -> Tensor:
    """Σₙ (Σ_v g gᵀ) ⊗ a aᵀ, one term at a time."""
    return total(
        torch.kron(torch.outer(gv, gv), torch.outer(an, an))
        for vector in g
        for gv, an in zip(vector, a, strict=True)
    )


def packing(
    g: Tensor, a: Tensor, old: float = 0.0, new: float = 1.0, packed: Tensor | None = None
) -> Tensor:
    o, i = g.shape[2], a.shape[1]
    if packed is None:
        packed = a.new_full((o * (o + 1) // 2, i * (i + 1) // 2), 0.0)
    return pk.accumulate_(packed, pk.output_pairs(g), a, old, new)


@FEW
@given(st.integers(1, 3), SIZE, SIZE, SIZE, SEEDS)
def test_sum_of_kronecker_products(v: int, n: int, o: int, i: int, seed: int) -> None:
    g, a = normal(v, n, o, seed=seed), normal(n, i, seed=seed + 1)
    found = pk.unpack_full(packing(g, a), o, i)
    assert_near(found, dense(g, a))
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("active", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_inputs_without_pairs_are_zero(active: list[int]) -> None:
    """Packed on the active inputs alone, dense on all of them."""
    g, a = normal(2, 5, 3), torch.zeros(5, 4, dtype=torch.float64)
    a[:, active] = normal(5, len(active), seed=1)
    packed = (
        pk.accumulate_(
            a.new_zeros(6, len(active) * (len(active) + 1) // 2),
            pk.output_pairs(g),
            a[:, active],
            old=0.0,
            new=1.0,
        )
        if active
        else a.new_zeros(6, 0)
    )
    assert_near(pk.unpack_full(packed, 3, 4, torch.tensor(active, dtype=torch.int64)), dense(g, a))


@pytest.mark.parametrize(("order", "count"), [(1, 1), (5, 3), (129, 4), (700, 2)])
def test_second_moments_by_panels(order: int, count: int) -> None:
    """Lower triangle alone, then mirrored; 129 is one more than a panel of the product, 700 more
    than one of the mirror.
    """
    rows, more = normal(count, order), normal(count, order, seed=1)
    matrix = torch.zeros(order, order, dtype=torch.float64)
    pk.accumulate_second_moment_(matrix, rows, 0.5)
    pk.accumulate_second_moment_(matrix, more, 2.0)
    expected = 0.5 * rows.T @ rows + 2 * more.T @ more
    assert_near(matrix.tril(), expected.tril())
    assert pk.mirror_(matrix) is matrix
    assert_near(matrix, expected)
    assert torch.equal(matrix, matrix.T)


@FEW
@given(st.integers(1, 3), SIZE, SIZE, SIZE, SIZE, SIZE, SEEDS)
def test_products_between_two_layers(
    v: int, n: int, o: int, i: int, p: int, j: int, seed: int
) -> None:
    """new · Σₙ (Σ_v g g'ᵀ) ⊗ (a a'ᵀ), added to what is there."""
    g, a = (
        (normal(v, n, o, seed=seed), normal(v, n, p, seed=seed + 1)),
        (normal(n, i, seed=seed + 2), normal(n, j, seed=7)),
    )
    start = normal(o * i, p * j, seed=8)
    found = start.clone()
    pk.accumulate_between_(found, g, a, 0.3)
    products = [
        torch.kron(torch.outer(g[0][u, m], g[1][u, m]), torch.outer(a[0][m], a[1][m]))
        for u in range(v)
        for m in range(n)
    ]
    assert_near(found, start + 0.3 * sum(products))


def test_pack_pairs_of_hessians() -> None:
    hessians = normal(5, 3, 3)
    expected = torch.stack([hessians[:, o, p] for o in range(3) for p in range(o + 1)])
    assert torch.equal(pk.pack_pairs(hessians), expected)


@pytest.mark.parametrize("v", [1, 3])
def test_output_pairs_are_the_lower_triangle_row_by_row(v: int) -> None:
    g = normal(v, 5, 3)
    found = pk.output_pairs(g)
    for n in range(5):
        G = total(torch.outer(one, one) for one in g[:, n])
        assert_near(found[:, n], torch.stack([G[o, p] for o in range(3) for p in range(o + 1)]))


@FEW
@given(st.integers(1, 2), SIZE, SIZE, SIZE, st.floats(0, 2), st.floats(0, 2), SEEDS)
def test_folding_in(v: int, n: int, o: int, i: int, old: float, new: float, seed: int) -> None:
    """old · packed + new · sum, in place."""
    g, a, g2, a2 = (
        normal(v, n, o, seed=seed),
        normal(n, i, seed=seed + 1),
        normal(v, n, o, seed=seed + 2),
        normal(n, i, seed=1),
    )
    packed = packing(g, a)
    assert packing(g2, a2, old, new, packed) is packed
    expected = old * dense(g, a) + new * dense(g2, a2)
    assert_near(pk.unpack_full(packed, o, i), expected)


def test_nothing_of_the_old_remains_at_old_zero() -> None:
    """Memory that was never written may hold NaN."""
    g, a = normal(1, 4, 2), normal(4, 3)
    packed = a.new_full((3, 6), float("nan"))
    assert_near(pk.unpack_full(packing(g, a, packed=packed), 2, 3), dense(g, a))


@pytest.mark.parametrize("pairs", [0, 1, 7, 8, 9, 13, 14, 15, 27, 28, 29])
@pytest.mark.parametrize("v", [1, 2])
def test_chunk_boundaries(monkeypatch: pytest.MonkeyPatch, pairs: int, v: int) -> None:
    """7 inputs make 28 pairs, cut at every place that can go wrong; each chunk is blended once."""
    g, a, g2, a2 = (
        normal(v, 5, 2),
        normal(5, 7, seed=1),
        normal(v, 5, 2, seed=2),
        normal(5, 7, seed=3),
    )
    monkeypatch.setattr(pk, "_CHUNK_BYTES", 8 * 5 * pairs)
    packed = packing(g2, a2, 0.25, 0.75, packing(g, a))
    assert_near(pk.unpack_full(packed, 2, 7), 0.25 * dense(g, a) + 0.75 * dense(g2, a2))


@FEW
@given(SIZE, SIZE, st.floats(0, 5), SEEDS)
def test_lower_triangle_and_damping(o: int, i: int, damping: float, seed: int) -> None:
    g, a = normal(2, 3, o, seed=seed), normal(3, i, seed=seed + 1)
    found = pk.unpack_lower(packing(g, a), o, i, damping)
    assert_near(found.tril(), (dense(g, a) + damping * torch.eye(o * i, dtype=a.dtype)).tril())


@FEW
@given(st.sets(st.integers(0, 7), min_size=1), st.sets(st.integers(0, 7)), st.integers(1, 3), SEEDS)
def test_grow_keeps_the_matrix(old: set[int], more: set[int], o: int, seed: int) -> None:
    """Inputs that were zero so far: the matrix of the larger input is the small one with zeros
    between.
    """
    before, after = torch.tensor(sorted(old)), torch.tensor(sorted(old | more))
    g = normal(2, 4, o, seed=seed)
    a = torch.zeros(4, 8, dtype=g.dtype)
    a[:, before] = normal(4, len(before), seed=seed + 1)
    grown = pk.grow(packing(g, a[:, before]), before, after)
    assert_near(pk.unpack_full(grown, o, len(after)), dense(g, a[:, after]))
    assert_near(grown, packing(g, a[:, after]))
    a2, g2 = normal(4, len(after), seed=seed + 2), normal(2, 4, o, seed=seed + 3)
    assert_near(
        pk.unpack_full(packing(g2, a2, 1.0, 1.0, grown), o, len(after)),
        dense(g, a[:, after]) + dense(g2, a2),
    )


def test_grow_to_the_same_inputs_changes_nothing() -> None:
    packed, inputs = packing(normal(1, 4, 2), normal(4, 3)), torch.tensor([1, 4, 6])
    assert torch.equal(pk.grow(packed, inputs, inputs), packed)
