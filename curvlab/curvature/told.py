"""What a block tells probes: pairs that it has learnt from, and what is proven of its factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from curvlab.linalg.block_bfgs import BlockUpdate
from curvlab.linalg.bounds import Bounds
from curvlab.linalg.pairs import Pair

PairName = Literal["a", "g", "step"]
"""Which pair: of H_a, of H_g, or of parameters (of a block or of the whole vector)."""


@dataclass(frozen=True, kw_only=True)
class LearntPair:
    """One pair (s, y), or block of pairs, that a method has learnt from, as a probe sees it."""

    which: PairName
    pair: Pair | BlockUpdate
    mu2: float = math.nan
    """μ₂ of its damping, sᵀs ≤ sᵀy / μ₂; NaN: the method has none."""
    gamma: float = math.nan
    """γ where the B of the pair is γ I; NaN where it is another."""


@dataclass(frozen=True, kw_only=True)
class FactorBounds:
    """Proven bounds of the eigenvalues of H_a, H_g and H = H_g ⊗ H_a; None: nothing is proven."""

    a: Bounds | None = None
    g: Bounds | None = None
    product: Bounds | None = None
