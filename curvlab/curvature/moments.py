"""Second moments before an average takes them up: checks, and the term of L2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from curvlab.curvature.base import CurvatureBlock, block_with_defaults, with_own
from curvlab.divergence import named
from curvlab.errors import Diverged
from curvlab.finite import all_finite, all_short, waits
from curvlab.layers import Block
from curvlab.observation import Pass


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


def check_folds(
    statistics: Mapping[str, Any],
    blocks: Mapping[str, CurvatureBlock],
    partition: Mapping[str, Block],
    labels: Pass,
) -> None:
    """Raise Diverged, before anything is folded, where something to fold is not finite.

    A second moment, or a gradient at other labels than the data's.
    """
    having = {
        n: b for n, b in blocks.items() if b.memory and getattr(statistics.get(n), "used", False)
    }
    moments = {
        n: block_with_defaults(b).moments(statistics[n])
        for n, b in with_own("moments", having).items()
    }
    squared = [n for n, b in having.items() if b.reads == "gradient" and labels != "data"]
    try:
        check_moments((name, what, m) for name, each in moments.items() for what, m in each.items())
        check_squared({name: statistics[name].gradient for name in squared})
    except Diverged as error:
        raise named(error, str(partition[error.block])) from error


def with_terms(
    statistics: Mapping[str, Any], blocks: Mapping[str, CurvatureBlock], pull: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return statistics in which blocks that square the objective's gradient find its L2 term.

    Args:
        statistics: {block: of a pass at the data's labels}.
        blocks: {block: what reads them}.
        pull: {block: gradient of the L2 term}.
    """
    reading = [n for n, b in blocks.items() if block_with_defaults(b).squares_objective]
    return dict(statistics) | {
        n: statistics[n].with_term(pull[n]) for n in reading if n in statistics
    }
