"""Whether numbers are finite, at the speed of a sum.

And whether they may be looked at without waiting.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

_LATE = ContextVar("late", default=False)


def all_finite(values: Tensor) -> bool:
    """Return whether no entry is NaN or Inf.

    The sum is finite, or, where that overflows, it is seen entry by entry (30 times slower).
    """
    return cmath.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def lengths(tensors: Iterable[Tensor]) -> Tensor:
    """Return the length of each tensor, [n].

    NaN or Inf where an entry is, and where its squares overflow.
    """
    return torch.stack(torch._foreach_norm(list(tensors)))


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """Return the length of all tensors together, which waits for the device.

    NaN or Inf where an entry is, and where the squares of one of them overflow.
    """
    each = torch._foreach_norm(list(tensors))
    # reading is cheap there
    numbers = (
        [n.item() for n in each] if each[0].device.type == "cpu" else torch.stack(each).tolist()
    )
    return math.hypot(*numbers)


def all_short(tensors: Iterable[Tensor]) -> bool:
    """Return whether no entry is NaN or Inf, and the squared length is within the dtype.

    It is the length of all together, which waits for the device.
    """
    found = list(tensors)
    return joint_norm(found) < longest(found[0].dtype)


@cache
def longest(dtype: torch.dtype) -> float:
    """Return the length whose square is the largest number of the dtype."""
    return math.sqrt(torch.finfo(dtype).max)


def waits(like: Tensor) -> bool:
    """Return whether reading a number would wait for a device, or is to be done as if (`late`)."""
    return like.device.type != "cpu" or _LATE.get()


@contextmanager
def late() -> Iterator[None]:
    """Leave numbers where they lie inside."""
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)
