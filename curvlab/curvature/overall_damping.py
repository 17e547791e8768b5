"""Rules that turn one overall damping λ into the parameter of each method's document (practice)."""

from __future__ import annotations

import math
from collections.abc import Callable

DampingRule = Callable[[float, int], float]
"""Rule from an overall damping λ and a batch size m to the document's own damping parameter.

So methods compare at one λ (practice).
"""


def same(overall: float, size: int) -> float:
    """Return λ itself, whatever the batch size."""
    return overall


def per_factor(overall: float, size: int) -> float:
    """Return ε = √λ, for two factors that make the Fisher matrix with ε added to each."""
    return math.sqrt(overall)


def per_factor_of_mean(overall: float, size: int) -> float:
    """Return ε = √(λ / m), for factors (and Adam's √v) of the root of Fisher / m.

    That is what batch-mean gradients of m examples give.
    """
    return math.sqrt(overall / size)


def of_mean(overall: float, size: int) -> float:
    """Return ε = λ / m, for an ε under the root of Fisher / m (`per_factor_of_mean`)."""
    return overall / size


def fixed(epsilon: float) -> DampingRule:
    """Return the rule that gives the same ε at every λ: the document's (Table 4.3).

    For a method that approximates no matrix whose damping λ could be.
    """
    return lambda overall, size: epsilon
