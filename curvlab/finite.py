"""Whether numbers are finite, at the speed of a sum; and whether they may be looked at without
waiting.
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
    """No entry is NaN or Inf: the sum is finite, or, where that overflows, entry by entry (30 times
    slower).
    """
    return cmath.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def lengths(tensors: Iterable[Tensor]) -> Tensor:
    """Of each, [n]: NaN or Inf where an entry is, and where its squares overflow."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """Of all together; NaN or Inf where an entry is, and where the squares of one of them overflow.
    Waits for the device.
    """
    each = torch._foreach_norm(list(tensors))
    # reading is cheap there
    numbers = (
        [n.item() for n in each] if each[0].device.type == "cpu" else torch.stack(each).tolist()
    )
    return math.hypot(*numbers)


def all_short(tensors: Iterable[Tensor]) -> bool:
    """No entry of any is NaN or Inf, and the square of the length of all together is within the
    dtype. Waits for the device.
    """
    found = list(tensors)
    return joint_norm(found) < longest(found[0].dtype)


@cache
def longest(dtype: torch.dtype) -> float:
    """The length whose square is the largest number of the dtype."""
    return math.sqrt(torch.finfo(dtype).max)


def waits(like: Tensor) -> bool:
    """Whether to read a number would wait for a device, or is to be done as if it would
    (`late`).
    """
    return like.device.type != "cpu" or _LATE.get()


@contextmanager
def late() -> Iterator[None]:
    """Inside, numbers are left where they lie."""
    token = _LATE.set(True)
    try:
        yield
    finally:
        _LATE.reset(token)
