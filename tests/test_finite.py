"""Finite or not, by the sum and entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvlab.finite import all_finite

numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(numbers, max_size=8))
def test_as_entry_by_entry(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    assert all_finite(tensor) is bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        (torch.full((4,), 3e38), True),  # the sum overflows
        (torch.tensor([torch.inf, -torch.inf]), False),
        (torch.tensor([1.0, torch.nan]), False),
        (torch.zeros(0), True),
        (torch.tensor([1, 2]), True),
        (torch.tensor([True, False]), True),
        (torch.tensor([1 + 2j, 1j]), True),
        (torch.tensor([1.0, complex(0, torch.nan)]), False),
        (torch.tensor([complex(torch.inf, 0), complex(-torch.inf, 0)]), False),
        (torch.full((9,), 6e4).half(), True),
    ],
)
def test_edges(values: Tensor, finite: bool) -> None:
    assert all_finite(values) is finite
