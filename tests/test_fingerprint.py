"""Checksums: the same for the same numbers however they lie in memory, another one for any
other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curvlab.fingerprint import Unchanging, each, examples, mixed, numbers

REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*REAL, *WHOLE, torch.complex64, torch.complex128)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
WIDTHS = (0, 1, 2, 3, 5, 7, 8, 9, 257)


def made(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if dtype in WHOLE:
        return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=draw).to(dtype)
    return torch.randn(
        shape, generator=draw, dtype=torch.complex128 if dtype.is_complex else torch.float64
    ).to(dtype)


# ------------------------------------------------------------------------------------------------
# examples


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_neither_order_nor_where_minibatches_are_cut_matters(
    width: int, dtype: torch.dtype
) -> None:
    x, y = made(dtype, 11, width), made(torch.int64, 11, seed=1)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    whole = examples(x, y)
    assert whole == examples(x[order], y[order])
    for sizes in ([4, 4, 3], [1] * 11, [10, 1]):
        parts = zip(x[order].split(sizes), y[order].split(sizes), strict=True)
        assert whole == sum(examples(*part) for part in parts)
    assert torch.equal(each(x, y)[order], each(x[order], y[order]))


@dtypes
@pytest.mark.parametrize("width", WIDTHS)
def test_how_they_lie_in_memory_does_not_matter(width: int, dtype: torch.dtype) -> None:
    x = made(dtype, 6, width)
    turned = x.mT.contiguous().mT
    wide = torch.cat([made(dtype, 6, 1), x, made(dtype, 6, 2)], 1)[:, 1 : width + 1]
    odd = torch.cat([made(dtype, 1), x.flatten()])[1:].view(6, width)
    for same in (turned, wide, odd, x.clone().requires_grad_(dtype.is_floating_point)):
        assert torch.equal(each(same), each(x))
    if dtype.is_complex:
        assert torch.equal(each(x.conj()), each(x.conj().resolve_conj()))
        assert torch.equal(each(x.conj().imag), each(x.conj().imag.resolve_neg()))


@dtypes
def test_any_entry_of_any_example_shows(dtype: torch.dtype) -> None:
    x = made(dtype, 4, 5)
    before = each(x)
    for n in range(4):
        for i in range(5):
            other = x.clone()
            other[n, i] = ~other[n, i] if dtype == torch.bool else other[n, i] + 1
            assert (each(other) != before).tolist() == [n == k for k in range(4)]


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_signs_and_exchanged_entries_show(dtype: torch.dtype) -> None:
    """Two signs flip the highest bits of two words: by odd multipliers alone they would be 2⁶³ +
    2⁶³ = 0.
    """
    x = made(dtype, 1, 24)
    seen = {int(each(x))}
    for i in range(24):
        for j in range(i):
            signs, exchanged = x.clone(), x.clone()
            signs[0, [i, j]] *= -1
            exchanged[0, [i, j]] = x[0, [j, i]]
            seen |= {int(each(signs)), int(each(exchanged))}
    assert len(seen) == 1 + 2 * 276


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_all_signs_at_once_show(dtype: torch.dtype) -> None:
    """Whatever the signs were: 2^width rows of ones, all different, and none is its own
    negative.
    """
    for width in (1, 2, 4, 8):
        x = 1.0 - 2 * (torch.arange(2**width)[:, None] >> torch.arange(width) & 1)
        assert len(set(each(x.to(dtype)).tolist())) == 2**width
        assert len({int(numbers([row.to(dtype)])) for row in x}) == 2**width


def test_targets_belong_to_their_inputs_and_an_example_counts_as_often_as_it_is_there() -> None:
    x, y = made(torch.float64, 4, 3), torch.tensor([0, 1, 2, 3])
    assert examples(x, y) != examples(x, y[[1, 0, 2, 3]])
    assert examples(x, y) != examples(x[[0, 0, 1, 2]], y[[0, 0, 1, 2]])
    assert examples(x, y) != examples(y, x)
    assert examples(x, x) == examples(x, x.clone())
    assert examples(x[:2], y[:2]) != examples(x, y)


def test_shapes_and_dtypes_show() -> None:
    zeros = [
        torch.zeros(2, 3),
        torch.zeros(2, 4),
        torch.zeros(2, 2, 2),
        torch.zeros(2, 4).double(),
        torch.zeros(2, 0),
    ]
    assert len({int(examples(z)) for z in zeros}) == len(zeros)


def test_values_that_are_no_numbers_are_themselves() -> None:
    x = torch.tensor([[torch.nan, 1.0], [torch.inf, -torch.inf], [0.0, -0.0]])
    assert torch.equal(each(x), each(x.clone()))
    assert examples(x) != examples(x.nan_to_num())
    assert examples(x) != examples(x.abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
def test_sparse_inputs(dtype: torch.dtype) -> None:
    dense = made(dtype, 6, 4, 3) * (made(torch.int64, 6, 4, 3, seed=3) > 70)
    dense[2] = 0
    x = dense.to_sparse()
    shuffled = torch.randperm(x._nnz(), generator=torch.Generator().manual_seed(0))
    other = torch.sparse_coo_tensor(
        x.indices()[:, shuffled], x.values()[shuffled], x.shape, check_invariants=True
    )
    assert not other.is_coalesced()
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    assert torch.equal(each(x), each(other))
    assert torch.equal(each(x)[order], each(x.index_select(0, order)))
    assert examples(x) == sum(examples(x.index_select(0, torch.tensor([n]))) for n in range(6))
    moved = torch.sparse_coo_tensor(
        (x.indices() + torch.tensor([[0], [0], [1]])) % torch.tensor([[6], [4], [3]]),
        x.values(),
        x.shape,
    )
    assert [bool(a == b) for a, b in zip(each(x), each(moved), strict=True)] == [
        n == 2 for n in range(6)
    ]
    assert examples(x) != examples((2 * dense).to_sparse())
    hybrid = dense.to_sparse(2)
    assert examples(hybrid) == examples(hybrid.index_select(0, order))
    if dtype != torch.int64:
        assert examples(dense.flatten(1).to_sparse_csr()) == examples(dense.flatten(1).to_sparse())


def test_nests() -> None:
    x, z = made(torch.float32, 4, 3), made(torch.float32, 4, 2)
    nest = {"x": x, "more": [z, (x,)]}
    order = torch.tensor([2, 0, 3, 1])
    assert examples(nest, z) == examples({"x": x[order], "more": [z[order], (x[order],)]}, z[order])
    assert examples(nest, z) != examples({"more": x, "x": [z, (x,)]}, z)
    assert examples(nest, z) != examples(nest | {"more": [z, (z,)]}, z)
    assert len(each({}, ())) == 0
    # what belongs to none belongs to all
    assert examples(x, torch.tensor(3.0)) != examples(x, torch.tensor(2.0))


def test_under_any_mode() -> None:
    x = made(torch.float32, 4, 3)
    expected, weights = examples(x), numbers([x])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert expected == examples(x) == examples(x.clone())
            assert torch.equal(weights, numbers([x]))
    with torch.inference_mode():
        made_inside = x.clone()
    assert expected == examples(made_inside)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=50))
def test_mixing_is_one_to_one(values: list[int]) -> None:
    assert len(set(mixed(torch.tensor(values, dtype=torch.int64)).tolist())) == len(values)


@settings(max_examples=50)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.data())
def test_any_bit_shows(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor([values], dtype=torch.float32)
    other = x.clone()
    flipped = data.draw(st.integers(0, 32 * len(values) - 1))
    other.view(torch.int32)[0, flipped // 32] ^= (
        -(2**31) if flipped % 32 == 31 else 1 << flipped % 32
    )
    assert each(x) != each(other)
    assert not torch.equal(numbers([x]), numbers([other]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_a_gpu_as_on_the_cpu() -> None:
    x, y = made(torch.float32, 300, 257), made(torch.int64, 300, seed=1)
    assert torch.equal(each(x.cuda(), y.cuda()).cpu(), each(x, y))
    assert torch.equal(each(x.cuda(), y).cpu(), each(x, y))
    sparse = (x * (x > 1)).to_sparse()
    assert torch.equal(each(sparse.cuda()).cpu(), each(sparse))
    weights = [x, y, made(torch.float32, 3000, 257)]
    assert torch.equal(numbers(w.cuda() for w in weights).cpu(), numbers(weights))


# ------------------------------------------------------------------------------------------------
# weights

SIZES = ((3,), (), (0,), (5, 7), (257, 257), (300, 301))


@dtypes
def test_the_same_weights_whoever_adds_them_up(dtype: torch.dtype) -> None:
    weights = [made(dtype, *size) for size in SIZES]
    found, threads = numbers(weights), torch.get_num_threads()
    assert torch.equal(found, numbers([w.clone() for w in weights]))
    assert torch.equal(
        found, numbers([w.mT.contiguous().mT if w.ndim == 2 else w for w in weights])
    )
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(found, numbers(weights))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("size", [(4, 5), (257, 257), (300, 301)])
def test_every_edit_shows(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Signs, order, scale, one last bit; small tensors, and large ones that are added up in
    parts.
    """
    w = made(dtype, *size)
    last = w.clone()
    last.view(
        torch.int64
        if dtype == torch.float64
        else torch.int32
        if dtype == torch.float32
        else torch.int16
    )[-1, -1] ^= 1
    flat = w.flatten()
    apart = min(4096 * 64 // torch.finfo(dtype).bits, len(flat) // 2)  # the same place of two parts
    swapped = torch.cat([flat[apart : 2 * apart], flat[:apart], flat[2 * apart :]]).view(size)
    edits = [
        w,
        -w,
        w * 2,
        w + 1,
        w.flip(0),
        w.flip(1),
        w.roll(1, 0),
        w[:, torch.arange(size[1]).roll(1)],
        last,
        swapped,
        w * 0,
    ]
    one, two = w.clone(), w.clone()
    one[0, 0] *= -1
    two[[0, -1], [0, -1]] *= -1
    found = {tuple(numbers([e, torch.ones(2)]).tolist()) for e in (*edits, one, two)}
    assert len(found) == len(edits) + 2


def test_numbers_that_change_tensors_show() -> None:
    a, b = made(torch.float32, 4), made(torch.float32, 4, seed=1)
    large, other = made(torch.float32, 300, 300), made(torch.float32, 300, 300, seed=1)
    assert not torch.equal(numbers([a, b]), numbers([b, a]))
    assert not torch.equal(numbers([large, other]), numbers([other, large]))
    assert len(numbers([])) == 0


# ------------------------------------------------------------------------------------------------
# loaders


def test_a_pass_that_was_not_finished_is_none() -> None:
    pairs = [(made(torch.float32, 4, 2, seed=k), made(torch.int64, 4, seed=k)) for k in range(3)]
    watched = Unchanging(pairs)
    next(iter(watched))
    assert watched.first is None
    watched.check()
    assert watched.first is not None
    assert watched.first.count == 12
    watched.check()


def test_one_that_is_as_strict_is_not_watched_twice() -> None:
    loose, strict = Unchanging([]), Unchanging([], in_order=True)
    assert Unchanging.of(loose) is loose
    assert Unchanging.of(strict) is Unchanging.of(strict, in_order=True) is strict
    assert Unchanging.of(loose, in_order=True).in_order
