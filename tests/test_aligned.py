"""Products into padded rows, and symmetric ones by half, against plain products."""

from __future__ import annotations

import pytest
import torch
from problems import assert_near
from torch import Tensor

from curvlab.linalg.padded_products import padded_product, room, second_moment

SIZES = [1, 7, 127, 128, 129, 255, 256, 257, 300]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("rows", [1, 129])
def test_product(rows: int, columns: int) -> None:
    a, b = normal(rows, 33), normal(33, columns)
    assert_near(padded_product(a, b, 0.3), 0.3 * (a @ b))
    assert_near(padded_product(b.T, a.T, 0.3), 0.3 * (b.T @ a.T))


@pytest.mark.parametrize("order", SIZES)
@pytest.mark.parametrize("rows", [1, 40, 400])
def test_second_moment(rows: int, order: int) -> None:
    r = normal(rows, order)
    found = second_moment(r, 1 / rows)
    assert_near(found, r.T @ r / rows)
    # panels on the diagonal are computed whole, and both triangles of theirs are rounded
    assert torch.equal(found[64:, :64], found[:64, 64:].T) or order < 128 or rows < 192


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", SIZES)
def test_rows_of_large_results_start_on_cache_lines(columns: int, dtype: torch.dtype) -> None:
    memory = room(normal(1, dtype=dtype), 3, columns)
    assert (tuple(memory.shape), memory.dtype) == ((3, columns), dtype)
    width = memory.stride(0) * memory.element_size()
    assert width % 64 == 0 if columns >= 128 else memory.is_contiguous()
    assert 0 <= memory.stride(0) - columns < 64 // memory.element_size()
