"""What a block may be told of the momentum that it preconditions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mix:
    """How the momentum that is returned is made: m / divisor, m ← keep · m + take · gradient.

    Args:
        keep: of the m before; 0: none of it.
        take: of the gradient.
        divisor: of m.
        number: of the call, from 1; the m before is that of the number before.
    """

    keep: float
    take: float
    divisor: float
    number: int
