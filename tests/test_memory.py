"""Advice on memory changes nothing but its speed."""

from __future__ import annotations

import pytest
import torch

from curvlab.system.memory import in_huge_pages, keep_freed_memory


@pytest.mark.parametrize("size", [0, 1, 1000, 3 << 20, (5 << 20) + 7])
def test_huge_pages_are_the_same_tensor(size: int) -> None:
    fresh = torch.empty(size)
    found = in_huge_pages(fresh)
    assert found is fresh
    found.fill_(3.0)
    assert float(found.double().sum()) == 3.0 * size


def test_freed_memory_may_be_kept_more_than_once() -> None:
    keep_freed_memory()
    keep_freed_memory()
    assert torch.ones(1 << 20).sum() == 1 << 20
