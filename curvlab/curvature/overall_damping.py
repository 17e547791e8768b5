"""One overall damping λ for all methods → the damping parameter of each one's document
(practice).
"""

from __future__ import annotations

import math
from collections.abc import Callable

DampingRule = Callable[[float, int], float]
"""Overall damping λ and batch size m → the document's own damping parameter, so that methods
compare at one λ (practice).
"""


def same(overall: float, size: int) -> float:
    """Return λ itself, whatever the batch size."""
    return overall


def per_factor(overall: float, size: int) -> float:
    """ε² = λ: two factors of the Fisher matrix, ε added to each."""
    return math.sqrt(overall)


def per_factor_of_mean(overall: float, size: int) -> float:
    """ε² = λ / m: from batch-mean gradients of m examples come Fisher / m, and factors (and Adam's
    √v) of its root.
    """
    return math.sqrt(overall / size)


def fixed(epsilon: float) -> DampingRule:
    """The same at every λ: the document's ε (Table 4.3) where no matrix is approximated whose
    damping λ could be.
    """
    return lambda overall, size: epsilon
