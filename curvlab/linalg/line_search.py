"""Line searches: how far to go along a direction. φ(t) is the loss at θ + t d, φ(0) known.

A loss of size f is known to a few ε f only, ε the machine's; decreases below that are not asked
for, as by Hager and Zhang's approximate conditions (2005, section 4), so that searches do not fail
where a method has converged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from curvlab.errors import Diverged


@dataclass(frozen=True)
class Found:
    """Step that a line search found, and how many it tried.

    `met`: it satisfies the conditions, and is not merely the last tried.
    """

    step: float
    trials: int
    met: bool


def armijo(
    phi: Callable[[float], float],
    start: float,
    slope: float,
    *,
    slack: float = 0.0,
    c: float = 1e-4,
    shrink: float = 0.5,
    maximum: int = 30,
) -> Found:
    """Return the first of 1, ½, ¼, … with φ(t) ≤ φ(0) + c t φ′(0) (Nocedal and Wright, Alg. 3.1).

    Their condition is (3.4).

    Args:
        phi: t → φ(t).
        start: φ(0).
        slope: φ′(0) < 0.
        slack: by how much φ is uncertain.
        c: of the decrease that the slope promises, the part that is asked for.
        shrink: what a step is multiplied by to be the next; ½ by default.
        maximum: of steps tried.

    Raises:
        Diverged: the direction does not descend.
    """
    _check(slope)
    t = 1.0
    for trial in range(1, maximum + 1):
        if phi(t) <= start + c * t * slope + slack:
            return Found(t, trial, True)
        t *= shrink
    return Found(t, maximum, False)


def wolfe(
    phi: Callable[[float], tuple[float, float]],
    start: float,
    slope: float,
    *,
    slack: float = 0.0,
    c1: float = 1e-4,
    c2: float = 0.9,
    maximum: int = 30,
) -> Found:
    """Return a step with φ(t) ≤ φ(0) + c₁ t φ′(0) and φ′(t) ≥ c₂ φ′(0), from t = 1, by bisection.

    Lewis and Overton 2013, Alg. 2.6. The second, the weak Wolfe condition, makes sᵀy > 0 for the
    pair of the step.

    Args:
        phi: t → (φ(t), φ′(t)).
        start: φ(0).
        slope: φ′(0) < 0.
        slack: by how much φ is uncertain.
        c1: as `c` of `armijo`.
        c2: of the slope, the part that may remain.
        maximum: of steps tried.

    Raises:
        Diverged: the direction does not descend.
    """
    _check(slope)
    low, high, t = 0.0, math.inf, 1.0
    for trial in range(1, maximum + 1):
        value, derivative = phi(t)
        if not value <= start + c1 * t * slope + slack:
            high = t
        elif derivative < c2 * slope:
            low = t
        else:
            return Found(t, trial, True)
        t = 2 * low if math.isinf(high) else (low + high) / 2
    return Found(t, maximum, False)


def _check(slope: float) -> None:
    if not slope < 0:
        raise Diverged(
            f"the slope along the direction is {slope:.3g}, not below 0: raise the damping"
        )
