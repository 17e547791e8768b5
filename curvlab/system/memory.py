"""How this process uses memory."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page
_MADV_HUGEPAGE = 14
_AT_HAND = 1 << 17  # numbers of a portion: half a megabyte of single precision

T = TypeVar("T")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, so that large matrices reuse the same pages.

    It is for scripts that make many of them, and the command line does it. Fresh pages cost more
    than most arithmetic on them: a third of a dense 5140² block, 12 % of the default `curvlab
    compare`. Does nothing where there is no glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-4, 0)  # M_MMAP_MAX: nothing by mmap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Return the same tensor; where it is large and fresh, ask Linux to back it with huge pages.

    Those are cheaper to fill. It is only advice: nothing happens where the kernel has none to give,
    or on other systems and devices.
    """
    libc = _libc()
    size = fresh.numel() * fresh.element_size()
    if libc is None or fresh.device.type != "cpu" or size < 4 * _HUGE:
        return fresh
    start = -(-fresh.data_ptr() // _HUGE) * _HUGE
    end = (fresh.data_ptr() + size) // _HUGE * _HUGE
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_MADV_HUGEPAGE))
    return fresh


def portions(items: Iterable[T], of: Callable[[T], Tensor]) -> Iterator[list[T]]:
    """Yield the items in lists whose tensors fit a processor's cache together; on a GPU all in one.

    For work that goes over the same numbers several times; a list for every item would cost more
    calls than it saves.

    Args:
        items: in their order.
        of: an item → its tensor.
    """
    some, numbers = list[T](), 0
    for item in items:
        t = of(item)
        if some and numbers + t.numel() > _AT_HAND and t.device.type == "cpu":
            yield some
            some, numbers = [], 0
        some.append(item)
        numbers += t.numel()
    if some:
        yield some


def tensors(state: object) -> Iterator[Tensor]:
    """Yield all tensors of a state, of dictionaries in dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from tensors(value)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
