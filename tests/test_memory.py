"""Advice on memory changes nothing but its speed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from forked import forked

from curvlab.system.memory import in_huge_pages, keep_freed_memory


@pytest.mark.parametrize("size", [0, 1, 1000, 3 << 20, (5 << 20) + 7])
def test_huge_pages_are_the_same_tensor(size: int) -> None:
    fresh = torch.empty(size)
    found = in_huge_pages(fresh)
    assert found is fresh
    found.fill_(3.0)
    assert float(found.double().sum()) == 3.0 * size


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_and_may_be_asked_for_more_than_once() -> None:
    """In a fork, since it is for good: 64 MB that are freed go back to the system before, and stay
    after.
    """

    def work() -> None:
        def stays() -> float:
            before = resident()
            large = torch.ones(16 << 20)
            top = resident()
            del large
            return (resident() - before) / (top - before)

        print(stays() < 0.1)
        keep_freed_memory()
        keep_freed_memory()
        print(stays() > 0.9)

    assert forked(work) == (0, "True\nTrue\n")
