"""Checks of second moments: what is not finite is seen before an average takes it up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor

from curvlab.errors import Diverged
from curvlab.finite import all_finite, all_short, waits


def check_moments(moments: Iterable[tuple[str, str, Tensor]]) -> None:
    """Raise Diverged for the first second moment that is not finite: no average takes it up.

    They are given as (block's name, second moment's name, itself). The trace is looked at: no entry
    of a second moment exceeds its diagonal, which is positive. On a GPU, which would have to wait,
    `refresh` sees it.
    """
    found = list(moments)
    if not found or waits(found[0][2]):
        return
    diagonals = [m if m.ndim == 1 else m.diagonal() for _, _, m in found]
    if math.isfinite(sum([d.sum().item() for d in diagonals])):
        return
    for (block, name, _), d in zip(found, diagonals, strict=True):
        if not all_finite(d):  # the trace overflows earlier
            error = Diverged(
                f"{name} contains NaN or Inf: lower the learning rate or raise the damping"
            )
            error.block = block
            raise error


def check_squared(gradients: Mapping[str, Tensor]) -> None:
    """Raise Diverged for the first of {block: gradient} whose squares are not finite.

    Second moments are made of these; on a GPU as `check_moments`.
    """
    if not gradients or waits(next(iter(gradients.values()))) or all_short(gradients.values()):
        return
    for block, g in gradients.items():
        if not all_short([g]):
            error = Diverged(
                "the gradient that its statistics are made of contains NaN or Inf, or its squares"
                " overflow"
            )
            error.block = block
            raise error
